#!/usr/bin/env python3
"""Measure what this package costs beside stock detectron2, and write the table into docs/bench.md.

Each arm of a comparison runs in a process of its own, in turn with the other (A B A B ...), so that a machine whose
speed drifts hurts both alike. Quoted are medians, and the ratio of the medians.

    python tools/bench.py            measure everything, write docs/bench.json and the table of docs/bench.md
    python tools/bench.py --render   only write that table, from docs/bench.json
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
STORED = ROOT / "docs" / "bench.json"
PAGE = ROOT / "docs" / "bench.md"
BEGIN, END = "<!-- bench: begin -->", "<!-- bench: end -->"
SIZES = {"R101-FPN": "COCO-Detection/faster_rcnn_R_101_FPN_3x.yaml", "1 GB": ""}
TARGET = ["zebra", "cat", "dog", "person", "a new one"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--render", action="store_true", help="write the table from the stored numbers")
    parser.add_argument("--runs", type=int, default=5, help="runs of each arm (default 5)")
    parser.add_argument("--arm", help=argparse.SUPPRESS)
    parser.add_argument("--file", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.arm:
        print(json.dumps(ARMS[args.arm](args.file)))
        return
    if not args.render:
        STORED.parent.mkdir(exist_ok=True)
        STORED.write_text(json.dumps(measure(args.runs), indent=1) + "\n")
    PAGE.write_text(with_block(PAGE.read_text(), render(json.loads(STORED.read_text()))))
    print(render(json.loads(STORED.read_text())))


def measure(runs: int) -> dict[str, Any]:
    """All numbers, with the commit and the machine they are from."""
    from tqdm import tqdm

    data: dict[str, Any] = {"machine": machine(), "runs": runs, "load": {}, "plan": {}}
    with tempfile.TemporaryDirectory() as folder, tqdm(total=len(SIZES) * runs * 3 + runs + 2, desc="bench") as bar:

        def arm(name: str, file: str = "") -> dict[str, float]:
            command = [sys.executable, "-W", "ignore", __file__, "--arm", name, "--file", file]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise SystemExit(done.stderr)
            bar.update()
            found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
            return found

        for size in SIZES:
            file = os.path.join(folder, f"{size.replace(' ', '_')}.pth")
            write_checkpoint(size, file)
            names = ("load stock", "load ours", "load ours unverified")
            turns = [[arm(name, file) for name in names] for _ in range(runs)]
            data["load"][size] = {
                "bytes": os.path.getsize(file),
                "stock": medians([turn[0] for turn in turns]),
                "ours": medians([turn[1] for turn in turns]),
                "unverified": medians([turn[2] for turn in turns]),
            }
            if size == "1 GB":
                data["plan"] = {"bytes": os.path.getsize(file), **medians([arm("plan", file) for _ in range(runs)])}
        data["names"] = arm("names")
        data["iteration"] = arm("iteration")
    return data


def medians(runs: list[dict[str, float]]) -> dict[str, float]:
    return {key: statistics.median(run[key] for run in runs) for key in runs[0]}


def machine() -> dict[str, Any]:
    import torch

    command = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    with open("/proc/cpuinfo") as file:
        cpu = next((line.split(":")[1].strip() for line in file if line.startswith("model name")), platform.machine())
    return {
        "commit": commit.stdout.strip() or "unknown",
        "cpu": cpu,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }


def config(size: str) -> Any:
    from detectron2 import model_zoo
    from detectron2.config import get_cfg

    from d2_headadapt import add_headadapt_config

    cfg = get_cfg()
    add_headadapt_config(cfg)
    cfg.merge_from_file(model_zoo.get_config_file(SIZES["R101-FPN"]))
    cfg.MODEL.DEVICE, cfg.MODEL.WEIGHTS = "cpu", ""
    if size == "1 GB":
        # A wide box head is the cheapest way to a detector of that size.
        cfg.MODEL.ROI_BOX_HEAD.FC_DIM = 11264
    return cfg


def write_checkpoint(size: str, file: str) -> None:
    import torch
    from detectron2.modeling import build_model

    torch.save({"model": build_model(config(size)).state_dict()}, file)


def model_for(file: str, ours: bool) -> Any:
    from detectron2.modeling import build_model

    cfg = config("1 GB" if "1_GB" in file else "R101-FPN")
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = len(TARGET)
    if ours:
        cfg.MODEL.ROI_HEADS.NAME = "HeadAdaptROIHeads"
        cfg.MODEL.HEAD_ADAPT.SOURCE_CLASSES, cfg.MODEL.HEAD_ADAPT.TARGET_CLASSES = "coco", TARGET
    return build_model(cfg)


class PeakMemory:
    """Growth of this process's memory while the body runs: anonymous pages (sampled), and all resident pages."""

    def __enter__(self) -> PeakMemory:
        self.before = self.peak = self._now()
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop.set()
        self.thread.join()

    def _watch(self) -> None:
        while not self.stop.wait(0.002):
            self._watch_once()

    def _watch_once(self) -> None:
        self.peak = tuple(map(max, self.peak, self._now()))

    @staticmethod
    def _now() -> tuple[int, ...]:
        with open("/proc/self/status") as file:
            found = dict(line.split(":", 1) for line in file)
        return tuple(int(found[key].split()[0]) * 1024 for key in ("RssAnon", "VmRSS"))

    def grown(self) -> dict[str, float]:
        anonymous, resident = (peak - before for peak, before in zip(self.peak, self.before, strict=True))
        return {"anonymous_bytes": anonymous, "resident_bytes": resident}


