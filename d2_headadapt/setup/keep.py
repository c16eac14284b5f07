"""Settle which classes a base model has and which a session adds, and write them into the config."""

from __future__ import annotations

import logging
import os
from typing import Any

from detectron2.config import CfgNode

from ..adapt.classes import ClassTable, shorten
from ..adapt.vocabularies import zoo_tables
from ..checkpoint.kept import KeptFile, kept_in
from ..checkpoint.load import check_exists
from ..checkpoint.provenance import Provenance, provenance_of
from ..config.keep import KeepSettings, PackSpec, check_mode
from ..config.keys import add_headadapt_config
from ..data.datasets import dataset_table, resolve_table, training_table
from ..errors import ClassTableError, ConfigError, DatasetError
from ..key import DATASETS, HEAD_ADAPT, MODEL, TEST

logger = logging.getLogger(__name__)
WHERE = HEAD_ADAPT.KEEP


def settle_keep(cfg: CfgNode, *, required: bool = False) -> bool:
    """Write the base's classes under ``TARGET_CLASSES`` and what is added under ``KEEP_PACKS``, in place.

    Args:
        cfg: not frozen, its datasets registered.
        required: raise for a training set that is not registered, which else adds nothing.

    Returns:
        Whether ``KEEP`` is set.

    Raises:
        ConfigError, ClassTableError, DatasetError, CheckpointFileError: a base or classes that cannot be used.
    """
    add_headadapt_config(cfg)
    node = cfg.MODEL.HEAD_ADAPT
    if not check_mode(node.KEEP):
        return False
    _refuse_other_keys(cfg)
    # Choices are looked at before any file is.
    choices = str(node.KEEP_DETECTIONS), float(node.KEEP_SUPPRESS_SCORE), str(node.KEEP_PROPOSALS)
    KeepSettings(ClassTable(["old"]), (PackSpec(("new",), str(node.KEEP_HEAD)),), (), *choices)
    if not node.KEEP_PACKS:
        path, known = _base(cfg)
        stored = kept_in(known, path)
        old = ClassTable(stored.classes, path) if stored else _base_table(cfg, path, known)
        packs = [*(stored.packs if stored else ()), *_added(cfg, old, stored, required)]
        if not packs:
            raise ConfigError(
                WHERE,
                expected="a class that the base does not have",
                found=f"none in {DATASETS.TRAIN} {tuple(cfg.DATASETS.TRAIN)}, and none that was added to {path} before",
                fix=f"Name a dataset of new classes in {DATASETS.TRAIN}; it need not list the old ones.",
            )
        node.TARGET_CLASSES = list(old.names)
        node.KEEP_PACKS = [pack.to_plain() for pack in packs]
        logger.info("%s", settled_line(len(old), packs))
    return True


def settled_line(old: int, packs: list[PackSpec]) -> str:
    """Say in a line what was settled."""
    added = shorten([name for pack in packs for name in pack.classes])
    return f"KEEP exact: {old} old classes stay as they are, bit for bit; added: {added}"


def check_labels(cfg: CfgNode) -> None:
    """Refuse a dataset with a class that is neither old nor added.

    Raises:
        DatasetError: names the dataset and the class.
    """
    node = cfg.MODEL.HEAD_ADAPT
    packs = [PackSpec.from_plain(entry, HEAD_ADAPT.KEEP_PACKS) for entry in node.KEEP_PACKS]
    known = {*map(str, node.TARGET_CLASSES), *(name for pack in packs for name in pack.classes)}
    for key in ("TRAIN", "TEST"):
        for name in cfg.DATASETS[key]:
            table = dataset_table(name)
            strange = [entry for entry in table.names if entry not in known] if table is not None else []
            if strange:
                raise DatasetError(
                    f"DATASETS.{key}, {name!r}",
                    expected="classes of the base or added ones, in their own spelling",
                    found=shorten([repr(entry) for entry in strange]),
                    fix=f"Use a dataset of the model's classes, or leave {HEAD_ADAPT.KEEP_PACKS} out to add these.",
                )


def _refuse_other_keys(cfg: CfgNode) -> None:
    """Refuse what cannot be had together with ``KEEP``."""
    node = cfg.MODEL.HEAD_ADAPT
    off: Any
    for key, value, off, why in (
        (HEAD_ADAPT.FREEZE, node.FREEZE, [], "everything but the added classes is frozen already"),
        (TEST.AUG.ENABLED, cfg.TEST.AUG.ENABLED, False, "augmented tests merge old and new detections in one step"),
    ):
        if value:
            raise ConfigError(
                key,
                expected=f"{off!r} beside {WHERE.set(node.KEEP)}: {why}",
                found=repr(value),
                fix=f"Set {key.set(off)}, or {WHERE} ''.",
            )


def _base(cfg: CfgNode) -> tuple[str, Provenance]:
    path = str(cfg.MODEL.WEIGHTS)
    if not path:
        raise ConfigError(
            MODEL.WEIGHTS,
            expected=f"the base model, whose detections {WHERE.set('exact')} keeps",
            found="nothing",
            fix=f"Name a checkpoint, such as {MODEL.WEIGHTS.set('model_final.pth')}.",
        )
    check_exists(path)
    return path, provenance_of(path, bool(cfg.MODEL.HEAD_ADAPT.TRUST_FILE))


def _base_table(cfg: CfgNode, path: str, known: Provenance) -> ClassTable:
    table = known.tables.get("thing")
    if table is None:
        table = resolve_table(cfg.MODEL.HEAD_ADAPT.SOURCE_CLASSES, key=HEAD_ADAPT.SOURCE_CLASSES, space="thing")
    if table is None:
        table = (zoo_tables(path) or {}).get("thing")
    if table is None:
        raise ConfigError(
            HEAD_ADAPT.SOURCE_CLASSES,
            expected=f"the classes of the base {os.path.basename(path)}, which does not say them itself",
            found="nothing",
            fix=f"Name them: {HEAD_ADAPT.SOURCE_CLASSES.set('coco')}, another vocabulary, a dataset, a .json or .txt "
            "file, or the names as a list.",
        )
    return table


def _added(cfg: CfgNode, old: ClassTable, stored: KeptFile | None, required: bool) -> list[PackSpec]:
    """List what this session adds: classes that neither the base nor an earlier session has."""
    node = cfg.MODEL.HEAD_ADAPT
    labels = resolve_table(node.TARGET_CLASSES, key=HEAD_ADAPT.TARGET_CLASSES, space="thing")
    if labels is None and len(cfg.DATASETS.TRAIN):
        try:
            labels = training_table(cfg.DATASETS.TRAIN)
        except DatasetError:
            if required:
                raise
    earlier = [name for pack in (stored.packs if stored else ()) for name in pack.classes]
    known = ClassTable([*old.names, *earlier], old.origin)
    new = [name for name in (labels.names if labels is not None else ()) if name not in set(known.names)]
    for name in new:
        same = known.find(name)
        if same is not None:
            raise ClassTableError(
                f"{WHERE}, new class {name!r}",
                expected="a name that the base does not have in another spelling",
                found=f"its class {known.names[same]!r}",
                fix=f"Rename it in the json: to {known.names[same]!r} if it means the same (its objects then belong to "
                "the old class), else to a name of its own.",
            )
    return [PackSpec(tuple(new), str(node.KEEP_HEAD))] if new else []
