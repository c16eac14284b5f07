"""``d2-headadapt predict``: names come from the checkpoint, no dataset need be there."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from detectron2.modeling import build_model
from helpers.commands import cli
from helpers.datasets import write_coco
from helpers.export import saved_classifier
from helpers.models import tiny_cfg
from PIL import Image

from d2_headadapt import ClassTable
from d2_headadapt.checkpoint.checkpointer import HeadAdaptCheckpointer
from d2_headadapt.config.settings import AdaptSettings, attach_settings
from d2_headadapt.engine.predict import Predictor
from d2_headadapt.setup.yaml import load_config

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
    found = json.loads((place / "seen" / "predictions.json").read_text())["images"]
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
    found = json.loads((place / "seen" / "predictions.json").read_text())["images"]
    assert "error" in found[0] and found[1]["detections"]


def test_random_rows_are_not_predicted_with(place: Path) -> None:
    config = yaml.safe_load((place / "c.yaml").read_text())
    config["MODEL"]["HEAD_ADAPT"]["TARGET_CLASSES"] = ["yak", "okapi"]
    (place / "c.yaml").write_text(yaml.safe_dump(config))
    ran = predict(place)
    assert ran.code == 1 and "okapi" in ran.err and not (place / "seen").exists()
    # The user typed no --eval-only.
    assert f"error: {place / 'trained.pth'}: " in ran.err and "--eval-only" not in ran.err


def test_random_parameters_are_not_predicted_with(place: Path) -> None:
    """Every class is carried; the boxes would still come from an RPN that nobody trained."""
    last = ("--least-score", "0")  # what stands behind --images is an image
    ran = predict(place, *last, "MODEL.RPN.CONV_DIMS", "[4]")
    assert ran.code == 1 and "none of its shape for proposal_generator.rpn_head.conv" in ran.err
    assert not (place / "seen").exists()
    ran = predict(place, *last, "MODEL.RPN.CONV_DIMS", "[4]", "MODEL.HEAD_ADAPT.ALLOW_NEW_ROWS_AT_EVAL", "True")
    assert ran.code == 0, ran.err


@pytest.mark.parametrize("name", ["file", "file/below"])
def test_an_output_that_can_be_no_folder_is_a_message(name: str, place: Path) -> None:
    (place / "file").write_text("mine")
    ran = predict(place, "--output", place / name)
    assert ran.code == 1 and f"error: {place / name}: expected a folder" in ran.err
    assert (place / "file").read_text() == "mine"


def test_where_no_image_can_be_used_nothing_is_written(place: Path) -> None:
    broken = sorted((place / "data").iterdir())[:2]
    for path in broken:
        path.write_bytes(b"no image")
    ran = predict(place, images=broken)
    assert ran.code == 1 and "found none of 2; of the first: cannot identify" in ran.err
    assert not (place / "seen").exists()


def test_an_image_that_the_model_fails_on_is_passed_over(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("RGB", (1, 1)).save(place / "one.png")
    call = Predictor.__call__

    def failing(self: Predictor, image: Any) -> Any:
        if image.shape[0] == 1:
            raise RuntimeError("output size is too small")
        return call(self, image)

    monkeypatch.setattr(Predictor, "__call__", failing)
    images = [place / "one.png", sorted((place / "data").iterdir())[0]]
    ran = predict(place, images=images)
    assert ran.code == 0 and f"{images[0]}: the model fails on it (RuntimeError: output size is too small)" in ran.out
    found = json.loads((place / "seen" / "predictions.json").read_text())["images"]
    assert found[0]["error"] == "RuntimeError: output size is too small" and "detections" in found[1]


@pytest.mark.parametrize("score", ["2", "-0.1", "nan", "x"])
def test_a_score_that_is_none_is_a_wrong_command_line(score: str, place: Path) -> None:
    ran = predict(place, "--least-score", score)
    assert ran.code == 2 and "--least-score" in ran.err and ran.out == ""


@pytest.mark.parametrize("words", [["INPUT.FORMAT", "RGB"], ["model.x=3"]])
def test_overrides_that_images_swallow_are_told_apart(words: list[str], place: Path) -> None:
    first = sorted((place / "data").iterdir())[0]
    ran = predict(place, images=[first, *words])
    assert ran.code == 1 and f"error: {words[0]}: " in ran.err and "last, behind --output" in ran.err
    assert "Correct the path" in predict(place, images=[first, "none.png"]).err


def test_a_size_below_nothing_is_a_message(place: Path) -> None:
    ran = predict(place, "--least-score", "0", "INPUT.MIN_SIZE_TEST", "-3")
    assert ran.code == 1 and "error: INPUT.MIN_SIZE_TEST: expected the pixels" in ran.err and "found -3" in ran.err


def test_what_is_said_of_an_image_with_tasks_is_words(tmp_path: Path) -> None:
    config, weights = saved_classifier(tmp_path)
    Image.new("RGB", (40, 40)).save(tmp_path / "x.png")
    files = ["--config-file", config, "--weights", weights, "--output", tmp_path / "seen"]
    ran = cli("predict", *files, "--images", tmp_path / "x.png")
    assert ran.code == 0, ran.err
    assert re.search(r"x\.png: colour: (red|green) \d+%$", ran.out, re.MULTILINE)


def test_a_model_without_boxes_and_tasks_is_refused(tmp_path: Path) -> None:
    """Its picture would be the photograph, and its line "nothing"."""
    cfg = tiny_cfg(masks=False)
    cfg.MODEL.META_ARCHITECTURE, cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES = "SemanticSegmentor", 4
    cfg.MODEL.SEM_SEG_HEAD.CONVS_DIM, cfg.MODEL.SEM_SEG_HEAD.NORM = 8, "BN"
    (tmp_path / "c.yaml").write_text(cfg.dump())
    HeadAdaptCheckpointer(build_model(cfg), str(tmp_path)).save("trained", iteration=9)
    Image.new("RGB", (40, 40)).save(tmp_path / "x.png")
    ran = predict(tmp_path, images=[tmp_path / "x.png"])
    assert ran.code == 1 and "SemanticSegmentor, which gives sem_seg" in ran.err
    assert not (tmp_path / "seen").exists()


def test_a_folder_without_images_is_a_message(place: Path) -> None:
    (place / "empty").mkdir()
    ran = predict(place, images=[place / "empty"])
    assert ran.code == 1 and "a folder of images, found a folder without" in ran.err
