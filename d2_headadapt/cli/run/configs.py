"""Add this package's keys to the configs that a script reads: yaml and LazyConfig."""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from typing import Any

from detectron2.config import CfgNode, LazyConfig

# Private, and the same in every release: the one object that get_cfg copies.
from detectron2.config.defaults import _C

from ...config.keys import add_headadapt_config
from ...data.datasets import absolute_entries, register_datasets
from ...data.task_spec import complete_tasks
from ...key import DATASETS, HEAD_ADAPT, MODEL, TASKS
from ...setup.components import add_component_keys, import_components
from ...setup.lazy import is_lazy
from ...setup.lazy.loading import paths_of_each_file
from ...setup.yaml import merge, settle_yaml
from .classes import has_tasks, prepare_lazy

_registered: list[Any] = []
OUR_NODES = (HEAD_ADAPT, TASKS, MODEL.CLASSIFIER, MODEL.CONV_NET, DATASETS.REGISTER)
"""What :func:`add_headadapt_config` adds."""


def adopt_configs(opts: Sequence[str], imports: Sequence[str], folder: str) -> None:
    """Let every config of this process know this package's keys, and those of the user's components.

    ``DATASETS.REGISTER`` is registered where a config is merged, because a script may build its data loaders before
    its model.

    Args:
        opts: ``KEY VALUE`` pairs that become defaults.
        imports: modules or ``.py`` files that register components.
        folder: where relative paths of the command line start.

    Raises:
        UsageError: an import that fails.
        ConfigError: ``opts`` that the config does not have, or of another type than their keys.
    """
    add_headadapt_config(_C)
    add_component_keys(_C, import_components(imports))
    merge(_C, "--set", lambda: _C.merge_from_list(list(opts)))
    _settle(_C, folder)
    _adopt_yaml()
    _adopt_lazy()


def registered_entries() -> list[Any]:
    """List what was registered here so far, for new processes: a config handed to them is not merged there."""
    return list(_registered)


def register_entries(entries: Sequence[Any]) -> None:
    """Register datasets that are not yet, and remember them."""
    register_datasets(entries)
    _registered.extend(entry for entry in entries if entry not in _registered)


def _settle(cfg: CfgNode, folder: str) -> None:
    if "HEAD_ADAPT" not in cfg.get("MODEL", {}) or "REGISTER" not in cfg.get("DATASETS", {}):
        return
    if has_tasks(cfg):
        complete_tasks(cfg)
    cfg.DATASETS.REGISTER = absolute_entries(cfg.DATASETS.REGISTER, folder)
    register_entries(cfg.DATASETS.REGISTER)


def _adopt_yaml() -> None:
    stock_load = CfgNode.load_yaml_with_base.__func__

    @functools.wraps(stock_load)
    def load_yaml_with_base(cls: type[CfgNode], filename: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
        loaded: dict[str, Any] = stock_load(cls, filename, *args, **kwargs)
        settle_yaml(loaded, filename)
        return loaded

    CfgNode.load_yaml_with_base = classmethod(load_yaml_with_base)
    for name in ("merge_from_file", "merge_from_list", "merge_from_other_cfg"):
        setattr(CfgNode, name, _settling(getattr(CfgNode, name)))
    stock_dump = CfgNode.dump

    @functools.wraps(stock_dump)
    def dump(self: CfgNode, *args: Any, **kwargs: Any) -> Any:
        return stock_dump(_without_our_defaults(self), *args, **kwargs)

    CfgNode.dump = dump


def _settling(stock: Any) -> Any:
    @functools.wraps(stock)
    def merge_and_settle(self: CfgNode, *args: Any, **kwargs: Any) -> None:
        stock(self, *args, **kwargs)
        _settle(self, os.getcwd())

    return merge_and_settle


def _without_our_defaults(cfg: CfgNode) -> CfgNode:
    """Copy a config without the keys of ours that nobody set: who reads a dump may not know them."""
    if not isinstance(cfg.get("MODEL"), CfgNode) or "HEAD_ADAPT" not in cfg.MODEL:
        return cfg
    copy = cfg.clone()
    copy.defrost()
    for key in OUR_NODES:
        *around, last = key.yaml.split(".")
        own, default = _node(copy, around), _node(_C, around)
        if own is not None and last in own and default is not None:
            left = _difference(own[last], default[last])
            if left is None:
                del own[last]
            else:
                own[last] = left
    return copy


def _node(cfg: CfgNode, path: Sequence[str]) -> CfgNode | None:
    for name in path:
        cfg = cfg.get(name)
        if not isinstance(cfg, CfgNode):
            return None
    return cfg


def _difference(value: Any, default: Any) -> Any:
    """Return what of ``value`` is not ``default``; ``None`` where nothing is."""
    if not isinstance(value, CfgNode) or not isinstance(default, CfgNode):
        return None if value == default else value
    left: dict[str, Any] = {}
    for key, one in value.items():
        other = _difference(one, default[key]) if key in default else one
        if other is not None:
            left[key] = other
    return CfgNode(left) if left else None


def _adopt_lazy() -> None:
    stock_load, stock_overrides = LazyConfig.load, LazyConfig.apply_overrides
    inside = False

    @functools.wraps(stock_load)
    def load(*args: Any, **kwargs: Any) -> Any:
        nonlocal inside
        if inside:
            return stock_load(*args, **kwargs)
        inside = True
        try:
            with paths_of_each_file():
                return LazyConfig.load(*args, **kwargs)
        finally:
            inside = False

    @functools.wraps(stock_overrides)
    def apply_overrides(cfg: Any, *args: Any, **kwargs: Any) -> Any:
        cfg = stock_overrides(cfg, *args, **kwargs)
        if is_lazy(cfg):
            prepare_lazy(cfg)
        return cfg

    LazyConfig.load, LazyConfig.apply_overrides = staticmethod(load), staticmethod(apply_overrides)
