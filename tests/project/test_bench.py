"""The benchmark table of docs/bench.md is what the stored numbers say, and nobody edited either by hand."""

from __future__ import annotations

import importlib.util
import json
import mmap
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    """``tools/bench.py`` by its path: detectron2's wheel has a package called tools."""
    spec = importlib.util.spec_from_file_location("bench_script", ROOT / "tools" / "bench.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_table_is_what_the_stored_numbers_say(bench: ModuleType) -> None:
    text = bench.PAGE.read_text(encoding="utf-8")
    assert bench.with_block(text, bench.render(json.loads(bench.STORED.read_text()))) == text


def test_another_number_would_be_another_block(bench: ModuleType) -> None:
    data = json.loads(bench.STORED.read_text())
    before = bench.render(data)
    data["load"]["1 GB"]["ours"]["seconds"] *= 2
    assert bench.render(data) != before


def test_every_arm_can_be_asked_for(bench: ModuleType) -> None:
    assert bench.names("")["seconds"] > 0
    with bench.PeakMemory() as memory:
        # Pages of its own: an allocation may be given what an earlier test has freed.
        block = mmap.mmap(-1, 64 * 2**20, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        block[:: mmap.PAGESIZE] = b"x" * (len(block) // mmap.PAGESIZE)
        memory._watch_once()
    assert len(block) and memory.grown()["anonymous_bytes"] > 32 * 2**20
