"""``d2-headadapt predict``: names come from the checkpoint, no dataset need be there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from detectron2.modeling import build_model
from helpers.commands import cli
from helpers.datasets import write_coco
from helpers.models import tiny_cfg
from PIL import Image

from d2_headadapt import ClassTable
from d2_headadapt.checkpoint import HeadAdaptCheckpointer
from d2_headadapt.configuring import load_config
from d2_headadapt.settings import AdaptSettings, attach_settings

NAMES = ["yak", "zebra", "gnu"]
TASK = {"colour": {"on": "box", "classes": None}}


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A yaml without datasets, a trained file that knows its classes and its task, and images."""
    config = yaml.safe_load(tiny_cfg(masks=False, num_classes=3).dump())
    config["INPUT"].update(MIN_SIZE_TEST=64, MAX_SIZE_TEST=64)
    config["MODEL"]["TASKS"] = {"colour": {"on": "box", "classes": ["red", "green"]}}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
    cfg = load_config(str(tmp_path / "c.yaml"))
    torch.manual_seed(3)
    model = build_model(cfg)
    tables = {"thing": NAMES, "colour": ["red", "green"]}
    attach_settings(model, AdaptSettings({space: ClassTable(names, origin="test") for space, names in tables.items()}))
    HeadAdaptCheckpointer(model, str(tmp_path)).save("trained", iteration=9)
    config["MODEL"]["TASKS"] = TASK
    config["DATASETS"].update(TRAIN=["never_registered"], TEST=["neither"])
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
    write_coco(tmp_path, NAMES)
    return tmp_path


def predict(place: Path, *more: Any, images: Any = ()) -> Any:
    images = images or sorted((place / "data").iterdir())[:2]
    files = ["--config-file", place / "c.yaml", "--weights", place / "trained.pth", "--output", place / "seen"]
    return cli("predict", *files, "--least-score", "0", "--images", *images, *more)


def test_names_and_tasks_come_from_the_checkpoint(place: Path) -> None:
    ran = predict(place)
    assert ran.code == 0, ran.err
    found = json.loads((place / "seen" / "predictions.json").read_text())
    assert len(found) == 2 and any(entry["detections"] for entry in found)
    for entry in found:
        with Image.open(place / "seen" / entry["picture"]) as picture, Image.open(entry["file"]) as image:
            assert picture.size == image.size == (entry["width"], entry["height"])
        for detection in entry["detections"]:
            assert detection["class"] in NAMES and detection["tasks"]["colour"]["label"] in ("red", "green")
            x0, y0, x1, y1 = detection["box"]
            assert 0 <= x0 <= x1 <= entry["width"] and 0 <= y0 <= y1 <= entry["height"]
    assert "yak" in ran.out or "zebra" in ran.out or "gnu" in ran.out


def test_an_image_that_cannot_be_read_is_passed_over(place: Path) -> None:
    first = sorted((place / "data").iterdir())[0]
    first.write_bytes(b"no image")
    ran = predict(place)
    assert ran.code == 0 and "cannot be read" in ran.out
    found = json.loads((place / "seen" / "predictions.json").read_text())
    assert "error" in found[0] and found[1]["detections"]


def test_random_rows_are_not_predicted_with(place: Path) -> None:
    config = yaml.safe_load((place / "c.yaml").read_text())
    config["MODEL"]["HEAD_ADAPT"]["TARGET_CLASSES"] = ["yak", "okapi"]
    (place / "c.yaml").write_text(yaml.safe_dump(config))
    ran = predict(place)
    assert ran.code == 1 and "okapi" in ran.err and not (place / "seen").exists()


def test_a_folder_without_images_is_a_message(place: Path) -> None:
    (place / "empty").mkdir()
    ran = predict(place, images=[place / "empty"])
    assert ran.code == 1 and "a folder of images, found a folder without" in ran.err
