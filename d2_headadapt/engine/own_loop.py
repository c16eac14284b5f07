"""Adapt and fit inside a user's own loop: a state dict in one call, a built model on any loader's images."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from detectron2.structures import Instances
from detectron2.utils import comm
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from ..adapt.classes import did_you_mean
from ..adapt.plan import AdaptPlan
from ..adapt.registry import layouts_of
from ..checkpoint.checkpointer import HeadAdaptCheckpointer
from ..checkpoint.load import check_exists, read_weights
from ..config.settings import AdaptSettings, Named, settings_of
from ..data.random_states import random_states_kept
from ..data.task_mapper import Mapper
from ..errors import CheckpointFileError, ConfigError, DatasetError
from ..files import is_dense
from ..fit import FitReport, FitSettings, fit_new_rows

_PIXELS = (torch.uint8, torch.int16, torch.int32, torch.int64, torch.float16, torch.bfloat16, torch.float32)
_INDICES = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def count_classes(model: nn.Module) -> dict[str, int]:
    """Count the classes of each label space that a model has a head for."""
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items() if torch.is_tensor(value)}
    found: dict[str, int] = {}
    for layout in layouts_of(model):
        count = layout.num_classes(shapes[layout.tensor]) if layout.class_axes and layout.tensor in shapes else None
        if count is not None:
            found.setdefault(layout.space, count)
    return found


@dataclass(frozen=True)
class MappedCheck:
    """A check that refuses what detectron2's own mappers would not give.

    Args:
        channels: of the model's images; ``None`` where it does not say.
        things: classes of boxes; ``None`` where they are not known.
    """

    channels: int | None
    things: int | None

    @classmethod
    def of(cls, model: nn.Module) -> MappedCheck:
        """Make the check for the images of a model."""
        mean = getattr(model, "pixel_mean", None)
        return cls(len(mean) if torch.is_tensor(mean) and mean.dim() else None, count_classes(model).get("thing"))

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
    """Yield the images of any loader one by one, whether it gives images or batches.

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
    """Map the first image alone, in every process, so that a mapper of another kind is refused before the fit.

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
    """Make dataset entries that hold what the mapper gave, each image once; an endless loader ends after ``most``."""
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
    """Make a dataset entry of a mapped image: what chooses images reads labels as a dataset has them."""
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
    """Return what the loader gave for an entry: the mapper of :func:`entries_of`."""
    mapped: dict[str, Any] = dict(entry["mapped"])
    return mapped


def _refuse(where: str, expected: str, found: str, fix: str) -> NoReturn:
    raise DatasetError(where, expected=expected, found=found, fix=fix)


New = HeadAdaptCheckpointer | AdaptPlan | Mapping[str, Sequence[int]]
"""Which rows are new: as a load left them, as a plan says, or class indices by label space."""


def adapt_state_dict(
    weights: str | os.PathLike[str] | Mapping[str, Any],
    model: nn.Module,
    target: Named | Mapping[str, Named] | None = None,
    source: Named | Mapping[str, Named] | None = None,
    **more: Any,
) -> tuple[dict[str, torch.Tensor], AdaptPlan]:
    """Compute the state dict that ``model`` should load, with every row of a carried class taken by name.

    Nothing is changed.

    Args:
        weights: a checkpoint's path or address, a state dict, or a dict with a state dict under ``model`` (then the
            class tables that this package stored beside it are read too).
        model: any model with detectron2's heads, or with layouts of your own (:func:`register_head_layout`). It gives
            new rows and whatever the weights lack, and stays as it is.
        target, source, more: see :meth:`AdaptSettings.of`; with none of them, the settings that are attached to the
            model count.

    Returns:
        A new dict with every name of the model's state, and the plan that it was made by. Tensors that are taken
        whole are shared with an input.

    Raises:
        HeadAdaptError: the weights or the plan are refused, or an argument cannot be used.

    Example:
        >>> from detectron2.layers import ShapeSpec
        >>> from detectron2.modeling.box_regression import Box2BoxTransform
        >>> from detectron2.modeling.roi_heads import FastRCNNOutputLayers
        >>> from torch import nn
        >>> from d2_headadapt import adapt_state_dict
        >>> def head(classes):  # stands for a whole model
        ...     transform = Box2BoxTransform((10.0, 10.0, 5.0, 5.0))
        ...     layers = FastRCNNOutputLayers(ShapeSpec(channels=4), box2box_transform=transform, num_classes=classes)
        ...     return nn.ModuleDict({"box_predictor": layers})
        >>> old, new = head(3), head(2)
        >>> state, plan = adapt_state_dict(old.state_dict(), new, ["gnu", "cat"], source=["ant", "bee", "cat"])
        >>> new.load_state_dict(state)
        <All keys matched successfully>
        >>> plan.new_classes()
        {'thing': ('gnu',)}
        >>> bool((new["box_predictor"].cls_score.weight[1] == old["box_predictor"].cls_score.weight[2]).all())
        True
    """
    inner = _unwrapped(model)
    if isinstance(target, Mapping):
        _check_spaces("target", target, count_classes(inner))
    settings = settings_of(inner) if target is None and source is None and not more else None
    checkpointer = HeadAdaptCheckpointer(inner, settings=settings or AdaptSettings.of(target, source, **more))
    if isinstance(weights, (str, os.PathLike)):
        path = os.fspath(weights)
        check_exists(path)
        checkpoint, local = read_weights(path, trust=checkpointer.settings.trust_file)
        return checkpointer.adapted(checkpoint, local, path)
    return checkpointer.adapted(_checkpoint(weights), "the state dict")


def _unwrapped(model: Any) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise ConfigError(
            "model",
            expected="a model",
            found=f"a value of type {type(model).__name__}",
            fix="Pass what detectron2's build_model gives.",
        )
    inner: nn.Module = model
    while isinstance(inner, (DistributedDataParallel, DataParallel)):
        inner = inner.module
    return inner


def _checkpoint(weights: Any) -> dict[str, Any]:
    """Put a dict's weights into the form of a checkpoint."""
    state = weights.get("model", weights) if isinstance(weights, Mapping) else None
    if isinstance(state, Mapping) and state and all(isinstance(name, str) for name in state):
        wrong = [name for name, x in state.items() if not is_dense(x) and not name.endswith("_extra_state")]
        if not wrong:
            return {**(weights if state is not weights else {}), "model": state}
        value = state[wrong[0]]
        kind = f"{value.layout} of {value.dtype} on {value.device}" if torch.is_tensor(value) else type(value).__name__
        found = f"{kind} under {wrong[0]!r}"
    else:
        kind = type(weights if state is None else state).__name__
        found = "an empty dict" if state == {} else f"a value of type {kind}"
    raise CheckpointFileError(
        "weights",
        expected="a path, a state dict, or a dict with a state dict under 'model'",
        found=found,
        fix="Pass model.state_dict(), or what torch.load gave.",
    )


