"""Tiny detectors with tasks on boxes, and labelled batches for them."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.structures import Instances
from torch import nn

from .models import batch, build_seeded, names, tiny_cfg

TASKS: dict[str, dict[str, Any]] = {
    "parity": {"on": "box", "classes": ["even", "odd"]},
    "colour": {"on": "box", "classes": ["red", "green", "blue", "yellow"], "hidden": 6},
    "tags": {"on": "box", "classes": ["small", "dark", "cut"], "kind": "multi"},
}


def task_cfg(kind: str = "standard", tasks: Mapping[str, Mapping[str, Any]] = TASKS, *, masks: bool = False) -> CfgNode:
    """:func:`tiny_cfg` of five classes with tasks."""
    cfg = tiny_cfg(kind, masks=masks)
    cfg.MODEL.HEAD_ADAPT.TARGET_CLASSES = names(5)
    for name, task in tasks.items():
        cfg.MODEL.TASKS[name] = CfgNode(copy.deepcopy(dict(task)))
    return cfg


def task_model(
    kind: str = "standard", tasks: Mapping[str, Mapping[str, Any]] = TASKS, *, agnostic: bool | None = None
) -> nn.Module:
    """Its model, with wide class and task scores: no two regions score alike, and suppression has something to order.

    Args:
        kind, tasks: see :func:`task_cfg`.
        agnostic: one box regressor for all classes, or one for each; the kind's default.
    """
    cfg = task_cfg(kind, tasks)
    if agnostic is not None:
        cfg.MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG = agnostic
    model = build_seeded(cfg)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if ".tasks." in name or "cls_score.weight" in name:
                # The features of an untrained network are some hundreds wide, those of a hidden layer are not.
                scale = 1.0 if "colour.predictor" in name or value.dim() < 2 else 0.001
                value.copy_(scale * torch.randn(value.shape, generator=generator))
    return model


def labelled_batch(*, images: int = 3, missing: float = 0.3, seed: int = 3, masks: bool = False) -> list[Any]:
    """:func:`batch` with labels for :data:`TASKS`, of which a share is missing; the last image has no object."""
    inputs = batch(5, images=images, seed=seed, masks=masks)
    generator = torch.Generator().manual_seed(seed)
    for entry in inputs:
        label(entry["instances"], generator, missing)
    return inputs


def label(instances: Instances, generator: torch.Generator, missing: float) -> None:
    """Random labels of every task, in place."""
    count = len(instances)
    for name, task in TASKS.items():
        classes = len(task["classes"])
        if task.get("kind") == "multi":
            labels = torch.randint(0, 2, (count, classes), generator=generator).float()
        else:
            labels = torch.randint(0, classes, (count,), generator=generator)
        labels[torch.rand(labels.shape, generator=generator) < missing] = -1
        instances.set(f"gt_{name}", labels)
