"""What a file says about itself: plain types, kept as found, refused where a newer version or damage speaks."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from helpers.models import model_of, names

from d2_headadapt import ClassTable, layouts_of
from d2_headadapt.checkpoint.provenance import KEY, VERSION, Provenance, optimizer_names
from d2_headadapt.errors import CheckpointFileError


@pytest.fixture(scope="module")
def provenance() -> Provenance:
    model = model_of(names(3))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    return Provenance(
        {"thing": ClassTable(names(3))},
        layouts_of(model),
        optimizer_names(optimizer, dict(model.named_parameters())),
        {"thing": ("class 1",)},
    )


def test_it_comes_back_as_it_was_written(provenance: Provenance) -> None:
    back = Provenance.from_plain(provenance.to_plain(), "f.pth")
    assert back.tables == provenance.tables
    assert back.untrained == {"thing": ("class 1",)}
    assert back.optimizer == provenance.optimizer
    assert all(one.same_kind(other) for one, other in zip(back.layouts, provenance.layouts, strict=True))
    assert back.to_plain() == provenance.to_plain()


def test_it_is_plain(provenance: Provenance, tmp_path) -> None:
    """JSON and weights-only loading take it: no tuple, numpy scalar or dataclass."""
    plain = provenance.to_plain()
    assert json.loads(json.dumps(plain)) == plain
    torch.save({KEY: plain}, tmp_path / "p.pth")
    assert torch.load(tmp_path / "p.pth", weights_only=True)[KEY] == plain


def test_keys_of_the_future_are_kept() -> None:
    """A later version of this package that stays at version 1 loses nothing on its way through this one."""
    back = Provenance.from_plain({"version": 1, "tables": {}, "extra": {"a": 1}, "teacher": "x"}, "f.pth")
    assert back.extra == {"a": 1, "teacher": "x"}
    assert back.to_plain()["extra"] == {"a": 1, "teacher": "x"}


def test_a_higher_version_is_refused_by_name() -> None:
    with pytest.raises(CheckpointFileError, match=rf"f.pth, entry 'd2_headadapt': .*version {VERSION + 1}.*Upgrade"):
        Provenance.from_plain({"version": VERSION + 1}, "f.pth")


@pytest.mark.parametrize(
    "data",
    [
        None,
        5,
        [],
        {},
        {"version": "1"},
        {"version": 1, "tables": ["cat"]},
        {"version": 1, "tables": {"thing": "cat"}},
        {"version": 1, "tables": {"thing": []}},
        {"version": 1, "tables": {"thing": ["cat", "cat"]}},
        {"version": 1, "layouts": ["x"]},
        {"version": 1, "layouts": [{"tensor": "x"}]},
        {"version": 1, "layouts": 3},
        {"version": 1, "optimizer": 3},
        {"version": 1, "extra": ["abc"]},
        {"version": 1, "extra": {"untrained": ["abc"]}},
    ],
)
def test_a_damaged_entry_is_one_error_that_names_the_file(data: Any) -> None:
    with pytest.raises(CheckpointFileError, match=r"f.pth, entry 'd2_headadapt': expected"):
        Provenance.from_plain(data, "f.pth")


def test_optimizer_names_follow_its_groups() -> None:
    a, b, c = (torch.nn.Parameter(torch.zeros(1)) for _ in range(3))
    optimizer = torch.optim.SGD([{"params": [c]}, {"params": [a, b]}], 0.1)
    assert optimizer_names(optimizer, {"x.a": a, "x.b": b}) == (("",), ("x.a", "x.b"))
