#!/usr/bin/env python3
"""Write docs/config.md from the code: keys and defaults by its syntax, meanings from the comments above them."""

from __future__ import annotations

import argparse
import ast
import inspect
import io
import re
import sys
import tokenize
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path

from d2_headadapt import add_headadapt_config
from d2_headadapt.data import TASK_DEFAULTS, DatasetEntry

DOCS = Path(__file__).resolve().parents[1] / "docs"
PAGE = DOCS / "config.md"

# Where a yaml's form of a key is not the one that the docstring of DatasetEntry tells, or its field says nothing.
ENTRY_MEANINGS = {
    "name": "what the dataset is called in `DATASETS.TRAIN` and `DATASETS.TEST`",
    "json": "file of labels in COCO format",
    "csv": "file of labels with one row for each image",
    "thing_classes": "class names by ascending category id; they must be those of the json",
    "keypoint_names": "names of the keypoints",
    "keypoint_flip_map": "pairs of keypoint names that change places when an image is mirrored",
    "extra_keys": "keys of each annotation that the dataset dicts keep",
    "tasks": "csv: task -> column; json: a list of tasks, or task -> `{on: image}` or `{on: box}`",
    "split": "`part` (`train` or `test`), `held_out` (share of the file names) and `seed`; left out: all rows",
}

INTRO = """\
# Config keys

Written by `tools/config_reference.py` from the code; edit the comments there, not this page. Where keys stand in one
row, the text is about all of them. Every key can be set in a yaml or at the end of a command line, as detectron2's own.
"""
TASKS = """\
## Keys of a task

Below `MODEL.TASKS.<name>`; `on` must be given. More about tasks: [tasks.md](tasks.md).
"""
ENTRIES = """\
## Keys of an entry of `DATASETS.REGISTER`

`name`, `images` and either `json` or `csv` must be given, and with `csv` also `file` and `tasks`. Formats:
[tasks.md](tasks.md#data).
"""


@dataclass(frozen=True)
class Key:
    """One assignment of ``config/keys.py``.

    Args:
        path: from the root of the config, as one types it.
        default: as the source writes it; ``None`` for a node, which only holds other keys.
        comment: its text, joined to one line; empty where no comment stands above.
        comment_line: where that starts: keys of the same number share it.
    """

    path: str
    default: str | None
    comment: str
    comment_line: int


def read_keys(source: str) -> list[Key]:
    """The keys that ``add_headadapt_config`` declares, in its order.

    A comment is about the assignments right below it, up to a blank line or the next comment.
    """
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = {t.start[0]: t.string.lstrip("# ") for t in tokens if t.type == tokenize.COMMENT}
    function = next(
        node
        for node in ast.parse(source).body
        if isinstance(node, ast.FunctionDef) and node.name == "add_headadapt_config"
    )
    names = {function.args.args[0].arg: ""}
    keys: list[Key] = []
    comment, first, last = "", 0, 0
    for statement in function.body:
        if not isinstance(statement, ast.Assign):
            continue
        lines: list[int] = []
        while (line := statement.lineno - len(lines) - 1) in comments:
            lines.insert(0, line)
        if lines:
            comment, first = " ".join(comments[line] for line in lines), lines[0]
        elif statement.lineno != last + 1:
            comment, first = "", statement.lineno
        last = statement.end_lineno or statement.lineno
        path = next(_path(target, names) for target in statement.targets if isinstance(target, ast.Attribute))
        names |= {target.id: path for target in statement.targets if isinstance(target, ast.Name)}
        value = statement.value
        node = isinstance(value, ast.Call) and getattr(value.func, "id", "") == "CfgNode"
        keys.append(Key(path, None if node else ast.get_source_segment(source, value), comment, first))
    return keys


def _path(target: ast.expr, names: Mapping[str, str]) -> str:
    if isinstance(target, ast.Attribute):
        return f"{_path(target.value, names)}.{target.attr}".lstrip(".")
    assert isinstance(target, ast.Name), ast.dump(target)
    return names[target.id]


