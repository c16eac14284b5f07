"""Heads that never train are named after the first iteration, with the reason, whatever the model."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from detectron2.engine import SimpleTrainer
from helpers.commands import fresh_loggers
from helpers.datasets import write_coco
from helpers.files import logged
from helpers.models import batch, stock_model, tiny_cfg
from torch import nn

from d2_headadapt import Trainer
from d2_headadapt.adapt.classes import ClassTable
from d2_headadapt.data.datasets import register_datasets
from d2_headadapt.data.task_spec import TaskSpec
from d2_headadapt.engine import gradient_watch as watching
from d2_headadapt.engine.gradient_watch import NEVER_CALLED, NO_LABEL, NO_LOSS, ZERO, ZERO_WEIGHT, UntrainedHeads
from d2_headadapt.modeling.task_heads import TaskHeads

COLOUR = TaskSpec("colour", "image", ClassTable(["red", "green"]))
SHAPE = TaskSpec("shape", "image", ClassTable(["round", "square"]))


class Net(nn.Module):
    """A body, a head with a loss of its own, and two tasks. A batch is the labels of each task."""

    def __init__(self, *specs: TaskSpec) -> None:
        super().__init__()
        self.backbone = nn.Linear(4, 4)
        self.head = nn.Linear(4, 2)
        self.heads = TaskHeads(4, specs)

    def forward(self, labels: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        x = self.backbone(torch.ones(2, 4))
        return {"loss_head": self.head(x).square().sum(), **self.heads.losses(self.heads(x), labels)}


def train(model: nn.Module, batches: Sequence[Any], specs: Sequence[TaskSpec] = (), recheck: int = 100) -> list[str]:
    """Train on the batches; what was said, with its level, and the iteration before which it was."""
    trainer = SimpleTrainer(model, list(batches), torch.optim.SGD(model.parameters(), lr=0.01, weight_decay=0.1))
    trainer.register_hooks([UntrainedHeads(specs, recheck)])
    with logged("d2_headadapt") as records:
        trainer.train(0, len(batches))
    assert not any(module._forward_hooks for module in model.modules()), "nothing is left behind"
    return [f"{record.levelname} {record.getMessage()}" for record in records]


def labels(colour: int = 0, shape: int = 0) -> dict[str, torch.Tensor]:
    return {"colour": torch.full((2,), colour), "shape": torch.full((2,), shape)}


def test_a_model_whose_every_head_trains_is_left_in_peace() -> None:
    assert train(Net(COLOUR, SHAPE), [labels()] * 3, [COLOUR, SHAPE]) == []


def test_a_head_that_nothing_calls_is_named_once_with_its_parameters() -> None:
    model = Net(COLOUR)
    model.classifier_artist = nn.Linear(4, 129)
    (line,) = train(model, [labels()] * 4, recheck=2)
    assert line == (
        f"WARNING classifier_artist got no gradient in iteration 1: {NEVER_CALLED}. "
        "Parameters: classifier_artist.weight, classifier_artist.bias."
    )


def test_of_a_deep_head_that_nothing_calls_the_outermost_module_is_named() -> None:
    class Listed(Net):
        def forward(self, labels: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            # A list is never called itself, though its first member is.
            return {**super().forward(labels), "loss_more": self.more[0](torch.ones(2, 4)).sum()}

    model = Listed(COLOUR)
    model.more = nn.ModuleList([nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))])
    (line,) = train(model, [labels()])
    assert line.startswith("WARNING more.1 got no gradient") and "more.1.0.weight" in line and "more.1.1.bias" in line


def test_a_head_whose_output_nobody_uses_is_told_apart() -> None:
    class Idle(Net):
        def forward(self, labels: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            self.unused(torch.ones(2, 4))
            return super().forward(labels)

    model = Idle(COLOUR)
    model.unused = nn.Linear(4, 2)
    (line,) = train(model, [labels()])
    assert line.startswith(f"WARNING unused got no gradient in iteration 1: {NO_LOSS}.")


def test_what_is_frozen_on_purpose_or_is_the_body_is_not_named() -> None:
    model = Net(COLOUR)
    model.frozen = nn.Linear(4, 2).requires_grad_(False)
    model.backbone.unused = nn.Linear(4, 2)
    assert train(model, [labels()]) == []


def test_a_task_without_a_label_is_looked_at_again_until_one_comes() -> None:
    batches = [labels(shape=-1), labels(shape=-1), labels(), labels(shape=-1)]
    first, second = train(Net(COLOUR, SHAPE), batches, [COLOUR, SHAPE])
    assert first.startswith(f"WARNING Task shape (heads.shape) got no gradient in iteration 1: {NO_LABEL}.")
    assert first.endswith("It is looked at again until iteration 4.")
    assert second == "INFO First gradient in iteration 3: heads.shape.predictor.bias, heads.shape.predictor.weight"


@pytest.mark.parametrize(("recheck", "said"), [(2, 2), (100, 4)])
def test_a_task_that_never_has_a_label_is_named_again_at_the_end(recheck: int, said: int) -> None:
    first, last = train(Net(COLOUR, SHAPE), [labels(shape=-1)] * 4, [COLOUR, SHAPE], recheck)
    assert f"until iteration {said}." in first
    assert last.startswith(f"WARNING Task shape (heads.shape) got no gradient in {said} iterations: {NO_LABEL}.")


def test_a_task_of_no_weight_and_one_without_a_head_have_reasons_of_their_own() -> None:
    idle = TaskSpec("colour", "image", ClassTable(["red", "green"]), loss_weight=0.0)
    lines = train(Net(idle), [labels()], [idle, SHAPE])
    assert lines[0].startswith(f"WARNING Task colour (heads.colour) got no gradient in iteration 1: {ZERO_WEIGHT}.")
    assert lines[1].startswith("WARNING Task shape got no gradient in iteration 1: the model has no head for it")
    assert "HeadAdaptROIHeads" in lines[1] and "MultiTaskClassifier" in lines[1]


def test_with_several_processes_it_says_what_ddp_will_do(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Net(COLOUR, SHAPE)
    model.spare = nn.Linear(4, 2)
    monkeypatch.setattr(watching, "comm", SimpleNamespace(get_world_size=lambda: 2))
    lines = {line.split(" got ")[0]: line for line in train(model, [labels(shape=-1)])}
    assert "Expected to have finished reduction" in lines["WARNING spare"]
    assert "Expected to have finished" not in lines["WARNING Task shape (heads.shape)"], "a graph of zeros is no harm"


def test_later_iterations_look_at_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is settled costs nothing: no gradient is read after the first iteration."""
    model, looked = Net(COLOUR), []
    hook = UntrainedHeads([COLOUR])
    trainer = SimpleTrainer(model, [labels()] * 5, torch.optim.SGD(model.parameters(), lr=0.01))
    trainer.register_hooks([hook])
    stock = torch.Tensor.any
    monkeypatch.setattr(
        torch.Tensor, "any", lambda self, *a, **k: (looked.append(trainer.iter), stock(self, *a, **k))[1]
    )
    # The losses of tasks ask for known labels with any() too: once for each task and iteration.
    trainer.train(0, 5)
    outside = [looked.count(i) for i in range(5)]
    assert outside[0] == 1 + 4 and outside[1:] == [1] * 4


