"""HA226 to HA229: what an evaluation reads is asked for before the training, and filled in where it is obvious."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.evaluation import COCOEvaluator
from detectron2.structures import Boxes, BoxMode, Instances
from helpers.doctor import Change, codes, data_report, one_of, registered_context, write_set
from helpers.files import logged, texts

from d2_headadapt.data.dicts import Needs, checked_dicts, problems_of
from d2_headadapt.doctor.finding import DoctorContext
from d2_headadapt.errors import DatasetError
from d2_headadapt.evaluation.truth import complete_truth


@pytest.fixture(autouse=True)
def _datasets() -> Iterator[None]:
    before = set(DatasetCatalog.list())
    yield
    for name in set(DatasetCatalog.list()) - before:
        DatasetCatalog.remove(name)
        MetadataCatalog.pop(name, None)


def every(change: Callable[[dict[str, Any]], object]) -> Change:
    return lambda content: [change(one) for one in content["annotations"]]


def without(key: str) -> Change:
    return every(lambda one: one.pop(key, None))


def pointed(content: dict[str, Any]) -> None:
    for category in content["categories"]:
        category["keypoints"] = ["left", "right"]
    for one in content["annotations"]:
        one["keypoints"] = [5, 5, 2, 6, 6, 0]


MASKS = ("MODEL.MASK_ON", "True")
POINTS = ("MODEL.KEYPOINT_ON", "True", "INPUT.RANDOM_FLIP", "none", "TEST.KEYPOINT_OKS_SIGMAS", "(0.05, 0.05)")


@pytest.mark.parametrize(
    ("code", "severity", "shown", "change", "opts"),
    [
        ("HA226", "note", "no area in 12 of 12", without("area"), ()),
        ("HA226", "note", "no iscrowd in 12 of 12", without("iscrowd"), ()),
        ("HA226", "note", "no num_keypoints in 12 of 12", pointed, POINTS),
        ("HA226", "error", "area that is no number", every(lambda one: one.update(area=str(one["area"]))), ()),
        ("HA226", "error", "iscrowd that is no number", every(lambda one: one.update(iscrowd="0")), ()),
        ("HA226", "error", "no segmentation in 12 of 12", without("segmentation"), MASKS),
        ("HA221", "error", "no such bbox", every(lambda one: one.update(bbox=[str(v) for v in one["bbox"]])), ()),
        ("HA227", "error", "only crowds (iscrowd 1) in 6 images", every(lambda one: one.update(iscrowd=1)), ()),
        ("HA227", "error", "no box in 6 images", lambda content: content["annotations"].clear(), ()),
    ],
)  # fmt: skip
def test_what_a_test_set_lacks_is_said_before_the_training(
    code: str, severity: str, shown: str, change: Change, opts: tuple[str, ...], tmp_path: Path
) -> None:
    context = registered_context(tmp_path, None, write_set(tmp_path, "test", change), *opts)
    found = [one for one in data_report(context).findings if one.code == code]
    assert [one.severity for one in found] == [severity] and shown in found[0].found
    assert found[0].fix.endswith(".")
    good = write_set(tmp_path, "good", None if opts != POINTS else lambda c: (pointed(c), every(counted)(c)))
    DatasetCatalog.remove("doctor_test")
    MetadataCatalog.remove("doctor_test")
    assert code not in codes(data_report(registered_context(tmp_path, None, good, *opts)))


def counted(one: dict[str, Any]) -> None:
    one["num_keypoints"] = 1


def test_stock_stops_where_a_note_says_that_it_is_filled_in(tmp_path: Path) -> None:
    """After the evaluation's inference; with the values filled in it gives the AP of the whole file."""
    whole = write_set(tmp_path, "whole")
    bare = write_set(tmp_path, "bare", lambda content: (without("area")(content), without("iscrowd")(content)))
    results = {}
    for path in (whole, bare):
        name = f"d2ha_{path.stem}"
        register_coco_instances(name, {}, str(path), str(path.with_suffix("")))
        if path is bare:
            with pytest.raises(KeyError):
                evaluated(COCOEvaluator(name, output_dir=str(tmp_path)), name)
        with logged("d2_headadapt") as said:
            results[path.stem] = evaluated(complete_truth(COCOEvaluator(name, output_dir=str(tmp_path))), name)
        wanted = "Filled in for the evaluation, of 12 annotations: area of 12, iscrowd of 12." * (path is bare)
        assert texts(said) == wanted
    assert str(results["bare"]) == str(results["whole"]), "some are nan"
    assert results["whole"]["bbox"]["AP"] > 99


def evaluated(evaluator: Any, name: str) -> dict[str, Any]:
    """The evaluation of predictions that are the truth."""
    evaluator.reset()
    for one in DatasetCatalog.get(name):
        boxes = [BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYXY_ABS) for a in one["annotations"]]
        found = Instances((one["height"], one["width"]))
        found.pred_boxes = Boxes(np.array(boxes, np.float32))
        found.scores = np.ones(len(boxes), np.float32)
        found.pred_classes = np.array([a["category_id"] for a in one["annotations"]])
        evaluator.process([one], [{"instances": found}])
    return dict(evaluator.evaluate())


