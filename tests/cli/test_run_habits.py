"""``run`` accepts whatever stock accepts: stock detectron2 is the oracle for a table of habits of its users."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.commands import python
from helpers.habits import SCRIPT
from helpers.models import model_of, names, stock_model
from helpers.repository import OLD, Repository, adopted

from d2_headadapt import HeadAdaptCheckpointer

HABITS = [line.split('"')[1] for line in SCRIPT.splitlines() if line.startswith('    "') and '": ' in line]
RANDOM = {"a class more than the file", "a file of another model", "a file with little of this model"}
"""Stock starts these heads afresh."""


def save(folder: Path, name: str, state: dict[str, Any]) -> None:
    torch.save({"model": state}, folder / name)


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What came of every habit, without this package and with it."""
    folder = tmp_path_factory.mktemp("habits")
    repository = Repository(folder, OLD, num_classes=5)
    old = repository.old
    save(folder, "six.pth", dict(stock_model(6, seed=5).state_dict()))
    save(folder, "eighty.pth", dict(stock_model(80, seed=6).state_dict()))
    save(folder, "other.pth", {f"somebody.{i}.weight": torch.ones(2) for i in range(9)})
    little = {f"somebody.{i}.weight": torch.ones(2) for i in range(900)}
    save(folder, "little.pth", {**little, **{k: v for k, v in old.items() if k.startswith("backbone.fpn")}})
    ours = model_of(names(4, "thing"), num_classes=4, seed=8)
    HeadAdaptCheckpointer(ours, str(folder)).save("named")
    (folder / "last_checkpoint").unlink()
    (folder / "script.py").write_text(SCRIPT)
    stock = python("script.py", "stock.json", cwd=folder)
    under = adopted("script.py", "run.json", cwd=folder)
    assert stock.code == under.code == 0, stock.err[-2000:] + under.err[-2000:]
    return {name: json.loads((folder / f"{name}.json").read_text()) for name in ("stock", "run")}


@pytest.mark.parametrize("habit", HABITS)
def test_run_accepts_what_stock_accepts(both: dict[str, dict[str, Any]], habit: str) -> None:
    """And gives the rows that stock gives where the classes and their order are the same."""
    stock, run = both["stock"][habit], both["run"][habit]
    assert stock["error"] is None, "the table is of what stock accepts"
    assert run["error"] is None
    assert len(run["rows"]) == len(stock["rows"]), "the script's own number of classes"
    if habit in RANDOM:
        assert run["warnings"], "as loud as stock"
    else:
        assert run["rows"] == stock["rows"]


def test_every_habit_of_the_script_is_in_the_table(both: dict[str, dict[str, Any]]) -> None:
    assert set(HABITS) == set(both["stock"]) and len(HABITS) > 20


@pytest.mark.parametrize("habit", sorted(RANDOM))
def test_a_head_that_starts_afresh_is_a_warning(both: dict[str, dict[str, Any]], habit: str) -> None:
    assert both["stock"][habit]["warnings"], "stock warns of it"
    assert any("keep the model's initial values" in text for text in both["run"][habit]["warnings"])


def test_rows_without_a_name_are_said(both: dict[str, dict[str, Any]]) -> None:
    (text,) = [t for t in both["run"]["one class too many"]["warnings"] if "no name" in t]
    assert text.startswith("five has 5 thing classes and the script's model 6, which stays: row 5 has no name.")
    assert "type --set MODEL.HEAD_ADAPT.TARGET_CLASSES five" in text
