"""For people who own their loop: a state dict adapted in one call, a built model fitted on any loader's images."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from .checkpoint import HeadAdaptCheckpointer
from .classes import did_you_mean
from .errors import CheckpointFileError, ConfigError, DatasetError
from .files import is_dense
from .fit import FitReport, FitSettings, Mapper, fit_new_rows
from .loading import check_exists, read_weights
from .mapped import MappedCheck, class_counts, entries_of, mapped_of, several, try_mapper
from .plan import AdaptPlan
from .settings import AdaptSettings, Named, settings_of

New = HeadAdaptCheckpointer | AdaptPlan | Mapping[str, Sequence[int]]
"""Which rows are new: as a load left them, as a plan says, or class indices by label space."""


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
    inner = _unwrapped(model)
    if isinstance(target, Mapping):
        _check_spaces("target", target, class_counts(inner))
    settings = settings_of(inner) if target is None and source is None and not more else None
    checkpointer = HeadAdaptCheckpointer(inner, settings=settings or AdaptSettings.of(target, source, **more))
    if isinstance(weights, (str, os.PathLike)):
        path = os.fspath(weights)
        check_exists(path)
        checkpoint, local = read_weights(path, checkpointer.settings)
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
    """A dict's weights in the form of a checkpoint."""
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
        _check_rows(new, class_counts(model))
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
    """Rows that no head has would be fitted without a word."""
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
