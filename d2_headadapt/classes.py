"""Class tables, and the map from one table to another.

``K`` is the number of classes of a table. Background is never in a table. A class *index* is a position in its table;
which tensor rows belong to it is the business of :mod:`d2_headadapt.layouts`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from .errors import ClassTableError

SPACES = ("thing", "stuff", "keypoint")
"""The label spaces that detectron2 itself has; every task adds one of its own name."""

KEY_SUFFIXES = {"thing": "", "stuff": "_STUFF", "keypoint": "_KEYPOINT"}
"""How the config keys of a label space end."""

_SEPARATORS = str.maketrans("-_", "  ")


def normalise(name: str) -> str:
    """Return ``name`` as it is compared when the exact spelling finds nothing.

    Case is folded, and runs of spaces, hyphens and underscores become one space: ``"Traffic-Light"`` is
    ``"traffic light"``.
    """
    return " ".join(name.translate(_SEPARATORS).casefold().split())


def nearest(name: str, names: Iterable[str], count: int = 3) -> list[str]:
    """Up to ``count`` of ``names`` that look like ``name``, best first; for error messages."""
    by_norm: dict[str, str] = {}
    for candidate in names:
        by_norm.setdefault(normalise(candidate), candidate)
    found = difflib.get_close_matches(normalise(name), by_norm, n=count, cutoff=0.5)
    return [by_norm[key] for key in found]


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """A sentence for the end of an error message, or an empty string where nothing is near."""
    found = nearest(name, names)
    return f" Nearest: {', '.join(repr(f) for f in found)}." if found else ""


@dataclass(frozen=True)
class ClassTable:
    """The ordered names that one head predicts, without background.

    Args:
        names: K distinct, non-empty strings.
        origin: where the names come from, for messages (``"coco_2017_train"``, ``"TARGET_CLASSES"``).

    Raises:
        ClassTableError: no names, a name that is no string or empty, or two names that normalise to the same.

    Example:
        >>> from d2_headadapt import ClassTable
        >>> table = ClassTable(["cat", "traffic light"])
        >>> len(table), table.find("Traffic-Light"), table.find("dog")
        (2, 1, None)
        >>> ClassTable(["cat", "Cat"])
        Traceback (most recent call last):
        d2_headadapt.errors.ClassTableError: a list: expected names that differ ..., found 'cat' and 'Cat'. Rename ...
    """

    names: tuple[str, ...]
    origin: str = field(default="a list", compare=False)

    def __init__(self, names: Iterable[str], origin: str = "a list") -> None:
        # A string is an iterable of strings: "cat" would be the classes c, a and t.
        if isinstance(names, str):
            raise ClassTableError(
                origin, expected="a list of names", found=repr(names), fix=f"For one class, write [{names!r}]."
            )
        names = tuple(names)
        _check_names(names, origin)
        object.__setattr__(self, "names", names)
        object.__setattr__(self, "origin", origin)

    def __len__(self) -> int:
        return len(self.names)

    def __repr__(self) -> str:
        return f"ClassTable({len(self)} classes of {self.origin}: {shorten(self.names)})"

    @cached_property
    def index(self) -> Mapping[str, int]:
        """Exact name -> class index."""
        return {name: i for i, name in enumerate(self.names)}

    @cached_property
    def normalised_index(self) -> Mapping[str, int]:
        """Normalised name -> class index; unique, because the constructor refuses collisions."""
        return {normalise(name): i for i, name in enumerate(self.names)}

    def find(self, name: str) -> int | None:
        """The index of ``name``, spelled exactly or up to normalisation; ``None`` where it is not."""
        i = self.index.get(name)
        return self.normalised_index.get(normalise(name)) if i is None else i


def shorten(names: Sequence[str], most: int = 6) -> str:
    """``names`` as one short line: the first few and how many more there are."""
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown}, ... ({len(names) - most} more)"


def _check_names(names: tuple[str, ...], origin: str) -> None:
    if not names:
        raise ClassTableError(
            origin, expected="at least one class name", found="none", fix="List the classes in their order."
        )
    seen: dict[str, str] = {}
    for position, name in enumerate(names):
        if not isinstance(name, str):
            raise ClassTableError(
                f"{origin}, class {position}",
                expected="a string",
                found=f"{name!r} ({type(name).__name__})",
                fix=f"Put it in quotes: '{name}'.",
            )
        key = normalise(name)
        if not key:
            raise ClassTableError(
                f"{origin}, class {position}", expected="a name", found=repr(name), fix="Give the class a name."
            )
        if key in seen:
            raise ClassTableError(
                origin,
                expected="names that differ after case, spaces, hyphens and underscores are normalised",
                found=f"{seen[key]!r} and {name!r}" if seen[key] != name else f"{name!r} twice",
                fix="Rename or remove one of the two.",
            )
        seen[key] = name


@dataclass(frozen=True)
class ClassMap:
    """For each target class, the source class whose weights it takes, or ``None``.

    Args:
        source: the table that the weights were trained on.
        target: the table that the model predicts.
        rows: K_target entries; ``rows[t]`` is a source class index or ``None`` where target class ``t`` is new.

    Example:
        >>> from d2_headadapt import ClassMap, ClassTable
        >>> found = ClassMap(ClassTable(["ant", "bee", "cat"]), ClassTable(["cat", "gnu"]), (2, None))
        >>> found.carried, found.new, found.dropped
        (((0, 2),), (1,), (0, 1))
    """

    source: ClassTable
    target: ClassTable
    rows: tuple[int | None, ...]

    @property
    def carried(self) -> tuple[tuple[int, int], ...]:
        """``(target class, source class)`` pairs, in target order."""
        return tuple((t, s) for t, s in enumerate(self.rows) if s is not None)

    @property
    def new(self) -> tuple[int, ...]:
        """Target classes without a source."""
        return tuple(t for t, s in enumerate(self.rows) if s is None)

    @property
    def dropped(self) -> tuple[int, ...]:
        """Source classes that no target class takes."""
        used = {s for s in self.rows if s is not None}
        return tuple(s for s in range(len(self.source)) if s not in used)

    @property
    def shared(self) -> tuple[int, ...]:
        """Source classes that feed more than one target class."""
        seen: set[int] = set()
        twice: set[int] = set()
        for s in self.rows:
            if s is not None:
                (twice if s in seen else seen).add(s)
        return tuple(sorted(twice))

    @property
    def is_identity(self) -> bool:
        """Every class keeps its index, none is new and none is dropped."""
        return len(self.source) == len(self.target) and all(t == s for t, s in enumerate(self.rows))


Synonyms = Mapping[str, Sequence[str]]
"""Name of a class in some vocabulary -> other names of the same class."""


def match_classes(
    target: ClassTable,
    source: ClassTable,
    *,
    aliases: Sequence[str] = (),
    match: str = "name",
    source_synonyms: Synonyms | None = None,
    target_synonyms: Synonyms | None = None,
    reviewed: Sequence[tuple[str, str]] = (),
) -> ClassMap:
    """Map ``target`` onto ``source``.

    A target class takes the source class that one of these finds, in this order: the user's own aliases, the exact
    name, the normalised name, a reviewed spelling pair, a synonym of the source class, a synonym of the target class.

    Args:
        target, source: the tables.
        aliases: ``"target=source"`` strings of the user; both sides must exist.
        match: ``"name"``, or ``"position"`` for class i onto class i.
        source_synonyms, target_synonyms: other names of the classes of a table's vocabulary.
        reviewed: unordered pairs of names that mean the same class in two vocabularies.

    Returns:
        ClassMap: one source may feed several targets (see :attr:`ClassMap.shared`).

    Raises:
        ClassTableError: an alias that names no class of its table, two aliases for one target, two source classes
            that reviewed pairs or synonyms find for one target, or an unknown ``match``.

    Example:
        >>> from d2_headadapt import ClassTable, match_classes, vocabulary
        >>> mine = ClassTable(["Traffic-Light", "lorry", "gnu"])
        >>> match_classes(mine, vocabulary("coco"), aliases=["lorry=truck"]).rows
        (9, 7, None)
    """
    if match == "position":
        if aliases:
            raise ClassTableError(
                "MODEL.HEAD_ADAPT.ALIASES",
                expected="no aliases, because MATCH is 'position'",
                found=shorten(list(aliases)),
                fix="Set MODEL.HEAD_ADAPT.MATCH name, or remove the aliases.",
            )
        return ClassMap(source, target, tuple(t if t < len(source) else None for t in range(len(target))))
    if match != "name":
        raise ClassTableError(
            "MODEL.HEAD_ADAPT.MATCH",
            expected="'name' or 'position'",
            found=repr(match),
            fix="Set MODEL.HEAD_ADAPT.MATCH name.",
        )
    own = parse_aliases(aliases, target, source)
    partners = _partners(reviewed)
    synonym_owners = _synonym_owners(source, source_synonyms or {})
    rows: list[int | None] = []
    for t, name in enumerate(target.names):
        s = own[t] if t in own else source.find(name)
        if s is None:
            s = _by_other_names(name, target, source, partners.get(normalise(name), ()))
        if s is None:
            s = _by_synonym(name, target, source, synonym_owners)
        if s is None:
            s = _by_other_names(name, target, source, (target_synonyms or {}).get(name, ()))
        rows.append(s)
    return ClassMap(source, target, tuple(rows))


def parse_aliases(aliases: Sequence[str], target: ClassTable, source: ClassTable) -> dict[int, int]:
    """``"target=source"`` strings as class indices, checked against both tables."""
    found: dict[int, int] = {}
    for alias in aliases:
        where = f"MODEL.HEAD_ADAPT.ALIASES, {alias!r}"
        left, equals, right = str(alias).partition("=")
        if not equals or not left.strip() or not right.strip():
            raise ClassTableError(
                where, expected="'target=source'", found=repr(alias), fix="Write it like 'lorry=truck'."
            )
        t = _known(left.strip(), target, where, "target")
        s = _known(right.strip(), source, where, "source")
        if found.get(t, s) != s:
            raise ClassTableError(
                where,
                expected=f"one source class for {target.names[t]!r}",
                found=f"{source.names[found[t]]!r} and {source.names[s]!r}",
                fix="Keep one of the two aliases.",
            )
        found[t] = s
    return found


def _known(name: str, table: ClassTable, where: str, side: str) -> int:
    i = table.find(name)
    if i is None:
        raise ClassTableError(
            where,
            expected=f"a class of the {side} table ({len(table)} classes of {table.origin})",
            found=repr(name),
            fix=f"Use one of its names ({shorten(table.names)}), or remove the alias.{did_you_mean(name, table.names)}",
        )
    return i


def _partners(reviewed: Sequence[tuple[str, str]]) -> dict[str, list[str]]:
    partners: dict[str, list[str]] = {}
    for a, b in reviewed:
        partners.setdefault(normalise(a), []).append(b)
        partners.setdefault(normalise(b), []).append(a)
    return partners


def _synonym_owners(table: ClassTable, synonyms: Synonyms) -> dict[str, list[int]]:
    owners: dict[str, list[int]] = {}
    for i, name in enumerate(table.names):
        for other in synonyms.get(name, ()):
            holders = owners.setdefault(normalise(other), [])
            if i not in holders:
                holders.append(i)
    return owners


def _by_synonym(name: str, target: ClassTable, source: ClassTable, owners: Mapping[str, list[int]]) -> int | None:
    holders = owners.get(normalise(name), [])
    if len(holders) > 1:
        names = [source.names[i] for i in holders]
        raise ClassTableError(
            f"class {name!r} of {target.origin}",
            expected="one class with that synonym",
            found=f"it is a synonym of {' and of '.join(repr(n) for n in names)} in {source.origin}",
            fix=f"Choose: MODEL.HEAD_ADAPT.ALIASES \"['{name}={names[0]}']\".",
        )
    return holders[0] if holders else None


def _by_other_names(name: str, target: ClassTable, source: ClassTable, others: Iterable[str]) -> int | None:
    found = sorted({s for s in map(source.find, others) if s is not None})
    if len(found) > 1:
        names = [source.names[s] for s in found]
        raise ClassTableError(
            f"class {name!r} of {target.origin}",
            expected="one source class with another name of it",
            found=f"{' and '.join(repr(n) for n in names)} in {source.origin}",
            fix=f"Choose: MODEL.HEAD_ADAPT.ALIASES \"['{name}={names[0]}']\".",
        )
    return found[0] if found else None
