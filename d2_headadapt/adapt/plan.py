"""Plans: what happens to every tensor when a checkpoint meets a model, computed from names and shapes, then applied.

    plan_adaptation(names, shapes, layouts, tables) -> AdaptPlan
    AdaptPlan.apply(tensors of the file, tensors of the model) -> new state dict

Actions:
    copied       taken whole: nothing about its classes changed, or it has none
    carried      taken class by class: some class moved, is new, or was dropped
    initialised  class-sized, and nothing of it can be taken: the model's own initial values stay
    kept         not class-sized as far as anyone declared, and not in the file or of another shape: the model's stay
    dropped      in the file, used by nobody
    refused      loading it would be wrong, and only the user can say what is meant
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from ..errors import PlanRefused
from ..key import HEAD_ADAPT
from .causes import Cause, Shape, Why, sentence
from .classes import ClassMap, ClassTable
from .layouts import HeadLayout

PLAN_VERSION = 1
ACTIONS = ("copied", "carried", "initialised", "kept", "dropped", "refused")


@dataclass(frozen=True)
class TensorPlan:
    """The decision on one tensor; class numbers are indices into the tables of ``space``.

    Args:
        name: its name in the model, or in the file where it is dropped.
        action: one of :data:`ACTIONS`.
        space: label space of a class-sized or agnostic head tensor, else ``None``.
        group: its head group, else ``None``.
        source_shape, target_shape: shapes in the file and in the model; ``None`` where it is not there.
        carried: ``(target class, source class)`` pairs.
        new: target classes without a source.
        dropped: source classes that nobody takes.
        background: the rows that belong to no class (background) come from the file.
        verified: the class tables of both sides are known, or the tensor has no classes.
        why: the cause with the facts to it.

    Example:
        >>> from d2_headadapt import TensorPlan
        >>> one = TensorPlan("cls_score.bias", "carried", "thing", "head", (4,), (3,), carried=((0, 2),), new=(1,))
        >>> TensorPlan.from_json(one.to_json()) == one
        True
    """

    name: str
    action: str
    space: str | None = None
    group: str | None = None
    source_shape: Shape | None = None
    target_shape: Shape | None = None
    carried: tuple[tuple[int, int], ...] = ()
    new: tuple[int, ...] = ()
    dropped: tuple[int, ...] = ()
    background: bool = False
    verified: bool = True
    why: Why = field(default_factory=Why)

    @property
    def cause(self) -> Cause:
        """The cause, as a value to decide by."""
        return self.why.cause

    @property
    def reason(self) -> str:
        """The reason in words, for people only."""
        return sentence(self.why)

    def to_json(self) -> dict[str, Any]:
        """Write plain types; ``cause`` and ``facts`` are for programs, ``reason`` is for people."""
        data = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "why"}
        for name in ("source_shape", "target_shape"):
            data[name] = None if data[name] is None else list(data[name])
        data["carried"] = [list(pair) for pair in self.carried]
        data.update(new=list(self.new), dropped=list(self.dropped))
        return {**data, "cause": self.cause.value, "facts": self.why.facts(), "reason": self.reason}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> TensorPlan:
        """Read back ``data`` of :meth:`to_json`; with no cause, or one of a later version, the reason is kept."""
        known = {name: data[name] for name in cls.__dataclass_fields__ if name in data and name != "why"}
        known["why"] = Why.from_facts(data.get("cause"), data.get("facts", {}), str(data.get("reason", "")))
        for name in ("source_shape", "target_shape"):
            known[name] = None if known.get(name) is None else tuple(known[name])
        known["carried"] = tuple((int(t), int(s)) for t, s in known.get("carried", ()))
        known["new"] = tuple(known.get("new", ()))
        known["dropped"] = tuple(known.get("dropped", ()))
        return cls(**known)


@dataclass(frozen=True)
class AdaptPlan:
    """The full list of what happens to every tensor of a file and of a model.

    Args:
        tensors: in model order, then what the file has beside it.
        source, target: the class tables by label space, as far as they are known.
        layouts: of the model's head tensors; they expand class indices to tensor rows.
        maps: by label space, which class takes which: one of them for all tensors of the space that take anything. A
            space has none where its classes were not matched.
        assumed: label spaces whose source table nobody verified, see :attr:`Provenance.assumed`.
        found: what building the model at several class counts showed, in lines for people.

    Example:
        >>> import torch
        >>> from d2_headadapt import ClassTable, HeadLayout, plan_adaptation
        >>> old = {"cls_score.bias": torch.tensor([1.0, 2.0, 3.0, 9.0])}  # ant, bee, cat and background
        >>> new = {"cls_score.bias": torch.zeros(3)}  # cat, gnu and background
        >>> plan = plan_adaptation(
        ...     {name: value.shape for name, value in old.items()},
        ...     {name: value.shape for name, value in new.items()},
        ...     [HeadLayout("cls_score.bias", "thing", "head", extra=1)],
        ...     source_tables={"thing": ClassTable(["ant", "bee", "cat"])},
        ...     target_tables={"thing": ClassTable(["cat", "gnu"])},
        ... )
        >>> plan.apply(old, new)
        {'cls_score.bias': tensor([3., 0., 9.])}
        >>> plan.new_classes(), plan.coverage
        ({'thing': ('gnu',)}, 1.0)
    """

    tensors: tuple[TensorPlan, ...]
    source: Mapping[str, ClassTable] = field(default_factory=dict)
    target: Mapping[str, ClassTable] = field(default_factory=dict)
    layouts: tuple[HeadLayout, ...] = ()
    maps: Mapping[str, ClassMap] = field(default_factory=dict)
    assumed: tuple[str, ...] = ()
    found: tuple[str, ...] = ()

    @cached_property
    def _tensors(self) -> Mapping[str, TensorPlan]:
        # Of two entries of one name the first is the model's.
        return {t.name: t for t in reversed(self.tensors)}

    @cached_property
    def _layouts(self) -> Mapping[str, HeadLayout]:
        return {layout.tensor: layout for layout in self.layouts}

    def tensor(self, name: str) -> TensorPlan | None:
        """Look up what happens to the tensor ``name``; ``None`` where neither file nor model has it."""
        return self._tensors.get(name)

    def layout(self, tensor: str) -> HeadLayout | None:
        """Look up where the classes of ``tensor`` are; ``None`` where no layout names it."""
        return self._layouts.get(tensor)

    def space_of(self, tensor: str) -> str:
        """Look up the label space of a tensor's classes; empty where it has none."""
        found = self.tensor(tensor)
        return found.space or "" if found is not None else ""

    def by_action(self, *actions: str) -> tuple[TensorPlan, ...]:
        """Pick the tensors that one of ``actions`` happens to, in the plan's order."""
        return tuple(t for t in self.tensors if t.action in actions)

    @property
    def refused(self) -> tuple[TensorPlan, ...]:
        """The tensors whose shapes contradict the class tables; a plan with one is not applied."""
        return self.by_action("refused")

    @property
    def loads_nothing(self) -> bool:
        """Whether no tensor of the model takes anything from the file."""
        return not self.by_action("copied", "carried")

    @property
    def lost(self) -> tuple[str, ...]:
        """Label spaces whose lists differ and have names in common, of which no tensor of the file takes a row.

        What the user leaves out is not lost, nor is what the constructor knows, or what is not in the file.
        """
        spaces = {t.space for t in self.tensors if t.space is not None}
        found = []
        for space in sorted(spaces & self.source.keys() & self.target.keys()):
            mine = [t for t in self.tensors if t.space == space and t.source_shape and not t.cause.by_user]
            sized = [t for t in mine if not t.cause.meant and (t.new or t.carried or self._has_classes(t))]
            common = set(self.source[space].names) & set(self.target[space].names)
            if common and sized and all(t.action == "initialised" for t in sized):
                found.append(space)
        return tuple(found)

    def _has_classes(self, t: TensorPlan) -> bool:
        layout = self.layout(t.name)
        return layout is not None and not layout.agnostic

    def class_map(self, space: str) -> ClassMap | None:
        """Look up the map of one label space; ``None`` where its classes were not matched."""
        return self.maps.get(space)

    def changed(self) -> tuple[TensorPlan, ...]:
        """Pick the tensors of the file that reach the model otherwise than whole, though it is the same tensor."""
        return tuple(
            t
            for t in self.by_action("carried", "initialised", "kept")
            if t.source_shape is not None and not self._is_as_it_was(t)
        )

    def _is_as_it_was(self, t: TensorPlan) -> bool:
        """Tell whether a tensor is rebuilt, or embeddings from its text file, of the same classes."""
        found = self.maps.get(t.space or "")
        same_classes = t.source_shape == t.target_shape and (found is None or found.is_identity)
        return t.cause is Cause.REBUILT or (t.cause is Cause.GIVEN_BY_TEXT and same_classes)

    def new_classes(self) -> dict[str, tuple[str, ...]]:
        """Name the classes, by space, of which some row stays as the model was constructed."""
        found: dict[str, set[int]] = {}
        for t in self.tensors:
            if t.space is not None and t.action in ("carried", "initialised") and t.new:
                found.setdefault(t.space, set()).update(t.new)
        return {
            space: tuple(self.target[space].names[i] if space in self.target else f"class {i}" for i in sorted(indices))
            for space, indices in found.items()
        }

    @property
    def coverage(self) -> float:
        """Share of the file's tensors that find a place in the model."""
        return self._share(self.tensors)

    @property
    def class_coverage(self) -> tuple[int, int]:
        """Classes of the model that the file gives rows, and those it has; of label spaces whose classes are known."""
        counts = self.summary()["classes"].values()
        carried = sum(count["carried"] for count in counts)
        return carried, carried + sum(count["new"] for count in counts)

    def coverage_by_submodule(self) -> dict[str, tuple[int, int]]:
        """Count by top-level submodule of the file: (tensors with a place in the model, tensors in the file)."""
        parts: dict[str, list[TensorPlan]] = {}
        for t in self.tensors:
            if t.source_shape is not None:
                parts.setdefault(t.name.split(".")[0], []).append(t)
        return {part: (sum(map(_has_place, ts)), len(ts)) for part, ts in parts.items()}

    @staticmethod
    def _share(tensors: Iterable[TensorPlan]) -> float:
        in_file = [t for t in tensors if t.source_shape is not None]
        return sum(map(_has_place, in_file)) / len(in_file) if in_file else 0.0

    def summary(self) -> dict[str, Any]:
        """Count tensors by action and by head group, and classes by label space."""
        groups: dict[str, Counter[str]] = {}
        classes: dict[str, dict[str, int]] = {}
        for t in self.tensors:
            if t.group is not None:
                groups.setdefault(t.group, Counter())[t.action] += 1
        for space in {t.space for t in self.tensors if t.space is not None}:
            found = self.class_map(space)
            if found is not None:
                classes[space] = {
                    "carried": len(found.carried),
                    "new": len(found.new),
                    "dropped": len(found.dropped),
                }
            elif space in self.target:
                classes[space] = {"carried": 0, "new": len(self.new_classes().get(space, ())), "dropped": 0}
        counts = Counter(t.action for t in self.tensors)
        return {
            "actions": {action: counts.get(action, 0) for action in ACTIONS},
            "groups": {group: dict(count) for group, count in groups.items()},
            "classes": dict(sorted(classes.items())),
        }

    def to_json(self) -> dict[str, Any]:
        """Write the stable form: plain types only, class numbers as indices."""
        return {
            "version": PLAN_VERSION,
            "source": {space: list(table.names) for space, table in self.source.items()},
            "target": {space: list(table.names) for space, table in self.target.items()},
            "tensors": [t.to_json() for t in self.tensors],
            "summary": self.summary(),
            "layouts": [layout.to_json() for layout in self.layouts],
            "maps": {space: list(found.rows) for space, found in self.maps.items()},
            "assumed": list(self.assumed),
            "found": list(self.found),
            "origins": {
                side: {space: table.origin for space, table in tables.items()}
                for side, tables in (("source", self.source), ("target", self.target))
            },
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any] | str) -> AdaptPlan:
        """Read a plan back.

        Args:
            data: what :meth:`to_json` wrote, or its text.

        Raises:
            PlanRefused: not a plan, or of a higher version.
        """
        try:
            loaded: Any = json.loads(data) if isinstance(data, str) else data
            version = loaded["version"]
            if version == PLAN_VERSION:
                tensors = tuple(TensorPlan.from_json(t) for t in loaded["tensors"])
                origins = loaded.get("origins", {})
                source, target = (
                    {
                        space: ClassTable(names, origins.get(side, {}).get(space, f"the plan's {space} {side}"))
                        for space, names in loaded[side].items()
                    }
                    for side in ("source", "target")
                )
                rows = loaded["maps"] if "maps" in loaded else _rows_of_tensors(tensors, source, target)
                return cls(
                    tensors,
                    source,
                    target,
                    tuple(HeadLayout.from_json(x) for x in loaded.get("layouts", ())),
                    {space: _checked_map(source[space], target[space], tuple(of)) for space, of in rows.items()},
                    tuple(map(str, loaded.get("assumed", ()))),
                    tuple(map(str, loaded.get("found", ()))),
                )
        except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as exc:
            raise PlanRefused(
                "plan",
                expected="the JSON that `d2-headadapt plan --json` writes",
                found=f"{type(exc).__name__}: {exc}",
                fix="Make the plan again.",
            ) from exc
        raise PlanRefused(
            "plan", expected=f"version {PLAN_VERSION}", found=f"version {version!r}", fix="Upgrade d2_headadapt."
        )

    def apply(self, source: Mapping[str, torch.Tensor], model: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return the state dict that the plan describes; neither input is changed.

        Args:
            source: the file's tensors under the names that the plan uses.
            model: ``model.state_dict()``; gives new rows, and everything that is initialised or kept.

        Returns:
            A new dict with every name of ``model``. Whole tensors are shared with an input, not copied.

        Raises:
            PlanRefused: the plan refuses a tensor, or a value that it takes has another kind of number than the
                model's, or is NaN or infinite once it is the model's.
        """
        self.raise_if_refused()
        out = dict(model)
        for t in self.by_action("copied", "carried"):
            layout = self.layout(t.name)
            value = converted(t.name, source[t.name], model[t.name].dtype)
            check_finite(t, value, layout, self)
            out[t.name] = source[t.name]
            if t.action == "carried" and layout is not None:
                out[t.name] = move_rows(value, model[t.name], layout, self.maps[layout.space])
        return out

    def raise_if_refused(self) -> None:
        """Raise where the plan refuses a tensor.

        Raises:
            PlanRefused: names the first one.
        """
        for t in self.refused:
            fix = "Nothing was loaded."
            if t.cause is Cause.UNKNOWN_HEAD:
                line = f"Declare it: {' or '.join(t.why.names)}; or set " if t.why.names else "Set "
                fix = f"{line}{HEAD_ADAPT.UNKNOWN_HEADS.set('reinitialise')}. {fix}"
            raise PlanRefused(t.name, expected="one meaning", found=t.reason, fix=fix)


def _checked_map(source: ClassTable, target: ClassTable, rows: tuple[int | None, ...]) -> ClassMap:
    if len(rows) != len(target) or not all(s is None or s in range(len(source)) for s in rows):
        raise ValueError(f"a map of {len(target)} classes onto {len(source)}: {rows}")
    return ClassMap(source, target, rows)


def _rows_of_tensors(
    tensors: Iterable[TensorPlan], source: Mapping[str, ClassTable], target: Mapping[str, ClassTable]
) -> dict[str, list[int | None]]:
    """Rebuild the class maps of a plan written before plans kept them, from what its tensors show."""
    found: dict[str, list[int | None]] = {}
    for t in sorted(tensors, key=lambda t: t.action == "initialised"):
        rows = dict(t.carried)
        space = t.space or ""
        matched = t.action in ("copied", "carried", "initialised") and (t.carried or t.new)
        if matched and space in source and space in target and space not in found:
            found[space] = [rows.get(k) for k in range(len(target[space]))]
    return found


def _has_place(t: TensorPlan) -> bool:
    """Tell whether the model has the tensor as well; not one of a trained head that is left out for want of names."""
    if t.action == "initialised" and t.cause.surprising:
        return False
    return t.source_shape is not None and t.action in ("copied", "carried", "initialised", "refused")


def converted(name: str, value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return ``value`` as ``dtype``, the model's; raise where that would make other numbers of it, but for rounding."""
    if value.dtype == dtype or value.device.type == "meta":
        return value
    fix = f"Convert it in the file, or leave it out: {HEAD_ADAPT.EXCLUDE.set([name])}. Nothing was loaded."
    if _number_kind(value.dtype) != _number_kind(dtype):
        expected, found = f"{_number_kind(dtype)} numbers, as the model's ({dtype})", str(value.dtype)
        raise PlanRefused(name, expected=expected, found=found, fix=fix)
    out = value.to(dtype)
    # An 8-bit float has no infinity that would show a number too large for it, and an integer none at all.
    exact = not dtype.is_floating_point and not dtype.is_complex
    if exact and not torch.equal(out.to(value.dtype), value):
        raise PlanRefused(name, expected=f"numbers that {dtype} holds", found=f"others, as {value.dtype}", fix=fix)
    if dtype.is_floating_point and dtype.itemsize == 1:
        raise PlanRefused(name, expected=f"{dtype}, as the model's", found=str(value.dtype), fix=fix)
    return out


def _number_kind(dtype: torch.dtype) -> str:
    return "complex" if dtype.is_complex else "floating point" if dtype.is_floating_point else "whole"


def check_finite(t: TensorPlan, value: torch.Tensor, layout: HeadLayout | None, plan: AdaptPlan) -> None:
    """Raise where a value that the plan takes is NaN or infinite, naming the classes it belongs to."""
    if not (value.is_floating_point() or value.is_complex()) or value.device.type == "meta":
        return
    parts = torch.view_as_real(value) if value.is_complex() else value
    # A sum meets every NaN and infinity in one pass and no extra memory; it may also overflow by itself, hence the
    # second look. torch cannot add numbers of 8 bits.
    if bool(torch.isfinite((parts.float() if parts.element_size() == 1 else parts).sum())):
        return
    broken = ~torch.isfinite(value)
    names: list[str] = []
    if layout is not None and layout.axes and layout.space in plan.source:
        table = plan.source[layout.space]
        axis = layout.class_axes[0]
        per_row = broken.movedim(axis, 0).flatten(1).any(1) if value.dim() > 1 else broken
        taken = {s for _, s in t.carried}
        broken_classes = [s for s in range(len(table)) if bool(per_row[layout.rows([s], len(table), axis)].any())]
        fixed = bool(per_row[layout.fixed_rows(len(table), axis)].any()) if t.background else False
        names = [table.names[s] for s in broken_classes if s in taken or t.action == "copied"]
        if not names and not fixed:
            return
        names += ["background"] if fixed else []
    elif not bool(broken.any()):
        return
    rows = f" in the rows of {', '.join(names)}" if names else ""
    raise PlanRefused(
        t.name,
        expected="finite numbers",
        found=f"{int(broken.sum())} NaN or infinite values of {value.numel()}{rows}",
        fix="The checkpoint is damaged or its training diverged: use an earlier one. Nothing was loaded.",
    )


def carried_or_copied(space_map: ClassMap) -> str:
    """Name the action of a matched, class-sized tensor."""
    return "copied" if space_map.is_identity else "carried"


_BITS = {
    dtype: bits
    for name, bits in {
        "float8": torch.uint8,
        "uint16": torch.int16,
        "uint32": torch.int32,
        "uint64": torch.int64,
    }.items()
    for dtype in vars(torch).values()
    if isinstance(dtype, torch.dtype) and str(dtype).startswith(f"torch.{name}")
}


def move_rows(source: torch.Tensor, base: torch.Tensor, layout: HeadLayout, classes: ClassMap) -> torch.Tensor:
    """Return ``base`` with every carried class, and all rows that belong to no class, taken from ``source``.

    Args:
        source: tensor of ``layout`` for the K_source classes of ``classes.source``.
        base: tensor of ``layout`` for the K_target classes of ``classes.target``; gives dtype, device and new rows.
        layout: where the classes are, the same kind on both sides.
        classes: target class -> source class.

    Returns:
        A new tensor of ``base``'s shape. Moved rows equal the source's, bit for bit where the dtypes agree.
    """
    if base.device.type == "meta":
        return base
    carried = classes.carried
    targets, sources = [t for t, _ in carried], [s for _, s in carried]
    out = base.clone()
    moved = source.to(device=out.device, dtype=out.dtype)
    # As bits: torch has no index_copy of 8-bit floats and unsigned integers.
    bits = _BITS.get(out.dtype, out.dtype)
    out, moved = out.view(bits), moved.view(bits)
    places: list[tuple[int, torch.Tensor]] = []
    for axis in layout.class_axes:
        to_rows, from_rows = (
            torch.cat([layout.fixed_rows(len(table), axis), layout.rows(indices, len(table), axis)]).to(out.device)
            for table, indices in ((classes.target, targets), (classes.source, sources))
        )
        moved = moved.index_select(axis, from_rows)
        places.append((axis, to_rows))
    return _write(out, moved, places).view(base.dtype)


def _write(out: torch.Tensor, moved: torch.Tensor, places: list[tuple[int, torch.Tensor]]) -> torch.Tensor:
    """Write ``moved`` into ``out`` at the cross product of ``places``."""
    (axis, rows), rest = places[0], places[1:]
    if not rest:
        return out.index_copy(axis, rows, moved)
    inner = _write(out.index_select(axis, rows), moved, rest)
    return out.index_copy(axis, rows, inner)


def new_rows_mask(layout: HeadLayout, classes: ClassMap, shape: tuple[int, ...]) -> torch.Tensor:
    """Mark the elements of a target tensor that belong to a new class: bool, of ``shape``."""
    mask = torch.zeros(shape, dtype=torch.bool)
    for axis in layout.class_axes:
        mask.index_fill_(axis, layout.rows(classes.new, len(classes.target), axis), True)
    return mask
