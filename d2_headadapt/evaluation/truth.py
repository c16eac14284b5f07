"""What COCO's evaluation reads of every annotation and a json may lack: filled in where there is one obvious value."""

from __future__ import annotations

import logging
from collections import Counter
from typing import Any

from detectron2.evaluation import DatasetEvaluator, DatasetEvaluators

logger = logging.getLogger(__name__)


def complete_truth(evaluator: DatasetEvaluator) -> DatasetEvaluator:
    """Fill in what the annotations of COCO's evaluators lack, in memory, and log it; the json stays as it is.

    ``iscrowd`` is 0, ``area`` that of the box, ``num_keypoints`` the number of labelled points.

    Args:
        evaluator: of any kind; those that read no COCO json stay as they are.

    Returns:
        The same.
    """
    for one in evaluator._evaluators if isinstance(evaluator, DatasetEvaluators) else [evaluator]:
        truth = getattr(getattr(one, "_coco_api", None), "dataset", {})
        annotations = truth.get("annotations", ()) if isinstance(truth, dict) else ()
        filled: Counter[str] = Counter()
        for annotation in annotations:
            filled.update(fill_annotation(annotation))
        if filled:
            words = ", ".join(f"{key} of {count}" for key, count in sorted(filled.items()))
            logger.info("Filled in for the evaluation, of %d annotations: %s.", len(annotations), words)
    return evaluator


def fill_annotation(annotation: dict[str, Any]) -> list[str]:
    """Fill in one annotation, in place.

    Returns:
        The keys that it lacked.

    Example:
        >>> one = {"bbox": [1, 2, 10, 20]}
        >>> fill_annotation(one), one["area"], one["iscrowd"]
        (['iscrowd', 'area'], 200, 0)
    """
    made: dict[str, Any] = {"iscrowd": 0}
    box, points = annotation.get("bbox"), annotation.get("keypoints")
    if isinstance(box, list) and len(box) == 4:
        made["area"] = box[2] * box[3]
    if isinstance(points, list):
        made["num_keypoints"] = sum(1 for shown in points[2::3] if shown)
    lacking = [key for key in made if annotation.get(key) is None]
    annotation.update({key: made[key] for key in lacking})
    return lacking
