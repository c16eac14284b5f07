"""LazyConfigs on disk: the tiny Mask R-CNN of ``lazy_tiny.py`` on a tiny COCO dataset."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from .datasets import write_coco
from .models import tiny_cfg

TINY = Path(__file__).with_name("lazy_tiny.py")
START = f"""
from detectron2.config import LazyCall as L, LazyConfig
model, dataloader, optimizer, lr_multiplier, train = LazyConfig.load(
    {str(TINY)!r}, ("model", "dataloader", "optimizer", "lr_multiplier", "train")
)
"""
DATA = """
head_adapt = dict(register=[dict(name="lazy_data", json="data.json", images="data")])
dataloader.train.dataset.names = dataloader.test.dataset.names = "lazy_data"
"""


def write_lazy(folder: Path, classes: Sequence[str] = ("cat", "dog", "emu"), body: str = "", **data: Any) -> Path:
    """A config beside a dataset of these classes; ``body`` is python after everything else.

    Args:
        folder: of the config; its run goes to ``out`` inside.
        classes: of the dataset.
        body: more of the config.
        data: see :func:`write_coco`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_coco(folder, classes, **data)
    return write_config(folder, f"{DATA}{body}")


def write_config(folder: Path, body: str, name: str = "config.py") -> Path:
    """A config of the tiny model alone, and ``body``."""
    path = folder / name
    path.write_text(f"{START}train.output_dir = {str(folder / 'out')!r}\n{body}\n")
    return path


def write_yaml(folder: Path, **keys: Any) -> Path:
    """The yaml that :func:`write_lazy` amounts to, with keys under ``MODEL.HEAD_ADAPT``."""
    config = yaml.safe_load(tiny_cfg(ours=False).dump())
    config["DATASETS"].update(
        TRAIN=["lazy_data"],
        TEST=["lazy_data"],
        REGISTER=[{"name": "lazy_data", "json": "data.json", "images": "data"}],
    )
    config["MODEL"]["HEAD_ADAPT"] = keys
    config["SEED"] = 1
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return path
