"""Random loads of every form of file into several architectures: each tensor is what an oracle of its own says."""

from __future__ import annotations

from pathlib import Path

import pytest
import row_moves
import torch

from d2_headadapt.adapt.layouts import HeadLayout
from d2_headadapt.adapt.matching import ClassMap

LOADS = 28


def judged(folder: Path, count: int) -> list[dict[str, object]]:
    return [row_moves.judge(seed, str(folder)) for seed in range(count)]


def test_every_tensor_is_what_the_oracle_says(tmp_path: Path) -> None:
    found = judged(tmp_path, LOADS)
    assert {entry["kind"] for entry in found} == set(row_moves.KINDS)
    assert [entry for entry in found if "violation" in entry] == []
    assert list(tmp_path.glob("*.pth")) == []


rows, carried = HeadLayout.rows, ClassMap.carried.fget


def shifted(self: HeadLayout, classes: object, num_classes: int, axis: int | None = None) -> torch.Tensor:
    right = rows(self, classes, num_classes, axis)  # type: ignore[arg-type]
    return right.roll(1) if self.groups > 1 and num_classes % 2 else right


@pytest.mark.parametrize(
    ("owner", "name", "mutation"),
    [
        (HeadLayout, "rows", shifted),
        (HeadLayout, "read_as", lambda self, serves_all: self),
        (ClassMap, "carried", property(lambda self: carried(self)[:1])),
    ],
    ids=["anchors of one side by one row", "one class is not agnostic", "one class at most"],
)
def test_a_mutation_is_seen_by_the_oracle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: type, name: str, mutation: object
) -> None:
    monkeypatch.setattr(owner, name, mutation)
    # Up to the first that differs: not every table tells one mutation from the right rows.
    assert any("violation" in row_moves.judge(seed, str(tmp_path)) for seed in range(3 * LOADS))
