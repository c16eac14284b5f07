"""The demonstration of tasks on boxes in a very short run, and the page of what they cost."""

from __future__ import annotations

import importlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

QUICK = ("SOLVER.MAX_ITER", "2", "SOLVER.STEPS", "()", "TEST.EVAL_PERIOD", "1", "SOLVER.IMS_PER_BATCH", "2")


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports a module of tools/ by its name; that folder is no package."""
    pytest.importorskip("sklearn")
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    return importlib.import_module


def test_the_demo_runs_from_the_yaml_to_the_table(
    tool: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two iterations on four scenes: labels reach the losses, and every file is written."""
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    monkeypatch.chdir(tmp_path)
    digits = tool("demo_digits")
    splits = [digits.Split(split.name, split.classes, split.pool, 4) for split in digits.SPLITS[:2]]
    results = tool("demo_tasks").run(splits, QUICK)
    for task in ("parity", "colour"):
        assert {f"{task}/top1", f"{task}/macro_f1", f"{task}/coverage"} <= set(results["tasks"])
    assert "AP" in results["bbox"]
    metrics: dict[str, float] = {}
    for line in Path("output/demo_tasks/run/metrics.json").read_text().splitlines():
        metrics.update(json.loads(line))
    for task in ("parity", "colour"):
        assert metrics[f"loss_task_{task}"] > 0 and 0 <= metrics[f"task/{task}/accuracy"] <= 1
    assert len(list(Path("output/demo_tasks/predictions").glob("*.png"))) == 4
    assert "most frequent class" in capsys.readouterr().out


def test_the_page_is_what_the_stored_numbers_say(tool: Any) -> None:
    bench = tool("bench_tasks")
    data = json.loads(bench.STORED.read_text(encoding="utf-8"))
    assert bench.render(data) == bench.PAGE.read_text(encoding="utf-8")
    found = next(iter(data["seconds"].values()))["training"]
    found[bench.TEN] = [2 * seconds for seconds in found[bench.TEN]]
    assert bench.render(data) != bench.PAGE.read_text(encoding="utf-8")


def test_a_ratio_is_of_the_steps_of_one_round(tool: Any) -> None:
    """A machine that slows down by half hurts both arms alike."""
    found = {"a": [1.1, 2.2, 3.3, 4.4], "b": [1.0, 2.0, 3.0, 4.0]}
    assert tool("bench_tasks").ratio(found, "a", "b") == "+10.0 % (+10.0 to +10.0)"
