"""Read labels of tasks from files: the columns of a csv, and the ``attributes`` of a COCO json.

What is read here knows no model. Labels become indices of ``MetadataCatalog.get(dataset).task_classes``, which
:func:`d2_headadapt.data.task_datasets.settle_tasks` sets to the classes that the model predicts.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from string import Formatter
from typing import Any

from detectron2.data import MetadataCatalog
from detectron2.data.datasets import load_coco_json
from detectron2.utils.file_io import PathManager

from ..adapt.classes import ClassTable, did_you_mean
from ..errors import DatasetError
from ..key import DATASETS, TASKS, pairs
from .entry import DatasetEntry
from .foreign import as_recognised

MISSING = -1
"""In place of a class index: nobody labelled this."""

ATTRIBUTES = "attributes"
"""The key of a COCO json's images and annotations that holds their labels, by task."""


@dataclass(frozen=True)
class TaskFacts:
    """The facts that the whole file of a dataset, both parts of a split, says of one task.

    Args:
        level: ``"image"`` or ``"box"``.
        source: where its labels are, for messages: ``"column 'colour' of labels.csv"``.
        classes: distinct names, sorted; empty where the labels are indices.
        labels: how many images or boxes have one.
        multi: some have several.
    """

    level: str
    source: str
    classes: tuple[str, ...]
    labels: int
    multi: bool


Label = str | int
Found = list[Label] | None
"""The labels of one image or box: ``None`` where nobody labelled it."""


def survey(entry: DatasetEntry) -> dict[str, TaskFacts]:
    """Read the whole file of an entry once, for the classes of its tasks.

    Raises:
        DatasetError: a file that cannot be read, a column that it lacks, or a label of another type than a name or
            an index.
    """
    if not entry.tasks:
        return {}
    if entry.csv is not None:
        rows = _rows(entry)
        return {
            task: _facts("image", f"column {column!r} of {entry.csv}", [_cell(row[column], entry) for _, row in rows])
            for task, column in entry.tasks
        }
    content = _read_json(entry)
    found: dict[str, TaskFacts] = {}
    for task, level in entry.tasks:
        by_level = {
            holder: [_attribute(item, task, entry, f"{holder} {item.get('id')}") for item in content[key]]
            for holder, key in (("image", "images"), ("box", "annotations"))
        }
        used = [holder for holder, labels in by_level.items() if any(label is not None for label in labels)]
        if not level and len(used) > 1:
            raise DatasetError(
                f"{entry.labels}, task {task!r}",
                expected="attributes of either images or annotations",
                found="some of both",
                fix=f"Say which under {DATASETS.REGISTER}: {pairs({task: {'on': 'box'}}, 'tasks')}.",
            )
        level = level or (used[0] if used else "box")
        found[task] = _facts(level, f"attribute {task!r} of {entry.labels}", by_level[level])
    return found


def _facts(level: str, source: str, labels: Sequence[Found]) -> TaskFacts:
    known = [label for label in labels if label is not None]
    names = {value for label in known for value in label if isinstance(value, str)}
    return TaskFacts(level, source, tuple(sorted(names)), len(known), any(len(label) > 1 for label in known))


def load_labelled(entry: DatasetEntry) -> list[dict[str, Any]]:
    """Load dataset dicts with ``tasks``, indices of the metadata's classes; a task without a label is absent.

    Images of a csv have neither size nor annotations; detectron2's mapper writes their size when it reads them.

    Raises:
        DatasetError: a label that the classes lack (file, row or annotation, label and the nearest name are said), or
            images that are not there.
    """
    if not entry.tasks:
        plain: list[dict[str, Any]] = load_coco_json(entry.labels, entry.images, entry.name, list(entry.extra_keys))
        return plain
    metadata = MetadataCatalog.get(entry.name)
    coders = {task: _Coder(task, metadata.task_classes[task], metadata.task_kinds[task]) for task, _ in entry.tasks}
    return _load_csv(entry, coders) if entry.csv is not None else _load_json(entry, coders, metadata.task_levels)


