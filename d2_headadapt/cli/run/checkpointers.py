"""Checkpointers of a script: stock's, subclasses of the script's own, and what is neither."""

from __future__ import annotations

import functools
import logging
import os
from typing import Any

import torch.distributed
from detectron2.checkpoint import DetectionCheckpointer
from fvcore.common.checkpoint import Checkpointer

from ...checkpoint.checkpointer import HeadAdaptCheckpointer
from .planning import adopt_planning, stop_at_load

logger = logging.getLogger(__name__)
DECIDE = ("load", "_load_model")
"""The methods that decide what a load does with the weights; a class with another one cannot have this package's."""
_told: set[type] = set()


def adopt_checkpointer(*, plan: bool = False) -> None:
    """Give whoever makes a ``DetectionCheckpointer`` this package's; a subclass gets it below itself.

    A subclass keeps its methods. One that decides by itself what a load does, and fvcore's ``Checkpointer``, stay as
    they are and are named, with the lines to change.

    Args:
        plan: the first load, also one of these, prints its plan and ends the script.
    """
    if plan:
        adopt_planning()

    def new(cls: type[Checkpointer], *args: Any, **kwargs: Any) -> Checkpointer:
        _say_torchrun_alone()
        # An instance of a subclass: Python goes on with that one's constructor.
        kind = _class_in_place_of(cls)
        if plan:
            stop_at_load(kind)
        made: Checkpointer = object.__new__(kind)
        return made

    Checkpointer.__new__ = staticmethod(new)


def overridden(cls: type[Checkpointer]) -> list[str]:
    """List the methods of :data:`DECIDE` that a subclass of ``DetectionCheckpointer`` brings itself."""
    stock = (DetectionCheckpointer, Checkpointer)
    return [name for name in DECIDE if next(one for one in cls.__mro__ if name in vars(one)) not in stock]


def _class_in_place_of(cls: type[Checkpointer]) -> type[Checkpointer]:
    if cls is DetectionCheckpointer:
        return HeadAdaptCheckpointer
    if issubclass(cls, HeadAdaptCheckpointer):
        return cls
    if issubclass(cls, DetectionCheckpointer) and not overridden(cls):
        kind: Any = cls  # Classes are hashable; the one that made this one is detectron2's.
        return _mixed(kind)
    if cls not in _told:
        _told.add(cls)
        _say_kept(cls)
    return cls


@functools.cache
def _mixed(cls: type[DetectionCheckpointer]) -> type[DetectionCheckpointer]:
    """Make a subclass of a script's checkpointer and, below it, of this package's."""

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        cls.__init__(self, *args, **kwargs)
        if not hasattr(self, "settings"):  # Its constructor names that of stock.
            self.begin(None)

    members: dict[str, Any] = {"__init__": init, "__module__": cls.__module__, "__qualname__": cls.__qualname__}
    logger.info(
        "%s is a checkpointer of the script's own and keeps its methods; below them, "
        "d2_headadapt.HeadAdaptCheckpointer carries rows by class name.",
        cls.__name__,
    )
    return type(cls.__name__, (cls, HeadAdaptCheckpointer), members)


def _say_kept(cls: type[Checkpointer]) -> None:
    importing = "from d2_headadapt import HeadAdaptCheckpointer"
    if issubclass(cls, DetectionCheckpointer):
        why = f"has {' and '.join(f'a {name} of its own' for name in overridden(cls))}"
        lines = f"{importing}; class {cls.__name__}(HeadAdaptCheckpointer):, without that method"
    elif cls is Checkpointer:
        why = "is fvcore's"
        lines = f"{importing}; HeadAdaptCheckpointer(...) where Checkpointer(...) is called"
    else:
        why = "comes from fvcore's Checkpointer"
        lines = f"{importing}; class {cls.__name__}(HeadAdaptCheckpointer):"
    logger.warning(
        "%s %s and is kept, so rows are dropped or loaded as stock does it. To have them carried by class name, change "
        "two lines: %s",
        cls.__name__,
        why,
        lines,
    )


@functools.cache
def _say_torchrun_alone() -> None:
    """Warn once where processes of torchrun never met: each trains a model of its own."""
    several = "TORCHELASTIC_RUN_ID" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1
    if several and not torch.distributed.is_initialized():
        logger.warning(
            "torchrun started %s processes, but the script did not join them (torch.distributed.init_process_group): "
            "each trains alone. Scripts that use detectron2's launch are started without torchrun, with --num-gpus.",
            os.environ["WORLD_SIZE"],
        )
