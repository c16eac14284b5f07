"""Settings of an adaptation as plain values: attached to the model, so that any checkpointer finds them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from detectron2.config import CfgNode
from torch import nn

from ..adapt.classes import KEY_SUFFIXES, SPACES, ClassTable, did_you_mean
from ..adapt.detectron2_heads import CHOICES, declare_agnostic
from ..adapt.discovery import Discovery
from ..data.datasets import resolve_table, training_table
from ..data.task_spec import source_tables, task_specs
from ..errors import ConfigError, HeadAdaptError
from ..key import HEAD_ADAPT, MODEL, Key
from .keys import add_headadapt_config

logger = logging.getLogger(__name__)
Named = ClassTable | str | Sequence[str]
"""One class list, as people write it: a table, a list of names, or a dataset, vocabulary or file by its name."""
ATTRIBUTE = "head_adapt_settings"
DISCOVERY = "head_adapt_discovery"

NUM_CLASSES_KEYS: dict[str, tuple[tuple[str, Key], ...]] = {
    "GeneralizedRCNN": (
        ("thing", MODEL.ROI_HEADS.NUM_CLASSES),
        ("thing", MODEL.POINT_HEAD.NUM_CLASSES),
        ("keypoint", MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS),
    ),
    "ProposalNetwork": (),
    "RetinaNet": (("thing", MODEL.RETINANET.NUM_CLASSES),),
    "FCOS": (("thing", MODEL.FCOS.NUM_CLASSES),),
    "SemanticSegmentor": (
        ("stuff", MODEL.SEM_SEG_HEAD.NUM_CLASSES),
        ("stuff", MODEL.POINT_HEAD.NUM_CLASSES),
    ),
    "PanopticFPN": (
        ("thing", MODEL.ROI_HEADS.NUM_CLASSES),
        ("thing", MODEL.POINT_HEAD.NUM_CLASSES),
        ("keypoint", MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS),
        ("stuff", MODEL.SEM_SEG_HEAD.NUM_CLASSES),
    ),
    "PanopticDeepLab": (("stuff", MODEL.SEM_SEG_HEAD.NUM_CLASSES),),
    "MultiTaskClassifier": (),
}
"""The keys that each meta-architecture of detectron2 reads its class counts from."""


@dataclass(frozen=True)
class AdaptSettings:
    """The settings that a load needs to know beside the file and the model.

    Args:
        target: class tables that the model shall predict, by label space; what is absent is unknown.
        source: class tables of the file as the user names them.
        initialise: label spaces whose heads take nothing from the file.
        aliases, match: see :func:`d2_headadapt.adapt.matching.match_classes`.
        min_coverage: least share of the file's tensors that must find a place.
        trust_file: allow full pickle.
        verify_file: check the CRC of records that are taken.
        resume: ``"refuse"`` or ``"adapt"``, what a resume does when the class list changed.
        include, exclude, rename: see :mod:`d2_headadapt.checkpoint.keys`.
        new_rows: ``"recipe"``, or ``"nearest"``: see :mod:`d2_headadapt.modeling.text.nearest`.
        text_file, text_names: see :func:`d2_headadapt.modeling.text.bundle.read_bundle`.
        weights: the file that ``source``, ``aliases``, ``match``, ``include``, ``exclude`` and ``rename`` describe
            (``MODEL.WEIGHTS``); empty where they describe whatever is loaded. Another file that says its own classes
            is loaded without them, see :mod:`d2_headadapt.checkpoint.source_keys`.
        agnostic: the config keys that make boxes or masks serve all classes, as far as they are set; at one class no
            shape tells. See :func:`d2_headadapt.adapt.detectron2_heads.declare_agnostic`.
        yields: label spaces whose target table is a guess: the classes that a file names of itself win over it, where
            the model was built for them and ``source`` does not name them.
        as_stock: a file that gives the model little or nothing is loaded with a warning, as stock detectron2 does.
        unknown_heads: what happens to a class-sized tensor that no layout moves, where the classes changed:
            ``"refuse"``, ``"reinitialise"``, or ``"keep"`` the file's rows as they lie.

    Raises:
        ConfigError: tables that are none (:meth:`of` takes plain names), or an unknown choice.

    Example:
        >>> from d2_headadapt import AdaptSettings, ClassTable
        >>> AdaptSettings(target={"thing": ClassTable(["cat", "gnu"])}, min_coverage=0.9).resume
        'refuse'
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
    weights: str = ""
    agnostic: frozenset[Key] = frozenset()
    yields: frozenset[str] = frozenset()
    as_stock: bool = False
    unknown_heads: str = "refuse"

    def __post_init__(self) -> None:
        for name in ("target", "source"):
            value: Any = getattr(self, name)
            if not isinstance(value, Mapping) or not all(isinstance(table, ClassTable) for table in value.values()):
                raise ConfigError(
                    f"AdaptSettings, {name}",
                    expected="class tables by label space, such as {'thing': ClassTable(['cat', 'dog'])}",
                    found=repr(value),
                    fix="Plain names are taken by AdaptSettings.of(['cat', 'dog'], source='coco').",
                )
        for name, choices in (
            ("match", ("name", "position", "position_over_names")),
            ("resume", ("refuse", "adapt")),
            ("new_rows", ("recipe", "nearest")),
            ("unknown_heads", ("refuse", "reinitialise", "keep")),
        ):
            if getattr(self, name) not in choices:
                raise ConfigError(
                    HEAD_ADAPT[name.upper()],
                    expected=" or ".join(map(repr, choices)),
                    found=repr(getattr(self, name)),
                    fix=f"Set {HEAD_ADAPT[name.upper()].set(choices[0])}.",
                )

    @classmethod
    def of(
        cls,
        target: Named | Mapping[str, Named] | None = None,
        source: Named | Mapping[str, Named] | None = None,
        **more: Any,
    ) -> AdaptSettings:
        """Make settings from plain names.

        Args:
            target: what the model predicts: a list of names, or the name of a registered dataset, a vocabulary, or a
                .json or .txt file; for another label space than ``thing``, or several, a mapping such as
                ``{"thing": "coco", "colour": ["red", "blue"]}``. ``None`` where it is not known.
            source: what the file was trained on, in the same forms; ``"none"`` takes nothing of the head. ``None``
                asks the file.
            more: other fields of :class:`AdaptSettings`.

        Raises:
            ConfigError: no field of that name, or a value that cannot be used.
            ClassTableError, DatasetError: names that cannot be used.

        Example:
            >>> from d2_headadapt import AdaptSettings
            >>> settings = AdaptSettings.of(["lorry", "cat", "gnu"], source="coco", aliases=["lorry=truck"])
            >>> settings.target["thing"]
            ClassTable(3 classes of target: lorry, cat, gnu)
            >>> len(settings.source["thing"])
            80
        """
        unknown = sorted(set(more) - {f.name for f in fields(cls)})
        if unknown:
            raise ConfigError(
                "AdaptSettings",
                expected="the name of a field",
                found=repr(unknown[0]),
                fix=f"Correct it.{did_you_mean(unknown[0], [f.name for f in fields(cls)])}",
            )
        lists = {key: value for key, value in more.items() if isinstance(value, list)}
        more.update({key: tuple(value) for key, value in lists.items() if key != "text_names"})
        nothing = _by_space(source)
        initialise = {space for space, value in nothing.items() if isinstance(value, str) and value.lower() == "none"}
        return cls(
            {space: _named(value, "target", space) for space, value in _by_space(target).items()},
            {space: _named(value, "source", space) for space, value in nothing.items() if space not in initialise},
            **{**more, "initialise": frozenset(initialise | set(more.get("initialise", ())))},
        )

    @classmethod
    def from_config(cls, cfg: CfgNode, *, required: bool = False) -> AdaptSettings:
        """Read the keys under ``MODEL.HEAD_ADAPT`` and the classes of ``DATASETS.TRAIN``.

        Args:
            cfg: a config; where ``add_headadapt_config`` was not called, the defaults hold.
            required: raise for a training set that cannot tell its classes, or a task whose classes nobody tells,
                instead of leaving these classes unknown.

        Raises:
            ConfigError, ClassTableError, DatasetError: a key that cannot be used.
        """
        cfg = with_keys(cfg)
        node = cfg.MODEL.HEAD_ADAPT
        source: dict[str, ClassTable] = {}
        target: dict[str, ClassTable] = {}
        initialise: set[str] = set()
        for space in SPACES:
            key = f"SOURCE_CLASSES{KEY_SUFFIXES[space]}"
            value = node[key]
            if isinstance(value, str) and value.lower() == "none":
                initialise.add(space)
            else:
                table = resolve_table(value, key=HEAD_ADAPT[key], space=space)
                if table is not None:
                    source[space] = table
            key = f"TARGET_CLASSES{KEY_SUFFIXES[space]}"
            table = resolve_table(node[key], key=HEAD_ADAPT[key], space=space)
            if table is None:
                table = training_table(cfg.DATASETS.TRAIN, space, required=required)
            if table is not None:
                target[space] = table
        for name, named in source_tables(cfg).items():
            if named is None:
                initialise.add(name)
            else:
                source[name] = named
        target.update({spec.name: spec.table for spec in task_specs(cfg, required=required)})
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
            str(cfg.MODEL.WEIGHTS),
            frozenset(key for key in CHOICES.values() if key.of(cfg)),
            unknown_heads=str(node.UNKNOWN_HEADS),
        )


