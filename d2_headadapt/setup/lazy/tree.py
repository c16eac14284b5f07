"""Walk the LazyCall nodes of a LazyConfig, and hand their classes what a config does not hold."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from typing import Any

from detectron2.config import instantiate
from detectron2.utils.registry import _convert_target_to_string, locate
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ...errors import ConfigError, HeadAdaptError


def built(node: Any, path: str) -> Any:
    """Build what a node of a LazyConfig describes.

    Args:
        node: a LazyCall, or a list of them.
        path: its dotted path, for messages.

    Raises:
        ConfigError: a call refuses its arguments; names the innermost one. What else a function raises passes through.
    """
    try:
        return instantiate(node)
    except (HeadAdaptError, OmegaConfBaseException):
        raise
    except (TypeError, AttributeError, KeyError, ValueError, AssertionError, ImportError) as exc:
        called, line = None, ""
        for frame, number in traceback.walk_tb(exc.__traceback__):
            if frame.f_code is _INSTANTIATE:
                called = frame.f_locals.get("cls", called)
            if str(frame.f_globals.get("__name__")).partition(".")[0] not in ("detectron2", "torch", "d2_headadapt"):
                line = f" ({frame.f_code.co_filename}, line {number})"
        called = called.shown if isinstance(called, Call) else called
        where = next((inner for inner, call in calls(node) if called is not None and target_of(call) == called), "")
        raise ConfigError(
            f"{path}.{where}" if where else path,
            expected=f"arguments that {getattr(called, '__name__', 'its _target_')} can be called with",
            found=f"{type(exc).__name__}: {' '.join(str(exc).split())[:300]}{line}",
            fix="Correct the arguments of that node, or its _target_.",
        ) from exc


_INSTANTIATE = instantiate.__code__


class Call:
    """A ``_target_`` that gives its call what a config cannot hold. A saved config names ``shown``.

    Args:
        call: the class or function.
        arguments: for it, where the node does not have them itself.
        after: gets what was made.
        shown: the class or function that the node stands for.
    """

    def __init__(
        self, call: Any, arguments: Mapping[str, Any], after: Callable[[Any], None] | None = None, shown: Any = None
    ) -> None:
        self.call, self.arguments, self.after = call, dict(arguments), after
        self.shown = call if shown is None else shown
        # What LazyConfig.save writes in place of an object. A partial or what a config file defines has no such name.
        with suppress(AttributeError):
            self.__module__ = _convert_target_to_string(self.shown).removesuffix(f".{self.shown.__qualname__}")
            self.__qualname__ = self.shown.__qualname__

    def __call__(self, **own: Any) -> Any:
        made = self.call(**{**self.arguments, **own})
        if self.after is not None:
            self.after(made)
        return made


def give(node: DictConfig, call: Any, *, shown: Any = None, **arguments: Any) -> None:
    """Let ``node`` be a :class:`Call` with these arguments, in place of an earlier one; in place."""
    node._target_ = Call(call, arguments, shown=shown)


def follow(node: DictConfig, after: Callable[[Any], None]) -> None:
    """Let ``after`` get what ``node`` makes, in place of an earlier one; in place."""
    found = node._target_
    if isinstance(found, Call):
        node._target_ = Call(found.call, found.arguments, after, found.shown)
    else:
        node._target_ = Call(target_of(node), {}, after)


def target_of(node: Any) -> Any:
    """Return the class or function that a node stands for; ``None`` where it is no LazyCall."""
    if not isinstance(node, DictConfig) or "_target_" not in node:
        return None
    found = node._target_
    if isinstance(found, Call):
        return found.shown
    if not isinstance(found, str):
        return found
    try:
        return locate(found)
    except Exception as exc:
        # The module's own import may raise anything.
        raise ConfigError(
            f"_target_ {found!r}",
            expected="the full name of a class or function that can be imported",
            found=f"{type(exc).__name__}: {' '.join(str(exc).split())}",
            fix="Correct it, as in detectron2.modeling.GeneralizedRCNN.",
        ) from exc


def calls(node: Any, path: str = "") -> Iterator[tuple[str, DictConfig]]:
    """Yield every LazyCall node at or below ``node`` with its dotted path, outer ones first."""
    if isinstance(node, DictConfig):
        if "_target_" in node:
            yield path, node
        for key in map(str, node):
            if key != "_target_" and not OmegaConf.is_missing(node, key) and not OmegaConf.is_interpolation(node, key):
                yield from calls(node._get_node(key), f"{path}.{key}".lstrip("."))
    elif isinstance(node, ListConfig):
        for i in range(len(node)):
            if not OmegaConf.is_interpolation(node, i):
                yield from calls(node._get_node(i), f"{path}[{i}]")


def select(node: Any, key: str, default: Any = None) -> Any:
    """Look up the value under a dotted key, lists as plain ones; ``default`` where there is none, or ``None``."""
    for name in key.split("."):
        if not isinstance(node, DictConfig) or node._is_none() or name not in node:
            return default
        node = node[name]
    if isinstance(node, ListConfig) and not any(OmegaConf.is_config(inner) for inner in node):
        return OmegaConf.to_container(node, resolve=True)
    return default if node is None else node


def names_in(node: Any) -> tuple[str, ...]:
    """List the dataset names of a ``dataloader.train`` or ``dataloader.test``: the first ``names`` of a call below."""
    for _, call in calls(node):
        found = select(call, "names")
        if isinstance(found, str) and found:
            return (found,)
        if isinstance(found, (list, tuple)) and found and all(isinstance(name, str) for name in found):
            return tuple(found)
    return ()
