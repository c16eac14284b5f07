"""Check what ``--resume`` would do with the run that OUTPUT_DIR holds."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any

from detectron2.config import CfgNode

from ..adapt.report import summary_line
from ..checkpoint.load import check_exists, plan_file
from ..checkpoint.optimizer import find_state
from ..errors import CheckpointFileError, ConfigError
from ..files import read_checkpoint
from ..key import HEAD_ADAPT, MODEL, OUTPUT_DIR, SOLVER
from .finding import DoctorContext, Finding, check


def last_checkpoint(cfg: CfgNode) -> str | None:
    """Find the file that ``OUTPUT_DIR/last_checkpoint`` names, as fvcore does; ``None`` without such a note."""
    note = os.path.join(cfg.OUTPUT_DIR, "last_checkpoint")
    if not os.path.isfile(note):
        return None
    with open(note, encoding="utf-8", errors="replace") as file:
        return os.path.join(cfg.OUTPUT_DIR, file.read().strip())


@check("HA305", f"no other run lies in {OUTPUT_DIR}", severity="warning")
def other_run(context: DoctorContext) -> Iterator[Finding]:
    """Find a run in OUTPUT_DIR: with --resume MODEL.WEIGHTS is ignored, without it the run is overwritten."""
    cfg = context.cfg
    last = last_checkpoint(cfg)
    if last is None:
        return
    where = os.path.join(cfg.OUTPUT_DIR, "last_checkpoint")
    try:
        check_exists(last, own_file=True)
        read_checkpoint(last, trust=_trusts(cfg), verify=False)
    except CheckpointFileError as error:
        yield Finding(
            "HA305",
            "warning",
            CheckpointFileError(where, found=f"{last}: {error.found}", expected=error.expected, fix=error.fix),
        )
        return
    weights = context.weights or cfg.MODEL.WEIGHTS
    if weights and os.path.realpath(weights) != os.path.realpath(last):
        yield Finding(
            "HA305",
            "warning",
            ConfigError(
                where,
                found=f"a run whose last checkpoint is {os.path.basename(last)}: with --resume it goes on and "
                f"{MODEL.WEIGHTS} {weights} is not read; without, its files are overwritten",
                expected="a folder of its own for a run that starts from other weights",
                fix=f"Set {OUTPUT_DIR} to a new folder to start from {MODEL.WEIGHTS}, or add --resume to go on.",
            ),
        )


@check("HA306", "a resumed run has iterations left", severity="warning")
def iterations_left(context: DoctorContext) -> Iterator[Finding]:
    cfg = context.cfg
    done = _iteration(_readable(cfg))
    if done is not None and done + 1 >= cfg.SOLVER.MAX_ITER:
        yield Finding(
            "HA306",
            "warning",
            ConfigError(
                SOLVER.MAX_ITER,
                found=f"{cfg.SOLVER.MAX_ITER}, and the run in {OUTPUT_DIR} has done {done + 1}: --resume trains "
                "nothing",
                expected=f"more than {done + 1} to go on with that run",
                fix=f"Set {SOLVER.MAX_ITER} above {done + 1} to go on, or {OUTPUT_DIR} to a new folder for a new run.",
            ),
        )


@check("HA307", f"the optimizer in {OUTPUT_DIR} is of this class list", needs=("model", "settings"), severity="warning")
def optimizer_fits(context: DoctorContext) -> Iterator[Finding]:
    """Find optimizer state of other shapes: stock detectron2 loads it by position, and ``step()`` raises."""
    cfg = context.resolved
    last, checkpoint = last_checkpoint(cfg), _readable(cfg)
    if last is None or not find_state(checkpoint) or context.settings.resume == "adapt":
        return
    plan = plan_file(last, context.model, context.settings, own=True)
    changed = plan.changed()
    if changed:
        yield Finding(
            "HA307",
            "warning",
            ConfigError(
                last,
                found=f"weights and moments of another class list or architecture: {len(changed)} tensors changed, "
                f"{changed[0].name} first ({summary_line(plan)})",
                expected="the tensors of this config where --resume is meant",
                fix=f"Set {HEAD_ADAPT.RESUME.set('adapt')} to go on with carried moments, or {OUTPUT_DIR} to a new "
                "folder.",
            ),
        )


def _readable(cfg: CfgNode) -> Mapping[str, Any]:
    """Read the last checkpoint; empty where there is none or HA305 says that it cannot be read."""
    last = last_checkpoint(cfg)
    if last is None or not os.path.isfile(last):
        return {}
    try:
        return read_checkpoint(last, trust=_trusts(cfg), verify=False)
    except CheckpointFileError:
        return {}


def _iteration(checkpoint: Mapping[str, Any]) -> int | None:
    """Find the last iteration that was done: a trainer's own count, else the periodic checkpointer's."""
    trainer = checkpoint.get("trainer")
    for holder in (trainer if isinstance(trainer, Mapping) else {}, checkpoint):
        if isinstance(holder.get("iteration"), int):
            return int(holder["iteration"])
    return None


def _trusts(cfg: CfgNode) -> bool:
    return bool(cfg.MODEL.HEAD_ADAPT.TRUST_FILE) if "HEAD_ADAPT" in cfg.MODEL else False
