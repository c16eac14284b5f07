"""Choose which of the user's keys about source weights hold for the file at hand.

``SOURCE_CLASSES``, ``ALIASES``, ``MATCH``, ``INCLUDE``, ``EXCLUDE`` and ``RENAME`` describe the file that
``MODEL.WEIGHTS`` names. A file that this package wrote says itself what it predicts and which of these keys went into
it (:attr:`Provenance.applied`), and stands in for that file from then on: in a resume, an evaluation, a prediction.
Applied once more, the same keys would drop what was trained since, or name classes that are no longer there.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

from ..adapt.classes import ClassTable
from ..adapt.matching import alias_sides
from ..adapt.planner import source_key
from ..config.settings import AdaptSettings
from ..errors import PlanRefused
from ..key import HEAD_ADAPT, MODEL, Key
from .provenance import Provenance

PATTERNS = ("include", "exclude", "rename")


class Unused(str, Enum):
    """The reason why a key is not used."""

    APPLIED = "applied"
    """It went into the file already."""
    OTHER_FILE = "other_file"
    """It is about the file of MODEL.WEIGHTS, and this one says its own classes."""
    FILE_SAYS = "file_says"
    """The file names its own classes, and they are others."""
    NO_SUCH_CLASS = "no_such_class"
    """An alias whose source class the file lacks, while it has the target class itself."""


@dataclass(frozen=True)
class UnusedKey:
    """A key that is set and not used.

    Args:
        key: which one.
        cause: why.
        value: what of it, in plain types.
    """

    key: Key
    cause: Unused
    value: Any = None

    def sentence(self) -> str:
        """Say it in one line."""
        what = {
            Unused.APPLIED: "went into this file already, and is not applied again",
            Unused.OTHER_FILE: f"is about {MODEL.WEIGHTS!s}, and this file says its own classes: not applied",
            Unused.FILE_SAYS: "names other classes than the file itself does: the file is right",
            Unused.NO_SUCH_CLASS: "names a class that this file no longer has, because the rows were moved already",
        }[self.cause]
        value = f" ({self.value})" if self.cause is Unused.FILE_SAYS else f" {self.value!r}"
        return f"{self.key!s}{value} {what}."


def keys_for(
    settings: AdaptSettings, known: Provenance, path: str, *, own: bool = False
) -> tuple[AdaptSettings, tuple[UnusedKey, ...]]:
    """Choose the keys that hold for a file.

    Where the file says nothing of itself, all of them hold, unless it is the run's own and not the one that they are
    about. Else what it says decides; of the keys, those hold that did not go into it already and that are about it.

    Args:
        settings: what the user wants; ``settings.weights`` is the file that the keys are about, empty where they are
            about whatever is loaded.
        known: what the file says of itself.
        path: the file, as it was given.
        own: it is the last checkpoint of the run that is resumed.

    Returns:
        The settings to load with, and what is not used.

    Raises:
        PlanRefused: ``MATCH`` is ``position``, and the file names its own classes in another order.
    """
    named = bool(settings.weights) and _same_file(path, settings.weights)
    if not known.says_classes:
        bare = replace(settings, source={}, initialise=frozenset(), include=(), exclude=(), rename=(), aliases=())
        return (replace(bare, match="name"), ()) if own and not named else (settings, ())
    about = not own and (named or not settings.weights)
    unused: list[UnusedKey] = []
    changes: dict[str, Any] = {}
    for name in PATTERNS:
        values: tuple[str, ...] = getattr(settings, name)
        applied = list(values) == list(known.applied.get(name, ()))
        if values and (applied or not about):
            changes[name] = ()
            cause = Unused.APPLIED if applied else Unused.OTHER_FILE
            unused.append(UnusedKey(HEAD_ADAPT[name.upper()], cause, list(values)))
    forced = settings.initialise & set(known.tables)
    for space in sorted(forced):
        if not about or space in known.applied.get("initialise", ()):
            unused.append(UnusedKey(source_key(space), Unused.APPLIED if about else Unused.OTHER_FILE, "none"))
            changes["initialise"] = changes.get("initialise", settings.initialise) - {space}
    changes["source"] = _sources(settings, known, about, unused)
    changes["aliases"] = _aliases(settings, known, about, unused)
    if settings.match == "position":
        applied = known.applied.get("match") == "position"
        if about and not applied:
            _refuse_position(settings, known, path)
        unused.append(UnusedKey(HEAD_ADAPT.MATCH, Unused.APPLIED if applied else Unused.OTHER_FILE, "position"))
        changes["match"] = "name"
    elif settings.match == "position_over_names":
        changes["match"] = "position" if about and known.applied.get("match") != settings.match else "name"
    return replace(settings, **changes), tuple(unused)


def _sources(settings: AdaptSettings, known: Provenance, about: bool, unused: list[UnusedKey]) -> dict[str, ClassTable]:
    """Take the tables that the user names, less those that the file knows itself."""
    kept: dict[str, ClassTable] = {}
    for space, table in settings.source.items():
        stated = known.tables.get(space)
        if stated is None or (space in known.assumed and about):
            kept[space] = table
        elif about and stated != table and list(table.names) != list(known.applied.get("source", {}).get(space, ())):
            unused.append(
                UnusedKey(source_key(space), Unused.FILE_SAYS, f"{len(table)} classes, {len(stated)} in the file")
            )
    return kept


def _aliases(settings: AdaptSettings, known: Provenance, about: bool, unused: list[UnusedKey]) -> tuple[str, ...]:
    kept: list[str] = []
    for alias in settings.aliases:
        tables = known.tables.values()
        sides = alias_sides(alias) or [("", "")]
        target, source = next((p for p in sides if any(t.find(n) is not None for t in tables for n in p)), sides[0])
        moved = any(t.find(target) is not None for t in tables) and not any(t.find(source) is not None for t in tables)
        if alias in known.applied.get("aliases", ()):
            unused.append(UnusedKey(HEAD_ADAPT.ALIASES, Unused.APPLIED, alias))
        elif moved:
            unused.append(UnusedKey(HEAD_ADAPT.ALIASES, Unused.NO_SUCH_CLASS, alias))
        elif about or any(t.find(source) is not None for t in tables):
            kept.append(alias)
        else:
            unused.append(UnusedKey(HEAD_ADAPT.ALIASES, Unused.OTHER_FILE, alias))
    return tuple(kept)


def _refuse_position(settings: AdaptSettings, known: Provenance, path: str) -> None:
    """Raise where position would give a class the rows of another, which the file names."""
    for space, target in settings.target.items():
        source = known.tables.get(space)
        pairs = zip(source.names, target.names, strict=False) if source is not None else ()
        for k, (theirs, mine) in enumerate(pairs):
            if theirs != mine:
                raise PlanRefused(
                    HEAD_ADAPT.MATCH,
                    expected="name, because the file names its own classes",
                    found=f"position, which gives class {k} {mine!r} the rows of {theirs!r} of {path}",
                    fix=f"Set {HEAD_ADAPT.MATCH.set('name')}. Where the names in the file are wrong, set "
                    f"{HEAD_ADAPT.MATCH.set('position_over_names')}.",
                )


def _same_file(path: str, other: str) -> bool:
    """Tell whether two addresses name one file; a query at the end does not count."""
    a, b = (name.partition("?")[0] for name in (path, other))
    return a == b or ("://" not in a + b and os.path.realpath(a) == os.path.realpath(b))


def applied_keys(settings: AdaptSettings, known: Provenance) -> Mapping[str, Any]:
    """List the keys that went into a file saved now: those of this run, and those of the file that it started from.

    Args:
        settings: of this run, as the user gave them.
        known: of the file that was loaded.
    """
    was = known.applied
    found: dict[str, Any] = {
        name: list(getattr(settings, name)) or list(was.get(name, ())) for name in (*PATTERNS, "aliases")
    }
    found["aliases"] = list(dict.fromkeys([*was.get("aliases", ()), *settings.aliases]))
    found["initialise"] = sorted(settings.initialise | set(was.get("initialise", ())))
    found["source"] = {**was.get("source", {}), **{space: list(t.names) for space, t in settings.source.items()}}
    found["match"] = settings.match if settings.match != "name" else was.get("match", "")
    return {name: value for name, value in found.items() if value}
