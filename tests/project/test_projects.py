"""``tools/projects.py``: what it counts as right, and that the page is about the commits that it names."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest
import torch
from helpers.commands import ROOT


@pytest.fixture
def projects(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    return importlib.import_module("projects")


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([3, None, 0, 5], "3 of 3 (class 3, class 0, background)"),
        ([0, 1, 2, 5], "1 of 3 (background)"),  # By position, as stock loads a head of equal size.
        ([3, None, 0, None], "2 of 3 (class 3, class 0)"),
        ([None, None, None, None], "0 of 3 (the head starts afresh)"),
    ],
)
def test_a_row_is_right_where_it_is_that_of_its_class(
    projects: ModuleType, tmp_path: Path, rows: list[int | None], words: str
) -> None:
    old = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    new = torch.stack([torch.zeros(4) if row is None else old[row] for row in rows])
    (tmp_path / "out").mkdir()
    for path, value in (("old.pth", old), ("out/model_final.pth", new)):
        torch.save({"model": {projects.CLS: value}}, tmp_path / path)
    assert projects.rows_in_words(tmp_path) == words


def test_the_page_names_every_project_and_its_commit(projects: ModuleType) -> None:
    page = (ROOT / "docs" / "projects.md").read_text()
    assert len(projects.PROJECTS) >= 3
    for project in projects.PROJECTS:
        assert project.name in page and project.commit in page
