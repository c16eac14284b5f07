"""``DefaultTrainer`` and data loaders of a script."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

from detectron2.data import DatasetMapper
from detectron2.engine import DefaultTrainer, HookBase

from ...checkpoint.checkpointer import HeadAdaptCheckpointer
from ...data.task_mapper import build_task_test_loader, build_task_train_loader
from ...data.task_spec import task_specs
from ...engine.gradient_watch import UntrainedHeads
from ...engine.train import Trainer
from ...fit.hook import FitHook
from ...key import TASKS
from .classes import has_tasks

logger = logging.getLogger(__name__)
_trainers: list[str] = []
"""Of this process, that fit."""


def adopt_trainer(*, fit: bool) -> None:
    """Let ``DefaultTrainer`` carry and watch the labels of ``MODEL.TASKS``, where there are any.

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
        if has_tasks(self.cfg):
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
        if cls is DatasetMapper and is_train and has_tasks(cfg):
            logger.warning(
                "%s: the script's data loader has detectron2's DatasetMapper, which leaves the labels of "
                "tasks out, so their heads are not trained. Give it mapper=TaskMapper(cfg, True) of "
                "d2_headadapt.data.",
                TASKS,
            )
        return stock(cls, cfg, is_train)

    DatasetMapper.from_config = classmethod(from_config)


def _with_tasks(stock: Callable[..., Any], ours: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(stock)
    def build_loader(cls: type[DefaultTrainer], cfg: Any, *args: Any) -> Any:
        return ours(cfg, *args) if has_tasks(cfg) else stock(cls, cfg, *args)

    return build_loader


def say_unfitted() -> None:
    """Warn where ``--fit`` found nothing to hook into, in a process whose script has done its work."""
    if not _trainers:
        logger.warning(
            "--fit: no new row was solved, because the script trains without detectron2's DefaultTrainer, or with a "
            "checkpointer or build_hooks of its own. d2-headadapt fit writes a checkpoint with solved rows, which any "
            "script loads."
        )
