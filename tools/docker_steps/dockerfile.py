"""The part of the Dockerfile language that this project's file uses, read the way Docker reads it.

Follows the Dockerfile reference (docs.docker.com/reference/dockerfile). What is not known here is an error, never
skipped: a step that is left out silently would make the execution say more than it did.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass

KNOWN = ("FROM", "ARG", "RUN", "USER", "WORKDIR", "COPY", "ENV", "CMD")


class DockerfileError(Exception):
    """The file says something that this tool does not execute. The text starts with the line number."""


@dataclass(frozen=True)
class Instruction:
    """``name`` in capitals, ``text`` with continued lines joined, ``line`` where it starts (from 1)."""

    line: int
    name: str
    text: str

    def refuse(self, why: str) -> DockerfileError:
        return DockerfileError(f"line {self.line}: {self.name}: {why}")

    def split_flags(self, *known: str) -> tuple[dict[str, str], str]:
        """``--name=value`` words in front, and the rest.

        Raises:
            DockerfileError: a flag that is not in ``known``.
        """
        flags, rest = {}, self.text
        while match := re.match(r"--([\w-]+)(?:=(\S*))?\s+", rest):
            if match[1] not in known:
                raise self.refuse(f"the flag --{match[1]} is not known")
            flags[match[1]] = match[2] or ""
            rest = rest[match.end() :]
        return flags, rest

    def exec_form(self) -> list[str] | None:
        """The words of a JSON list, or None for the shell form."""
        if not self.text.startswith("["):
            return None
        try:
            words = json.loads(self.text)
        except ValueError:
            return None  # Docker takes what is no JSON for a shell command, too
        if not words or not all(isinstance(word, str) for word in words):
            raise self.refuse("expected a list of strings")
        return list(words)

    def pairs(self) -> list[tuple[str, str | None]]:
        """``NAME=value`` words, quotes taken off; the value is None where there is no ``=``.

        Raises:
            DockerfileError: a name that is none.
        """
        found: list[tuple[str, str | None]] = []
        for word in shlex.split(self.text):
            name, equals, value = word.partition("=")
            if not re.fullmatch(r"[A-Za-z_]\w*", name):
                raise self.refuse(f"expected NAME=value, found {word!r}")
            found.append((name, value if equals else None))
        return found


def parse(text: str) -> list[Instruction]:
    """The instructions in order.

    Raises:
        DockerfileError: an unknown instruction, a parser directive, a heredoc, no FROM, more than one stage.
    """
    found: list[Instruction] = []
    joined: list[str] = []
    start = 0
    for number, line in enumerate(text.splitlines(), 1):
        if re.match(r"\s*(#|$)", line):  # also between continued lines
            if not found and not joined and re.match(r"#\s*(escape|syntax|check)\s*=", line, re.IGNORECASE):
                raise DockerfileError(f"line {number}: parser directives are not known")
            continue
        start = start or number
        continued = re.search(r"\\[ \t]*$", line)
        joined.append(line[: continued.start()] if continued else line)
        if not continued:
            found.append(one("".join(joined), start))
            joined, start = [], 0
    if joined:
        raise DockerfileError(f"line {start}: the file ends in a continued line")
    stages = [step for step in found if step.name == "FROM"]
    if len(stages) != 1 or any(step.name != "ARG" for step in found[: found.index(stages[0])]):
        raise DockerfileError("line 1: expected exactly one FROM, after nothing but ARG")
    return found


def one(text: str, line: int) -> Instruction:
    name, _, rest = text.strip().partition(" ")
    step = Instruction(line, name.upper(), rest.strip())
    if step.name not in KNOWN:
        raise DockerfileError(f"line {line}: the instruction {name} is not known; known: {', '.join(KNOWN)}")
    if not step.text:
        raise step.refuse("says nothing")
    if step.name in ("RUN", "COPY") and re.search(r"<<-?['\"]?\w", step.text):
        raise step.refuse("heredocs are not known")
    return step


def expand(text: str, variables: Mapping[str, str]) -> str:
    r"""``$NAME``, ``${NAME}``, ``${NAME:-default}`` and ``${NAME:+other}``; ``\$`` is a dollar sign.

    Raises:
        ValueError: another form in braces.
    """

    def value(match: re.Match[str]) -> str:
        if match[0] == r"\$":
            return "$"
        name, operator, word = match["bare"] or match["name"], match["op"], match["word"]
        if name is None:
            raise ValueError(f"{match[0]} is not known")
        if operator == ":+":
            return word if variables.get(name) else ""
        return variables.get(name) or (word if operator == ":-" else "")

    return re.sub(
        r"\\\$|\$(?P<bare>\w+)|\$\{(?:(?P<name>\w+)(?:(?P<op>:[-+])(?P<word>[^{}]*))?\}|[^}]*\}?)", value, text
    )
