"""Checks HA121 to HA130 but HA128: schedule, batches, input and keypoints, as far as the config alone shows them."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator
from typing import Any

import torch
from detectron2.config import CfgNode, instantiate
from detectron2.data import MetadataCatalog
from detectron2.data.detection_utils import create_keypoint_hflip_indices
from detectron2.solver import build_lr_scheduler
from detectron2.utils import comm
from omegaconf import DictConfig
from PIL import Image

from ..adapt.classes import did_you_mean
from ..errors import ConfigError
from ..key import DATASETS, INPUT, MODEL, SOLVER, TEST, Words
from ..setup.lazy.tree import select, target_of
from ..setup.task_checks import WITH_ROI_HEADS
from .finding import DoctorContext, Finding, PartMissing, Severity, check

RATE_PER_IMAGE = 0.02 / 16
"""detectron2's own rule for R-CNN with SGD: 0.02 at 16 images a batch, and in proportion."""
MOST, LEAST = 4.0, 0.001
"""Beyond so many times the rule SGD rarely survives; below, nothing would move.

AdamW's usual 1e-4 at 16 images is 0.005 times the rule."""
SCHEDULERS = ("WarmupMultiStepLR", "WarmupCosineLR", "WarmupStepWithFixedGammaLR")
"""The names that detectron2's ``build_lr_scheduler`` knows."""
SLIP = 0.9
"""Names that are so alike (difflib's ratio) differ by a slip of the keyboard."""
OKS_SIGMAS = 17
"""pycocotools brings the sigmas of COCO's 17 keypoints."""


@check("HA121", "the learning rate fits the batch size", quick=True)
def learning_rate(context: DoctorContext) -> Iterator[Finding]:
    rate, batch = context.cfg.SOLVER.BASE_LR, context.cfg.SOLVER.IMS_PER_BATCH
    optimizer = target_of(context.lazy.get("optimizer")) if context.lazy is not None else torch.optim.SGD
    if optimizer is not torch.optim.SGD:
        name = getattr(optimizer, "__name__", "none")
        raise PartMissing("optimizer", None, f"the rule is about SGD, and the optimizer is {name}")
    if not _numbers(rate, batch):
        return
    rule = RATE_PER_IMAGE * max(batch, 1)
    severity: Severity = "warning"
    if not math.isfinite(rate) or rate <= 0:
        severity = "error"
    elif LEAST * rule <= rate <= MOST * rule:
        return
    elif rate < rule:
        severity = "note"
    yield Finding(
        "HA121",
        severity,
        ConfigError(
            SOLVER.BASE_LR,
            found=f"{rate:g} with {SOLVER.IMS_PER_BATCH.set(batch)}, {rate / rule:.3g} times detectron2's rule"
            if rule > 0
            else f"{rate}",
            expected=f"about {rule:g}: 0.02 at 16 images a batch, and in proportion to them (for SGD)",
            fix=f"Write {SOLVER.BASE_LR.write(f'{rule:g}')}.",
        ),
    )


@check("HA122", "the learning rate schedule can be built", quick=True)
def schedule(context: DoctorContext) -> Iterator[Finding]:
    solver = context.cfg.SOLVER
    if _numbers(solver.MAX_ITER) and solver.MAX_ITER < 1:
        yield Finding(
            "HA122",
            "error",
            ConfigError(
                SOLVER.MAX_ITER,
                found=f"{solver.MAX_ITER}",
                expected="at least 1 iteration",
                fix=f"Write {SOLVER.MAX_ITER.write(1000)}, or what your training needs.",
            ),
        )
        return
    if context.lazy is not None:
        yield from _lazy_schedule(context.lazy)
        return
    cfg = context.cfg.clone()
    cfg.defrost()
    # Those beyond the end are left out by detectron2 too, with a line that HA123 says better.
    cfg.SOLVER.STEPS = tuple(step for step in _steps(cfg) if step <= solver.MAX_ITER)
    name = str(solver.LR_SCHEDULER_NAME)
    if name not in SCHEDULERS:
        yield _own_scheduler(name)
        return
    try:
        build_lr_scheduler(cfg, torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0))
    except Exception as error:
        text = " ".join(f"{type(error).__name__}: {error}".split())
        fix = "Correct LR_SCHEDULER_NAME, STEPS (rising, each below MAX_ITER), BASE_LR_END or WARMUP_METHOD."
        yield Finding(
            "HA122", "error", ConfigError(SOLVER, found=text, expected="a schedule that detectron2 can build", fix=fix)
        )


def _own_scheduler(name: str) -> Finding:
    """Find a name that detectron2 does not know: a trainer's own ``build_lr_scheduler`` may, unless it is a slip."""
    meant = difflib.get_close_matches(name, SCHEDULERS, n=1, cutoff=SLIP)
    return Finding(
        "HA122",
        "error" if meant else "warning",
        ConfigError(
            SOLVER.LR_SCHEDULER_NAME,
            found=f"{name!r}, which detectron2 cannot build",
            expected=f"one of {', '.join(SCHEDULERS)}, or a trainer with a build_lr_scheduler of its own",
            fix=f"Write {SOLVER.LR_SCHEDULER_NAME.write((meant or SCHEDULERS)[0])}, unless your trainer builds {name}.",
        ),
    )


