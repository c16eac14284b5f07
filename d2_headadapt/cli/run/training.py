"""Checkpointers and ``DefaultTrainer`` of a script."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable
from typing import Any

import torch.distributed
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.data import DatasetMapper
from detectron2.engine import DefaultTrainer, HookBase

from ...checkpoint.checkpointer import HeadAdaptCheckpointer
from ...data.task_mapper import build_task_test_loader, build_task_train_loader
from ...data.task_spec import task_specs
from ...engine.gradient_watch import UntrainedHeads
from ...engine.train import Trainer
from ...fit.hook import FitHook

logger = logging.getLogger(__name__)
_trainers: list[str] = []
"""Of this process, that fit."""


def adopt_checkpointer() -> None:
    """Whoever makes a ``DetectionCheckpointer`` gets this package's; a subclass of the script's own stays."""
    told: set[type] = set()

    def new(cls: type[DetectionCheckpointer], *args: Any, **kwargs: Any) -> DetectionCheckpointer:
        _say_torchrun_alone()
        if cls is DetectionCheckpointer:
            # An instance of a subclass: Python goes on with that one's constructor.
            cls = HeadAdaptCheckpointer
        elif not issubclass(cls, HeadAdaptCheckpointer) and cls not in told:
            told.add(cls)
            logger.warning(
                "%s is a checkpointer of the script's own and is kept, so rows are dropped or loaded as stock does it. "
                "To have them carried by class name, let it inherit from d2_headadapt.HeadAdaptCheckpointer.",
                cls.__name__,
            )
        made: DetectionCheckpointer = object.__new__(cls)
        return made

    DetectionCheckpointer.__new__ = staticmethod(new)


@functools.cache
def _say_torchrun_alone() -> None:
    """Once: processes that torchrun started and that never met each train a model of their own."""
    several = "TORCHELASTIC_RUN_ID" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1
    if several and not torch.distributed.is_initialized():
        logger.warning(
            "torchrun started %s processes, but the script did not join them (torch.distributed.init_process_group): "
            "each trains alone. Scripts that use detectron2's launch are started without torchrun, with --num-gpus.",
            os.environ["WORLD_SIZE"],
        )


def adopt_trainer(*, fit: bool) -> None:
    """A ``DefaultTrainer`` carries and watches the labels of ``MODEL.TASKS``, where there are any.

    Args:
        fit: it also solves new rows before its first iteration.
    """
    stock = DefaultTrainer.build_hooks

    @functools.wraps(stock)
    def build_hooks(self: Any) -> list[HookBase | None]:
        hooks: list[HookBase | None] = stock(self)
        if isinstance(self.checkpointer, HeadAdaptCheckpointer):
            _trainers.append(type(self).__name__)
        if isinstance(self, Trainer):  # Which does all of it, as its own yaml keys say.
            return hooks
        if fit and isinstance(self.checkpointer, HeadAdaptCheckpointer):
            hooks.insert(
                0, FitHook.from_config(self.cfg, lambda: self.checkpointer.rows_to_fit(), skip="leave out --fit")
            )
        if self.cfg.MODEL.get("TASKS"):
            # Before all others, because an evaluation calls the model too.
            hooks.insert(0, UntrainedHeads(task_specs(self.cfg)))
        return hooks

    DefaultTrainer.build_hooks = build_hooks
    for name, ours in (("build_train_loader", build_task_train_loader), ("build_test_loader", build_task_test_loader)):
        setattr(DefaultTrainer, name, classmethod(_with_tasks(getattr(DefaultTrainer, name).__func__, ours)))


def adopt_mapper() -> None:
    """Say where a loop of the script's own leaves the labels of tasks behind."""
    stock = DatasetMapper.from_config.__func__

    @functools.wraps(stock)
    def from_config(cls: type[DatasetMapper], cfg: Any, is_train: bool = True) -> Any:
        if cls is DatasetMapper and is_train and cfg.MODEL.get("TASKS"):
            logger.warning(
                "MODEL.TASKS: the script's data loader has detectron2's DatasetMapper, which leaves the labels of "
                "tasks out, so their heads are not trained. Give it mapper=TaskMapper(cfg, True) of "
                "d2_headadapt.data.task_mapper."
            )
        return stock(cls, cfg, is_train)

    DatasetMapper.from_config = classmethod(from_config)


def _with_tasks(stock: Callable[..., Any], ours: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(stock)
    def build_loader(cls: type[DefaultTrainer], cfg: Any, *args: Any) -> Any:
        return ours(cfg, *args) if cfg.MODEL.get("TASKS") else stock(cls, cfg, *args)

    return build_loader


def say_unfitted() -> None:
    """Say that ``--fit`` found nothing to hook into, in a process whose script has done its work."""
    if not _trainers:
        logger.warning(
            "--fit: no new row was solved, because the script trains without detectron2's DefaultTrainer, or with a "
            "checkpointer or build_hooks of its own. d2-headadapt fit writes a checkpoint with solved rows, which any "
            "script loads."
        )
