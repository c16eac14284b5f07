"""What a user wants of an adaptation, as plain values: attached to the model, so that any checkpointer finds it."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from detectron2.config import CfgNode
from torch import nn

from .classes import KEY_SUFFIXES, SPACES, ClassTable
from .config import add_headadapt_config
from .datasets import resolve_table, training_table
from .errors import ConfigError, DatasetError
from .tasks.spec import source_tables, task_specs

logger = logging.getLogger(__name__)
ATTRIBUTE = "head_adapt_settings"

NUM_CLASSES_KEYS: dict[str, tuple[tuple[str, str], ...]] = {
    "GeneralizedRCNN": (
        ("thing", "MODEL.ROI_HEADS.NUM_CLASSES"),
        ("thing", "MODEL.POINT_HEAD.NUM_CLASSES"),
        ("keypoint", "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS"),
    ),
    "ProposalNetwork": (),
    "RetinaNet": (("thing", "MODEL.RETINANET.NUM_CLASSES"),),
    "FCOS": (("thing", "MODEL.FCOS.NUM_CLASSES"),),
    "SemanticSegmentor": (
        ("stuff", "MODEL.SEM_SEG_HEAD.NUM_CLASSES"),
        ("stuff", "MODEL.POINT_HEAD.NUM_CLASSES"),
    ),
    "PanopticFPN": (
        ("thing", "MODEL.ROI_HEADS.NUM_CLASSES"),
        ("thing", "MODEL.POINT_HEAD.NUM_CLASSES"),
        ("keypoint", "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS"),
        ("stuff", "MODEL.SEM_SEG_HEAD.NUM_CLASSES"),
    ),
    "PanopticDeepLab": (("stuff", "MODEL.SEM_SEG_HEAD.NUM_CLASSES"),),
    "MultiTaskClassifier": (),
}
"""The keys that each meta-architecture of detectron2 reads its class counts from."""


@dataclass(frozen=True)
class AdaptSettings:
    """Everything that a load needs to know beside the file and the model.

    Args:
        target: class tables that the model shall predict, by label space; what is absent is unknown.
        source: class tables of the file as the user names them.
        initialise: label spaces whose heads take nothing from the file.
        aliases, match: see :func:`d2_headadapt.classes.match_classes`.
        min_coverage: least share of the file's tensors that must find a place.
        trust_file: allow full pickle.
        verify_file: check the CRC of records that are taken.
        resume: ``"refuse"`` or ``"adapt"``, what a resume does when the class list changed.
        include, exclude, rename: see :mod:`d2_headadapt.selecting`.
        new_rows: ``"recipe"``, or ``"nearest"``: see :mod:`d2_headadapt.text.nearest`.
        text_file, text_names: see :func:`d2_headadapt.text.bundle.read_bundle`.
    """

    target: Mapping[str, ClassTable] = field(default_factory=dict)
    source: Mapping[str, ClassTable] = field(default_factory=dict)
    initialise: frozenset[str] = frozenset()
    aliases: tuple[str, ...] = ()
    match: str = "name"
    min_coverage: float = 0.5
    trust_file: bool = False
    verify_file: bool = True
    resume: str = "refuse"
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    rename: tuple[str, ...] = ()
    new_rows: str = "recipe"
    text_file: str = ""
    text_names: Any = None

    @classmethod
    def from_config(cls, cfg: CfgNode, *, registered_only: bool = False) -> AdaptSettings:
        """Read the keys under ``MODEL.HEAD_ADAPT`` and the classes of ``DATASETS.TRAIN``.

        Args:
            cfg: a config; where ``add_headadapt_config`` was not called, the defaults hold.
            registered_only: a training set that is not registered leaves the target unknown instead of raising, as
                when a model is only built to predict.

        Raises:
            ConfigError, ClassTableError, DatasetError: a key that cannot be used.
        """
        cfg = with_keys(cfg)
        node = cfg.MODEL.HEAD_ADAPT
        for key, choices in (
            ("MATCH", ("name", "position")),
            ("RESUME", ("refuse", "adapt")),
            ("NEW_ROWS", ("recipe", "nearest")),
        ):
            if node[key] not in choices:
                raise ConfigError(
                    f"MODEL.HEAD_ADAPT.{key}",
                    expected=f"{choices[0]!r} or {choices[1]!r}",
                    found=repr(node[key]),
                    fix=f"Set MODEL.HEAD_ADAPT.{key} {choices[0]}.",
                )
        source: dict[str, ClassTable] = {}
        target: dict[str, ClassTable] = {}
        initialise: set[str] = set()
        for space in SPACES:
            key = f"SOURCE_CLASSES{KEY_SUFFIXES[space]}"
            value = node[key]
            if isinstance(value, str) and value.lower() == "none":
                initialise.add(space)
            else:
                table = resolve_table(value, key=f"MODEL.HEAD_ADAPT.{key}", space=space)
                if table is not None:
                    source[space] = table
            key = f"TARGET_CLASSES{KEY_SUFFIXES[space]}"
            table = resolve_table(node[key], key=f"MODEL.HEAD_ADAPT.{key}", space=space)
            if table is None:
                table = _training_table(cfg.DATASETS.TRAIN, space, registered_only)
            if table is not None:
                target[space] = table
        for name, named in source_tables(cfg).items():
            if named is None:
                initialise.add(name)
            else:
                source[name] = named
        target.update({spec.name: spec.table for spec in task_specs(cfg, registered_only=registered_only)})
        return cls(
            target,
            source,
            frozenset(initialise),
            tuple(str(alias) for alias in node.ALIASES),
            str(node.MATCH),
            float(node.MIN_COVERAGE),
            bool(node.TRUST_FILE),
            bool(node.VERIFY_FILE),
            str(node.RESUME),
            tuple(node.INCLUDE),
            tuple(node.EXCLUDE),
            tuple(node.RENAME),
            str(node.NEW_ROWS),
            str(node.TEXT.FILE),
            node.TEXT.NAMES,
        )


def _training_table(names: Sequence[str], space: str, registered_only: bool) -> ClassTable | None:
    try:
        return training_table(names, space) if len(names) else None
    except DatasetError:
        if registered_only:
            return None
        raise


def with_keys(cfg: CfgNode) -> CfgNode:
    """``cfg`` itself where it has this package's keys, else a clone that does."""
    if "HEAD_ADAPT" in cfg.MODEL:
        return cfg
    cfg = cfg.clone()
    frozen = cfg.is_frozen()
    cfg.defrost()
    add_headadapt_config(cfg)
    if frozen:
        cfg.freeze()
    return cfg