def render(keys: Iterable[Key]) -> str:
    """One section for each node, in the order in which they are declared.

    Raises:
        SystemExit: a key has no comment.
    """
    keys = list(keys)
    silent = [key.path for key in keys if key.default is not None and not key.comment]
    if silent:
        raise SystemExit(f"config/keys.py: no comment above {', '.join(silent)}. Write one.")
    parts = []
    for parent in dict.fromkeys(key.path if key.default is None else key.path.rpartition(".")[0] for key in keys):
        own = [key for key in keys if key.default is not None and key.path.rpartition(".")[0] == parent]
        node = next((key for key in keys if key.path == parent), None)
        parts.append(f"## `{parent}`\n")
        # The comment above a node is often that of its first keys too, and stands in their row then.
        if node is not None and node.comment and all(key.comment_line != node.comment_line for key in own):
            parts.append(f"{node.comment}\n")
        groups: dict[int, list[Key]] = {}
        for key in own:
            groups.setdefault(key.comment_line, []).append(key)
        rows = [
            (
                "<br>".join(_code(key.path.rpartition(".")[2]) for key in group),
                "<br>".join(_code(key.default or "") for key in group),
                group[0].comment,
            )
            for group in groups.values()
        ]
        if rows:
            parts.append(_table(rows))
    return "\n".join(parts)


def task_rows(guide: str) -> list[tuple[str, str, str]]:
    """Keys and defaults of the code, with the meanings of the table in docs/tasks.md."""
    found = re.findall(r"^\| `(\w+)` \| ?([^|]*?) ?\| (.+) \|$", guide, re.MULTILINE)
    # What None stands for is in the guide's column of defaults.
    meanings = {key: f"{text}; left out: {default}" if default[:1].isalpha() else text for key, default, text in found}
    _need(TASK_DEFAULTS, meanings, "docs/tasks.md")
    return [(_code(key), _code(repr(value)), meanings[key]) for key, value in TASK_DEFAULTS.items()]


def entry_rows() -> list[tuple[str, str, str]]:
    """Keys and defaults of a dataset entry, with the meanings that its docstring has."""
    meanings: dict[str, str] = {}
    arguments = (inspect.getdoc(DatasetEntry) or "").partition("Args:\n")[2]
    for names, text in re.findall(r"^    (\w[\w, ]*): ((?:.+\n?)(?:     +.+\n?)*)", arguments, re.MULTILINE):
        meanings |= dict.fromkeys(names.split(", "), " ".join(text.split()).rstrip(".").replace("``", "`"))
    meanings |= ENTRY_MEANINGS
    keys = {field.name: field.default for field in fields(DatasetEntry)}
    _need(keys, meanings, "the docstring of DatasetEntry")
    return [(_code(key), "" if value is MISSING else _code(repr(value)), meanings[key]) for key, value in keys.items()]


def _need(keys: Iterable[str], meanings: Mapping[str, str], where: str) -> None:
    lacks = [key for key in keys if key not in meanings]
    if lacks:
        raise SystemExit(f"{where}: nothing about {', '.join(lacks)}. Write it.")


def _code(text: str) -> str:
    return "`" + text.replace("|", "\\|") + "`"


def _table(rows: Iterable[tuple[str, str, str]]) -> str:
    lines = ["| key | default | meaning |", "|---|---|---|"]
    for key, default, meaning in rows:
        whole = re.sub(r"(?<!\\)[|]", r"\\|", meaning)
        lines.append(f"| {key} | {default} | {whole} |")
    return "\n".join(lines) + "\n"


def page() -> str:
    """The whole of docs/config.md."""
    keys = render(read_keys(inspect.getsource(sys.modules[add_headadapt_config.__module__])))
    guide = (DOCS / "tasks.md").read_text(encoding="utf-8")
    return "\n".join([INTRO, keys, TASKS, _table(task_rows(guide)), ENTRIES, _table(entry_rows())])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--print", action="store_true", help="print the page and leave the file")
    text = page()
    if parser.parse_args().print:
        sys.stdout.write(text)
    else:
        PAGE.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
