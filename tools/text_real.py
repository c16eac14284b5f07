#!/usr/bin/env python3
"""A text classifier on coco128: solved on 60 of COCO's classes, then given the other 20 by name alone.

Beside it a linear head on the same classes, and what ``NEW_ROWS: nearest`` makes of it. Needs the folder of real
material that D2HA_REAL names (by default ../shared/real beside the project). Writes output/text/results.json and
table.md.
"""

from __future__ import annotations

import os

# Before torch is imported: threads that wait by spinning slow down everybody on a shared machine.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import argparse
import io
import json
import logging
import math
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.utils.env import seed_all_rng
from torch import nn

from d2_headadapt import (
    ClassTable,
    HeadAdaptCheckpointer,
    HeadAdaptError,
    Trainer,
    load_config,
    plan_nearest,
    read_bundle,
    resolve_config,
    vocabulary,
)
from d2_headadapt.errors import UsageError
from d2_headadapt.fit import FitSettings, fit_new_rows, mapper_at_test_size, training_dicts

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / "configs" / "real_coco128.yaml"
OUTPUT = Path("output/text")
COCO = vocabulary("coco").names
UNSEEN = tuple(COCO[3::4])
SEEN = tuple(name for name in COCO if name not in UNSEEN)
LVIS_ONLY = ("lamp", "pillow", "helmet", "streetlight", "shoe", "jersey", "curtain", "signboard")
"""Classes that LVIS has and COCO lacks, as things that street and living-room photographs show."""

CONFIDENT = 0.001
TEXT = ["MODEL.HEAD_ADAPT.PREDICTOR", "HeadAdaptTextOutputLayers"]


def find_real() -> Path:
    """The folder of real material.

    Raises:
        UsageError: it is not there.
    """
    folder = Path(os.environ.get("D2HA_REAL") or ROOT.parent / "shared" / "real")
    if not (folder / "text").is_dir() or not (folder / "coco128").is_dir():
        raise UsageError(
            "D2HA_REAL",
            expected="the folder of real material, with text/ and coco128/",
            found=f"no such folders in {folder}",
            fix="Type: D2HA_REAL=<folder> tools/text_real.py",
        )
    return folder.resolve()


def write_subset(source: Path, target: Path, classes: Sequence[str], images: int | None = None) -> None:
    """The part of a COCO json that shows ``classes``, renumbered in their order; images without any of them stay."""
    coco = json.loads(source.read_text(encoding="utf-8"))
    names = {category["id"]: category["name"] for category in coco["categories"]}
    ids = {name: i for i, name in enumerate(classes, start=1)}
    coco["images"] = coco["images"][:images]
    kept = {image["id"] for image in coco["images"]}
    coco["annotations"] = [
        {**a, "category_id": ids[names[a["category_id"]]]}
        for a in coco["annotations"]
        if names[a["category_id"]] in ids and a["image_id"] in kept
    ]
    coco["categories"] = [{"id": i, "name": name} for name, i in ids.items()]
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(coco), encoding="utf-8")


