"""Make models that a script builds know their classes, and let several CPU processes share one."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from detectron2.config import CfgNode
from detectron2.modeling import META_ARCH_REGISTRY, ROI_HEADS_REGISTRY
from fvcore.common.registry import Registry
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ...config.keep import KeepSettings
from ...config.settings import attach_discovery, attach_settings
from ...modeling.keep_model import attach_keep
from ...setup.count_keys import discover_yaml
from ...setup.shape_builds import observing
from ...setup.task_checks import TWINS
from .classes import read_classes


class Architecture:
    """A registered meta-architecture whose models know their classes; whatever else is asked of it answers itself."""

    def __init__(self, stock: Callable[..., Any]) -> None:
        self.stock = stock
        functools.update_wrapper(self, stock, updated=())

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        cfg = args[0] if args else kwargs.get("cfg")
        # A build for its shapes alone has the counts that it shall have.
        if observing() or not isinstance(cfg, CfgNode) or "HEAD_ADAPT" not in cfg.MODEL:
            return self.stock(*args, **kwargs)
        own, classes = read_classes(cfg)
        if args:
            args = (own, *args[1:])
        else:
            kwargs["cfg"] = own
        model: nn.Module = self.stock(*args, **kwargs)
        attach_settings(model, classes.settle(model))
        attach_discovery(model, functools.partial(discover_yaml, own.clone()))
        return attach_keep(model, KeepSettings.from_config(own))

    def __getattr__(self, name: str) -> Any:
        if name == "stock":  # Of a copy that is being made.
            raise AttributeError(name)
        return getattr(self.stock, name)

    def __instancecheck__(self, instance: Any) -> bool:
        return isinstance(instance, self.stock)  # type: ignore[arg-type]

    def __mro_entries__(self, bases: tuple[Any, ...]) -> tuple[Any, ...]:
        """Derive a script's own class from the architecture itself."""
        return (self.stock,)


def adopt_models(*, heads: bool) -> None:
    """Change registries and ``DistributedDataParallel`` of this process.

    Args:
        heads: configs that name stock's ROI heads get this package's.
    """
    stock = Registry.get

    @functools.wraps(stock)
    def get(self: Registry, name: str) -> Any:
        found = stock(self, name)
        # Projects have registries of their own under this name.
        return Architecture(found) if self._name == META_ARCH_REGISTRY._name else found

    Registry.get = get
    if heads:
        stock_heads = ROI_HEADS_REGISTRY.get
        ROI_HEADS_REGISTRY.get = lambda name: stock_heads(TWINS.get(name, name))
    _adopt_cpus()


def _adopt_cpus() -> None:
    """Drop ``device_ids``, which scripts pass and ``DistributedDataParallel`` refuses for models on CPUs."""
    stock = DistributedDataParallel.__init__

    @functools.wraps(stock)
    def init(
        self: Any, module: nn.Module, device_ids: Any = None, output_device: Any = None, *args: Any, **kwargs: Any
    ) -> None:
        if all(p.device.type == "cpu" for p in module.parameters()):
            device_ids = output_device = None
        stock(self, module, device_ids, output_device, *args, **kwargs)

    DistributedDataParallel.__init__ = init  # type: ignore[method-assign]
