#!/usr/bin/env python3
"""``make demo-real``: a model trained on COCO's 80 classes moves to twelve of them, shuffled, and two that COCO lacks.

Needs the folder of real material that D2HA_REAL names (by default ../shared/real beside the project). Checks that every
carried row is the file's, bit for bit, evaluates at step 0 beside stock detectron2 and beside the source model itself,
and fine-tunes both for some iterations. Everything it makes is in output/demo-real/, which is replaced.
"""

from __future__ import annotations

import os

# Before torch is imported. On cores that are shared with others, threads that wait by spinning made a training
# iteration eight times as slow (2.8 against 0.4 s).
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import json
import shlex
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

import torch
from demo_arms import (
    GROUPS,
    OURS,
    STOCK,
    ap_table,
    check_extras,
    fresh_output,
    group_ap,
    load_arm,
    plan_of,
    quiet,
    run_as_command,
    same_batches,
    sample_inputs,
    shown_command,
    train_arm,
    write_results,
)
from tqdm import tqdm

from d2_headadapt import plan_table, read_checkpoint, vocabulary
from d2_headadapt.errors import UsageError

ROOT = Path(__file__).resolve().parents[1]
OUTPUT = Path("output/demo-real")
CONFIG = "configs/real_coco128.yaml"
DATASET = "coco128_14_val"
SOURCE_DATASET = "coco128_80_val"
TARGET_CLASSES = (
    *("cup", "helmet", "bus", "person", "tv", "dining table", "laptop"),
    *("car", "street lamp", "chair", "bed", "bowl", "motorcycle", "clock"),
)
NEW = ("helmet", "street lamp")
CARRIED = tuple(name for name in TARGET_CLASSES if name not in NEW)
PREDICTOR = "roi_heads.box_predictor."


def find_real() -> Path:
    """The folder of real material, from the working directory where that is shorter.

    Raises:
        UsageError: it is not there.
    """
    folder = Path(os.environ.get("D2HA_REAL") or ROOT.parent / "shared" / "real")
    if not (folder / "models").is_dir() or not (folder / "coco128").is_dir():
        raise UsageError(
            "D2HA_REAL",
            expected="the folder of real material, with models/ and coco128/",
            found=f"{folder}, which is {'another folder' if folder.is_dir() else 'not there'}",
            fix="Type: D2HA_REAL=<folder> make demo-real",
        )
    relative = Path(os.path.relpath(folder, ROOT))
    return relative if len(str(relative)) < len(str(folder)) else folder.absolute()


def write_subset(source: Path, target: Path) -> None:
    """Write the part of a COCO json that shows ``TARGET_CLASSES``, renumbered in their order.

    Every image stays. The two classes that the source lacks are categories without a single box.
    """
    coco = json.loads(source.read_text(encoding="utf-8"))
    names = {category["id"]: category["name"] for category in coco["categories"]}
    ids = {name: i for i, name in enumerate(TARGET_CLASSES, start=1)}
    coco["annotations"] = [
        {**annotation, "category_id": ids[names[annotation["category_id"]]]}
        for annotation in coco["annotations"]
        if names[annotation["category_id"]] in ids
    ]
    coco["categories"] = [{"id": i, "name": name} for name, i in ids.items()]
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(coco), encoding="utf-8")


def count_equal_rows(file: Mapping[str, Any], model: Mapping[str, torch.Tensor]) -> tuple[int, int]:
    """Compare the rows of every carried class and of background in a file and in a model, bit for bit.

    The rows are found from the two lists of names alone, so that a plan that was wrong could not hide it.

    Returns:
        How many are equal, and how many there are.
    """
    source_names = vocabulary("coco").names
    pairs = [(TARGET_CLASSES.index(name), source_names.index(name)) for name in CARRIED]
    background = (len(TARGET_CLASSES), len(source_names))
    equal: list[bool] = []
    for leaf in ("weight", "bias"):
        old, new = (torch.as_tensor(state[f"{PREDICTOR}cls_score.{leaf}"]) for state in (file, model))
        equal += [torch.equal(new[t], old[s]) for t, s in [*pairs, background]]
        old, new = (torch.as_tensor(state[f"{PREDICTOR}bbox_pred.{leaf}"]) for state in (file, model))
        equal += [torch.equal(new[4 * t + i], old[4 * s + i]) for t, s in pairs for i in range(4)]
    return sum(equal), len(equal)


