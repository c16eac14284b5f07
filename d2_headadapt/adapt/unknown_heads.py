"""Class-sized tensors that no layout moves: which they are, and what is known of the others, before a plan is made.

A model that can be built at several class counts says it by itself (:mod:`d2_headadapt.adapt.discovery`). For one that
cannot, and for what such builds could not show, the shapes of file and model are held against both class counts.

    K   number of classes
    a   rows of one class, or anchors
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from .classes import SPACES, ClassTable
from .discovery import (
    AxisSize,
    ClassSized,
    Disagreement,
    Discovery,
    Refusal,
    RefusalCause,
    Shape,
    check_declared,
    settle_layouts,
    undeclared,
)
from .layouts import HeadLayout

Counts = Mapping[str, tuple[int, int]]
"""Label space -> the numbers of its classes in the file and in the model."""

_NEUTRAL = ("torch.", "detectron2.layers.")
"""Layers that serve anybody; the module around them says what they are for."""
_WITHOUT = (
    "detectron2.modeling.backbone.",
    "detectron2.modeling.proposal_generator.",
    "detectron2.modeling.roi_heads.",
)
"""Modules of detectron2 whose class axes are all declared: what is not declared there has none."""


@dataclass(frozen=True)
class KnownHeads:
    """What is known of the class axes of a model before a file meets it.

    Args:
        layouts: declared and found.
        refused: tensors that are class-sized, as builds or shapes say, and that no layout moves.
        said: what was found by building, in lines for people.
        complete: the builds would have shown every class-sized tensor.
        wrong: declared layouts that contradict what was found.
    """

    layouts: tuple[HeadLayout, ...]
    refused: tuple[Refusal, ...] = ()
    said: tuple[str, ...] = ()
    complete: bool = False
    wrong: tuple[Disagreement, ...] = ()


def know_heads(
    model: nn.Module,
    declared: Sequence[HeadLayout],
    found: Discovery | None,
    source_shapes: Mapping[str, Shape],
    targets: Mapping[str, ClassTable],
    differ: Counts,
) -> KnownHeads:
    """Join declared and found layouts, and name every class-sized tensor that neither moves.

    Args:
        model: as built, on any device.
        declared: its layouts, from :func:`d2_headadapt.adapt.registry.layouts_of`.
        found: what building it at several class counts showed; ``None`` where it cannot be built twice.
        source_shapes: the file's tensors under the model's names.
        targets: the model's class tables by label space.
        differ: label spaces whose classes are known on both sides and differ.
    """
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items() if torch.is_tensor(value)}
    if found is not None and not _is_of(found, shapes):
        found = None  # The model was changed after it was built.
    if found is None or not found.families:
        said = () if found is None else _said(found)
        claimed = {layout.tensor for layout in declared}
        # A task of ours has no other class axes than the declared ones, whatever widths its backbone has.
        tasks = {layout.space for layout in declared} - {*SPACES}
        unsure = {space: counts for space, counts in differ.items() if space not in tasks}
        return KnownHeads(tuple(declared), _by_shape(model, source_shapes, shapes, claimed, unsure), said)
    layouts = settle_layouts(declared, found)
    spaces = {family.space for family in found.families}
    wrong = check_declared(found, [layout for layout in layouts if layout.space in spaces])
    own = {layout.tensor for layout in declared}
    renamed = _spaces_of(found, layouts, own, targets)
    layouts = tuple(
        layout if layout.tensor in own else replace(layout, space=renamed.get(layout.space, layout.space))
        for layout in layouts
    )
    refused = [
        replace(x, sized=replace(x.sized, space=renamed.get(x.sized.space, x.sized.space)))
        for x in undeclared(layouts, found)
    ]
    # A count of its own, such as that of attributes, is not the one that the table is about.
    sized = found.sized
    other = {
        layout.tensor: layout
        for layout in layouts
        if layout.tensor not in own
        and layout.space in targets
        and not layout.rebuilt
        and not layout.fits(shapes[layout.tensor], len(targets[layout.space]))
    }
    refused += [
        Refusal(replace(sized[name], space=layout.space), RefusalCause.OTHER_COUNT, (layout,), name)
        for name, layout in other.items()
    ]
    unseen = {name for name in shapes if not found.saw(name)}
    claimed = {layout.tensor for layout in layouts} | {x.sized.tensor for x in refused} | (shapes.keys() - unseen)
    refused += _by_shape(model, source_shapes, shapes, claimed, differ)
    return KnownHeads(
        tuple(layout for layout in layouts if layout.tensor not in other),
        tuple(refused),
        _said(found),
        found.complete,
        wrong,
    )


def _said(found: Discovery) -> tuple[str, ...]:
    """Return lines on what was found; the many keys of detectron2 that another architecture reads are passed over."""
    return tuple(replace(found, idle=() if found.families else found.idle).describe())


def _is_of(found: Discovery, shapes: Mapping[str, Shape]) -> bool:
    return all(shapes.get(name) == sized.shape for name, sized in found.sized.items())


def _spaces_of(
    found: Discovery, layouts: Iterable[HeadLayout], own: Collection[str], targets: Mapping[str, ClassTable]
) -> dict[str, str]:
    """Map the space that a key's name told to the one whose table it is, where the first has none and one is left."""
    told = {x.space for x in layouts if x.tensor not in own} | {x.sized.space for x in found.refused}
    taken = {x.space for x in layouts if x.tensor in own} | told
    return other_space(told, taken, targets)


