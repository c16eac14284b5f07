"""Every hint of the product that is a config key and a value is typed: through a shell and into a config."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from detectron2.config import CfgNode, get_cfg

import d2_headadapt
import d2_headadapt.key
from d2_headadapt.config.keys import add_headadapt_config
from d2_headadapt.key import Key, shown
from d2_headadapt.setup.yaml import all_keys

PACKAGE = Path(d2_headadapt.__file__).parent
KEY = r"(?:(?:MODEL|DATASETS|SOLVER|INPUT|TEST|DATALOADER)(?:\.[A-Z0-9_]+)+|OUTPUT_DIR|SEED)"
VALUE = r"\"[^\"]*\"|'[^']*'|\[[^\]]*\]|\([^)]*\)|[^\s,;)]+"
HINT = re.compile(
    rf"\b(?:Set|set|Add|add|Type|type|Write|write|or|to)\b:? (?P<key>{KEY})(?P<colon>:?) (?P<value>{VALUE})"
)
PROSE = ("with", "if", "to", "and", "or", "above", "higher", "as", "is", "in", "from", "has", "so", "removed")
"""Words of a sentence behind a key, which are no values."""
FILLED = {str: "thing", int: "3", float: "0.5", bool: "True", tuple: "[3]", list: "[3]", type(None): "thing"}
"""What stands for a placeholder, by the type of the key's default."""


def strings(source: str) -> Iterator[str]:
    """The texts of a module but its docstrings, with ``{}`` for what is filled in."""
    tree = ast.parse(source)
    inside = {part for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    said = {node.value for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in inside | said:
            yield node.value


def settings_of(source: str) -> Iterator[tuple[str, bool, str]]:
    """The settings that a module writes with :meth:`d2_headadapt.key.Key.set`, with ``{}`` for what is filled in."""
    for call in ast.walk(ast.parse(source)):
        if (
            isinstance(call, ast.Call)
            and isinstance(call.func, ast.Attribute)
            and call.func.attr == "set"
            and call.args
        ):
            root, *names = ast.unparse(call.func.value).split(".")
            key = getattr(d2_headadapt.key, root, None)
            if isinstance(key, Key) and all(name.isidentifier() for name in names):
                for name in names:
                    key = key[name]
                (value,) = call.args
                given = ast.literal_eval(value) if isinstance(value, ast.Constant) else "{}"
                name, _, text = shown(f"{key.set(given)}").partition(" ")
                yield name, False, text


def hints(source: str) -> list[tuple[str, bool, str]]:
    """Key, whether it is written as in a yaml, and value."""
    found = [match for text in strings(source) for match in HINT.finditer(text)]
    return [
        (match["key"], bool(match["colon"]), match["value"].rstrip("."))
        for match in found
        if match["value"].rstrip(".") not in PROSE and not match["value"].startswith(("%", "(or "))
    ] + list(settings_of(source))


def config() -> CfgNode:
    cfg = get_cfg()
    add_headadapt_config(cfg)
    return cfg


def typed(key: str, in_yaml: bool, value: str) -> CfgNode:
    """The config after the hint was typed or written."""
    cfg = config()
    node = cfg
    for name in key.split("."):
        node = node[name]
    text = value.replace("{}", FILLED[type(node)]) if value == "{}" else value.replace("{}", "3")
    if in_yaml:
        content = yaml.safe_load(f"{key.rpartition('.')[2]}: {text}")
        for name in reversed(key.split(".")[:-1]):
            content = {name: content}
        cfg.merge_from_other_cfg(CfgNode(content))
        return cfg
    words = shlex.split(f"{key} {text}")
    assert len(words) == 2, f"a shell makes {len(words)} words of {key} {text}"
    cfg.merge_from_list(words)
    return cfg


OF_OTHERS = {"MODEL.CLIP.TEXT_EMB_DIM"}
"""Keys that another project adds to its own config."""
CASES = sorted(
    {
        (path.name, *hint)
        for path in PACKAGE.rglob("*.py")
        for hint in hints(path.read_text("utf-8"))
        if hint[0] not in OF_OTHERS
    }
)


@pytest.mark.parametrize(("file", "key", "in_yaml", "value"), CASES)
def test_a_hint_can_be_typed(file: str, key: str, in_yaml: bool, value: str) -> None:
    assert key in set(all_keys(config())), f"{file}: no such key"
    typed(key, in_yaml, value)


def test_most_keys_are_hinted_at_somewhere() -> None:
    """The search finds what there is: a pattern that finds nothing would pass every case."""
    assert len(CASES) > 40 and {key for _, key, _, _ in CASES} >= {"DATASETS.TRAIN", "MODEL.HEAD_ADAPT.MATCH"}


@pytest.mark.parametrize(
    ("source", "wrong"),
    [
        ("fix = 'Set MODEL.HEAD_ADAPT.MACH name.'", KeyError),
        ("fix = 'Set DATASETS.TRAIN my_train.'", ValueError),
        ("fix = HEAD_ADAPT.MACH.set('name')", KeyError),
        ("fix = f'Set INPUT.MIN_SIZE_TRAIN [{a}, {b}].'", AssertionError),
    ],
)
def test_mutation_a_hint_that_cannot_be_typed_is_found(source: str, wrong: type[Exception]) -> None:
    ((key, in_yaml, value),) = hints(source)
    with pytest.raises(wrong):
        typed(key, in_yaml, value)
