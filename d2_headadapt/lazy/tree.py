"""Walking the LazyCall nodes of a LazyConfig, and handing their classes what a config does not hold."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from detectron2.utils.registry import _convert_target_to_string, locate
from omegaconf import DictConfig, ListConfig, OmegaConf


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
        # What LazyConfig.save writes in place of an object.
        self.__qualname__ = self.shown.__qualname__
        self.__module__ = _convert_target_to_string(self.shown).removesuffix(f".{self.__qualname__}")

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
    """The class or function that a node stands for; ``None`` where it is no LazyCall."""
    if not isinstance(node, DictConfig) or "_target_" not in node:
        return None
    found = node._target_
    if isinstance(found, Call):
        return found.shown
    return locate(found) if isinstance(found, str) else found


def calls(node: Any, path: str = "") -> Iterator[tuple[str, DictConfig]]:
    """Every LazyCall node at or below ``node`` with its dotted path, outer ones first."""
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
    """The value under a dotted key, lists as plain ones; ``default`` where there is none, or ``None``."""
    for name in key.split("."):
        if not isinstance(node, DictConfig) or node._is_none() or name not in node:
            return default
        node = node[name]
    if isinstance(node, ListConfig) and not any(OmegaConf.is_config(inner) for inner in node):
        return OmegaConf.to_container(node, resolve=True)
    return default if node is None else node


def names_in(node: Any) -> tuple[str, ...]:
    """The dataset names of a ``dataloader.train`` or ``dataloader.test``: the first ``names`` of a call below it."""
    for _, call in calls(node):
        found = select(call, "names")
        if isinstance(found, str) and found:
            return (found,)
        if isinstance(found, (list, tuple)) and found and all(isinstance(name, str) for name in found):
            return tuple(found)
    return ()