def load(checkpointer: Any, file: str) -> dict[str, float]:
    import logging

    logging.disable(logging.CRITICAL)
    with PeakMemory() as memory:
        start = time.perf_counter()
        checkpointer.load(file)
        seconds = time.perf_counter() - start
    return {"seconds": seconds, **memory.grown()}


def load_stock(file: str) -> dict[str, float]:
    from detectron2.checkpoint import DetectionCheckpointer

    return load(DetectionCheckpointer(model_for(file, ours=False)), file)


def load_ours(file: str) -> dict[str, float]:
    from d2_headadapt import HeadAdaptCheckpointer

    return load(HeadAdaptCheckpointer(model_for(file, ours=True)), file)


def load_ours_unverified(file: str) -> dict[str, float]:
    """With ``MODEL.HEAD_ADAPT.VERIFY_FILE False``: no CRC."""
    from dataclasses import replace

    from d2_headadapt import HeadAdaptCheckpointer

    model = model_for(file, ours=True)
    settings = replace(HeadAdaptCheckpointer(model).settings, verify_file=False)
    return load(HeadAdaptCheckpointer(model, settings=settings), file)


def plan(file: str) -> dict[str, float]:
    """Planning without loading: seconds after imports, model built on the meta device included, and bytes touched."""
    from d2_headadapt import AdaptSettings, build_on_meta, plan_file

    cfg = config("1 GB")
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = len(TARGET)
    cfg.MODEL.ROI_HEADS.NAME = "HeadAdaptROIHeads"
    cfg.MODEL.HEAD_ADAPT.SOURCE_CLASSES, cfg.MODEL.HEAD_ADAPT.TARGET_CLASSES = "coco", TARGET
    touched: list[int] = []
    before = _read_bytes()
    start = time.perf_counter()
    settings = AdaptSettings.from_config(cfg)
    room: Any = sys.modules[plan_file.__module__]
    right = room.read_checkpoint

    def watched(*args: Any, **kwargs: Any) -> Any:
        found = right(*args, **kwargs)
        touched.append(_mapped_bytes(file))
        return found

    room.read_checkpoint = watched
    made = plan_file(file, build_on_meta(cfg), settings)
    seconds = time.perf_counter() - start
    if made.loads_nothing:
        raise SystemExit("the plan loads nothing")
    return {"seconds": seconds, "read_bytes": _read_bytes() - before + touched[0]}


def _read_bytes() -> int:
    with open("/proc/self/io") as file:
        return int(file.readline().split()[1])


def _mapped_bytes(path: str) -> int:
    """Resident bytes of the file's memory mappings: what was touched, rounded up to what the kernel maps around it."""
    total, inside = 0, False
    with open("/proc/self/smaps") as file:
        for line in file:
            if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
                inside = line.rstrip().endswith(path)
            elif inside and line.startswith("Rss:"):
                total += int(line.split()[1]) * 1024
    return total


def names(_: str) -> dict[str, float]:
    """20,000 classes mapped onto 20,000 others by name, half of them spelled otherwise."""
    from d2_headadapt import ClassTable, match_tables

    source = ClassTable([f"some class {i}" for i in range(20_000)])
    target = ClassTable([f"Some-Class_{i}" if i % 2 else f"some class {i}" for i in reversed(range(10_000, 30_000))])
    match_tables({"thing": ClassTable(["a"])}, {"thing": ClassTable(["b"])}, [], "name")  # vocabularies are read once
    times = []
    for _run in range(5):
        fresh = ClassTable(source.names), ClassTable(target.names)
        start = time.perf_counter()
        found = match_tables({"thing": fresh[0]}, {"thing": fresh[1]}, [], "name")["thing"]
        times.append(time.perf_counter() - start)
    if len(found.carried) != 10_000:
        raise SystemExit("the names were not found")
    return {"seconds": statistics.median(times)}


