"""Read class names from files: the ``categories`` of a COCO json, and plain lists of names.

A COCO json of real size is several hundred megabytes of annotations around a few kilobytes of categories, so these are
cut out of the file where that is safe, and the whole is parsed only where it is not.
"""

from __future__ import annotations

import codecs
import copy
import json
import logging
import mmap
import os
import re
from collections.abc import Sequence
from itertools import pairwise
from typing import IO, Any

from detectron2.utils.file_io import PathManager

from ..adapt.classes import shorten
from ..errors import ClassTableError, DatasetError
from ..key import Key
from .foreign import as_recognised

logger = logging.getLogger(__name__)
Category = dict[str, Any]

_KEY = b'"categories"'
_COLON = re.compile(rb"\s*:\s*")
_WINDOW = 1 << 16

_read: dict[str, tuple[tuple[int, ...], list[Category]]] = {}
"""Path -> what the file was like, and its categories: one load asks for them again and again."""


def read_categories(json_file: str) -> list[Category]:
    """Read the categories of a COCO json in the order of their ids: class i of the dataset is the i-th of them.

    A file that is as it was is not read again.

    Args:
        json_file: path or URI.

    Raises:
        DatasetError: the file cannot be read, is no JSON, or has no usable ``categories``.
    """
    try:
        local = PathManager.get_local_path(json_file)
        now = os.stat(local)
    except OSError as error:
        raise _unreadable(json_file, f"{type(error).__name__}: {error}") from error
    state = (now.st_ino, now.st_mtime_ns, now.st_size)
    if _read.get(json_file, (None,))[0] != state:
        _read[json_file] = (state, _parse(json_file, local))
    return copy.deepcopy(_read[json_file][1])


def _parse(json_file: str, local: str) -> list[Category]:
    payload: Any = None
    try:
        with open(local, "rb") as file:
            categories = _cut_out(file)
            if categories is None:
                file.seek(0)
                payload = json.loads(file.read())
    except OSError as error:
        raise _unreadable(json_file, f"{type(error).__name__}: {error}") from error
    except (ValueError, RecursionError) as error:
        raise _unreadable(json_file, f"damaged JSON: {error}") from error
    if categories is None:
        categories = payload.get("categories") if isinstance(payload, dict) else None
    return _by_id(categories, json_file)


def keypoint_names(categories: Sequence[Category], json_file: str) -> list[str] | None:
    """Read the keypoints that the categories declare, or ``None``; two different lists are an error."""
    first: Category | None = None
    for category in categories:
        if not category.get("keypoints"):
            continue
        if first is not None and category["keypoints"] != first["keypoints"]:
            raise DatasetError(
                json_file,
                expected="one list of keypoints for all categories",
                found=f"different lists in {first['name']!r} and {category['name']!r}",
                fix="Keep the categories of one of the lists in this file.",
            )
        first = first or category
    return None if first is None else list(first["keypoints"])


def read_names(path: str, space: str, key: Key) -> list[Any]:
    """Read the names in a .json (a list, ``{"names": [...]}`` or a COCO json) or in a .txt (one a line).

    Args:
        path: the file.
        space: which names of a COCO json: keypoints for ``"keypoint"``, else those of the categories.
        key: the config key that names the file, for messages.

    Raises:
        ClassTableError: a file of another kind, or one that holds no list.
        DatasetError: a COCO json without usable categories.
    """
    extension = os.path.splitext(path)[1].lower()
    if extension not in (".json", ".txt"):
        raise ClassTableError(
            key, expected="a .json or .txt file", found=path, fix="Write the names one a line into a .txt file."
        )
    try:
        with open(PathManager.get_local_path(path), "rb") as file:
            if extension == ".txt":
                return _lines(file.read().decode("utf-8-sig"), path)
            categories = _cut_out(file)
            file.seek(0)
            payload = {"categories": categories} if categories is not None else json.loads(file.read())
    except OSError as error:
        raise ClassTableError(key, expected="a readable file", found=str(error), fix="Correct the path.") from error
    except (ValueError, RecursionError) as error:
        raise ClassTableError(
            f"{key}, {path}", expected="valid JSON or text in UTF-8", found=str(error), fix="Write the file anew."
        ) from error
    names = payload.get("names") if isinstance(payload, dict) else payload
    if names is None and "categories" in payload:
        found = _by_id(payload["categories"], path)
        names = keypoint_names(found, path) if space == "keypoint" else [category["name"] for category in found]
    if not isinstance(names, list):
        raise ClassTableError(
            f"{key}, {path}",
            expected='a list of names, {"names": [...]} or a COCO json (for keypoints, one that declares them)',
            found=f"a JSON {type(payload).__name__} without them",
            fix='Write the file as ["first class", "second class"].',
        )
    return names


def _lines(text: str, path: str) -> list[str]:
    r"""Read the names of a .txt: a line that starts with ``#`` is a comment, and one with ``\#`` a name with ``#``."""
    # Not splitlines(), which parts a name at characters that nobody sees.
    lines = [line.strip() for line in text.replace("\r\n", "\n").replace("\r", "\n").split("\n")]
    passed = [line for line in lines if re.match(r"#[^\s#!]", line)]
    if passed:
        logger.warning(
            "%s: %s taken as a comment; write \\%s where it is a class, or '# ' before a comment.",
            path,
            f"{shorten(passed)} {'is' if len(passed) == 1 else 'are each'}",
            shorten(passed[:1]),
        )
    return [line[1:] if line.startswith("\\#") else line for line in lines if line and not line.startswith("#")]


def _cut_out(file: IO[bytes]) -> Any:
    """Cut the value of the only key ``categories`` out of a JSON file; ``None`` where the whole must be parsed."""
    if os.fstat(file.fileno()).st_size == 0:
        return None
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        starts: list[int] = []
        at = data.find(_KEY)
        while at >= 0 and len(starts) < 2:
            # A quoted string that no colon follows is a value, and an escaped quote inside a string has a backslash.
            colon = _COLON.match(data, at + len(_KEY))
            if colon:
                starts.append(colon.end())
            at = data.find(_KEY, at + len(_KEY))
        value = _decode_at(data, starts[0]) if len(starts) == 1 else None
    return value if _are_categories(value) else None


def _decode_at(data: mmap.mmap, start: int) -> Any:
    length = _WINDOW
    while True:
        # The incremental decoder keeps back a character that the end of the window cuts in two.
        text = codecs.getincrementaldecoder("utf-8")().decode(data[start : start + length])
        try:
            return json.JSONDecoder().raw_decode(text)[0]
        except json.JSONDecodeError:
            if start + length >= len(data):
                return None
            length *= 4


def _are_categories(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, dict) and {"id", "name"} <= item.keys() for item in value)


def _by_id(categories: Any, json_file: str) -> list[Category]:
    if not _are_categories(categories) or not categories:
        raise _unreadable(json_file, "no list of categories with id and name")
    try:
        ordered = sorted(categories, key=lambda category: category["id"])
    except TypeError as error:
        raise _unreadable(json_file, f"category ids that have no order ({error})") from error
    for one, other in pairwise(ordered):
        if one["id"] == other["id"]:
            raise _unreadable(json_file, f"the category id {one['id']!r} for {one['name']!r} and {other['name']!r}")
    return ordered


def _unreadable(json_file: str, found: str) -> DatasetError:
    error = DatasetError(
        json_file,
        expected='a COCO json with "categories": [{"id": 1, "name": "..."}, ...]',
        found=found,
        fix="Correct the path or the file.",
    )
    return as_recognised(json_file, error)
