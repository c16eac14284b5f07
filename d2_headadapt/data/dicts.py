"""What detectron2 reads of every dict of a dataset, checked before it stumbles over one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from detectron2.data import DatasetCatalog
from detectron2.structures import BoxMode

from ..errors import DatasetError


@dataclass(frozen=True)
class Needs:
    """What a run reads of the dicts.

    Args:
        boxes: annotations with boxes, as training a detector does.
        ids: ``image_id``, by which an evaluation finds its image again.
    """

    boxes: bool = False
    ids: bool = False


@dataclass(frozen=True)
class DictProblem:
    """What dicts lack.

    Args:
        found, expected, fix: as in :class:`d2_headadapt.errors.HeadAdaptError`.
    """

    found: str
    expected: str
    fix: str

    def error(self, name: str) -> DatasetError:
        """Return the exception for a dataset."""
        return DatasetError(f"dataset {name!r}", expected=self.expected, found=self.found, fix=self.fix)


def problems_of(dicts: Any, needs: Needs) -> Iterator[DictProblem]:
    """Yield what the dicts of a dataset lack, each kind once with how many there are and the first.

    Args:
        dicts: what the dataset's function gave.
        needs: of the run.
    """
    if not isinstance(dicts, Sequence) or isinstance(dicts, (str, bytes)):
        found = f"a value of type {type(dicts).__name__}"
        yield DictProblem(found, "a list of dicts, one for each image", "Let the function return a list.")
        return
    strange = [i for i, one in enumerate(dicts) if not isinstance(one, Mapping)]
    if strange:
        found = f"a value of type {type(dicts[strange[0]]).__name__} at place {strange[0]}"
        yield DictProblem(found, "one dict for each image", "Let the function return a list of dicts.")
        return
    keys = ["file_name", *["image_id"] * needs.ids, *["annotations"] * needs.boxes]
    for key in keys:
        lacking = [i for i, one in enumerate(dicts) if one.get(key) is None]
        if lacking:
            there = ", ".join(map(repr, dicts[lacking[0]])) or "nothing"
            found = f"no {key!r} in {len(lacking)} of {len(dicts)} dicts, such as dict {lacking[0]}, which has {there}"
            yield DictProblem(found, f"{key!r} in every dict: {_MEANT[key]}", _FIX[key])
    if needs.boxes:
        yield from _of_annotations(dicts)


_MEANT = {
    "file_name": "the path of the image",
    "image_id": "a number or name that no other image has",
    "annotations": "a list of objects, empty where there are none",
    "bbox": "four numbers",
    "bbox_mode": "what they are, as BoxMode.XYWH_ABS or BoxMode.XYXY_ABS",
    "category_id": "the index of the class, from 0",
}
_FIX = {
    "file_name": "Write 'file_name': path into each dict.",
    "image_id": "Write 'image_id': i into each dict, with i from enumerate.",
    "annotations": "Write 'annotations': [] into the dicts of images without objects.",
    "bbox": "Write 'bbox': [x, y, width, height] and its 'bbox_mode' into each annotation.",
    "bbox_mode": "Write 'bbox_mode': BoxMode.XYWH_ABS (x, y, width, height) or BoxMode.XYXY_ABS (two corners).",
    "category_id": "Write 'category_id': k into each annotation.",
}


def _of_annotations(dicts: Sequence[Mapping[str, Any]]) -> Iterator[DictProblem]:
    objects = [(i, one) for i, entry in enumerate(dicts) for one in entry.get("annotations") or ()]
    for key in ("bbox", "bbox_mode", "category_id"):
        lacking = [i for i, one in objects if one.get(key) is None]
        if lacking:
            found = f"no {key!r} in {len(lacking)} of {len(objects)} annotations, such as one of dict {lacking[0]}"
            yield DictProblem(found, f"{key!r} in every annotation: {_MEANT[key]}", _FIX[key])
    modes = [(i, one.get("bbox_mode")) for i, one in objects]
    wrong = [(i, mode) for i, mode in modes if mode is not None and not _is_mode(mode)]
    if wrong:
        i, mode = wrong[0]
        found = f"'bbox_mode' {mode!r} in {len(wrong)} of {len(objects)} annotations, such as one of dict {i}"
        yield DictProblem(found, f"'bbox_mode': {_MEANT['bbox_mode']}", _FIX["bbox_mode"])


def _is_mode(value: Any) -> bool:
    """Tell a box mode; integers of a dataset that was stored as JSON compare equal to the modes."""
    return isinstance(value, int) and not isinstance(value, bool) and value in list(BoxMode)


@contextmanager
def checked_dicts(needs: Needs) -> Iterator[None]:
    """Check whatever detectron2's catalog gives inside.

    Raises:
        DatasetError: the first thing that the dicts of a dataset lack.
    """
    stock = DatasetCatalog.get

    def get(name: str) -> Any:
        dicts = stock(name)
        for problem in problems_of(dicts, needs):
            raise problem.error(name)
        return dicts

    DatasetCatalog.get = get
    try:
        yield
    finally:
        del DatasetCatalog.get
