"""Old and new classes are judged by name, on sets that label some of them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from detectron2.evaluation import DatasetEvaluator
from detectron2.structures import Boxes, Instances

from d2_headadapt import ClassTable
from d2_headadapt.evaluation.keep import KeepEvaluator, keep_table

TABLE = ClassTable(["cat", "dog", "rhino", "gnu"])


class Judge(DatasetEvaluator):
    """Remembers what it was given."""

    def __init__(self, result: dict[str, Any]) -> None:
        self.seen: list[list[int]] = []
        self._result = result

    def reset(self) -> None:
        self.seen = []

    def process(self, inputs: Any, outputs: Any) -> None:
        self.seen += [output["instances"].pred_classes.tolist() for output in outputs]

    def evaluate(self) -> dict[str, Any]:
        return self._result


def detections(*classes: int, score: float = 0.6) -> dict[str, Instances]:
    count = len(classes)
    return {
        "instances": Instances(
            (9, 9), pred_boxes=Boxes(torch.zeros(count, 4)), scores=torch.full((count,), score),
            pred_classes=torch.tensor(classes, dtype=torch.int64),
        )
    }  # fmt: skip


@pytest.mark.parametrize(
    ("labels", "seen"),
    [
        (["gnu", "cat"], [1, 0]),  # by name, whatever the order
        (["cat", "dog"], [0, 1]),
        (["rhino", "gnu", "zebra"], [0, 1]),
        (["zebra"], []),
    ],
)
def test_detections_of_the_sets_classes_get_its_indices(labels: list[str], seen: list[int]) -> None:
    judge = Judge({"bbox": {"AP": 1.0}})
    evaluator = KeepEvaluator(judge, TABLE, 2, ClassTable(labels))
    evaluator.process([{}], [detections(0, 1, 2, 3)])
    assert judge.seen == [seen]


def test_old_new_and_all_classes_have_an_ap_each() -> None:
    result = {"bbox": {"AP": 50.0, "AP-cat": 30.0, "AP-rhino": 70.0, "AP-gnu": math.nan}}
    evaluator = KeepEvaluator(Judge(result), TABLE, 2, ClassTable(["cat", "rhino", "gnu"]))
    evaluator.reset()
    evaluator.process([{}], [detections(2)])
    assert evaluator.evaluate()["keep"] == {"bbox old": 30.0, "bbox new": 70.0, "bbox all": 50.0}


def test_new_detections_on_a_set_without_new_classes_are_counted() -> None:
    """detectron2 gives a set of one class no AP by class."""
    evaluator = KeepEvaluator(Judge({"bbox": {"AP": 40.0}}), TABLE, 2, ClassTable(["cat"]))
    evaluator.reset()
    evaluator.process([{}], [detections(0, 2, 3)])
    evaluator.process([{}], [detections(2, score=0.4)])
    split = evaluator.evaluate()["keep"]
    assert split == {"bbox old": 40.0, "bbox all": 40.0, "new >= 0.5": 2.0}
    table = keep_table({"photos": {"keep": split}, "cells": {"keep": {"bbox new": 9.0, "bbox all": 9.0}}})
    assert [line.split() for line in table.splitlines()[2:]] == [
        ["photos", "bbox", "40.00", "-", "40.00", "2"],
        ["cells", "bbox", "-", "9.00", "9.00", "-"],
    ]
    assert keep_table({"other": {"bbox": {"AP": 1.0}}}) == ""


def test_a_judge_that_says_nothing_says_nothing() -> None:
    """On all ranks but the first."""
    assert not KeepEvaluator(Judge({}), TABLE, 2, TABLE).evaluate()
