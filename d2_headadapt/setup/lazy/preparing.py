"""Settle a LazyConfig in place: datasets, classes and their counts, and what its nodes cannot say themselves."""

from __future__ import annotations

import copy
import inspect
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from detectron2.config import CfgNode, instantiate
from detectron2.data import DatasetMapper, get_detection_dataset_dicts
from detectron2.layers import ShapeSpec
from detectron2.modeling.roi_heads import FastRCNNOutputLayers
from omegaconf import DictConfig, ListConfig
from torch import nn

from ...adapt.classes import SPACES, ClassTable
from ...adapt.detectron2_heads import CHOICES
from ...adapt.discovery import Discovery
from ...config.registries import registered
from ...config.settings import AdaptSettings, apply_num_classes, attach_discovery, attach_settings
from ...data.task_datasets import training_dicts
from ...data.task_mapper import TaskMapper
from ...data.task_spec import TaskSpec, task_specs
from ...errors import ConfigError
from ...key import HEAD_ADAPT, Form, Key, speaking
from ...modeling.classifier import MultiTaskClassifier
from ...modeling.predictor import PREDICTOR_REGISTRY, HeadAdaptOutputLayers
from ...modeling.roi_heads import HeadAdaptMixin
from ..class_counts import settle_foreign_counts
from ..count_keys import discover_lazy
from ..yaml import settle_config, settle_device
from .counts import agnostic_masks, check_counts, find_counts, write_counts
from .loading import NODE, make_absolute
from .mirror import mirror_of
from .tree import Call, calls, follow, give, select, target_of

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prepared:
    """A LazyConfig that is settled.

    Args:
        lazy: the config itself; ``instantiate(lazy.model)`` gives a model that knows its classes.
        config: the yaml config that it amounts to, frozen, for everything that reads keys.
        settings: what the model carries for its checkpointer.
    """

    lazy: DictConfig
    config: CfgNode
    settings: AdaptSettings


@speaking(Form.LAZY)
def prepare(
    lazy: DictConfig,
    *,
    reads_labels: bool = True,
    required: bool = True,
    mirror: CfgNode | None = None,
    known: Mapping[str, ClassTable] | None = None,
    finish: Callable[..., None] | None = None,
) -> Prepared:
    """Register datasets, settle the class tables, and write class counts and device, in place.

    From then on ``instantiate(lazy.model)`` checks its heads against the class tables and attaches the settings, in
    anybody's script. A second call on the same config changes nothing more.

    Args:
        lazy: a LazyConfig with ``model`` and, where classes are not named, ``dataloader``; ``head_adapt`` holds the
            keys of :mod:`d2_headadapt.config.keys` in lower case.
        reads_labels: the run trains or evaluates, so the model's classes must be those of its datasets.
        required: raise for a training set that is not registered, instead of leaving its classes unknown.
        mirror: of :func:`d2_headadapt.setup.lazy.mirror.mirror_of`, where it was changed.
        known: class tables of a checkpoint, for label spaces that the config leaves open.
        finish: called with a model that was built and ``settings=``, in place of checking its heads and attaching them.

    Returns:
        Prepared: the config with its mirror and settings.

    Raises:
        HeadAdaptError: a dataset, class table or key that cannot be used; ``lazy`` is then as it was.
    """
    make_absolute(lazy.get(NODE), os.getcwd())
    cfg = mirror_of(lazy) if mirror is None else mirror
    settings = settle_config(cfg, reads_labels=reads_labels, required=required, region_width=_region_width(lazy.model))
    if known:
        settings = replace(settings, target={**known, **settings.target})
    settings = replace(settings, agnostic=_agnostic_keys(lazy.model))
    apply_num_classes(cfg, settings.target)
    # A classifier of images without one of its heads would be another model.
    specs = task_specs(cfg, required=required and (reads_labels or _is_kind(lazy.model, MultiTaskClassifier)))
    given = _given_to_heads(lazy.model, cfg, settings, specs)
    # From here on nothing fails.
    tables = {space: table for space, table in settings.target.items() if space in SPACES}
    if tables.keys() & {count.space for count in find_counts(lazy.model)}:
        lines = write_counts(lazy.model, settings.target)
    else:
        lines = settle_foreign_counts(lazy.model, _free_of_tables(lazy.model), tables)
    for line in lines:
        logger.info(line)
    cfg.MODEL.DEVICE = settle_device(cfg.MODEL.DEVICE)
    if select(lazy, "train.device") is not None:
        lazy.train.device = cfg.MODEL.DEVICE
    # As it is now: with class tables given to its heads it could no longer be built at other counts.
    discover = partial(discover_lazy, _free_of_tables(lazy.model))
    for node, target, arguments in given:
        give(node, target, **arguments)
    if specs:
        _carry_labels(lazy, cfg, specs)
    paths = tuple(path for path, _ in calls(lazy.model))
    follow(lazy.model, partial(finish or partial(_finish, paths=paths, discover=discover), settings=settings))
    cfg.freeze()
    return Prepared(lazy, cfg, settings)


