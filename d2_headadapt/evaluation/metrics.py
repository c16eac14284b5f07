"""Compute the metrics of a task from labels, predictions and scores: scikit-learn's numbers. Pure functions.

N   number of images, or of matched boxes
K   number of classes of the task
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import (
    accuracy_score,
    average_precision_score,
    confusion_matrix,
    precision_recall_fscore_support,
)

from ..data.task_labels import MISSING
from ..data.task_spec import TaskSpec

Array = NDArray[Any]


@dataclass(frozen=True)
class TaskMetrics:
    """The metrics of one task's predictions.

    Args:
        spec: the task.
        summary: percent by name; NaN where there is nothing to measure. ``top1`` and ``macro_f1``, or for a multi-label
            task ``mAP`` and ``macro_f1``; means over classes leave out those that have neither a label nor a
            prediction (``mAP``: those without a label).
        labelled: number of labels that were compared: things, or for a multi-label task things times classes.
        majority: what the most frequent answer alone would reach, percent: the commonest class, or for a multi-label
            task the commoner of yes and no in each class, as a share of ``labelled``.
        per_class: K rows with ``class``, ``precision``, ``recall``, ``f1`` in percent, ``support`` (labels of the
            class), and ``AP`` for a multi-label task; NaN where a number is undefined.
        confusion: counts. (K, K), rows are labels and columns predictions; for a multi-label task (K, 2, 2), of each
            class absent and present.
    """

    spec: TaskSpec
    summary: dict[str, float]
    labelled: int
    majority: float
    per_class: tuple[dict[str, Any], ...]
    confusion: Array


def single_label_metrics(spec: TaskSpec, labels: Array, predicted: Array) -> TaskMetrics:
    """Measure a task with one class for each thing.

    Args:
        spec: the task.
        labels: (N,) class indices, or ``MISSING``; such things are not looked at.
        predicted: (N,) class indices.
    """
    known = labels != MISSING
    labels, predicted = labels[known], predicted[known]
    classes = list(range(len(spec.table)))
    if not len(labels):
        empty = np.zeros((len(classes), len(classes)), dtype=np.int64)
        nothing = dict.fromkeys(("top1", "macro_f1"), np.nan)
        return TaskMetrics(spec, nothing, 0, np.nan, _no_rows(spec), empty)
    measured = precision_recall_fscore_support(labels, predicted, labels=classes, zero_division=np.nan)
    summary = {"top1": 100 * float(accuracy_score(labels, predicted)), "macro_f1": _percent(measured[2])}
    rows = [_row(spec, k, [values[k] for values in measured]) for k in classes]
    matrix = confusion_matrix(labels, predicted, labels=classes)
    majority = 100 * float(np.bincount(labels).max()) / len(labels)
    return TaskMetrics(spec, summary, len(labels), majority, tuple(rows), matrix)


def multi_label_metrics(spec: TaskSpec, labels: Array, predicted: Array, scores: Array) -> TaskMetrics:
    """Measure a task with any number of classes for each thing.

    Args:
        spec: the task.
        labels: (N, K) of 0, 1 and ``MISSING``; what is missing counts for no class.
        predicted: (N, K) of 0 and 1.
        scores: (N, K), the higher the surer.
    """
    rows, matrices = [], []
    for k in range(len(spec.table)):
        known = labels[:, k] != MISSING
        y, p, s = labels[known, k], predicted[known, k], scores[known, k]
        matrices.append(confusion_matrix(y, p, labels=[0, 1]) if len(y) else np.zeros((2, 2), dtype=np.int64))
        if not len(y):
            rows.append(_no_row(spec, k))
            continue
        measured = precision_recall_fscore_support(y, p, labels=[1], zero_division=np.nan)
        # Without one thing that has the class, scikit-learn warns and says 0, which would count as a failure.
        ap = float(average_precision_score(y, s)) if y.any() else np.nan
        rows.append({**_row(spec, k, [values[0] for values in measured]), "AP": 100 * ap})
    summary = {name: _percent([row[key] for row in rows], 1) for name, key in (("mAP", "AP"), ("macro_f1", "f1"))}
    confusion = np.stack(matrices)
    labelled = int(confusion.sum())
    majority = 100 * float(confusion.sum(axis=2).max(axis=1).sum()) / labelled if labelled else np.nan
    return TaskMetrics(spec, summary, labelled, majority, tuple(rows), confusion)


def _row(spec: TaskSpec, k: int, measured: list[Any]) -> dict[str, Any]:
    percents = {name: 100 * float(x) for name, x in zip(("precision", "recall", "f1"), measured[:3], strict=True)}
    return {"class": spec.table.names[k], **percents, "support": int(measured[3])}


def _no_row(spec: TaskSpec, k: int) -> dict[str, Any]:
    row = _row(spec, k, [np.nan, np.nan, np.nan, 0])
    return {**row, "AP": np.nan} if spec.multi else row


def _no_rows(spec: TaskSpec) -> tuple[dict[str, Any], ...]:
    return tuple(_no_row(spec, k) for k in range(len(spec.table)))


def _percent(values: Any, unit: float = 100) -> float:
    """Average what is defined, in percent; of nothing it is NaN, without numpy's warning."""
    values = np.asarray(values, dtype=float)
    values = values[~np.isnan(values)]
    return unit * float(values.mean()) if len(values) else float("nan")
