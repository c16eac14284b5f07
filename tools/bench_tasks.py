#!/usr/bin/env python3
"""Measure what tasks on boxes cost a detector, and write the table into docs/tasks_bench.md.

All arms are models in one process with one thread. They take a step each in turn, on the same batch from the same
random state, in an order that rotates. Time is the processor time of this process, because others may use the machine;
quoted are medians of the ratio to the detector alone within each round, and the quartiles around them.

    python tools/bench_tasks.py            measure, write docs/tasks_bench.json and docs/tasks_bench.md
    python tools/bench_tasks.py --render   only write docs/tasks_bench.md from docs/tasks_bench.json
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from bench import machine
from detectron2.config import CfgNode
from detectron2.data import DatasetMapper
from detectron2.data.datasets import load_coco_json
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import EventStorage
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from d2_headadapt import HeadAdaptCheckpointer, load_config

ROOT = Path(__file__).resolve().parents[1]
STORED = ROOT / "docs" / "tasks_bench.json"
PAGE = ROOT / "docs" / "tasks_bench.md"
REAL = Path(os.environ.get("D2HA_REAL") or ROOT.parent / "shared" / "real")
CLASSES = [f"class {i}" for i in range(10)]
# Name -> number of tasks and width of their hidden layers.
ARMS = {
    "detector alone": (0, 0),
    "1 task": (1, 0),
    "10 tasks": (10, 0),
    "10 tasks, hidden layers of 256": (10, 256),
}
ALONE, ONE, TEN = list(ARMS)[:3]

Step = Callable[[], None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--render", action="store_true", help="write the page from the stored numbers")
    parser.add_argument("--rounds", type=int, default=20, help="steps of each arm (default 20)")
    args = parser.parse_args()
    if not args.render:
        torch.set_num_threads(1)
        STORED.write_text(json.dumps(measure(args.rounds), indent=1) + "\n", encoding="utf-8")
    PAGE.write_text(render(json.loads(STORED.read_text(encoding="utf-8"))), encoding="utf-8")
    print(PAGE.read_text(encoding="utf-8"))


def measure(rounds: int) -> dict[str, Any]:
    """Seconds of every step, by network, kind of step, and arm."""
    networks = {"R50-FPN, one image of 160 x 160 pixels, 512 regions": r50_fpn}
    if (REAL / "models").is_dir():
        networks["FBNet-C4 trained on COCO, two photographs"] = fbnet
    seconds: dict[str, Any] = {}
    operations: dict[str, Any] = {}
    for name, build in networks.items():
        models = {arm: build(*size) for arm, size in ARMS.items()}
        inputs = models[ALONE][1]
        seconds[name], operations[name] = {}, {}
        # A detector that never learnt detects nothing, so its inference would say nothing of tasks.
        kinds = {"training": training_step} | ({"inference": inference} if build is fbnet else {})
        for kind, make in kinds.items():
            steps = {arm: make(model, inputs) for arm, (model, _) in models.items()}
            operations[name][kind] = {arm: count(step) for arm, step in steps.items()}
            seconds[name][kind] = turns(steps, rounds, name)
    return {"machine": machine(), "rounds": rounds, "seconds": seconds, "operations": operations}


def count(step: Step) -> int:
    """Floating point operations of the matrix products and convolutions of a step."""
    seed_all_rng(0)
    with FlopCounterMode(display=False) as counter:
        step()
    return int(counter.get_total_flops())


def turns(steps: Mapping[str, Step], rounds: int, name: str) -> dict[str, list[float]]:
    """Processor seconds of each arm's steps; the first round warms up and is left out."""
    found: dict[str, list[float]] = {arm: [] for arm in steps}
    arms = list(steps)
    for i in tqdm(range(-1, rounds), desc=name.split(",")[0]):
        for arm in arms[i % len(arms) :] + arms[: i % len(arms)]:
            seed_all_rng(i + 1)
            start = time.process_time()
            steps[arm]()
            if i >= 0:
                found[arm].append(time.process_time() - start)
    return found


def training_step(model: torch.nn.Module, inputs: Sequence[dict[str, Any]]) -> Step:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-6, momentum=0.9)

    def step() -> None:
        with EventStorage():
            losses = model.train()(list(inputs))
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()

    return step


def inference(model: torch.nn.Module, inputs: Sequence[dict[str, Any]]) -> Step:
    def step() -> None:
        with torch.no_grad():
            model.eval()(list(inputs))

    return step


def add_tasks(cfg: CfgNode, count: int, hidden: int) -> None:
    for i in range(count):
        cfg.MODEL.TASKS[f"task{i}"] = CfgNode({"on": "box", "classes": CLASSES, "hidden": hidden})


def label(instances: Instances) -> None:
    """Random labels of every task that any arm has, in place."""
    generator = torch.Generator().manual_seed(2)
    for i in range(max(count for count, _ in ARMS.values())):
        instances.set(f"gt_task{i}", torch.randint(0, len(CLASSES), (len(instances),), generator=generator))


