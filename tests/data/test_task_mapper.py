"""What the mapper hands to the model: labels beside the objects that augmentation left."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog, DatasetMapper, MetadataCatalog
from detectron2.data import transforms as T
from detectron2.structures import BoxMode
from PIL import Image

from d2_headadapt.adapt.classes import ClassTable
from d2_headadapt.config.keys import add_headadapt_config
from d2_headadapt.data.datasets import register_datasets
from d2_headadapt.data.task_labels import MISSING
from d2_headadapt.data.task_mapper import TaskMapper, build_task_test_loader, build_task_train_loader, label_tensors
from d2_headadapt.data.task_spec import TaskSpec
from d2_headadapt.errors import DatasetError

COLOURS = ClassTable(["red", "green", "blue"])
PARITY = TaskSpec("parity", "box", ClassTable(["even", "odd"]))
MARKS = TaskSpec("marks", "box", COLOURS, kind="multi")
SCENE = TaskSpec("scene", "image", COLOURS)
TAGS = TaskSpec("tags", "image", COLOURS, kind="multi")
EVERY = (PARITY, MARKS, SCENE, TAGS)


def mapper(
    tasks: Sequence[TaskSpec] = EVERY, *, is_train: bool = True, augmentations: Sequence[Any] = ()
) -> TaskMapper:
    return TaskMapper(is_train, tasks=tasks, augmentations=list(augmentations), image_format="BGR")


@pytest.fixture
def picture(tmp_path: Path) -> dict[str, Any]:
    """40 x 40 pixels, five objects in a row: even, odd, a crowd, even, and one that nobody labelled."""
    Image.fromarray(np.zeros((40, 40, 3), np.uint8)).save(tmp_path / "a.png")
    tasks: list[dict[str, Any]] = [
        {"parity": 0, "marks": [0]},
        {"parity": 1, "marks": [0, 2]},
        {"parity": 0},
        {"parity": 0, "marks": []},
        {"parity": None},
    ]
    annotations = [
        {
            "bbox": [8.0 * i, 4.0, 8.0 * i + 6, 10.0],
            "bbox_mode": BoxMode.XYXY_ABS,
            "category_id": 7 - i,
            "iscrowd": int(i == 2),
            "tasks": labels,
        }
        for i, labels in enumerate(tasks)
    ]
    del annotations[4]["tasks"]
    return {
        "file_name": str(tmp_path / "a.png"),
        "height": 40,
        "width": 40,
        "image_id": 1,
        "annotations": annotations,
        "tasks": {"scene": 2},
    }


def test_objects_keep_their_labels_and_classes(picture: dict[str, Any]) -> None:
    instances = mapper()(picture)["instances"]
    assert instances.gt_classes.tolist() == [7, 6, 4, 3]
    assert instances.gt_classes.dtype == torch.int64
    assert instances.gt_parity.tolist() == [0, 1, 0, MISSING]
    assert instances.gt_parity.dtype == torch.int64
    assert instances.gt_marks.tolist() == [[1, 0, 0], [1, 0, 1], [0, 0, 0], [-1, -1, -1]]
    assert instances.gt_marks.dtype == torch.float32


def test_everything_else_is_stock_s(picture: dict[str, Any]) -> None:
    flip = [T.RandomFlip(1.0), T.Resize((80, 60))]
    ours = mapper(augmentations=flip)(picture)
    stock = DatasetMapper(is_train=True, augmentations=flip, image_format="BGR")(picture)
    assert set(ours) == set(stock)
    assert torch.equal(ours["image"], stock["image"])
    a, b = ours["instances"], stock["instances"]
    assert torch.equal(a.gt_boxes.tensor, b.gt_boxes.tensor)
    assert torch.equal(a.gt_classes, b.gt_classes)
    assert set(a.get_fields()) - set(b.get_fields()) == {"gt_parity", "gt_marks"}


def test_labels_follow_objects_through_a_crop(picture: dict[str, Any]) -> None:
    """The crop leaves objects 1 and 3, and cuts off the first and the last."""
    instances = mapper(augmentations=[T.CropTransform(8, 0, 24, 20)])(picture)["instances"]
    assert instances.gt_boxes.tensor[:, 0].tolist() == [0, 16]
    assert instances.gt_classes.tolist() == [6, 4]
    assert instances.gt_parity.tolist() == [1, 0]
    assert instances.gt_marks.tolist() == [[1, 0, 1], [0, 0, 0]]


def test_the_dataset_dict_stays_as_it_was(picture: dict[str, Any]) -> None:
    once = mapper()(picture)
    again = mapper()(picture)
    assert [a["category_id"] for a in picture["annotations"]] == [7, 6, 5, 4, 3]
    assert torch.equal(once["instances"].gt_classes, again["instances"].gt_classes)


@pytest.mark.parametrize("is_train", [True, False])
def test_every_task_on_images_is_there(picture: dict[str, Any], is_train: bool) -> None:
    tasks = mapper(is_train=is_train)(picture)["tasks"]
    assert set(tasks) == {"scene", "tags"}
    assert tasks["scene"].dtype == torch.int64
    assert tasks["scene"].shape == ()
    assert tasks["scene"] == 2
    assert torch.equal(tasks["tags"], torch.full((3,), -1.0))
    picture["tasks"] = {"tags": [0, 1], "scene": None}
    tasks = mapper(is_train=is_train)(picture)["tasks"]
    assert tasks["scene"] == MISSING
    assert torch.equal(tasks["tags"], torch.tensor([1.0, 1, 0]))


def test_an_image_without_objects_or_labels(picture: dict[str, Any]) -> None:
    picture["annotations"] = []
    del picture["tasks"]
    mapped = mapper()(picture)
    assert mapped["instances"].gt_parity.shape == (0,)
    assert mapped["instances"].gt_marks.shape == (0, 3)
    assert mapped["tasks"]["scene"] == MISSING


def test_no_annotations_are_no_instances(picture: dict[str, Any]) -> None:
    del picture["annotations"]
    assert "instances" not in mapper()(picture)


@pytest.mark.parametrize(
    ("spec", "label", "expected"),
    [
        (SCENE, 3, "an index below 3"),
        (SCENE, -1, "an index below 3"),
        (SCENE, [0], "an index below 3"),
        (SCENE, "red", "an index below 3"),
        (TAGS, [0, 3], "a list of indices below 3"),
    ],
)
def test_a_label_that_is_no_index_is_refused(
    picture: dict[str, Any], spec: TaskSpec, label: Any, expected: str
) -> None:
    picture["tasks"] = {spec.name: label}
    with pytest.raises(DatasetError, match=rf"^image .*a\.png: expected {expected}, the number of classes of task"):
        mapper()(picture)
    with pytest.raises(DatasetError, match=r"^here: "):
        label_tensors([None, label], spec, "here")


def config(train: str, **tasks: dict[str, Any]) -> CfgNode:
    cfg = get_cfg()
    add_headadapt_config(cfg)
    cfg.DATASETS.TRAIN = (train,)
    cfg.DATALOADER.NUM_WORKERS = 0
    cfg.SOLVER.IMS_PER_BATCH = 2
    cfg.INPUT.MIN_SIZE_TRAIN = (16,)
    cfg.INPUT.MIN_SIZE_TEST = 16
    for name, node in tasks.items():
        cfg.MODEL.TASKS[name] = CfgNode(node)
    return cfg


def test_loaders_of_a_csv(tmp_path: Path) -> None:
    """Sizes are in no csv; the training loader groups by them all the same."""
    names = ["red", "blue", "NA", "red", "blue", "red"]
    for i in range(6):
        Image.new("RGB", (20, 30) if i % 2 else (30, 20)).save(tmp_path / f"{i}.png")
    (tmp_path / "l.csv").write_text("id,colour\n" + "".join(f"{i},{name}\n" for i, name in enumerate(names)))
    entry = {"csv": str(tmp_path / "l.csv"), "images": str(tmp_path), "file": "{id}.png", "tasks": ["colour"]}
    register_datasets([{"name": "d2ha_train", **entry}, {"name": "d2ha_test", **entry}])
    cfg = config("d2ha_train", colour={"on": "image", "classes": ["red", "green", "blue"]})
    expected = {f"{i}.png": {"red": 0, "blue": 2, "NA": MISSING}[name] for i, name in enumerate(names)}
    seen: dict[str, int] = {}
    for batch in islice(build_task_train_loader(cfg), 12):
        assert len({one["image"].shape for one in batch}) == 1
        seen.update({one["image_id"]: int(one["tasks"]["colour"]) for one in batch})
    # The image without a label has nothing to train on.
    assert seen == {name: label for name, label in expected.items() if label != MISSING}
    found = {one["image_id"]: int(one["tasks"]["colour"]) for (one,) in build_task_test_loader(cfg, "d2ha_test")}
    assert found == expected
    (first, *_), *_ = build_task_test_loader(cfg, "d2ha_test", batch_size=3)
    assert (first["height"], first["width"]) == (20, 30)


@pytest.mark.parametrize(("pooling", "sizes"), [("flatten", {(12, 10)}), ("avg", {(16, 24), (24, 16)})])
def test_images_have_one_size_where_features_are_flattened(tmp_path: Path, pooling: str, sizes: set[Any]) -> None:
    for i in range(2):
        Image.new("RGB", (20, 30) if i else (30, 20)).save(tmp_path / f"{i}.png")
    cfg = config("none", colour={"on": "image", "classes": ["red", "blue"]})
    cfg.MODEL.META_ARCHITECTURE = "MultiTaskClassifier"
    cfg.MODEL.CLASSIFIER.POOLING = pooling
    cfg.MODEL.CLASSIFIER.INPUT_SIZE = [12, 10]
    for is_train in (True, False):
        made = TaskMapper(cfg, is_train)
        images = [made({"file_name": str(tmp_path / f"{i}.png")})["image"] for i in range(2)]
        assert {tuple(image.shape[1:]) for image in images} == sizes


def test_loader_of_boxes(picture: dict[str, Any]) -> None:
    DatasetCatalog.register("d2ha_boxes", lambda: [picture])
    MetadataCatalog.get("d2ha_boxes").set(
        thing_classes=[f"c{i}" for i in range(8)], task_classes={"parity": ["e", "o"]}
    )
    cfg = config("d2ha_boxes", parity={"on": "box"})
    cfg.INPUT.RANDOM_FLIP = "none"
    (one, _), *_ = islice(build_task_train_loader(cfg), 1)
    assert one["instances"].gt_parity.tolist() == [0, 1, 0, MISSING]
    assert one["instances"].gt_classes.tolist() == [7, 6, 4, 3]


def test_a_task_without_labels_stops_the_training_loader(picture: dict[str, Any]) -> None:
    DatasetCatalog.register("d2ha_boxes", lambda: [picture])
    cfg = config("d2ha_boxes", parity={"on": "box", "classes": ["e", "o"]}, weight={"on": "box", "classes": ["a"]})
    with pytest.raises(DatasetError, match=r"MODEL\.TASKS\.weight: .*no such task in 'd2ha_boxes'"):
        build_task_train_loader(cfg)
