"""Patterns on tensor names: what to rename, take, leave out and freeze. A pattern that matches nothing is an error."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import TypeVar

from detectron2.layers import FrozenBatchNorm2d
from torch import nn

from .classes import did_you_mean
from .errors import ConfigError

T = TypeVar("T")


def rename(tensors: Mapping[str, T], rules: Sequence[str], key: str = "MODEL.HEAD_ADAPT.RENAME") -> dict[str, T]:
    """Apply ``"regex=replacement"`` rules to the names, one after the other, as ``re.sub`` does.

    Args:
        tensors: by name.
        rules: for example ``"^encoder\\.=backbone.bottom_up."``.
        key: the config key, for messages.

    Raises:
        ConfigError: a rule that is none, that changes no name, or that gives two tensors one name.
    """
    named = dict(tensors)
    for rule in rules:
        where = f"{key}, {rule!r}"
        pattern, equals, replacement = rule.partition("=")
        if not equals or not pattern:
            raise ConfigError(where, expected="'regex=replacement'", found=repr(rule), fix="Add the part after '='.")
        try:
            compiled = re.compile(pattern)
            renamed = [(compiled.sub(replacement, name), name) for name in named]
        except (re.error, IndexError) as exc:
            raise ConfigError(where, expected="a regular expression", found=str(exc), fix="Correct it.") from exc
        if all(new == old for new, old in renamed):
            raise _no_match(where, pattern, named)
        by_new: dict[str, str] = {}
        for new, old in renamed:
            if new in by_new:
                raise ConfigError(
                    where,
                    expected="a name of its own for every tensor",
                    found=f"{new} for {by_new[new]} and for {old}",
                    fix="Make the pattern narrower.",
                )
            by_new[new] = old
        named = {new: named[old] for new, old in by_new.items()}
    return named


def matched(names: Iterable[str], patterns: Sequence[str], key: str) -> set[str]:
    """The ``names`` that any of the glob ``patterns`` matches.

    Raises:
        ConfigError: a pattern that matches none, with the nearest names.
    """
    names = list(names)
    found: set[str] = set()
    for pattern in patterns:
        hits = {name for name in names if fnmatchcase(name, pattern)}
        if not hits:
            raise _no_match(f"{key}, {pattern!r}", pattern, names)
        found |= hits
    return found


def left_out(names: Iterable[str], include: Sequence[str], exclude: Sequence[str]) -> dict[str, str]:
    """The names that ``INCLUDE`` does not match or ``EXCLUDE`` does, with the reason."""
    names = list(names)
    out: dict[str, str] = {}
    if include:
        taken = matched(names, include, "MODEL.HEAD_ADAPT.INCLUDE")
        out.update({name: "MODEL.HEAD_ADAPT.INCLUDE does not name it" for name in names if name not in taken})
    for name in matched(names, exclude, "MODEL.HEAD_ADAPT.EXCLUDE"):
        out[name] = "MODEL.HEAD_ADAPT.EXCLUDE names it"
    return out


def freeze(model: nn.Module, patterns: Sequence[str]) -> list[str]:
    """Freeze the parameters that the glob ``patterns`` match, in place.

    A batch norm whose parameters are all frozen is replaced by detectron2's ``FrozenBatchNorm2d``: otherwise its
    running statistics would still follow the new data.

    Returns:
        Names of the frozen parameters, in model order.

    Raises:
        ConfigError: a pattern that matches no parameter.
    """
    parameters = dict(model.named_parameters())
    frozen = matched(parameters, patterns, "MODEL.HEAD_ADAPT.FREEZE") if patterns else set()
    for name in frozen:
        parameters[name].requires_grad_(False)
    for path, module in list(model.named_modules()):
        own = {f"{path}.{name}" for name, _ in module.named_parameters(recurse=False)}
        if path and own and own <= frozen and isinstance(module, (nn.BatchNorm2d, nn.SyncBatchNorm)):
            parent, _, child = path.rpartition(".")
            setattr(model.get_submodule(parent), child, FrozenBatchNorm2d.convert_frozen_batchnorm(module))
    return [name for name in parameters if name in frozen]


def _no_match(where: str, pattern: str, names: Iterable[str]) -> ConfigError:
    names = list(names)
    # The last part of a name is the same for hundreds of tensors; the part before it is what people misspell.
    near = did_you_mean(pattern.strip("*^$"), names) or f" Names look like {', '.join(names[-2:])}."
    return ConfigError(
        where, expected=f"a pattern that matches one of {len(names)} names", found="none", fix=f"Correct it.{near}"
    )