@pytest.mark.parametrize(
    ("change", "shown", "fix"),
    [
        (
            lambda content: content.update(annotation=content.pop("annotations")),
            "no list under the key 'annotations'; its keys are 'images', 'categories', 'annotation'",
            "Rename 'annotation' to 'annotations', if it is the list.",
        ),
        (
            lambda content: content.pop("annotations"),
            "no list under the key 'annotations'; its keys are 'images', 'categories'",
            "Use the json with the labels.",
        ),
        (lambda content: content.update(annotations={}), "its keys are", "Rename 'annotations'"),
    ],
)
def test_a_training_set_without_a_list_of_annotations(change: Change, shown: str, fix: str, tmp_path: Path) -> None:
    path = write_set(tmp_path, "train", change)
    content = json.loads(path.read_text())
    path.write_text(json.dumps({key: value for key, value in content.items() if key != "info"}))
    found = one_of(data_report(registered_context(tmp_path, path)), "HA229")
    assert found.severity == "error" and shown in found.found and found.fix.startswith(fix)


def dicts() -> list[dict[str, Any]]:
    """A function's dataset with numpy's integers, which detectron2 takes."""
    box = {"bbox": np.array([1, 2, 9, 9]), "bbox_mode": BoxMode.XYXY_ABS, "iscrowd": np.int32(0)}
    boxes = [{**box, "category_id": np.int64(k)} for k in range(3)]
    size = {"height": np.int64(64), "width": np.int64(64)}
    return [{"file_name": f"{i}.png", "image_id": np.int64(i), **size, "annotations": boxes} for i in range(4)]


def lacking(key: str, of_boxes: bool = False) -> list[dict[str, Any]]:
    made = dicts()
    if of_boxes:
        made[0]["annotations"] = [dict(one) for one in made[0]["annotations"]]
        made[0]["annotations"][1].pop(key)
    else:
        made[0].pop(key)
    return made


def context_of(made: Any, which: str = "TRAIN", quick: bool = False) -> DoctorContext:
    DatasetCatalog.register("made", lambda: made)
    MetadataCatalog.get("made").set(thing_classes=["a", "b", "c"], evaluator_type="coco")
    other = "TEST" if which == "TRAIN" else "TRAIN"
    return DoctorContext("", [f"DATASETS.{which}", "('made',)", f"DATASETS.{other}", "()", "MODEL.MASK_ON", "False"])


def test_numpy_integers_are_no_mistake(tmp_path: Path) -> None:
    report = data_report(context_of(dicts()))
    assert [one for one in report.of("error") if one.code != "HA231"] == [], "the pictures are not there"
    assert list(problems_of(dicts(), Needs(boxes=True, ids=True))) == []


CASES = [
    (lacking("file_name"), "no 'file_name' in 1 of 4 dicts, such as dict 0, which has 'image_id', 'height'"),
    (lacking("annotations"), "no 'annotations' in 1 of 4 dicts, such as dict 0"),
    (lacking("bbox", True), "no 'bbox' in 1 of 12 annotations, such as one of dict 0"),
    (lacking("bbox_mode", True), "no 'bbox_mode' in 1 of 12 annotations, such as one of dict 0"),
    (lacking("category_id", True), "no 'category_id' in 1 of 12 annotations, such as one of dict 0"),
    ({"a": 1}, "a value of type dict"),
    (["a.png"], "a value of type str at place 0"),
]


@pytest.mark.parametrize(("made", "shown"), CASES)
def test_what_dicts_of_a_function_lack_is_an_error_in_the_doctor_and_in_training(made: Any, shown: str) -> None:
    (problem,) = problems_of(made, Needs(boxes=True))
    assert problem.found.startswith(shown) and problem.fix.endswith(".")
    DatasetCatalog.register("given", lambda: made)
    with pytest.raises(DatasetError, match="dataset 'given'"), checked_dicts(Needs(boxes=True)):
        DatasetCatalog.get("given")
    assert DatasetCatalog.get("given") == made, "and only inside"
    if isinstance(made, list) and isinstance(made[0], dict):
        assert shown in one_of(data_report(context_of(made)), "HA228").found


def test_an_evaluation_needs_the_ids_of_images() -> None:
    assert "no 'image_id'" in one_of(data_report(context_of(lacking("image_id"), "TEST")), "HA228").found
    assert list(problems_of(lacking("image_id"), Needs(boxes=True))) == []


def test_mutation_modes_of_a_stored_dataset_are_modes() -> None:
    """As integers, as a JSON keeps them; a word is none."""
    made = dicts()
    for one in made[0]["annotations"]:
        one["bbox_mode"] = 1
    assert list(problems_of(made, Needs(boxes=True))) == []
    made[0]["annotations"][0]["bbox_mode"] = "xywh"
    (problem,) = problems_of(made, Needs(boxes=True))
    assert "'bbox_mode' 'xywh'" in problem.found


CROP = (*MASKS, "INPUT.CROP.ENABLED", "True")


def emptied(content: dict[str, Any]) -> None:
    content["annotations"] = content["annotations"][:-2]


@pytest.mark.parametrize(
    ("change", "opts", "shapely", "shown"),
    [
        (None, CROP, False, "no shapely in this Python"),
        (None, CROP, True, ""),
        (None, MASKS, False, ""),
        (None, ("INPUT.CROP.ENABLED", "True"), False, ""),
        (emptied, CROP, True, ""),
        (emptied, (*CROP, "DATALOADER.FILTER_EMPTY_ANNOTATIONS", "False"), True, "1 of 6 images"),
    ],
)
def test_a_crop_that_would_stop_the_training(
    change: Change | None, opts: tuple[str, ...], shapely: bool, shown: str, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object() if shapely else None)
    report = data_report(registered_context(tmp_path, write_set(tmp_path, "train", change), None, *opts))
    found = [one for one in report.findings if one.code == "HA220"]
    assert len(found) == bool(shown) and all(shown in one.found and one.severity == "error" for one in found)
