"""Tiny detectors with a classifier of text embeddings, and their files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from torch import nn

from helpers.models import build_seeded, tiny_cfg

ALL = ["cat", "dog", "bus", "zebra", "cup"]


OLD = ["cat", "dog", "bus"]


WIDTH = 40


def rows_of(classes: list[str], seed: int = 0) -> torch.Tensor:
    every = torch.randn(len(ALL), WIDTH, generator=torch.Generator().manual_seed(seed))
    return every[[ALL.index(name) for name in classes]]


def text_cfg(path: Path, classes: list[str], kind: str = "standard", *, agnostic: bool = False, **text: Any) -> CfgNode:
    """A detector of ``classes`` whose file has all five; ``seed`` chooses the file's values."""
    seed = text.pop("seed", 0)
    np.save(path / f"clip{seed}.npy", rows_of(ALL, seed).numpy())
    cfg = tiny_cfg(kind, masks=False)
    if kind != "cascade":
        cfg.MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG = agnostic
    node = cfg.MODEL.HEAD_ADAPT
    node.PREDICTOR = "HeadAdaptTextOutputLayers"
    node.TARGET_CLASSES = list(classes)
    node.TEXT.FILE, node.TEXT.NAMES = str(path / f"clip{seed}.npy"), list(ALL)
    for key, value in text.items():
        node.TEXT[key] = value
    return cfg


def text_model(path: Path, classes: list[str], *, model_seed: int = 0, **kinds: Any) -> nn.Module:
    return build_seeded(text_cfg(path, classes, **kinds), model_seed)
