"""Load a file into a model, top to bottom: request, plan, new state; nothing is written to here."""

from __future__ import annotations

import copy
import logging
import os
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import parse_qs, urlparse

import numpy as np
import torch
from detectron2.utils.file_io import PathManager
from torch import nn

from ..adapt.classes import ClassTable, did_you_mean
from ..adapt.detectron2_heads import declare_agnostic
from ..adapt.layouts import HeadLayout
from ..adapt.plan import AdaptPlan
from ..adapt.planner import plan_adaptation, source_key
from ..adapt.registry import layouts_of
from ..adapt.unknown_heads import know_heads
from ..adapt.vocabularies import zoo_tables
from ..config.settings import AdaptSettings, discovery_of
from ..errors import CheckpointFileError, NotFetchedError, PlanRefused, visible
from ..files import read_checkpoint, shapes_of, verify_tensors
from ..key import HEAD_ADAPT, MODEL, Key
from ..modeling.text.nearest import NearestRows, plan_nearest
from ..modeling.text.predictor import FACTS, refuse_other_text
from .keys import SettledNames, left_out, rename, settle_names
from .optimizer import adapt_averages, adapt_resume, refuse_other_types
from .provenance import KEY, Provenance
from .source_keys import Unused, UnusedKey, keys_for

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
    fix = f"Correct {MODEL.WEIGHTS}, or the path that was given."
    if own_file:
        fix = f"Write the name of a checkpoint of {folder} into its last_checkpoint, or start without --resume."
    if not os.path.isabs(local):
        fix = f"It was looked for from {os.getcwd()}. {fix}"
    raise CheckpointFileError(local, expected="a checkpoint file", found=found, fix=f"{fix}{did_you_mean(name, near)}")


def not_fetched(path: str, exc: BaseException) -> NotFetchedError:
    """Make the error for an address that gives no file."""
    return NotFetchedError(
        path,
        expected="a file that can be fetched",
        found=f"{type(exc).__name__}: {exc}",
        fix=f"Correct {MODEL.WEIGHTS}, or download the file and give its path.",
    )


def asks_heuristics(path: str) -> bool:
    """Tell whether the address ends in ``?matching_heuristics=True``, the one query that detectron2 knows."""
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


@dataclass(frozen=True)
class LoadRequest:
    """The request of one load, from the path that was asked for on.

    Args:
        path: file or address as it was given, with its query; a model zoo address names the classes.
        settings: what the user wants.
        resumes: what is loaded beside the model, by name.
        own: the file is the last checkpoint of the run that is resumed.
    """

    path: str
    settings: AdaptSettings
    resumes: frozenset[str] = frozenset()
    own: bool = False


@dataclass(frozen=True)
class PlannedLoad:
    """A file and a model brought together, nothing loaded yet.

    Args:
        plan: what happens to every tensor.
        tensors: the file's, under the model's names.
        known: what the file says of itself.
        settings: those that hold for this file.
        unused: keys that are set and do not hold for it.
    """

    plan: AdaptPlan
    tensors: Mapping[str, torch.Tensor]
    known: Provenance
    settings: AdaptSettings
    unused: tuple[UnusedKey, ...] = ()


@dataclass(frozen=True)
class PreparedLoad:
    """The values that a load writes, after everything that can fail.

    Args:
        state: the model's new state dict.
        plan: what was done to make it.
        known: what the file says of itself.
    """

    state: OrderedDict[str, torch.Tensor]
    plan: AdaptPlan
    known: Provenance


