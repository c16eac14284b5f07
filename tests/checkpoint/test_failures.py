"""A failure injected at every step of a load leaves model, optimizer and files as they were, and poisons nothing."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.models import model_of, same_bits, state_of

from d2_headadapt import HeadAdaptCheckpointer
from d2_headadapt.adapt.plan import AdaptPlan
from d2_headadapt.checkpoint import checkpointer as room
from d2_headadapt.checkpoint import load as load_room

OLD, NEW = ["cat", "dog", "cow"], ["cow", "owl"]
STEPS = [
    "readable_everywhere",
    "read_checkpoint",
    "settle_checkpoint",
    "plan_checkpoint",
    "plan_table",
    "refuse_plan",
    "verify_tensors",
    "apply",
    "adapt_averages",
    "agree",
    "untrained_classes",
    "load_state_dict",
]
# Steps that only a resume has, or that come after the model is written to, where one process alone has nothing to do.
RESUME_STEPS = ["adapt_resume", "share_new_rows", "compare"]


class Broken(Exception):
    """No user mistake: what a bug or a full disk would raise."""


def boom(*args: Any, **kwargs: Any) -> Any:
    raise Broken


def step(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()


@pytest.fixture
def saved(tmp_path: Path) -> str:
    model = model_of(OLD, seed=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    step(model, optimizer)
    HeadAdaptCheckpointer(model, str(tmp_path), optimizer=optimizer).save("model")
    return str(tmp_path / "model.pth")


def fresh(folder: Path) -> tuple[torch.nn.Module, torch.optim.Optimizer, HeadAdaptCheckpointer]:
    model = model_of(NEW, seed=2, RESUME="adapt")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    step(model, optimizer)
    return model, optimizer, HeadAdaptCheckpointer(model, str(folder), optimizer=optimizer)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize(
    ("name", "resumes"), [*((name, True) for name in STEPS + RESUME_STEPS), *((name, False) for name in STEPS)]
)
def test_a_failure_at_any_step_leaves_everything_as_it_was(
    saved: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, resumes: bool
) -> None:
    model, optimizer, checkpointer = fresh(tmp_path)
    weights, moments, on_disk = state_of(model), copy.deepcopy(optimizer.state_dict()), files(tmp_path)
    with monkeypatch.context() as patch:
        if name == "apply":
            patch.setattr(AdaptPlan, "apply", boom)
        elif name == "load_state_dict":
            patch.setattr(type(model), "load_state_dict", boom)
        else:
            patch.setattr(load_room if hasattr(load_room, name) else room, name, boom)
        with pytest.raises(Broken):
            checkpointer.load(saved, checkpointables=None if resumes else [])
    assert same_bits(state_of(model), weights)
    now = optimizer.state_dict()
    assert now["param_groups"] == moments["param_groups"] and now["state"].keys() == moments["state"].keys()
    for number, entry in moments["state"].items():
        assert torch.equal(now["state"][number]["momentum_buffer"], entry["momentum_buffer"])
    left = files(tmp_path)
    left.pop("head_adapt_plan.json", None)
    assert left == on_disk
    checkpointer.load(saved, checkpointables=None if resumes else [])
    row = model.roi_heads.box_predictor.cls_score.weight[0]
    assert torch.equal(row, torch.load(saved)["model"]["roi_heads.box_predictor.cls_score.weight"][2])


def test_mutation_without_the_copy_a_late_failure_is_seen(
    saved: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _, checkpointer = fresh(tmp_path)
    weights = state_of(model)
    monkeypatch.setattr(room, "compare", boom)
    monkeypatch.setattr(HeadAdaptCheckpointer, "_as_it_was", room.contextmanager(lambda self: (yield)))
    with pytest.raises(Broken):
        checkpointer.load(saved)
    assert not same_bits(state_of(model), weights)
