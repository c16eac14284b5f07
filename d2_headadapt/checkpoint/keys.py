"""Rename tensors of a file to the model's names; select them by patterns to take, leave out or freeze.

Stock detectron2 settles names and drops tensors of another shape in one step, which leaves a head of another class
count under the file's own name, where a plan would miss it. Here names are settled first, by names alone."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import TypeVar

import torch
from detectron2.checkpoint.c2_model_loading import convert_c2_detectron_names
from detectron2.layers import FrozenBatchNorm2d
from torch import nn

from ..adapt.causes import Cause, Why
from ..adapt.classes import did_you_mean
from ..errors import ConfigError
from ..key import HEAD_ADAPT, Key


@dataclass(frozen=True)
class SettledNames:
    """A file's tensors under the model's names.

    Args:
        tensors: name in the model (or in the file, where the model has none) -> tensor.
        dropped: names of the file that fit several places -> the cause.
        file_names: name in ``tensors`` -> name in the file, where the two differ.
        excluded: names in ``tensors`` that the user leaves out -> the cause.
    """

    tensors: dict[str, torch.Tensor]
    dropped: dict[str, Why] = field(default_factory=dict)
    file_names: dict[str, str] = field(default_factory=dict)
    excluded: dict[str, Why] = field(default_factory=dict)


def settle_names(
    tensors: Mapping[str, torch.Tensor],
    model_shapes: Mapping[str, tuple[int, ...]],
    *,
    caffe2: bool = False,
    heuristics: bool = False,
) -> SettledNames:
    """Find the model's name of every tensor of a file.

    Args:
        tensors: the file's tensors.
        model_shapes: name -> shape of the model's tensors.
        caffe2: convert Caffe2 names and background order first (``c2_model_loading.convert_c2_detectron_names``).
        heuristics: match each name of the model with the file's name that is its longest dotted suffix, as stock's
            ``align_and_update_state_dicts`` does.
    """
    # What matches by suffixes needs no help with prefixes, and is to give what stock's matching gives.
    bare = unwrapped(tensors, () if heuristics or caffe2 else model_shapes)
    named = {bare[name]: value for name, value in tensors.items()}
    inner = {new: old for old, new in bare.items() if new != old and new in model_shapes}
    if caffe2:
        # It logs a line per head tensor that it reorders, which the plan says better.
        level = logging.getLogger("detectron2.checkpoint.c2_model_loading").level
        logging.getLogger("detectron2.checkpoint.c2_model_loading").setLevel(logging.WARNING)
        try:
            named = convert_c2_detectron_names(named)[0]
        finally:
            logging.getLogger("detectron2.checkpoint.c2_model_loading").setLevel(level)
    if not (heuristics or caffe2):
        return SettledNames(named, file_names=inner)
    takers: dict[str, list[str]] = {}
    for name in model_shapes:
        suffix = longest_suffix(name, named)
        if suffix is not None:
            takers.setdefault(suffix, []).append(name)
    out: dict[str, torch.Tensor] = {}
    dropped: dict[str, Why] = {}
    file_names: dict[str, str] = {}
    for file_name, tensor in named.items():
        names = takers.get(file_name, [file_name])
        if len(names) > 1:
            # Stock looks at shapes before it counts places; where that leaves one place, it is the same one here.
            fitting = [name for name in names if model_shapes[name] == tuple(tensor.shape)]
            if len(fitting) != 1:
                dropped[file_name] = Why(Cause.SEVERAL_PLACES, count=len(names), names=tuple(names[:3]))
                continue
            names = fitting
        out[names[0]] = tensor
        if names[0] != file_name:
            file_names[names[0]] = file_name
    return SettledNames(out, dropped, file_names)


WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module")
"""What torch.compile, FSDP, activation checkpointing and Lightning Fabric put into names, at any depth."""


def bare_name(name: str) -> str:
    """Strip the marks of wrappers: ``backbone._orig_mod.stem.weight`` is ``backbone.stem.weight``."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def unwrapped(names: Iterable[str], model_names: Iterable[str]) -> dict[str, str]:
    """Map every name of a file to the model's name, as far as wrappers make the difference.

    A module around the whole model (``module.`` of DataParallel and of torch's ``AveragedModel``, ``model.`` of a
    Lightning module, an attribute of somebody's own) is the prefix after which most names are the model's; where two
    prefixes give as many, as for a teacher and a student, neither is taken. Marks of :data:`WRAPPERS` count on neither
    side. A name that two would get is given to none.
    """
    names = list(names)
    by_bare = {bare_name(name): name for name in model_names}
    bare = {name: bare_name(name) for name in names}
    prefix = _outer_prefix(bare.values(), by_bare)
    if not prefix and names and all(name.startswith("module.") for name in bare.values()):
        prefix = "module."
    inner = {name: short[len(prefix) :] if short.startswith(prefix) else short for name, short in bare.items()}
    found = {name: by_bare.get(short, short) for name, short in inner.items()}
    counts = Counter(found.values())
    return {name: new if counts[new] == 1 else name for name, new in found.items()}


def _outer_prefix(names: Iterable[str], model_names: Container[str]) -> str:
    """Find the one prefix of up to three parts after which more names are the model's than after any other."""
    hits: Counter[str] = Counter()
    for name in names:
        parts = name.split(".")
        for depth in range(min(4, len(parts))):
            if ".".join(parts[depth:]) in model_names:
                hits["".join(f"{part}." for part in parts[:depth])] += 1
    best = hits.most_common(2)
    return best[0][0] if best and (len(best) == 1 or best[0][1] > best[1][1]) else ""


def longest_suffix(name: str, candidates: Mapping[str, object]) -> str | None:
    """Find the longest of ``candidates`` that ``name`` equals or ends with after a dot."""
    start = 0
    while True:
        if name[start:] in candidates:
            return name[start:]
        dot = name.find(".", start)
        if dot < 0:
            return None
        start = dot + 1


T = TypeVar("T")


def rename(tensors: Mapping[str, T], rules: Sequence[str], key: Key = HEAD_ADAPT.RENAME) -> dict[str, T]:
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


def matched(names: Iterable[str], patterns: Sequence[str], key: Key) -> set[str]:
    """Pick the ``names`` that any of the glob ``patterns`` matches.

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


def left_out(names: Iterable[str], include: Sequence[str], exclude: Sequence[str]) -> dict[str, Why]:
    """List the names that ``INCLUDE`` does not match or ``EXCLUDE`` does, with the cause."""
    names = list(names)
    out: dict[str, Why] = {}
    if include:
        taken = matched(names, include, HEAD_ADAPT.INCLUDE)
        out.update({n: Why(Cause.NOT_INCLUDED, key=HEAD_ADAPT.INCLUDE.yaml) for n in names if n not in taken})
    why = Why(Cause.EXCLUDED, key=HEAD_ADAPT.EXCLUDE.yaml)
    out.update(dict.fromkeys(matched(names, exclude, HEAD_ADAPT.EXCLUDE), why))
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
    frozen = matched(parameters, patterns, HEAD_ADAPT.FREEZE) if patterns else set()
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
