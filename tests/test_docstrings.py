"""The first line of a function's docstring says what it does: a verb, then its object."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.docstrings import is_imperative

import d2_headadapt

PACKAGE = Path(d2_headadapt.__file__).parent
DATA = {"property", "cached_property"}
"""What is read like a value is named by a noun."""


def functions(source: str) -> Iterator[tuple[str, str]]:
    """(name, first line) of each function with a docstring; a constructor's may begin with its arguments."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            decorators = {getattr(d, "id", getattr(d, "attr", "")) for d in node.decorator_list}
            doc = ast.get_docstring(node)
            if doc and not decorators & DATA and not (node.name == "__init__" and doc.startswith("Args:")):
                yield node.name, doc.splitlines()[0]


def faults(source: str) -> list[str]:
    return [f"{name}: {line}" for name, line in functions(source) if not is_imperative(line)]


def test_every_function_says_first_what_it_does() -> None:
    sources = {path: path.read_text(encoding="utf-8") for path in sorted(PACKAGE.rglob("*.py"))}
    assert sum(len(list(functions(source))) for source in sources.values()) > 500
    assert [(str(path.relative_to(PACKAGE)), wrong) for path, text in sources.items() for wrong in faults(text)] == []


def test_mutation_a_function_that_only_names_its_result_is_found() -> None:
    source = 'class A:\n @property\n def b(self):\n  """The rows."""\n def c(self):\n  """The rows."""\n'
    assert faults(source) == ["c: The rows."]


@pytest.mark.parametrize(
    ("line", "right"),
    [
        ("Read a file.", True),
        ("Re-solve rows.", True),
        ("Pass it on.", True),
        ("Process the rows.", True),
        ("Apply rules.", True),
        ("Train, or evaluate.", True),
        ("Name the rows.", True),
        ("Reads a file.", False),
        ("Reading a file.", False),
        ("The file.", False),
        ("``x`` of y.", False),
        ("(N, C) -> (N, K).", False),
        ("Name of the rows.", False),
        ("Rows of y.", False),
        ("Whether it is there.", False),
        ("As the parent.", False),
        ("Of one class.", False),
    ],
)
def test_what_an_imperative_is(line: str, right: bool) -> None:
    assert is_imperative(line) == right
