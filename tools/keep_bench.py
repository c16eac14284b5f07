#!/usr/bin/env python3
"""What ``KEEP: exact`` does to a real COCO model and three kinds of blood cells: the figures of docs/guides/keep.md.

Needs the folder of real material that D2HA_REAL names (by default ../shared/real beside the project). Old detections
are compared bit for bit with stock detectron2's on the 128 images of coco128/val; AP of the new classes is measured on
bccd/test, and over bccd/test and coco128/val together, where every cell found on a photo is a false one.

    python tools/keep_bench.py --output output/keep.json              # the closed-form fit alone
    python tools/keep_bench.py --iterations 100 --arms negatives      # and the branch trained
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, build_detection_test_loader
from detectron2.evaluation import COCOEvaluator
from detectron2.modeling import build_model
from detectron2.utils.env import seed_all_rng
from torch import nn

from d2_headadapt import HeadAdaptCheckpointer, Trainer, load_config, resolve_config
from d2_headadapt.data import register_datasets
from d2_headadapt.engine import build_evaluator
from d2_headadapt.fit import FitSettings, fit_new_rows, mapper_at_test_size, training_dicts

ROOT = Path(__file__).resolve().parents[1]
REAL = Path(os.environ.get("D2HA_REAL") or ROOT.parent / "shared" / "real").resolve()
ARMS: dict[str, dict[str, str]] = {
    "old proposals": {"KEEP_PROPOSALS": "off"},
    "default": {},
    "old proposals, negatives": {"KEEP_PROPOSALS": "off", "KEEP_NEGATIVES": str(REAL / "coco128" / "train")},
    "negatives": {"KEEP_NEGATIVES": str(REAL / "coco128" / "train")},
}
OLD, NEW, BOTH = "keep_old", "keep_new", "keep_both"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS), metavar="ARM")
    parser.add_argument("--iterations", type=int, default=0, help="of training after the fit (0)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default="output/keep.json", metavar="FILE")
    args = parser.parse_args()
    output = Path(args.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    register(output.parent)
    results: dict[str, Any] = {}
    base, old = stock_detections(config({}, args, output.parent))
    results["base"] = {"parameters": parameters(base), "old AP": old_ap(old)}
    print("base", results["base"], flush=True)
    for arm in args.arms:
        results[arm] = measure(config(ARMS[arm], args, output.parent), args, base, old)
        print(arm, results[arm], flush=True)
        output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def register(folder: Path) -> None:
    """The photos with COCO's labels, the cells, and both with labels of cells alone."""
    cells = json.loads((REAL / "bccd" / "test.json").read_text(encoding="utf-8"))
    photos = json.loads((REAL / "coco128" / "val.json").read_text(encoding="utf-8"))
    images = [{**image, "file_name": str(REAL / "bccd" / "test" / image["file_name"])} for image in cells["images"]]
    for image in photos["images"]:
        images.append(
            {**image, "id": image["id"] + 10**6, "file_name": str(REAL / "coco128" / "val" / image["file_name"])}
        )
    both = folder / "keep_both.json"
    both.write_text(json.dumps({**cells, "images": images}), encoding="utf-8")
    register_datasets([
        {"name": OLD, "json": str(REAL / "coco128" / "val.json"), "images": str(REAL / "coco128" / "val")},
        {"name": NEW, "json": str(REAL / "bccd" / "test.json"), "images": str(REAL / "bccd" / "test")},
        {"name": BOTH, "json": str(both), "images": str(REAL)},
    ])  # fmt: skip


def config(keys: dict[str, str], args: argparse.Namespace, folder: Path) -> CfgNode:
    """The blood cells' config with classes kept."""
    weights = str(REAL / "models" / "fbnet_c4_coco.pth")
    opts = ["MODEL.WEIGHTS", weights, "MODEL.HEAD_ADAPT.KEEP", "exact", "MODEL.HEAD_ADAPT.FIT.SEED", str(args.seed)]
    opts += ["SEED", str(args.seed), "OUTPUT_DIR", str(folder / "keep_run"), "MODEL.DEVICE", "cpu"]
    opts += ["SOLVER.MAX_ITER", str(args.iterations), "DATASETS.TEST", f"('{OLD}','{NEW}','{BOTH}')"]
    for key, value in keys.items():
        opts += [f"MODEL.HEAD_ADAPT.{key}", value]
    cfg = load_config(str(ROOT / "configs" / "blood_cells.yaml"), opts, [str(REAL / "models" / "fbnet_c4.py")])
    resolve_config(cfg)
    return cfg


