"""Tiny COCO datasets on disk."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


def write_coco(folder: Path, classes: Sequence[str], *, name: str = "data", images: int = 4, size: int = 64) -> Path:
    """Random images with two boxes each, as ``<folder>/<name>.json`` and ``<folder>/<name>/``.

    Category ids are 10, 20, ... in the order of ``classes``, and listed backwards, as real files do not promise order.
    """
    pictures = folder / name
    pictures.mkdir(parents=True, exist_ok=True)
    random = np.random.RandomState(0)
    entries: list[dict[str, Any]] = []
    boxes: list[dict[str, Any]] = []
    for i in range(images):
        pixels = random.randint(0, 255, (size, size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(pictures / f"{i}.png")
        entries.append({"id": i, "file_name": f"{i}.png", "height": size, "width": size})
        for j in range(2):
            x, y = (int(v) for v in random.randint(0, size // 2, 2))
            box = [x, y, size // 3, size // 4]
            boxes.append(
                {
                    "id": len(boxes) + 1,
                    "image_id": i,
                    "category_id": 10 * ((i + j) % len(classes) + 1),
                    "bbox": box,
                    "area": box[2] * box[3],
                    "iscrowd": 0,
                    "segmentation": [[x, y, x + box[2], y, x + box[2], y + box[3], x, y + box[3]]],
                }
            )
    categories = [{"id": 10 * (i + 1), "name": c} for i, c in enumerate(classes)][::-1]
    path = folder / f"{name}.json"
    path.write_text(json.dumps({"info": {}, "images": entries, "annotations": boxes, "categories": categories}))
    return path