def prepare_load(
    request: LoadRequest,
    checkpoint: dict[str, Any],
    file: str,
    model: nn.Module,
    checkpointables: Mapping[str, Any],
    say: Callable[[AdaptPlan, tuple[UnusedKey, ...]], None],
) -> PreparedLoad:
    """Plan a load, refuse what must not be loaded, and make the new state; nothing is written to.

    Args:
        request: what is asked for.
        checkpoint: the file's content; it loses what is used, and the rest is made to fit the live run.
        file: the local file that the values are views of.
        model: gives names, shapes, layouts and new rows.
        checkpointables: what the rest of the checkpoint will be loaded into.
        say: told of the plan before anything of it is refused.

    Raises:
        HeadAdaptError: the file or the plan is refused.
    """
    made = plan_checkpoint(request, checkpoint, model)
    stored, settings = checkpoint.pop("model"), made.settings
    checkpoint.pop(KEY, None)
    nearest = NearestRows(made.plan, {})
    if settings.new_rows == "nearest":
        nearest = plan_nearest(made.plan, settings.text_file, settings.text_names)
    plan = nearest.plan
    say(plan, made.unused)
    if nearest.neighbours:
        logger.info("%s", nearest.line())
    refuse_plan(plan, settings.min_coverage, request.path, as_stock=settings.as_stock)
    refuse_other_text(model, plan, made.tensors, made.known.extra.get(FACTS), request.path)
    resumed = {key: checkpoint[key] for key in sorted(request.resumes & checkpoint.keys())}
    if resumed:
        refuse_other_types(resumed, checkpointables, request.path)
        if settings.verify_file:
            verify_tensors(file, resumed)
        # An optimizer keeps the tensors it is given, and these are views of a file that may change under it.
        checkpoint.update(copy.deepcopy(resumed))
        adapt_resume(checkpoint, plan, made.known, model, checkpointables, settings.resume, request.path)
    if settings.verify_file:
        verify_tensors(file, {t.name: made.tensors[t.name] for t in plan.by_action("copied", "carried")})
    state = OrderedDict(nearest.apply(plan.apply(made.tensors, model.state_dict())))
    # What a module keeps beside its tensors (`_extra_state`) has no classes.
    state.update({n: v for n, v in made.tensors.items() if n in state and not torch.is_tensor(v)})
    done, left = adapt_averages(checkpoint, plan, state)
    if done:
        logger.info("Averaged copies of the model went through the same plan: %s.", visible(", ".join(done)))
    for place in left:
        where = f"{visible(place)} of {request.path}"
        logger.warning("%s holds head tensors of the old classes and was left as it was.", where)
    if hasattr(stored, "_metadata"):
        # Modules convert old formats by the version numbers in it.
        state._metadata = stored._metadata  # type: ignore[attr-defined]
    return PreparedLoad(state, plan, made.known)


def plan_checkpoint(request: LoadRequest, checkpoint: Mapping[str, Any], model: nn.Module) -> PlannedLoad:
    """Bring a file's content, a model and a user's settings together in a plan; nothing is loaded.

    Args:
        request: what is asked for.
        checkpoint: in stock detectron2's form, ``{"model": {name: values}, ...}``.
        model: on any device, the meta device included.

    Raises:
        HeadAdaptError: a name is ambiguous, or a key cannot be used. A refused plan is returned.
    """
    known = Provenance() if KEY not in checkpoint else Provenance.from_plain(checkpoint[KEY], request.path)
    settings, unused = keys_for(request.settings, known, request.path, own=request.own)
    shapes = shapes_of(model.state_dict())
    settled = settle_checkpoint(checkpoint, shapes, settings)
    known = known.renamed({file: name for name, file in settled.file_names.items()})
    declare_agnostic(model, settings.agnostic)
    declared, stored = layouts_of(model), shapes_of(settled.tensors)
    own_words = {**(zoo_tables(request.path) or {}), **known.tables}
    targets = _targets(settings, own_words, known, declared, shapes)
    sources = {**own_words, **_padded(settings.source, targets, declared, stored)}
    differ = _differing(sources, targets, settings, {layout.space for layout in declared})
    found = discovery_of(model) if differ or _unnamed(stored, shapes, declared, sources, targets, settings) else None
    heads = know_heads(model, declared, found, stored, targets, differ)
    say_other_spaces(settings.source, {x.space for x in heads.layouts} | {x.sized.space for x in heads.refused})
    for contradiction in heads.wrong:
        raise contradiction.error()
    plan = plan_adaptation(
        stored,
        shapes,
        heads.layouts,
        source_tables=sources,
        target_tables=targets,
        source_layouts=known.layouts,
        aliases=settings.aliases,
        match=settings.match,
        initialise=settings.initialise,
        dropped=settled.dropped,
        excluded=settled.excluded,
        unknown=heads.refused,
        complete=heads.complete,
        unknown_heads=settings.unknown_heads,
        found=heads.said,
    )
    assumed = tuple(s for s in known.assumed if s not in settings.source and s in plan.maps)
    return PlannedLoad(replace(plan, assumed=assumed), settled.tensors, known, settings, unused)


