"""What a resume does with the optimizer when the class list, or the order of the parameters, changed."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from .errors import ResumeError
from .moments import adapt_state, find_state, group_origin, reorder_scheduler
from .plan import AdaptPlan
from .provenance import Provenance, optimizer_names
from .report import summary_line

logger = logging.getLogger(__name__)


def adapt_resume(
    checkpoint: dict[str, Any],
    plan: AdaptPlan,
    known: Provenance,
    model: nn.Module,
    checkpointables: Mapping[str, Any],
    mode: str,
    path: str,
) -> None:
    """Replace the optimizer and scheduler state of ``checkpoint`` by one that fits the live run.

    Where neither the classes nor the order of the parameters changed, nothing is replaced.

    Args:
        checkpoint: a file's content without its model.
        plan: of the weights.
        known: the file's provenance.
        model: the live model.
        checkpointables: what the checkpointer will load the rest into.
        mode: ``"refuse"`` or ``"adapt"``, what to do when the classes changed.
        path: the file, for messages.

    Raises:
        ResumeError: the classes changed and ``mode`` is ``"refuse"``, or moments cannot be told apart.
    """
    changed = [
        t
        for t in plan.tensors
        if t.source_shape is not None and t.action in ("carried", "initialised", "kept") and "rebuilt" not in t.reason
    ]
    if changed and mode == "refuse":
        raise ResumeError(
            path,
            expected="the tensors of the run that is resumed",
            found=f"{len(changed)} that changed, {changed[0].name} first ({summary_line(plan)})",
            fix="Set MODEL.HEAD_ADAPT.RESUME adapt to go on: carried rows keep their optimizer moments, new rows start "
            "at zero. Or start a new run without --resume in another OUTPUT_DIR.",
        )
    live = find_optimizer(checkpointables)
    holders = find_state(checkpoint)
    if live is None or not holders:
        return
    names = optimizer_names(live, dict(model.named_parameters()))
    if not changed and known.optimizer in ((), names):
        return
    for holder in holders:
        holder["optimizer"] = adapt_state(holder["optimizer"], known.optimizer, live, names, plan, path)
    stored = known.optimizer or names
    origins = [group_origin(group, stored, position) for position, group in enumerate(names)]
    if origins != list(range(len(stored))):
        rates = [float(group.get("initial_lr", group["lr"])) for group in live.param_groups]
        for key in ("trainer", "scheduler"):
            if key in checkpoint:
                checkpoint[key] = reorder_scheduler(checkpoint[key], origins, rates)
    logger.info("Optimizer moments of %s went through the same plan as the weights; new rows start at zero.", path)


def find_optimizer(checkpointables: Mapping[str, Any]) -> torch.optim.Optimizer | None:
    """The optimizer among what a checkpointer saves: its own entry, or a trainer's."""
    for value in checkpointables.values():
        for candidate in (value, getattr(value, "optimizer", None)):
            if isinstance(candidate, torch.optim.Optimizer):
                return candidate
    return None
