"""How a plan is made: from names, shapes, layouts and class tables, never from values.

Head groups are decided in :mod:`d2_headadapt.groups`; everything else goes by name and shape.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

from .classes import ClassMap, ClassTable
from .errors import ClassTableError
from .groups import HeadGroup
from .layouts import HeadLayout
from .matching import match_classes, parse_aliases
from .plan import AdaptPlan, Shape, TensorPlan
from .vocabularies import reviewed_pairs, synonyms_of


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
    dropped: Mapping[str, str] | None = None,
    excluded: Mapping[str, str] | None = None,
) -> AdaptPlan:
    """Decide what happens to every tensor of a file and of a model.

    Args:
        source_shapes: the file's tensors, under the model's names where the two correspond.
        target_shapes: the model's tensors.
        layouts: of the model, from :func:`d2_headadapt.layouts.layouts_of`.
        source_tables, target_tables: class tables by label space, where known.
        source_layouts: of the file, from its provenance; what they do not name is taken to be of the model's kind
            and checked against the table's size.
        aliases, match: see :func:`d2_headadapt.matching.match_classes`.
        initialise: label spaces whose head groups keep the model's initial values whatever the file holds.
        dropped: names of the file that find no place, with the reason.
        excluded: tensors that the user leaves out, with the reason; the rest of their head group is still taken.

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
    used_spaces = {layout.space for layout in layouts}
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
    tensors = [
        planned[name] if name in planned else _without_layout(name, source_shapes.get(name), shape, maps, out)
        for name, shape in target_shapes.items()
    ]
    tensors += [
        TensorPlan(name, "dropped", source_shape=shape, reason=out.get(name, "the model has no tensor of this name"))
        for name, shape in source_shapes.items()
        if name not in target_shapes
    ]
    tensors += [TensorPlan(name, "dropped", reason=reason) for name, reason in (dropped or {}).items()]
    return AdaptPlan(tuple(tensors), sources, targets, tuple(layouts))


def match_tables(
    sources: Mapping[str, ClassTable], targets: Mapping[str, ClassTable], aliases: Sequence[str], match: str
) -> dict[str, ClassMap]:
    """The class map of every label space that has both tables; each alias goes to the spaces that know it."""
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


def _without_layout(
    name: str, in_file: Shape | None, in_model: Shape, maps: Mapping[str, ClassMap], out: Mapping[str, str]
) -> TensorPlan:
    if in_file is None:
        return TensorPlan(name, "kept", target_shape=in_model, reason="not in the file")
    if name in out:
        return TensorPlan(name, "kept", source_shape=in_file, target_shape=in_model, reason=out[name])
    if in_file != in_model:
        reason = f"{in_file} in the file, {in_model} in the model, and no layout says that its rows are classes"
        return TensorPlan(name, "kept", source_shape=in_file, target_shape=in_model, reason=reason)
    counts = {len(m.target) + extra for m in maps.values() if not m.is_identity for extra in (0, 1)}
    # A backbone's channels and a proposal network's anchors meet a class count by accident: 3 anchors, 3 classes.
    if in_model and in_model[0] in counts and not name.startswith(("backbone", "proposal_generator")):
        reason = f"unverified: {in_model[0]} rows may be classes, and no layout says so; see register_head_layout"
        return TensorPlan(name, "copied", None, None, in_file, in_model, verified=False, reason=reason)
    return TensorPlan(name, "copied", source_shape=in_file, target_shape=in_model)
