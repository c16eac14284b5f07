"""``extend``, ``pack``, ``add`` and ``remove``: classes behind an unmodified model, and files of them."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode
from detectron2.data import build_detection_test_loader
from detectron2.evaluation import inference_on_dataset
from detectron2.utils.env import seed_all_rng
from detectron2.utils.logger import setup_logger
from torch import nn

from ..adapt.classes import shorten
from ..checkpoint.checkpointer import HeadAdaptCheckpointer
from ..checkpoint.load import check_exists
from ..checkpoint.packs import added, pack_of, read_base, removed
from ..checkpoint.provenance import KEY
from ..config.keep import KeepSettings
from ..data.negatives import negative_images
from ..errors import DatasetError, PlanRefused, UsageError
from ..evaluation.build import build_evaluator
from ..evaluation.keep import keep_table
from ..files import existing_output, write_checkpoint
from ..fit import FitSettings, fit_lines, fit_new_rows
from ..key import MODEL
from ..modeling.keep import keep_of
from ..setup.recipe import Recipe, no_training_set, read_recipe

PACK_ENDINGS = (".pack",)


def extend(args: argparse.Namespace) -> int:
    """Add the training set's new classes behind an unmodified model, solved in closed form, and write the file."""
    setup_logger(name="d2_headadapt")
    started = time.perf_counter()

    def change(cfg: CfgNode) -> None:
        cfg.MODEL.HEAD_ADAPT.KEEP = cfg.MODEL.HEAD_ADAPT.KEEP or "exact"
        cfg.MODEL.WEIGHTS = args.weights or cfg.MODEL.WEIGHTS
        if not cfg.MODEL.WEIGHTS:
            raise UsageError(
                "--weights",
                expected="the base model",
                found=f"none, and {MODEL.WEIGHTS} is empty",
                fix="Add --weights FILE.",
            )
        if not cfg.DATASETS.TRAIN:
            raise no_training_set()
        check_exists(cfg.MODEL.WEIGHTS)
        existing_output(args.output, force=args.force, inputs=[cfg.MODEL.WEIGHTS.partition("?")[0]])

    recipe = read_recipe(args.config_file, args.opts, args.imports, reads_labels=True, change=change)
    cfg = recipe.config
    seed_all_rng(max(cfg.SEED, 0))
    model = recipe.build()
    checkpointer = HeadAdaptCheckpointer(model)
    checkpointer.load(cfg.MODEL.WEIGHTS, checkpointables=[])
    new, tables = checkpointer.rows_to_fit(), dict(checkpointer.settings.target)
    with checkpointer.fitted_rows():
        report = fit_new_rows(
            model, recipe.training_dicts(), recipe.mapper_at_test_size(), new=new, settings=FitSettings.from_config(cfg)
        )
    print(fit_lines(report, tables))
    seconds = time.perf_counter() - started
    state = {name: value.cpu() for name, value in model.state_dict().items()}
    facts = checkpointer.provenance().to_plain()
    count = check_same_detections(recipe, model, _some_images(recipe, args.images))
    print(f"old detections identical on {count} images, checked against the base model")
    results = {name: _evaluated(cfg, model, name) for name in cfg.DATASETS.TEST}
    if results:
        print(keep_table(results))
    write_checkpoint(args.output, {"model": state, KEY: facts})
    print(f"wrote {args.output}: {_added_line(cfg)} in {seconds:.0f} s")
    return 0


def _added_line(cfg: CfgNode) -> str:
    settings: Any = KeepSettings.from_config(cfg)
    names = [name for i in settings.trained for name in settings.packs[i].classes]
    return f"{shorten(names)} beside {len(settings.table) - len(names)} classes"


def _some_images(recipe: Recipe, most: int) -> list[dict[str, Any]]:
    """List images to compare on: of the training set, and of the negatives, as many of each."""
    dicts, beside = recipe.training_dicts(), negative_images(str(recipe.config.MODEL.HEAD_ADAPT.KEEP_NEGATIVES))
    half = most // 2 if beside else most
    chosen = [*beside[: most - half], *dicts[: max(half, most - len(beside))]]
    found = map(recipe.mapper_at_test_size(), map(dict, chosen))
    return [{**one, "height": one["image"].shape[1], "width": one["image"].shape[2]} for one in found]


