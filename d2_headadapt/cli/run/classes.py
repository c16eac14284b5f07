"""Which classes the model of a script has: those that a key names, else those of ``DATASETS.TRAIN`` as far as they fit.

``DATASETS.TRAIN`` says what a model predicts only where it is trained: a script that predicts leaves there what the
yaml it started from had. So the number of classes that the script's own config gives the model stays, and a training
set's names are taken for rows that the model has.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.engine import DefaultTrainer
from detectron2.modeling import ROI_HEADS_REGISTRY
from omegaconf import DictConfig
from torch import nn

from ...adapt.classes import KEY_SUFFIXES, ClassTable
from ...adapt.planner import target_key
from ...adapt.registry import layouts_of
from ...checkpoint.load import say_other_spaces
from ...config.settings import NUM_CLASSES_KEYS, AdaptSettings, attach_settings
from ...data.datasets import SPACE_METADATA, register_datasets, training_table
from ...data.task_datasets import settle_tasks
from ...data.task_spec import TASK_DEFAULTS, task_specs
from ...engine.own_loop import count_classes
from ...errors import HeadAdaptError
from ...key import DATASETS
from ...modeling.classifier import MultiTaskClassifier
from ...modeling.predictor import HeadAdaptOutputLayers
from ...modeling.roi_heads import HeadAdaptMixin
from ...setup.class_counts import settle_counts
from ...setup.keep import settle_keep
from ...setup.lazy import prepare
from ...setup.lazy.loading import NODE, make_absolute
from ...setup.lazy.mirror import mirror_of
from ...setup.lazy.tree import calls, target_of
from ...setup.task_checks import check_tasks

logger = logging.getLogger(__name__)
OURS = (HeadAdaptMixin, HeadAdaptOutputLayers, MultiTaskClassifier)
"""Who names one of these asks for models of this package."""
_training: list[str] = []
"""Trainers that are being built: what builds a model inside will train it."""


@dataclass(frozen=True)
class ScriptClasses:
    """What a script's config says of its classes.

    Args:
        settings: of the keys that are set, and of tasks.
        told: label spaces that a key names.
        trained: what ``DATASETS.TRAIN`` names, for label spaces without a key.
        datasets: those of ``DATASETS.TRAIN``.
        counts: the number of classes under the config's own keys, for label spaces of a known architecture.
    """

    settings: AdaptSettings
    told: frozenset[str]
    trained: Mapping[str, ClassTable]
    datasets: tuple[str, ...]
    counts: Mapping[str, int]

    def settle(self, model: nn.Module) -> AdaptSettings:
        """Settle a built model's settings, and log where ``DATASETS.TRAIN`` does not fit it."""
        found = count_classes(model)
        say_other_spaces(self.told, {layout.space for layout in layouts_of(model)}, target_key)
        target, yields = dict(self.settings.target), set[str]()
        for space, table in self.trained.items():
            count = found.get(space) if found else self.counts.get(space)
            if count == len(table):
                target[space] = table
            elif count is not None and count > len(table):
                target[space] = table.padded(count)
                if not _training:
                    yields.add(space)
            if count is not None and count != len(table):
                self._say(space, table, count)
        return replace(self.settings, target=target, yields=frozenset(yields), as_stock=True)

    def _say(self, space: str, table: ClassTable, count: int) -> None:
        names = ", ".join(self.datasets)
        build = f"To build it for them, type --set {target_key(space)!s} {self.datasets[0]}"
        if count > len(table):
            last = count - 1
            rows = f"row {last} has" if last == len(table) else f"rows {len(table)} to {last} have"
            logger.warning(
                "%s has %d %s classes and the script's model %d, which stays: %s no name. %s.",
                names, len(table), space, count, rows, build,
            )  # fmt: skip
        elif _training:
            logger.warning(
                "%s has %d %s classes and the script's model %d, which stays: no row for a label from %d on. %s.",
                names, len(table), space, count, count, build,
            )  # fmt: skip
        else:
            logger.info(
                "%s has %d %s classes and the script's model %d, which stays: which they are, the checkpoint says. %s.",
                names, len(table), space, count, build,
            )  # fmt: skip


def read_classes(cfg: CfgNode) -> tuple[CfgNode, ScriptClasses]:
    """Read what a script's config says of its classes.

    Returns:
        What the model is built from, the script's config where nothing of it changes, else a changed copy; and the
        classes.

    Raises:
        HeadAdaptError: a key of this package that cannot be used.
    """
    register_datasets(cfg.DATASETS.get("REGISTER", []))
    own = cfg.clone()
    own.defrost()
    names = own.DATASETS.TRAIN
    own.DATASETS.TRAIN = (names,) if isinstance(names, str) else tuple(names)
    keeps = settle_keep(own)
    tasks = has_tasks(own)
    if tasks:
        check_tasks(own)
        settle_tasks(own)
    bare = own.clone()
    bare.DATASETS.TRAIN = ()
    if not tasks:
        bare.MODEL.pop("TASKS", None)
    settings = AdaptSettings.from_config(bare)
    told = frozenset(settings.target)
    if tasks:
        settings = replace(settings, target={**settings.target, **{spec.name: spec.table for spec in task_specs(own)}})
    trained = _tables_of(own.DATASETS.TRAIN, told)
    if _names_us(own):
        settings = replace(settings, target={**trained, **settings.target})
        trained = {}
    lines = settle_counts(own, settings.target)
    for line in lines:
        logger.info(line)
    classes = ScriptClasses(settings, told, trained, own.DATASETS.TRAIN, _counts(own))
    changed = _keep_count(own, classes)
    if not (lines or tasks or changed or keeps):
        return cfg, classes
    if cfg.is_frozen():
        own.freeze()
    return own, classes


