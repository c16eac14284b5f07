"""Start new rows from the carried classes whose names mean something near: ``NEW_ROWS: nearest``.

A linear head knows nothing of a class that its file lacks, and its names' text embeddings do: a new row starts as a
mixture of the rows of carried classes. Everything here is decided by names and embeddings, so that no random number is
drawn and all processes find the same; a later fit, or training, treats such rows as new.

K   number of target classes
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from ...adapt.causes import Cause, Why
from ...adapt.classes import ClassTable
from ...adapt.layouts import HeadLayout
from ...adapt.plan import AdaptPlan, TensorPlan
from ...errors import TextError
from ...key import HEAD_ADAPT
from .bundle import FILE_KEY, NAMES_KEY, TextBundle, read_bundle

COUNT = 3
"""Carried classes that a new one starts from: on coco128 (docs/text_real.md) three gave more than the nearest alone."""

_SHOWN = 12


@dataclass(frozen=True)
class Neighbours:
    """The carried classes that a new class starts from.

    Args:
        classes: carried target classes, nearest first.
        shares: of their rows; they sum to 1.
    """

    classes: tuple[int, ...]
    shares: tuple[float, ...]


def nearest_classes(
    bundle: TextBundle, table: ClassTable, new: Collection[int], carried: Collection[int], count: int = COUNT
) -> dict[int, Neighbours]:
    """Find the nearest carried classes of each new one, by the cosine of their embeddings.

    Shares are the softmax of the cosines. Of equal cosines the lower class index comes first.

    Args:
        bundle: embeddings with names; classes that it lacks are left out on both sides.
        table: the target classes.
        new, carried: class indices of ``table``.
        count: how many at most.

    Returns:
        An entry for each new class that has an embedding.

    Raises:
        TextError: no new class has one, or no carried class has.
    """
    rows, missing = bundle.rows_for(table)
    embedded = [k for k, name in enumerate(table.names) if name not in set(missing)]
    place = {k: i for i, k in enumerate(embedded)}
    fresh, known = sorted(place.keys() & set(new)), sorted(place.keys() & set(carried))
    for what, found, wanted in (("new", fresh, new), ("carried", known, carried)):
        if not found:
            raise TextError(
                f"{FILE_KEY}, {bundle.path}",
                expected=f"embeddings of new and of carried classes, as {HEAD_ADAPT.NEW_ROWS} is 'nearest'",
                found=f"none of the {len(wanted)} {what} classes among its {len(bundle.names)} names",
                fix=f"Set {FILE_KEY} to a file that has both, and {NAMES_KEY} to its names, or "
                f"{HEAD_ADAPT.NEW_ROWS.set('recipe')}.",
            )
    unit = F.normalize(rows.double(), dim=1)
    cosines = unit[[place[k] for k in fresh]] @ unit[[place[k] for k in known]].t()
    best, order = cosines.sort(dim=1, descending=True, stable=True)
    shares = best[:, :count].softmax(dim=1).tolist()
    nearest = [[known[i] for i in own] for own in order[:, :count].tolist()]
    return {k: Neighbours(tuple(nearest[i]), tuple(shares[i])) for i, k in enumerate(fresh)}


def mixed_rows(
    tensor: torch.Tensor, layout: HeadLayout, num_classes: int, neighbours: Mapping[int, Neighbours]
) -> torch.Tensor:
    """Copy ``tensor``, giving each new class the mixture of its neighbours' rows; all others keep their bits.

    Args:
        tensor: of ``layout``, with one class axis.
        layout: where the classes are.
        num_classes: K.
        neighbours: by new class.
    """
    (axis,) = layout.class_axes
    out = tensor.clone()

    def rows(k: int) -> torch.Tensor:
        return layout.rows([k], num_classes, axis).to(tensor.device)

    for k, near in neighbours.items():
        # In double, because shares that sum to 1 then give equal rows back as they are.
        parts = [
            s * tensor.index_select(axis, rows(c)).double() for c, s in zip(near.classes, near.shares, strict=True)
        ]
        mixture = torch.stack(parts).sum(0).to(tensor.dtype)
        out.index_copy_(axis, rows(k), mixture)
    return out


@dataclass(frozen=True)
class NearestRows:
    """The changes that ``NEW_ROWS: nearest`` makes in one load.

    Args:
        plan: whose causes say it.
        neighbours: by tensor.
    """

    plan: AdaptPlan
    neighbours: Mapping[str, Mapping[int, Neighbours]]

    def apply(self, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return ``state`` with the new rows in place; tensors are replaced, never written to."""
        out = dict(state)
        for name, near in self.neighbours.items():
            layout = self.plan.layout(name)
            if layout is not None:
                out[name] = mixed_rows(out[name], layout, len(self.plan.target[layout.space]), near)
        return out

    def line(self) -> str:
        """Say for the log which class starts from which."""
        found: dict[str, str] = {}
        for name, near in self.neighbours.items():
            names = self.plan.target[self.plan.space_of(name)].names
            for k, own in near.items():
                found.setdefault(names[k], _words(names, own))
        shown = [f"{name} from {words}" for name, words in list(found.items())[:_SHOWN]]
        more = f", ... ({len(found) - _SHOWN} more)" if len(found) > _SHOWN else ""
        return f"{len(found)} new classes start from their nearest carried ones: {', '.join(shown)}{more}"


