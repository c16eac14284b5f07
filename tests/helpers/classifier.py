"""Tiny classifiers of images of one colour each, and their datasets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from detectron2.config import CfgNode, get_cfg
from torch import nn

from d2_headadapt import add_headadapt_config

from .models import build_seeded

TASKS: dict[str, dict[str, Any]] = {
    "colour": {"classes": ["red", "green", "blue"]},
    "light": {"classes": ["dark", "bright"], "hidden": 6},
    "tags": {"classes": ["warm", "cold", "grey", "loud"], "kind": "multi"},
}
COLOURS = torch.tensor([[220.0, 40, 40], [40, 220, 40], [40, 40, 220]])


def classifier_cfg(tasks: Mapping[str, Mapping[str, Any]] | None = None, **keys: Any) -> CfgNode:
    """A MultiTaskClassifier on a small plain network, on the CPU.

    Args:
        tasks: of ``MODEL.TASKS``, on images.
        keys: under ``MODEL.CLASSIFIER``.
    """
    cfg = get_cfg()
    add_headadapt_config(cfg)
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.WEIGHTS = ""
    cfg.MODEL.META_ARCHITECTURE = "MultiTaskClassifier"
    cfg.MODEL.BACKBONE.NAME = "build_conv_net_backbone"
    cfg.MODEL.CONV_NET.CHANNELS = [4, 6, 8]
    cfg.MODEL.CLASSIFIER.INPUT_SIZE = [32, 32]
    for key, value in keys.items():
        cfg.MODEL.CLASSIFIER[key] = value
    for name, values in (TASKS if tasks is None else tasks).items():
        cfg.MODEL.TASKS[name] = CfgNode({"on": "image", **values})
    return cfg


def classifier(tasks: Mapping[str, Mapping[str, Any]] | None = None, *, seed: int = 0, **keys: Any) -> nn.Module:
    """The model of :func:`classifier_cfg`."""
    return build_seeded(classifier_cfg(tasks, **keys), seed)


def picture(entry: Mapping[str, Any], side: int = 32) -> dict[str, Any]:
    """What a mapper gives for an entry of :func:`pictures`: an image of its colour, dark or bright, and its labels."""
    generator = torch.Generator().manual_seed(int(entry["image_id"]))
    image = COLOURS[entry["shown"][0]] * (0.5 if entry["shown"][1] == 0 else 1.0)
    image = image[:, None, None] + 20 * torch.rand(3, side, side, generator=generator)
    labels = entry["tasks"]
    tags = torch.zeros(4) if labels.get("tags") is not None else torch.full((4,), -1.0)
    tags[list(labels.get("tags") or ())] = 1
    single = {name: torch.tensor(-1 if labels.get(name) is None else labels[name]) for name in ("colour", "light")}
    return {"image": image.clamp(0, 255).byte(), "height": side, "width": side, "tasks": {**single, "tags": tags}}


def pictures(count: int, colours: Sequence[int] = (0, 1, 2)) -> list[dict[str, Any]]:
    """A dataset of the tasks of ``TASKS``: warm and loud, cold, grey where dark."""
    out = []
    for i in range(count):
        colour, light = colours[i % len(colours)], (i // 3) % 2
        tags = [0, 3] if colour == 0 else [1]
        tags += [2] if light == 0 else []
        labels: dict[str, Any] = {"colour": colour, "light": light, "tags": sorted(tags)}
        out.append({"image_id": i, "shown": (colour, light), "tasks": labels})
    return out


def step_on(model: nn.Module, optimizer: torch.optim.Optimizer, batch: list[dict[str, Any]]) -> dict[str, float]:
    """One step of training; the losses before it."""
    losses = model.train()(batch)
    optimizer.zero_grad()
    sum(losses.values()).backward()
    optimizer.step()
    return {name: float(value.detach()) for name, value in losses.items()}