def source_metrics(argv: list[str], real: Path, log: TextIO) -> dict[str, float]:
    """What the source model itself reaches with its 80 classes, in stock detectron2."""
    folder = real.as_posix()
    entry = {"name": SOURCE_DATASET, "json": f"{folder}/coco128/val.json", "images": f"{folder}/coco128/val"}
    datasets = repr((SOURCE_DATASET,))
    opts = ["DATASETS.REGISTER", repr([entry]), "DATASETS.TRAIN", datasets, "DATASETS.TEST", datasets]
    trainer = load_arm(STOCK, [*argv, *opts], OUTPUT / "source", log)
    with quiet(log):
        metrics: dict[str, float] = trainer.test(trainer.cfg, trainer.model)["bbox"]
    return metrics


def run() -> None:
    """Do all of it; paths start at the working directory, the project's folder."""
    real = find_real()
    check_extras()
    import demo_pictures  # needs the packages that were just looked for

    start = time.perf_counter()
    with fresh_output(OUTPUT) as log:
        for split in ("train", "val"):
            write_subset(real / "coco128" / f"{split}.json", OUTPUT / "data" / f"{split}.json")
        argv = ["--config-file", CONFIG, "--import", f"{real.as_posix()}/models/fbnet_c4.py", *_elsewhere(real)]
        print(f"1. From COCO's 80 classes to {', '.join(TARGET_CLASSES)}")
        print(f"   d2-headadapt plan {shlex.join(argv)}\n\n{plan_table(plan_of(argv, log))}\n")

        print("2. The source model itself, with its 80 classes")
        with tqdm(total=1, desc="source model", bar_format="{desc}: {elapsed}") as bar:
            source = source_metrics(argv, real, log)
            bar.update()
        lines = {"source model, 80 classes": {GROUPS[1]: group_ap(source, CARRIED)}}
        print(f"   AP {source['AP']:.1f}; on the twelve carried classes {group_ap(source, CARRIED):.1f}")

        print("\n3. Step 0 and a short fine-tune, beside stock detectron2")
        print(f"   {shown_command(OURS, argv)}")
        results = []
        # Without a fit: no photograph shows a new class.
        for arm in (STOCK, OURS):
            trainer = load_arm(arm, argv, OUTPUT, log)
            if arm is OURS:
                file = read_checkpoint(trainer.cfg.MODEL.WEIGHTS)["model"]
                equal, rows = count_equal_rows(file, trainer.model.state_dict())
                print(f"   {equal} of {rows} carried rows (background's included) are the file's, bit for bit")
                if equal != rows:
                    raise RuntimeError("a carried row is not the file's")
            samples = sample_inputs(trainer.cfg, DATASET, 4)
            results.append(train_arm(arm, trainer, log, samples))

        batches = same_batches(results)
        table = ap_table(results, CARRIED, NEW)
        print(
            f"\n4. Box AP on coco128/val (both arms saw the same {batches} batches, pixel for pixel; the two new "
            f"classes have no boxes there)\n\n{table}\n\n"
            "   128 photographs cannot better a model that saw all of COCO: step 0 is the result here, and the short\n"
            "   fine-tune only shows how long stock detectron2 has to learn again what it dropped.\n"
        )
        title = "From COCO's 80 classes to a shuffled twelve and two new ones"
        demo_pictures.draw_curves(OUTPUT / "curves.png", results, CARRIED, NEW, title, lines)
        demo_pictures.draw_predictions(OUTPUT / "predictions.png", results, samples, DATASET, title)
        (OUTPUT / "table.txt").write_text(table + "\n", encoding="utf-8")
        seconds = time.perf_counter() - start
        write_results(
            OUTPUT / "results.json",
            results,
            CARRIED,
            NEW,
            source_carried_AP=round(group_ap(source, CARRIED), 3),
            equal_rows=[equal, rows],
            seconds=round(seconds, 1),
        )
        print(f"{OUTPUT}: table.txt, results.json, curves.png, predictions.png, log.txt ({seconds:.0f} s in all)")


def _elsewhere(real: Path) -> list[str]:
    """Overrides where the real material is not where the yaml looks for it."""
    if real.resolve() == (ROOT.parent / "shared" / "real").resolve():
        return []
    entries = [
        {
            "name": f"coco128_14_{split}",
            "json": f"{OUTPUT.as_posix()}/data/{split}.json",
            "images": f"{real.as_posix()}/coco128/{split}",
        }
        for split in ("train", "val")
    ]
    return ["MODEL.WEIGHTS", f"{real.as_posix()}/models/fbnet_c4_coco.pth", "DATASETS.REGISTER", repr(entries)]


def main() -> int:
    """Returns the exit code."""
    return run_as_command(run, __doc__)


if __name__ == "__main__":
    sys.exit(main())