def plan_nearest(plan: AdaptPlan, path: str, names: object = None, *, count: int = COUNT) -> NearestRows:
    """Decide from names alone which new rows start from which carried ones.

    Rows are mixed in tensors that are carried and hold classes on one axis; every other new row keeps its recipe.

    Args:
        plan: of a load.
        path, names: see :func:`d2_headadapt.modeling.text.bundle.read_bundle`.
        count: see :func:`nearest_classes`.

    Raises:
        TextError: no file is named, it cannot be read, or it has neither list.
    """
    wanted = [t for t in plan.by_action("carried") if _has_both(t, plan)]
    if not wanted:
        return NearestRows(plan, {})
    if not path:
        raise TextError(
            FILE_KEY,
            expected=f"a file of text embeddings, as {HEAD_ADAPT.NEW_ROWS} is 'nearest'",
            found="none",
            fix=f"Set {FILE_KEY}, or {HEAD_ADAPT.NEW_ROWS.set('recipe')}.",
        )
    bundle = read_bundle(path, names)
    found: dict[str, dict[int, Neighbours]] = {}
    known: dict[tuple[object, ...], dict[int, Neighbours]] = {}
    for t in wanted:
        key = (t.space, t.new, t.carried)
        if key not in known:
            table = plan.target[t.space or ""]
            known[key] = nearest_classes(bundle, table, t.new, [k for k, _ in t.carried], count)
        found[t.name] = known[key]
    tensors = tuple(replace(t, why=_why(t, found[t.name])) if t.name in found else t for t in plan.tensors)
    return NearestRows(replace(plan, tensors=tensors), found)


def _has_both(t: TensorPlan, plan: AdaptPlan) -> bool:
    layout = plan.layout(t.name)
    single = layout is not None and len(layout.class_axes) == 1 and not layout.rebuilt and not layout.given
    # Embeddings are of things; the names of other label spaces mean something else.
    return single and t.space == "thing" and bool(t.new) and bool(t.carried)


def _why(t: TensorPlan, near: Mapping[int, Neighbours]) -> Why:
    return Why(Cause.MATCHED_AND_NEAREST, count=len(near), length=len(t.new))


def _words(names: tuple[str, ...], near: Neighbours) -> str:
    if len(near.classes) == 1:
        return names[near.classes[0]]
    return " + ".join(f"{share:.2f} {names[k]}" for k, share in zip(near.classes, near.shares, strict=True))
