"""For people who own their loop: a state dict adapted in one call, a built model fitted on any loader's images."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from detectron2.utils import comm
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from .checkpoint import HeadAdaptCheckpointer
from .errors import CheckpointFileError, ConfigError, DatasetError
from .fit import FitReport, FitSettings, Mapper, fit_new_rows
from .loading import check_exists, read_weights
from .plan import AdaptPlan
from .settings import AdaptSettings, Named, settings_of

New = HeadAdaptCheckpointer | AdaptPlan | Mapping[str, Sequence[int]]
"""Which rows are new: as a load left them, as a plan says, or class indices by label space or tensor."""


def adapt_state_dict(
    weights: str | os.PathLike[str] | Mapping[str, Any],
    model: nn.Module,
    target: Named | Mapping[str, Named] | None = None,
    source: Named | Mapping[str, Named] | None = None,
    **more: Any,
) -> tuple[dict[str, torch.Tensor], AdaptPlan]:
    """The state dict that ``model`` should load, with every row of a carried class taken by name; nothing is changed.

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
    settings = settings_of(model) if target is None and source is None and not more else None
    inner = model.module if isinstance(model, (DistributedDataParallel, DataParallel)) else model
    checkpointer = HeadAdaptCheckpointer(inner, settings=settings or AdaptSettings.of(target, source, **more))
    if isinstance(weights, (str, os.PathLike)):
        path = os.fspath(weights)
        check_exists(path)
        checkpoint, local = read_weights(path, checkpointer.settings)
        return checkpointer.adapted(checkpoint, local, path)
    return checkpointer.adapted(_checkpoint(weights), "the state dict")


def _checkpoint(weights: Any) -> dict[str, Any]:
    """A dict's weights in the form of a checkpoint."""
    state = weights.get("model", weights) if isinstance(weights, Mapping) else None
    if isinstance(state, Mapping) and state and all(isinstance(name, str) for name in state):
        wrong = [name for name, x in state.items() if not torch.is_tensor(x) and not name.endswith("_extra_state")]
        if not wrong:
            return {**(weights if state is not weights else {}), "model": state}
        found = f"{type(state[wrong[0]]).__name__} under {wrong[0]!r}"
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
        DatasetError: images of another form.
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
    rows = _rows(new)
    noted = new.fitted_rows() if isinstance(new, HeadAdaptCheckpointer) else nullcontext()
    settings = settings or FitSettings()
    if mapper is None:
        images, mapper = _entries(images, settings.images), _mapped
    elif not isinstance(images, Sequence):
        images = list(images)
    with noted:
        return fit_new_rows(model, images, mapper, new=rows, settings=settings)


def _rows(new: Any) -> Mapping[str, Sequence[int]]:
    if isinstance(new, HeadAdaptCheckpointer):
        if new.plan is not None:
            return new.rows_to_fit()
        found = "a checkpointer that has loaded nothing"
    elif isinstance(new, AdaptPlan):
        return {t.name: t.new for t in new.by_action("carried", "initialised") if t.new}
    elif isinstance(new, Mapping) and all(_are_indices(rows) for rows in new.values()):
        return new
    else:
        found = repr(new)
    raise ConfigError(
        "new",
        expected="a checkpointer after its load, a plan, or class indices by label space",
        found=found,
        fix="Write it like {'thing': [4, 5]}, or pass the plan of adapt_state_dict.",
    )


def _are_indices(rows: Any) -> bool:
    return isinstance(rows, Sequence) and all(isinstance(k, int) and not isinstance(k, bool) for k in rows)


def _entries(images: Iterable[Any], most: int) -> list[dict[str, Any]]:
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


def _mapped(entry: dict[str, Any]) -> dict[str, Any]:
    mapped: dict[str, Any] = dict(entry["mapped"])
    return mapped
