"""Models to export, with files that know their classes, and images for them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from detectron2.config import CfgNode
from torch import nn

from d2_headadapt import ClassTable, HeadAdaptCheckpointer
from d2_headadapt.config.settings import AdaptSettings, attach_settings
from d2_headadapt.setup.yaml import load_config

from .classifier import classifier_cfg
from .models import build_seeded, tiny_cfg


def image(seed: int, height: int = 96, width: int = 96) -> torch.Tensor:
    """Noise (3, height, width); even and odd seeds are of different brightness."""
    noise = torch.rand(3, height, width, generator=torch.Generator().manual_seed(seed))
    return noise * (255 if seed % 2 else 120)


def with_threshold(model: nn.Module, images: Sequence[torch.Tensor]) -> nn.Module:
    """Leave about half of all detections, so that images differ in their number."""
    with torch.no_grad():
        found = model.eval()([{"image": each} for each in images])
    last = model.roi_heads.box_predictor
    last = last[-1] if isinstance(last, nn.ModuleList) else last
    scores = torch.cat([each["instances"].scores for each in found]).sort().values
    # Between two scores, so that no rounding decides.
    last.test_score_thresh = float(scores[len(scores) // 2 - 1 : len(scores) // 2 + 1].mean())
    return model


def counting(model: Callable[[torch.Tensor], Mapping[str, torch.Tensor]], images: Sequence[torch.Tensor]) -> set[int]:
    """The numbers of detections that images have."""
    return {len(model(each)["scores"]) for each in images}


def keypoint_model(*, ours: bool = True) -> nn.Module:
    """A tiny Keypoint R-CNN."""
    cfg = tiny_cfg(masks=False, ours=ours)
    cfg.MODEL.KEYPOINT_ON = True
    cfg.MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS = (8,)
    cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS = 4
    model = build_seeded(cfg)
    with torch.no_grad():
        # The maps of an untrained network are so wide that their softmax is no number.
        model.roi_heads.keypoint_head.score_lowres.weight.mul_(1e-3)
    return model


NAMES = ["yak", "zebra", "gnu"]
COLOURS = ["red", "green"]


def saved_detector(folder: Path, *, threshold: float = 0.0) -> tuple[Path, Path]:
    """A yaml without datasets, and the file of a detector with a task that knows its classes."""
    cfg = tiny_cfg(masks=False, num_classes=len(NAMES))
    cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST = 64, 96
    cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = threshold
    return _saved(folder, cfg, {"thing": NAMES, "colour": COLOURS}, on="box")


def saved_classifier(folder: Path, **keys: Any) -> tuple[Path, Path]:
    """The same of a classifier of images; ``keys`` are those of :func:`classifier_cfg`."""
    cfg = classifier_cfg({}, **keys)
    cfg.INPUT.MIN_SIZE_TEST = 32
    return _saved(folder, cfg, {"colour": COLOURS}, on="image")


def _saved(folder: Path, cfg: CfgNode, tables: dict[str, list[str]], *, on: str) -> tuple[Path, Path]:
    plain = yaml.safe_load(cfg.dump())
    plain["MODEL"]["TASKS"] = {"colour": {"on": on, "classes": COLOURS}}
    config = folder / "c.yaml"
    config.write_text(yaml.safe_dump(plain))
    model = build_seeded(load_config(str(config)), 3)
    attach_settings(model, AdaptSettings({space: ClassTable(rows, origin="test") for space, rows in tables.items()}))
    HeadAdaptCheckpointer(model, str(folder)).save("trained", iteration=9)
    # Which classes the task has, the file says.
    plain["MODEL"]["TASKS"]["colour"]["classes"] = None
    config.write_text(yaml.safe_dump(plain))
    return config, folder / "trained.pth"