def _differing(
    sources: Mapping[str, ClassTable],
    targets: Mapping[str, ClassTable],
    settings: AdaptSettings,
    declared: Collection[str],
) -> dict[str, tuple[int, int]]:
    """Label spaces whose lists differ, or of which nothing is to be taken from a head that nobody declared.

    With the numbers of classes in the file and in the model; of what is not to be taken only equal ones matter.
    """
    differ = {}
    for space, table in targets.items():
        if space in settings.initialise:
            if space not in declared:
                differ[space] = (len(table), len(table))
        elif space in sources and sources[space].names != table.names:
            differ[space] = (len(sources[space]), len(table))
    return differ


def _unnamed(
    stored: Mapping[str, tuple[int, ...]],
    shapes: Mapping[str, tuple[int, ...]],
    layouts: Sequence[HeadLayout],
    sources: Mapping[str, ClassTable],
    targets: Mapping[str, ClassTable],
    settings: AdaptSettings,
) -> bool:
    """Tell whether a head that nobody declared may come from a file whose classes nobody named."""
    declared = {layout.space for layout in layouts}
    open_spaces = targets.keys() - sources.keys() - declared - settings.initialise
    sizes = {len(targets[space]) + extra for space in open_spaces for extra in (0, 1)}
    return any(name in stored and sizes.intersection(shape[:2]) for name, shape in shapes.items())


def settle_checkpoint(
    checkpoint: Mapping[str, Any], model_shapes: Mapping[str, tuple[int, ...]], settings: AdaptSettings
) -> SettledNames:
    """Give the tensors of a file the model's names, by the rules of its format and the user's."""
    tensors = {n: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for n, v in checkpoint["model"].items()}
    settled = settle_names(
        rename(tensors, settings.rename),
        model_shapes,
        caffe2=checkpoint.get("__author__") == "Caffe2",
        heuristics=bool(checkpoint.get("matching_heuristics", False)),
    )
    return replace(settled, excluded=left_out(settled.tensors, settings.include, settings.exclude))


def _targets(
    settings: AdaptSettings,
    own_words: Mapping[str, ClassTable],
    known: Provenance,
    layouts: Sequence[HeadLayout],
    shapes: Mapping[str, tuple[int, ...]],
) -> dict[str, ClassTable]:
    """Take the user's target tables, and the file's for spaces without one, where the model was built for it."""
    targets = dict(settings.target)
    for space, table in own_words.items():
        mine = [x for x in layouts if x.space == space and not x.rebuilt]
        guessed = space in settings.yields and space not in settings.source
        asked = space in known.tables and space not in targets
        if (guessed or asked) and all(x.fits(shapes[x.tensor], len(table)) for x in mine):
            targets[space] = table
    return targets


def _padded(
    named: Mapping[str, ClassTable],
    targets: Mapping[str, ClassTable],
    layouts: Sequence[HeadLayout],
    shapes: Mapping[str, tuple[int, ...]],
) -> dict[str, ClassTable]:
    """Source tables; one that is too short is padded where the model's is, and the file has as many rows."""
    found = dict(named)
    for space, table in named.items():
        target = targets.get(space)
        mine = [x for x in layouts if x.space == space and x.class_axes and not x.rebuilt and x.tensor in shapes]
        if target is None or len(target.named) == len(target) or len(table) >= len(target) or not mine:
            continue
        if all(x.fits(shapes[x.tensor], len(target)) for x in mine):
            found[space] = table.padded(len(target))
    return found


def say_other_spaces(named: Iterable[str], spaces: Collection[str], key: Callable[[str], Key] = source_key) -> None:
    """Say which keys name classes of a label space that the model has no head for, and which key would be read.

    Args:
        named: label spaces whose key is set.
        spaces: of the model's heads.
        key: the config key of a label space.
    """
    has = sorted(spaces)
    for space in sorted(set(named) - set(has)):
        if has:
            read = ", ".join(str(key(one)) for one in has)
            logger.warning("%s is set and not used: the model has no %s head. It reads %s.", key(space), space, read)
        else:
            logger.warning("%s is set and not used: no tensor is known to have %s classes.", key(space), space)


