"""Fit new rows: choose images, solve every head, write last, or leave the model as it was."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from detectron2.utils import comm
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..adapt.classes import SPACES
from ..data.random_states import random_states_kept
from ..data.task_mapper import Mapper
from ..key import HEAD_ADAPT, Words, shown
from ..modeling.keep import keep_of
from ..modeling.task_dry_run import evaluating
from ..said import be_heard
from .boxes import fit_boxes
from .dense import fit_dense
from .images import FeatureCache, ImageStream, choose_images
from .keep import fit_packs
from .masks import fit_masks
from .rows import RowWriter
from .rpn import fit_rpn
from .settings import FitReport, FitSettings, PartReport
from .tasks import fit_tasks

logger = logging.getLogger(__name__)


def fit_new_rows(
    model: nn.Module,
    dataset: Sequence[dict[str, Any]],
    mapper: Mapper,
    *,
    new: Mapping[str, Sequence[int]],
    settings: FitSettings | None = None,
    cache: FeatureCache | None = None,
    skip: Words = "",
    quiet: bool = False,
) -> FitReport:
    """Solve the rows of new classes in closed form on the frozen features of the user's own images.

    With any class carried only rows of new classes are written; all others keep their bits. With none carried,
    background, agnostic boxes and the RPN's last layer are solved too. Nothing is drawn from a global random stream.
    With several processes each looks at its share of the images and all end with the same rows.

    Args:
        model: a detectron2 model whose weights are loaded; written in place.
        dataset: its training set, category ids contiguous; the same in every process.
        mapper: see :data:`d2_headadapt.fit.images.Mapper`.
        new: indices of the classes that have no trained row, by label space, or by tensor name where the heads of
            one space differ (a file with boxes and no masks).
        settings: how.
        cache: backbone features of an earlier fit with the same backbone, images and seed.
        skip: what to type to go without a fit, for the log.
        quiet: log neither what begins nor what became of each part, as for a solution that is repeated.

    Returns:
        What was solved and what was not, and why.

    Raises:
        RankError, LayoutError: the solution failed. Whatever is raised, the model is as it was.
    """
    settings = settings or FitSettings()
    started = time.perf_counter()
    wanted = {name: tuple(classes) for name, classes in new.items() if len(classes)}
    if not wanted:
        return FitReport()
    be_heard()
    if isinstance(model, DistributedDataParallel):
        model = model.module
    if keep_of(model) is not None:
        return fit_packs(model, dataset, mapper, new=wanted, settings=settings, cache=cache)
    writer = RowWriter(model, wanted)
    spaces = {space: writer.new_in(space) for space in sorted({o.space for o in writer.layouts.values()})}
    spaces = {space: classes for space, classes in spaces.items() if classes}
    tasks = {space: classes for space, classes in spaces.items() if space not in SPACES}
    chosen = choose_images(dataset, spaces.get("thing", ()), settings, tasks)
    stream = ImageStream(model, dataset, mapper, chosen, settings, comm.get_rank(), comm.get_world_size(), cache)
    if len(stream) == 0:
        return FitReport((PartReport("model", "kept", "the training set has no images"),), spaces, spaces)
    if not quiet:
        logger.info("%s", start_line(spaces, len(stream), len(dataset), settings, skip))
        stream.estimates = True
    try:
        with random_states_kept(), evaluating(model), torch.no_grad():
            parts, without = _fit(model, dataset, stream, writer, settings, spaces)
    except BaseException:
        writer.undo()
        raise
    skipped = _all_skipped(stream)
    seconds = time.perf_counter() - started
    report = FitReport(tuple(parts), spaces, without, len(stream) - len(skipped), skipped, seconds, tuple(chosen))
    if not quiet:
        for part in parts:
            logger.info("fit: %s", part.line())
        logger.info("%s", report.line())
    return report


def start_line(
    spaces: Mapping[str, tuple[int, ...]], images: int, total: int, settings: FitSettings, skip: Words = ""
) -> str:
    """Return what a fit is about to do, on how many images, and how to make it shorter or do without it.

    Example:
        >>> start_line({"thing": (4, 5)}, 300, 5000, FitSettings())
        'fit: solving the rows of 2 new thing classes on 300 of 5000 images and their mirror images; \
fewer: MODEL.HEAD_ADAPT.FIT.IMAGES 100'
    """
    new = ", ".join(f"{len(k)} new {space} class{'es' * (len(k) != 1)}" for space, k in spaces.items())
    seen = f"{images} of {total} images{' and their mirror images' * settings.mirror}"
    hints = [f"fewer: {HEAD_ADAPT.FIT.IMAGES.set(max(1, images // 3))}"] * (images > 1)
    hints += [f"none: {skip}"] * (skip != "")
    return shown(f"fit: solving the rows of {new} on {seen}" + "".join(f"; {hint}" for hint in hints))


def _fit(
    model: Any,
    dataset: Sequence[dict[str, Any]],
    stream: ImageStream,
    writer: RowWriter,
    settings: FitSettings,
    spaces: Mapping[str, tuple[int, ...]],
) -> tuple[list[PartReport], dict[str, tuple[int, ...]]]:
    parts = [
        PartReport(space, "kept", "rows of this label space keep their recipe")
        for space in spaces
        if space in SPACES and space != "thing"
    ]
    without: dict[str, tuple[int, ...]] = {}
    if "thing" in spaces:
        found, missing = _fit_things(model, dataset, stream, writer, settings, spaces["thing"])
        parts += found
        without = {"thing": missing} if missing else {}
    if set(spaces) - set(SPACES):
        found, missing_of = fit_tasks(model, stream, writer, settings)
        parts += found
        without.update(missing_of)
    return parts, without


def _fit_things(
    model: Any,
    dataset: Sequence[dict[str, Any]],
    stream: ImageStream,
    writer: RowWriter,
    settings: FitSettings,
    missing: tuple[int, ...],
) -> tuple[list[PartReport], tuple[int, ...]]:
    parts: list[PartReport] = []
    if hasattr(model, "roi_heads"):
        rpn = getattr(model, "proposal_generator", None)
        if rpn is not None:
            parts.append(_fit_rpn(model, dataset, stream, writer, settings))
        if "box" in settings.parts:
            found, missing = fit_boxes(model, "roi_heads", stream, writer, settings)
            parts += found
        else:
            parts.append(PartReport("roi_heads.box_predictor", "kept", "FIT.PARTS leaves it out"))
        if getattr(model.roi_heads, "mask_on", False):
            parts.append(fit_masks(model, "roi_heads", stream, writer, settings))
    elif hasattr(model, "head") and hasattr(model, "anchor_generator"):
        report, missing = fit_dense(model, "head", stream, writer, settings)
        parts.append(report)
    else:
        parts.append(PartReport("model", "kept", f"how {type(model).__name__} uses its classes is not known"))
    return parts, missing


def _fit_rpn(
    model: Any, dataset: Sequence[dict[str, Any]], stream: ImageStream, writer: RowWriter, settings: FitSettings
) -> PartReport:
    name = "proposal_generator"
    classifiers = [name for name in writer.layouts if name.endswith("cls_score.weight")]
    carried = {k for tensor in classifiers for k in writer.carried(tensor)}
    if not any(writer.new(tensor) for tensor in classifiers):
        return PartReport(name, "kept", "no box row is new")
    if carried:
        carried -= {int(a["category_id"]) for entry in dataset for a in entry.get("annotations", ())}
    if "rpn" not in settings.parts:
        return PartReport(name, "kept", "FIT.PARTS leaves it out")
    if settings.rpn == "never":
        return PartReport(name, "kept", "FIT.RPN is never")
    if carried:
        return PartReport(name, "kept", f"{len(carried)} carried classes are not labelled in the training set")
    if not hasattr(model.proposal_generator, "rpn_head"):
        return PartReport(name, "kept", "it is not an RPN")
    limit = model.proposal_generator.post_nms_topk[False]
    return fit_rpn(model.proposal_generator, name, stream, writer, settings, limit)


def _all_skipped(stream: ImageStream) -> tuple[tuple[str, str], ...]:
    parts: list[dict[str, str]] = comm.all_gather(stream.skipped)
    merged = {name: reason for part in parts for name, reason in part.items()}
    return tuple(sorted(merged.items()))