def _lazy_schedule(lazy: DictConfig) -> Iterator[Finding]:
    node = lazy.get("lr_multiplier")
    if node is None:
        raise PartMissing("lr_multiplier", None, "the config has none")
    try:
        instantiate(node)
    except Exception as error:
        text = " ".join(f"{type(error).__name__}: {error}".split())
        yield Finding(
            "HA122",
            "error",
            ConfigError("lr_multiplier", found=text, expected="a schedule that can be built", fix="Correct the node."),
        )


@check(
    "HA123",
    f"{SOLVER.STEPS} and WARMUP_ITERS lie within {SOLVER.MAX_ITER}",
    quick=True,
    severity="warning",
    yaml_only="the marks of a LazyConfig's lr_multiplier are shares of the training",
)
def steps(context: DoctorContext) -> Iterator[Finding]:
    solver = context.cfg.SOLVER
    if not _numbers(solver.MAX_ITER, solver.WARMUP_ITERS):
        return
    beyond = [step for step in _steps(context.cfg) if step > solver.MAX_ITER]
    # The default is nobody's intention.
    if beyond and solver.LR_SCHEDULER_NAME == "WarmupMultiStepLR" and solver.STEPS != context.defaults.SOLVER.STEPS:
        late = tuple(round(solver.MAX_ITER * share) for share in (2 / 3, 8 / 9))
        yield Finding(
            "HA123",
            "warning",
            ConfigError(
                SOLVER.STEPS,
                found=f"{beyond} beyond {SOLVER.MAX_ITER.set(solver.MAX_ITER)}: the rate is not lowered there",
                expected="steps before the last iteration",
                fix=f"Write {SOLVER.STEPS.write(late)}, or [] for none.",
            ),
        )
    # The default is 1000, which nobody chose, and a short run still trains at a fraction of the rate to its end.
    if solver.WARMUP_ITERS >= solver.MAX_ITER >= 1 and solver.WARMUP_FACTOR < 1:
        most = solver.WARMUP_FACTOR + (1 - solver.WARMUP_FACTOR) * (solver.MAX_ITER - 1) / solver.WARMUP_ITERS
        reached = f"the last iteration has {most:.0%} of {SOLVER.BASE_LR}"
        if solver.WARMUP_METHOD != "linear":
            reached = f"the last iteration has {solver.WARMUP_FACTOR:.2g} of {SOLVER.BASE_LR}"
        yield Finding(
            "HA123",
            "warning",
            ConfigError(
                SOLVER.WARMUP_ITERS,
                found=f"{solver.WARMUP_ITERS} of {SOLVER.MAX_ITER.set(solver.MAX_ITER)}: the warm-up fills the whole "
                f"training, and {reached}",
                expected="a warm-up shorter than the training",
                fix=f"Write {SOLVER.WARMUP_ITERS.write(solver.MAX_ITER // 10)}.",
            ),
        )


@check("HA124", f"what {TEST.EVAL_PERIOD} evaluates is there", quick=True, severity="warning")
def evaluation(context: DoctorContext) -> Iterator[Finding]:
    period = context.cfg.TEST.EVAL_PERIOD
    if _numbers(period) and period > 0 and not context.cfg.DATASETS.TEST:
        yield Finding(
            "HA124",
            "warning",
            ConfigError(
                TEST.EVAL_PERIOD,
                found=f"{period}, and no {DATASETS.TEST}: nothing is evaluated",
                expected="a dataset to evaluate, or period 0",
                fix=f"Write {DATASETS.TEST.write('[my_val]')}, or {TEST.EVAL_PERIOD.write(0)}.",
            ),
        )


@check("HA125", "keypoints that the config counts and mirrors fit each other", needs=("settings",), quick=True)
def keypoints(context: DoctorContext) -> Iterator[Finding]:
    """Check keypoint keys that need no json; HA217 looks at the keypoints that datasets declare."""
    cfg = context.cfg
    if not cfg.MODEL.KEYPOINT_ON or cfg.MODEL.META_ARCHITECTURE not in WITH_ROI_HEADS:
        return
    count, sigmas = cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS, cfg.TEST.KEYPOINT_OKS_SIGMAS
    if context.tables.get("keypoint") is None and cfg.DATASETS.TEST and count != (len(sigmas) or OKS_SIGMAS):
        yield Finding(
            "HA125",
            "error",
            ConfigError(
                TEST.KEYPOINT_OKS_SIGMAS,
                found=f"{len(sigmas) or f'none, so the {OKS_SIGMAS} of COCO'}, for {count} keypoints",
                expected="one sigma for each keypoint: COCO's evaluation stops otherwise, after the training",
                fix=f"Write {count} numbers, such as {TEST.KEYPOINT_OKS_SIGMAS.write([0.05] * count)}.",
            ),
        )
    names = context.train_names
    lacks = any(MetadataCatalog.get(name).get("keypoint_flip_map") is None for name in names)
    # detectron2 reads the map for a config without flips too.
    if names and not (lacks and cfg.INPUT.RANDOM_FLIP != "none"):
        try:
            create_keypoint_hflip_indices(list(names))
        except (AttributeError, AssertionError, ValueError) as error:
            yield Finding(
                "HA125",
                "error",
                ConfigError(
                    f"keypoint_flip_map of {', '.join(map(repr, names))}",
                    found=" ".join(str(error).split()),
                    expected="one and the same list of pairs of keypoint_names in every training set",
                    fix=f"Correct keypoint_names and keypoint_flip_map in the entries of {DATASETS.REGISTER}.",
                ),
            )


