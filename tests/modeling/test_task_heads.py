"""Declaring tasks in a yaml, and the heads that come of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from torch import nn

from d2_headadapt.adapt.classes import ClassTable
from d2_headadapt.adapt.registry import layouts_of
from d2_headadapt.config.settings import AdaptSettings
from d2_headadapt.data.task_labels import MISSING
from d2_headadapt.data.task_spec import TaskSpec, task_specs
from d2_headadapt.errors import ConfigError
from d2_headadapt.modeling.task_heads import TaskHead, TaskHeads
from d2_headadapt.setup.yaml import load_config

YAML = """
MODEL:
  TASKS:
    colour: {on: box, classes: [red, green]}
    type: {"on": image, classes: [a, b, c], kind: multi, source_classes: [b, a]}
"""


def config(tmp_path: Path, text: str = YAML, opts: tuple[str, ...] = ()) -> CfgNode:
    (tmp_path / "tasks.yaml").write_text(f"{text}\nVERSION: 2\n")
    return load_config(str(tmp_path / "tasks.yaml"), opts)


def spec(kind: str = "single", classes: int = 3, **keys: Any) -> TaskSpec:
    return TaskSpec("colour", "box", ClassTable([f"c{i}" for i in range(classes)], origin="test"), kind, **keys)


def test_a_few_lines_of_yaml_declare_tasks(tmp_path: Path) -> None:
    colour, kind = task_specs(config(tmp_path))
    assert (colour.name, colour.on, colour.kind, colour.table.names) == ("colour", "box", "single", ("red", "green"))
    assert (kind.name, kind.on, kind.multi, kind.table.names) == ("type", "image", True, ("a", "b", "c"))
    assert [task.name for task in task_specs(config(tmp_path), on="image")] == ["type"]


def test_every_task_is_a_label_space_of_its_own(tmp_path: Path) -> None:
    settings = AdaptSettings.from_config(config(tmp_path))
    assert {space: table.names for space, table in settings.target.items()} == {
        "colour": ("red", "green"),
        "type": ("a", "b", "c"),
    }
    assert {space: table.names for space, table in settings.source.items()} == {"type": ("b", "a")}
    none = config(tmp_path, opts=("MODEL.TASKS.colour.source_classes", "none"))
    assert AdaptSettings.from_config(none).initialise == {"colour"}


def test_a_command_line_sets_keys_that_the_yaml_leaves_out(tmp_path: Path) -> None:
    (colour, _) = task_specs(config(tmp_path, opts=("MODEL.TASKS.colour.hidden", "8")))
    assert colour.hidden == 8
    with pytest.raises(ConfigError, match="hiden"):
        config(tmp_path, opts=("MODEL.TASKS.colour.hiden", "8"))


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ("thing: {on: box, classes: [a]}", "MODEL.TASKS.thing: expected a task name"),
        ("a-b: {on: box, classes: [a]}", "MODEL.TASKS.a-b: expected a task name"),
        ("colour: 3", "MODEL.TASKS.colour: expected a mapping"),
        ("colour: {on: pixel, classes: [a]}", "MODEL.TASKS.colour.on: expected image or box, found 'pixel'"),
        ("colour: {classes: [a]}", "MODEL.TASKS.colour.on: expected image or box, found None"),
        ("colour: {on: box, classes: [a], kind: both}", "colour.kind: expected single or multi, found 'both'"),
        ("colour: {on: box, classes: [a], hiden: 3}", "colour.hiden: .*Nearest: 'hidden'"),
        ("colour: {on: box, classes: [a], loss_weight: -1}", "colour.loss_weight: expected a number from 0"),
        ("colour: {on: box, classes: [a, b], class_weights: [1]}", "colour.class_weights: expected balanced, or 2"),
        ("colour: {on: box}", "colour.classes: expected the classes of the task, found none"),
    ],
)
def test_a_task_that_cannot_be_used_says_what_to_type(task: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        task_specs(config(tmp_path, f"MODEL:\n  TASKS:\n    {task}"), required=True)


def test_missing_labels_count_for_nothing() -> None:
    torch.manual_seed(0)
    head, x = TaskHead(4, spec()), torch.randn(5, 4)
    labels = torch.tensor([0, MISSING, 2, MISSING, 1])
    logits = head(x)
    expected = F.cross_entropy(logits[[0, 2, 4]], labels[[0, 2, 4]])
    assert torch.allclose(head.loss(logits, labels), expected)
    multi = TaskHead(4, spec("multi"))
    targets = torch.tensor([[1.0, 0, MISSING]] * 5)
    expected = F.binary_cross_entropy_with_logits(multi(x)[:, :2], targets[:, :2])
    assert torch.allclose(multi.loss(multi(x), targets), expected)


@pytest.mark.parametrize("kind", ["single", "multi"])
def test_without_a_label_the_loss_is_zero_and_has_a_graph(kind: str) -> None:
    heads = TaskHeads(4, [spec(kind)])
    (loss,) = heads.losses(heads(torch.randn(5, 4)), {}).values()
    loss.backward()
    assert float(loss) == 0
    assert all(p.grad is not None and float(p.grad.abs().max()) == 0 for p in heads.parameters())


def test_class_weights_and_focal_exponents_are_the_textbook_ones() -> None:
    torch.manual_seed(0)
    x, labels = torch.randn(6, 4), torch.tensor([0, 1, 2, 0, 1, 2])
    head = TaskHead(4, spec(class_weights=(1.0, 2.0, 0.5)))
    assert torch.allclose(
        head.loss(head(x), labels), F.cross_entropy(head(x), labels, weight=torch.tensor([1, 2, 0.5]))
    )
    assert "class_weights" not in head.state_dict(), "they belong to the data"
    focal = TaskHead(4, spec(focal_gamma=2.0))
    p = focal(x).softmax(1).gather(1, labels[:, None])[:, 0]
    assert torch.allclose(focal.loss(focal(x), labels), (-((1 - p) ** 2) * p.log()).mean(), atol=1e-6)


def test_names_of_modules_and_layouts() -> None:
    heads = TaskHeads(4, [spec(hidden=6), TaskSpec("type", "box", ClassTable(["a", "b"], origin="test"))])
    holder = nn.ModuleDict({"tasks": heads})
    assert [(layout.tensor, layout.space) for layout in layouts_of(holder)] == [
        ("tasks.colour.predictor.weight", "colour"),
        ("tasks.colour.predictor.bias", "colour"),
        ("tasks.type_.predictor.weight", "type"),
        ("tasks.type_.predictor.bias", "type"),
    ]
    assert heads["type"] is heads.type_ and len(heads) == 2
    assert {name: tuple(value.shape) for name, value in heads(torch.zeros(3, 4)).items()} == {
        "colour": (3, 3),
        "type": (3, 2),
    }