class _Coder:
    """A coder of one task's labels as indices of its classes."""

    def __init__(self, task: str, names: Sequence[str], kind: str) -> None:
        self.task, self.kind = task, kind
        self.table = ClassTable(names, origin=f"task {task!r}") if names else None

    def __call__(self, labels: Found, place: str) -> int | list[int] | None:
        if labels is None or (self.kind == "single" and not labels):
            return None
        indices = [self._index(label, place) for label in labels]
        if self.kind == "multi":
            return sorted(set(indices))
        if len(indices) > 1:
            raise DatasetError(
                place,
                expected=f"one label for task {self.task!r}",
                found=repr(labels),
                fix=f"Set {TASKS[self.task].kind.set('multi')}, or another separator in the entry of "
                f"{DATASETS.REGISTER}.",
            )
        return indices[0]

    def _index(self, label: Label, place: str) -> int:
        size = len(self.table) if self.table else 0
        found = label if isinstance(label, int) else self.table.find(label) if self.table else None
        if found is not None and 0 <= found < size:
            return found
        near = did_you_mean(label, self.table.names) if isinstance(label, str) and self.table else ""
        raise DatasetError(
            place,
            expected=f"one of the {size} classes of task {self.task!r}, or its index",
            found=repr(label),
            fix=f"Correct the label, or add it to {TASKS[self.task].classes}.{near}",
        )


# --- csv


def _rows(entry: DatasetEntry) -> list[tuple[int, dict[str, str]]]:
    """Yield line number and cells of every row, after checking that the columns that the entry names are there."""
    path = entry.labels
    try:
        with PathManager.open(path, "r", encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True)
            lines = [(reader.line_num, cells) for cells in reader if cells]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise _unreadable(path, f"{type(error).__name__}: {error}", "a csv in UTF-8 with a header line") from error
    if len(lines) < 2:
        raise _unreadable(path, f"{len(lines)} lines", "a csv with a header line and rows")
    header = [cell.strip() for cell in lines[0][1]]
    for number, cells in lines[1:]:
        # A comma without quotes would shift every label after it.
        if len(cells) != len(header):
            raise _unreadable(f"{path}, line {number}", f"{len(cells)}", f"{len(header)} cells as in the header")
    for key, columns in (("tasks", [c for _, c in entry.tasks]), ("file", _columns_of(entry))):
        for column in columns:
            if header.count(column) != 1:
                raise DatasetError(
                    f"{path}, which dataset {entry.name!r} reads",
                    expected=f"one column {column!r}, which its {key} names",
                    found=f"{'two of them' if column in header else 'none'}; there are {', '.join(header)}",
                    fix=f"Correct {key} under {DATASETS.REGISTER}, or the file.{did_you_mean(column, header)}",
                )
    return [(number, dict(zip(header, cells, strict=True))) for number, cells in lines[1:]]


def _columns_of(entry: DatasetEntry) -> list[str]:
    try:
        return [name for _, name, _, _ in Formatter().parse(entry.file) if name is not None]
    except ValueError as error:
        raise DatasetError(
            f"dataset {entry.name!r}, file",
            expected='a pattern such as "{id}.jpg"',
            found=f"{entry.file!r} ({error})",
            fix=f"Correct it under {DATASETS.REGISTER}.",
        ) from error


def _cell(text: str, entry: DatasetEntry) -> Found:
    parts = [part.strip() for part in text.split(entry.separator)]
    known: list[Label] = [part for part in parts if not _is_missing(part, entry)]
    return known if known and not _is_missing(text, entry) else None


def _is_missing(text: str, entry: DatasetEntry) -> bool:
    """Tell a missing label; an empty one is none, whatever else the entry counts as one."""
    return not text.strip() or text.strip() in entry.missing