def _by_space(value: Named | Mapping[str, Named] | None) -> Mapping[str, Named]:
    return {} if value is None else value if isinstance(value, Mapping) else {"thing": value}


def _named(value: Named, key: str, space: str) -> ClassTable:
    table = value if isinstance(value, ClassTable) else resolve_table(value, key=Key(key), space=space)
    if table is None:
        raise ConfigError(
            f"{key}, {space!r}", expected="a class list", found="None", fix="Leave the label space out instead."
        )
    return table


def with_keys(cfg: CfgNode) -> CfgNode:
    """Return ``cfg`` itself where it has this package's keys, else a clone that does."""
    if "HEAD_ADAPT" in cfg.MODEL:
        return cfg
    cfg = cfg.clone()
    frozen = cfg.is_frozen()
    cfg.defrost()
    add_headadapt_config(cfg)
    if frozen:
        cfg.freeze()
    return cfg


def write_tables(cfg: CfgNode, target: Mapping[str, ClassTable]) -> None:
    """Write each target table under its key as a list of names, in place."""
    for space, table in target.items():
        if space in KEY_SUFFIXES:
            cfg.MODEL.HEAD_ADAPT[f"TARGET_CLASSES{KEY_SUFFIXES[space]}"] = list(table.names)
        else:
            cfg.MODEL.TASKS[space]["classes"] = list(table.names)


