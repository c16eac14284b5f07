"""Judge a model with added classes on test sets that label old classes, new ones, or both.

A detection's class index is one of the extended table, a test set's one of its own list: names bring them together.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.evaluation import DatasetEvaluator
from tabulate import tabulate

from ..adapt.classes import ClassTable
from ..config.keep import KeepSettings
from ..data.datasets import dataset_table

PARTS = ("old", "new", "all")
SURE = 0.5
"""Score from which a new detection on a set that labels no new class is counted."""


class KeepEvaluator(DatasetEvaluator):
    """Hands detections of the test set's classes to its evaluator, and splits the result into old and new classes.

    Adds ``keep`` to the results: for ``bbox`` and ``segm`` the mean AP of ``old``, ``new`` and ``all`` classes that the
    set labels, and ``new >= 0.5``: how many new detections of at least 0.5 there were on a set without new classes.

    Args:
        judge: of the test set.
        table: what the model predicts, old classes first.
        old: how many of them are old.
        labels: the test set's classes.
    """

    def __init__(self, judge: DatasetEvaluator, table: ClassTable, old: int, labels: ClassTable) -> None:
        self._judge = judge
        self._old = old
        self._labels = labels
        rows = {name: row for row, name in enumerate(labels.names)}
        self._lookup = torch.tensor([rows.get(name, -1) for name in table.names], dtype=torch.int64)
        self._old_names = set(table.names[:old])
        self._sure = 0

    @property
    def labels_new(self) -> bool:
        """Whether the test set labels a new class."""
        return any(name not in self._old_names for name in self._labels.names)

    def reset(self) -> None:
        self._judge.reset()
        self._sure = 0

    def process(self, inputs: Any, outputs: Sequence[Mapping[str, Any]]) -> None:
        own = []
        for output in outputs:
            found = output["instances"]
            self._sure += int(((found.pred_classes >= self._old) & (found.scores >= SURE)).sum())
            rows = self._lookup.to(found.pred_classes.device)[found.pred_classes]
            kept = found[rows >= 0]
            kept.pred_classes = rows[rows >= 0]
            own.append({**output, "instances": kept})
        self._judge.process(inputs, own)

    def evaluate(self) -> dict[str, Any] | None:
        results: dict[str, Any] | None = self._judge.evaluate()
        if not results:
            return results
        split: dict[str, float] = {}
        for kind in ("bbox", "segm"):
            if kind in results:
                split.update(self._split(kind, results[kind]))
        if not self.labels_new:
            split[f"new >= {SURE}"] = float(self._sure)
        return {**results, "keep": split}

    def _split(self, kind: str, result: Mapping[str, float]) -> dict[str, float]:
        names = self._labels.names
        # detectron2 gives one class no AP of its own.
        by_name = {name: result.get(f"AP-{name}", result["AP"] if len(names) == 1 else math.nan) for name in names}
        groups = {
            "old": [ap for name, ap in by_name.items() if name in self._old_names],
            "new": [ap for name, ap in by_name.items() if name not in self._old_names],
            "all": list(by_name.values()),
        }
        return {f"{kind} {part}": _mean(values) for part, values in groups.items() if values}


def judged_by_name(cfg: CfgNode, dataset_name: str, judge: DatasetEvaluator) -> DatasetEvaluator:
    """Put ``judge`` behind a :class:`KeepEvaluator` where ``MODEL.HEAD_ADAPT.KEEP`` adds classes.

    Args:
        cfg: settled.
        dataset_name: the test set.
        judge: of the test set's own classes.
    """
    keep = KeepSettings.from_config(cfg)
    labels = None if keep is None else dataset_table(dataset_name)
    return judge if keep is None or labels is None else KeepEvaluator(judge, keep.table, len(keep.old), labels)


def _mean(values: Sequence[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else math.nan


def keep_table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Write AP of old, new and all classes, a row for each test set; empty where no set was judged so.

    Args:
        results: by test set, as :class:`KeepEvaluator` gives them.
    """
    rows = []
    for name, result in results.items():
        split = result.get("keep", {})
        for kind in ("bbox", "segm"):
            if f"{kind} all" in split:
                values = [split.get(f"{kind} {part}") for part in PARTS]
                sure = split.get(f"new >= {SURE}")
                rows.append([name, kind, *(f"{v:.2f}" if v is not None else "-" for v in values),
                             "-" if sure is None else int(sure)])  # fmt: skip
    if not rows:
        return ""
    headers = ["test set", "AP of", *PARTS, f"new detections >= {SURE} where no new class is labelled"]
    return str(tabulate(rows, headers=headers, disable_numparse=True))
