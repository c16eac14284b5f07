#!/usr/bin/env python3
"""``make demo``: a detector of the digits zero to six moves to nine, five, four, eight, six, seven.

Draws scenes of real handwritten digits, trains a small detector from nothing, and then fine-tunes it on another list of
classes three times: with stock detectron2, and with this package through ``configs/demo.yaml``, once with the weights
that are carried, and once with the rows of the new classes fitted as well. Takes a few minutes on two CPU cores and
downloads nothing. Everything it makes is in output/demo/, which is replaced.
"""

from __future__ import annotations

import os

# Before torch is imported. On cores that are shared with others, threads that wait by spinning made a training
# iteration eight times as slow (2.8 against 0.4 s).
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from demo_arms import (
    FITTED,
    OURS,
    STOCK,
    Arm,
    ArmResult,
    ap_table,
    check_extras,
    fresh_output,
    group_ap,
    load_arm,
    plan_of,
    run_as_command,
    same_batches,
    sample_inputs,
    shown_command,
    train_arm,
    write_results,
)
from demo_digits import BASE_CLASSES, SPLITS, TARGET_CLASSES, Split, draw_datasets

from d2_headadapt import Trainer, plan_table
from d2_headadapt.fit import FitHook

ROOT = Path(__file__).resolve().parents[1]
OUTPUT = Path("output/demo")
BASE = Arm("base model", "base", "0.4", Trainer)
BASE_WEIGHTS = (OUTPUT / BASE.folder / "model_final.pth").as_posix()
DATASET = "digits_new_test"
ARMS = (STOCK, OURS, FITTED)
CARRIED = tuple(name for name in TARGET_CLASSES if name in BASE_CLASSES)
NEW = tuple(name for name in TARGET_CLASSES if name not in BASE_CLASSES)


def run(arms: Sequence[Arm] = ARMS, splits: Sequence[Split] = SPLITS, opts: Sequence[str] = ()) -> list[ArmResult]:
    """Do all of it; paths start at the working directory, which holds ``configs/``.

    Args:
        arms: ways to start the fine-tune.
        splits: the datasets to draw.
        opts: ``KEY VALUE`` pairs for the base model and for every arm.

    Returns:
        One result for each arm.
    """
    check_extras()
    import demo_pictures  # needs the packages that were just looked for

    start = time.perf_counter()
    with fresh_output(OUTPUT) as log:
        print(f"1. Scenes of handwritten digits, in {OUTPUT / 'data'}")
        draw_datasets(OUTPUT / "data", splits)

        print(f"\n2. The base model, from nothing, on {', '.join(BASE_CLASSES)}")
        argv = ["--config-file", "configs/demo_base.yaml", *opts]
        print(f"   {shown_command(BASE, argv)}")
        base = train_arm(BASE, load_arm(BASE, argv, OUTPUT, log), log)
        base_metrics = base.curve[-1][1]
        print(
            f"   AP {base_metrics['AP']:.1f} on other scenes of other handwriting; "
            f"on {', '.join(CARRIED)} alone {group_ap(base_metrics, CARRIED):.1f}"
        )

        print(f"\n3. From these seven to {', '.join(TARGET_CLASSES)}: the weights move by class name")
        argv = ["--config-file", "configs/demo.yaml", *opts]
        print(f"   d2-headadapt plan {shlex.join(argv)}")
        print(f"\n{plan_table(plan_of(argv, log))}\n")
        results = []
        for arm in arms:
            if arm.trainer is Trainer:
                print(f"   {shown_command(arm, argv)}")
            trainer = load_arm(arm, argv, OUTPUT, log)
            samples = sample_inputs(trainer.cfg, DATASET, 4)
            results.append(train_arm(arm, trainer, log, samples))
            for hook in trainer._hooks:
                if isinstance(hook, FitHook) and hook.report is not None:
                    print(f"   {hook.report.line()}")

        batches = same_batches(results)
        table = ap_table(results, CARRIED, NEW)
        print(f"\n4. Box AP on held-out scenes (all arms saw the same {batches} batches, pixel for pixel)\n\n{table}\n")
        title = "From zero..six to nine, five, four, eight, six, seven"
        demo_pictures.draw_curves(OUTPUT / "curves.png", results, CARRIED, NEW, title)
        demo_pictures.draw_predictions(OUTPUT / "predictions.png", results, samples, DATASET, title)
        (OUTPUT / "table.txt").write_text(table + "\n", encoding="utf-8")
        seconds = time.perf_counter() - start
        write_results(
            OUTPUT / "results.json", results, CARRIED, NEW, base_AP=base_metrics["AP"], seconds=round(seconds, 1)
        )
        print(f"{OUTPUT}: table.txt, results.json, curves.png, predictions.png, log.txt ({seconds:.0f} s in all)")
    return results


def main() -> int:
    """Returns the exit code."""
    return run_as_command(run, __doc__)


if __name__ == "__main__":
    sys.exit(main())
