"""Every kind of layout, and an oracle that spells its rows out."""

from __future__ import annotations

from d2_headadapt.adapt.layouts import HeadLayout

KINDS = [
    HeadLayout("softmax", "thing", "g", extra=1),
    HeadLayout("boxes", "thing", "g", rows_per_class=4),
    HeadLayout("rotated boxes", "thing", "g", rows_per_class=5),
    HeadLayout("anchors", "thing", "g", groups=9),
    HeadLayout("keypoints", "keypoint", "g", axes=((1, 0),)),
    HeadLayout("point head", "thing", "g", axes=((0, 0), (1, 7))),
    HeadLayout("coarse mask", "thing", "g", rows_per_class=49),
    HeadLayout("implicit point head", "thing", "g", axes=((0, 6, 3), (0, 5, 1))),
]


def axis_labels(kind: HeadLayout, axis: int, num_classes: int) -> list[object]:
    """What each position of an axis is, spelled out row by row: the oracle."""
    labels: list[object] = []
    for entry in kind.axes:
        if entry[0] != axis:
            continue
        per_class = entry[2] if len(entry) > 2 else kind.rows_per_class
        labels += [f"before {len(labels)}"] * entry[1]
        for group in range(kind.groups):
            for c in range(num_classes):
                labels += [(c, group, row, len(labels) - row) for row in range(per_class)]
    return labels + ["background"] * kind.extra
