"""Checks HA101 to HA111: what the config says of its own keys, its datasets' names and its classes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from detectron2.modeling import META_ARCH_REGISTRY, ROI_HEADS_REGISTRY

from ..adapt.classes import nearest
from ..config.settings import NUM_CLASSES_KEYS, with_keys
from ..data.datasets import check_same_classes, dataset_table
from ..errors import ClassTableError, ConfigError, DatasetError, HeadAdaptError
from ..key import DATASETS, HEAD_ADAPT, MODEL, Key
from ..setup.task_checks import WITH_ROI_HEADS, check_tasks
from ..setup.yaml import all_keys
from .field_checks import class_names
from .finding import DoctorContext, Finding, Severity, check, finding_of, is_stock

SEGMENTATION = ("SemanticSegmentor", "PanopticFPN", "PanopticDeepLab")
READERS = {
    MODEL.ROI_HEADS: WITH_ROI_HEADS,
    MODEL.ROI_BOX_HEAD: WITH_ROI_HEADS,
    MODEL.ROI_BOX_CASCADE_HEAD: WITH_ROI_HEADS,
    MODEL.ROI_MASK_HEAD: WITH_ROI_HEADS,
    MODEL.ROI_KEYPOINT_HEAD: WITH_ROI_HEADS,
    MODEL.MASK_ON: WITH_ROI_HEADS,
    MODEL.KEYPOINT_ON: WITH_ROI_HEADS,
    MODEL.RETINANET: ("RetinaNet",),
    MODEL.SEM_SEG_HEAD: SEGMENTATION,
    MODEL.PANOPTIC_FPN: ("PanopticFPN",),
}
"""Sections and switches of detectron2's config -> those of its own architectures that read them."""
BASE_KEYS = ("NAME", "IN_FEATURES", "POOLER_RESOLUTION", "NUM_FC", "NUM_CONV")
"""What Base-RCNN-FPN.yaml sets for whoever starts from it, detectron2's own semantic segmentation among them."""


@check("HA101", "the config and its base files load, every key exists, every value has its key's type", needs=())
def loads(context: DoctorContext) -> Iterator[Finding]:
    error = context.failure("config")
    if error is not None:
        yield finding_of("HA101", error, where="--config-file")


@check("HA102", f"the entries of {DATASETS.REGISTER} can be registered")
def registers(context: DoctorContext) -> Iterator[Finding]:
    error = context.failure("registered")
    if error is not None:
        yield finding_of("HA102", error, where=DATASETS.REGISTER)


@check(
    "HA103", f"{DATASETS.TRAIN} and {DATASETS.TEST} are lists of registered datasets", needs=("registered",), quick=True
)
def names_datasets(context: DoctorContext) -> Iterator[Finding]:
    for key in (DATASETS.TRAIN, DATASETS.TEST):
        names = key.of(context.cfg)
        if isinstance(names, str) and key == DATASETS.TRAIN:
            names = (names,)  # As for detectron2's loaders.
        elif isinstance(names, str):
            yield Finding(
                "HA103",
                "error",
                ConfigError(
                    key,
                    found=f"the string {names!r}, whose letters would be taken for datasets",
                    expected="a list of datasets",
                    fix=f"Write {key.write(f'[{names}]')}.",
                ),
            )
            continue
        for name in dict.fromkeys(names):
            if name not in DatasetCatalog:
                try:
                    dataset_table(name)
                except DatasetError as error:
                    yield finding_of("HA103", error)
    if not context.cfg.DATASETS.TRAIN:
        yield Finding(
            "HA103",
            "note",
            ConfigError(
                DATASETS.TRAIN,
                found="no dataset",
                expected="one to train on; to predict or evaluate alone, none is needed",
                fix=f"Write {DATASETS.TRAIN.write('[my_train]')}.",
            ),
        )


@check("HA104", "every class table and task of the config can be settled", needs=("registered",))
def settles(context: DoctorContext) -> Iterator[Finding]:
    if _all_registered(context.cfg):
        error = context.failure("settings")
        # What is wrong with the names of a json, HA211 says with their ids.
        said = isinstance(error, ClassTableError) and any(f.code == "HA211" for f in class_names(context))
        if error is not None and not said:
            yield finding_of("HA104", error, where=f"{HEAD_ADAPT}, {DATASETS.TRAIN}")


