"""Known errors of torch, detectron2, RegionCLIP and the COCO tools that a change of classes causes, with their fix.

Each pattern was written against the text that the library itself produces, and captures its numbers and names.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

Answer = tuple[str, str] | tuple[str, str, str]
"""(cause in at most two lines, what to type), and the code of a check where the text decides which it is."""


@dataclass(frozen=True)
class KnownError:
    """One error that has an answer.

    Args:
        name: short, for tests and for the list of what else was found.
        pattern: matched against the text; a space stands for any white space, because terminals wrap lines.
        answer: makes cause and mend from the match and the text before it since the last traceback began.
        check: code of the doctor's check that finds it before training; empty where none can.
        rank: 2 for an exception, 1 for a log line that says something by itself, 0 for one that comes with another.
    """

    name: str
    pattern: re.Pattern[str]
    answer: Callable[[re.Match[str], str], Answer]
    check: str = ""
    rank: int = 2


def known(
    name: str, pattern: str, check: str = "", *, rank: int = 2
) -> Callable[[Callable[[re.Match[str], str], Answer]], Callable[[re.Match[str], str], Answer]]:
    """Enter a function in :data:`KNOWN`."""
    compiled = re.compile(pattern.replace(" ", r"\s+"))

    def enter(answer: Callable[[re.Match[str], str], Answer]) -> Callable[[re.Match[str], str], Answer]:
        KNOWN.append(KnownError(name, compiled, answer, check, rank))
        return answer

    return enter


KNOWN: list[KnownError] = []
