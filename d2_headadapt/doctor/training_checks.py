"""HA121-HA130 but HA128: schedule, batches, input and keypoints, as far as the config alone shows them."""

from __future__ import annotations

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
from ..setup.lazy.tree import select, target_of
from .config_checks import DETECTION
from .finding import DoctorContext, Finding, PartMissing, Severity, check

RATE_PER_IMAGE = 0.02 / 16
"""detectron2's own rule for R-CNN with SGD: 0.02 at 16 images a batch, and in proportion."""
MOST, LEAST = 4.0, 0.001
"""Beyond so many times the rule SGD rarely survives; below, nothing would move.

AdamW's usual 1e-4 at 16 images is 0.005 times the rule."""
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
        "SOLVER.BASE_LR",
        f"{rate:g} with SOLVER.IMS_PER_BATCH {batch}, {rate / rule:.3g} times detectron2's rule"
        if rule > 0
        else f"{rate}",
        f"about {rule:g}: 0.02 at 16 images a batch, and in proportion to them (for SGD)",
        f"Write SOLVER.BASE_LR: {rule:g}.",
    )


@check("HA122", "the learning rate schedule can be built", quick=True)
def schedule(context: DoctorContext) -> Iterator[Finding]:
    solver = context.cfg.SOLVER
    if _numbers(solver.MAX_ITER) and solver.MAX_ITER < 1:
        yield Finding(
            "HA122",
            "error",
            "SOLVER.MAX_ITER",
            f"{solver.MAX_ITER}",
            "at least 1 iteration",
            "Write SOLVER.MAX_ITER: 1000, or what your training needs.",
        )
        return
    if context.lazy is not None:
        yield from _lazy_schedule(context.lazy)
        return
    cfg = context.cfg.clone()
    cfg.defrost()
    # Those beyond the end are left out by detectron2 too, with a line that HA123 says better.
    cfg.SOLVER.STEPS = tuple(step for step in _steps(cfg) if step <= solver.MAX_ITER)
    try:
        build_lr_scheduler(cfg, torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0))
    except Exception as error:
        text = " ".join(f"{type(error).__name__}: {error}".split())
        fix = "Correct LR_SCHEDULER_NAME, STEPS (rising, each below MAX_ITER), BASE_LR_END or WARMUP_METHOD."
        yield Finding("HA122", "error", "SOLVER", text, "a schedule that detectron2 can build", fix)


def _lazy_schedule(lazy: DictConfig) -> Iterator[Finding]:
    node = lazy.get("lr_multiplier")
    if node is None:
        raise PartMissing("lr_multiplier", None, "the config has none")
    try:
        instantiate(node)
    except Exception as error:
        text = " ".join(f"{type(error).__name__}: {error}".split())
        yield Finding("HA122", "error", "lr_multiplier", text, "a schedule that can be built", "Correct the node.")


@check(
    "HA123",
    "SOLVER.STEPS and WARMUP_ITERS lie within SOLVER.MAX_ITER",
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
            "SOLVER.STEPS",
            f"{beyond} beyond SOLVER.MAX_ITER {solver.MAX_ITER}: the rate is not lowered there",
            "steps before the last iteration",
            f"Write SOLVER.STEPS: {late}, or [] for none.",
        )
    # The default is 1000, which nobody chose, and a short run still trains at a fraction of the rate to its end.
    if solver.WARMUP_ITERS >= solver.MAX_ITER >= 1 and solver.WARMUP_FACTOR < 1:
        most = solver.WARMUP_FACTOR + (1 - solver.WARMUP_FACTOR) * (solver.MAX_ITER - 1) / solver.WARMUP_ITERS
        reached = f"the last iteration has {most:.0%} of SOLVER.BASE_LR"
        if solver.WARMUP_METHOD != "linear":
            reached = f"the last iteration has {solver.WARMUP_FACTOR:.2g} of SOLVER.BASE_LR"
        yield Finding(
            "HA123",
            "warning",
            "SOLVER.WARMUP_ITERS",
            f"{solver.WARMUP_ITERS} of SOLVER.MAX_ITER {solver.MAX_ITER}: the warm-up fills the whole training, and "
            f"{reached}",
            "a warm-up shorter than the training",
            f"Write SOLVER.WARMUP_ITERS: {solver.MAX_ITER // 10}.",
        )