def _free_of_tables(model: DictConfig) -> DictConfig:
    """Return a copy that calls what the config's author wrote, without class tables that an earlier call gave."""
    free = copy.deepcopy(model)
    for _, node in calls(free):
        if isinstance(node._target_, Call):
            node._target_ = node._target_.shown
    return free


def _finish(model: nn.Module, settings: AdaptSettings, paths: Sequence[str], discover: Callable[[], Discovery]) -> None:
    """Check the heads of a model that was just built, and attach the settings."""
    check_counts(model, settings.target, paths)
    attach_settings(model, settings)
    attach_discovery(model, discover)


def _predictors(model: DictConfig) -> list[tuple[DictConfig, DictConfig, bool]]:
    """Yield each box predictor of ROI heads of this package: the heads, the predictor, whether it is the last."""
    found: list[tuple[DictConfig, DictConfig, bool]] = []
    for _, heads in calls(model):
        if not _is_kind(heads, HeadAdaptMixin):
            continue
        one, several = heads.get("box_predictor"), heads.get("box_predictors")
        nodes = list(several) if isinstance(several, ListConfig) else [one]
        for i, node in enumerate(nodes):
            if _is_kind(node, FastRCNNOutputLayers):
                found.append((heads, node, i + 1 == len(nodes)))
    return found


def _agnostic_keys(model: DictConfig) -> frozenset[Key]:
    """List the yaml keys that would make boxes or masks class-agnostic as this tree does."""
    boxes = any(node.get("cls_agnostic_bbox_reg", False) for _, node in calls(model))
    masks = bool(agnostic_masks(find_counts(model)))
    chosen = {"FastRCNNOutputLayers": boxes, "MaskRCNNConvUpsampleHead": masks}
    return frozenset(CHOICES[name] for name, is_agnostic in chosen.items() if is_agnostic)


def _is_kind(node: Any, kind: type) -> bool:
    target = target_of(node)
    return isinstance(target, type) and issubclass(target, kind)


def _region_width(model: DictConfig) -> int | None:
    for _, node, _ in _predictors(model):
        width: int | None = _input_shape(node).channels
        return width
    return None


def _input_shape(node: DictConfig) -> ShapeSpec:
    shape = instantiate(node.input_shape)
    return shape if isinstance(shape, ShapeSpec) else ShapeSpec(channels=int(shape))


