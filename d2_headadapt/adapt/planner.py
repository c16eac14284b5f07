"""How a plan is made: from names, shapes, layouts and class tables, never from values.

Head groups are decided in :mod:`d2_headadapt.adapt.planner`; everything else goes by name and shape.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from ..errors import ClassTableError
from ..key import HEAD_ADAPT, TASKS, Key
from .causes import Cause, Shape, Why
from .classes import KEY_SUFFIXES, ClassMap, ClassTable
from .discovery import Refusal
from .layouts import HeadLayout
from .matching import match_classes, parse_aliases
from .plan import AdaptPlan, TensorPlan, carried_or_copied
from .vocabularies import reviewed_pairs, synonyms_of


def source_key(space: str) -> Key:
    """The config key that names the source classes of a label space."""
    if space not in KEY_SUFFIXES:
        return TASKS[space].source_classes
    return HEAD_ADAPT[f"SOURCE_CLASSES{KEY_SUFFIXES[space]}"]


def target_key(space: str) -> Key:
    """The config key that names the target classes of a label space."""
    if space not in KEY_SUFFIXES:
        return TASKS[space].classes
    return HEAD_ADAPT[f"TARGET_CLASSES{KEY_SUFFIXES[space]}"]


@dataclass
class _Misfit:
    """Why a group cannot be taken, and at which tensor that shows."""

    tensor: str
    why: Why
    refused: bool = False


@dataclass
class HeadGroup:
    """The tensors that change together or not at all, and what is known about their classes on both sides."""

    members: Sequence[HeadLayout]
    source_shapes: Mapping[str, Shape]
    target_shapes: Mapping[str, Shape]
    sources: Mapping[str, ClassTable]
    targets: Mapping[str, ClassTable]
    maps: Mapping[str, ClassMap]
    file_layouts: Mapping[str, HeadLayout]
    initialise: Collection[str]
    excluded: Mapping[str, Why]

    def plan(self) -> list[TensorPlan]:
        """Decide for every member."""
        carried = [m for m in self.members if not m.rebuilt]
        plans = [self._entry(m, "kept", verified=True, why=Why(Cause.REBUILT)) for m in self.members if m.rebuilt]
        absent = self._absent_parts(carried)
        plans += [
            self._entry(
                m,
                "kept" if m.agnostic else "initialised",
                verified=True,
                new=self._every(m),
                why=self.excluded[m.tensor],
            )
            for m in carried
            if m.tensor in self.excluded
        ]
        present = [m for m in carried if m.part not in absent and m.tensor not in self.excluded]
        for m in carried:
            if m.part in absent and m.tensor not in self.excluded:
                action = "kept" if m.agnostic else "initialised"
                plans.append(self._entry(m, action, verified=True, new=self._every(m), why=Why(Cause.NOT_IN_FILE)))
        if not present:
            return plans
        forced = [m for m in present if m.space in self.initialise]
        misfit = self._forced(forced) if forced else self._misfit(present)
        if misfit is None:
            return plans + [self._take(m) for m in present]
        if misfit.refused:
            return plans + [
                self._entry(m, "refused", verified=False, why=misfit.why)
                if m.tensor == misfit.tensor
                else self._entry(m, "kept", verified=False, why=Why(Cause.GROUP_REFUSED, blame=misfit.tensor))
                for m in present
            ]
        for m in present:
            others = m.tensor != misfit.tensor and not forced
            plans.append(
                self._entry(
                    m,
                    "initialised",
                    verified=m.space in self.maps or bool(forced),
                    new=self._every(m),
                    dropped=self._every_source(m),
                    why=replace(misfit.why, blame=misfit.tensor) if others else misfit.why,
                )
            )
        return plans

    def _entry(
        self,
        m: HeadLayout,
        action: str,
        *,
        verified: bool,
        why: Why,
        new: tuple[int, ...] = (),
        dropped: tuple[int, ...] = (),
    ) -> TensorPlan:
        return TensorPlan(
            m.tensor,
            action,
            m.space,
            m.group,
            self.source_shapes.get(m.tensor),
            self.target_shapes[m.tensor],
            new=new,
            dropped=dropped,
            verified=verified,
            why=why,
        )

    def _every(self, m: HeadLayout) -> tuple[int, ...]:
        count = None if m.agnostic else m.num_classes(self.target_shapes[m.tensor])
        return tuple(range(count or 0))

    def _every_source(self, m: HeadLayout) -> tuple[int, ...]:
        table = self.sources.get(m.space)
        return tuple(range(len(table))) if table is not None and not m.agnostic else ()

    def _absent_parts(self, members: Iterable[HeadLayout]) -> set[str]:
        parts: dict[str, list[bool]] = {}
        for m in members:
            parts.setdefault(m.part, []).append(m.tensor in self.source_shapes)
        return {part for part, found in parts.items() if not any(found)}

    def _forced(self, members: Sequence[HeadLayout]) -> _Misfit:
        return _Misfit(members[0].tensor, Why(Cause.FORCED_NONE, key=source_key(members[0].space).yaml))

    def _misfit(self, members: Sequence[HeadLayout]) -> _Misfit | None:
        """The first thing that keeps the group from being taken; differences of kind come before counts."""
        for m in members:
            if m.tensor not in self.source_shapes:
                return _Misfit(m.tensor, Why(Cause.PART_MISSING))
        checks = (self._kind, self._known if members[0].space in self.maps else self._unknown)
        for check in checks:
            for m in sorted(members, key=lambda m: not m.agnostic):
                misfit = check(m, self.source_shapes[m.tensor], self.target_shapes[m.tensor])
                if misfit is not None:
                    return misfit
        return None

    def _kind(self, m: HeadLayout, in_file: Shape, in_model: Shape) -> _Misfit | None:
        stored = self.file_layouts.get(m.tensor)
        if stored is not None and not stored.same_kind(m):
            why = Why(Cause.OTHER_KIND, source_kind=stored.describe(), target_kind=m.describe())
            return _Misfit(m.tensor, why)
        others = [axis for axis in range(max(len(in_file), len(in_model))) if axis not in m.class_axes]
        if len(in_file) != len(in_model) or any(in_file[a] != in_model[a] for a in others):
            return _Misfit(m.tensor, self._at(m, self._shape_cause(m, in_file, in_model)))
        return None

    def _shape_cause(self, m: HeadLayout, in_file: Shape, in_model: Shape) -> Cause:
        table = self.sources.get(m.space)
        if m.by_choice and table is not None and in_file[0] == len(table) * m.rows_per_class != in_model[0]:
            return Cause.AGNOSTIC_IN_MODEL
        return Cause.OTHER_ANCHORS if m.groups > 1 else Cause.OTHER_SHAPE

    def _at(self, m: HeadLayout, cause: Cause) -> Why:
        """A cause with the shapes of a tensor that both sides have."""
        in_file, in_model = self.source_shapes[m.tensor], self.target_shapes[m.tensor]
        return Why(cause, source_shape=tuple(in_file), target_shape=tuple(in_model))

    def _unknown_side(self, m: HeadLayout) -> tuple[str, str]:
        """The side whose classes are unknown, and the key that names them."""
        return ("model", target_key(m.space).yaml) if m.space in self.sources else ("file", source_key(m.space).yaml)

    def _known(self, m: HeadLayout, in_file: Shape, in_model: Shape) -> _Misfit | None:
        source, target = self.sources[m.space], self.targets[m.space]
        if m.agnostic:
            if m.by_choice and len(source) == 1 and len(target) > 1 and m.tensor not in self.file_layouts:
                return _Misfit(m.tensor, replace(self._at(m, Cause.ONE_OR_AGNOSTIC), names=source.names), refused=True)
            return None
        kind = m.describe()
        if not m.fits(in_model, len(target)):
            why = replace(self._at(m, Cause.MODEL_MISFIT), target_kind=kind, table=target.origin, length=len(target))
            return _Misfit(m.tensor, why, refused=True)
        if m.fits(in_file, len(source)):
            return None
        per_class = m.size(m.class_axes[0], 1) - m.size(m.class_axes[0], 0)
        if not m.extra and in_file[m.class_axes[0]] == per_class:
            return _Misfit(m.tensor, replace(self._at(m, Cause.AGNOSTIC_IN_FILE), target_kind=kind))
        why = replace(
            self._at(m, Cause.TABLE_MISFIT),
            key=source_key(m.space).yaml,
            target_kind=kind,
            table=source.origin,
            length=len(source),
            count=m.num_classes(in_file),
        )
        return _Misfit(m.tensor, why, refused=True)

    def _unknown(self, m: HeadLayout, in_file: Shape, in_model: Shape) -> _Misfit | None:
        if in_file == in_model:
            return None
        side, key = self._unknown_side(m)
        return _Misfit(m.tensor, replace(self._at(m, Cause.UNKNOWN_CLASSES), side=side, key=key))

    def _take(self, m: HeadLayout) -> TensorPlan:
        in_file, in_model = self.source_shapes[m.tensor], self.target_shapes[m.tensor]
        found = self.maps.get(m.space)
        if m.given == "file":
            return self._entry(m, "kept", verified=True, why=Why(Cause.GIVEN_BY_TEXT))
        if found is None:
            side, key = self._unknown_side(m)
            return TensorPlan(
                m.tensor,
                "copied",
                m.space,
                m.group,
                in_file,
                in_model,
                verified=False,
                why=Why(Cause.SHAPES_AGREE, key=key, side=side),
                background=bool(m.extra),
            )
        if m.agnostic:
            return self._entry(m, "copied", verified=True, why=Why(Cause.AGNOSTIC))
        background = bool(m.extra)
        action = carried_or_copied(found)
        why = Why(Cause.IDENTICAL if found.is_same else Cause.MATCHED)
        if m.given and found.new:
            why = Why(Cause.MATCHED_AND_TEXT, count=len(found.new))
        if not found.carried and not len(m.fixed_rows(len(found.source))):
            if m.given:
                return self._entry(m, "kept", verified=True, why=Why(Cause.NO_CLASS_BUT_TEXT))
            action, why = "initialised", Why(Cause.NO_CLASS_IN_FILE)
        return TensorPlan(
            m.tensor,
            action,
            m.space,
            m.group,
            in_file,
            in_model,
            found.carried,
            () if m.given else found.new,
            found.dropped,
            background,
            True,
            why,
        )


def plan_adaptation(
    source_shapes: Mapping[str, Shape],
    target_shapes: Mapping[str, Shape],
    layouts: Sequence[HeadLayout],
    *,
    source_tables: Mapping[str, ClassTable] | None = None,
    target_tables: Mapping[str, ClassTable] | None = None,
    source_layouts: Sequence[HeadLayout] = (),
    aliases: Sequence[str] = (),
    match: str = "name",
    initialise: Collection[str] = (),
    dropped: Mapping[str, Why] | None = None,
    excluded: Mapping[str, Why] | None = None,
    unknown: Sequence[Refusal] = (),
    complete: bool = False,
    unknown_heads: str = "refuse",
    found: Sequence[str] = (),
) -> AdaptPlan:
    """Decide what happens to every tensor of a file and of a model.

    Args:
        source_shapes: the file's tensors, under the model's names where the two correspond.
        target_shapes: the model's tensors.
        layouts: of the model, from :func:`d2_headadapt.adapt.layouts.layouts_of`.
        source_tables, target_tables: class tables by label space, where known.
        source_layouts: of the file, from its provenance; what they do not name is taken to be of the model's kind
            and checked against the table's size.
        aliases, match: see :func:`d2_headadapt.adapt.matching.match_classes`.
        initialise: label spaces whose head groups keep the model's initial values whatever the file holds.
        dropped: names of the file that find no place, with the cause.
        excluded: tensors that the user leaves out, with the cause; the rest of their head group is still taken.
        unknown: class-sized tensors that no layout moves, from
            :func:`d2_headadapt.adapt.unknown_heads.know_heads`.
        complete: no other tensor without a layout has classes; else one with as many rows as classes is marked as
            unverified.
        unknown_heads: ``"refuse"``, ``"reinitialise"`` or ``"keep"`` them, where their classes differ.
        found: lines on what building the model showed, for the reader.

    Returns:
        AdaptPlan: nothing is loaded yet.

    Raises:
        ClassTableError: an alias that fits no table, or an ambiguous name.

    Example:
        >>> from d2_headadapt import ClassTable, HeadLayout, plan_adaptation
        >>> plan = plan_adaptation(
        ...     {"stem.weight": (8, 3), "cls_score.weight": (4, 8)},
        ...     {"stem.weight": (8, 3), "cls_score.weight": (3, 8)},
        ...     [HeadLayout("cls_score.weight", "thing", "head", extra=1)],
        ...     source_tables={"thing": ClassTable(["ant", "bee", "cat"])},
        ...     target_tables={"thing": ClassTable(["cat", "gnu"])},
        ... )
        >>> for tensor in plan.tensors:
        ...     print(tensor.name, tensor.action, tensor.carried, tensor.new)
        stem.weight copied () ()
        cls_score.weight carried ((0, 2),) (1,)
    """
    targets = dict(target_tables or {})
    sources = {s: t for s, t in (source_tables or {}).items() if s not in initialise}
    out = dict(excluded or {})
    used_spaces = {layout.space for layout in layouts} | {refusal.sized.space for refusal in unknown}
    if match == "position":
        _name_by_position(layouts, source_shapes, targets, sources, initialise)
    maps = match_tables(
        {s: t for s, t in sources.items() if s in used_spaces},
        {s: t for s, t in targets.items() if s in used_spaces},
        aliases,
        match,
    )
    planned: dict[str, TensorPlan] = {}
    groups: dict[str, list[HeadLayout]] = {}
    for layout in layouts:
        groups.setdefault(layout.group, []).append(layout)
    file_layouts = {layout.tensor: layout for layout in source_layouts}
    for members in groups.values():
        group = HeadGroup(members, source_shapes, target_shapes, sources, targets, maps, file_layouts, initialise, out)
        planned.update({t.name: t for t in group.plan()})
    for refusal in unknown:
        name, space = refusal.sized.tensor, refusal.sized.space
        if name in planned or name in out or name not in source_shapes:
            continue
        shapes = source_shapes[name], target_shapes[name]
        if space in initialise:
            planned[name] = _afresh(refusal, *shapes, Why(Cause.FORCED_NONE, key=source_key(space).yaml), targets)
        elif space in maps and not maps[space].is_identity:
            # Where every class keeps its row, the whole tensor is right whatever its layout.
            planned[name] = _unknown_head(refusal, *shapes, unknown_heads, targets)
    counts = set() if complete else _counts_of(maps)
    tensors = [
        planned[name] if name in planned else _without_layout(name, source_shapes.get(name), shape, counts, out)
        for name, shape in target_shapes.items()
    ]
    tensors += [
        TensorPlan(name, "dropped", source_shape=shape, why=out.get(name, Why(Cause.NOT_IN_MODEL)))
        for name, shape in source_shapes.items()
        if name not in target_shapes
    ]
    tensors += [TensorPlan(name, "dropped", why=why) for name, why in (dropped or {}).items()]
    in_use = _maps_in_use(tensors, maps)
    return AdaptPlan(tuple(tensors), sources, targets, tuple(layouts), in_use, found=tuple(found))


def match_tables(
    sources: Mapping[str, ClassTable], targets: Mapping[str, ClassTable], aliases: Sequence[str], match: str
) -> dict[str, ClassMap]:
    """Match the classes of every label space that has both tables.

    Args:
        sources: the file's tables by label space.
        targets: the model's.
        aliases: ``"target=source"``; each goes to the spaces that know both of its names.
        match: ``"name"``, or ``"position"`` for lists of equal length in the same order.

    Raises:
        ClassTableError: an alias that no space knows, or tables that cannot be matched.

    Example:
        >>> from d2_headadapt import ClassTable, match_tables
        >>> old, new = ClassTable(["ant", "bee", "cat"]), ClassTable(["gnu", "tomcat"])
        >>> match_tables({"thing": old}, {"thing": new}, ["tomcat=cat"], "name")["thing"].rows
        (None, 2)
    """
    spaces = [space for space in targets if space in sources]
    by_space: dict[str, list[str]] = {space: [] for space in spaces}
    for alias in aliases:
        errors: list[ClassTableError] = []
        for space in spaces:
            try:
                parse_aliases([alias], targets[space], sources[space])
                by_space[space].append(alias)
            except ClassTableError as exc:
                errors.append(exc)
        if errors and len(errors) == len(spaces):
            raise errors[0]
    return {
        space: match_classes(
            targets[space],
            sources[space],
            aliases=by_space[space],
            match=match,
            source_synonyms=synonyms_of(sources[space]),
            target_synonyms=synonyms_of(targets[space]),
            reviewed=reviewed_pairs(),
        )
        for space in spaces
    }


def _maps_in_use(tensors: Iterable[TensorPlan], maps: Mapping[str, ClassMap]) -> dict[str, ClassMap]:
    """The matched maps as far as tensors follow them; where a space's heads all start afresh, every class is new."""
    follow: set[str | None] = set()
    afresh: set[str | None] = set()
    for t in tensors:
        if t.cause in (Cause.GIVEN_BY_TEXT, Cause.NO_CLASS_BUT_TEXT):
            follow.add(t.space)
        elif t.carried or t.new:
            (afresh if t.action == "initialised" else follow).add(t.space)
    return {
        space: found if space in follow else ClassMap(found.source, found.target, (None,) * len(found.target))
        for space, found in maps.items()
        if space in follow | afresh
    }