@check("HA126", f"images can be read in {INPUT.FORMAT} and have its pixel mean", quick=True)
def pixels(context: DoctorContext) -> Iterator[Finding]:
    cfg = context.cfg
    mean, std, form = cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD, cfg.INPUT.FORMAT
    if form not in ("BGR", "YUV-BT.601", *Image.MODES):
        # A mapper of the user's own may read anything.
        near = did_you_mean(str(form), ["BGR", "RGB", "L"])
        error = ConfigError(
            INPUT.FORMAT,
            found=f"{form!r}, which detectron2's own mapper cannot read",
            expected="BGR, RGB, L or another mode of Pillow, or a mapper of your own that reads it",
            fix=f"Write {INPUT.FORMAT.write('BGR')}, unless your mapper reads it.{near}",
        )
        yield Finding(
            "HA126",
            "warning",
            error,
        )
    if len(mean) != len(std):
        yield Finding(
            "HA126",
            "error",
            ConfigError(
                MODEL.PIXEL_STD,
                found=f"{len(std)} values, and {len(mean)} under {MODEL.PIXEL_MEAN}",
                expected="one value for each channel under both",
                fix=f"Write {MODEL.PIXEL_STD.write([1.0] * len(mean))}.",
            ),
        )
    default = list(context.defaults.MODEL.PIXEL_MEAN)
    swapped = (form == "RGB" and list(mean) == default) or (form == "BGR" and list(mean) == default[::-1])
    if swapped:
        yield Finding(
            "HA126",
            "note",
            ConfigError(
                MODEL.PIXEL_MEAN,
                found=f"{list(mean)} with {INPUT.FORMAT.set(form)}, which is the mean of the other order of channels",
                expected=f"{list(mean)[::-1]} for {form}",
                fix=f"Write {MODEL.PIXEL_MEAN.write(list(mean)[::-1])}, if the weights were trained so.",
            ),
        )


@check("HA127", "every process gets the same number of images", quick=True)
def processes(context: DoctorContext) -> Iterator[Finding]:
    solver = context.cfg.SOLVER
    batch, reference = solver.IMS_PER_BATCH, solver.REFERENCE_WORLD_SIZE
    # The trainer knows its processes; the command can only look at what this machine has.
    trains = context.ready is not None
    here = comm.get_world_size() if trains else torch.cuda.device_count()
    if not _numbers(batch, reference):
        return
    severity: Severity = "error"
    where: Words
    if reference:
        count, where = reference, SOLVER.REFERENCE_WORLD_SIZE
        # Equal, it is not read.
        severity = "error" if reference != here else "warning"
    else:
        count, where = max(here, 1), "the processes of this job" if trains else "the GPUs of this machine"
        severity = "error" if trains else "note"
    if batch < 1:
        severity = "error"
    if batch < 1 or batch % count:
        yield Finding(
            "HA127",
            severity,
            ConfigError(
                SOLVER.IMS_PER_BATCH,
                found=f"{batch}, and {count} is {where}",
                expected=f"a multiple of {count}",
                fix=f"Write {SOLVER.IMS_PER_BATCH.write(max(batch // count, 1) * count)}.",
            ),
        )


@check("HA129", "each test dataset says how it is evaluated", needs=("registered",), severity="warning")
def evaluators(context: DoctorContext) -> Iterator[Finding]:
    if context.lazy is not None and select(context.lazy, "dataloader.evaluator") is not None:
        return  # The config says it itself.
    for name in context.test_names:
        if MetadataCatalog.get(name).get("evaluator_type") is None:
            yield Finding(
                "HA129",
                "warning",
                ConfigError(
                    f"dataset {name!r} of {DATASETS.TEST}",
                    found="no evaluator_type in its metadata: the evaluation would stop, after the training",
                    expected="evaluator_type, such as 'coco'",
                    fix=f"Register it under {DATASETS.REGISTER}, or set MetadataCatalog.get({name!r}).evaluator_type "
                    "= 'coco'.",
                ),
            )


def _steps(cfg: CfgNode) -> list[float]:
    steps = cfg.SOLVER.STEPS
    return [s for s in steps if _numbers(s)] if isinstance(steps, (list, tuple)) else []


def _numbers(*values: Any) -> bool:
    """Mark the values that are numbers; HA109 has a finding for what is none."""
    return all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values)
