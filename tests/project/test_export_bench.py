"""The page of docs/export_bench.md is what the stored numbers say, and the numbers are of files that were compared."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

from d2_headadapt.export import TOLERANCE

ROOT = Path(__file__).parents[2]


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """``tools/bench_export.py`` by its path: detectron2's wheel has a package called tools."""
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    spec = importlib.util.spec_from_file_location("bench_export", ROOT / "tools" / "bench_export.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_what_the_stored_numbers_say(bench: ModuleType) -> None:
    data = json.loads(bench.STORED.read_text(encoding="utf-8"))
    assert bench.render(data) == bench.PAGE.read_text(encoding="utf-8")
    (name, *_), form = data["models"], "traced"
    data["models"][name]["seconds"][form] = [2 * value for value in data["models"][name]["seconds"][form]]
    assert bench.render(data) != bench.PAGE.read_text(encoding="utf-8")


def test_every_stored_difference_is_an_allowed_one(bench: ModuleType) -> None:
    data = json.loads(bench.STORED.read_text(encoding="utf-8"))
    compared = [told for model in data["models"].values() for told in model["forms"].values() if "bytes" in told]
    assert len(compared) >= 10
    for told in compared:
        assert max(told["shares"].values()) <= TOLERANCE
        assert all(told["largest"][name] == 0 for name in told["largest"] if name.startswith("pred_c"))
