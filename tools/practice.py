#!/usr/bin/env python3
"""Data and weights to try the guides of docs/ with: drawn shapes, and a small detector that knows five of them.

Writes the folder ``practice/``:

    base.yaml                   a detector of a hundred thousand parameters
    old.pth                     its weights after half a minute of training on square, disc, triangle, cross and ring
    train.json, val.json        images of disc, star and triangle, each red, green or blue
    more.json                   images of moon, disc, star and triangle
    words.npy, words.json       a made-up embedding of each of these names, in place of a text encoder's

Downloads nothing. An existing folder is replaced.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# Before torch is imported: threads that wait by spinning take the core from the one they wait for.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
from detectron2.engine import default_argument_parser
from PIL import Image, ImageDraw

from d2_headadapt import Trainer
from d2_headadapt.engine import setup

OLD = ("square", "disc", "triangle", "cross", "ring")
NEW = ("disc", "star", "triangle")
MORE = ("moon", *NEW)
COLOURS = {"red": (200, 60, 50), "green": (60, 160, 80), "blue": (70, 110, 210)}
SIDE = 96
BASE = """\
# A small Faster R-CNN. Yours is bigger: configs/faster_rcnn_R_50_FPN.yaml, or any yaml of detectron2.
MODEL:
  META_ARCHITECTURE: GeneralizedRCNN
  DEVICE: cpu
  MASK_ON: False
  PIXEL_STD: [58.0, 58.0, 58.0]
  BACKBONE: {NAME: build_conv_net_backbone}
  CONV_NET: {CHANNELS: [16, 32, 48]}
  ANCHOR_GENERATOR: {SIZES: [[20, 30]], ASPECT_RATIOS: [[1.0]]}
  RPN: {IN_FEATURES: [conv3], PRE_NMS_TOPK_TRAIN: 100, PRE_NMS_TOPK_TEST: 100, POST_NMS_TOPK_TRAIN: 40,
        POST_NMS_TOPK_TEST: 30, BATCH_SIZE_PER_IMAGE: 48}
  ROI_HEADS: {NAME: HeadAdaptROIHeads, IN_FEATURES: [conv3], BATCH_SIZE_PER_IMAGE: 24}
  ROI_BOX_HEAD: {NAME: FastRCNNConvFCHead, NUM_FC: 1, FC_DIM: 64, POOLER_RESOLUTION: 5}