@check("HA105", "every dataset has the classes of the model, in their order", needs=("settings",), quick=True)
def same_classes(context: DoctorContext) -> Iterator[Finding]:
    for name in context.dataset_names:
        which = DATASETS.TRAIN if name in context.train_names else DATASETS.TEST
        for space, table in context.tables.items():
            if space == "thing" and with_keys(context.cfg).MODEL.HEAD_ADAPT.KEEP:
                continue  # The table is the base's alone, and setup has looked at the names of old and new ones.
            try:
                check_same_classes(table, name, space, which)
            except DatasetError as error:
                yield finding_of("HA105", error)


@check("HA106", "class counts are those of the datasets", needs=("settings",), quick=True)
def class_counts(context: DoctorContext) -> Iterator[Finding]:
    """Compare class counts with the class list; ``setup`` overwrites a wrong count, a user's own code does not."""
    cfg = context.cfg
    for space, key in NUM_CLASSES_KEYS.get(cfg.MODEL.META_ARCHITECTURE, ()):
        table, written = context.tables.get(space), key.of(cfg)
        if table is None or not isinstance(written, int) or written == len(table):
            continue
        if space == "thing" and with_keys(cfg).MODEL.HEAD_ADAPT.KEEP:
            continue  # The base's classes are counted; those of the dataset stand behind them.
        if space == "keypoint" and not cfg.MODEL.KEYPOINT_ON:
            continue
        severity: Severity
        background = written == len(table) + 1
        if context.ready is None or (space != "stuff" and _rewrites_counts(cfg)):
            if written == key.of(context.defaults):
                continue
            severity, becomes = ("warning" if background else "note"), ", which is overwritten"
        else:
            # A label beyond the last row ends the training; a row too many only learns that it is never there.
            severity, becomes = ("error" if written < len(table) else "warning"), ""
        yield Finding(
            "HA106",
            severity,
            ConfigError(
                key,
                found=f"{written}{becomes}"
                + (": background is counted, which detectron2 adds by itself" if background else ""),
                expected=f"{len(table)}, the classes of {table.origin}",
                fix=f"Write {key.write(len(table))}.",
            ),
        )


@check(
    "HA107",
    "every changed key is read by this architecture",
    quick=True,
    severity="warning",
    yaml_only="what a LazyConfig names is called, and refused where it takes no such argument",
)
def read_keys(context: DoctorContext) -> Iterator[Finding]:
    cfg, stock = context.cfg, context.defaults
    architecture = cfg.MODEL.META_ARCHITECTURE
    if not is_stock(META_ARCH_REGISTRY, architecture):
        # Who wrote another architecture knows what it reads.
        return
    for section, readers in READERS.items():
        if architecture in readers:
            continue
        default, value = section.of(stock), section.of(cfg)
        changed = [section] if default != value else []
        if isinstance(value, CfgNode) and isinstance(default, CfgNode):
            own = [Key(k) for k in all_keys(value, f"{section.yaml}.") if k.rpartition(".")[2] not in BASE_KEYS]
            changed = [key for key in own if key.of(cfg) != key.of(stock)]
        used = [key for _, key in NUM_CLASSES_KEYS.get(architecture, ())]
        for key in changed:
            same = [other for other in used if other.yaml.endswith(".NUM_CLASSES")]
            fix = f"Write it under {same[0]}." if key.yaml.endswith("NUM_CLASSES") and same else "Remove it."
            yield Finding(
                "HA107",
                "warning",
                ConfigError(
                    key,
                    found=f"{key.of(cfg)!r}, which {architecture} never reads",
                    expected=f"an architecture that does ({', '.join(readers)}), or the default",
                    fix=fix,
                ),
            )
    heads = cfg.MODEL.ROI_HEADS.NAME
    node, kept = cfg.MODEL.get("HEAD_ADAPT", {}), stock.MODEL.HEAD_ADAPT
    reads = architecture in WITH_ROI_HEADS and not is_stock(ROI_HEADS_REGISTRY, heads)
    if node.get("PREDICTOR", kept.PREDICTOR) != kept.PREDICTOR and not reads:
        yield Finding(
            "HA107",
            "warning",
            ConfigError(
                HEAD_ADAPT.PREDICTOR,
                found=f"{node.PREDICTOR!r}, which {MODEL.ROI_HEADS.NAME.set(heads)} of {architecture} never reads",
                expected="ROI heads of d2_headadapt",
                fix=f"Set {MODEL.ROI_HEADS.NAME.set('HeadAdaptROIHeads')}.",
            ),
        )


@check("HA108", "every declared task has a reader", quick=True)
def tasks_are_read(context: DoctorContext) -> Iterator[Finding]:
    try:
        check_tasks(context.cfg)
    except HeadAdaptError as error:
        yield finding_of("HA108", error)


