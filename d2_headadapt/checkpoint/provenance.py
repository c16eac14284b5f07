"""Provenance of a checkpoint: its class tables and layouts, under the key ``d2_headadapt`` beside ``model``.

Plain types only, because a numpy scalar or a dataclass would make weights-only loading fail. Stock detectron2 passes
unknown top-level keys through.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from detectron2.utils.file_io import PathManager

from ..adapt.classes import ClassTable
from ..adapt.layouts import HeadLayout
from ..errors import CheckpointFileError
from ..files import read_checkpoint
from ..key import HEAD_ADAPT

KEY = "d2_headadapt"
VERSION = 1
UNTRAINED_ROWS = "untrained_rows"
"""Key of ``extra``: names of the classes without a trained row, by tensor."""


@dataclass(frozen=True)
class Provenance:
    """The class tables, layouts and other facts that a file says about itself.

    Args:
        tables: class tables by label space.
        layouts: of its head tensors.
        optimizer: parameter names of each optimizer group, in the optimizer's order.
        untrained: classes by label space of which some row was neither carried, fitted nor trained.
        applied: the keys about source weights that went into the file, by name; plain types.
        assumed: label spaces whose table nobody verified: rows were copied by shape from a file without names.
        extra: everything else, kept as it was found.
    """

    tables: Mapping[str, ClassTable] = field(default_factory=dict)
    layouts: tuple[HeadLayout, ...] = ()
    optimizer: tuple[tuple[str, ...], ...] = ()
    untrained: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    applied: Mapping[str, Any] = field(default_factory=dict)
    assumed: tuple[str, ...] = ()
    extra: Mapping[str, Any] = field(default_factory=dict)

    @property
    def says_classes(self) -> bool:
        """Whether the file says of itself what it predicts, or what went into it."""
        return bool(self.tables or self.layouts or self.applied)

    def renamed(self, names: Mapping[str, str]) -> Provenance:
        """Return the same with tensors under other names; those that ``names`` does not hold keep theirs."""
        rows = self.extra.get(UNTRAINED_ROWS)
        extra = dict(self.extra)
        if isinstance(rows, Mapping):
            extra[UNTRAINED_ROWS] = {names.get(tensor, tensor): classes for tensor, classes in rows.items()}
        return replace(
            self,
            layouts=tuple(replace(x, tensor=names.get(x.tensor, x.tensor)) for x in self.layouts),
            optimizer=tuple(tuple(names.get(name, name) for name in group) for group in self.optimizer),
            extra=extra,
        )

    def to_plain(self) -> dict[str, Any]:
        """Write the form that goes into a file."""
        extra = {key: value for key, value in self.extra.items() if key not in ("untrained", "applied", "assumed")}
        if self.untrained:
            extra["untrained"] = {space: list(names) for space, names in self.untrained.items()}
        if self.applied:
            extra["applied"] = dict(self.applied)
        if self.assumed:
            extra["assumed"] = list(self.assumed)
        return {
            "version": VERSION,
            "tables": {space: list(table.names) for space, table in self.tables.items()},
            "layouts": [layout.to_json() for layout in self.layouts],
            "optimizer": [list(names) for names in self.optimizer],
            "extra": extra,
        }

    @classmethod
    def from_plain(cls, data: Any, path: str) -> Provenance:
        """Read :meth:`to_plain`'s form; keys that this version does not know stay in ``extra``.

        Raises:
            CheckpointFileError: of a higher version, or damaged.
        """
        where = f"{path}, entry {KEY!r}"
        if not isinstance(data, Mapping) or not isinstance(data.get("version"), int):
            raise CheckpointFileError(
                where,
                expected="a mapping with a version",
                found=type(data).__name__,
                fix="The file was written by another program; remove that entry, and name its classes with "
                f"{HEAD_ADAPT.SOURCE_CLASSES}.",
            )
        if data["version"] > VERSION:
            raise CheckpointFileError(
                where,
                expected=f"version {VERSION} or lower",
                found=f"version {data['version']}",
                fix="Upgrade: pip install -U d2_headadapt.",
            )
        try:
            extra = dict(data.get("extra") or {})
            untrained = {str(s): tuple(map(str, names)) for s, names in (extra.pop("untrained", None) or {}).items()}
            applied = dict(extra.pop("applied", None) or {})
            assumed = tuple(map(str, extra.pop("assumed", None) or ()))
            known = {"version", "tables", "layouts", "optimizer", "extra"}
            extra.update({key: value for key, value in data.items() if key not in known})
            return cls(
                {str(s): ClassTable(names, f"{path}") for s, names in (data.get("tables") or {}).items()},
                tuple(HeadLayout.from_json(layout) for layout in data.get("layouts") or ()),
                tuple(tuple(map(str, group)) for group in data.get("optimizer") or ()),
                untrained,
                applied,
                assumed,
                extra,
            )
        except (AttributeError, TypeError, ValueError) as exc:
            raise CheckpointFileError(
                where,
                expected="class tables and layouts",
                found=str(exc),
                fix="The entry is damaged; use another checkpoint of this run.",
            ) from exc


def provenance_of(path: str, trust: bool) -> Provenance:
    """Read what a checkpoint says about itself; empty where it says nothing."""
    local = PathManager.get_local_path(path.partition("?")[0])
    stored = read_checkpoint(local, trust=trust, verify=False).get(KEY)
    return Provenance() if stored is None else Provenance.from_plain(stored, path)


def optimizer_names(optimizer: Any, named: Mapping[str, Any]) -> tuple[tuple[str, ...], ...]:
    """List the parameter names of each group, in the optimizer's own order, by identity.

    Args:
        optimizer: a torch optimizer.
        named: name -> parameter of the model.
    """
    names = {id(parameter): name for name, parameter in named.items()}
    groups: Sequence[Mapping[str, Any]] = optimizer.param_groups
    return tuple(tuple(names.get(id(p), "") for p in group["params"]) for group in groups)