def read_weights(path: str, *, trust: bool) -> tuple[dict[str, Any], str]:
    """Read a checkpoint by its path or address; its values are not verified yet.

    Returns:
        Its content, and the local file that the values are views of.
    """
    try:
        local: str = PathManager.get_local_path(path.partition("?")[0])
    except (OSError, AssertionError) as exc:
        raise not_fetched(path, exc) from exc
    return read_local(local, path, trust=trust), local


def read_local(file: str, path: str, *, trust: bool) -> dict[str, Any]:
    """Read a local file; ``path`` is what the user typed, whose query may ask for matching by suffixes."""
    checkpoint = read_checkpoint(file, trust=trust, verify=False)
    if asks_heuristics(path):
        checkpoint["matching_heuristics"] = True
    return checkpoint


def plan_file(path: str, model: nn.Module, settings: AdaptSettings, *, own: bool = False) -> AdaptPlan:
    """Plan the load of a file into a model, which may be on the meta device; nothing is loaded.

    Args:
        path: file or address.
        model: gives names, shapes and layouts.
        settings: what the user wants.
        own: the file is the last checkpoint of the run that is resumed.

    Raises:
        HeadAdaptError: the file cannot be read, or a name is ambiguous. A refused plan is returned.
    """
    checkpoint, _ = read_weights(path, trust=settings.trust_file)
    made = plan_checkpoint(LoadRequest(path, settings, own=own), checkpoint, model)
    say_unused(made.unused)
    return made.plan


def say_unused(unused: Iterable[UnusedKey]) -> None:
    """Log each key that is set and does not hold for a file."""
    for key in unused:
        # What went into the file already is as the guides say; what the file contradicts is a surprise.
        logger.log(logging.WARNING if key.cause is Unused.FILE_SAYS else logging.INFO, "%s", key.sentence())


def refuse_plan(plan: AdaptPlan, min_coverage: float, origin: str, *, as_stock: bool = False) -> None:
    """Raise where a plan holds a refused tensor, loads nothing, or covers too little of the file.

    Args:
        plan: of the load.
        min_coverage: least share of the file's tensors.
        origin: the file, for messages.
        as_stock: warn of the latter two in place of raising.
    """
    plan.raise_if_refused()
    try:
        _refuse_little(plan, min_coverage, origin)
    except PlanRefused as exc:
        if not as_stock:
            raise
        logger.warning("Loaded all the same, as detectron2 does: %s", exc)


def _refuse_little(plan: AdaptPlan, min_coverage: float, origin: str) -> None:
    parts = ", ".join(f"{name} {found}/{total}" for name, (found, total) in plan.coverage_by_submodule().items())
    if plan.loads_nothing:
        raise PlanRefused(
            origin,
            expected="tensors that the model has",
            found=f"none that fits ({parts})",
            fix="Use a checkpoint of this architecture, or the config of this checkpoint.",
        )
    for space in plan.lost:
        common = [name for name in plan.target[space].names if name in set(plan.source[space].names)]
        raise PlanRefused(
            origin,
            expected=f"rows of the {len(common)} {space} classes that file and model have in common",
            found=f"no head that takes one: {next(t for t in plan.tensors if t.space == space and t.new).reason}",
            fix=f"Build the heads as the file's were built, or set {source_key(space).set('none')} to start them "
            "afresh. Nothing was loaded.",
        )
    if plan.coverage < min_coverage:
        raise PlanRefused(
            origin,
            expected=f"at least {min_coverage:.0%} of the file's tensors to find a place in the model",
            found=f"{plan.coverage:.0%} (by submodule: {parts})",
            fix=f"Use a checkpoint of this architecture, or set "
            f"{HEAD_ADAPT.MIN_COVERAGE.set(f'{max(0.0, plan.coverage - 0.01):.2f}')} to load it all the same.",
        )


def has_foreign_hooks(model: nn.Module) -> bool:
    """Tell whether a module of neither torch nor detectron2 hooks into loading, and so may raise half-way."""
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