@dataclass
class Show:
    """Where everything is.

    Args:
        real: the folder of real material.
        output: everything that is made goes there.
        images: at most so many of each split.
    """

    real: Path
    output: Path
    images: int | None = None

    def text(self, *, file: str = "coco_clip_a+cname.npy", names: Any = "coco") -> list[str]:
        """Keys that name a file of embeddings."""
        path = str(self.real / "text" / file)
        return ["MODEL.HEAD_ADAPT.TEXT.FILE", path, "MODEL.HEAD_ADAPT.TEXT.NAMES", repr(names)]

    def both_files(self) -> Path:
        """A file of the rows of COCO's classes and of ``LVIS_ONLY``: LVIS has no name for hot dog and potted plant."""
        coco, lvis = (
            read_bundle(str(self.real / "text" / f"{file}_clip_a+cname.npy"), names)
            for file, names in (("coco", "coco"), ("lvis_v1", "lvis_v1"))
        )
        rows = lvis.require(ClassTable(LVIS_ONLY, "LVIS_ONLY"))
        path = self.output / "both.pth"
        torch.save({"embeddings": torch.cat([coco.matrix, rows]), "names": [*coco.names.names, *LVIS_ONLY]}, path)
        return path

    def config(self, classes: Sequence[str], split: str, opts: Sequence[str]) -> CfgNode:
        """The config of a model of ``classes``, to be fitted on or evaluated on one split."""
        name = f"text_{len(classes)}_{split}"
        path = self.output / "data" / f"{name}.json"
        write_subset(self.real / "coco128" / f"{split}.json", path, classes, self.images)
        entry = {"name": name, "json": str(path.resolve()), "images": str(self.real / "coco128" / split)}
        datasets = repr((name,))
        keys = {
            "MODEL.DEVICE": "cpu",
            "MODEL.WEIGHTS": str(self.real / "models" / "fbnet_c4_coco.pth"),
            "DATASETS.REGISTER": repr([entry]),
            "DATASETS.TRAIN": datasets,
            "DATASETS.TEST": datasets,
            # Zero-shot scores are small; the same for every arm.
            "MODEL.ROI_HEADS.SCORE_THRESH_TEST": "0.001",
            "OUTPUT_DIR": str(self.output),
        }
        flat = [word for pair in keys.items() for word in pair]
        cfg = load_config(str(CONFIG), [*flat, *opts], [str(self.real / "models" / "fbnet_c4.py")])
        resolve_config(cfg)
        return cfg

    def load(self, cfg: CfgNode) -> HeadAdaptCheckpointer:
        """The model of a config with its weights."""
        seed_all_rng(1)
        checkpointer = HeadAdaptCheckpointer(Trainer.build_model(cfg), str(self.output))
        checkpointer.load(cfg.MODEL.WEIGHTS, checkpointables=[])
        return checkpointer

    def fitted(self, classes: Sequence[str], opts: Sequence[str]) -> tuple[HeadAdaptCheckpointer, dict[str, Any]]:
        """A model fitted on the training images, and the fit's own numbers."""
        cfg = self.config(classes, "train", opts)
        checkpointer = self.load(cfg)
        with checkpointer.fitted_rows():
            report = fit_new_rows(
                checkpointer.model,
                training_dicts(cfg),
                mapper_at_test_size(cfg),
                new=checkpointer.rows_to_fit(),
                settings=FitSettings.from_config(cfg),
            )
        return checkpointer, report.to_json()

    def saved(self, checkpointer: HeadAdaptCheckpointer, name: str) -> list[str]:
        """Save a model; the keys that start from it."""
        checkpointer.save(name)
        return ["MODEL.WEIGHTS", str(self.output / f"{name}.pth"), "MODEL.HEAD_ADAPT.SOURCE_CLASSES", "None"]

    def ap(self, model: nn.Module, classes: Sequence[str]) -> dict[str, float]:
        """Box AP of each class of the validation images that show it."""
        cfg = self.config(classes, "val", [])
        with redirect_stdout(io.StringIO()):  # pycocotools prints its own table for every arm.
            found: Mapping[str, float] = Trainer.test(cfg, model)["bbox"]
        return {name: value for name in classes if not math.isnan(value := found[f"AP-{name}"])}


def arm(show: Show, model: nn.Module, classes: Sequence[str]) -> dict[str, Any]:
    """Mean AP over the classes of either part that the validation images show."""
    by_class = show.ap(model, classes)
    parts = {"seen": SEEN, "unseen": UNSEEN}
    means = {
        part: sum(own) / len(own) if (own := [by_class[name] for name in names if name in by_class]) else None
        for part, names in parts.items()
    }
    return {**means, "by class": by_class}


def named(show: Show, model: nn.Module, classes: Sequence[str], wanted: Sequence[str]) -> dict[str, int]:
    """How many boxes of the validation images get each of some names with a score of ``CONFIDENT`` or more."""
    cfg = show.config(classes, "val", [])
    model.eval()
    counts: Counter[str] = Counter()
    with torch.no_grad():
        for batch in Trainer.build_test_loader(cfg, cfg.DATASETS.TEST[0]):
            for out in model(batch):
                found = out["instances"]
                counts.update(classes[k] for k in found.pred_classes[found.scores >= CONFIDENT].tolist())
    return {name: counts[name] for name in wanted}


def shuffled(names: Sequence[str]) -> list[str]:
    """The names of a file in which each unseen class has the row of another one."""
    following = dict(zip(UNSEEN, (*UNSEEN[1:], UNSEEN[0]), strict=True))
    return [following.get(name, name) for name in names]


