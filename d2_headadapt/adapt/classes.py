"""Class tables, and the map from one table to another.

``K`` is the number of classes of a table. Background is never in a table. A class *index* is a position in its table;
which tensor rows belong to it is the business of :mod:`d2_headadapt.adapt.layouts`.
"""

from __future__ import annotations

import difflib
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from numbers import Integral

from ..errors import ClassTableError, visible

SPACES = ("thing", "stuff", "keypoint")
"""The label spaces that detectron2 itself has; every task adds one of its own name."""

KEY_SUFFIXES = {"thing": "", "stuff": "_STUFF", "keypoint": "_KEYPOINT"}
"""How the config keys of a label space end."""

_UNNAMED = "unnamed row"

_SEPARATORS = str.maketrans("-_", "  ")


def normalise(name: str) -> str:
    """Return ``name`` as it is compared when the exact spelling finds nothing; empty where nothing of it is left.

    Case is folded, Unicode's compatible spellings (NFKC) become one, characters without width go, and runs of spaces,
    hyphens and underscores become one space: ``"Traffic-Light"`` is ``"traffic light"``.
    """
    if not name.isascii():
        # Folding may undo what composing did, so composing comes last too.
        name = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", name).casefold())
        name = "".join(c for c in name if unicodedata.category(c) != "Cf")
    return " ".join(name.translate(_SEPARATORS).casefold().split())


def is_unnamed(name: str) -> bool:
    """Whether a name only says which row of a head has none, see :meth:`ClassTable.padded`."""
    start, _, number = name.rpartition(" ")
    return start == _UNNAMED and number.isdecimal()


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
        names: K distinct, non-empty strings; a whole number stands for its digits.
        origin: where the names come from, for messages (``"coco_2017_train"``, ``"TARGET_CLASSES"``).

    Raises:
        ClassTableError: no names, a name that is no string or empty, or a name twice.

    Example:
        >>> from d2_headadapt import ClassTable
        >>> table = ClassTable(["cat", "traffic light"])
        >>> len(table), table.find("Traffic-Light"), table.find("dog")
        (2, 1, None)
        >>> ClassTable(["A", "a"]).find("a"), ClassTable(["cat", "Cat"]).find("CAT")
        (1, None)
    """

    names: tuple[str, ...]
    origin: str = field(default="a list", compare=False)

    def __init__(self, names: Iterable[str], origin: str = "a list") -> None:
        # A string is an iterable of strings: "cat" would be the classes c, a and t.
        if isinstance(names, str):
            raise ClassTableError(
                origin, expected="a list of names", found=repr(names), fix=f"For one class, write [{names!r}]."
            )
        names = tuple(str(n) if isinstance(n, Integral) and not isinstance(n, bool) else n for n in names)
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
        """Normalised name -> class index, as far as one class alone has it."""
        found: dict[str, list[int]] = {}
        for i, name in enumerate(self.names):
            found.setdefault(normalise(name), []).append(i)
        return {key: owners[0] for key, owners in found.items() if key and len(owners) == 1}

    @property
    def named(self) -> tuple[str, ...]:
        """The names but those of :meth:`padded`."""
        return tuple(name for name in self.names if not is_unnamed(name))

    def padded(self, count: int) -> ClassTable:
        """Make the table of a head of ``count`` classes, of which the first have these names and the rest have none.

        Example:
            >>> from d2_headadapt import ClassTable
            >>> table = ClassTable(["ant", "bee"]).padded(3)
            >>> table.names, table.named
            (('ant', 'bee', 'unnamed row 2'), ('ant', 'bee'))
        """
        return ClassTable((*self.names, *(f"{_UNNAMED} {i}" for i in range(len(self), count))), self.origin)

    def find(self, name: str) -> int | None:
        """Find the index of ``name``: exactly, else up to normalisation where that is one class; else ``None``."""
        i = self.index.get(name)
        return self.normalised_index.get(normalise(name)) if i is None else i


def shorten(names: Sequence[str], most: int = 6) -> str:
    """``names`` as one short line: the first few and how many more there are."""
    shown = ", ".join(map(visible, names[:most]))
    return shown if len(names) <= most else f"{shown}, ... ({len(names) - most} more)"


def _check_names(names: tuple[str, ...], origin: str) -> None:
    if not names:
        raise ClassTableError(
            origin, expected="at least one class name", found="none", fix="List the classes in their order."
        )
    seen: set[str] = set()
    for position, name in enumerate(names):
        if not isinstance(name, str):
            raise ClassTableError(
                f"{origin}, class {position}",
                expected="a string",
                found=f"{name!r} ({type(name).__name__})",
                fix=f"Put it in quotes: '{name}'.",
            )
        if not name.strip():
            raise ClassTableError(
                f"{origin}, class {position}", expected="a name", found=repr(name), fix="Give the class a name."
            )
        if name in seen:
            raise ClassTableError(
                origin, expected="different names", found=f"{name!r} twice", fix="Rename or remove one of the two."
            )
        seen.add(name)


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
        """Every class keeps its index, none is new and none is dropped; names may differ."""
        return len(self.source) == len(self.target) and all(t == s for t, s in enumerate(self.rows))

    @property
    def is_same(self) -> bool:
        """Both tables have the same names in the same order, and every class keeps its rows."""
        return self.is_identity and self.source.names == self.target.names
