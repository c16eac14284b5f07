"""A value of another type than its key: what it is, and the line that works when typed."""

from __future__ import annotations

import ast
import re
import shlex
from typing import Any

import yaml

from ..errors import ConfigError

# yacs names types and values in this sentence alone.
_MISMATCH = re.compile(
    r"Type mismatch \(<class '(?P<old>[\w.]+)'> vs\. <class '(?P<new>[\w.]+)'>\) "
    r"with values \(.*? vs\. (?P<value>.*)\) for config key: (?P<key>\S+)"
)
_TYPE_WORDS = {
    "tuple": "a list",
    "list": "a list",
    "str": "text",
    "int": "a whole number",
    "float": "a number",
    "bool": "True or False",
}


def not_of_type(where: str, exc: ValueError) -> ConfigError:
    """Return the error for what yacs raises where a value has another type than its key.

    Args:
        where: a yaml, or a place of the command line.
        exc: of yacs.
    """
    text = " ".join(str(exc).split())
    found = _MISMATCH.search(text)
    if found is None:
        return ConfigError(where, expected="a value of the key's type", found=text[:300], fix="Correct the value.")
    key, old = found["key"], found["old"]
    value = found["value"] if found["new"] == "str" else _literal(found["value"])
    return ConfigError(
        where,
        expected=f"a value of the key's type, {_TYPE_WORDS.get(old, 'a mapping of keys')}",
        found=f"{repr(value)[:300]} for {key}",
        fix=typed_fix(key, old, value, in_yaml=where.endswith((".yaml", ".yml"))),
    )


def typed_fix(key: str, old: str, value: Any, *, in_yaml: bool) -> str:
    """Return what to type in place of a value that has another type than its key.

    Args:
        key: with its path.
        old: the name of the key's type.
        value: what was given.
        in_yaml: as a line of a yaml rather than on a command line.

    Example:
        >>> typed_fix("DATASETS.TRAIN", "tuple", "street_train", in_yaml=False)
        'Type DATASETS.TRAIN "[\'street_train\']" instead.'
        >>> typed_fix("SOLVER.BASE_LR", "float", "1e-4", in_yaml=True)
        'Write SOLVER.BASE_LR: 0.0001 there.'
    """
    right: Any = None
    if old in ("tuple", "list"):
        right = [word.strip() for word in value.split(",") if word.strip()] if isinstance(value, str) else [value]
    elif old == "str" and not isinstance(value, (dict, list, tuple)):
        right = str(value)
    elif old in ("int", "float", "bool"):
        number = _literal(str(value))
        if isinstance(number, str):
            number = _number(number)
        if old == "bool" and number in (0, 1):
            right = bool(number)
        elif old == "float" and isinstance(number, (int, float)):
            right = float(number)
        elif old == "int" and isinstance(number, (int, float)) and float(number).is_integer():
            right = int(number)
    if right is None:
        return f"Give it {_TYPE_WORDS.get(old, old)}." if old in _TYPE_WORDS else "Name one of its keys."
    # yacs reads a number also in a string, unless that has quotes of its own.
    plain = right if isinstance(right, str) and _literal(right) == right else repr(right)
    if in_yaml:
        dumped = yaml.safe_dump(right, default_flow_style=True, width=1000).splitlines()[0]
        line = f'"{plain}"' if isinstance(right, str) and plain != right else dumped
        return f"Write {key}: {line} there."
    return f"Type {key} {_shell(plain)} instead."


def _shell(text: str) -> str:
    """Quote a word for a shell, in double quotes where those are enough: they also do in other shells."""
    simple = not re.search(r'["$`\\\\!]', text)
    return text if shlex.quote(text) == text else f'"{text}"' if simple else shlex.quote(text)


def _literal(text: str) -> Any:
    """Return what yacs reads in a word of the command line."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _number(text: str) -> float | bool | str:
    words = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
    try:
        return words[text.lower()] if text.lower() in words else float(text)
    except ValueError:
        return text
