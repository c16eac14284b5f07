"""New classes that may be dropped ones under another spelling: suggested, never matched."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import lru_cache

from .classes import ClassMap, normalise
from .vocabularies import known_names, other_words

LEAST_LETTERS = 5
"""Shorter words are too near to each other: bear, boar, beard."""
LONG = 7
"""Words from here on may have two wrong letters."""
MOST_PAIRS = 4_000_000
"""More pairs of names are not compared: that takes seconds, and nobody reads so many suggestions."""
_WORD = re.compile(r"[^\W\d_]+")


class Likeness(str, Enum):
    """How two names are near."""

    SPELLING = "spelling"
    """The same letters but for spaces, or one typing error."""
    PLURAL = "plural"
    MEANING = "meaning"
    """A vocabulary of this package gives both names to one class, or people use the one for the other."""


@dataclass(frozen=True)
class NearName:
    """A new class beside a dropped one.

    Args:
        target: the new class's name.
        source: the dropped class's name.
        likeness: how they are near.
    """

    target: str
    source: str
    likeness: Likeness


@lru_cache(maxsize=16)
def near_names(found: ClassMap) -> tuple[NearName, ...]:
    """Return the new classes of a map that a dropped class may mean, in target order; at most one suggestion for each.

    Of more than :data:`MOST_PAIRS` pairs of names, none is suggested.

    Example:
        >>> from d2_headadapt import ClassTable, match_classes, vocabulary
        >>> found = match_classes(ClassTable(["persn", "chairs", "hound", "gnu"]), vocabulary("coco"))
        >>> [(one.target, one.source) for one in near_names(found)]
        [('persn', 'person'), ('chairs', 'chair'), ('hound', 'dog')]
    """
    new = [found.target.names[t] for t in found.new]
    if len(new) * len(found.dropped) > MOST_PAIRS:
        return ()
    dropped = _Dropped([found.source.names[s] for s in found.dropped])
    return tuple(near for name in new if (near := dropped.nearest(name)) is not None)


class _Dropped:
    """Dropped names, found by what a near name has in common with them; of several, the first of the table counts."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = names
        self._words: dict[str, int] = {}
        self._letters: dict[str, int] = {}
        self._singulars: dict[str, int] = {}
        self._but_one_word: dict[tuple[object, ...], list[int]] = {}
        for place, words in enumerate(map(normalise, names)):
            self._words.setdefault(words, place)
            self._letters.setdefault(words.replace(" ", ""), place)
            for singular in _singulars(words):
                self._singulars.setdefault(singular, place)
            for key in _but_one_word(words):
                self._but_one_word.setdefault(key, []).append(place)

    def nearest(self, name: str) -> NearName | None:
        """Take the nearest first: a plural is surer than a meaning, and a meaning than a typing error."""
        mine = normalise(name)
        singulars = _singulars(mine)
        places: list[tuple[Likeness, Iterable[int | None]]] = [
            (Likeness.SPELLING, [self._letters.get(mine.replace(" ", ""))]),
            (Likeness.PLURAL, [self._singulars.get(mine), *map(self._words.get, singulars)]),
            *((Likeness.MEANING, map(self._words.get, other_words(one))) for one in (mine, *singulars)),
            # A name that is a word of its own is no typing error: goat is no boat.
            (Likeness.SPELLING, () if mine in known_names() else self._typing_errors(mine)),
        ]
        for likeness, found in places:
            first = min((place for place in found if place is not None), default=None)
            if first is not None:
                return NearName(name, self.names[first], likeness)
        return None

    def _typing_errors(self, mine: str) -> Iterator[int]:
        for key in _but_one_word(mine):
            for place in self._but_one_word.get(key, ()):
                if is_typing_error(mine, normalise(self.names[place])):
                    yield place


def _but_one_word(name: str) -> Iterator[tuple[object, ...]]:
    """Leave out each word but its first letter: names with one typing error between them share one of these."""
    words = name.split()
    for i, word in enumerate(words):
        yield i, word[:1], *words[:i], None, *words[i + 1 :]


def _singulars(name: str) -> list[str]:
    """Return what a name may be the plural of, by its ending."""
    endings = (("ies", "y"), ("ves", "f"), ("ves", "fe"), ("es", ""), ("s", ""))
    return [name[: -len(end)] + to for end, to in endings if name.endswith(end) and len(name) > len(end) + 1]


def is_typing_error(a: str, b: str) -> bool:
    """Tell whether two names differ in one word of letters, by as few letters as its length allows.

    Numbers and single letters are never typing errors: ``type a`` and ``type b`` are two classes.

    Example:
        >>> is_typing_error("persn", "person"), is_typing_error("bycicle", "bicycle"), is_typing_error("beard", "bear")
        (True, True, False)
    """
    if abs(len(a) - len(b)) > 2:
        return False
    pairs = [(x, y) for x, y in zip(a.split(), b.split(), strict=False) if x != y]
    if len(a.split()) != len(b.split()) or len(pairs) != 1:
        return False
    x, y = sorted(pairs[0], key=len)
    if len(x) < LEAST_LETTERS or x[0] != y[0] or not _WORD.fullmatch(x) or not _WORD.fullmatch(y):
        return False
    replaced = len(x) == len(y) and sorted(x) != sorted(y)
    allowed = 2 if len(x) >= LONG else 1
    return not (replaced and len(x) == LEAST_LETTERS) and _distance(x, y) <= allowed


def _distance(a: str, b: str) -> int:
    """Count letters to leave out, add, replace or swap with their neighbour (optimal string alignment)."""
    before: list[int] = []
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        earlier, before, row = before, row, [i]
        for j, y in enumerate(b, 1):
            row.append(min(before[j] + 1, row[-1] + 1, before[j - 1] + (x != y)))
            if i > 1 and j > 1 and x == b[j - 2] and a[i - 2] == y:
                row[-1] = min(row[-1], earlier[j - 2] + 1)
    return row[-1]