def fit_rows(
    model: nn.Module,
    images: Iterable[Any],
    new: New,
    *,
    mapper: Mapper | None = None,
    settings: FitSettings | None = None,
) -> FitReport:
    """Solve the rows of new classes on labelled images, in place; carried rows keep their bits. See ``docs/fit.md``.

    Args:
        model: with its weights loaded.
        images: what a data loader or a mapper gives: dicts with ``image`` (C, H, W) and ``instances``, singly or in
            batches, best without augmentation. The first ``settings.images`` of them are kept in memory, so an endless
            loader will do. Or, with ``mapper``, a detectron2 dataset; several processes need this form.
        new: the :class:`HeadAdaptCheckpointer` that loaded the weights, the plan of :func:`adapt_state_dict`, or class
            indices such as ``{"thing": [4, 5]}``. A checkpointer remembers what was fitted.
        mapper: makes such a dict of a dataset's entry, for instance :func:`d2_headadapt.fit.mapper_at_test_size`.
        settings: how; for instance ``FitSettings(images=100, mirror=False)`` of :mod:`d2_headadapt.fit`.

    Returns:
        What was solved and what was not, and why.

    Raises:
        DatasetError: no image at all, images of another form, or classes that the model does not have.
        ConfigError: settings that cannot be used, or several processes without ``mapper``.
        HeadAdaptError: whatever is raised, the model is as it was.

    Example:
        A Faster R-CNN of three classes, small so that this takes a second, and a loader's batch::

            >>> import torch
            >>> from detectron2.config import get_cfg
            >>> from detectron2.modeling import build_model
            >>> from detectron2.structures import Boxes, Instances
            >>> from d2_headadapt import fit_rows
            >>> cfg = get_cfg()
            >>> keys = {"DEVICE": "cpu", "RESNETS.STEM_OUT_CHANNELS": 8, "RESNETS.RES2_OUT_CHANNELS": 16}
            >>> keys |= {"RESNETS.WIDTH_PER_GROUP": 4, "ROI_HEADS.NUM_CLASSES": 3}
            >>> cfg.merge_from_list([word for key, value in keys.items() for word in (f"MODEL.{key}", value)])
            >>> model = build_model(cfg)
            >>> square = Instances((64, 64), gt_boxes=Boxes([[8.0, 8, 40, 40]]), gt_classes=torch.tensor([2]))
            >>> batch = [{"image": torch.full((3, 64, 64), 90), "instances": square}]
            >>> report = fit_rows(model, [batch], {"thing": [2]})
            >>> report.solved
            ('roi_heads.box_predictor',)
    """
    model = _unwrapped(model)
    rows = _rows(new, model)
    noted = new.fitted_rows() if isinstance(new, HeadAdaptCheckpointer) else nullcontext()
    settings = FitSettings() if settings is None else settings
    if not isinstance(settings, FitSettings):
        found = f"a value of type {type(settings).__name__}"
        raise ConfigError("settings", expected="FitSettings", found=found, fix="Write FitSettings(images=100).")
    if not any(rows.values()):
        return FitReport()
    images, check = several(images), MappedCheck.of(model)
    if mapper is None:
        images, mapper = entries_of(images, settings.images, check), mapped_of
    else:
        images = images if isinstance(images, Sequence) else list(images)
        try_mapper(mapper, images[:1], check)
    if not images:
        raise DatasetError(
            "images", expected="at least one", found="none", fix="A generator can be read only once: make a new one."
        )
    with noted:
        return fit_new_rows(model, images, mapper, new=rows, settings=settings)


