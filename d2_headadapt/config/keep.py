"""Settings of ``MODEL.HEAD_ADAPT.KEEP`` as plain values: old classes, added ones, and how they meet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from detectron2.config import CfgNode

from ..adapt.classes import ClassTable
from ..data.datasets import training_table
from ..errors import ConfigError, DatasetError
from ..key import HEAD_ADAPT, Words
from .settings import with_keys

HEADS = ("shared", "copy")
DETECTIONS = ("append", "suppress")
PROPOSALS = ("auto", "on", "off")


@dataclass(frozen=True)
class PackSpec:
    """The classes that one session adds.

    Args:
        classes: their names, in the order of the branch's rows.
        head: ``shared`` reads the old box head's features; ``copy`` has a trainable copy of that head.

    Example:
        >>> from d2_headadapt import PackSpec
        >>> PackSpec(("rhino",), head="copy").to_plain()
        {'classes': ['rhino'], 'head': 'copy'}
    """

    classes: tuple[str, ...]
    head: str = "shared"

    def to_plain(self) -> dict[str, Any]:
        """Plain types, for a config and for a file."""
        return {"classes": list(self.classes), "head": self.head}

    @classmethod
    def from_plain(cls, data: Any, where: Words) -> PackSpec:
        """Read :meth:`to_plain`'s form.

        Args:
            data: as a file holds it.
            where: the file and place, for messages.

        Raises:
            ConfigError: it is another form.
        """
        good = isinstance(data, Mapping) and isinstance(data.get("classes"), (list, tuple)) and data["classes"]
        if not good or data.get("head", "shared") not in HEADS:
            raise ConfigError(
                where,
                expected="{classes: [names], head: shared or copy}",
                found=repr(data),
                fix=f"Leave {HEAD_ADAPT.KEEP_PACKS} out: it is written by this package.",
            )
        return cls(tuple(map(str, data["classes"])), str(data.get("head", "shared")))


@dataclass(frozen=True)
class KeepSettings:
    """Everything that a model needs to know to add classes behind its unmodified old path.

    Args:
        old: the classes that the base model predicts.
        packs: what was added, one entry a session, and what this session adds.
        labels: names of the training set's class indices, which may be new and old ones; empty for those of the last
            pack.
        detections: ``append`` puts new detections behind the old ones; ``suppress`` lets a new one of at least
            ``suppress_score`` hide the old ones that it overlaps by half.
        suppress_score: see ``detections``.
        proposals: second proposals: ``auto`` (where held-out recall rises by them), ``on`` or ``off``.
        negatives: a folder of images, or a registered dataset, without an object of a new class.

    Example:
        >>> from d2_headadapt import ClassTable, KeepSettings, PackSpec
        >>> settings = KeepSettings(ClassTable(["cat", "dog"]), (PackSpec(("rhino",)), PackSpec(("emu", "yak"))))
        >>> settings.table.names
        ('cat', 'dog', 'rhino', 'emu', 'yak')
    """

    old: ClassTable
    packs: tuple[PackSpec, ...]
    labels: tuple[str, ...] = ()
    detections: str = "append"
    suppress_score: float = 0.5
    proposals: str = "auto"
    negatives: str = ""

    def __post_init__(self) -> None:
        """Refuse what cannot work.

        Raises:
            ConfigError, ClassTableError: names the key, or the two classes of one name.
        """
        for key, value, choices in (
            ("KEEP_DETECTIONS", self.detections, DETECTIONS),
            ("KEEP_PROPOSALS", self.proposals, PROPOSALS),
            *(("KEEP_HEAD", pack.head, HEADS) for pack in self.packs),
        ):
            if value not in choices:
                raise ConfigError(
                    HEAD_ADAPT[key],
                    expected=f"one of {', '.join(choices)}",
                    found=repr(value),
                    fix=f"Set {HEAD_ADAPT[key].set(choices[0])}.",
                )
        if not 0 < self.suppress_score <= 1:
            raise ConfigError(
                HEAD_ADAPT.KEEP_SUPPRESS_SCORE,
                expected="a score above 0 and at most 1",
                found=repr(self.suppress_score),
                fix=f"Set {HEAD_ADAPT.KEEP_SUPPRESS_SCORE.set(0.5)}.",
            )
        if self.packs:
            self.table  # noqa: B018 (two classes of one name are refused here)

    @property
    def table(self) -> ClassTable:
        """Old names, then those of each pack: what a detection's class index means."""
        return ClassTable(
            [*self.old.names, *(name for pack in self.packs for name in pack.classes)],
            origin=f"{self.old.origin} and what was added to it",
        )

    @property
    def training_names(self) -> tuple[str, ...]:
        """Names of the training set's class indices."""
        return self.labels or (self.packs[-1].classes if self.packs else ())

    @property
    def trained(self) -> tuple[int, ...]:
        """The packs of which the training set labels a class."""
        names = set(self.training_names)
        return tuple(i for i, pack in enumerate(self.packs) if names & set(pack.classes))

    def lookup(self, pack: int) -> list[int]:
        """List for each class index of the training set its row in a pack; -1 for what is *other* to that pack."""
        rows = {name: row for row, name in enumerate(self.packs[pack].classes)}
        return [rows.get(name, -1) for name in self.training_names]

    @classmethod
    def from_config(cls, cfg: CfgNode) -> KeepSettings | None:
        """Read the ``KEEP`` keys of ``cfg.MODEL.HEAD_ADAPT``, once :mod:`d2_headadapt.setup` settled the classes.

        Args:
            cfg: any config.

        Args:
            cfg: a whole config.

        Returns:
            ``None`` where ``KEEP`` is empty.

        Raises:
            ConfigError: an unknown mode, or classes that nobody settled.
        """
        node = with_keys(cfg).MODEL.HEAD_ADAPT
        if not check_mode(node.KEEP):
            return None
        if not node.KEEP_PACKS or not isinstance(node.TARGET_CLASSES, (list, tuple)):
            raise ConfigError(
                HEAD_ADAPT.KEEP,
                expected="classes that are settled before the model is built",
                found="a config whose classes nobody settled",
                fix="Call resolve_config(cfg) of d2_headadapt.setup.yaml first, as setup(args) of "
                "d2_headadapt.engine.train does.",
            )
        packs = [PackSpec.from_plain(entry, HEAD_ADAPT.KEEP_PACKS) for entry in node.KEEP_PACKS]
        return cls(
            ClassTable([str(name) for name in node.TARGET_CLASSES], origin="the base model"),
            tuple(packs),
            _labels(cfg.DATASETS.TRAIN),
            str(node.KEEP_DETECTIONS),
            float(node.KEEP_SUPPRESS_SCORE),
            str(node.KEEP_PROPOSALS),
            str(node.KEEP_NEGATIVES),
        )


def _labels(datasets: Sequence[str]) -> tuple[str, ...]:
    try:
        table = training_table(datasets) if len(datasets) else None
    except DatasetError:  # Only predicted with: nobody has the training set.
        return ()
    return table.names if table is not None else ()


def check_mode(mode: Any) -> bool:
    """Tell whether ``KEEP`` asks for anything.

    Raises:
        ConfigError: a mode that does not exist.
    """
    if mode == "exact":
        return True
    if mode == "well":
        raise ConfigError(
            HEAD_ADAPT.KEEP,
            expected="exact, or nothing",
            found="'well' (one head whose old classes are watched), which this version does not have",
            fix=f"Set {HEAD_ADAPT.KEEP.set('exact')}.",
        )
    if mode:
        raise ConfigError(
            HEAD_ADAPT.KEEP,
            expected="exact, or nothing",
            found=repr(mode),
            fix=f"Set {HEAD_ADAPT.KEEP.set('exact')}.",
        )
    return False