def run_text(show: Show, temperature: float, *, more: bool = True) -> dict[str, Any]:
    """The text classifier's arms; without ``more`` only zero-shot and its control."""
    nearest = ["MODEL.HEAD_ADAPT.NEW_ROWS", "nearest", "MODEL.HEAD_ADAPT.TEXT.TEMPERATURE", str(temperature), *TEXT]
    head, report = show.fitted(SEEN, [*nearest, *show.text()])
    start = show.saved(head, "text_60")
    arms = {"text head, 60 classes": arm(show, head.model, SEEN)} if more else {}
    every = (*SEEN, *UNSEEN)
    for title, names in (("20 names added", "coco"), ("20 names added, shuffled", shuffled(COCO))):
        cfg = show.config(every, "val", [*nearest, *show.text(names=names), *start])
        arms[f"text head, {title}"] = arm(show, show.load(cfg).model, every)
    found: dict[str, Any] = {"arms": arms, "fit": report}
    if more:
        classes = (*SEEN, *LVIS_ONLY)
        both = ["MODEL.HEAD_ADAPT.TEXT.FILE", str(show.both_files())]
        cfg = show.config(classes, "val", [*nearest, *both, *start])
        found["lvis"] = named(show, show.load(cfg).model, classes, LVIS_ONLY)
    return found


def run_linear(show: Show) -> dict[str, Any]:
    """The linear head's arms."""
    every = (*SEEN, *UNSEEN)
    carried = show.load(show.config(SEEN, "val", []))
    start = show.saved(carried, "linear_60")
    arms = {
        "linear head of the file, 80 classes": arm(show, show.load(show.config(every, "val", [])).model, every),
        "linear head of the file, its 60 rows": arm(show, carried.model, SEEN),
    }
    # The boxes of the file, and a classifier from the images that the text head has.
    solved, report = show.fitted(SEEN, ["MODEL.HEAD_ADAPT.EXCLUDE", "['*cls_score*']"])
    arms["linear head solved on the same images, 60 classes"] = arm(show, solved.model, SEEN)
    recipe = show.load(show.config(every, "val", start))
    arms["linear head of the file, 20 random rows"] = arm(show, recipe.model, every)
    assert recipe.plan is not None
    file = str(show.real / "text" / "coco_clip_a+cname.npy")
    before = {name: value.clone() for name, value in recipe.model.state_dict().items()}
    for count in (1, 3):
        nearest = plan_nearest(recipe.plan, file, "coco", count=count)
        recipe.model.load_state_dict(nearest.apply(before))
        arms[f"linear head of the file, 20 rows from the nearest {count}"] = arm(show, recipe.model, every)
    return {"arms": arms, "fit": report}


def table(results: Mapping[str, Any]) -> str:
    """The results as markdown."""
    lines = ["| classifier | AP of the seen | AP of the unseen |", "|---|---|---|"]
    for title, found in results["arms"].items():
        cells = ["" if found[part] is None else f"{found[part]:.1f}" for part in ("seen", "unseen")]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    lines += ["", "| LVIS class that COCO lacks | boxes |", "|---|---|"]
    lines += [f"| {name} | {count} |" for name, count in results["lvis"].items()]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--temperature", type=float, default=50.0, help="MODEL.HEAD_ADAPT.TEXT.TEMPERATURE")
    parser.add_argument("--images", type=int, help="at most so many of each split")
    args = parser.parse_args()
    torch.set_num_threads(1)
    show = Show(find_real(), OUTPUT, args.images)
    OUTPUT.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    text = run_text(show, args.temperature)
    seconds_text = time.perf_counter() - started
    linear = run_linear(show)
    results = {
        "arms": {**linear["arms"], **text["arms"]},
        "lvis": text["lvis"],
        "lvis from score": CONFIDENT,
        "fit": {"text": text["fit"], "linear": linear["fit"]},
        "temperature": args.temperature,
        "unseen": list(UNSEEN),
        "seconds": {"text": seconds_text, "all": time.perf_counter() - started},
    }
    (OUTPUT / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    (OUTPUT / "table.md").write_text(table(results), encoding="utf-8")
    print(table(results))
    print(f"{results['seconds']['all']:.0f} s, of these {results['seconds']['text']:.0f} for the text head")
    return 0


if __name__ == "__main__":
    logging.getLogger("d2_headadapt").setLevel(logging.WARNING)
    try:
        sys.exit(main())
    except HeadAdaptError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
