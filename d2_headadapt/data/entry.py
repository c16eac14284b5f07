"""An entry of ``DATASETS.REGISTER``: a COCO json, or a csv of image labels, that a yaml declares."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from ..adapt.classes import did_you_mean
from ..errors import ConfigError
from ..key import Either, Key, pairs

MISSING = ("", "NA")
"""Values that stand for a label that nobody gave, unless an entry names others."""

_OF_JSON = ("thing_classes", "keypoint_names", "keypoint_flip_map", "extra_keys")
_OF_CSV = ("file", "separator", "split")


@dataclass(frozen=True)
class Split:
    """One part of a csv: a row is held out by a hash of its file name and ``seed``, whatever its place in the file.

    Args:
        part: ``"train"``, or ``"test"`` for the rows that are held out.
        held_out: share of the files that are, between 0 and 1.
        seed: of the hash.
    """

    part: str
    held_out: float = 0.25
    seed: int = 0


@dataclass(frozen=True)
class DatasetEntry:
    """One entry of DATASETS.REGISTER, checked; equal entries register the same dataset.

    Args:
        name: of the dataset in detectron2's catalog.
        json, csv: one of them is the file of labels.
        images: folder that the file names of images start at.
        thing_classes: class names by ascending category id, where the json has none to trust.
        keypoint_names: names of the keypoints.
        keypoint_flip_map: pairs of keypoint names that change places when an image is mirrored.
        extra_keys: keys of each annotation that the dataset dicts keep.
        tasks: pairs of a task and the column that it is in (csv), or its level ``"image"``, ``"box"`` or ``""`` for
            what the file shows (json).
        file: pattern of a row's file name, ``"{id}.jpg"`` with a column ``id``.
        missing: values of a label that stand for none.
        separator: between the labels of a cell.
        split: ``None`` for all rows.
    """

    name: str
    json: str | None
    images: str
    csv: str | None = None
    thing_classes: tuple[str, ...] | None = None
    keypoint_names: tuple[str, ...] | None = None
    keypoint_flip_map: tuple[tuple[str, str], ...] | None = None
    extra_keys: tuple[str, ...] = ()
    tasks: tuple[tuple[str, str], ...] = ()
    file: str = ""
    missing: tuple[str, ...] = MISSING
    separator: str = "|"
    split: Split | None = None

    @property
    def labels(self) -> str:
        """The file of labels."""
        return self.json if self.json is not None else self.csv or ""

    @property
    def metadata(self) -> dict[str, Any]:
        """The facts that detectron2's ``MetadataCatalog`` is told of the dataset."""
        if self.csv is not None:
            return {"csv_file": self.csv, "image_root": self.images, "evaluator_type": "tasks"}
        # Lists, because load_coco_json sets thing_classes to a list later and detectron2 wants old and new to be equal.
        metadata: dict[str, Any] = {"json_file": self.json, "image_root": self.images, "evaluator_type": "coco"}
        for key in ("thing_classes", "keypoint_names", "keypoint_flip_map"):
            value = getattr(self, key)
            if value is not None:
                metadata[key] = list(value)
        return metadata


def absolute_entries(entries: Sequence[Any], base_dir: str) -> list[Any]:
    """Make ``json``, ``csv`` and ``images`` of ``DATASETS.REGISTER`` entries absolute, from ``base_dir``.

    Absolute paths and URIs stay, ``~`` is the home folder. What is no mapping or no string stays as it is, for
    :func:`register_datasets` to refuse.
    """
    resolved: list[Any] = []
    for entry in entries:
        if isinstance(entry, Mapping):
            paths = {key: _absolute(entry[key], base_dir) for key in ("json", "csv", "images") if key in entry}
            entry = {**entry, **paths}
        resolved.append(entry)
    return resolved


def _absolute(path: Any, base_dir: str) -> Any:
    if not isinstance(path, str) or not path or "://" in path:
        return path
    path = os.path.expanduser(path)
    if os.path.isabs(path):
        return path
    return f"{base_dir.rstrip('/')}/{path}" if "://" in base_dir else os.path.abspath(os.path.join(base_dir, path))


