#!/usr/bin/env python3
"""Tasks on boxes: a detector of handwritten digits that also tells the colour and the parity of each.

Draws scenes of digits, trains ``configs/demo_tasks.yaml`` from nothing, and prints box AP beside the accuracy of both
tasks on the boxes that were found, and the share of the most frequent class. Takes a few minutes on two CPU cores
and downloads nothing. Everything it makes is in output/demo_tasks/, which is replaced.
"""

from __future__ import annotations

import os

# Before torch is imported. On cores that are shared with others, threads that wait by spinning made a training
# iteration eight times as slow (2.8 against 0.4 s).
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import json
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from demo_arms import (
    Arm,
    check_extras,
    fresh_output,
    quiet,
    run_as_command,
    same_random_state,
    sample_inputs,
    train_arm,
)
from demo_digits import SPLITS, Split, draw_datasets
from detectron2.data import MetadataCatalog
from tabulate import tabulate

from d2_headadapt import Trainer, draw_tasks
from d2_headadapt.data import task_specs
from d2_headadapt.engine import default_argument_parser, setup

OUTPUT = Path("output/demo_tasks")
CONFIG = "configs/demo_tasks.yaml"
DATASET = "digits_tasks_test"
DETECTOR = Arm("detector with tasks", "run", "tab:blue", Trainer)


def run(splits: Sequence[Split] = SPLITS[:2], opts: Sequence[str] = ()) -> dict[str, dict[str, float]]:
    """Do all of it; paths start at the working directory, which holds ``configs/``.

    Args:
        splits: the datasets to draw, those of the config.
        opts: ``KEY VALUE`` pairs.

    Returns:
        The results of the evaluation, in percent.
    """
    check_extras()
    start = time.perf_counter()
    with fresh_output(OUTPUT) as log:
        print(f"1. Scenes of handwritten digits, in {OUTPUT / 'data'}")
        draw_datasets(OUTPUT / "data", splits)

        print(f"\n2. One detector for class, parity and colour\n   python tools/train_net.py --config-file {CONFIG}")
        args = default_argument_parser().parse_args(["--config-file", CONFIG, *opts])
        with quiet(log):
            cfg = setup(args)
            trainer = Trainer(cfg)
            trainer.resume_or_load(resume=False)
        train_arm(DETECTOR, trainer, log)
        results: dict[str, dict[str, float]] = trainer._last_eval_results

        table = results_table(results, majorities(OUTPUT / "data" / f"{splits[1].name}.json"))
        seconds = time.perf_counter() - start
        print(f"\n3. On other scenes of other handwriting, after {cfg.SOLVER.MAX_ITER} iterations\n\n{table}\n")
        (OUTPUT / "table.txt").write_text(table + "\n", encoding="utf-8")
        record = {"seconds": round(seconds, 1), "results": results}
        (OUTPUT / "results.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        with quiet(log):
            draw_samples(trainer, OUTPUT / "predictions")
        print(f"{OUTPUT}: table.txt, results.json, predictions/, log.txt ({seconds:.0f} s in all)")
    return results


def majorities(path: Path) -> dict[str, float]:
    """Percent of the annotations of a COCO json that have the most frequent value, by attribute."""
    counts: dict[str, Counter[str]] = {}
    for annotation in json.loads(path.read_text(encoding="utf-8"))["annotations"]:
        for name, value in annotation["attributes"].items():
            counts.setdefault(name, Counter())[value] += 1
    return {name: 100 * max(found.values()) / found.total() for name, found in counts.items()}


def results_table(results: Mapping[str, Mapping[str, float]], majority: Mapping[str, float]) -> str:
    """Box AP, and every number of every task beside the share of its most frequent class."""
    rows = [["box", key, f"{results['bbox'][key]:.1f}", ""] for key in ("AP", "AP50")]
    for key, value in results["tasks"].items():
        task, _, metric = key.partition("/")
        rows.append([task, metric, f"{value:.1f}", f"{majority[task]:.1f}" if metric == "top1" else ""])
    headers = ["", "metric", "percent", "most frequent class"]
    return tabulate(rows, headers=headers, colalign=("left", "left", "right", "right"), disable_numparse=True)


def draw_samples(trainer: Any, folder: Path, count: int = 4) -> None:
    """Pictures of some test images with classes and tasks of every detection."""
    folder.mkdir()
    specs = task_specs(trainer.cfg)
    with same_random_state(), torch.no_grad():
        for sample in sample_inputs(trainer.cfg, DATASET, count):
            trainer.model.eval()
            output = trainer.model([sample])[0]
            # The model takes BGR.
            image = sample["image"].permute(1, 2, 0).numpy()[:, :, ::-1]
            drawn = draw_tasks(image, output, MetadataCatalog.get(DATASET), specs, scale=4.0)
            drawn.save(str(folder / Path(sample["file_name"]).name))


def main() -> int:
    """Returns the exit code."""
    return run_as_command(run, __doc__)


if __name__ == "__main__":
    sys.exit(main())