def apply_num_classes(cfg: CfgNode, target: Mapping[str, ClassTable]) -> list[str]:
    """Write the length of each target table under every key that this architecture reads, in place.

    Returns:
        One line per key that changed, such as ``MODEL.ROI_HEADS.NUM_CLASSES was 80, is 5, the classes of my_train``.
    """
    lines: list[str] = []
    for space, key in NUM_CLASSES_KEYS.get(cfg.MODEL.META_ARCHITECTURE, NUM_CLASSES_KEYS["PanopticFPN"]):
        count = key.of(cfg)
        if count is not None and space in target and count != len(target[space]):
            lines.append(f"{key!s} was {count}, is {len(target[space])}, the classes of {target[space].origin}")
            key.put(cfg, len(target[space]))
    return lines


def attach_settings(model: nn.Module, settings: AdaptSettings) -> None:
    """Leave ``settings`` on ``model`` for the checkpointer, in place of any that a head inside it carries.

    What only the config knows of a head's layout goes to the head.
    """
    setattr(model, ATTRIBUTE, settings)
    declare_agnostic(model, settings.agnostic)


def settings_of(model: nn.Module) -> AdaptSettings | None:
    """Find the settings attached to ``model``, else to a module inside it."""
    for module in model.modules():
        found = getattr(module, ATTRIBUTE, None)
        if isinstance(found, AdaptSettings):
            return found
    return None


def attach_discovery(model: nn.Module, discover: Callable[[], Discovery]) -> None:
    """Leave on ``model`` how to find out what its class counts size; asked by a load whose classes may differ.

    Args:
        model: as it was just built.
        discover: builds the same model at several class counts.
    """
    setattr(model, DISCOVERY, discover)


def discovery_of(model: nn.Module) -> Discovery | None:
    """Return what the class counts of ``model`` size; ``None`` where nobody knows how to build it again."""
    discover: Callable[[], Discovery] | None = getattr(model, DISCOVERY, None)
    if discover is None:
        return None
    try:
        return discover()
    except HeadAdaptError as exc:
        logger.info("Which tensors follow the class count was not found out by building: %s", exc)
        return None
