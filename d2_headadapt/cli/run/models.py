"""Models that a script builds know their classes; several CPU processes share one."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

from detectron2.config import CfgNode
from detectron2.modeling import META_ARCH_REGISTRY, ROI_HEADS_REGISTRY
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ...config.settings import AdaptSettings, attach_discovery, attach_settings
from ...data.datasets import register_datasets
from ...data.task_datasets import settle_tasks
from ...setup.class_counts import settle_counts
from ...setup.count_keys import discover_yaml
from ...setup.shape_builds import observing
from ...setup.task_checks import TWINS, check_tasks

logger = logging.getLogger(__name__)


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
        own, settings = _own_config(cfg)
        if args:
            args = (own, *args[1:])
        else:
            kwargs["cfg"] = own
        model: nn.Module = self.stock(*args, **kwargs)
        attach_settings(model, settings)
        attach_discovery(model, functools.partial(discover_yaml, own.clone()))
        return model

    def __getattr__(self, name: str) -> Any:
        if name == "stock":  # Of a copy that is being made.
            raise AttributeError(name)
        return getattr(self.stock, name)

    def __instancecheck__(self, instance: Any) -> bool:
        return isinstance(instance, self.stock)  # type: ignore[arg-type]

    def __mro_entries__(self, bases: tuple[Any, ...]) -> tuple[Any, ...]:
        """A class of the script's own derives from the architecture itself."""
        return (self.stock,)


def adopt_models(*, heads: bool) -> None:
    """Change registries and ``DistributedDataParallel`` of this process.

    Args:
        heads: configs that name stock's ROI heads get this package's.
    """
    stock = META_ARCH_REGISTRY.get
    META_ARCH_REGISTRY.get = lambda name: Architecture(stock(name))
    if heads:
        stock_heads = ROI_HEADS_REGISTRY.get
        ROI_HEADS_REGISTRY.get = lambda name: stock_heads(TWINS.get(name, name))
    _adopt_cpus()


def _own_config(cfg: CfgNode) -> tuple[CfgNode, AdaptSettings]:
    """What the model is built from: the script's config where nothing of it changes, else a changed copy."""
    register_datasets(cfg.DATASETS.REGISTER)
    own = cfg.clone()
    own.defrost()
    if own.MODEL.TASKS:
        check_tasks(own)
        settle_tasks(own)
    settings = AdaptSettings.from_config(own)
    lines = settle_counts(own, settings.target)
    for line in lines:
        logger.info(line)
    if not lines and not own.MODEL.TASKS:
        return cfg, settings
    if cfg.is_frozen():
        own.freeze()
    return own, settings


def _adopt_cpus() -> None:
    """Scripts pass ``device_ids``, which ``DistributedDataParallel`` refuses for models on CPUs."""
    stock = DistributedDataParallel.__init__

    @functools.wraps(stock)
    def init(
        self: Any, module: nn.Module, device_ids: Any = None, output_device: Any = None, *args: Any, **kwargs: Any
    ) -> None:
        if all(p.device.type == "cpu" for p in module.parameters()):
            device_ids = output_device = None
        stock(self, module, device_ids, output_device, *args, **kwargs)

    DistributedDataParallel.__init__ = init  # type: ignore[method-assign]