def checked_entry(raw: Any, place: Key) -> DatasetEntry:
    keys = [f.name for f in fields(DatasetEntry)]
    if not isinstance(raw, Mapping):
        raise ConfigError(
            place,
            expected="a mapping with name, json and images",
            found=f"{raw!r} ({type(raw).__name__})",
            fix=f"Write {pairs({'name': 'my_train', 'json': 'train.json', 'images': 'train/'})}.",
        )
    for key in raw:
        if key not in keys:
            raise ConfigError(
                place,
                expected=f"the keys {', '.join(keys)}",
                found=repr(key),
                fix=f"Remove or rename it.{did_you_mean(str(key), keys)}",
            )
    values = {key: value for key, value in raw.items() if value is not None}
    labels = "csv" if "csv" in values else "json"
    foreign = [key for key in (*(_OF_CSV if labels == "json" else _OF_JSON), "json") if key in values and key != labels]
    if foreign:
        raise ConfigError(
            place[foreign[0]],
            expected=f"no such key in an entry with {labels}",
            found=repr(values[foreign[0]]),
            fix=f"Remove it, or {labels}.",
        )
    for key in ("name", labels, "images", *(("file",) if labels == "csv" else ())):
        if not isinstance(values.get(key), str) or not values[key]:
            found = f"{values[key]!r} ({type(values[key]).__name__})" if key in values else "nothing"
            raise ConfigError(place[key], expected="a string", found=found, fix=f"Give {key}, in quotes.")
    for key in ("thing_classes", "keypoint_names", "extra_keys"):
        if key in values:
            values[key] = _strings(values[key], place[key])
    if "keypoint_flip_map" in values:
        values["keypoint_flip_map"] = _flip_map(values, place.keypoint_flip_map)
    if "missing" in values:
        one = values["missing"]
        values["missing"] = _strings([one] if isinstance(one, str) else one, place.missing)
    if "separator" in values and (not isinstance(values["separator"], str) or not values["separator"]):
        raise ConfigError(
            place.separator, expected="a string", found=repr(values["separator"]), fix='Write "|", in quotes.'
        )
    values["split"] = _split(values.get("split"), place.split)
    values["tasks"] = _tasks(values.get("tasks"), labels, place.tasks)
    return DatasetEntry(**{"json": None, **values})


def _split(value: Any, place: Key) -> Split | None:
    if value is None:
        return None
    keys = [f.name for f in fields(Split)]
    found = {"held_out": 0.25, "seed": 0, **value} if isinstance(value, Mapping) else {}
    share, seed = found.get("held_out"), found.get("seed")
    good = (
        set(found) == set(keys)
        and found["part"] in ("train", "test")
        and isinstance(share, float)
        and 0 < share < 1
        and isinstance(seed, int)
    )
    if not good:
        part = Either("part: test", 'part="test"')
        raise ConfigError(
            place,
            expected="part (train or test), held_out (a share between 0 and 1) and seed (a whole number)",
            found=repr(value),
            fix=f"Write {pairs({'part': 'train', 'held_out': 0.25, 'seed': 0})}, and "
            f"{part} in the entry that evaluates.",
        )
    return Split(**found)


def _tasks(value: Any, labels: str, place: Key) -> tuple[tuple[str, str], ...]:
    """Pair each task with its column (csv) or level (json, empty where the file shall tell)."""
    if isinstance(value, (list, tuple)):
        value = {task: task if labels == "csv" else "" for task in _strings(value, place)}
    if not value and labels == "json":
        return ()
    wants, example = "a mapping from tasks to columns", pairs({"colour": "colour_column"})
    if labels == "json":
        wants = f"a list of tasks, or a mapping from tasks to {pairs({'on': 'image'})} or {pairs({'on': 'box'})}"
        example = pairs({"colour": {"on": "box"}})
        if isinstance(value, Mapping):
            # A bare `on` is a truth value in YAML 1.1.
            value = {
                task: one.get("on", one.get(True)) if isinstance(one, Mapping) else one for task, one in value.items()
            }
    good = isinstance(value, Mapping) and value and all(isinstance(s, str) for pair in value.items() for s in pair)
    if not good or (labels == "json" and not set(value.values()) <= {"image", "box", ""}):
        raise ConfigError(
            place, expected=wants, found="nothing" if value is None else repr(value), fix=f"Write {example}."
        )
    return tuple(value.items())


def _strings(value: Any, place: Key) -> tuple[str, ...]:
    if not isinstance(value, (list, tuple)) or not all(isinstance(item, str) for item in value):
        raise ConfigError(place, expected="a list of strings", found=repr(value), fix="Put each name in quotes.")
    return tuple(value)


def _flip_map(values: Mapping[str, Any], place: Key) -> tuple[tuple[str, str], ...]:
    value = values["keypoint_flip_map"]
    pairs = [_strings(pair, place) for pair in value] if isinstance(value, (list, tuple)) else [()]
    names = values.get("keypoint_names")
    for pair in pairs:
        unknown = [name for name in pair if names is not None and name not in names]
        if len(pair) != 2 or unknown:
            raise ConfigError(
                place,
                expected="pairs of keypoint names",
                found=f"{unknown[0]!r}, which keypoint_names has not" if unknown else repr(value),
                fix=f"Write [[left_eye, right_eye], ...].{did_you_mean(unknown[0], names or ()) if unknown else ''}",
            )
    return tuple((pair[0], pair[1]) for pair in pairs)