def _name_by_position(
    layouts: Iterable[HeadLayout],
    source_shapes: Mapping[str, Shape],
    targets: Mapping[str, ClassTable],
    sources: dict[str, ClassTable],
    initialise: Collection[str],
) -> None:
    """Position needs no names: an unnamed file gets a table of the count that its classifier shows."""
    for layout in layouts:
        shape = source_shapes.get(layout.tensor)
        count = layout.num_classes(shape) if shape is not None and layout.axes and not layout.rebuilt else None
        if count and layout.space in targets and layout.space not in sources and layout.space not in initialise:
            names = [f"class {i} of the file" for i in range(count)]
            sources[layout.space] = ClassTable(names, "the file, by position")


def _unknown_head(
    refusal: Refusal, in_file: Shape, in_model: Shape, unknown_heads: str, targets: Mapping[str, ClassTable]
) -> TensorPlan:
    """What happens to a class-sized tensor that no layout moves, where the classes differ."""
    sized, key = refusal.sized, HEAD_ADAPT.UNKNOWN_HEADS.yaml
    if unknown_heads == "refuse":
        why = Why(
            Cause.UNKNOWN_HEAD,
            key=sized.key,
            source_shape=tuple(in_file),
            target_shape=tuple(in_model),
            names=refusal.lines,
            text=refusal.reason,
        )
        return TensorPlan(sized.tensor, "refused", sized.space, None, in_file, in_model, verified=False, why=why)
    if unknown_heads == "keep" and in_file == in_model:
        why = Why(Cause.UNKNOWN_KEPT, key=key)
        return TensorPlan(sized.tensor, "copied", sized.space, None, in_file, in_model, verified=False, why=why)
    return _afresh(refusal, in_file, in_model, Why(Cause.UNKNOWN_AFRESH, key=key), targets)


