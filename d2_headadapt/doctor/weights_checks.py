"""Check checkpoint, plan and resume against config and model, by names, shapes and class tables; nothing is loaded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ..adapt.causes import Cause
from ..adapt.plan import AdaptPlan, TensorPlan
from ..adapt.report import plan_notices
from ..checkpoint.keys import matched
from ..checkpoint.load import refuse_plan
from ..config.settings import NUM_CLASSES_KEYS
from ..errors import ClassTableError, ConfigError, HeadAdaptError, NotFetchedError
from ..key import HEAD_ADAPT, INPUT, MODEL, Key
from .finding import DoctorContext, Finding, check, finding_of

PATTERN_KEYS = (HEAD_ADAPT.INCLUDE, HEAD_ADAPT.EXCLUDE, HEAD_ADAPT.RENAME)
ALIASES = HEAD_ADAPT.ALIASES
STRAY_SHARE = 0.1
"""A backbone of which a greater share of tensors has no partner is of another kind; a few buffers may differ."""


@check("HA301", "the checkpoint is there and can be read")
def can_be_read(context: DoctorContext) -> Iterator[Finding]:
    for part in ("weights", "plan"):
        error = context.failure(part)
        if error is not None and not _filed_elsewhere(error):
            path = context.weights or context.cfg.MODEL.WEIGHTS
            # An address may be out of reach only here, without a network.
            yield finding_of("HA301", error, "warning" if _is_not_fetched(error) else "error", where=path)


def _is_not_fetched(error: BaseException) -> bool:
    return isinstance(error, NotFetchedError)


def _filed_elsewhere(error: BaseException) -> bool:
    return _about(error, (*PATTERN_KEYS, ALIASES))


def _about(error: BaseException | None, keys: Sequence[Key]) -> bool:
    return isinstance(error, (ConfigError, ClassTableError)) and error.is_at(*keys)


@check("HA302", "the checkpoint covers the model", needs=("plan",))
def covers(context: DoctorContext) -> Iterator[Finding]:
    try:
        refuse_plan(context.plan, context.settings.min_coverage, context.weights_path)
    except HeadAdaptError as error:
        yield finding_of("HA302", error)


@check("HA303", "the classes of every head that is loaded are known", needs=("plan",), severity="warning")
def classes_known(context: DoctorContext) -> Iterator[Finding]:
    yield from _noticed("HA303", context, "unverified")


@check("HA312", "no trained head is thrown away", needs=("plan",), severity="warning")
def heads_kept(context: DoctorContext) -> Iterator[Finding]:
    yield from _noticed("HA312", context, "discarded")


@check("HA314", "no new class looks like a dropped one", needs=("plan",), severity="warning")
def near_classes(context: DoctorContext) -> Iterator[Finding]:
    yield from _noticed("HA314", context, "near")


def _noticed(code: str, context: DoctorContext, level: str) -> Iterator[Finding]:
    for notice in plan_notices(context.plan):
        if notice.code == level:
            error = ConfigError(
                context.weights_path,
                found=f"{notice.where}: {notice.found}",
                expected=notice.expected,
                fix=notice.fix,
            )
            yield Finding(code, "warning", error)


@check("HA304", "a class list of the same length is the same list", needs=("plan",), severity="warning")
def same_count(context: DoctorContext) -> Iterator[Finding]:
    """Find another class list of the same length, which stock detectron2 loads without a word."""
    plan = context.plan
    if plan.refused:
        return  # HA302 says it; nothing is moved then.
    for space, target in plan.target.items():
        source = plan.source.get(space)
        if source is None or len(source) != len(target) or source == target:
            continue
        moved = [t for t in plan.by_action("carried", "copied") if t.space == space and (t.carried or t.new)]
        if not moved:
            continue  # One that keeps its rows unverified is HA303's.
        i = next(i for i, pair in enumerate(zip(source.names, target.names, strict=True)) if pair[0] != pair[1])
        differ = f"{len(target)} {space} classes on both sides, and row {i} is {source.names[i]!r} in the file"
        if context.settings.match != "name":
            yield Finding(
                "HA304",
                "warning",
                ConfigError(
                    HEAD_ADAPT.MATCH,
                    found=f"{context.settings.match!r}: {differ} and becomes {target.names[i]!r}",
                    expected="rows that keep their class",
                    fix=f"Set {HEAD_ADAPT.MATCH.set('name')}, unless the two names mean the same thing.",
                ),
            )
        else:
            yield Finding(
                "HA304",
                "note",
                ConfigError(
                    context.weights_path,
                    found=f"{differ} and {target.names[i]!r} in the model",
                    expected="nothing else: this package moves the rows by name",
                    fix="Load it through this package only: stock detectron2 would keep the wrong rows without a word.",
                ),
            )


@check("HA308", "every class that is evaluated has a trained row", needs=("plan",))
def evaluated_rows(context: DoctorContext) -> Iterator[Finding]:
    """Find new rows where the config has nothing to train on; in training they are what one wants."""
    cfg = context.resolved
    if len(cfg.DATASETS.TRAIN) or not len(cfg.DATASETS.TEST) or cfg.MODEL.HEAD_ADAPT.ALLOW_NEW_ROWS_AT_EVAL:
        return
    plan = context.plan
    keys = {
        space: key
        for space, key in reversed(NUM_CLASSES_KEYS.get(cfg.MODEL.META_ARCHITECTURE, ()))
        if key.of(cfg) is not None
    }
    for space, names in plan.new_classes().items():
        count = _count_in_file(plan, space)
        fix = f"Give the weights of a finished training, or set {HEAD_ADAPT.ALLOW_NEW_ROWS_AT_EVAL.set(True)}."
        if count and space not in plan.target and space in keys:
            fix = f"Set {keys[space].set(count)}."
        yield Finding(
            "HA308",
            "error",
            ConfigError(
                context.weights_path,
                found=f"{len(names)} {space} classes without a trained row ({', '.join(names[:3])}"
                f"{', ...' if len(names) > 3 else ''})"
                + (f"; the shapes of the file hold {count} classes" if count else ""),
                expected="a trained row for every class that is evaluated",
                fix=fix,
            ),
        )


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
        yield finding_of("HA309", error)
    patterns = context.cfg.MODEL.HEAD_ADAPT.FREEZE if "HEAD_ADAPT" in context.cfg.MODEL else []
    if patterns:
        names = [name for name, _ in context.model.named_parameters()]
        for pattern in patterns:
            try:
                matched(names, [pattern], HEAD_ADAPT.FREEZE)
            except ConfigError as missed:
                yield finding_of("HA309", missed)


@check("HA310", "every alias names a class on both sides")
def aliases_name_classes(context: DoctorContext) -> Iterator[Finding]:
    error = context.failure("plan")
    if error is not None and _about(error, (ALIASES,)):
        yield finding_of("HA310", error)
    elif context.settings.aliases and not _matched_spaces(context):
        yield Finding(
            "HA310",
            "warning",
            ConfigError(
                ALIASES,
                found=f"{len(context.settings.aliases)} of them, and no head with known classes on both sides",
                expected="class tables that aliases can connect",
                fix=f"Name the file's classes with {HEAD_ADAPT.SOURCE_CLASSES}, or remove the aliases.",
            ),
        )


def _matched_spaces(context: DoctorContext) -> bool:
    plan = context.plan
    return any(layout.space in plan.source and layout.space in plan.target for layout in plan.layouts)


@check("HA311", "the backbone is that of the checkpoint", needs=("plan",), severity="warning")
def same_backbone(context: DoctorContext) -> Iterator[Finding]:
    """Find a backbone of another depth: a ResNet-101 file fills a ResNet-50, and only leftovers show it."""
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
                ConfigError(
                    context.weights_path,
                    found=f"{len(tensors)} of {total} {what}, {tensors[0].name} first",
                    expected="a checkpoint of this backbone",
                    fix=f"Set the backbone's keys ({MODEL.RESNETS.DEPTH}, NORM, STRIDE_IN_1X1...) to those the "
                    "checkpoint was made with, or use weights of this backbone.",
                ),
            )
            return


@check("HA313", "images have as many channels as the weights were trained on", needs=("plan",), severity="warning")
def same_channels(context: DoctorContext) -> Iterator[Finding]:
    """Find one mean, which makes a model of grey images, whose first layer then starts from random values."""
    channels = len(context.cfg.MODEL.PIXEL_MEAN)
    for t in context.plan.tensors:
        file, model = t.source_shape, t.target_shape
        if file is None or model is None or len(file) != 4 or len(model) != 4 or t.cause is not Cause.NO_LAYOUT:
            continue
        if model[1] == channels != file[1] and file[:1] + file[2:] == model[:1] + model[2:]:
            both = f"{MODEL.PIXEL_MEAN} and {MODEL.PIXEL_STD}"
            fix = f"Make {both} as long as the weights want, and {INPUT.FORMAT} its mode."
            if file[1] == 3:
                fix = f"Write {INPUT.FORMAT.write('BGR')}, and three values in {both}: a grey image is read as three "
                fix += "equal channels."
            found = f"{channels} value{'s' * (channels != 1)}, so {t.name} takes {channels} and in "
            found += f"{context.weights_path} {file[1]}: this layer starts from random values"
            error = ConfigError(MODEL.PIXEL_MEAN, found=found, expected=f"{file[1]} channels", fix=fix)
            yield Finding("HA313", "warning", error)
            return


def _no_sign(t: TensorPlan) -> bool:
    """Tell whether a tensor is left out by the user, or a counter that frozen batch norms do not have."""
    return t.cause.by_user or t.name.endswith("num_batches_tracked")
