"""What a data loader or a mapper gives, checked before anything is learnt from it, and as a dataset's entries."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from detectron2.structures import Instances
from detectron2.utils import comm
from torch import nn

from .errors import ConfigError, DatasetError
from .fit.images import random_states_kept
from .layout_registry import layouts_of

_PIXELS = (torch.uint8, torch.int16, torch.int32, torch.int64, torch.float16, torch.bfloat16, torch.float32)
_INDICES = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def class_counts(model: nn.Module) -> dict[str, int]:
    """The number of classes of each label space that a model has a head for."""
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items() if torch.is_tensor(value)}
    found: dict[str, int] = {}
    for layout in layouts_of(model):
        count = layout.num_classes(shapes[layout.tensor]) if layout.class_axes and layout.tensor in shapes else None
        if count is not None:
            found.setdefault(layout.space, count)
    return found


@dataclass(frozen=True)
class MappedCheck:
    """Refuses what detectron2's own mappers would not give.

    Args:
        channels: of the model's images; ``None`` where it does not say.
        things: classes of boxes; ``None`` where they are not known.
    """

    channels: int | None
    things: int | None

    @classmethod
    def of(cls, model: nn.Module) -> MappedCheck:
        """For the images of a model."""
        mean = getattr(model, "pixel_mean", None)
        return cls(len(mean) if torch.is_tensor(mean) and mean.dim() else None, class_counts(model).get("thing"))

    def __call__(self, mapped: Mapping[str, Any], where: str) -> None:
        """Look at one image's dict.

        Raises:
            DatasetError: says what of it is of another form.
        """
        image, truth, tasks = mapped["image"], mapped.get("instances"), mapped.get("tasks", {})
        self._image(image, where)
        if not isinstance(tasks, Mapping) or not all(torch.is_tensor(label) for label in tasks.values()):
            _refuse(where, "tensors by task under 'tasks'", repr(tasks)[:80], "Leave it out where there are no labels.")
        if isinstance(truth, Instances):
            self._truth(truth, (int(image.shape[1]), int(image.shape[2])), where)
        elif truth is not None:
            fix = "Pass what annotations_to_instances of detectron2.data.detection_utils makes."
            _refuse(where, "Instances under 'instances'", f"a value of type {type(truth).__name__}", fix)

    def _image(self, image: torch.Tensor, where: str) -> None:
        found = f"{image.dtype} {tuple(image.shape)}"
        if image.dim() != 3 or not image.numel() or image.dtype not in _PIXELS:
            _refuse(where, "pixels (C, H, W) of uint8 or float32", found, "Convert the image.")
        if self.channels is not None and image.shape[0] not in (1, self.channels):
            fix = "Channels come first: image.permute(2, 0, 1)." if image.shape[2] == self.channels else "Convert it."
            _refuse(where, f"an image of {self.channels} channels", found, fix)

    def _truth(self, truth: Instances, size: tuple[int, int], where: str) -> None:
        fields = truth.get_fields()
        boxes = getattr(fields.get("gt_boxes"), "tensor", None)
        if boxes is None or not bool(torch.isfinite(boxes).all()):
            found = "numbers that are not finite" if boxes is not None else type(fields.get("gt_boxes")).__name__
            fix = "Set instances.gt_boxes = Boxes(tensor), in the image's pixels."
            _refuse(where, "Boxes (n, 4) in gt_boxes", found, fix)
        classes = fields.get("gt_classes")
        if not torch.is_tensor(classes) or classes.dim() != 1 or classes.dtype not in _INDICES:
            found = f"{classes.dtype} {tuple(classes.shape)}" if torch.is_tensor(classes) else type(classes).__name__
            _refuse(where, "class indices (n,) of int64 in gt_classes", found, "Convert them: gt_classes.long().")
        if self.things is not None and len(classes) and int(classes.max()) >= self.things:
            found = f"{int(classes.max())} in gt_classes"
            fix = "Count the classes from 0, in the model's order."
            _refuse(where, f"a class of the model's {self.things}", found, fix)
        if tuple(truth.image_size) != size:
            found = f"{tuple(truth.image_size)} of an image of {size}"
            _refuse(where, "the image's height and width in Instances", found, "Boxes are in the pixels of the image.")


def several(images: Any) -> Iterable[Any]:
    """What can be gone through image by image, or batch by batch.

    Raises:
        DatasetError: it is something else.
    """
    if isinstance(images, Iterable) and not isinstance(images, (str, bytes, Mapping)):
        return images
    raise DatasetError(
        "images",
        expected="several, such as a data loader",
        found=f"a value of type {type(images).__name__}",
        fix="Pass a list, or what detectron2's build_detection_train_loader gives.",
    )


def try_mapper(mapper: Any, images: Sequence[Any], check: MappedCheck) -> None:
    """The first image alone, in every process: what a fit meets half-way, a mapper of another kind, is said here.

    Args:
        mapper: see :data:`d2_headadapt.fit.images.Mapper`.
        images: the first dict of a dataset, or none.
        check: of the model.

    Raises:
        DatasetError, ConfigError: it is no mapper, or gives something else than mappers do.
    """
    if not callable(mapper):
        raise ConfigError(
            "mapper",
            expected="a function of a dataset's dict",
            found=f"a value of type {type(mapper).__name__}",
            fix="Pass mapper_at_test_size(cfg) of d2_headadapt.fit.",
        )
    for entry in images:
        if not isinstance(entry, Mapping):
            found = f"a value of type {type(entry).__name__}"
            raise DatasetError("images", expected="dicts of a dataset", found=found, fix="Leave out mapper=.")
        try:
            with random_states_kept():
                mapped = mapper(dict(entry))
        except (OSError, ValueError, SyntaxError):
            continue  # The fit passes over an image that cannot be read, and says so.
        for one in _singly([mapped]):
            check(one, "mapper, the first image")


def entries_of(images: Iterable[Any], most: int, check: MappedCheck) -> list[dict[str, Any]]:
    """Dataset entries that hold what the mapper made, each image once; an endless loader ends after ``most``."""
    if comm.get_world_size() > 1:
        raise DatasetError(
            "images",
            expected="a dataset and its mapper, because several processes must agree on the images",
            found="the batches of one process",
            fix="Pass the dataset's dicts, and mapper=mapper_at_test_size(cfg) of d2_headadapt.fit.",
        )
    entries: dict[str, dict[str, Any]] = {}
    for position, mapped in enumerate(_singly(images)):
        if position == most:
            break
        name = str(mapped.get("image_id", mapped.get("file_name", f"image {position}")))
        if name not in entries:
            check(mapped, f"images, {name}")
            entries[name] = _entry(name, mapped)
    return list(entries.values())


def _singly(images: Iterable[Any]) -> Iterator[Mapping[str, Any]]:
    for item in images:
        for mapped in item if isinstance(item, (list, tuple)) else [item]:
            if isinstance(mapped, Mapping) and torch.is_tensor(mapped.get("image")):
                yield mapped
                continue
            found = f"a value of type {type(mapped).__name__}"
            fix = "Pass what detectron2's build_detection_train_loader gives."
            if isinstance(mapped, Mapping):
                found = f"a dict with {', '.join(map(str, mapped)) or 'nothing'}"
                fix = "For the dicts of a dataset pass mapper=mapper_at_test_size(cfg) of d2_headadapt.fit as well."
            raise DatasetError("images", expected="dicts with an image tensor under 'image'", found=found, fix=fix)


def _entry(name: str, mapped: Mapping[str, Any]) -> dict[str, Any]:
    """What chooses images reads labels as a dataset has them."""
    truth = mapped.get("instances")
    fields = truth.get_fields() if truth is not None else {}
    boxes: list[dict[str, Any]] = [{"category_id": int(k), "tasks": {}} for k in fields.get("gt_classes", ())]
    for field, labels in fields.items():
        for box, label in zip(boxes, labels, strict=False) if torch.is_tensor(labels) and field != "gt_classes" else ():
            box["tasks"][field.removeprefix("gt_")] = _label(label)
    tasks = {task: _label(label) for task, label in mapped.get("tasks", {}).items()}
    return {"image_id": name, "annotations": boxes, "tasks": tasks, "mapped": mapped}


def _label(label: torch.Tensor) -> int | list[int] | None:
    if label.dim():
        return [int(k) for k in (label > 0).nonzero().reshape(-1)]
    return int(label) if label >= 0 else None


def mapped_of(entry: dict[str, Any]) -> dict[str, Any]:
    """The mapper of :func:`entries_of`: what the loader gave for an entry."""
    mapped: dict[str, Any] = dict(entry["mapped"])
    return mapped


def _refuse(where: str, expected: str, found: str, fix: str) -> NoReturn:
    raise DatasetError(where, expected=expected, found=found, fix=fix)