def iteration(_: str) -> dict[str, float]:
    """Training steps of the same detector with stock's heads and with ours, in turn, in one process."""
    import torch
    from detectron2.config import get_cfg
    from detectron2.engine import SimpleTrainer
    from detectron2.modeling import build_model
    from detectron2.structures import Boxes, Instances
    from detectron2.utils.events import EventStorage

    from d2_headadapt import add_headadapt_config

    def batch() -> list[dict[str, Any]]:
        generator = torch.Generator().manual_seed(0)
        found = []
        for _image in range(2):
            truth = Instances((192, 256))
            corner = torch.rand(6, 2, generator=generator) * 100
            truth.gt_boxes = Boxes(torch.cat([corner, corner + 30 + 60 * torch.rand(6, 2, generator=generator)], 1))
            truth.gt_classes = torch.randint(0, 80, (6,), generator=generator)
            found.append({"image": torch.rand(3, 192, 256, generator=generator) * 255, "instances": truth})
        return found

    steps: dict[str, Callable[[], None]] = {}
    for name in ("StandardROIHeads", "HeadAdaptROIHeads"):
        cfg = get_cfg()
        add_headadapt_config(cfg)
        cfg.merge_from_other_cfg(config("R101-FPN"))
        cfg.MODEL.RESNETS.DEPTH = 50
        cfg.MODEL.ROI_HEADS.NAME = name
        torch.manual_seed(0)
        model = build_model(cfg).train()
        data = batch()
        trainer = SimpleTrainer(model, [data], torch.optim.SGD(model.parameters(), lr=1e-6))
        trainer._data_loader_iter_obj = iter([data] * 1000)
        steps[name] = trainer.run_step
    times: dict[str, list[float]] = {name: [] for name in steps}
    with EventStorage():
        for round_ in range(13):
            for name, step in steps.items():
                start = time.perf_counter()
                step()
                if round_:
                    times[name].append(time.perf_counter() - start)
    stock, ours = times["StandardROIHeads"], times["HeadAdaptROIHeads"]
    ratios = sorted(b / a for a, b in zip(stock, ours, strict=True))
    return {
        "stock": statistics.median(stock), "ours": statistics.median(ours), "ratio": statistics.median(ratios),
        "ratio_low": ratios[len(ratios) // 10], "ratio_high": ratios[-1 - len(ratios) // 10],
    }  # fmt: skip


ARMS: dict[str, Callable[[str], dict[str, float]]] = {
    "load stock": load_stock,
    "load ours": load_ours,
    "load ours unverified": load_ours_unverified,
    "plan": plan,
    "names": names,
    "iteration": iteration,
}


def render(data: dict[str, Any]) -> str:
    """The table of the stored numbers."""
    m = data["machine"]
    rows = [
        "| what | stock detectron2 | d2_headadapt | ratio |",
        "|---|---|---|---|",
    ]
    for size, entry in data["load"].items():
        stock, ours = entry["stock"], entry["ours"]
        name = f"load + adapt, {size} ({entry['bytes'] / 2**20:.0f} MiB)"
        rows.append(
            f"| {name}, seconds | {stock['seconds']:.2f} | {ours['seconds']:.2f} | "
            f"{ours['seconds'] / stock['seconds']:.2f} |"
        )
        seconds = entry["unverified"]["seconds"]
        rows.append(
            f"| the same with `VERIFY_FILE False`, seconds | | {seconds:.2f} | {seconds / stock['seconds']:.2f} |"
        )
        for key, label in (("anonymous_bytes", "anonymous memory"), ("resident_bytes", "all resident pages")):
            rows.append(
                f"| {name}, peak growth of {label}, MiB | {stock[key] / 2**20:.0f} | {ours[key] / 2**20:.0f} | "
                f"{ours[key] / stock[key]:.2f} |"
            )
    p, i = data["plan"], data["iteration"]
    share = p["read_bytes"] / p["bytes"]
    rows += [
        f"| training iteration, seconds | {i['stock']:.3f} | {i['ours']:.3f} | {i['ratio']:.3f} "
        f"({i['ratio_low']:.3f} to {i['ratio_high']:.3f}) |",
        f"| plan a {p['bytes'] / 2**20:.0f} MiB file after imports, seconds | | {p['seconds']:.2f} | |",
        f"| the same, share of the file that is read | | {share:.2%} | |",
        f"| map 20,000 classes by name, seconds | | {data['names']['seconds']:.3f} | |",
    ]
    head = (
        f"Measured on {m['date']} at commit {m['commit']}, {m['cores']} cores of {m['cpu']}, Python {m['python']}, "
        f"torch {m['torch']}; medians of {data['runs']} runs of each arm in turn. Our load includes checking the "
        "file's CRC-32 and looking for NaN, which stock's does not."
    )
    return "\n".join([head, "", *rows])


def with_block(text: str, block: str) -> str:
    """``text`` with the block between its markers replaced."""
    start, rest = text.split(BEGIN)
    return f"{start}{BEGIN}\n{block}\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    main()
