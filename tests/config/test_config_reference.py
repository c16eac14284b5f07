"""docs/config.md is what the code says, and docs/peers.md names tests that exist."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from dataclasses import fields
from typing import Any

import pytest
from detectron2.config import CfgNode, get_cfg
from helpers.commands import ROOT

from d2_headadapt.config import keys as config
from d2_headadapt.config.keys import add_headadapt_config
from d2_headadapt.data.entry import DatasetEntry
from d2_headadapt.data.task_spec import TASK_DEFAULTS

DOCS = ROOT / "docs"
ABOVE = "    # The box predictor's name in d2_headadapt.PREDICTOR_REGISTRY.\n"


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    return importlib.import_module("config_reference")


def leaves(node: CfgNode, path: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in node.items():
        found |= leaves(value, f"{path}{key}.") if isinstance(value, CfgNode) else {f"{path}{key}": value}
    return found


def test_the_page_is_what_the_script_prints(
    tool: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["config_reference.py", "--print"])
    assert tool.main() == 0
    written = (DOCS / "config.md").read_text(encoding="utf-8")
    assert capsys.readouterr().out == written, "run tools/config_reference.py"


def test_the_keys_and_defaults_are_those_that_detectron2_gets(tool: Any) -> None:
    """Read from the syntax, they are compared with a config that the code filled."""
    cfg = get_cfg()
    stock = leaves(cfg)
    add_headadapt_config(cfg)
    ours = {key: value for key, value in leaves(cfg).items() if key not in stock}
    read = {k.path: ast.literal_eval(k.default) for k in tool.read_keys(inspect.getsource(config)) if k.default}
    assert read == ours


def test_every_key_has_a_row(tool: Any) -> None:
    page = tool.page()
    names = {key.path.rpartition(".")[2] for key in tool.read_keys(inspect.getsource(config)) if key.default}
    for key in names | TASK_DEFAULTS.keys() | {field.name for field in fields(DatasetEntry)}:
        assert re.search(rf"^\|[^|]*`{key}`[^|]*\|[^|]", page, re.MULTILINE), key


def test_a_key_without_a_comment_is_refused_by_name(tool: Any) -> None:
    source = inspect.getsource(config)
    assert source.count(ABOVE) == 1
    tool.render(tool.read_keys(source))
    with pytest.raises(SystemExit, match=r"MODEL\.HEAD_ADAPT\.PREDICTOR\b"):
        tool.render(tool.read_keys(source.replace(ABOVE, "")))


def test_a_changed_comment_or_default_changes_the_page(tool: Any) -> None:
    source = inspect.getsource(config)
    page = tool.render(tool.read_keys(source))
    for old, new in ((ABOVE, "    # Something else.\n"), ("node.MIN_COVERAGE = 0.5", "node.MIN_COVERAGE = 0.6")):
        assert source.count(old) == 1
        assert tool.render(tool.read_keys(source.replace(old, new))) != page


def test_a_task_key_that_the_guide_lacks_is_refused_by_name(tool: Any) -> None:
    guide = (DOCS / "tasks.md").read_text(encoding="utf-8")
    with pytest.raises(SystemExit, match="focal_gamma"):
        tool.task_rows(guide.replace("| `focal_gamma` |", "| `gamma` |"))


def unknown_tests(text: str) -> list[str]:
    """Those of ``test_file.py::test_name`` in a text that no file in tests/ defines."""
    missing = []
    for file, name in re.findall(r"(test_\w+\.py)::(\w+)", text):
        paths = sorted((ROOT / "tests").rglob(file))
        nodes = [node for path in paths for node in ast.parse(path.read_text(encoding="utf-8")).body]
        if not any(isinstance(node, ast.FunctionDef) and node.name == name for node in nodes):
            missing.append(f"{file}::{name}")
    return missing


def test_every_test_that_the_table_of_peers_names_exists() -> None:
    text = (DOCS / "peers.md").read_text(encoding="utf-8")
    assert unknown_tests(text) == []
    claims = text.partition("## What we do\n")[2].partition("\n## ")[0]
    rows = [line for line in claims.splitlines() if line.startswith("| ")][1:]
    assert rows and all("::" in row for row in rows), "a claim without a test"


def test_mutation_a_test_that_was_renamed_is_seen() -> None:
    text = "test_laws.py::test_adapting_twice_is_adapting_once test_laws.py::test_gone test_gone.py::test_x"
    assert unknown_tests(text) == ["test_laws.py::test_gone", "test_gone.py::test_x"]
