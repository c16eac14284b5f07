#!/usr/bin/env python3
"""Four labels of product photographs by one network, beside one network for each, and with 30 % of the labels removed.

Needs the folder of real material that D2HA_REAL names (by default ../shared/real beside the project). Writes
``results.json`` and ``table.md`` to output/fashion/.
"""

from __future__ import annotations

import os

# Before torch is imported: threads that wait by spinning slow down everybody on a shared machine.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import argparse
import csv
import json
import random
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from detectron2.data import transforms as T
from detectron2.modeling import build_model
from detectron2.utils.env import seed_all_rng
from sklearn.metrics import accuracy_score, f1_score

from d2_headadapt import HeadAdaptError, load_config, resolve_config
from d2_headadapt.data import TaskMapper, build_task_test_loader, build_task_train_loader, task_facts
from d2_headadapt.errors import UsageError

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / "configs" / "fashion.yaml"
OUTPUT = Path("output/fashion")
TASKS = ("master", "article", "colour", "gender")
Scores = dict[str, dict[str, float]]


def find_fashion() -> Path:
    """The folder with labels.csv and images/.

    Raises:
        UsageError: it is not there.
    """
    folder = Path(os.environ.get("D2HA_REAL") or ROOT.parent / "shared" / "real") / "fashion"
    if not (folder / "labels.csv").is_file():
        raise UsageError(
            "D2HA_REAL",
            expected="the folder of real material, with fashion/labels.csv",
            found=f"no {folder / 'labels.csv'}",
            fix="Type: D2HA_REAL=<folder> tools/tasks_fashion.py",
        )
    return folder.resolve()


def config(
    labels: Path,
    images: Path,
    tasks: Sequence[str],
    opts: Sequence[str],
    tables: Mapping[str, Sequence[str]] | None = None,
    tag: str = "",
) -> CfgNode:
    """configs/fashion.yaml with a csv and some of its tasks; datasets of another csv get ``tag`` at their names."""
    cfg = load_config(str(CONFIG), ["MODEL.DEVICE", "cpu", *opts])
    parts = {"TRAIN": "train", "TEST": "test"}
    for key, part in parts.items():
        (entry,) = [one for one in cfg.DATASETS.REGISTER if one["split"]["part"] == part]
        entry.update(csv=str(labels), images=str(images), name=entry["name"] + tag)
        cfg.DATASETS[key] = (entry["name"],)
    for name in [name for name in cfg.MODEL.TASKS if name not in tasks]:
        del cfg.MODEL.TASKS[name]
    for name in tasks:
        cfg.MODEL.TASKS[name].classes = list(tables[name]) if tables else None
    resolve_config(cfg)
    return cfg


def resize(cfg: CfgNode) -> T.Augmentation:
    """Every image to one size: flattened features take no other."""
    return T.Resize(tuple(cfg.MODEL.CLASSIFIER.INPUT_SIZE))


