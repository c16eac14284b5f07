"""From a file, a model and a user's settings to a plan; nothing is loaded here."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any
from urllib.parse import parse_qs, urlparse

import numpy as np
import torch
from detectron2.utils.file_io import PathManager
from torch import nn

from ..adapt.classes import ClassTable, did_you_mean
from ..adapt.plan import AdaptPlan
from ..adapt.planner import plan_adaptation, source_key
from ..adapt.registry import layouts_of
from ..adapt.vocabularies import zoo_tables
from ..config.settings import AdaptSettings
from ..errors import CheckpointFileError, NotFetchedError, PlanRefused
from ..files import read_checkpoint, shapes_of
from .keys import SettledNames, left_out, rename, settle_names
from .provenance import KEY, Provenance

logger = logging.getLogger(__name__)


def check_exists(path: str, *, own_file: bool = False) -> None:
    """Raise for a local path that is no file, with the nearest names of its folder.

    Args:
        path: the path, with or without a query.
        own_file: it is what this run's ``last_checkpoint`` names.
    """
    local = path.partition("?")[0]
    if "://" in local or os.path.isfile(local):
        return
    folder, name = os.path.split(local)
    near = sorted(os.listdir(folder or ".")) if os.path.isdir(folder or ".") else []
    found = "a folder" if os.path.isdir(local) else "no such file"
    fix = "Correct MODEL.WEIGHTS, or the path that was given."
    if own_file:
        fix = f"Write the name of a checkpoint of {folder} into its last_checkpoint, or start without --resume."
    raise CheckpointFileError(local, expected="a checkpoint file", found=found, fix=f"{fix}{did_you_mean(name, near)}")


def not_fetched(path: str, exc: BaseException) -> NotFetchedError:
    """The error for an address that gives no file."""
    return NotFetchedError(
        path,
        expected="a file that can be fetched",
        found=f"{type(exc).__name__}: {exc}",
        fix="Correct MODEL.WEIGHTS, or download the file and give its path.",
    )


def asks_heuristics(path: str) -> bool:
    """Whether the address ends in ``?matching_heuristics=True``, the one query that detectron2 knows."""
    queries = parse_qs(urlparse(path).query)
    asked = queries.pop("matching_heuristics", ["False"]) == ["True"]
    if queries:
        raise CheckpointFileError(
            path,
            expected="no query but ?matching_heuristics=True",
            found=", ".join(queries),
            fix="Remove the rest of the query.",
        )
    return asked


def settle_checkpoint(
    stored: Mapping[str, Any],
    model_state: Mapping[str, torch.Tensor],
    checkpoint: Mapping[str, Any],
    settings: AdaptSettings,
) -> SettledNames:
    """The tensors of a file under the model's names, by the rules of its format and the user's."""
    tensors = {n: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for n, v in stored.items()}
    settled = settle_names(
        rename(tensors, settings.rename),
        shapes_of(model_state),
        caffe2=checkpoint.get("__author__") == "Caffe2",
        heuristics=bool(checkpoint.get("matching_heuristics", False)),
    )
    out = left_out(settled.tensors, settings.include, settings.exclude)
    return replace(settled, excluded=out)


def read_weights(path: str, settings: AdaptSettings) -> tuple[dict[str, Any], str]:
    """A checkpoint by its path or address, its values not verified yet, and the local file that they are in."""
    try:
        local: str = PathManager.get_local_path(path.partition("?")[0])
    except (OSError, AssertionError) as exc:
        raise not_fetched(path, exc) from exc
    checkpoint = read_checkpoint(local, trust=settings.trust_file, verify=False)
    if asks_heuristics(path):
        checkpoint["matching_heuristics"] = True
    return checkpoint, local


def plan_file(path: str, model: nn.Module, settings: AdaptSettings) -> AdaptPlan:
    """Plan the load of a file into a model, which may be on the meta device; nothing is loaded.

    Args:
        path: file or address.
        model: gives names, shapes and layouts.
        settings: what the user wants.

    Raises:
        HeadAdaptError: the file cannot be read, or a name is ambiguous. A refused plan is returned.
    """
    checkpoint, _ = read_weights(path, settings)
    known = Provenance() if KEY not in checkpoint else Provenance.from_plain(checkpoint[KEY], path)
    settled = settle_checkpoint(checkpoint["model"], model.state_dict(), checkpoint, settings)
    return plan_load(settled, model, settings, known, path)


def plan_load(
    settled: SettledNames,
    model: nn.Module,
    settings: AdaptSettings,
    known: Provenance,
    origin: str,
) -> AdaptPlan:
    """Bring file, model and settings together in a plan; nothing is loaded.

    Args:
        settled: the file's tensors under the model's names.
        model: on any device, the meta device included.
        settings: what the user wants.
        known: the file's provenance.
        origin: the path or address that the user gave; a model zoo address names the classes.
    """
    sources: dict[str, ClassTable] = {**(zoo_tables(origin) or {}), **settings.source}
    for space, table in known.tables.items():
        if space in settings.source and settings.source[space] != table:
            logger.warning(
                "%s names %d classes, but the file says itself that it has %d: the file is right.",
                source_key(space),
                len(settings.source[space]),
                len(table),
            )
        sources[space] = table
    layouts = layouts_of(model)
    for space in sorted(set(settings.source) - {layout.space for layout in layouts}):
        logger.info("%s is set, but the model has no %s head.", source_key(space), space)
    shapes = shapes_of(model.state_dict())
    targets = dict(settings.target)
    for space, table in known.tables.items():
        mine = [x for x in layouts if x.space == space and not x.rebuilt]
        if space not in targets and all(x.fits(shapes[x.tensor], len(table)) for x in mine):
            targets[space] = table
    return plan_adaptation(
        shapes_of(settled.tensors),
        shapes,
        layouts,
        source_tables=sources,
        target_tables=targets,
        source_layouts=known.layouts,
        aliases=settings.aliases,
        match=settings.match,
        initialise=settings.initialise,
        dropped=settled.dropped,
        excluded=settled.excluded,
    )


def refuse_plan(plan: AdaptPlan, min_coverage: float, origin: str) -> None:
    """Raise where a plan holds a refused tensor, loads nothing, or covers too little of the file."""
    plan.raise_if_refused()
    parts = ", ".join(f"{name} {found}/{total}" for name, (found, total) in plan.coverage_by_submodule().items())
    if plan.loads_nothing:
        raise PlanRefused(
            origin,
            expected="tensors that the model has",
            found=f"none that fits ({parts})",
            fix="Use a checkpoint of this architecture, or the config of this checkpoint.",
        )
    if plan.coverage < min_coverage:
        raise PlanRefused(
            origin,
            expected=f"at least {min_coverage:.0%} of the file's tensors to find a place in the model",
            found=f"{plan.coverage:.0%} (by submodule: {parts})",
            fix="Use a checkpoint of this architecture, or set MODEL.HEAD_ADAPT.MIN_COVERAGE "
            f"{max(0.0, plan.coverage - 0.01):.2f} to load it all the same.",
        )


def has_foreign_hooks(model: nn.Module) -> bool:
    """Whether a module that is neither torch's nor detectron2's takes part in loading, and so may raise half-way."""
    known = ("torch.", "detectron2.", "d2_headadapt.")
    return any(
        module._load_state_dict_pre_hooks
        or module._load_state_dict_post_hooks
        or (
            type(module)._load_from_state_dict is not nn.Module._load_from_state_dict
            and not type(module)._load_from_state_dict.__module__.startswith(known)
        )
        for module in model.modules()
    )