@check("HA109", "every value has the type of its key", quick=True)
def value_types(context: DoctorContext) -> Iterator[Finding]:
    """Check the types of values: yacs checks those of files, not a script's ``cfg.A.B = value``."""
    cfg, stock = context.cfg, context.defaults
    for key in map(Key, all_keys(stock)):
        default, value = key.of(stock), key.of(cfg)
        wanted = _kind(default)
        # DATASETS.TRAIN and TEST have a message of their own.
        found = _kind(value)
        if None in (wanted, found) or found == wanted or key in (DATASETS.TRAIN, DATASETS.TEST):
            continue
        if {wanted, found} == {"a number", "a truth value"}:
            continue
        yield Finding(
            "HA109",
            # Some lists of one may be written as the one, but no code computes with text or wants its letters.
            "error" if isinstance(value, str) else "warning",
            ConfigError(
                key,
                found=f"{value!r}, which is {found}",
                expected=f"{wanted}, such as {default!r}",
                fix=f"Write {key.write(_as_kind(value, str(wanted), default))}.",
            ),
        )


@check(
    "HA110",
    "no key stands where nothing reads it",
    quick=True,
    severity="warning",
    yaml_only="keys of head_adapt are checked when it is read, and others belong to what they are passed to",
)
def misplaced_keys(context: DoctorContext) -> Iterator[Finding]:
    """Find keys outside their section, such as ``cfg.BASE_LR``; keys of a user's own components are left alone."""
    cfg, stock = context.cfg, context.defaults
    known = list(all_keys(stock))
    for name, value in cfg.items():
        if name in stock or isinstance(value, CfgNode):
            continue
        meant = [key for key in known if key.rpartition(".")[2] == name] or nearest(name, list(stock))
        if meant:
            yield _unread(name, value, meant[0])
    for key in all_keys(cfg):
        section, _, name = key.rpartition(".")
        siblings = Key(section).of(stock) if section else None
        if not isinstance(siblings, CfgNode) or name in siblings or siblings.is_new_allowed():
            continue
        meant = [f"{section}.{other}" for other in siblings if _one_slip(name, other)]
        if meant:
            yield _unread(key, Key(key).of(cfg), meant[0])


def _unread(key: str, value: Any, meant: str) -> Finding:
    return Finding(
        "HA110",
        "warning",
        ConfigError(
            Key(key),
            found=f"{value!r} under a key that nothing reads",
            expected=f"perhaps {Key(meant)}",
            fix=f"Write {Key(meant)}.",
        ),
    )


def _one_slip(name: str, other: str) -> bool:
    """Tell whether names differ by one letter inserted, left out or replaced, or two swapped; digits count as meant."""
    if name == other or min(len(name), len(other)) < 4 or abs(len(name) - len(other)) > 1:
        return False
    start = next((i for i, (a, b) in enumerate(zip(name, other, strict=False)) if a != b), min(len(name), len(other)))
    a, b = name[start:], other[start:]
    slips = [(a[1:], b[1:]), (a[1:], b), (a, b[1:]), (a[1::-1] + a[2:], b)]
    digits = [[c for c in text if c.isdigit()] for text in (name, other)]
    return digits[0] == digits[1] and any(one == two for one, two in slips)


def _all_registered(cfg: CfgNode) -> bool:
    train, test = cfg.DATASETS.TRAIN, cfg.DATASETS.TEST
    names = (*((train,) if isinstance(train, str) else train), *test)
    return not isinstance(test, str) and all(name in DatasetCatalog for name in names)


def _rewrites_counts(cfg: CfgNode) -> bool:
    """Tell whether the heads set the counts on a config of their own, as classes outside detectron2 may."""
    return cfg.MODEL.META_ARCHITECTURE in WITH_ROI_HEADS and not is_stock(ROI_HEADS_REGISTRY, cfg.MODEL.ROI_HEADS.NAME)


def _kind(value: Any) -> str | None:
    for types, kind in (((int, float), "a number"), ((str,), "a string"), ((list, tuple), "a list")):
        if isinstance(value, types):
            return "a truth value" if isinstance(value, bool) else kind
    return None


def _as_kind(value: Any, wanted: str, default: Any) -> str:
    if wanted == "a list":
        return f"[{value}]"
    if wanted == "a number" and isinstance(value, str):
        try:
            return repr(type(default)(float(value)))
        except ValueError:
            pass
    return repr(default)