def test_watching_changes_no_bit() -> None:
    def trained(hooks: Sequence[UntrainedHeads]) -> list[torch.Tensor]:
        torch.manual_seed(0)
        model = Net(COLOUR, SHAPE)
        trainer = SimpleTrainer(model, [labels()] * 3, torch.optim.SGD(model.parameters(), lr=0.01))
        trainer.register_hooks(list(hooks))
        trainer.train(0, 3)
        return [torch.rand(1), *model.parameters()]

    watched, alone = trained([UntrainedHeads([COLOUR])]), trained([])
    assert all(torch.equal(a, b) for a, b in zip(watched, alone, strict=True))


# ------------------------------------------------------------------------------------------------- detectron2's models


def test_a_stock_detector_trains_whole_and_without_objects_it_is_told_so() -> None:
    model = stock_model(5, masks=True)
    full = batch(5, masks=True)
    assert train(model, [full]) == []
    empty = [{**one, "instances": one["instances"][:0]} for one in full]
    lines = train(stock_model(5, masks=True), [empty, full])
    named = {line.split(" got ")[0] for line in lines if line.startswith("WARNING")}
    assert "WARNING roi_heads.box_predictor.bbox_pred" in named
    assert all(ZERO in line for line in lines if line.startswith("WARNING"))
    assert "INFO First gradient in iteration 2" in lines[-1], "all of them train with the second batch"


@pytest.fixture
def dataset(tmp_path: Path) -> Iterator[str]:
    write_coco(tmp_path, ["cat", "dog", "emu"], name="data")
    entry = {"name": "d2ha_watched", "json": str(tmp_path / "data.json"), "images": str(tmp_path / "data")}
    register_datasets([entry])
    with fresh_loggers():
        yield "d2ha_watched"


def test_the_trainer_watches_any_model(dataset: str, tmp_path: Path) -> None:
    """A stock ``GeneralizedRCNN`` with the head of a user that nothing calls."""

    class Users(Trainer):
        @classmethod
        def build_model(cls, cfg: Any) -> nn.Module:
            model = super().build_model(cfg)
            model.classifier_artist = nn.Linear(8, 129)
            return model

    cfg = tiny_cfg(num_classes=3, masks=False, ours=False)
    cfg.OUTPUT_DIR = str(tmp_path / "out")
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = (dataset,), ()
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MAX_SIZE_TRAIN = (64,), 64
    cfg.DATALOADER.NUM_WORKERS = 0
    cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.MAX_ITER, cfg.SOLVER.BASE_LR = 2, 2, 1e-4
    trainer = Users(cfg)
    with logged("d2_headadapt.engine.gradient_watch") as records:
        trainer.train()
    (line,) = [record.getMessage() for record in records if record.levelno >= logging.WARNING]
    assert line.startswith(f"classifier_artist got no gradient in iteration 1: {NEVER_CALLED}.")