@torch.no_grad()
def check_same_detections(recipe: Recipe, model: nn.Module, images: Sequence[dict[str, Any]]) -> int:
    """Compare old detections, bit for bit, with those of stock detectron2's model of the base's own file.

    Args:
        recipe: of the model; builds the base.
        model: with added classes.
        images: each as a model takes it.

    Returns:
        How many images were compared.

    Raises:
        PlanRefused: names the first image and field that differ.
    """
    keep: Any = keep_of(model)
    asked = keep.settings
    # With "suppress" too: an old detection that is hidden afterwards is still the base's.
    keep.settings = replace(asked, detections="append")
    try:
        return _compared(recipe, model, images)
    finally:
        keep.settings = asked


def _compared(recipe: Recipe, model: nn.Module, images: Sequence[dict[str, Any]]) -> int:
    base = recipe.build_base()
    own = {name: value for name, value in model.state_dict().items() if name in base.state_dict()}
    base.load_state_dict(own)
    _load_stock(base, recipe.config.MODEL.WEIGHTS)
    base.eval()
    model.eval()
    for i, image in enumerate(images):
        old, both = (one([image])[0]["instances"].get_fields() for one in (base, model))
        for name, value in old.items():
            mine, whole = (getattr(found, "tensor", found) for found in (value, both[name]))
            if not torch.equal(mine, whole[: len(mine)]):
                raise PlanRefused(
                    f"image {i}, {name}",
                    expected="the base model's detections, bit for bit",
                    found="others",
                    fix=f"Nothing was written. Set {MODEL.DEVICE.set('cpu')}, where results do not depend on chance.",
                )
    return len(images)


def _load_stock(base: nn.Module, path: str) -> None:
    """Load the base's own file; where stock cannot read it, the tensors that were loaded from it stay."""
    if path.endswith((".pth", ".pkl")) or "://" in path:
        DetectionCheckpointer(base).load(path)


def _evaluated(cfg: CfgNode, model: nn.Module, name: str) -> Any:
    return inference_on_dataset(model, build_detection_test_loader(cfg, name), build_evaluator(cfg, name))


def pack(args: argparse.Namespace) -> int:
    """Write the classes that a session added as a file of their own."""
    _check(args, [args.checkpoint], PACK_ENDINGS)
    content = pack_of(read_base(args.checkpoint), args.name)
    write_checkpoint(args.output, content)
    size = sum(value.numel() * value.element_size() for value in content["model"].values())
    print(f"wrote {args.output}: {shorten(content[KEY]['extra']['pack']['classes'])} ({size / 2**20:.2f} MiB)")
    return 0


def add(args: argparse.Namespace) -> int:
    """Write a checkpoint with packs behind it."""
    _check(args, [args.checkpoint, *args.packs])
    content = added(read_base(args.checkpoint), args.packs)
    write_checkpoint(args.output, content)
    names = [name for one in content[KEY]["extra"]["keep"]["packs"] for name in one["classes"]]
    print(f"wrote {args.output}: {shorten(names)} behind {len(content[KEY]['tables']['thing'])} classes")
    return 0


def remove(args: argparse.Namespace) -> int:
    """Write a checkpoint without one of its packs."""
    _check(args, [args.checkpoint])
    content, gone = removed(read_base(args.checkpoint), args.name)
    write_checkpoint(args.output, content)
    print(f"wrote {args.output}: without {shorten(gone.classes)}")
    return 0


def _check(args: argparse.Namespace, inputs: Sequence[str], endings: Sequence[str] | None = None) -> None:
    for path in inputs:
        check_exists(path)
        if "://" in path:
            raise DatasetError(
                path, expected="a local file", found="an address", fix="Download it first, and give its path."
            )
    more = {} if endings is None else {"endings": endings}
    existing_output(args.output, force=args.force, inputs=inputs, **more)
