"""Photos without an object of a new class (``KEEP_NEGATIVES``): no labels are needed, and none are read."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from detectron2.data import DatasetCatalog

from ..errors import DatasetError
from ..key import HEAD_ADAPT

ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")
SHARE = 0.25
"""Of the images of a training with negatives that are negatives."""


def negative_images(where: str) -> list[dict[str, Any]]:
    """Read the images of ``KEEP_NEGATIVES`` as a detectron2 dataset without annotations.

    Args:
        where: a registered dataset, or a folder; empty for none.

    Raises:
        DatasetError: it is neither, or shows no image.
    """
    if not where:
        return []
    if where in DatasetCatalog:
        found = [
            {"file_name": e["file_name"], "image_id": f"negative {i}"} for i, e in enumerate(DatasetCatalog.get(where))
        ]
    else:
        folder = Path(where)
        files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in ENDINGS) if folder.is_dir() else []
        found = [{"file_name": os.fspath(p), "image_id": f"negative {p.relative_to(folder)}"} for p in files]
    if not found:
        raise DatasetError(
            f"{HEAD_ADAPT.KEEP_NEGATIVES}, {where!r}",
            expected="a folder of images, or a registered dataset",
            found="a folder without an image" if Path(where).is_dir() else "neither",
            fix="Correct it; a relative path starts at the working directory.",
        )
    return [{**entry, "annotations": []} for entry in found]


def with_negatives(dataset: Sequence[dict[str, Any]], negatives: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mix negatives into a training set, :data:`SHARE` of it, each as often as the others, up to one.

    Args:
        dataset: at least one image.
        negatives: of :func:`negative_images`; without any, the data set is as it was.
    """
    wanted = round(len(dataset) * SHARE / (1 - SHARE))
    if not negatives or not wanted:
        return list(dataset)
    # A large folder of negatives makes the training set longer rather than being cut short.
    rounds = max(1, -(-len(negatives) // wanted))
    times, rest = divmod(wanted * rounds, len(negatives))
    return [*(list(dataset) * rounds), *(list(negatives) * times), *negatives[:rest]]
