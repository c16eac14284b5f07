"""Put this package in place in a process, and in every process that it starts."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch.multiprocessing
import torch.multiprocessing.spawn

from ...said import adopt_logger
from .checkpointers import adopt_checkpointer
from .classes import adopt_training
from .configs import adopt_configs, register_entries, registered_entries
from .models import adopt_models
from .training import adopt_mapper, adopt_trainer, say_unfitted

_installed: list[Adoption] = []
_started: list[Any] = []


@dataclass(frozen=True)
class Adoption:
    """The options that a script runs with, in every process of it.

    Args:
        opts: ``KEY VALUE`` pairs that become defaults of the script's config.
        imports: modules or ``.py`` files that register components.
        fit: a ``DefaultTrainer`` solves new rows before its first iteration.
        heads: configs that name stock's ROI heads get this package's.
        plan: the script ends at its first load, whose plan is printed.
        folder: where relative paths of ``opts`` and ``imports`` start.
    """

    opts: tuple[str, ...] = ()
    imports: tuple[str, ...] = ()
    fit: bool = False
    heads: bool = False
    plan: bool = False
    folder: str = field(default_factory=os.getcwd)

    def install(self) -> None:
        """Put this package in place in this process; a second call does nothing.

        Raises:
            UsageError: an import that fails.
            ConfigError: ``opts`` that the config does not have.
        """
        if _installed:
            return
        adopt_logger()
        imports = [os.path.join(self.folder, name) if name.endswith(".py") else name for name in self.imports]
        adopt_configs(self.opts, imports, self.folder)
        adopt_checkpointer(plan=self.plan)
        adopt_models(heads=self.heads)
        adopt_training()
        adopt_trainer(fit=self.fit)
        adopt_mapper()
        _adopt_processes(self)
        _installed.append(self)

    def finish(self) -> None:
        """Say what was asked for and did not happen, once the script is done; processes that it started have."""
        if self.fit and not _started:
            say_unfitted()


class Adopted:
    """The function of a spawned process."""

    def __init__(self, function: Callable[..., Any], adoption: Adoption) -> None:
        self.function, self.adoption = function, adoption

    def __call__(self, *args: Any) -> Any:
        """Call the function in a spawned process, then finish the adoption there."""
        _started.clear()  # A fork has its parent's.
        result = self.function(*args)
        self.adoption.finish()
        return result

    def __reduce__(self) -> Any:
        return _adopted, (self.adoption, registered_entries(), self.function)


def _adopted(adoption: Adoption, entries: Sequence[Any], function: Callable[..., Any]) -> Adopted:
    adoption.install()
    register_entries(entries)
    return Adopted(function, adoption)


def _adopt_processes(adoption: Adoption) -> None:
    processes: Any = torch.multiprocessing
    stock = processes.start_processes

    @functools.wraps(stock)
    def start_processes(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        _started.append(fn)
        return stock(Adopted(fn, adoption), *args, **kwargs)

    # detectron2's launch looks it up here when it is called, torch.multiprocessing.spawn in its own module.
    for module in ("torch.multiprocessing", "torch.multiprocessing.spawn"):
        vars(sys.modules[module])["start_processes"] = start_processes
