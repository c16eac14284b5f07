"""Read the labels of a dataset as arrays, in one pass over a COCO json or from detectron2's dataset dicts.

A json of COCO's size is half a gigabyte, and parsed whole several times that: here one annotation is parsed at a time,
and of each only what the checks look at is kept, so that the peak is the text twice and about 200 bytes an annotation.
Polygons are most of the text, and are counted rather than parsed: that takes half the time.
"""

from __future__ import annotations

import json
import re
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

import numpy as np
from detectron2.structures import BoxMode
from detectron2.utils.file_io import PathManager
from numpy.typing import NDArray

from ..data.foreign import as_recognised
from ..errors import DatasetError

MASK_NONE, MASK_POLYGON, MASK_RLE, MASK_BROKEN = range(4)
"""What an annotation has for a mask; broken is a list in which no polygon has three points."""
BOX_GOOD, BOX_BROKEN, BOX_OTHER = range(3)
"""Four numbers; something else or nothing; a rotated box, which nothing here looks at."""
VALUE_GOOD, VALUE_NONE, VALUE_WRONG = range(3)
"""A number; not there; something else, such as a number written as text."""

_NUMBERS = r"[-+0-9.eE, \t\n\r]*"
# Inside a JSON string the quotes would have backslashes before them, so this is always a key.
_POLYGONS = re.compile(rf'"segmentation"\s*:\s*(\[\s*\[{_NUMBERS}\](?:\s*,\s*\[{_NUMBERS}\])*\s*\])')
_LISTS = ("images", "annotations", "categories")
_SPACE = re.compile(r"[ \t\n\r]*")
_decode = json.JSONDecoder().raw_decode


@dataclass
class Labels:
    """N images, M annotations and K classes of one dataset.

    Args:
        source: the file, or what else they were read from, for messages.
        ids: what a class is called in an annotation, K of them in class order.
        names: names of the K classes; from a json whatever stands there, which need not be strings.
        categories: of the json, as they stand there; empty where there is no json.
        images: ids of the images. ``files``: their file names, without the folder where ``source`` is a json.
        sizes: (N, 2) width and height in pixels, NaN where they are not said.
        labelled: there is a list of annotations, be it empty.
        annotations: ids of the annotations, ``None`` where one has none.
        image, category: (M,) index of the image and of the class, -1 where ``image_id`` or ``category_id`` names none.
        image_id, category_id: what the annotations say.
        boxes: (M, 4) x, y, width, height in pixels. ``box_kind``: (M,) one of ``BOX_...``.
        crowd, ignore: (M,) flags. ``mask``: (M,) one of ``MASK_...``.
        keypoints, visible: (M,) how many numbers the list of keypoints has, and how many points in it are labelled.
        area, crowd_said, count: (M,) one of ``VALUE_...``: what ``area``, ``iscrowd`` and ``num_keypoints`` are.
        from_json: it was read from a json, whose mistakes detectron2's loader would meet.
        keys: what the file, or the first dict, has at its top.
    """

    source: str
    ids: list[Any] = field(default_factory=list)
    names: list[Any] = field(default_factory=list)
    categories: list[Mapping[str, Any]] = field(default_factory=list)
    images: list[Any] = field(default_factory=list)
    files: list[str] = field(default_factory=list)
    sizes: NDArray[np.float64] = field(default_factory=lambda: np.zeros((0, 2)))
    labelled: bool = True
    annotations: list[Any] = field(default_factory=list)
    image_id: list[Any] = field(default_factory=list)
    category_id: list[Any] = field(default_factory=list)
    image: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    category: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    boxes: NDArray[np.float64] = field(default_factory=lambda: np.zeros((0, 4)))
    box_kind: NDArray[np.uint8] = field(default_factory=lambda: np.zeros(0, np.uint8))
    crowd: NDArray[np.bool_] = field(default_factory=lambda: np.zeros(0, bool))
    ignore: NDArray[np.bool_] = field(default_factory=lambda: np.zeros(0, bool))
    mask: NDArray[np.uint8] = field(default_factory=lambda: np.zeros(0, np.uint8))
    keypoints: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    visible: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    area: NDArray[np.uint8] = field(default_factory=lambda: np.zeros(0, np.uint8))
    crowd_said: NDArray[np.uint8] = field(default_factory=lambda: np.zeros(0, np.uint8))
    count: NDArray[np.uint8] = field(default_factory=lambda: np.zeros(0, np.uint8))
    from_json: bool = True
    keys: list[str] = field(default_factory=list)

    @property
    def objects(self) -> NDArray[np.bool_]:
        """Mask (M,) of the annotations that training sees: in an image that is there, of a known class, no crowd."""
        return (self.image >= 0) & (self.category >= 0) & ~self.crowd

    def annotation(self, m: int) -> str:
        """Describe annotation ``m`` for a message: its id, its image and the image's file."""
        i = int(self.image[m])
        file = f" ({self.files[i]})" if i >= 0 else ""
        named = "an annotation" if self.annotations[m] is None else f"annotation {self.annotations[m]!r}"
        return f"{named} of image {self.image_id[m]!r}{file}"


