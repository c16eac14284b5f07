"""Write metrics of tasks to files: JSON, a Markdown table for each task, a picture of each confusion matrix."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray
from tabulate import tabulate

from .metrics import TaskMetrics

MOST_NAMES = 40
"""With more classes than this, names and counts would not be legible, and the picture shows colours alone."""


def metrics_json(dataset: str, found: Sequence[TaskMetrics], coverage: Mapping[str, float]) -> str:
    """Write everything that was measured; numbers that are undefined are ``null``.

    Args:
        dataset: its name.
        found: the tasks.
        coverage: of box tasks, percent of the labelled boxes that some detection matched.
    """
    tasks = {
        m.spec.name: {
            "on": m.spec.on,
            "kind": m.spec.kind,
            "labelled": m.labelled,
            **({"coverage": coverage[m.spec.name]} if m.spec.name in coverage else {}),
            **m.summary,
            "majority": m.majority,
            "classes": list(m.per_class),
            "confusion": m.confusion.tolist(),
        }
        for m in found
    }
    # NaN is no JSON, though Python writes it.
    return json.dumps(_defined({"dataset": dataset, "tasks": tasks}), indent=1, ensure_ascii=False) + "\n"


def metrics_markdown(dataset: str, found: Sequence[TaskMetrics], coverage: Mapping[str, float]) -> str:
    """Write a table of all tasks, then one of its classes for each task."""
    columns = ["top1", "macro_f1", "mAP", "majority", "coverage"]
    rows = []
    for m in found:
        numbers = {**m.summary, "majority": m.majority, "coverage": coverage.get(m.spec.name, math.nan)}
        rows.append([m.spec.name, m.spec.on, m.spec.kind, m.labelled, *(_cell(numbers.get(c)) for c in columns)])
    parts = [f"# Tasks on {dataset}", _table(["task", "on", "kind", "labels", *columns], rows)]
    for m in found:
        headers = list(m.per_class[0])
        body = [[_cell(row[header]) for header in headers] for row in m.per_class]
        parts += [f"## {m.spec.name}", _table(headers, body)]
    return "\n\n".join(parts) + "\n"


def confusion_picture(metrics: TaskMetrics) -> NDArray[np.uint8]:
    """Draw the confusion matrix as an RGB image (H, W, 3).

    Each row is coloured by its shares, so that rare classes are seen. A multi-label task has a row for each class, with
    its things that are present and found, present and missed, absent and claimed, absent and left alone.
    """
    counts, rows = metrics.confusion, list(metrics.spec.table.names)
    columns = rows
    if metrics.spec.multi:
        counts = np.stack([counts[:, 1, 1], counts[:, 1, 0], counts[:, 0, 1], counts[:, 0, 0]], axis=1)
        columns = ["found", "missed", "claimed", "left alone"]
    legible = len(rows) <= MOST_NAMES
    side = 2.2 + (0.34 * len(rows) if legible else 6.0)
    figure = Figure(figsize=(max(side, 4.5), max(side, 3.0)), dpi=100, layout="constrained")
    canvas: Any = FigureCanvasAgg(figure)  # matplotlib types it in part.
    axes = figure.subplots()
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="auto", interpolation="nearest")
    axes.set_title(metrics.spec.name)
    axes.set_ylabel("label")
    axes.set_xlabel("prediction")
    if legible:
        axes.set_yticks(range(len(rows)), rows, parse_math=False)
        axes.set_xticks(range(len(columns)), columns, rotation=90, parse_math=False)
        for (i, j), count in np.ndenumerate(counts):
            if count:
                axes.text(j, i, f"{count}", ha="center", va="center", color="w" if shares[i, j] > 0.5 else "k", size=7)
    canvas.draw()
    picture: NDArray[np.uint8] = np.asarray(canvas.buffer_rgba())[..., :3].copy()
    return picture


def file_stem(*parts: str) -> str:
    """Make the start of a file name of dataset and task names: a dataset may be called ``mine/val``."""
    return "_".join(re.sub(r"[^\w.-]+", "_", part) for part in parts)


def _defined(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _defined(v) for key, v in value.items()}
    if isinstance(value, list):
        return [_defined(v) for v in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def _cell(value: Any) -> str:
    if isinstance(value, float) or value is None:
        return "-" if value is None or math.isnan(value) else f"{value:.1f}"
    # A class may hold a bar, which would end its cell.
    return str(value).replace("|", r"\|")


def _table(headers: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    text: str = tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True)
    return text