def _is_held_out(file_name: str, share: float, seed: int) -> bool:
    digest = hashlib.sha256(f"{seed}:{file_name}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64 < share


def _load_csv(entry: DatasetEntry, coders: Mapping[str, _Coder]) -> list[dict[str, Any]]:
    dicts: list[dict[str, Any]] = []
    lines: dict[str, int] = {}
    split = entry.split
    for number, row in _rows(entry):
        name = entry.file.format_map({key: value.strip() for key, value in row.items()})
        if name in lines:
            raise DatasetError(
                f"{entry.csv}, line {number}",
                expected="one row for each image",
                found=f"{name}, which line {lines[name]} has too",
                fix="Remove one of the two, or join their labels in one cell.",
            )
        lines[name] = number
        if split and _is_held_out(name, split.held_out, split.seed) != (split.part == "test"):
            continue
        place = f"{entry.csv}, line {number}"
        tasks = {task: coders[task](_cell(row[column], entry), place) for task, column in entry.tasks}
        dicts.append({"file_name": os.path.join(entry.images, name), "image_id": name, "tasks": _given(tasks)})
    if not dicts:
        raise _unreadable(entry.labels, f"no row in its {split.part if split else 'whole'} part", "rows in each part")
    gone = [one["file_name"] for one in dicts if "://" not in entry.images and not os.path.isfile(one["file_name"])]
    if gone:
        raise DatasetError(
            f"dataset {entry.name!r}, images",
            expected=f"the images of {entry.csv}",
            found=f"no file {gone[0]}; {len(gone)} of {len(dicts)} images are not there",
            fix=f"Correct images or file under {DATASETS.REGISTER}.",
        )
    return dicts


# --- COCO json


def _read_json(entry: DatasetEntry) -> dict[str, list[dict[str, Any]]]:
    path, expected = entry.labels, "a COCO json with images and annotations"
    try:
        with PathManager.open(path, "r", encoding="utf-8") as file:
            content = json.load(file)
    except (OSError, ValueError, RecursionError) as error:
        raise _unreadable(path, f"{type(error).__name__}: {error}", expected) from error
    for key in ("images", "annotations"):
        items = content.get(key) if isinstance(content, dict) else None
        if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
            raise _unreadable(path, f"no list of {key}", expected)
    return {key: content[key] for key in ("images", "annotations")}


def _attribute(item: Mapping[str, Any], task: str, entry: DatasetEntry, holder: str) -> Found:
    attributes = item.get(ATTRIBUTES) or {}
    value = attributes.get(task) if isinstance(attributes, Mapping) else attributes
    if value is None or (isinstance(value, str) and _is_missing(value, entry)):
        return None
    labels = value if isinstance(value, list) else [value]
    # CVAT writes a checkbox as true or false: two classes of these names.
    labels = [str(label).lower() if isinstance(label, bool) else label for label in labels]
    labels = [label for label in labels if not (isinstance(label, str) and _is_missing(label, entry))]
    if not labels and value:
        return None
    for label in labels:
        if not isinstance(label, (str, int)):
            raise DatasetError(
                f"{entry.labels}, {holder}",
                expected=f"a name, an index or a list of them as attribute {task!r}",
                found=f"{label!r} ({type(label).__name__})",
                fix="Write the name of the class, in quotes.",
            )
    return labels


def _load_json(entry: DatasetEntry, coders: Mapping[str, _Coder], levels: Mapping[str, str]) -> list[dict[str, Any]]:
    asked = list(entry.extra_keys)
    # The loader drops what it does not know: the labels, and the id that messages name.
    keys = [*asked, *(key for key in (ATTRIBUTES, "id") if key not in asked)]
    dicts: list[dict[str, Any]] = load_coco_json(entry.labels, entry.images, entry.name, keys)
    on_images = [task for task in coders if levels[task] == "image"]
    on_boxes = [task for task in coders if levels[task] == "box"]
    images = {item["id"]: item for item in _read_json(entry)["images"]} if on_images else {}

    def encode(item: Mapping[str, Any], tasks: Sequence[str], holder: str) -> dict[str, Any]:
        place = f"{entry.labels}, {holder}"
        return _given({task: coders[task](_attribute(item, task, entry, holder), place) for task in tasks})

    for one in dicts:
        if on_images:
            one["tasks"] = encode(images[one["image_id"]], on_images, f"image {one['image_id']}")
        for annotation in one["annotations"]:
            if on_boxes:
                annotation["tasks"] = encode(annotation, on_boxes, f"annotation {annotation.get('id')}")
            for key in (ATTRIBUTES, "id"):
                if key not in asked:
                    annotation.pop(key, None)
    return dicts


def _given(tasks: Mapping[str, Any]) -> dict[str, Any]:
    return {task: label for task, label in tasks.items() if label is not None}


def _unreadable(where: str, found: str, expected: str) -> DatasetError:
    error = DatasetError(where, expected=expected, found=found, fix="Correct the path or the file.")
    return as_recognised(where, error) if where.endswith(".json") else error
