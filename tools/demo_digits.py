"""Drawn scenes of real handwritten digits as COCO json datasets: what ``make demo`` trains on.

The handwriting is scikit-learn's ``load_digits`` (1,797 samples of 8 x 8 pixels). It is split into three pools, so that
the base model, the fine-tune and every test see different handwriting in different scenes.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
BASE_CLASSES = DIGITS[:7]
# Shuffled, and three of them are known to the base model, so that a position in one list means nothing in the other.
TARGET_CLASSES = ("nine", "five", "four", "eight", "six", "seven")

COLOURS = {"red": (214, 48, 42), "green": (40, 160, 75), "blue": (55, 105, 225), "yellow": (232, 196, 40)}
SIDE = 128
DIGIT_SIDES = (26, 50)
DIGITS_PER_SCENE = (3, 6)
# Share of the handwriting of each digit that goes to a pool.
POOLS = {"base": 0.45, "new": 0.2, "test": 0.35}
SEED = 7

Array = NDArray[Any]


@dataclass(frozen=True)
class Split:
    """One dataset.

    Args:
        name: stem of the json and of the folder of images.
        classes: in the order of the category ids.
        pool: of the handwriting.
        scenes: number of images.
    """

    name: str
    classes: tuple[str, ...]
    pool: str
    scenes: int


SPLITS = (
    Split("base_train", BASE_CLASSES, "base", 360),
    Split("base_test", BASE_CLASSES, "test", 40),
    Split("new_train", TARGET_CLASSES, "new", 48),
    Split("new_test", TARGET_CLASSES, "test", 60),
)


def draw_datasets(folder: Path, splits: Sequence[Split] = SPLITS, seed: int = SEED) -> None:
    """Write ``<folder>/<split>.json`` and ``<folder>/<split>/*.png`` for every split.

    The same arguments draw the same pixels: each split has a random stream of its own, named by its pool and name.
    """
    handwriting = digit_pools(seed)
    for split in splits:
        rng = np.random.default_rng([seed, *split.name.encode()])
        images = folder / split.name
        images.mkdir(parents=True, exist_ok=True)
        coco = _draw_split(split, handwriting[split.pool], rng, images)
        (folder / f"{split.name}.json").write_text(json.dumps(coco), encoding="utf-8")


def digit_pools(seed: int = SEED) -> dict[str, dict[str, Array]]:
    """Handwriting by pool and class name, (N, 8, 8) with values from 0 to 1; no sample is in two pools."""
    from sklearn.datasets import load_digits

    data = load_digits()
    rng = np.random.default_rng(seed)
    pools: dict[str, dict[str, Array]] = {pool: {} for pool in POOLS}
    for value, name in enumerate(DIGITS):
        samples = data.images[data.target == value] / 16.0
        samples = samples[rng.permutation(len(samples))]
        ends = np.round(np.cumsum(list(POOLS.values())) * len(samples)).astype(int)
        for pool, part in zip(POOLS, np.split(samples, ends[:-1]), strict=True):
            pools[pool][name] = part
    return pools


def _draw_split(split: Split, handwriting: dict[str, Array], rng: np.random.Generator, images: Path) -> dict[str, Any]:
    coco: dict[str, Any] = {
        "images": [],
        "annotations": [],
        "categories": [{"id": i, "name": name} for i, name in enumerate(split.classes, start=1)],
    }
    for image_id in range(1, split.scenes + 1):
        scene, annotations = draw_scene(split.classes, handwriting, rng)
        file_name = f"{image_id:04}.png"
        Image.fromarray(scene).save(images / file_name)
        coco["images"].append({"id": image_id, "file_name": file_name, "width": SIDE, "height": SIDE})
        for annotation in annotations:
            coco["annotations"].append({"id": len(coco["annotations"]) + 1, "image_id": image_id, **annotation})
    return coco


def draw_scene(
    classes: Sequence[str], handwriting: dict[str, Array], rng: np.random.Generator
) -> tuple[Array, list[dict[str, Any]]]:
    """One image and the COCO annotations of its digits.

    Args:
        classes: category i + 1 is class i.
        handwriting: samples by class name.
        rng: source of everything random.

    Returns:
        ``(SIDE, SIDE, 3)`` RGB bytes, and annotations without ids.
    """
    # Grey in the middle of the range would swallow the blue and the green.
    level = rng.uniform(15, 60) if rng.random() < 0.5 else rng.uniform(190, 245)
    scene = np.full((SIDE, SIDE, 3), level) + rng.uniform(-10, 10, 3)
    if rng.random() < 0.5:
        scene += rng.normal(0, 22, scene.shape)
    annotations: list[dict[str, Any]] = []
    taken: list[tuple[int, int, int]] = []
    for _ in range(rng.integers(*DIGITS_PER_SCENE)):
        place = _free_place(taken, rng)
        if place is None:
            continue
        taken.append(place)
        category = int(rng.integers(len(classes)))
        name = classes[category]
        sample = handwriting[name][rng.integers(len(handwriting[name]))]
        colour = list(COLOURS)[rng.integers(len(COLOURS))]
        x, y, w, h = _paint(scene, sample, place, COLOURS[colour])
        parity = "even" if DIGITS.index(name) % 2 == 0 else "odd"
        annotations.append(
            {
                "category_id": category + 1,
                "bbox": [x, y, w, h],
                "area": w * h,
                "iscrowd": 0,
                "attributes": {"colour": colour, "parity": parity},
            }
        )
    return scene.clip(0, 255).astype(np.uint8), annotations


def _free_place(taken: Sequence[tuple[int, int, int]], rng: np.random.Generator) -> tuple[int, int, int] | None:
    """Left, top and side of a square that touches none of ``taken``; none where thirty guesses find no room."""
    for _ in range(30):
        side = int(rng.integers(*DIGIT_SIDES))
        x, y = (int(v) for v in rng.integers(0, SIDE - side, 2))
        if all(x + side < a or a + s < x or y + side < b or b + s < y for a, b, s in taken):
            return x, y, side
    return None


def _paint(
    scene: Array, sample: Array, place: tuple[int, int, int], colour: tuple[int, int, int]
) -> tuple[int, int, int, int]:
    """Blend one digit into the scene, in place; returns its tight box as left, top, width and height."""
    left, top, side = place
    ink = Image.fromarray(sample.astype(np.float32)).resize((side, side), Image.Resampling.BICUBIC)
    alpha = np.asarray(ink).clip(0, 1)
    patch = scene[top : top + side, left : left + side]
    patch += alpha[..., None] * (np.array(colour) - patch)
    rows, columns = (np.flatnonzero((alpha > 0.3).any(axis)) for axis in (1, 0))
    x, y = left + int(columns[0]), top + int(rows[0])
    return x, y, int(columns[-1] - columns[0]) + 1, int(rows[-1] - rows[0]) + 1
