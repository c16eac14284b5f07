"""Untrained rows: of a plan, of what a file says of itself, and of a model before and after a fit."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch

from ..adapt.classes import is_unnamed
from ..adapt.plan import AdaptPlan
from .provenance import UNTRAINED_ROWS, Provenance


def untrained_classes(plan: AdaptPlan, known: Provenance) -> dict[str, tuple[str, ...]]:
    """List classes of which some row is new, or came from rows that were never trained."""
    found = {space: set(names) for space, names in plan.new_classes().items()}
    for space, names in known.untrained.items():
        classes = plan.class_map(space)
        if classes is not None:
            pairs = classes.carried
            found.setdefault(space, set()).update(
                classes.target.names[t] for t, s in pairs if classes.source.names[s] in names
            )
    named = {space: sorted(name for name in names if not is_unnamed(name)) for space, names in found.items()}
    return {space: tuple(names) for space, names in named.items() if names}


def untrained_rows(plan: AdaptPlan, known: Provenance) -> dict[str, tuple[str, ...]]:
    """List the classes without a trained row, tensor by tensor, as far as the target classes are known."""
    stored = known.extra.get(UNTRAINED_ROWS)
    found: dict[str, tuple[str, ...]] = {}
    for t in plan.by_action("carried", "copied", "initialised"):
        table, classes = plan.target.get(t.space or ""), plan.class_map(t.space or "")
        if table is None:
            continue
        names = {table.names[k] for k in t.new if not is_unnamed(table.names[k])}
        listed = stored.get(t.name, ()) if isinstance(stored, Mapping) else ()
        if classes is not None and t.action != "initialised":
            names |= {table.names[a] for a, b in classes.carried if classes.source.names[b] in listed}
        if names:
            found[t.name] = tuple(sorted(names))
    return found


def projections(plan: AdaptPlan, tensors: Iterable[str]) -> list[str]:
    """Find the layers that lead from region features to embeddings; they are fitted in place of class rows."""
    groups = {layout.group for layout in plan.layouts if layout.given and layout.tensor in set(tensors)}
    return [layout.tensor for layout in plan.layouts if layout.group in groups and layout.agnostic]


def unchanged_classes(
    plan: AdaptPlan,
    new: Mapping[str, Sequence[int]],
    before: Mapping[str, torch.Tensor],
    after: Mapping[str, torch.Tensor],
) -> dict[str, tuple[str, ...]]:
    """List, tensor by tensor, the classes whose rows are what they were.

    Args:
        plan: of the last load.
        new: the classes to look at, tensor by tensor.
        before, after: tensors by name, at least those of ``new``, and what leads to embeddings among them.
    """
    layouts = {layout.tensor: layout for layout in plan.layouts}

    def same(name: str, k: int) -> bool:
        layout = layouts[name]
        if layout.given:
            # The rows of a text classifier are not fitted: the way to them is.
            return all(torch.equal(before[p], after[p]) for p in projections(plan, [name]) if p in before)
        axis = layout.class_axes[0]
        rows = layout.rows([k], layout.num_classes(before[name].shape) or 0, axis).to(before[name].device)
        return torch.equal(before[name].index_select(axis, rows), after[name].index_select(axis, rows))

    def untouched(name: str, k: int) -> bool:
        # A bias that was solved may be what it was: 0, where every box lies on its object already.
        beside = f"{name.removesuffix('bias')}weight"
        return same(name, k) and (
            beside == name or beside not in before or k not in new.get(beside, ()) or same(beside, k)
        )

    return {
        name: tuple(plan.target[plan.space_of(name)].names[k] for k in classes if untouched(name, k))
        for name, classes in new.items()
    }