def _afresh(
    refusal: Refusal, in_file: Shape, in_model: Shape, why: Why, targets: Mapping[str, ClassTable]
) -> TensorPlan:
    """A tensor without a layout that takes nothing from the file; it is a head group of its own."""
    name, space = refusal.sized.tensor, refusal.sized.space
    new = tuple(range(len(targets[space]))) if space in targets else ()
    return TensorPlan(name, "initialised", space, name, in_file, in_model, new=new, why=why)


def _counts_of(maps: Mapping[str, ClassMap]) -> set[int]:
    """As many rows as there are classes, with and without background, where some class moves."""
    return {len(m.target) + extra for m in maps.values() if not m.is_identity for extra in (0, 1)}


def _without_layout(
    name: str, in_file: Shape | None, in_model: Shape, counts: Collection[int], out: Mapping[str, Why]
) -> TensorPlan:
    if in_file is None:
        return TensorPlan(name, "kept", target_shape=in_model, why=Why(Cause.NOT_IN_FILE))
    if name in out:
        return TensorPlan(name, "kept", source_shape=in_file, target_shape=in_model, why=out[name])
    if in_file != in_model:
        why = Why(Cause.NO_LAYOUT, source_shape=tuple(in_file), target_shape=tuple(in_model))
        return TensorPlan(name, "kept", source_shape=in_file, target_shape=in_model, why=why)
    # A backbone's channels and a proposal network's anchors meet a class count by accident: 3 anchors, 3 classes.
    if in_model and in_model[0] in counts and not name.startswith(("backbone", "proposal_generator")):
        why = Why(Cause.MAYBE_CLASSES, count=in_model[0])
        return TensorPlan(name, "copied", None, None, in_file, in_model, verified=False, why=why)
    return TensorPlan(name, "copied", source_shape=in_file, target_shape=in_model, why=Why(Cause.SAME_SHAPE))
