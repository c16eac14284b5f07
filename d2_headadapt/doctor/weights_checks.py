"""Checkpoint, plan and resume against config and model. Nothing is loaded: names, shapes and class tables suffice."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ..adapt.causes import Cause
from ..adapt.plan import AdaptPlan, TensorPlan
from ..adapt.report import plan_notices
from ..checkpoint.keys import matched
from ..checkpoint.load import refuse_plan
from ..config.settings import NUM_CLASSES_KEYS
from ..errors import ClassTableError, ConfigError, HeadAdaptError, NotFetchedError
from .finding import DoctorContext, Finding, check

PATTERN_KEYS = tuple(f"MODEL.HEAD_ADAPT.{key}" for key in ("INCLUDE", "EXCLUDE", "RENAME"))
ALIASES = "MODEL.HEAD_ADAPT.ALIASES"
STRAY_SHARE = 0.1
"""A backbone of which a greater share of tensors has no partner is of another kind; a few buffers may differ."""


@check("HA301", "the checkpoint is there and can be read")
def can_be_read(context: DoctorContext) -> Iterator[Finding]:
    for part in ("weights", "plan"):
        error = context.failure(part)
        if error is not None and not _filed_elsewhere(error):
            path = context.weights or context.cfg.MODEL.WEIGHTS
            # An address may be out of reach only here, without a network.
            yield Finding.of("HA301", error, "warning" if _is_not_fetched(error) else "error", where=path)


def _is_not_fetched(error: BaseException) -> bool:
    return isinstance(error, NotFetchedError)


def _filed_elsewhere(error: BaseException) -> bool:
    return _about(error, (*PATTERN_KEYS, ALIASES))


def _about(error: BaseException | None, keys: Sequence[str]) -> bool:
    return isinstance(error, (ConfigError, ClassTableError)) and error.where.startswith(tuple(keys))


@check("HA302", "the checkpoint covers the model", needs=("plan",))
def covers(context: DoctorContext) -> Iterator[Finding]:
    try:
        refuse_plan(context.plan, context.settings.min_coverage, context.weights_path)
    except HeadAdaptError as error:
        yield Finding.of("HA302", error)


@check("HA303", "every head of the file is loaded, and its classes are known", needs=("plan",), severity="warning")
def classes_known(context: DoctorContext) -> Iterator[Finding]:
    yield from _noticed("HA303", context, ("discarded", "unverified"), "a head whose classes are known on both sides")


@check("HA312", "no new class looks like a dropped one", needs=("plan",), severity="warning")
def near_classes(context: DoctorContext) -> Iterator[Finding]:
    yield from _noticed("HA312", context, ("near",), "one name for what is the same class")


def _noticed(code: str, context: DoctorContext, levels: Sequence[str], expected: str) -> Iterator[Finding]:
    for notice in plan_notices(context.plan):
        if notice.level in levels:
            fix = "Build the model as the file was made, or leave it if that is meant."
            if notice.type_this:
                fix = f"Type: {notice.type_this}" + (f" ({notice.hint})." if notice.hint else ".")
            yield Finding(code, "warning", context.weights_path, f"{notice.what}: {notice.why}", expected, fix)


@check("HA304", "a class list of the same length is the same list", needs=("plan",), severity="warning")
def same_count(context: DoctorContext) -> Iterator[Finding]:
    """Shapes cannot tell two lists of one length apart, so stock detectron2 loads such a file without a word."""
    plan = context.plan
    for space, target in plan.target.items():
        source = plan.source.get(space)
        if source is None or len(source) != len(target) or source == target:
            continue
        if not any(t.space == space and t.source_shape for t in plan.tensors):
            continue
        i = next(i for i, pair in enumerate(zip(source.names, target.names, strict=True)) if pair[0] != pair[1])
        differ = f"{len(target)} {space} classes on both sides, and row {i} is {source.names[i]!r} in the file"
        if context.settings.match == "position":
            yield Finding(
                "HA304",
                "warning",
                "MODEL.HEAD_ADAPT.MATCH",
                f"'position': {differ} and becomes {target.names[i]!r}",
                "rows that keep their class",
                "Set MODEL.HEAD_ADAPT.MATCH name, unless the two names mean the same thing.",
            )
        else:
            yield Finding(
                "HA304",
                "note",
                context.weights_path,
                f"{differ} and {target.names[i]!r} in the model",
                "nothing else: this package moves the rows by name",
                "Load it through this package only: stock detectron2 would keep the wrong rows without a word.",
            )


@check("HA308", "every class that is evaluated has a trained row", needs=("plan",))
def evaluated_rows(context: DoctorContext) -> Iterator[Finding]:
    """Only where the config has nothing to train on: in training, new rows are what one wants."""
    cfg = context.resolved
    if len(cfg.DATASETS.TRAIN) or not len(cfg.DATASETS.TEST) or cfg.MODEL.HEAD_ADAPT.ALLOW_NEW_ROWS_AT_EVAL:
        return
    plan = context.plan
    keys = {
        space: key for space, key in reversed(NUM_CLASSES_KEYS.get(cfg.MODEL.META_ARCHITECTURE, ())) if _has(cfg, key)
    }
    for space, names in plan.new_classes().items():
        count = _count_in_file(plan, space)
        fix = "Give the weights of a finished training, or set MODEL.HEAD_ADAPT.ALLOW_NEW_ROWS_AT_EVAL True."
        if count and space not in plan.target and space in keys:
            fix = f"Set {keys[space]} {count}."
        yield Finding(
            "HA308",
            "error",
            context.weights_path,
            f"{len(names)} {space} classes without a trained row ({', '.join(names[:3])}"
            f"{', ...' if len(names) > 3 else ''}){f'; the shapes of the file hold {count} classes' if count else ''}",
            "a trained row for every class that is evaluated",
            fix,
        )


def _has(cfg: object, key: str) -> bool:
    node = cfg
    for name in key.split("."):
        if not isinstance(node, dict) or name not in node:
            return False
        node = node[name]
    return True


def _count_in_file(plan: AdaptPlan, space: str) -> int | None:
    shapes = {t.name: t.source_shape for t in plan.tensors if t.source_shape is not None}
    counts = {
        layout.num_classes(shapes[layout.tensor])
        for layout in plan.layouts
        if layout.space == space and layout.axes and not layout.rebuilt and layout.tensor in shapes
    }
    return counts.pop() if len(counts) == 1 else None


@check("HA309", "every pattern matches something")
def patterns_match(context: DoctorContext) -> Iterator[Finding]:
    error = context.failure("plan")
    if error is not None and _about(error, PATTERN_KEYS):
        yield Finding.of("HA309", error)
    patterns = context.cfg.MODEL.HEAD_ADAPT.FREEZE if "HEAD_ADAPT" in context.cfg.MODEL else []
    if patterns:
        names = [name for name, _ in context.model.named_parameters()]
        for pattern in patterns:
            try:
                matched(names, [pattern], "MODEL.HEAD_ADAPT.FREEZE")
            except ConfigError as missed:
                yield Finding.of("HA309", missed)


@check("HA310", "every alias names a class on both sides")
def aliases_name_classes(context: DoctorContext) -> Iterator[Finding]:
    error = context.failure("plan")
    if error is not None and _about(error, (ALIASES,)):
        yield Finding.of("HA310", error)
    elif context.settings.aliases and not _matched_spaces(context):
        yield Finding(
            "HA310",
            "warning",
            ALIASES,
            f"{len(context.settings.aliases)} of them, and no head with known classes on both sides",
            "class tables that aliases can connect",
            "Name the file's classes with MODEL.HEAD_ADAPT.SOURCE_CLASSES, or remove the aliases.",
        )


def _matched_spaces(context: DoctorContext) -> bool:
    plan = context.plan
    return any(layout.space in plan.source and layout.space in plan.target for layout in plan.layouts)


@check("HA311", "the backbone is that of the checkpoint", needs=("plan",), severity="warning")
def same_backbone(context: DoctorContext) -> Iterator[Finding]:
    """A ResNet-101 file fills a ResNet-50 without a mismatch: what is left over is the only sign."""
    plan = context.plan
    if plan.coverage < context.settings.min_coverage or plan.loads_nothing:
        return  # HA302 says it.
    backbone = [t for t in plan.tensors if t.name.startswith("backbone.") and not _no_sign(t)]
    if any(t.name.startswith("backbone.bottom_up.") for t in backbone if t.target_shape):
        # An FPN above an ImageNet backbone is new by intention.
        backbone = [t for t in backbone if t.name.startswith("backbone.bottom_up.")]
    of_file = [t for t in backbone if t.source_shape is not None]
    of_model = [t for t in backbone if t.target_shape is not None]
    if not of_file or not of_model:
        return
    left = [t for t in of_file if t.action in ("dropped", "kept")]
    random = [t for t in of_model if t.action in ("kept", "initialised")]
    for tensors, total, what in (
        (left, len(of_file), "of the checkpoint's backbone tensors have no place in the model"),
        (random, len(of_model), "of the model's backbone tensors take nothing from the checkpoint"),
    ):
        if len(tensors) > STRAY_SHARE * total:
            yield Finding(
                "HA311",
                "warning",
                context.weights_path,
                f"{len(tensors)} of {total} {what}, {tensors[0].name} first",
                "a checkpoint of this backbone",
                "Set the backbone's keys (MODEL.RESNETS.DEPTH, NORM, STRIDE_IN_1X1...) to those the checkpoint was "
                "made with, or use weights of this backbone.",
            )
            return


@check("HA313", "images have as many channels as the weights were trained on", needs=("plan",), severity="warning")
def same_channels(context: DoctorContext) -> Iterator[Finding]:
    """One mean makes a model of grey images, whose first layer then starts from random values."""
    channels = len(context.cfg.MODEL.PIXEL_MEAN)
    for t in context.plan.tensors:
        file, model = t.source_shape, t.target_shape
        if file is None or model is None or len(file) != 4 or len(model) != 4 or t.cause is not Cause.NO_LAYOUT:
            continue
        if model[1] == channels != file[1] and file[:1] + file[2:] == model[:1] + model[2:]:
            fix = "Make MODEL.PIXEL_MEAN and MODEL.PIXEL_STD as long as the weights want, and INPUT.FORMAT its mode."
            if file[1] == 3:
                fix = "Write INPUT.FORMAT: BGR, and three values in MODEL.PIXEL_MEAN and MODEL.PIXEL_STD: a grey image "
                fix += "is read as three equal channels."
            yield Finding(
                "HA313",
                "warning",
                "MODEL.PIXEL_MEAN",
                f"{channels} value{'s' * (channels != 1)}, so {t.name} takes {channels} and in {context.weights_path} "
                f"{file[1]}: this layer starts from random values",
                f"{file[1]} channels",
                fix,
            )
            return


def _no_sign(t: TensorPlan) -> bool:
    """Left out by the user, or a counter that frozen batch norms do not have."""
    return t.cause.by_user or t.name.endswith("num_batches_tracked")
