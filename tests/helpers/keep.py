"""Tiny models with classes added behind their unmodified old path."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from detectron2.solver.build import get_default_optimizer_params
from torch import nn

from d2_headadapt import ClassTable, KeepSettings, PackSpec, attach_keep

from .commands import Ran, cli
from .datasets import write_coco
from .files import save_stock
from .fit import tiny_model
from .models import names, stock_model, tiny_cfg, training_losses

KINDS = ("standard", "cascade", "c4", "retinanet")
OLD = 5


def base_model(kind: str, *, masks: bool = False, **keys: Any) -> nn.Module:
    """A stock model of :data:`OLD` classes with random weights."""
    if kind == "retinanet":
        return tiny_model(kind, num_classes=OLD, **{"MODEL__RETINANET__SCORE_THRESH_TEST": 0.0, **keys})
    return tiny_model(kind, num_classes=OLD, masks=masks, **keys)


def keep_settings(
    packs: Sequence[Sequence[str]] = (("rhino", "gnu"),), labels: Sequence[str] = (), *, head: str = "shared",
    **keys: Any,
) -> KeepSettings:  # fmt: skip
    """Packs of these classes behind a base of :data:`OLD`."""
    specs = tuple(PackSpec(tuple(classes), head) for classes in packs)
    return KeepSettings(ClassTable(names(OLD)), specs, tuple(labels), **keys)


def extended(model: nn.Module, settings: KeepSettings | None = None) -> nn.Module:
    """The model with classes added, and second proposals on where it has proposals."""
    attach_keep(model, keep_settings() if settings is None else settings)
    for module in model.modules():
        if hasattr(module, "second") and module.second is not None:
            module.second.on.fill_(True)
    return model


def train_steps(model: nn.Module, inputs: list[Any], count: int = 3) -> None:
    """Some steps of detectron2's own optimizer, with momentum and weight decay."""
    optimizer = torch.optim.SGD(get_default_optimizer_params(model, base_lr=1e-4), 1e-4, momentum=0.9, weight_decay=0.1)
    for step in range(count):
        loss = sum(training_losses(model, inputs, seed=step).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def differs(before: list[dict[str, torch.Tensor]], after: list[dict[str, torch.Tensor]]) -> list[str]:
    """Which fields of which image's old detections are not the same bits; new ones stand behind them."""
    found = []
    for i, (old, both) in enumerate(zip(before, after, strict=True)):
        count = len(old["scores"])
        found += [f"image {i}: {name}" for name in old if not torch.equal(old[name], both[name][:count])]
    return found


class KeepPlace:
    """A folder with a base of five classes, a json that lists two new ones alone, and a yaml that keeps the base.

    Args:
        folder: an empty one.
        classes: of the training json.
        prefix: of its datasets' names.
    """

    def __init__(self, folder: Path, classes: Sequence[str] = ("rhino", "gnu"), prefix: str = "d2ha_keep") -> None:
        self.folder = folder
        folder.mkdir(exist_ok=True)
        self.base = save_stock(stock_model(OLD, seed=21), folder / "base.pth")
        for name, entries in (("train", classes), ("old_test", names(OLD)[::-1]), ("both_test", ["gnu", *names(OLD)])):
            write_coco(folder, entries, name=name)
        config = yaml.safe_load(tiny_cfg(masks=False).dump())
        sets = ("train", "old_test", "both_test")
        tests = [f"{prefix}_{name}" for name in sets]
        config["DATASETS"].update(
            TRAIN=tests[:1],
            TEST=[],
            REGISTER=[
                {"name": full, "json": f"{name}.json", "images": name} for full, name in zip(tests, sets, strict=True)
            ],
        )
        config["INPUT"].update(MIN_SIZE_TRAIN=[64], MIN_SIZE_TEST=64, MAX_SIZE_TRAIN=64, MAX_SIZE_TEST=64)
        config["DATALOADER"].update(NUM_WORKERS=0)
        config["SOLVER"].update(IMS_PER_BATCH=2, BASE_LR=1e-4, MAX_ITER=2, STEPS=[], WARMUP_ITERS=0)
        config["MODEL"]["HEAD_ADAPT"].update(SOURCE_CLASSES=names(OLD), KEEP="exact")
        config["MODEL"]["DEVICE"] = "cpu"
        config["OUTPUT_DIR"] = str(folder / "out")
        self.config = folder / "mine.yaml"
        self.config.write_text(yaml.safe_dump(config))

    def run(self, command: str, *flags: Any, opts: Sequence[Any] = ()) -> Ran:
        """A command with the yaml."""
        return cli(command, "--config-file", self.config, *flags, *opts)

    def extended(self, name: str = "more.pth", weights: Path | None = None, opts: Sequence[Any] = ()) -> Path:
        """What ``extend`` writes."""
        path = self.folder / name
        ran = self.run("extend", "--weights", weights or self.base, "--output", path, opts=opts)
        assert ran.code == 0, ran.err
        return path
