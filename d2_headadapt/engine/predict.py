"""Predict boxes, names and tasks of images, as JSON and pictures; class names come from the checkpoint.

H, W   of an image, in pixels
n      number of detections
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import Metadata
from detectron2.data import transforms as T
from detectron2.data.detection_utils import convert_image_to_rgb, read_image
from detectron2.structures import Instances
from numpy.typing import NDArray
from torch import nn
from tqdm import tqdm

from ..adapt.classes import ClassTable
from ..checkpoint.checkpointer import HeadAdaptCheckpointer
from ..checkpoint.kept import kept_in
from ..checkpoint.provenance import Provenance
from ..checkpoint.provenance import provenance_of as provenance_of
from ..data.images import UNREADABLE, why_unreadable
from ..data.task_spec import TaskSpec, task_specs
from ..errors import CheckpointFileError, ConfigError, DatasetError
from ..evaluation.drawing import draw_tasks, image_lines
from ..files import is_full, unwritable, write_text
from ..key import MODEL
from ..modeling.keep import keep_of
from ..setup.recipe import Recipe

PREDICTIONS_VERSION = 1
"""Of predictions.json; higher where a reader of an older one would misread it."""

ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")


class Predictor:
    """A model with the names that its checkpoint was saved with.

    Args:
        recipe: of the model; classes that its settings do not know come from the file.
        weights: the checkpoint.
        known: what the checkpoint says about itself.

    Raises:
        HeadAdaptError: the file cannot be used with the model.
    """

    def __init__(self, recipe: Recipe, weights: str, known: Provenance) -> None:
        recipe = recipe.with_tables(known.tables)
        self.cfg = recipe.config
        self.model: nn.Module = recipe.build()
        self.checkpointer = HeadAdaptCheckpointer(self.model)
        self.checkpointer.load(weights, checkpointables=[])
        self.model.eval()
        plan = self.checkpointer.plan
        self.tables: Mapping[str, ClassTable] = plan.target if plan is not None else recipe.settings.target
        self.specs: tuple[TaskSpec, ...] = task_specs(self.cfg)
        keep = keep_of(self.model)
        if keep is not None:
            # Old classes, and those that were added behind them.
            self.tables = {**self.tables, "thing": keep.settings.table}
        things = self.tables.get("thing")
        self.metadata = Metadata(thing_classes=list(things.names)) if things is not None else None
        self.resize = T.AugmentationList(recipe.test_augmentations())

    @torch.no_grad()
    def __call__(self, image: NDArray[np.uint8]) -> dict[str, Any]:
        """Run the model on one image (H, W, 3) in ``INPUT.FORMAT``; boxes are in its pixels."""
        height, width = image.shape[:2]
        outputs: list[dict[str, Any]] = self.model([{"image": self.seen(image), "height": height, "width": width}])
        return outputs[0]

    def seen(self, image: NDArray[np.uint8]) -> torch.Tensor:
        """Prepare an image (H, W, 3) as the model sees it: (3, height, width) float32, resized as a test image is."""
        seen = T.AugInput(image)
        self.resize(seen)
        return torch.as_tensor(np.ascontiguousarray(seen.image.transpose(2, 0, 1)), dtype=torch.float32)

    def describe(self, output: Mapping[str, Any], least_score: float) -> dict[str, Any]:
        """Put an output into plain types: ``detections`` with box (x0, y0, x1, y1), score, class, tasks; and ``tasks``.

        Raises:
            ConfigError: it has neither.
        """
        found: dict[str, Any] = {}
        if "instances" in output:
            instances = output["instances"].to("cpu")
            instances = instances[instances.scores >= least_score]
            found["detections"] = [self._detection(instances, i) for i in range(len(instances))]
        tasks = {
            spec.name: _label(spec, output[f"pred_{spec.name}"], output[f"scores_{spec.name}"])
            for spec in self.specs
            if spec.on == "image" and f"pred_{spec.name}" in output
        }
        if not found and not tasks:
            raise ConfigError(
                MODEL.META_ARCHITECTURE,
                expected="a model that gives boxes, or tasks of images",
                found=f"{type(self.model).__name__}, which gives {', '.join(output)}",
                fix="Type d2-headadapt export to run it elsewhere, or d2-headadapt train --eval-only to measure it.",
            )
        return {**found, **({"tasks": tasks} if tasks else {})}

    def _detection(self, instances: Instances, i: int) -> dict[str, Any]:
        things, k = self.tables.get("thing"), int(instances.pred_classes[i])
        found: dict[str, Any] = {
            "box": [round(value, 2) for value in instances.pred_boxes.tensor[i].tolist()],
            "score": round(float(instances.scores[i]), 4),
            "class": things.names[k] if things is not None else f"class_{k}",
        }
        tasks = {
            spec.name: _label(spec, instances.get(f"pred_{spec.name}")[i], instances.get(f"scores_{spec.name}")[i])
            for spec in self.specs
            if spec.on == "box" and instances.has(f"pred_{spec.name}")
        }
        return {**found, **({"tasks": tasks} if tasks else {})}


def name_classes(cfg: CfgNode, known: Provenance) -> None:
    """Let a checkpoint that knows its classes name them, so that no dataset need be there. In place; not frozen."""
    if known.tables:
        cfg.DATASETS.TRAIN = ()
    kept, node = kept_in(known, "the checkpoint"), cfg.MODEL.HEAD_ADAPT
    node.KEEP = "" if kept is None else "exact"
    if kept is not None:
        node.TARGET_CLASSES, node.KEEP_PACKS = list(kept.classes), [pack.to_plain() for pack in kept.packs]
    cfg.DATASETS.TEST = ()
    for name, node in cfg.MODEL.TASKS.items():
        if node.classes is None and name in known.tables:
            node.classes = list(known.tables[name].names)


def _label(spec: TaskSpec, predicted: Any, scores: torch.Tensor) -> dict[str, Any] | list[dict[str, Any]]:
    if spec.multi:
        rows = [k for k, score in enumerate(scores.tolist()) if score >= 0.5]
        return [{"label": spec.table.names[k], "score": round(float(scores[k]), 4)} for k in rows]
    k = int(predicted)
    return {"label": spec.table.names[k], "score": round(float(scores[k]), 4)}


def image_files(names: Sequence[str]) -> list[Path]:
    """List the images that a command line names: files, and those in folders.

    Raises:
        DatasetError: a name that is neither, or a folder without an image.
    """
    found: list[Path] = []
    for name in names:
        path = Path(name)
        inside = sorted(p for p in path.iterdir() if p.suffix.lower() in ENDINGS) if path.is_dir() else [path]
        if not path.exists() or not inside:
            # The option before takes every word up to the next one.
            is_key = re.fullmatch(r"[A-Z]\w*(\.\w+)+|[\w.]+=.*", name)
            raise DatasetError(
                name,
                expected="an image, or a folder of images",
                found="nothing there" if not path.exists() else f"a folder without {', '.join(ENDINGS)}",
                fix="Write config overrides last, behind --output." if is_key else "Correct the path.",
            )
        found += inside
    return found


def predict_files(predictor: Predictor, files: Sequence[Path], output: Path, least_score: float) -> Iterator[str]:
    """Write ``predictions.json`` and one picture for each image into a folder.

    The JSON is ``{"version": 1, "images": [{"file": ..., "height": ..., "width": ..., ...}, ...]}``, boxes in pixels.

    Args:
        predictor: the model.
        files: images; one that cannot be read, or that the model fails on, is reported and passed over.
        output: the folder, made where it is missing.
        least_score: of a box that is kept.

    Yields:
        One line for each image.

    Raises:
        DatasetError: not one of the images could be used.
        CheckpointFileError: a file cannot be written.
    """
    found: list[dict[str, Any]] = []
    for i, path in enumerate(tqdm(files, desc="predict", unit="image", disable=len(files) < 5)):
        try:
            image = read_image(str(path), format=predictor.cfg.INPUT.FORMAT)
        except UNREADABLE as exc:
            found.append({"file": str(path), "error": why_unreadable(exc)})
            yield f"{path}: cannot be read ({why_unreadable(exc)})"
            continue
        try:
            result = predictor(image)
        except Exception as exc:  # Whatever a model raises: an image of one pixel is smaller than its strides.
            found.append({"file": str(path), "error": " ".join(f"{type(exc).__name__}: {exc}".split())})
            yield f"{path}: the model fails on it ({found[-1]['error']})"
            continue
        told = predictor.describe(result, least_score)
        rgb = np.ascontiguousarray(convert_image_to_rgb(image, predictor.cfg.INPUT.FORMAT)).astype(np.uint8)
        picture = output / f"{i:04d}_{path.stem}.png"
        drawn = draw_tasks(rgb, result, predictor.metadata, predictor.specs, least_score=least_score)
        try:
            output.mkdir(parents=True, exist_ok=True)
            drawn.save(str(picture))
        except OSError as exc:
            if is_full(exc):
                raise unwritable(str(picture), exc) from exc
            raise CheckpointFileError(
                str(output), expected="a folder, or a place for one", found=str(exc), fix="Name another --output."
            ) from exc
        size = {"height": image.shape[0], "width": image.shape[1]}
        found.append({"file": str(path), **size, **told, "picture": picture.name})
        yield f"{path}: {_line(told, image_lines(result, predictor.specs))}"
    if all("error" in entry for entry in found):
        raise DatasetError(
            "--images",
            expected="an image that can be read, and that the model takes",
            found=f"none of {len(found)}; of the first: {found[0]['error']}",
            fix="Name other images. Nothing was written.",
        )
    content = {"version": PREDICTIONS_VERSION, "images": found}
    write_text(os.path.join(output, "predictions.json"), json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def _line(told: Mapping[str, Any], tasks: Sequence[str]) -> str:
    words = [f"{d['class']} {100 * d['score']:.0f}%" for d in told.get("detections", ())]
    return "; ".join([*([", ".join(words)] if words else []), *tasks]) or "nothing"
