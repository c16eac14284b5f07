"""Metrics of tasks, against numbers worked out by hand."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import print_csv_format
from detectron2.evaluation.testing import flatten_results_dict
from detectron2.structures import Boxes, BoxMode, Instances
from detectron2.utils.events import EventStorage
from helpers.files import logged, texts
from PIL import Image

from d2_headadapt.adapt.classes import ClassTable
from d2_headadapt.data.task_spec import TaskSpec
from d2_headadapt.errors import DatasetError
from d2_headadapt.evaluation import task_evaluator as evaluation
from d2_headadapt.evaluation.metric_files import confusion_picture, file_stem, metrics_json, metrics_markdown
from d2_headadapt.evaluation.metrics import multi_label_metrics, single_label_metrics
from d2_headadapt.evaluation.task_evaluator import TaskEvaluator, match_boxes

COLOUR = TaskSpec("colour", "image", ClassTable(["red", "green", "blue", "pink"]))
TAGS = TaskSpec("tags", "image", ClassTable(["striped", "woollen", "long"]), kind="multi")
PARITY = TaskSpec("parity", "box", ClassTable(["even", "odd"]))
MARKS = TaskSpec("marks", "box", ClassTable(["dot", "line"]), kind="multi")


def ints(*values: Any) -> np.ndarray:
    return np.array(values, dtype=np.int64)


# ---------------------------------------------------------------------------------------------------- pure numbers


def test_single_label_numbers_are_those_of_a_hand_computation() -> None:
    """Labels red red green blue and one missing; pink is neither labelled nor predicted."""
    found = single_label_metrics(COLOUR, ints(0, 0, 1, 2, -1), ints(0, 1, 1, 1, 3))
    assert found.confusion.tolist() == [[1, 1, 0, 0], [0, 1, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0]]
    assert found.labelled == 4 and found.majority == 50
    assert found.summary["top1"] == pytest.approx(50)
    # F1: red 2 * 1 / (2 * 1 + 1), green 2 / (2 + 2), blue 0; pink has none and is left out of the mean.
    assert found.summary["macro_f1"] == pytest.approx(100 * (2 / 3 + 1 / 2 + 0) / 3)
    red, green, blue, pink = found.per_class
    assert red == {
        "class": "red",
        "precision": 100,
        "recall": 50,
        "f1": pytest.approx(200 / 3),
        "support": 2,
    }
    assert (green["precision"], green["recall"], green["support"]) == (pytest.approx(100 / 3), 100, 1)
    assert math.isnan(blue["precision"]) and blue["recall"] == 0 and blue["f1"] == 0
    assert pink["support"] == 0 and math.isnan(pink["f1"])


def test_mutation_a_missing_label_that_counts_changes_the_numbers() -> None:
    masked = single_label_metrics(COLOUR, ints(0, -1), ints(0, 3))
    counted = single_label_metrics(COLOUR, ints(0, 0), ints(0, 3))
    assert masked.summary["top1"] == 100 and counted.summary["top1"] == 50


def test_multi_label_numbers_are_those_of_a_hand_computation() -> None:
    labels = ints([1, 0, -1], [0, 0, -1], [1, -1, -1])
    scores = np.array([[0.9, 0.1, 0.2], [0.8, 0.1, 0.2], [0.2, 0.9, 0.9]])
    found = multi_label_metrics(TAGS, labels, (scores >= 0.5).astype(int), scores)
    # striped: ranked yes, no, yes; precision is 1 at the first hit and 2/3 at the second.
    assert found.summary["mAP"] == pytest.approx(100 * (1 + 2 / 3) / 2)
    # striped: one found, one missed, one claimed. woollen has no label and no claim that counts, long no label at all.
    assert found.summary["macro_f1"] == pytest.approx(50)
    assert found.confusion.tolist() == [[[0, 1], [1, 1]], [[2, 0], [0, 0]], [[0, 0], [0, 0]]]
    assert found.labelled == 5 and found.majority == pytest.approx(100 * (2 + 2) / 5)
    assert [row["support"] for row in found.per_class] == [2, 0, 0]
    assert math.isnan(found.per_class[1]["AP"])


@pytest.mark.parametrize("rows", [0, 2])
def test_without_one_label_there_is_nothing_to_measure(rows: int) -> None:
    single = single_label_metrics(COLOUR, np.full(rows, -1), np.zeros(rows, dtype=int))
    multi = multi_label_metrics(TAGS, np.full((rows, 3), -1), np.zeros((rows, 3), dtype=int), np.zeros((rows, 3)))
    for found in (single, multi):
        assert found.labelled == 0 and all(math.isnan(value) for value in found.summary.values())
        assert (
            math.isnan(found.majority) and not found.confusion.any() and len(found.per_class) == len(found.spec.table)
        )


# ------------------------------------------------------------------------------------------------------------ images


def register(name: str, entries: Sequence[dict[str, Any]]) -> str:
    DatasetCatalog.register(name, lambda: list(entries))
    return name


def image_output(colour: int, tags: Sequence[int]) -> dict[str, Any]:
    scores = {"colour": torch.full((4,), 0.1), "tags": torch.full((3,), 0.2)}
    scores["colour"][colour] = 0.7
    scores["tags"][list(tags)] = 0.8
    return {"tasks": scores, "pred_colour": colour, "pred_tags": list(tags)} | {
        f"scores_{name}": value for name, value in scores.items()
    }


IMAGES = [
    {"file_name": "a.png", "image_id": 1, "tasks": {"colour": 0, "tags": [0, 1]}},
    {"file_name": "b.png", "image_id": 2, "tasks": {"colour": 0, "tags": []}},
    {"file_name": "c.png", "image_id": 3, "tasks": {"colour": None, "tags": [0]}},
    {"file_name": "d.png", "image_id": 4, "tasks": {"colour": 2}},
    {"file_name": "e.png", "image_id": 5},
]
OUTPUTS = [image_output(*found) for found in ((0, [0]), (1, []), (3, [0]), (2, [2]), (3, [2]))]


def as_inputs(entries: Sequence[dict[str, Any]], key: str = "image_id") -> list[dict[str, Any]]:
    """What a loader gives: labels are gone."""
    return [{key: entry[key]} for entry in entries]


@pytest.mark.parametrize("key", ["image_id", "file_name"])
def test_labels_are_found_by_image_and_missing_ones_count_nowhere(key: str) -> None:
    entries = [{k: v for k, v in entry.items() if k in (key, "tasks")} for entry in IMAGES]
    evaluator = TaskEvaluator(register("d2ha_eval", entries), [COLOUR, TAGS])
    # In another order than the dataset's, in two batches.
    for i in ((3, 1, 4), (0, 2)):
        evaluator.process(as_inputs([entries[j] for j in i], key), [OUTPUTS[j] for j in i])
    results = evaluator.evaluate()
    assert list(results) == ["tasks"]
    # Colours that are known: red as red, red as green, blue as blue.
    assert results["tasks"]["colour/top1"] == pytest.approx(200 / 3)
    assert results["tasks"]["colour/macro_f1"] == pytest.approx(100 * (2 / 3 + 0 + 1) / 3)
    # Tags of a, b and c: striped perfect, woollen missed among two that lack it, long never labelled present.
    assert results["tasks"]["tags/mAP"] == pytest.approx(100 * (1 + 1 / 3) / 2)
    assert results["tasks"]["tags/macro_f1"] == pytest.approx(50)
    evaluator.reset()
    assert math.isnan(evaluator.evaluate()["tasks"]["colour/top1"])


def test_results_pass_through_detectron2s_printing_and_event_storage() -> None:
    evaluator = TaskEvaluator(register("d2ha_eval", IMAGES), [COLOUR, TAGS])
    evaluator.process(as_inputs(IMAGES), OUTPUTS)
    results = evaluator.evaluate()
    with logged("detectron2") as records:
        print_csv_format(results)
    assert "copypaste: colour/top1,colour/macro_f1,tags/mAP,tags/macro_f1" in texts(records)
    with EventStorage() as storage:
        storage.put_scalars(**flatten_results_dict(results), smoothing_hint=False)
        assert storage.latest()["tasks/colour/top1"][0] == pytest.approx(200 / 3)


def test_two_ranks_say_what_one_process_would(monkeypatch: pytest.MonkeyPatch) -> None:
    name = register("d2ha_eval", IMAGES)
    whole, first, second = (TaskEvaluator(name, [COLOUR, TAGS]) for _ in range(3))
    whole.process(as_inputs(IMAGES), OUTPUTS)
    first.process(as_inputs(IMAGES[:1]), OUTPUTS[:1])
    second.process(as_inputs(IMAGES[1:]), OUTPUTS[1:])
    expected, alone = whole.evaluate(), first.evaluate()
    sent: list[Any] = []

    def gather(data: Any, dst: int) -> list[Any]:
        sent.append(data)
        return sent if len(sent) == 2 else []

    monkeypatch.setattr(evaluation.comm, "gather", gather)
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(evaluation.comm, "is_main_process", lambda: False)
        assert second.evaluate() == {}
    assert first.evaluate() == expected != alone


def test_files_hold_what_was_measured_and_tensorboard_gets_the_pictures(tmp_path: Path) -> None:
    # A name that is no file name, as real data sets have them.
    evaluator = TaskEvaluator(register("d2ha/eval", IMAGES), [COLOUR, TAGS], str(tmp_path / "inference"))
    evaluator.process(as_inputs(IMAGES), OUTPUTS)
    with EventStorage() as storage:
        results = evaluator.evaluate()
        shown = {name: picture for name, picture, _ in storage._vis_data}
    stored = json.loads((tmp_path / "inference" / "d2ha_eval_tasks.json").read_text(), parse_constant=pytest.fail)
    colour = stored["tasks"]["colour"]
    assert colour["top1"] == results["tasks"]["colour/top1"] and colour["labelled"] == 3
    assert colour["confusion"] == [[1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0]]
    assert colour["classes"][3] == {"class": "pink", "precision": None, "recall": None, "f1": None, "support": 0}
    text = (tmp_path / "inference" / "d2ha_eval_tasks.md").read_text()
    assert [cell.strip() for cell in text.splitlines()[4].split("|")[1:-1]] == [
        *("colour", "image", "single", "3", "66.7", "55.6", "-", "66.7", "-")
    ]
    assert set(shown) == {"confusion/d2ha/eval/colour", "confusion/d2ha/eval/tags"}
    picture = np.asarray(Image.open(tmp_path / "inference" / "d2ha_eval_confusion_colour.png"))
    assert np.array_equal(picture.transpose(2, 0, 1), shown["confusion/d2ha/eval/colour"])


def test_nothing_is_written_without_a_folder_and_outside_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "confusion_picture", lambda found: pytest.fail("a picture that nobody sees"))
    evaluator = TaskEvaluator(register("d2ha_eval", IMAGES), [COLOUR])
    evaluator.process(as_inputs(IMAGES), OUTPUTS)
    assert "tasks" in evaluator.evaluate()


# ------------------------------------------------------------------------------------------------------------- boxes


def annotation(x: float, y: float, **labels: Any) -> dict[str, Any]:
    """A box of 10 by 10 pixels."""
    crowd = labels.pop("iscrowd", 0)
    box = {"bbox": [x, y, 10, 10], "bbox_mode": BoxMode.XYWH_ABS, "iscrowd": crowd, "category_id": 0}
    return {**box, "tasks": labels} if labels else box


def detected(rows: Sequence[tuple[float, float, float, int, int]], *, tasks: bool = True) -> dict[str, Instances]:
    """Detections of 10 by 10 pixels: x, y, score, class, parity; marks say dot for odd ones."""
    found = Instances((100, 100))
    found.pred_boxes = Boxes(torch.tensor([[x, y, x + 10, y + 10] for x, y, *_ in rows]).reshape(-1, 4).float())
    found.scores = torch.tensor([row[2] for row in rows])
    found.pred_classes = torch.tensor([row[3] for row in rows], dtype=torch.int64)
    if tasks:
        parity = torch.tensor([row[4] for row in rows], dtype=torch.int64)
        found.pred_parity = parity
        found.scores_parity = torch.eye(2)[parity]
        found.pred_marks = torch.stack([parity == 1, parity == 2], 1)
        found.scores_marks = found.pred_marks.float()
    return {"instances": found}


BOXES = [
    {
        "image_id": 7,
        "annotations": [
            annotation(0, 0, parity=1, marks=[0]),  # Two detections; the surer one, of another class, says odd.
            annotation(40, 0, parity=0, marks=[1]),  # Found, said to be odd.
            annotation(0, 60, parity=0),  # Shifted too far to be the same box.
            annotation(60, 60, marks=[]),  # Parity unknown.
            annotation(80, 80, parity=0, iscrowd=1),
            annotation(20, 80),
        ],
    },
    {"image_id": 8, "annotations": [annotation(0, 0, parity=1)]},
]
DETECTED = [
    detected([(0, 1, 0.6, 0, 0), (1, 0, 0.9, 1, 1), (40, 0, 0.8, 0, 1), (6, 60, 0.7, 0, 0), (60, 60, 0.3, 0, 0)]),
    detected([]),
]


def test_tasks_are_judged_on_matched_boxes_and_coverage_says_how_many_those_are() -> None:
    evaluator = TaskEvaluator(register("d2ha_eval", BOXES), [PARITY, MARKS])
    evaluator.process(as_inputs(BOXES), DETECTED)
    results = evaluator.evaluate()["tasks"]
    # Parity: four boxes with a label that are no crowd, two of them matched, one of these right.
    assert results["parity/coverage"] == pytest.approx(50)
    assert results["parity/top1"] == pytest.approx(50)
    assert results["parity/macro_f1"] == pytest.approx(100 * (2 / 3 + 0) / 2)
    # Marks: three boxes with a label, all matched; dot is said of the first (right) and the second (wrong).
    assert results["marks/coverage"] == pytest.approx(100)
    assert results["marks/macro_f1"] == pytest.approx(100 * (2 / 3 + 0) / 2)
    assert results["marks/mAP"] == pytest.approx(100 * (1 / 2 + 1 / 3) / 2)


def test_mutation_the_least_sure_detection_would_give_other_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "match_boxes", lambda boxes, found, iou: match_boxes(boxes, reverse(found), iou))

    def reverse(found: Instances) -> Instances:
        turned = Instances(found.image_size, **found.get_fields())
        turned.scores = 1 - found.scores
        return turned

    evaluator = TaskEvaluator(register("d2ha_eval", BOXES), [PARITY])
    evaluator.process(as_inputs(BOXES), DETECTED)
    assert evaluator.evaluate()["tasks"]["parity/top1"] == 0


def test_matching_against_brute_force() -> None:
    generator = torch.Generator().manual_seed(5)
    corners = torch.rand(60, 2, generator=generator) * 20
    every = torch.cat([corners, corners + 4 + torch.rand(60, 2, generator=generator) * 8], 1)
    boxes, found = every[:20], Instances((40, 40), pred_boxes=Boxes(every[20:]))
    found.scores = torch.rand(40, generator=generator)

    def iou(a: torch.Tensor, b: torch.Tensor) -> float:
        w = max(0.0, float(min(a[2], b[2]) - max(a[0], b[0])))
        h = max(0.0, float(min(a[3], b[3]) - max(a[1], b[1])))
        areas = [float((x[2] - x[0]) * (x[3] - x[1])) for x in (a, b)]
        return w * h / (sum(areas) - w * h)

    expected = []
    for box in boxes:
        near = [i for i in range(40) if iou(box, every[20 + i]) >= 0.5]
        expected.append(max(near, key=lambda i: float(found.scores[i])) if near else -1)
    assert -1 in expected and len(set(expected)) > 5
    assert match_boxes(boxes.numpy(), found, 0.5).tolist() == expected


def test_a_model_without_a_task_is_evaluated_without_it_and_that_is_said() -> None:
    evaluator = TaskEvaluator(register("d2ha_eval", BOXES), [PARITY, COLOUR])
    with logged("d2_headadapt") as records:
        evaluator.process(as_inputs(BOXES), [detected([(0, 0, 0.9, 0, 0)], tasks=False), DETECTED[1]])
        assert evaluator.evaluate() == {}
    said = texts(records)
    assert "does not predict task parity" in said and "detections with pred_boxes, scores, pred_classes" in said
    assert "does not predict task colour" in said and "its output has instances" in said


def test_a_task_without_labels_is_said_and_undefined() -> None:
    evaluator = TaskEvaluator(register("d2ha_eval", BOXES[1:]), [MARKS, PARITY])
    with logged("d2_headadapt") as records:
        evaluator.process(as_inputs(BOXES[1:]), DETECTED[1:])
        results = evaluator.evaluate()["tasks"]
    assert results["parity/coverage"] == 0 and math.isnan(results["marks/coverage"])
    warned = [r.getMessage() for r in records if r.levelno == logging.WARNING]
    assert [line.split()[1] for line in warned] == ["marks", "parity"]
    assert all("no labelled box that was detected in d2ha_eval" in line for line in warned)


# ------------------------------------------------------------------------------------------------------------ errors


def test_an_image_of_another_dataset_is_refused() -> None:
    evaluator = TaskEvaluator(register("d2ha_eval", IMAGES), [COLOUR])
    with pytest.raises(DatasetError, match=r"dataset 'd2ha_eval': expected every image.*none with image_id 99"):
        evaluator.process([{"image_id": 99}], OUTPUTS[:1])


@pytest.mark.parametrize("label", [4, -1])
def test_a_label_outside_its_table_is_refused(label: int) -> None:
    """scikit-learn would leave it out of the confusion matrix without a word."""
    entries = [{"image_id": 1, "tasks": {"colour": label}}]
    evaluator = TaskEvaluator(register("d2ha_eval", entries), [COLOUR])
    with pytest.raises(DatasetError, match=rf"dataset 'd2ha_eval'.*colour.*found {label}"):
        evaluator.process(as_inputs(entries), OUTPUTS[:1])


def test_a_dataset_whose_task_has_other_classes_is_refused() -> None:
    """Its indices would be compared with those of another list."""
    evaluator = TaskEvaluator(register("d2ha_eval", IMAGES), [COLOUR])
    MetadataCatalog.get("d2ha_eval").task_classes = {"colour": ["green", "red", "blue", "pink"]}
    with pytest.raises(DatasetError, match=r"task colour: expected the 4 classes of a list.*found 4: green, red"):
        evaluator.process(as_inputs(IMAGES), OUTPUTS)
    MetadataCatalog.remove("d2ha_eval")
    MetadataCatalog.get("d2ha_eval").task_classes = {"colour": list(COLOUR.table.names)}
    evaluator.process(as_inputs(IMAGES), OUTPUTS)


# ---------------------------------------------------------------------------------------------------------- pictures


def test_a_confusion_matrix_is_dark_where_its_row_is() -> None:
    """The matrix of one class that is always right and one that is always taken for the first."""
    found = single_label_metrics(PARITY, ints(0, 0, 1), ints(0, 0, 0))
    swapped = single_label_metrics(PARITY, ints(1, 1, 0), ints(1, 1, 1))
    one, other = confusion_picture(found).astype(int), confusion_picture(swapped).astype(int)
    assert one.shape == other.shape and one.shape[2] == 3
    dark = [(picture.sum(axis=2) < 330).nonzero()[1].mean() for picture in (one, other)]
    assert dark[0] < dark[1], "left column, right column"


def test_many_classes_make_no_endless_picture() -> None:
    spec = TaskSpec("artist", "image", ClassTable([f"artist {i}" for i in range(300)]))
    picture = confusion_picture(single_label_metrics(spec, np.arange(300), np.arange(300)))
    assert max(picture.shape) < 1000


def test_names_that_markdown_and_file_systems_read_otherwise() -> None:
    spec = TaskSpec("colour", "image", ClassTable(["$red$_1", "a|b"]))
    found = single_label_metrics(spec, ints(0, 1), ints(0, 1))
    assert r"| a\|b " in metrics_markdown("d", [found], {})
    assert confusion_picture(found).any()
    assert json.loads(metrics_json("d", [found], {"colour": 3.0}))["tasks"]["colour"]["coverage"] == 3
    assert file_stem("mine/val set", "colour") == "mine_val_set_colour"
