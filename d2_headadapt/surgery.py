"""Row surgery on one tensor: the rows of carried classes, and the rows that belong to no class, change places.

All functions are pure: inputs are never written to.
"""

from __future__ import annotations

import torch

from .classes import ClassMap
from .layouts import HeadLayout


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
    places: list[tuple[int, torch.Tensor]] = []
    for axis in layout.class_axes:
        to_rows, from_rows = (
            torch.cat([layout.fixed_rows(len(table), axis), layout.rows(indices, len(table), axis)]).to(out.device)
            for table, indices in ((classes.target, targets), (classes.source, sources))
        )
        moved = moved.index_select(axis, from_rows)
        places.append((axis, to_rows))
    return _write(out, moved, places)


def _write(out: torch.Tensor, moved: torch.Tensor, places: list[tuple[int, torch.Tensor]]) -> torch.Tensor:
    """Write ``moved`` into ``out`` at the cross product of ``places``."""
    (axis, rows), rest = places[0], places[1:]
    if not rest:
        return out.index_copy(axis, rows, moved)
    inner = _write(out.index_select(axis, rows), moved, rest)
    return out.index_copy(axis, rows, inner)


def new_rows_mask(layout: HeadLayout, classes: ClassMap, shape: tuple[int, ...]) -> torch.Tensor:
    """Which elements of a target tensor belong to a new class: bool, of ``shape``."""
    mask = torch.zeros(shape, dtype=torch.bool)
    for axis in layout.class_axes:
        mask.index_fill_(axis, layout.rows(classes.new, len(classes.target), axis), True)
    return mask
