"""One entry of ``DATASETS.REGISTER``: a COCO json dataset that a yaml declares."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from .classes import did_you_mean
from .errors import ConfigError


@dataclass(frozen=True)
class DatasetEntry:
    """One entry of DATASETS.REGISTER, checked; equal entries register the same dataset."""

    name: str
    json: str
    images: str
    thing_classes: tuple[str, ...] | None = None
    keypoint_names: tuple[str, ...] | None = None
    keypoint_flip_map: tuple[tuple[str, str], ...] | None = None
    extra_keys: tuple[str, ...] = ()

    @property
    def metadata(self) -> dict[str, Any]:
        # Lists, because load_coco_json sets thing_classes to a list later and detectron2 wants old and new to be equal.
        metadata: dict[str, Any] = {"json_file": self.json, "image_root": self.images, "evaluator_type": "coco"}
        for key in ("thing_classes", "keypoint_names", "keypoint_flip_map"):
            value = getattr(self, key)
            if value is not None:
                metadata[key] = list(value)
        return metadata


def absolute_entries(entries: Sequence[Any], base_dir: str) -> list[Any]:
    """Entries of ``DATASETS.REGISTER`` with ``json`` and ``images`` taken as relative to ``base_dir``.

    Absolute paths and URIs stay, ``~`` is the home folder. What is no mapping or no string stays as it is, for
    :func:`register_datasets` to refuse.
    """
    resolved: list[Any] = []
    for entry in entries:
        if isinstance(entry, Mapping):
            paths = {key: _absolute(entry[key], base_dir) for key in ("json", "images") if key in entry}
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


def checked_entry(raw: Any, place: str) -> DatasetEntry:
    keys = [f.name for f in fields(DatasetEntry)]
    if not isinstance(raw, Mapping):
        raise ConfigError(
            place,
            expected="a mapping with name, json and images",
            found=f"{raw!r} ({type(raw).__name__})",
            fix="Write {name: my_train, json: train.json, images: train/}.",
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
    for key in ("name", "json", "images"):
        if not isinstance(values.get(key), str) or not values[key]:
            found = f"{values[key]!r} ({type(values[key]).__name__})" if key in values else "nothing"
            raise ConfigError(f"{place}.{key}", expected="a string", found=found, fix=f"Give {key}, in quotes.")
    for key in ("thing_classes", "keypoint_names", "extra_keys"):
        if key in values:
            values[key] = _strings(values[key], f"{place}.{key}")
    if "keypoint_flip_map" in values:
        values["keypoint_flip_map"] = _flip_map(values, f"{place}.keypoint_flip_map")
    return DatasetEntry(**values)


def _strings(value: Any, place: str) -> tuple[str, ...]:
    if not isinstance(value, (list, tuple)) or not all(isinstance(item, str) for item in value):
        raise ConfigError(place, expected="a list of strings", found=repr(value), fix="Put each name in quotes.")
    return tuple(value)


def _flip_map(values: Mapping[str, Any], place: str) -> tuple[tuple[str, str], ...]:
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