def _given_to_heads(
    model: DictConfig, cfg: CfgNode, settings: AdaptSettings, specs: Sequence[TaskSpec]
) -> list[tuple[DictConfig, Any, dict[str, Any]]]:
    """List nodes with the class that they are to call and what it is given beside the config's own arguments.

    As in a yaml, ROI heads of this package get the predictor of ``head_adapt.predictor`` in place of stock's.
    """
    table = settings.target.get("thing")
    on_boxes = tuple(spec for spec in specs if spec.on == "box")
    given: list[tuple[DictConfig, Any, dict[str, Any]]] = []
    predictors = _predictors(model)
    if not predictors and cfg.MODEL.HEAD_ADAPT.PREDICTOR != "HeadAdaptOutputLayers":
        logger.warning("Nothing reads %s: the model has no ROI heads of d2_headadapt.", HEAD_ADAPT.PREDICTOR)
    for _, node, is_last in predictors:
        target = target_of(node)
        if target is FastRCNNOutputLayers:
            target = _predictor_class(cfg.MODEL.HEAD_ADAPT.PREDICTOR)
        if isinstance(target, type) and issubclass(target, HeadAdaptOutputLayers):
            arguments = {"class_table": table, **_beyond_stock(target, cfg, node, table)}
            if is_last and on_boxes:
                arguments["tasks"] = on_boxes
            given.append((node, target, arguments))
    agnostic = {id(count.node) for count in agnostic_masks(find_counts(model))}
    for _, node in calls(model):
        if _is_kind(node, HeadAdaptMixin):
            # Once the heads around it have one class too, its number tells no longer.
            was = isinstance(node._target_, Call) and node._target_.arguments.get("cls_agnostic_mask", False)
            given.append((node, target_of(node), {"cls_agnostic_mask": was or id(node.get("mask_head")) in agnostic}))
        elif _is_kind(node, MultiTaskClassifier):
            given.append((node, target_of(node), {"specs": tuple(spec for spec in specs if spec.on == "image")}))
    return given


def _predictor_class(name: str) -> Any:
    found = registered(PREDICTOR_REGISTRY, HEAD_ADAPT.PREDICTOR, name)
    if not (isinstance(found, type) and issubclass(found, HeadAdaptOutputLayers)):
        raise ConfigError(
            HEAD_ADAPT.PREDICTOR,
            expected="a class derived from HeadAdaptOutputLayers",
            found=repr(name),
            fix="Name it in the tree: model.roi_heads.box_predictor._target_ = ..., with its arguments.",
        )
    return found


def _beyond_stock(target: Any, cfg: CfgNode, node: DictConfig, table: ClassTable | None) -> dict[str, Any]:
    """Read what a predictor takes beyond stock's keys: of text embeddings, the file and how to use it."""
    if "bundle" in node or "cfg" not in inspect.signature(target.from_config).parameters:
        return {}
    shape = _input_shape(node)
    more = {"class_table": table} if "class_table" in inspect.signature(target.from_config).parameters else {}
    own = target.from_config(cfg, shape, **more)
    stock = FastRCNNOutputLayers.from_config(cfg, shape)
    return {key: value for key, value in own.items() if key not in stock}


def _carry_labels(lazy: DictConfig, cfg: CfgNode, specs: Sequence[TaskSpec]) -> None:
    """Let stock's mappers and training set carry the labels of tasks; a user's own are left alone."""
    names = ", ".join(spec.name for spec in specs)
    for which in ("train", "test"):
        mapper = select(lazy, f"dataloader.{which}.mapper")
        if target_of(mapper) in (DatasetMapper, TaskMapper):
            if target_of(mapper) is DatasetMapper:
                logger.info("dataloader.%s.mapper is a TaskMapper now, for the labels of %s.", which, names)
            give(mapper, TaskMapper, tasks=tuple(specs))
    dataset = select(lazy, "dataloader.train.dataset")
    if target_of(dataset) is get_detection_dataset_dicts:
        give(dataset, _labelled, shown=get_detection_dataset_dicts, config=cfg, specs=tuple(specs))


def _labelled(*, config: CfgNode, specs: Sequence[TaskSpec], **_: Any) -> list[dict[str, Any]]:
    """Load the training set as :func:`training_dicts` does; the node's own arguments are in the mirror."""
    return training_dicts(config, specs)
