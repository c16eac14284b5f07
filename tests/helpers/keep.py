"""Tiny models with classes added behind their unmodified old path."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from detectron2.solver.build import get_default_optimizer_params
from torch import nn

from d2_headadapt import ClassTable, KeepSettings, PackSpec, attach_keep

from .fit import tiny_model
from .models import names, training_losses

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