def prepare_lazy(lazy: DictConfig) -> None:
    """Let the models of a LazyConfig know their classes, in place; counts are written for a key's classes alone.

    Raises:
        HeadAdaptError: a key of this package that cannot be used.
    """
    make_absolute(lazy.get(NODE), os.getcwd())
    mirror = mirror_of(lazy)
    ours = any(isinstance(one := target_of(node), type) and issubclass(one, OURS) for _, node in calls(lazy.model))
    if ours or mirror.MODEL.TASKS:
        prepare(lazy, reads_labels=False, required=False)
        return
    register_datasets(mirror.DATASETS.REGISTER)
    datasets = tuple(mirror.DATASETS.TRAIN)
    mirror.DATASETS.TRAIN = ()
    prepare(lazy, reads_labels=False, required=False, mirror=mirror, finish=partial(_finish, datasets=datasets))


def _finish(model: nn.Module, settings: AdaptSettings, datasets: tuple[str, ...]) -> None:
    told = frozenset(settings.target)
    attach_settings(model, ScriptClasses(settings, told, _tables_of(datasets, told), datasets, {}).settle(model))


def has_tasks(cfg: CfgNode) -> bool:
    """Tell whether ``MODEL.TASKS`` holds tasks of this package; a script may have a key of that name too."""
    tasks = cfg.MODEL.get("TASKS")
    return isinstance(tasks, CfgNode) and any(
        isinstance(node, Mapping) and (not node or not TASK_DEFAULTS.keys().isdisjoint(node)) for node in tasks.values()
    )


def adopt_training() -> None:
    """Note what a ``DefaultTrainer`` of this process builds."""
    stock = DefaultTrainer.__init__

    @functools.wraps(stock)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        with _noted(type(self).__name__):
            stock(self, *args, **kwargs)

    DefaultTrainer.__init__ = init


@contextmanager
def _noted(name: str) -> Iterator[None]:
    _training.append(name)
    try:
        yield
    finally:
        _training.pop()


def _tables_of(names: tuple[str, ...], told: Collection[str]) -> dict[str, ClassTable]:
    tables = {space: _table_of(names, space) for space in KEY_SUFFIXES if space not in told}
    return {space: table for space, table in tables.items() if table is not None}


def _table_of(names: tuple[str, ...], space: str) -> ClassTable | None:
    """Look up the classes of training sets; unknown, with a warning, where only detectron2 can use them."""
    if not _training and any(name in DatasetCatalog and not _tells(name) for name in names):
        return None  # Only loading would tell, and nobody may ever load it.
    try:
        return training_table(names, space, required=False)
    except HeadAdaptError as exc:
        logger.warning("The classes of %s are taken as unknown: %s", DATASETS.TRAIN, exc)
        return None


def _tells(name: str) -> bool:
    metadata = MetadataCatalog.get(name).as_dict()
    is_coco = metadata.get("evaluator_type") == "coco" and metadata.get("json_file") is not None
    return is_coco or any(metadata.get(key) for key in SPACE_METADATA.values())


def _names_us(cfg: CfgNode) -> bool:
    """Tell whether the config itself names heads or a predictor of ours, whose counts come from their table."""
    return _is_ours(cfg.MODEL.ROI_HEADS.NAME) or cfg.MODEL.HEAD_ADAPT.PREDICTOR != "HeadAdaptOutputLayers"


def _is_ours(name: str) -> bool:
    found = dict(iter(ROI_HEADS_REGISTRY)).get(name)
    return isinstance(found, type) and issubclass(found, HeadAdaptMixin)


def _keep_count(own: CfgNode, classes: ScriptClasses) -> bool:
    """Let heads of this package in place of stock's (``--heads``) have the script's number of classes too."""
    table, count = classes.trained.get("thing"), classes.counts.get("thing")
    name = own.MODEL.ROI_HEADS.NAME
    found = ROI_HEADS_REGISTRY.get(name) if name in ROI_HEADS_REGISTRY else None
    ours = isinstance(found, type) and issubclass(found, HeadAdaptMixin)
    if not ours or count is None or "thing" in classes.settings.target or (table is not None and count == len(table)):
        return False
    if table is not None and count > len(table):
        own.MODEL.HEAD_ADAPT.TARGET_CLASSES = list(table.padded(count).names)
    elif not own.MODEL.ROI_BOX_HEAD.get("USE_FED_LOSS"):  # Whose weights are those of the training set.
        own.DATASETS.TRAIN = ()
    return True


def _counts(cfg: CfgNode) -> dict[str, int]:
    found: dict[str, int] = {}
    for space, key in NUM_CLASSES_KEYS.get(cfg.MODEL.META_ARCHITECTURE, ()):
        count = key.of(cfg)
        if isinstance(count, int):
            found.setdefault(space, count)
    return found