def measure(cfg: CfgNode, args: argparse.Namespace, base: nn.Module, old: Sequence[Any]) -> dict[str, Any]:
    """One arm: fit, train where asked to, and judge."""
    seed_all_rng(args.seed)
    started = time.perf_counter()
    if args.iterations:
        trainer = Trainer(cfg)
        trainer.resume_or_load(resume=False)
        trainer.train()
        model: nn.Module = trainer.model
        parts: Sequence[str] = ()
    else:
        model = Trainer.build_model(cfg)
        checkpointer = HeadAdaptCheckpointer(model)
        checkpointer.load(cfg.MODEL.WEIGHTS, checkpointables=[])
        report = fit_new_rows(
            model, training_dicts(cfg), mapper_at_test_size(cfg), new=checkpointer.rows_to_fit(),
            settings=FitSettings.from_config(cfg),
        )  # fmt: skip
        parts = [part.line() for part in report.parts]
    seconds = time.perf_counter() - started
    photos, cells = detections(cfg, model, OLD), detections(cfg, model, NEW)
    same = sum(identical(a, b) for a, b in zip(old, photos, strict=True))
    new_ap = judged(cfg, NEW, cells)["bbox"]["AP"]
    both = judged(cfg, BOTH, [*cells, *photos])["bbox"]["AP"]
    judged_old = judged(cfg, OLD, photos)
    return {
        "images with identical old detections": f"{same} of {len(photos)}",
        "old AP": judged_old["keep"]["bbox old"],
        "new AP": new_ap,
        "new AP, photos too": both,
        "new >= 0.5 on photos": judged_old["keep"]["new >= 0.5"],
        "seconds to extend": seconds,
        "seconds an image, against base": time_ratio(cfg, base, model),
        "parameters, against base": parameters(model) / parameters(base),
        "parts": list(parts),
    }


def stock_detections(cfg: CfgNode) -> tuple[nn.Module, list[Any]]:
    """The base by stock detectron2 alone, and what it finds on the photos."""
    model = build_model(cfg)
    DetectionCheckpointer(model).load(cfg.MODEL.WEIGHTS)
    return model, detections(cfg, model, OLD)


@torch.no_grad()
def detections(cfg: CfgNode, model: nn.Module, name: str) -> list[Any]:
    """What a model finds on a test set, image by image."""
    model.eval()
    return [(inputs[0], model(inputs)[0]) for inputs in build_detection_test_loader(cfg, name)]


@torch.no_grad()
def time_ratio(cfg: CfgNode, base: nn.Module, model: nn.Module, count: int = 40) -> float:
    """Median over photos of the seconds that a model takes, against those of the base just before and just after."""
    base.eval()
    model.eval()
    ratios = []
    for _, inputs in zip(range(count), build_detection_test_loader(cfg, OLD), strict=False):
        seconds = []
        for one in (base, model, base):
            started = time.perf_counter()
            one(inputs)
            seconds.append(time.perf_counter() - started)
        ratios.append(2 * seconds[1] / (seconds[0] + seconds[2]))
    return statistics.median(ratios)


def identical(old: Any, both: Any) -> bool:
    """Whether an image's old detections are the same bits."""
    one, other = old[1]["instances"].get_fields(), both[1]["instances"].get_fields()
    pairs = [(getattr(one[name], "tensor", one[name]), getattr(other[name], "tensor", other[name])) for name in one]
    return all(torch.equal(a, b[: len(a)]) for a, b in pairs)


def judged(cfg: CfgNode, name: str, found: Sequence[Any]) -> dict[str, Any]:
    """The results of a test set's own evaluator."""
    judge = build_evaluator(cfg, name)
    judge.reset()
    numbers = {entry["file_name"]: entry["image_id"] for entry in DatasetCatalog.get(name)}
    for inputs, outputs in found:
        # The same photo has another number in the joint set.
        judge.process([{**inputs, "image_id": numbers[inputs["file_name"]]}], [outputs])
    results: dict[str, Any] = judge.evaluate()
    return results


def old_ap(found: Sequence[Any]) -> float:
    """AP of the base on the photos, by stock's evaluator alone."""
    judge = COCOEvaluator(OLD, tasks=("bbox",), output_dir=None)
    judge.reset()
    for inputs, outputs in found:
        judge.process([inputs], [outputs])
    ap: float = judge.evaluate()["bbox"]["AP"]
    return ap


def parameters(model: nn.Module) -> int:
    """How many there are."""
    return sum(parameter.numel() for parameter in model.parameters())


if __name__ == "__main__":
    main()
