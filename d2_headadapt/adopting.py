"""Existing detectron2 scripts, unmodified, with this package in place: ``d2-headadapt run``.

A script has imported names before anything of ours runs, and spawned processes import it again, so replacing
attributes of modules would not reach it. Classes, the default config and the registries are the same objects
everywhere, and are changed in place; the function of a spawned process is wrapped in an object whose unpickling does
the same there.
"""

from __future__ import annotations

import functools
import logging
import os
import runpy
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch.multiprocessing
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode
from detectron2.config.defaults import _C
from detectron2.engine import DefaultTrainer, HookBase
from detectron2.modeling import META_ARCH_REGISTRY, ROI_HEADS_REGISTRY
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from .checkpoint import HeadAdaptCheckpointer
from .components import add_component_keys, import_components
from .config import add_headadapt_config
from .datasets import register_datasets
from .errors import UsageError
from .fit.training import FitHook
from .settings import AdaptSettings, apply_num_classes, attach_settings

logger = logging.getLogger(__name__)
HEADS = {
    "StandardROIHeads": "HeadAdaptROIHeads",
    "CascadeROIHeads": "HeadAdaptCascadeROIHeads",
    "Res5ROIHeads": "HeadAdaptRes5ROIHeads",
}
"""Stock ROI heads -> those of this package in their place."""


@dataclass(frozen=True)
class Adoption:
    """What a script runs with, in every process of it.

    Args:
        opts: ``KEY VALUE`` pairs that become defaults of the script's config.
        imports: modules or ``.py`` files that register components.
        fit: a ``DefaultTrainer`` solves new rows before its first iteration.
        heads: configs that name stock's ROI heads get this package's.
    """

    opts: tuple[str, ...] = ()
    imports: tuple[str, ...] = ()
    fit: bool = False
    heads: bool = False

    def install(self) -> None:
        """Put this package in place in this process; a second call does nothing.

        Raises:
            UsageError: an import that fails.
            KeyError, ValueError: ``opts`` that the config does not have.
        """
        if "_adopted" in vars(DetectionCheckpointer):
            return
        DetectionCheckpointer._adopted = True
        add_headadapt_config(_C)
        add_component_keys(_C, import_components(self.imports))
        _C.merge_from_list(list(self.opts))
        _adopt_checkpointer()
        _adopt_models()
        _adopt_cpus()
        _adopt_processes(self)
        if self.heads:
            stock = ROI_HEADS_REGISTRY.get
            ROI_HEADS_REGISTRY.get = lambda name: stock(HEADS.get(name, name))
        if self.fit:
            _adopt_fit()


class Adopted:
    """The function of a spawned process."""

    def __init__(self, function: Callable[..., Any], adoption: Adoption) -> None:
        self.function, self.adoption = function, adoption

    def __call__(self, *args: Any) -> Any:
        """Call it."""
        return self.function(*args)

    def __reduce__(self) -> Any:
        return _adopted, (self.adoption, self.function)


def _adopted(adoption: Adoption, function: Callable[..., Any]) -> Adopted:
    adoption.install()
    return Adopted(function, adoption)


def run_script(command: Sequence[str], adoption: Adoption) -> None:
    """Run a script, or ``-m`` and a module, as ``python`` would, with this package in place.

    Args:
        command: the script or ``-m module``, and its arguments.
        adoption: how.

    Raises:
        UsageError: there is no such script.
    """
    adoption.install()
    if command[0] == "-m":
        sys.argv = list(command[1:])
        sys.path.insert(0, os.getcwd())
        runpy.run_module(command[1], run_name="__main__", alter_sys=True)
        return
    script = command[0]
    if not os.path.isfile(script):
        raise UsageError(
            "d2-headadapt run", expected="a Python script", found=f"no file {script!r}", fix="Correct the path."
        )
    sys.argv = list(command)
    sys.path.insert(0, os.path.dirname(os.path.abspath(script)))
    runpy.run_path(script, run_name="__main__")


def _adopt_checkpointer() -> None:
    told: set[type] = set()

    def new(cls: type[DetectionCheckpointer], *args: Any, **kwargs: Any) -> DetectionCheckpointer:
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

    DetectionCheckpointer.__new__ = new


def _adopt_models() -> None:
    stock = META_ARCH_REGISTRY.get

    def get(name: str) -> Callable[..., Any]:
        architecture: Callable[..., Any] = stock(name)

        @functools.wraps(architecture, updated=())
        def build(cfg: Any, *args: Any, **kwargs: Any) -> Any:
            if not isinstance(cfg, CfgNode) or "HEAD_ADAPT" not in cfg.MODEL:
                return architecture(cfg, *args, **kwargs)
            return _build(architecture, cfg, *args, **kwargs)

        return build

    META_ARCH_REGISTRY.get = get


def _build(architecture: Callable[..., Any], cfg: CfgNode, *args: Any, **kwargs: Any) -> nn.Module:
    register_datasets(cfg.DATASETS.REGISTER)
    settings = AdaptSettings.from_config(cfg, registered_only=True)
    # The script's own config stays as it is.
    own = cfg.clone()
    own.defrost()
    for line in apply_num_classes(own, settings.target):
        logger.info(line)
    own.freeze()
    model: nn.Module = architecture(own, *args, **kwargs)
    attach_settings(model, settings)
    return model


def _adopt_cpus() -> None:
    """Scripts pass ``device_ids``, which ``DistributedDataParallel`` refuses for models on CPUs."""
    stock = DistributedDataParallel.__init__

    @functools.wraps(stock)
    def init(self: Any, module: nn.Module, device_ids: Any = None, *args: Any, **kwargs: Any) -> None:
        if all(p.device.type == "cpu" for p in module.parameters()):
            device_ids = None
        stock(self, module, device_ids, *args, **kwargs)

    DistributedDataParallel.__init__ = init  # type: ignore[method-assign]


def _adopt_processes(adoption: Adoption) -> None:
    # detectron2's launch looks this name up when it is called.
    processes: Any = torch.multiprocessing
    stock = processes.start_processes

    @functools.wraps(stock)
    def start_processes(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return stock(Adopted(fn, adoption), *args, **kwargs)

    processes.start_processes = start_processes


def _adopt_fit() -> None:
    stock = DefaultTrainer.build_hooks

    @functools.wraps(stock)
    def build_hooks(self: Any) -> list[HookBase | None]:
        hooks: list[HookBase | None] = stock(self)
        ours = isinstance(self.checkpointer, HeadAdaptCheckpointer)
        if ours and not any(isinstance(hook, FitHook) for hook in hooks):
            hooks.insert(0, FitHook.from_config(self.cfg, lambda: self.checkpointer.rows_to_fit()))
        return hooks

    DefaultTrainer.build_hooks = build_hooks