@check("HA124", "what TEST.EVAL_PERIOD evaluates is there", quick=True, severity="warning")
def evaluation(context: DoctorContext) -> Iterator[Finding]:
    period = context.cfg.TEST.EVAL_PERIOD
    if _numbers(period) and period > 0 and not context.cfg.DATASETS.TEST:
        yield Finding(
            "HA124",
            "warning",
            "TEST.EVAL_PERIOD",
            f"{period}, and no DATASETS.TEST: nothing is evaluated",
            "a dataset to evaluate, or period 0",
            "Write DATASETS: {TEST: [my_val]}, or TEST.EVAL_PERIOD: 0.",
        )


@check("HA125", "keypoints that the config counts and mirrors fit each other", needs=("settings",), quick=True)
def keypoints(context: DoctorContext) -> Iterator[Finding]:
    """What no json is needed for: HA217 looks at the keypoints that datasets declare."""
    cfg = context.cfg
    if not cfg.MODEL.KEYPOINT_ON or cfg.MODEL.META_ARCHITECTURE not in DETECTION:
        return
    count, sigmas = cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS, cfg.TEST.KEYPOINT_OKS_SIGMAS
    if context.tables.get("keypoint") is None and cfg.DATASETS.TEST and count != (len(sigmas) or OKS_SIGMAS):
        yield Finding(
            "HA125",
            "error",
            "TEST.KEYPOINT_OKS_SIGMAS",
            f"{len(sigmas) or f'none, so the {OKS_SIGMAS} of COCO'}, for {count} keypoints",
            "one sigma for each keypoint: COCO's evaluation stops otherwise, after the training",
            f"Write {count} numbers, such as TEST.KEYPOINT_OKS_SIGMAS: {[0.05] * count}.",
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
                f"keypoint_flip_map of {', '.join(map(repr, names))}",
                " ".join(str(error).split()),
                "one and the same list of pairs of keypoint_names in every training set",
                "Correct keypoint_names and keypoint_flip_map in the entries of DATASETS.REGISTER.",
            )


@check("HA126", "images can be read in INPUT.FORMAT and have its pixel mean", quick=True)
def pixels(context: DoctorContext) -> Iterator[Finding]:
    cfg = context.cfg
    mean, std, form = cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD, cfg.INPUT.FORMAT
    if form not in ("BGR", "YUV-BT.601", *Image.MODES):
        fix = f"Write INPUT.FORMAT: BGR.{did_you_mean(str(form), ['BGR', 'RGB', 'L'])}"
        yield Finding("HA126", "error", "INPUT.FORMAT", repr(form), "BGR, RGB, L or another mode of Pillow", fix)
    if len(mean) != len(std):
        yield Finding(
            "HA126",
            "error",
            "MODEL.PIXEL_STD",
            f"{len(std)} values, and {len(mean)} under MODEL.PIXEL_MEAN",
            "one value for each channel under both",
            f"Write MODEL.PIXEL_STD: {[1.0] * len(mean)}.",
        )
    default = list(context.defaults.MODEL.PIXEL_MEAN)
    swapped = (form == "RGB" and list(mean) == default) or (form == "BGR" and list(mean) == default[::-1])
    if swapped:
        yield Finding(
            "HA126",
            "note",
            "MODEL.PIXEL_MEAN",
            f"{list(mean)} with INPUT.FORMAT {form}, which is the mean of the other order of channels",
            f"{list(mean)[::-1]} for {form}",
            f"Write MODEL.PIXEL_MEAN: {list(mean)[::-1]}, if the weights were trained so.",
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
    if reference:
        count, where = reference, "SOLVER.REFERENCE_WORLD_SIZE"
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
            "SOLVER.IMS_PER_BATCH",
            f"{batch}, and {count} is {where}",
            f"a multiple of {count}",
            f"Write SOLVER.IMS_PER_BATCH: {max(batch // count, 1) * count}.",
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
                f"dataset {name!r} of DATASETS.TEST",
                "no evaluator_type in its metadata: the evaluation would stop, after the training",
                "evaluator_type, such as 'coco'",
                f"Register it under DATASETS.REGISTER, or set MetadataCatalog.get({name!r}).evaluator_type = 'coco'.",
            )


def _steps(cfg: CfgNode) -> list[float]:
    steps = cfg.SOLVER.STEPS
    return [s for s in steps if _numbers(s)] if isinstance(steps, (list, tuple)) else []


def _numbers(*values: Any) -> bool:
    """Whether each is a number; what is none has the finding of HA109."""
    return all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values)