_VALUES = {"area": "area", "crowd_said": "iscrowd", "count": "num_keypoints"}


class _Columns:
    """A collection of annotations in columns; memory is a few machine numbers each."""

    def __init__(self) -> None:
        self.ids: list[Any] = []
        self.image_id: list[Any] = []
        self.category_id: list[Any] = []
        self.boxes = array("d")
        self.small = {key: bytearray() for key in ("box_kind", "crowd", "ignore", "mask", *_VALUES)}
        self.keypoints, self.visible = array("l"), array("l")

    def add(self, one: Mapping[str, Any], image_id: Any, modes: bool = False) -> None:
        self.ids.append(one.get("id"))
        self.image_id.append(image_id)
        self.category_id.append(one.get("category_id"))
        kind, box = _box(one, modes)
        self.boxes.extend(box)
        small = self.small
        small["box_kind"].append(kind)
        small["crowd"].append(bool(one.get("iscrowd")))
        small["ignore"].append(bool(one.get("ignore")))
        small["mask"].append(_mask_kind(one.get("segmentation")))
        for key, name in _VALUES.items():
            small[key].append(_value_kind(one.get(name)))
        points = one.get("keypoints") or ()
        is_list = isinstance(points, (list, tuple, np.ndarray))
        self.keypoints.append(len(points) if is_list else -1)
        self.visible.append(sum(1 for v in points[2::3] if v) if is_list and len(points) else 0)

    def fill(self, labels: Labels) -> None:
        labels.annotations, labels.image_id, labels.category_id = self.ids, self.image_id, self.category_id
        labels.boxes = np.array(self.boxes, np.float64).reshape(-1, 4)
        for key, values in self.small.items():
            column = np.frombuffer(bytes(values), np.uint8)
            setattr(labels, key, column.astype(bool) if key in ("crowd", "ignore") else column)
        labels.keypoints, labels.visible = np.array(self.keypoints, np.int64), np.array(self.visible, np.int64)
        labels.image = _positions(labels.image_id, labels.images)
        labels.category = _positions(labels.category_id, labels.ids)


_NO_BOX = array("d", [float("nan")] * 4)


def _box(one: Mapping[str, Any], modes: bool) -> tuple[int, array[float]]:
    box = one.get("bbox")
    try:
        if modes and box is not None and one.get("bbox_mode", BoxMode.XYWH_ABS) != BoxMode.XYWH_ABS and len(box) == 4:
            box = BoxMode.convert([float(v) for v in box], one["bbox_mode"], BoxMode.XYWH_ABS)
        numbers = array("d", box)  # type: ignore[arg-type]  # what is no list of numbers raises below
    except (TypeError, ValueError, OverflowError, AssertionError, NotImplementedError):
        return BOX_BROKEN, _NO_BOX
    if len(numbers) == 4:
        return BOX_GOOD, numbers
    return (BOX_OTHER if len(numbers) == 5 else BOX_BROKEN), _NO_BOX


def _value_kind(value: Any) -> int:
    if value is None:
        return VALUE_NONE
    return VALUE_GOOD if isinstance(value, Real) and value == value else VALUE_WRONG


def _mask_kind(mask: Any) -> int:
    if isinstance(mask, bool):
        return MASK_POLYGON if mask else MASK_BROKEN  # See _without_polygons.
    # An empty list or mapping counts as none, as detectron2 does.
    if mask is None or (isinstance(mask, (list, dict, str)) and not mask):
        return MASK_NONE
    if isinstance(mask, list):
        good = any(isinstance(p, (list, np.ndarray)) and len(p) >= 6 and len(p) % 2 == 0 for p in mask)
        return MASK_POLYGON if good else MASK_BROKEN
    return MASK_RLE


def _positions(values: Sequence[Any], among: Sequence[Any]) -> NDArray[np.int64]:
    """Find the index in ``among`` of each value, the last of equals as in a COCO index, and -1 where it is not."""
    index = {_hashable(one): i for i, one in enumerate(among)}
    return np.fromiter((index.get(_hashable(v), -1) for v in values), np.int64, len(values))


def _hashable(value: Any) -> Any:
    # A function's dataset may hold numpy's integers, which detectron2 takes as well.
    value = value.item() if isinstance(value, np.generic) else value
    return value if isinstance(value, (int, str, float)) or value is None else repr(value)


def read_coco(path: str) -> Labels:
    """Read the labels in a COCO json, an annotation at a time.

    Args:
        path: path or URI.

    Raises:
        DatasetError: the file is not there, is no JSON, or lacks a list that detectron2's loader reads.
    """
    try:
        with PathManager.open(path, "r", encoding="utf-8") as file:
            text: str = file.read()
        try:
            return _labels(path, _items(_POLYGONS.sub(_without_polygons, text)))
        except json.JSONDecodeError:
            return _labels(path, _items(text))  # For the line and column of the file as it is.
    except DatasetError as error:
        raise as_recognised(path, error) from error
    except (OSError, ValueError) as error:
        raise as_recognised(path, _unreadable(path, f"{type(error).__name__}: {error}")) from error