DATALOADER: {NUM_WORKERS: 0}
INPUT: {MIN_SIZE_TRAIN: [96], MIN_SIZE_TEST: 96}
SOLVER: {IMS_PER_BATCH: 8, BASE_LR: 0.02, WARMUP_ITERS: 20, MAX_ITER: 60, STEPS: [50]}
TEST: {DETECTIONS_PER_IMAGE: 10}
SEED: 1
VERSION: 2
"""


def draw_shape(draw: ImageDraw.ImageDraw, name: str, box: Sequence[int], colour: tuple[int, ...]) -> None:
    """Draw one shape into its box (x0, y0, x1, y1)."""
    x0, y0, x1, y1 = box
    cx, cy, r = (x0 + x1) / 2, (y0 + y1) / 2, (x1 - x0) / 2
    third = (x1 - x0) / 3
    if name == "square":
        draw.rectangle(box, fill=colour)
    elif name == "disc":
        draw.ellipse(box, fill=colour)
    elif name == "moon":
        draw.chord(box, 60, 300, fill=colour)
    elif name == "ring":
        draw.ellipse(box, outline=colour, width=max(3, round(r / 3)))
    elif name == "cross":
        draw.rectangle((x0 + third, y0, x1 - third, y1), fill=colour)
        draw.rectangle((x0, y0 + third, x1, y1 - third), fill=colour)
    elif name == "triangle":
        draw.polygon([(cx, y0), (x0, y1), (x1, y1)], fill=colour)
    else:  # a star: its points and the corners between them
        spokes = [(r * (0.42 if i % 2 else 1.0), math.pi * i / 5) for i in range(10)]
        draw.polygon([(cx + a * math.sin(turn), cy - a * math.cos(turn)) for a, turn in spokes], fill=colour)


def draw_set(folder: Path, name: str, classes: Sequence[str], images: int, seed: int) -> None:
    """Write ``<folder>/<name>.json``, in COCO's format, and its images; four shapes in each, one in a quarter."""
    rng = np.random.default_rng(seed)
    (folder / name).mkdir(parents=True)
    entries: list[dict[str, Any]] = []
    boxes: list[dict[str, Any]] = []
    for i in range(images):
        pixels = np.clip(rng.normal(rng.integers(90, 170), 12, (SIDE, SIDE, 3)), 0, 255).astype(np.uint8)
        image = Image.fromarray(pixels)
        for quarter in range(4):
            size = int(rng.integers(20, 36))
            x, y = (int(rng.integers(0, SIDE // 2 - size)) + SIDE // 2 * place for place in divmod(quarter, 2))
            k, colour = int(rng.integers(len(classes))), str(rng.choice(list(COLOURS)))
            draw_shape(ImageDraw.Draw(image), classes[k], (x, y, x + size, y + size), COLOURS[colour])
            boxes.append(
                {
                    "id": len(boxes) + 1,
                    "image_id": i + 1,
                    "category_id": k + 1,
                    "bbox": [x, y, size, size],
                    "area": size * size,
                    "iscrowd": 0,
                    "attributes": {"colour": colour},
                }
            )
        image.save(folder / name / f"{i:03}.png")
        entries.append({"id": i + 1, "file_name": f"{i:03}.png", "height": SIDE, "width": SIDE})
    categories = [{"id": k + 1, "name": c} for k, c in enumerate(classes)]
    content = {"images": entries, "annotations": boxes, "categories": categories}
    (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")


def make(folder: Path, iterations: int) -> None:
    """Everything that the module's docstring names."""
    if folder.exists():
        shutil.rmtree(folder)
    draw_set(folder, "old", OLD, 120, seed=0)
    draw_set(folder, "train", NEW, 40, seed=1)
    draw_set(folder, "val", NEW, 20, seed=2)
    draw_set(folder, "more", MORE, 40, seed=3)
    words = sorted({*OLD, *MORE})
    np.save(folder / "words.npy", np.random.default_rng(4).normal(size=(len(words), 32)).astype(np.float32))
    (folder / "words.json").write_text(json.dumps({"names": words}), encoding="utf-8")
    (folder / "base.yaml").write_text(BASE, encoding="utf-8")
    entry = {"name": "practice_old", "json": str(folder / "old.json"), "images": str(folder / "old")}
    opts = ["DATASETS.REGISTER", repr([entry]), "DATASETS.TRAIN", "('practice_old',)", "DATASETS.TEST", "()"]
    opts += ["SOLVER.MAX_ITER", str(iterations), "SOLVER.STEPS", f"({iterations * 4 // 5},)", "MODEL.WEIGHTS", ""]
    opts += ["SOLVER.BASE_LR", "0.05", "OUTPUT_DIR", str(folder / "run")]
    trainer = Trainer(setup(default_argument_parser().parse_args(["--config-file", str(folder / "base.yaml"), *opts])))
    trainer.resume_or_load(resume=False)
    trainer.train()
    (folder / "run" / "model_final.pth").rename(folder / "old.pth")
    for used in ("run", "old"):
        shutil.rmtree(folder / used)
    (folder / "old.json").unlink()


def main() -> None:
    """Parse, make, say what is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="practice", type=Path, metavar="FOLDER", help="practice by default")
    parser.add_argument("--iterations", default=250, type=int, metavar="N", help="of the small detector (250)")
    args = parser.parse_args()
    make(args.output, args.iterations)
    print(f"wrote {', '.join(sorted(path.name for path in args.output.iterdir()))} to {args.output}/")


if __name__ == "__main__":
    main()