def apply_num_classes(cfg: CfgNode, target: Mapping[str, ClassTable]) -> list[str]:
    """Write the length of each target table under every key that this architecture reads, in place.

    Returns:
        One line per key that changed, such as ``MODEL.ROI_HEADS.NUM_CLASSES was 80, is 5, the classes of my_train``.
    """
    lines: list[str] = []
    for space, key in NUM_CLASSES_KEYS.get(cfg.MODEL.META_ARCHITECTURE, NUM_CLASSES_KEYS["PanopticFPN"]):
        *path, last = key.split(".")
        node: Any = cfg
        for name in path:
            node = node.get(name) if node is not None else None
        if node is None or last not in node or space not in target:
            continue
        if node[last] != len(target[space]):
            lines.append(f"{key} was {node[last]}, is {len(target[space])}, the classes of {target[space].origin}")
            node[last] = len(target[space])
    return lines


def attach_settings(model: nn.Module, settings: AdaptSettings) -> None:
    """Leave ``settings`` on ``model`` for the checkpointer, in place of any that a head inside it carries."""
    setattr(model, ATTRIBUTE, settings)


def settings_of(model: nn.Module) -> AdaptSettings | None:
    """The settings attached to ``model``, else to a module inside it."""
    for module in model.modules():
        found = getattr(module, ATTRIBUTE, None)
        if isinstance(found, AdaptSettings):
            return found
    return None