def train(cfg: CfgNode, steps: int, rate: float) -> tuple[torch.nn.Module, dict[str, float]]:
    """A model after ``steps`` batches with Adam, at a rate that rises and falls in one cycle, and its seconds.

    Those of the processor matter where others share the machine; reading the images is in both.
    """
    seed_all_rng(cfg.SEED)
    model = build_model(cfg)
    loader = build_task_train_loader(cfg, mapper=TaskMapper(cfg, True, augmentations=[resize(cfg), T.RandomFlip()]))
    model.train()
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.1)
    start, cpu = time.perf_counter(), time.process_time()
    for batch in islice(loader, steps):
        loss = sum(model(batch).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model, {"wall": time.perf_counter() - start, "cpu": time.process_time() - cpu}


def evaluate(cfg: CfgNode, model: torch.nn.Module) -> Scores:
    """Top-1 and macro F1 of each task, in per cent, on the held-out images that have a label of it.

    F1 is averaged over the classes that these labels show.
    """
    model.eval()
    truth: dict[str, list[int]] = {task: [] for task in cfg.MODEL.TASKS}
    said: dict[str, list[int]] = {task: [] for task in cfg.MODEL.TASKS}
    mapper = TaskMapper(cfg, False, augmentations=[resize(cfg)])
    loader = build_task_test_loader(cfg, cfg.DATASETS.TEST[0], mapper=mapper)
    with torch.no_grad():
        for (image,) in loader:
            (out,) = model([image])
            for task, label in image["tasks"].items():
                if label >= 0:
                    truth[task].append(int(label))
                    said[task].append(out[f"pred_{task}"])
    return {task: metrics(truth[task], said[task]) for task in truth}


def metrics(truth: Sequence[int], said: Sequence[int]) -> dict[str, float]:
    shown = sorted(set(truth))
    f1 = f1_score(truth, said, labels=shown, average="macro", zero_division=0)
    return {"top1": 100 * float(accuracy_score(truth, said)), "f1": 100 * float(f1), "images": len(truth)}


def majority(cfg: CfgNode) -> Scores:
    """What always saying the most frequent class of the training part would reach."""
    found: Scores = {}
    for task in cfg.MODEL.TASKS:
        train_labels, truth = (
            [one["tasks"][task] for one in DatasetCatalog.get(names[0]) if task in one["tasks"]]
            for names in (cfg.DATASETS.TRAIN, cfg.DATASETS.TEST)
        )
        most = Counter(train_labels).most_common(1)[0][0]
        found[task] = metrics(truth, [most] * len(truth))
    return found


def remove_labels(source: Path, target: Path, kept_files: set[str], share: float, seed: int) -> dict[str, int]:
    """Write a csv in which each label of a training image is removed with a probability, task by task.

    Args:
        source, target: csv files.
        kept_files: images whose labels stay, those that are held out.
        share: the probability.
        seed: of the draw.

    Returns:
        How many labels of each task are gone.
    """
    draw = random.Random(seed)
    with source.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    gone = dict.fromkeys(TASKS, 0)
    for row in rows:
        for task in TASKS:
            if f"{row['id']}.jpg" not in kept_files and draw.random() < share and row[task] != "NA":
                row[task] = "NA"
                gone[task] += 1
    with target.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return gone


def table(results: Mapping[str, Any]) -> str:
    """The results as markdown."""
    arms = ("shared", "separate", "majority", "missing")
    names = ("one shared model", "one model each", "majority class", "shared, 30 % of labels removed")
    lines = ["| task | classes | held-out labels | " + " | ".join(names) + " |", "|---" * (len(arms) + 3) + "|"]
    for task in TASKS:
        cells = [f"{results[arm][task]['top1']:.1f} / {results[arm][task]['f1']:.1f}" for arm in arms]
        count = results["shared"][task]["images"]
        lines.append(f"| {task} | {results['classes'][task]} | {count} | " + " | ".join(cells) + " |")
    shared, separate = results["seconds"]["shared"], results["seconds"]["separate"]
    lines += [
        "",
        f"Top-1 / macro F1 in per cent. One seed ({results['seed']}), {results['train_images']} training images, "
        f"{results['steps']} steps of 64 for every model, {results['threads']} thread. "
        f"Training took {shared['cpu']:.0f} s of processor time shared and {separate['cpu']:.0f} s for the "
        f"{len(TASKS)} separate models: {shared['cpu'] / separate['cpu']:.2f} of it "
        f"(by the clock, on a machine that others used too: {shared['wall'] / separate['wall']:.2f}).",
    ]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=float, default=16, help="passes over the training images")
    parser.add_argument("--rate", type=float, default=3e-3, help="highest learning rate")
    parser.add_argument("--only", choices=["shared"], help="train the shared model alone")
    parser.add_argument("opts", nargs="*", help="KEY VALUE pairs for the config")
    args = parser.parse_args()
    torch.set_num_threads(1)
    folder = find_fashion()
    OUTPUT.mkdir(parents=True, exist_ok=True)
    labels, images = folder / "labels.csv", folder / "images"
    cfg = config(labels, images, TASKS, args.opts)
    tables = {task: task_facts(cfg.DATASETS.TRAIN[0])[task].classes for task in TASKS}
    train_images = len(DatasetCatalog.get(cfg.DATASETS.TRAIN[0]))
    steps = round(args.epochs * train_images / cfg.SOLVER.IMS_PER_BATCH)
    model, seconds = train(cfg, steps, args.rate)
    results: dict[str, Any] = {
        "seed": cfg.SEED,
        "threads": torch.get_num_threads(),
        "train_images": train_images,
        "steps": steps,
        "rate": args.rate,
        "classes": {task: len(tables[task]) for task in TASKS},
        "majority": majority(cfg),
        "shared": evaluate(cfg, model),
        "separate": {},
        "seconds": {"shared": seconds, "separate": {"wall": 0.0, "cpu": 0.0}, "each": {}},
    }
    print(f"shared: {seconds['cpu']:.0f} s, {json.dumps(results['shared'])}", flush=True)
    if args.only:
        return 0
    for task in TASKS:
        one = config(labels, images, [task], args.opts)
        model, seconds = train(one, steps, args.rate)
        results["separate"].update(evaluate(one, model))
        results["seconds"]["each"][task] = seconds
        for clock, value in seconds.items():
            results["seconds"]["separate"][clock] += value
        print(f"{task} alone: {seconds['cpu']:.0f} s, {json.dumps(results['separate'][task])}", flush=True)
    held_out = {one["image_id"] for one in DatasetCatalog.get(cfg.DATASETS.TEST[0])}
    thinned = (OUTPUT / "labels_removed.csv").resolve()
    results["removed"] = remove_labels(labels, thinned, held_out, 0.3, cfg.SEED)
    # The list of classes is the first model's: a class whose every label is gone stays a class.
    sparse = config(thinned, images, TASKS, args.opts, tables, "_removed")
    model, seconds = train(sparse, steps, args.rate)
    results["missing"] = evaluate(sparse, model)
    results["seconds"]["missing"] = seconds
    text = table(results)
    (OUTPUT / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    (OUTPUT / "table.md").write_text(text, encoding="utf-8")
    print(text)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except HeadAdaptError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