def _rows(new: Any, model: nn.Module) -> Mapping[str, Sequence[int]]:
    if isinstance(new, HeadAdaptCheckpointer):
        if new.plan is not None:
            return new.rows_to_fit()
        found = "a checkpointer that has loaded nothing"
    elif isinstance(new, AdaptPlan):
        return {t.name: t.new for t in new.by_action("carried", "initialised") if t.new}
    elif isinstance(new, Mapping) and all(_are_indices(rows) for rows in new.values()):
        _check_rows(new, count_classes(model))
        return new
    else:
        found = repr(new)
    raise ConfigError(
        "new",
        expected="a checkpointer after its load, a plan, or class indices by label space",
        found=found,
        fix="Write it like {'thing': [4, 5]}, or pass the plan of adapt_state_dict.",
    )


def _check_rows(new: Mapping[str, Sequence[int]], counts: Mapping[str, int]) -> None:
    """Raise for rows that no head has: they would be fitted without a word."""
    _check_spaces("new", new, counts)
    for space, rows in new.items():
        outside = [k for k in rows if not 0 <= k < counts[space]]
        if outside:
            raise ConfigError(
                "new",
                expected=f"{space} classes from 0 to {counts[space] - 1}",
                found=str(outside[0]),
                fix="Background has no class index.",
            )


def _check_spaces(where: str, spaces: Iterable[Any], counts: Mapping[str, int]) -> None:
    for space in spaces:
        if space not in counts:
            raise ConfigError(
                where,
                expected=f"label spaces of the model ({', '.join(sorted(counts)) or 'it has none'})",
                found=repr(space),
                fix=f"Correct it.{did_you_mean(str(space), counts)}",
            )


def _are_indices(rows: Any) -> bool:
    return isinstance(rows, Sequence) and all(isinstance(k, int) and not isinstance(k, bool) for k in rows)
