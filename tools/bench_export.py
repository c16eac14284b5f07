#!/usr/bin/env python3
"""Measure exported models against eager: largest differences, file sizes and time; writes docs/export_bench.md.

Every form of a model is exported as ``d2-headadapt export`` does it. Then eager and its forms take the same image in
turn, in one process with one thread, in an order that rotates. Time is the processor time of this process, because
others may use the machine; quoted are medians of the ratio to eager within each round, and the quartiles around them.

    python tools/bench_export.py            measure, write docs/export_bench.json and docs/export_bench.md
    python tools/bench_export.py --render   only write docs/export_bench.md from docs/export_bench.json
"""

from __future__ import annotations

import argparse
import io
import json
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import torch
from bench import machine
from detectron2.config import CfgNode
from detectron2.data.detection_utils import read_image
from detectron2.data.transforms import ResizeShortestEdge
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling import build_model
from detectron2.utils.env import seed_all_rng
from torch import nn
from tqdm import tqdm

from d2_headadapt import ClassTable, HeadAdaptCheckpointer, load_config, vocabulary
from d2_headadapt.errors import ExportError
from d2_headadapt.export import ENDINGS, ExportedModel, FlatModel, drawn_images, export_model

ROOT = Path(__file__).resolve().parents[1]
STORED = ROOT / "docs" / "export_bench.json"
PAGE = ROOT / "docs" / "export_bench.md"
REAL = Path(os.environ.get("D2HA_REAL") or ROOT.parent / "shared" / "real")
TASKS = {"colour": ["red", "green", "blue", "grey"], "state": ["new", "used", "broken"]}

