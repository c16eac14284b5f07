"""Which class of one table is which of another: by name, spelling, synonym, alias or position."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from ..errors import ClassTableError
from ..key import HEAD_ADAPT
from .classes import ClassMap, ClassTable, did_you_mean, normalise, shorten

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
    Of classes that one table tells apart by nothing but spelling (``A`` and ``a``), only the exact name counts.

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
                HEAD_ADAPT.ALIASES,
                expected="no aliases, because MATCH is 'position'",
                found=shorten(list(aliases)),
                fix=f"Set {HEAD_ADAPT.MATCH.set('name')}, or remove the aliases.",
            )
        return ClassMap(source, target, tuple(t if t < len(source) else None for t in range(len(target))))
    if match != "name":
        raise ClassTableError(
            HEAD_ADAPT.MATCH,
            expected="'name' or 'position'",
            found=repr(match),
            fix=f"Set {HEAD_ADAPT.MATCH.set('name')}.",
        )
    own = parse_aliases(aliases, target, source)
    partners = _partners(reviewed)
    synonym_owners = _synonym_owners(source, source_synonyms or {})
    rows: list[int | None] = []
    for t, name in enumerate(target.names):
        s = own[t] if t in own else source.index.get(name)
        if s is None and target.normalised_index.get(normalise(name)) != t:
            rows.append(None)
            continue
        if s is None:
            s = source.find(name)
        if s is None:
            s = _by_other_names(name, target, source, partners.get(normalise(name), ()))
        if s is None:
            s = _by_synonym(name, target, source, synonym_owners)
        if s is None:
            s = _by_other_names(name, target, source, (target_synonyms or {}).get(name, ()))
        rows.append(s)
    return ClassMap(source, target, tuple(rows))


def parse_aliases(aliases: Sequence[str], target: ClassTable, source: ClassTable) -> dict[int, int]:
    """Read ``"target=source"`` strings as class indices, checked against both tables."""
    found: dict[int, int] = {}
    for alias in aliases:
        where = f"{HEAD_ADAPT.ALIASES}, {alias!r}"
        sides = alias_sides(alias)
        fitting = [(a, b) for a, b in sides if target.find(a) is not None and source.find(b) is not None]
        if not sides or len(fitting) > 1:
            raise ClassTableError(
                where,
                expected="'target=source'" if not sides else "one way to part it at '='",
                found=repr(alias) if not sides else " and ".join(f"{a!r} from {b!r}" for a, b in fitting),
                fix="Write it like 'lorry=truck'." if not sides else "Rename one of these classes.",
            )
        left, right = fitting[0] if fitting else sides[0]
        t = _known(left, target, where, "target")
        s = _known(right, source, where, "source")
        if found.get(t, s) != s:
            raise ClassTableError(
                where,
                expected=f"one source class for {target.names[t]!r}",
                found=f"{source.names[found[t]]!r} and {source.names[s]!r}",
                fix="Keep one of the two aliases.",
            )
        found[t] = s
    return found


def alias_sides(alias: str) -> list[tuple[str, str]]:
    """Split ``"target=source"`` in every way: names may hold ``=`` themselves, and then the tables decide."""
    parts = str(alias).split("=")
    pairs = [("=".join(parts[:i]).strip(), "=".join(parts[i:]).strip()) for i in range(1, len(parts))]
    return [(left, right) for left, right in pairs if left and right]


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
            fix=f"Choose: {HEAD_ADAPT.ALIASES.set([f'{name}={names[0]}'])}.",
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
            fix=f"Choose: {HEAD_ADAPT.ALIASES.set([f'{name}={names[0]}'])}.",
        )
    return found[0] if found else None
