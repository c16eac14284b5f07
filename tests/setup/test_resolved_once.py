"""Class tables are settled once, in ``setup``: from then on everybody reads lists, and a config describes itself."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from helpers.datasets import write_coco
from helpers.models import tiny_cfg

from d2_headadapt.config.settings import AdaptSettings
from d2_headadapt.data import categories
from d2_headadapt.data.task_spec import task_specs
from d2_headadapt.engine.train import Trainer
from d2_headadapt.setup.yaml import load_config, resolve_config


def settled(tmp_path: Path, **tasks: Any) -> Any:
    cfg = tiny_cfg(masks=False)
    json_file = write_coco(tmp_path, ["cat", "gnu"], name="mine", images=2)
    cfg.DATASETS.REGISTER = [{"name": "mine", "json": str(json_file), "images": str(tmp_path / "mine")}]
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("mine",), ("mine",)
    cfg.OUTPUT_DIR = str(tmp_path / "out")
    for name, node in tasks.items():
        cfg.MODEL.TASKS[name] = CfgNode(node)
    resolve_config(cfg)
    return cfg


def test_settling_writes_plain_lists(tmp_path: Path) -> None:
    cfg = settled(tmp_path)
    assert cfg.MODEL.HEAD_ADAPT.TARGET_CLASSES == ["cat", "gnu"]
    assert cfg.MODEL.ROI_HEADS.NUM_CLASSES == 2


def test_a_json_is_read_once_for_a_whole_set_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parsed: list[str] = []
    parse = categories._parse
    monkeypatch.setattr(categories, "_parse", lambda file, local: parsed.append(file) or parse(file, local))
    cfg = settled(tmp_path)
    model = Trainer.build_model(cfg)
    assert model.roi_heads.num_classes == 2
    assert AdaptSettings.from_config(cfg).target["thing"].names == ("cat", "gnu")
    assert len(parsed) == 1


def test_a_json_that_changed_is_read_again(tmp_path: Path) -> None:
    first = write_coco(tmp_path, ["cat", "gnu"], name="mine", images=1)
    assert [c["name"] for c in categories.read_categories(str(first))] == ["cat", "gnu"]
    second = write_coco(tmp_path, ["cat", "gnu", "yak"], name="mine", images=1)
    assert first == second
    assert [c["name"] for c in categories.read_categories(str(second))] == ["cat", "gnu", "yak"]


def test_what_a_caller_does_to_its_categories_stays_with_it(tmp_path: Path) -> None:
    file = str(write_coco(tmp_path, ["cat"], name="mine", images=1))
    categories.read_categories(file)[0]["name"] = "spoilt"
    assert categories.read_categories(file)[0]["name"] == "cat"


def test_a_dumped_config_tells_its_classes_where_no_dataset_is_left(tmp_path: Path) -> None:
    cfg = settled(tmp_path)
    dumped = tmp_path / "config.yaml"
    dumped.write_text(cfg.dump(), encoding="utf-8")
    DatasetCatalog.remove("mine")
    MetadataCatalog.remove("mine")
    (tmp_path / "mine.json").unlink(missing_ok=True)
    again = load_config(str(dumped))
    assert AdaptSettings.from_config(again).target["thing"].names == ("cat", "gnu")
    assert argparse.Namespace(**again.MODEL.HEAD_ADAPT).TARGET_CLASSES == ["cat", "gnu"]


def test_tasks_are_written_too(tmp_path: Path) -> None:
    cfg = settled(tmp_path, colour={"on": "box", "classes": ["red", "blue"]})
    assert cfg.MODEL.TASKS.colour.classes == ["red", "blue"]
    assert [spec.table.names for spec in task_specs(cfg)] == [("red", "blue")]