Built = tuple[nn.Module, list[torch.Tensor]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--render", action="store_true", help="write the page from the stored numbers")
    parser.add_argument("--rounds", type=int, default=7, help="images that every form takes (default 7)")
    args = parser.parse_args()
    if not args.render:
        torch.set_num_threads(1)
        STORED.write_text(json.dumps(measure(args.rounds), indent=1) + "\n", encoding="utf-8")
    PAGE.write_text(render(json.loads(STORED.read_text(encoding="utf-8"))), encoding="utf-8")
    print(PAGE.read_text(encoding="utf-8"))


def measure(rounds: int) -> dict[str, Any]:
    """Every model's forms: what they differ by, what they weigh, and the seconds of each round."""
    builds: dict[str, Callable[[], Built]] = {
        "Faster R-CNN R50-FPN, 320 x 448": lambda: r50_fpn(0),
        "R50-FPN, 2 tasks on boxes": lambda: r50_fpn(2),
        "MultiTaskClassifier R50, 2 tasks, 224 x 224": classifier,
    }
    if (REAL / "models").is_dir():
        builds["FBNet-C4 trained on COCO, photographs"] = lambda: fbnet(0)
        builds["FBNet-C4, 2 tasks on boxes"] = lambda: fbnet(2)
    found: dict[str, Any] = {}
    for name, build in builds.items():
        seed_all_rng(0)
        model, images = build()
        found[name] = forms(name, model.eval(), images, rounds)
    versions = {"onnx": onnx.__version__, "onnxruntime": onnxruntime.__version__}
    return {"machine": {**machine(), **versions}, "rounds": rounds, "models": found}


def forms(name: str, model: nn.Module, images: list[torch.Tensor], rounds: int) -> dict[str, Any]:
    """One model in every form that it has."""
    buffer = io.BytesIO()
    torch.save({"model": model.state_dict()}, buffer)
    flat = FlatModel(model.requires_grad_(False), images[0])
    arms: dict[str, Callable[[torch.Tensor], Any]] = {"eager": flat}
    told: dict[str, Any] = {}
    for form in ENDINGS:
        try:
            made = export_model(model, form, {"thing": ClassTable(["any"])}, images, side=224)
        except ExportError as error:
            told[form] = {"refused": error.found}
            continue
        parity = made.parity
        told[form] = {
            "bytes": len(made.content),
            "images": parity.images,
            "detections": parity.detections,
            "swapped": parity.swapped,
            "largest": parity.largest,
            "shares": parity.shares,
        }
        arms[form] = ExportedModel(made.content)
    seconds = turns(arms, images, rounds, name)
    return {"checkpoint_bytes": len(buffer.getvalue()), "forms": told, "seconds": seconds}


@torch.no_grad()
def turns(
    arms: Mapping[str, Callable[[torch.Tensor], Any]], images: Sequence[torch.Tensor], rounds: int, name: str
) -> dict[str, list[float]]:
    """Processor seconds of each arm; the first rounds warm up, TorchScript recompiles in them, and are left out."""
    found: dict[str, list[float]] = {arm: [] for arm in arms}
    order = list(arms)
    warm = len(images) + 1
    for i in tqdm(range(-warm, rounds), desc=name.split(",")[0]):
        for arm in order[i % len(order) :] + order[: i % len(order)]:
            image = images[i % len(images)]
            start = time.process_time()
            arms[arm](image)
            if i >= 0:
                found[arm].append(time.process_time() - start)
    return found


def add_tasks(cfg: CfgNode, count: int, on: str) -> None:
    for name in list(TASKS)[:count]:
        cfg.MODEL.TASKS[name] = CfgNode({"on": on, "classes": TASKS[name]})


def picture(height: int, width: int) -> torch.Tensor:
    """Of the kind that an export compares on, so that what is calibrated on it fits those too."""
    return drawn_images([(height, width), (height, width)])[0]


def calibrated(model: nn.Module, image: torch.Tensor) -> nn.Module:
    """Random weights with activations as wide as trained ones': frozen norms normalise what they see of an image."""

    def see(module: nn.Module, given: tuple[torch.Tensor, ...]) -> None:
        module.running_mean.copy_(given[0].mean(dim=(0, 2, 3)))
        module.running_var.copy_(given[0].var(dim=(0, 2, 3)))

    norms = [module for module in model.modules() if isinstance(module, FrozenBatchNorm2d)]
    hooks = [module.register_forward_pre_hook(see) for module in norms]
    with torch.no_grad():
        model.eval()([{"image": image}])
    for hook in hooks:
        hook.remove()
    return model


def r50_fpn(tasks: int) -> Built:
    """detectron2's baseline from random weights, with as many detections as an image may have."""
    cfg = load_config(str(ROOT / "configs" / "faster_rcnn_R_50_FPN.yaml"))
    cfg.MODEL.DEVICE, cfg.MODEL.WEIGHTS, cfg.DATASETS.TRAIN = "cpu", "", ()
    cfg.MODEL.HEAD_ADAPT.TARGET_CLASSES = list(vocabulary("coco").names)
    add_tasks(cfg, tasks, "box")
    image = picture(320, 448)
    model = build_model(cfg)
    with torch.no_grad():
        # No norm follows these layers: untrained, their outputs are wide, and so is the rounding of all that follows.
        model.roi_heads.box_head.fc2.weight.mul_(0.1)
    seen: list[torch.Tensor] = []
    predictor = model.roi_heads.box_predictor
    hook = predictor.register_forward_hook(lambda module, given, output: seen.append(output[0].softmax(dim=1)))
    calibrated(model, image)
    hook.remove()
    # A trained one suppresses among some hundred boxes, not among all regions times all classes.
    predictor.test_score_thresh = float(seen[-1][:, :-1].flatten().topk(800).values[-1])
    return model, [image]


def classifier() -> Built:
    """A ResNet-50 with two tasks on its pooled features."""
    cfg = load_config("")
    cfg.MODEL.DEVICE, cfg.MODEL.WEIGHTS = "cpu", ""
    cfg.MODEL.META_ARCHITECTURE = "MultiTaskClassifier"
    cfg.MODEL.BACKBONE.NAME = "build_resnet_backbone"
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res5"]
    add_tasks(cfg, 2, "image")
    image = picture(224, 224)
    return calibrated(build_model(cfg), image), [image]


def fbnet(tasks: int) -> Built:
    """A small trained detector, on the three photographs with the most objects; its tasks are random."""
    cfg = load_config(
        str(ROOT / "configs" / "real_coco128.yaml"),
        ["DATASETS.REGISTER", "[]", "MODEL.WEIGHTS", str(REAL / "models" / "fbnet_c4_coco.pth")],
        [str(REAL / "models" / "fbnet_c4.py")],
    )
    cfg.MODEL.DEVICE, cfg.DATASETS.TRAIN = "cpu", ()
    cfg.MODEL.HEAD_ADAPT.TARGET_CLASSES = list(vocabulary("coco").names)
    add_tasks(cfg, tasks, "box")
    model = build_model(cfg)
    HeadAdaptCheckpointer(model).load(cfg.MODEL.WEIGHTS)
    labels = json.loads((REAL / "coco128" / "val.json").read_text(encoding="utf-8"))
    objects = [entry["image_id"] for entry in labels["annotations"]]
    crowded = sorted(labels["images"], key=lambda entry: -objects.count(entry["id"]))[:3]
    resize = ResizeShortestEdge([cfg.INPUT.MIN_SIZE_TEST] * 2, cfg.INPUT.MAX_SIZE_TEST)
    images = []
    for entry in crowded:
        pixels = read_image(str(REAL / "coco128" / "val" / entry["file_name"]), format="BGR")
        pixels = resize.get_transform(pixels).apply_image(pixels)
        images.append(torch.as_tensor(pixels.transpose(2, 0, 1).astype("float32")))
    return model, images


def ratio(found: Mapping[str, Sequence[float]], form: str) -> str:
    """Median of the ratio to eager within each round, and its quartiles."""
    ratios = [own / eager for own, eager in zip(found[form], found["eager"], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


def differences(form: Mapping[str, Any]) -> str:
    """The largest difference of boxes in pixels, and of everything else as the comparison measures it."""
    boxes = form["largest"].get("pred_boxes")
    rest = max(share for name, share in form["shares"].items() if name != "pred_boxes")
    first = f"{boxes:.2g} px, " if boxes else ""
    return f"{first}{rest:.1g}" if boxes or rest else "none"


def render(data: dict[str, Any]) -> str:
    """The page."""
    lines = [
        "# Exported models against eager",
        "",
        "Written by `tools/bench_export.py` from `docs/export_bench.json`. What the forms are: [export.md](export.md).",
        "",
        "| model | eager | form | detections compared | largest difference | file | file / `.pth` | time / eager |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, model in data["models"].items():
        seconds = statistics.median(model["seconds"]["eager"])
        for form, told in model["forms"].items():
            start = f"| {name} | {seconds:.2f} s | {form} |"
            if "refused" in told:
                lines.append(f"{start} | refused | | | |")
                continue
            size = f"{told['bytes'] / 1e6:.1f} MB | {told['bytes'] / model['checkpoint_bytes']:.2f}"
            lines.append(
                f"{start} {told['detections'] or 'none'} | {differences(told)} | {size} "
                f"| {ratio(model['seconds'], form)} |"
            )
    where = data["machine"]
    lines += [
        "",
        "Largest differences are those of boxes, in pixels, and of all other outputs (scores, tasks), over the images",
        "of the measurement and three drawn ones of other sizes; class indices and labels were the same everywhere.",
        "R50 models have random weights, scaled to an image, and a score threshold that leaves 800 boxes to suppress;",
        "FBNet-C4 is trained, its tasks are not. Refused: tasks cannot be scripted, and the RPN head of FBNet-C4",
        "has no types that TorchScript could compile.",
        "",
        f"Time: medians of {data['rounds']} rounds, in brackets the quartiles. Eager and its forms take an image in",
        "each round, in turn, in one process with one thread; ratios are of processor time. Other work ran on the",
        "machine at the same time: a difference smaller than the brackets is noise.",
        f"{where['cpu']}, torch {where['torch']}, onnxruntime {where['onnxruntime']}, {where['date']}.",
    ]
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    main()