def _without_polygons(found: re.Match[str]) -> str:
    """Replace polygons by whether one of them has three points."""
    counts = [polygon.partition("]")[0].count(",") + 1 for polygon in found[1].split("[")[2:]]
    return f'"segmentation":{"true" if any(n >= 6 and n % 2 == 0 for n in counts) else "false"}'


def _labels(path: str, items: Iterable[tuple[str, Any]]) -> Labels:
    labels, columns = Labels(path), _Columns()
    seen: set[str] = set()
    sizes = array("d")
    for key, item in items:
        if not key:
            labels.keys.append(item)
        elif item is None:  # A list begins; of two of one name json.load keeps the last.
            seen.add(key)
            labels.keys.append(key)
            if key == "images":
                labels.images, labels.files, sizes = [], [], array("d")
            elif key == "annotations":
                columns = _Columns()
            else:
                labels.categories = []
        elif not isinstance(item, dict):
            raise _unreadable(path, f"{item!r} in {key}")
        elif key == "annotations":
            columns.add(item, item.get("image_id"))
        elif key == "images":
            labels.images.append(item.get("id"))
            labels.files.append(str(item.get("file_name", "")))
            sizes.extend((_number(item.get("width")), _number(item.get("height"))))
        else:
            labels.categories.append(item)
    for key in ("images", "categories"):
        if key not in seen:
            raise _unreadable(path, f"no list of {key}")
    labels.labelled = "annotations" in seen
    labels.sizes = np.array(sizes, np.float64).reshape(-1, 2)
    numbered = {category.get("id"): category for category in labels.categories if "id" in category}
    try:
        labels.ids = sorted(numbered)
    except TypeError as error:
        raise _unreadable(path, f"category ids that have no order ({error})") from error
    labels.names = [numbered[i].get("name") for i in labels.ids]
    columns.fill(labels)
    return labels


def _items(text: str) -> Iterator[tuple[str, Any]]:
    """Yield ``(list, None)`` where one of the lists begins, then ``(list, item)`` for each item; ``("", key)`` else."""

    def skip(at: int) -> int:
        return _SPACE.match(text, at).end()  # type: ignore[union-attr]  # it matches the empty string

    def after(at: int, closing: str) -> int:
        """Find where the next member begins, or where ``closing`` stands."""
        at = skip(at)
        if text[at : at + 1] == closing:
            return at
        if text[at : at + 1] != ",":
            raise json.JSONDecodeError(f"expecting ',' or {closing!r}", text, at)
        at = skip(at + 1)
        if text[at : at + 1] == closing:
            raise json.JSONDecodeError("a comma before the end", text, at)
        return at

    at = skip(0)
    if text[at : at + 1] != "{":
        raise json.JSONDecodeError("expecting a mapping", text, at)
    at = skip(at + 1)
    while text[at : at + 1] != "}":
        key, at = _decode(text, at)
        at = skip(at)
        if not isinstance(key, str) or text[at : at + 1] != ":":
            raise json.JSONDecodeError("expecting a key and ':'", text, at)
        at = skip(at + 1)
        if key in _LISTS and text[at : at + 1] == "[":
            yield key, None
            at = skip(at + 1)
            while text[at : at + 1] != "]":
                item, at = _decode(text, at)
                yield key, item if item is not None else "null"
                at = after(at, "]")
            at += 1
        else:
            yield "", key
            at = _decode(text, at)[1]
        at = after(at, "}")
    if skip(at + 1) != len(text):
        raise json.JSONDecodeError("more after the end", text, at + 1)


def _number(value: Any) -> float:
    return float(value) if isinstance(value, Real) and not isinstance(value, bool) else float("nan")


def labels_of_dicts(name: str, dicts: Sequence[Mapping[str, Any]], names: Sequence[str]) -> Labels:
    """Read the labels of a dataset that only its function knows: categories are indices of ``names``."""
    labels = Labels(f"dataset {name!r}", list(range(len(names))), list(names), from_json=False)
    columns = _Columns()
    labels.labelled = any("annotations" in one for one in dicts)
    labels.keys = [str(key) for key in dicts[0]] if dicts else []
    for i, one in enumerate(dicts):
        image = one.get("image_id", i)
        labels.images.append(image)
        labels.files.append(str(one.get("file_name", "")))
        for annotation in one.get("annotations", ()):
            columns.add(annotation, image, modes=True)
    labels.sizes = np.array(
        [[_number(one.get("width")), _number(one.get("height"))] for one in dicts], np.float64
    ).reshape(-1, 2)
    columns.fill(labels)
    return labels


def _unreadable(path: str, found: str) -> DatasetError:
    return DatasetError(
        path,
        expected="a COCO json with lists of images, annotations and categories",
        found=found,
        fix="Correct the path or the file; detectron2's own sets lie below the folder DETECTRON2_DATASETS.",
    )
