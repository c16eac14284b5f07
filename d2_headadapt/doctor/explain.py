"""Explain what a pasted error means, and what to type: ``d2-headadapt explain``."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from ..key import OUTPUT_DIR, shown
from . import known_messages as known_messages
from . import known_shapes as known_shapes
from .known_errors import KNOWN, KnownError

COLOURS = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
_SOURCE = re.compile(
    r'^([^\n]*?(?P<indent>[ \t]*)File "[^"\n]*", line \d+[^\n]*\n)((?:(?P=indent)[ \t]+[^\n]*(?:\n|$))+)', re.MULTILINE
)
"""A frame of a traceback, and the deeper lines below it: source, and the marks under it."""
NOT_KNOWN = f"""\
This error is not known to d2-headadapt, so nothing is said about it: a guess would cost you more than it saves.
Try: d2-headadapt doctor --config-file YAML, which checks config, datasets, checkpoint and model.
When you ask someone, include: the whole traceback, from the first line; the config as dumped to
{OUTPUT_DIR}/config.yaml; the output of python -m detectron2.utils.collect_env; the command; and where the weights come
from."""


@dataclass(frozen=True)
class Explanation:
    """One known error in a text.

    Args:
        name: of the error.
        line: the text that matched, on one line.
        cause: at most two lines.
        mend: what to type.
        check: code of the doctor's check that finds it before training; may be empty.
        times: how often it stands in the text.
    """

    name: str
    line: str
    cause: str
    mend: str
    check: str
    times: int


def explain(text: str) -> list[Explanation]:
    """Find the known errors of a text, the one that counts first, then the others from the last to the first.

    What counts is the last exception of a traceback that is known, because Python prints the one that ended the run
    last; log lines come after every exception. Of each error the last occurrence is explained.

    Args:
        text: a message or a whole log; colour codes and wrapped lines do no harm.
    """
    plain = COLOURS.sub("", text)
    spoken = without_source(plain)
    found: list[tuple[int, int, int, KnownError, re.Match[str]]] = []
    for error in KNOWN:
        matches = list(error.pattern.finditer(spoken))
        if matches:
            counted = _most_telling(matches)
            found.append((error.rank, counted.start(), len(matches), error, counted))
    found.sort(key=lambda entry: entry[:2], reverse=True)
    explained = []
    for _, _, times, error, match in found:
        cause, mend, *check = map(shown, error.answer(match, _before(plain, match)))
        line = " ".join(match[0].split())
        explained.append(Explanation(error.name, line, cause, mend, check[0] if check else error.check, times))
    return explained


def without_source(text: str) -> str:
    """Return the text with NUL in place of the source lines of tracebacks, which hold messages that nobody raised."""
    return _SOURCE.sub(lambda match: match[1] + re.sub(r"[^\n]", "\0", match[3]), text)


def _most_telling(matches: Sequence[re.Match[str]]) -> re.Match[str]:
    """Pick the last match; of skipped tensors, a classifier's weight, else a weight where there is one."""
    classifiers = [m for m in matches if re.search(r"(cls_score|predictor|class_embed\S*)\.weight", m[0])]
    weights = [m for m in matches if re.search(r"\bweight\b", m[0])]
    return (classifiers or weights or list(matches))[-1]


def _before(text: str, match: re.Match[str]) -> str:
    """Return the text before a match, since the last traceback began."""
    before = text[: match.start()]
    return before[max(before.rfind("Traceback (most recent call last)"), 0) :]


def explanation_text(text: str) -> tuple[str, bool]:
    """Write what ``d2-headadapt explain`` prints, and whether the error is known."""
    found = explain(text)
    if not found:
        return shown(NOT_KNOWN), False
    first, *others = found
    times = f" ({first.times} times)" if first.times > 1 else ""
    lines = [f"error: {first.line}{times}", "", "cause:", *(f"  {line}" for line in first.cause.splitlines())]
    lines += ["mend:", *(f"  {line}" for line in first.mend.splitlines())]
    if first.check:
        lines += ["before training:", f"  d2-headadapt doctor --config-file YAML finds this ({first.check})"]
    for other in others:
        lines += ["", f"also in this text: {other.line}", f"  {other.cause.splitlines()[0]}"]
    return "\n".join(lines), True