def other_space(told: Iterable[str], taken: Collection[str], targets: Collection[str]) -> dict[str, str]:
    """Give label spaces that a key's name told, and that have no class table, the one table that nobody claims.

    Example:
        A key ``MODEL.SEM_SEG_HEAD.NUM_CLASSES`` of a model that predicts things::

            >>> other_space({"stuff"}, {"stuff"}, {"thing"}), other_space({"stuff"}, {"stuff"}, {"stuff"})
            ({'stuff': 'thing'}, {})
    """
    without = [space for space in told if space not in targets]
    left = [space for space in targets if space not in taken]
    return {without[0]: left[0]} if len(without) == len(left) == 1 else {}


def _by_shape(
    model: nn.Module,
    source_shapes: Mapping[str, Shape],
    shapes: Mapping[str, Shape],
    claimed: Collection[str],
    differ: Counts,
) -> tuple[Refusal, ...]:
    """Return the tensors whose sizes are those of both class counts, on any axis and in any multiple."""
    owners = _owners(model)
    hidden = _hidden_widths(shapes)
    refused = []
    for name, shape in shapes.items():
        stored = source_shapes.get(name)
        if name in claimed or stored is None or owners[name].startswith(_WITHOUT):
            continue
        for space, counts in differ.items():
            axes = tuple(_axes(tuple(stored), shape, counts, hidden))
            if axes:
                sized = ClassSized(name, "", space, shape, axes)
                refused.append(Refusal(sized, RefusalCause.SHAPES_ONLY, _meanings(sized), name))
                break
    return tuple(refused)


def _owners(model: nn.Module) -> dict[str, str]:
    """Tensor -> full class name of the innermost module around it that is no layer of torch or detectron2."""
    kinds = {path: f"{type(m).__module__}.{type(m).__qualname__}" for path, m in model.named_modules()}
    found: dict[str, str] = {}
    for name in model.state_dict():
        path = name
        found[name] = ""
        while path:
            path = path.rpartition(".")[0]
            kind = kinds.get(path, "")
            if kind and not kind.startswith(_NEUTRAL):
                found[name] = kind
                break
    return found


def _hidden_widths(shapes: Mapping[str, Shape]) -> set[int]:
    """Return widths that one layer makes and another one takes; a class axis ends at the loss."""
    made = {(shape[0], name) for name, shape in shapes.items() if len(shape) > 1}
    taken = {(shape[1], name) for name, shape in shapes.items() if len(shape) > 1}
    return {width for width, name in made if any(w == width and other != name for w, other in taken)}


def _axes(stored: Shape, shape: Shape, counts: tuple[int, int], hidden: Collection[int]) -> Iterator[AxisSize]:
    """Return the axes of a tensor whose sizes follow the counts; none where another axis differs."""
    if len(stored) != len(shape):
        return
    before, after = counts
    moved = [axis for axis in range(len(shape)) if stored[axis] != shape[axis]]
    if before != after:
        found = []
        for axis in moved:
            slope, uneven = divmod(shape[axis] - stored[axis], after - before)
            rest = shape[axis] - slope * after
            if uneven or slope < 1 or rest not in (0, 1, slope):
                return
            found.append(AxisSize(axis, slope, rest))
        yield from found
    elif not moved:
        for axis, size in enumerate(shape):
            slope, rest = divmod(size, after)
            follows = slope >= 1 and (rest in (0, 1) or rest == slope)
            image = axis == 1 and len(shape) == 4 and size in (1, 3)
            # A multiple of few classes is nearly every width, so one that the network uses inside is none of them.
            known = size not in hidden or (axis == 0 and slope == 1)
            if follows and known and axis < 2 and not image:
                yield AxisSize(axis, slope, rest)


def _meanings(sized: ClassSized) -> tuple[HeadLayout, ...]:
    """Return every layout of one axis that the sizes allow, the commonest first; none where several axes follow."""
    if len(sized.axes) > 1:
        return ()
    (axis,) = sized.axes
    plain = HeadLayout(sized.tensor, sized.space, sized.tensor)
    ends = [(0, axis.rest), (axis.rest, 0)] if axis.rest else [(0, 0)]
    kinds = [(1, 1)] if axis.slope == 1 else [(axis.slope, 1), (1, axis.slope)]
    return tuple(
        replace(plain, axes=((axis.axis, offset),), rows_per_class=rows, groups=groups, extra=extra)
        for rows, groups in kinds
        for offset, extra in ends
    )