def r50_fpn(count: int, hidden: int) -> tuple[torch.nn.Module, list[dict[str, Any]]]:
    """detectron2's baseline from random weights, with the quarter of foreground regions that it trains with."""
    cfg = load_config(str(ROOT / "configs" / "faster_rcnn_R_50_FPN.yaml"))
    cfg.MODEL.DEVICE, cfg.MODEL.WEIGHTS, cfg.DATASETS.TRAIN = "cpu", "", ()
    cfg.MODEL.HEAD_ADAPT.TARGET_CLASSES = "coco"
    add_tasks(cfg, count, hidden)
    seed_all_rng(0)
    model = build_model(cfg)
    side, objects = 160, 6
    generator = torch.Generator().manual_seed(1)
    corner = torch.rand(objects, 2, generator=generator) * 70
    boxes = torch.cat([corner, corner + 30 + 60 * torch.rand(objects, 2, generator=generator)], 1)
    instances = Instances((side, side), gt_boxes=Boxes(boxes))
    instances.gt_classes = torch.randint(0, 80, (objects,), generator=generator)
    label(instances)
    # An untrained RPN proposes next to nothing that matches: jittered objects among random boxes stand in for a trained
    # one's proposals, after it did its own work.
    near = boxes.repeat(60, 1) + 8 * torch.randn(60 * objects, 4, generator=generator)
    far = torch.rand(640, 2, generator=generator) * 140
    proposals = Instances((side, side))
    proposals.proposal_boxes = Boxes(torch.cat([near, torch.cat([far, far + 20], 1)]).clamp(0, side))
    proposals.objectness_logits = torch.zeros(len(proposals.proposal_boxes))
    model.proposal_generator.register_forward_hook(lambda module, given, output: ([proposals], output[1]))
    image = (torch.rand(3, side, side, generator=generator) * 255).byte()
    return model, [{"image": image, "height": side, "width": side, "instances": instances}]


def fbnet(count: int, hidden: int) -> tuple[torch.nn.Module, list[dict[str, Any]]]:
    """A small trained detector, on photographs: the step is short, so tasks weigh more."""
    cfg = load_config(
        str(ROOT / "configs" / "real_coco128.yaml"),
        ["DATASETS.REGISTER", "[]", "MODEL.WEIGHTS", str(REAL / "models" / "fbnet_c4_coco.pth")],
        [str(REAL / "models" / "fbnet_c4.py")],
    )
    cfg.MODEL.DEVICE, cfg.DATASETS.TRAIN = "cpu", ()
    cfg.MODEL.HEAD_ADAPT.TARGET_CLASSES = "coco"
    add_tasks(cfg, count, hidden)
    seed_all_rng(0)
    model = build_model(cfg)
    HeadAdaptCheckpointer(model).load(cfg.MODEL.WEIGHTS)
    records = load_coco_json(str(REAL / "coco128" / "train.json"), str(REAL / "coco128" / "train"))
    crowded = sorted(records, key=lambda record: -len(record["annotations"]))[:2]
    inputs = [DatasetMapper(cfg, is_train=True)(record) for record in crowded]
    for entry in inputs:
        label(entry["instances"])
    return model, inputs


def ratio(found: Mapping[str, Sequence[float]], arm: str, to: str) -> str:
    """Median of the ratio within each round, and its quartiles, in percent more."""
    ratios = [100 * (a / b - 1) for a, b in zip(found[arm], found[to], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return f"{middle:+.1f} % ({low:+.1f} to {high:+.1f})"


def render(data: dict[str, Any]) -> str:
    """The page."""
    lines = [
        "# What tasks on boxes cost",
        "",
        "Written by `tools/bench_tasks.py` from `docs/tasks_bench.json`. Each task has 10 classes. Tasks are",
        "classified only where they are needed, on foreground regions in training and on detections in inference, so",
        "their share is that of a few small matrix products.",
        "",
        "| network | step | detector alone | 1 task | 10 tasks | 10 against 1 | 10, hidden layers of 256 |",
        "|---|---|---|---|---|---|---|",
    ]
    wide = list(ARMS)[3]
    for name, steps in data["seconds"].items():
        for step, found in steps.items():
            cells = (
                ratio(found, ONE, ALONE),
                ratio(found, TEN, ALONE),
                ratio(found, TEN, ONE),
                ratio(found, wide, ALONE),
            )
            lines.append(f"| {name} | {step} | {statistics.median(found[ALONE]):.2f} s | {' | '.join(cells)} |")
    where = data["machine"]
    lines += [
        "",
        f"Medians of {data['rounds']} rounds, in brackets the quartiles: every arm takes one step in each round, in",
        "turn, in one process with one thread. Percent are of processor time and above the detector alone (above one",
        "task in the column that says so). Other work ran on the machine at the same time: a difference smaller than",
        f"the brackets is noise. {where['cpu']}, torch {where['torch']}, {where['date']}.",
    ]
    lines += [
        "",
        "Operations of matrix products and convolutions, which do not depend on what else runs:",
        "",
        "| network | step | detector alone | 1 task | 10 tasks | 10, hidden layers of 256 |",
        "|---|---|---|---|---|---|",
    ]
    for name, steps in data["operations"].items():
        for step, counts in steps.items():
            cells = tuple(f"{100 * (counts[arm] / counts[ALONE] - 1):+.2f} %" for arm in (ONE, TEN, wide))
            lines.append(f"| {name} | {step} | {counts[ALONE] / 1e9:.1f} GFLOP | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    main()
