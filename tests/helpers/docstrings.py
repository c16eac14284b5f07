"""First lines of docstrings: the rule that tells a verb from other words."""

from __future__ import annotations

import re

NO_VERBS = frozenset(
    """
    a all also an and any as at because both but by each either every everything for from how if in it its like
    many more most neither no none nothing of on once one only or our so some stock that the their these this
    those to under what whatever when where whether which while who whoever whose why with without
    """.split()  # noqa: SIM905
)
"""Words that begin a noun phrase or a clause."""
AFTER_A_NOUN = frozenset(("of", "that", "which", "whose", "is", "are", "was", "were", "has", "have", "does"))
"""Words that follow a noun and hardly a verb: ``Name of`` begins a noun phrase, ``Name the`` a sentence."""
_OTHER_ENDINGS = re.compile(r"(?<!s)s$|ed$|ing$|tion$|ment$|ness$|ity$|ly$")
"""A third person, a participle, a noun or an adverb by its ending."""
LOOK_ALIKE = frozenset(("apply", "bring", "embed", "feed", "need"))
"""Verbs with such an ending."""

BEFORE_A_CLAUSE = frozenset(("ask", "say", "tell", "warn"))
"""Verbs that such a word may follow: ``Say that``, ``Warn of``."""


def is_imperative(line: str) -> bool:
    """Tell whether a first line begins with a verb that says what to do."""
    first, *rest = line.split()
    word = first.rstrip(".,:;").lower()
    if not re.fullmatch(r"[A-Z][a-z]+(-[a-z]+)?", first.rstrip(".,:;")) or word in NO_VERBS:
        return False
    if _OTHER_ENDINGS.search(word) and word not in LOOK_ALIKE:
        return False
    if word in BEFORE_A_CLAUSE:
        return True
    return not rest or rest[0].rstrip(",:") not in AFTER_A_NOUN
