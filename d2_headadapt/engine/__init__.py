"""Train, evaluate and predict, and launch the processes that do."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..deferred import lazy_names as _lazy_names

# Not lazily, because a submodule has the same name, as in detectron2.engine.
from .launch import launch as launch

if TYPE_CHECKING:
    from .launch import command as command
    from .launch import default_argument_parser as default_argument_parser
    from .train import Trainer as Trainer
    from .train import build_evaluator as build_evaluator
    from .train import main as main
    from .train import setup as setup
    from .train_lazy import main as lazy_main  # noqa: F401

_HOMES = {
    "Trainer": "train",
    "build_evaluator": "train",
    "command": "launch",
    "default_argument_parser": "launch",
    "lazy_main": "train_lazy:main",
    "main": "train",
    "setup": "train",
}
__all__ = [*_HOMES, "launch"]
__getattr__, __dir__ = _lazy_names(__name__, _HOMES)
