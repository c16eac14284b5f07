"""Words of a command line that stand where argparse cannot read them: what was meant, in the order that works."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Mapping, Sequence

from ..errors import UsageError

PROGRAM = "d2-headadapt"
CONFIGS = (".yaml", ".yml", ".py")
FREE = ("run", "explain")
"""Commands whose words are a script's or a text."""


def refuse_misplaced(words: Sequence[str], parser: argparse.ArgumentParser) -> None:
    """Raise for an option behind ``KEY VALUE`` pairs or before the command, and for a config without ``--config-file``.

    Args:
        words: the command line without the program.
        parser: of all commands.

    Raises:
        UsageError: with the whole command line to type.
    """
    made = in_order(words, commands_of(parser))
    if made is not None:
        raise UsageError(
            "command line",
            expected="the command, then its options, a config behind --config-file, and KEY VALUE pairs last",
            found=shlex.join([PROGRAM, *words]),
            fix=f"Type: {shlex.join([PROGRAM, *made])}",
        )


def commands_of(parser: argparse.ArgumentParser) -> Mapping[str, argparse.ArgumentParser]:
    """Return the parsers of a parser's commands, by name."""
    found: dict[str, argparse.ArgumentParser] = {}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            found.update(action.choices)
    return found


def in_order(words: Sequence[str], commands: Mapping[str, argparse.ArgumentParser]) -> list[str] | None:
    """Return the words in the order that works; ``None`` where they stand in it, or where it cannot be told.

    Example:
        >>> parser = argparse.ArgumentParser()
        >>> command = parser.add_subparsers().add_parser("plan")
        >>> one = command.add_argument("--config-file")
        >>> many = command.add_argument("opts", nargs=argparse.REMAINDER)
        >>> in_order(["plan", "SEED", "1", "c.yaml"], commands_of(parser))
        ['plan', '--config-file', 'c.yaml', 'SEED', '1']
    """
    if {"-h", "--help", "--version"} & set(words):
        return None
    place = next((i for i, word in enumerate(words) if word in commands), None)
    if place is None:
        return ["doctor", "--config-file", words[0]] if words and _is_config(words[0]) else None
    name, rest = words[place], [*words[:place], *words[place + 1 :]]
    if name in FREE or "opts" not in {action.dest for action in commands[name]._actions}:
        return [name, *rest] if place else None
    options, pairs, moved = _sorted(rest, commands[name]._option_string_actions)
    return [name, *options, *pairs] if moved or place else None


def _sorted(words: Sequence[str], known: Mapping[str, argparse.Action]) -> tuple[list[str], list[str], bool]:
    """Return the options with their values, the pairs, and whether argparse would have read them otherwise."""
    options: list[str] = []
    pairs: list[str] = []
    moved = False
    has_config = any(word.partition("=")[0] == "--config-file" for word in words)
    rest = list(words)
    while rest:
        word = rest.pop(0)
        option, equals, _ = word.partition("=")
        if option in known and word.startswith("-"):
            moved = moved or bool(pairs)
            options += [word, *([] if equals else _values(rest, known[option].nargs))]
        elif _is_config(word) and not has_config:
            has_config = moved = True
            options += ["--config-file", word]
        else:
            # key=value of a LazyConfig is one word; a key and its value are two.
            pairs += [word, *(rest[:1] if "=" not in word else [])]
            del rest[: 1 if "=" not in word else 0]
    return options, pairs, moved


def _values(rest: list[str], nargs: int | str | None) -> list[str]:
    """Take the values of an option from ``rest``."""
    count = 1 if nargs is None else nargs
    if isinstance(count, str):
        count = next((i for i, word in enumerate(rest) if word.startswith("--")), len(rest))
    taken = rest[:count]
    del rest[:count]
    return taken


def _is_config(word: str) -> bool:
    return word.endswith(CONFIGS) and "=" not in word and not word.startswith("-")
