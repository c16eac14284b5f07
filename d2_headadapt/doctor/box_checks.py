"""Checks HA221 to HA225: boxes against each other and against the size of their images."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from ..errors import DatasetError
from .coco_json import BOX_BROKEN, BOX_GOOD, Labels
from .finding import DoctorContext, Finding, check
from .reading import detected, place, some

BEYOND = 1.0
"""Pixels that a box may reach over the edge of its image: tools round, and COCO itself does it."""
MOST = 0.99
"""Share of boxes that a reading must fit before it is believed."""
FEWEST = 8
"""Boxes below which no share is computed."""


@check("HA221", "every box is four numbers", needs=("registered",), quick=True)
def boxes_are_numbers(context: DoctorContext) -> Iterable[Finding]:
    for name, labels in detected(context):
        broken = (labels.box_kind == BOX_BROKEN) & (labels.image >= 0)
        if broken.any():
            yield Finding(
                "HA221",
                "error",
                DatasetError(
                    place(name, labels),
                    found=f"no such bbox in {some(broken, labels)}",
                    expected="[x, y, width, height], four numbers in pixels",
                    fix="Correct or remove these annotations.",
                ),
            )


@check("HA222", "every box has an area", needs=("registered",), quick=True, severity="warning")
def boxes_have_area(context: DoctorContext) -> Iterable[Finding]:
    for name, labels in detected(context):
        good, objects = _good(labels), labels.objects & (labels.box_kind == BOX_GOOD)
        flat = objects & ~good
        if flat.any():
            everything = name in context.train_names and not good.any()
            first = labels.boxes[int(np.flatnonzero(flat)[0])]
            yield Finding(
                "HA222",
                "error" if everything else "warning",
                DatasetError(
                    place(name, labels),
                    found=f"a width or height that is not positive, or no number, in {some(flat, labels)}: "
                    f"{_text(first)}; training leaves these objects out",
                    expected="[x, y, width, height] with a positive width and height",
                    fix="Correct or remove these annotations.",
                ),
            )


@check("HA223", "boxes are x, y, width, height", needs=("registered",), quick=True)
def boxes_are_corners(context: DoctorContext) -> Iterable[Finding]:
    for name, labels in detected(context):
        if _are_corners(labels):
            over = _overhang(labels) > BEYOND
            first = int(np.flatnonzero(over)[0])
            yield Finding(
                "HA223",
                "error",
                DatasetError(
                    place(name, labels),
                    found=f"{int(over.sum())} of {len(over)} boxes leave their image, but nearly all fit as x1, y1, "
                    f"x2, y2: {_text(labels.boxes[first])}, {labels.annotation(first)}, {_size(labels, first)}",
                    expected="[x, y, width, height]",
                    fix="Write width x2 - x1 and height y2 - y1 into the json in place of x2 and y2.",
                ),
            )


@check("HA224", "boxes are in pixels", needs=("registered",), quick=True)
def boxes_are_relative(context: DoctorContext) -> Iterable[Finding]:
    for name, labels in detected(context):
        if _are_relative(labels):
            first = int(np.flatnonzero(_good(labels))[0])
            yield Finding(
                "HA224",
                "error",
                DatasetError(
                    place(name, labels),
                    found=f"no number above 1 in any box: {_text(labels.boxes[first])}, {labels.annotation(first)}, "
                    f"{_size(labels, first)}",
                    expected="[x, y, width, height] in pixels",
                    fix="Multiply x and width by the width of the image, y and height by its height.",
                ),
            )


@check("HA225", "boxes are inside their images", needs=("registered",), quick=True, severity="warning")
def boxes_are_inside(context: DoctorContext) -> Iterable[Finding]:
    for name, labels in detected(context):
        overhang = _overhang(labels)
        over = overhang > BEYOND
        if over.any() and not _are_corners(labels):
            worst = int(overhang.argmax())
            yield Finding(
                "HA225",
                "warning",
                DatasetError(
                    place(name, labels),
                    found=f"{int(over.sum())} of {len(over)} boxes leave their image, the farthest by "
                    f"{overhang[worst]:.0f} "
                    f"pixels: {_text(labels.boxes[worst])}, {labels.annotation(worst)}, {_size(labels, worst)}",
                    expected="boxes inside: training cuts them at the edge, evaluation does not",
                    fix="Cut them off, or correct width and height of the images.",
                ),
            )


def _good(labels: Labels) -> NDArray[np.bool_]:
    """Mark the objects (M,) whose box has an area."""
    good: NDArray[np.bool_] = labels.objects & np.isfinite(labels.boxes).all(axis=1) & (labels.boxes[:, 2:] > 0).all(1)
    return good


def _sizes(labels: Labels) -> NDArray[np.float64]:
    """Return (M, 2) width and height of each annotation's image, NaN where nobody says them."""
    sizes = np.full((len(labels.image), 2), np.nan)
    there = labels.image >= 0
    sizes[there] = labels.sizes[labels.image[there]]
    sizes[~(sizes > 0)] = np.nan
    return sizes


def _overhang(labels: Labels) -> NDArray[np.float64]:
    """Measure in pixels (M,) how far a box leaves its image, 0 where it does not or where nobody can tell."""
    low, size = labels.boxes[:, :2], labels.boxes[:, 2:]
    over = np.concatenate([-low, low + size - _sizes(labels)], axis=1)
    over[~_good(labels)] = 0
    farthest: NDArray[np.float64] = np.nan_to_num(over, nan=0.0).max(axis=1, initial=0.0)
    return farthest


def _are_corners(labels: Labels) -> bool:
    """Tell whether many boxes leave their images, and nearly all are inside when read as two corners."""
    good = _good(labels)
    if good.sum() < FEWEST:
        return False
    first, second = labels.boxes[good, :2], labels.boxes[good, 2:]
    fits = ((first >= -BEYOND) & (second > first) & (second <= _sizes(labels)[good] + BEYOND)).all(axis=1)
    # Of right boxes few leave the image, and of right boxes hardly all have a width beyond x and a height beyond y.
    return bool(fits.mean() >= MOST and (_overhang(labels)[good] > BEYOND).mean() > 0.25)


def _are_relative(labels: Labels) -> bool:
    good = _good(labels)
    if not good.any() or not (_sizes(labels)[good] > 8).all():
        return False
    return bool(labels.boxes[good].max() <= 1 + 1e-6)


def _text(box: NDArray[np.float64]) -> str:
    return f"[{', '.join(f'{v:g}' for v in box)}]"


def _size(labels: Labels, m: int) -> str:
    width, height = _sizes(labels)[m]
    return f"in an image of {width:g} x {height:g}"
