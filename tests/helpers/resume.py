"""Runs of a tiny detector that are resumed with another class list."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from detectron2.config import CfgNode
from detectron2.utils.env import seed_all_rng

from d2_headadapt.engine.train import Trainer
from d2_headadapt.setup.yaml import resolve_config
from helpers.datasets import write_coco
from helpers.models import tiny_cfg

OLD = ["cat", "dog", "cow", "pig"]


NEW = ["pig", "owl", "cat"]


CLS = "roi_heads.box_predictor.cls_score.weight"


def cfg_for(tmp_path: Path, classes: list[str], max_iter: int, optimizer: str = "SGD", **keys: Any) -> CfgNode:
    name = "_".join(classes)
    cfg = tiny_cfg(masks=False)
    json_file = write_coco(tmp_path, classes, name=name, images=4)
    cfg.DATASETS.REGISTER = [{"name": name, "json": str(json_file), "images": str(tmp_path / name)}]
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = (name,), ()
    cfg.DATALOADER.NUM_WORKERS = 0
    cfg.INPUT.MIN_SIZE_TRAIN = (64,)
    cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.MAX_ITER, cfg.SOLVER.STEPS = 2, max_iter, ()
    cfg.SOLVER.BASE_LR, cfg.SOLVER.WARMUP_ITERS = 1e-4, 5
    cfg.SOLVER.CHECKPOINT_PERIOD = 1000
    cfg.OUTPUT_DIR, cfg.SEED = str(tmp_path / "out"), 3
    for key, value in keys.items():
        cfg.MODEL.HEAD_ADAPT[key] = value
    resolve_config(cfg)
    return cfg


def train(kind: type[Trainer], cfg: CfgNode, resume: bool) -> Trainer:
    seed_all_rng(11)  # Some networks that chance draws diverge within twenty steps.
    trainer = kind(cfg)
    trainer.resume_or_load(resume=resume)
    trainer.train()
    return trainer


@pytest.fixture(autouse=True)
def writers_are_closed() -> Iterator[None]:
    """A trainer that is not run to its end leaves metrics.json open, and a trainer is a cycle that only gc finds."""
    yield
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()
