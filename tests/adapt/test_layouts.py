"""Layouts expand class indices to tensor rows, by brute force and by law."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.roi_heads import FastRCNNOutputLayers as Stock
from helpers.layouts import KINDS, axis_labels
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from d2_headadapt.adapt.layouts import HeadLayout
from d2_headadapt.adapt.registry import has_layout, layouts_of, register_head_layout, unregister_head_layout
from d2_headadapt.errors import LayoutError

kinds = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.tensor)


@kinds
@given(data=st.data())
def test_rows_are_those_of_the_classes_in_every_group(kind: HeadLayout, data: st.DataObject) -> None:
    num_classes = data.draw(st.integers(1, 9))
    classes = data.draw(st.permutations(range(num_classes)).map(lambda p: p[: max(1, num_classes // 2)]))
    for axis in kind.class_axes:
        labels = axis_labels(kind, axis, num_classes)
        assert kind.size(axis, num_classes) == len(labels)
        found = sorted(kind.rows(classes, num_classes, axis).tolist())
        assert found == [i for i, label in enumerate(labels) if isinstance(label, tuple) and label[0] in classes]
        fixed = kind.fixed_rows(num_classes, axis).tolist()
        assert fixed == [i for i, label in enumerate(labels) if not isinstance(label, tuple)]


@kinds
def test_num_classes_is_read_back_from_the_shape(kind: HeadLayout) -> None:
    for k in (1, 2, 80):
        shape = [kind.size(axis, k) if axis in kind.class_axes else 11 for axis in range(2)]
        assert kind.num_classes(shape) == k
        assert kind.fits(shape, k) and not kind.fits(shape, k + 1)


def test_a_shape_that_holds_no_whole_class_has_no_class_count() -> None:
    assert KINDS[1].num_classes((321, 16)) is None
    assert KINDS[0].num_classes((1, 16)) is None
    assert KINDS[5].num_classes((80, 7 + 79)) is None, "the two axes disagree"


@kinds
def test_plain_form_and_back(kind: HeadLayout) -> None:
    assert HeadLayout.from_json(json.loads(json.dumps(kind.to_json()))) == kind


def test_a_damaged_plain_form_is_refused() -> None:
    with pytest.raises(LayoutError, match="a stored layout: expected tensor, space, axes"):
        HeadLayout.from_json({"tensor": "x"})


class DetrHead(nn.Module):
    """Six decoder layers, K sigmoid rows each, as in Deformable DETR's ``class_embed``."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.class_embed = nn.ModuleList(nn.Linear(8, num_classes) for _ in range(6))
        self.bbox_embed = nn.Linear(8, 4)


@pytest.fixture
def detr_layout() -> object:
    for leaf in ("weight", "bias"):
        register_head_layout(f"class_embed.*.{leaf}", group="class_embed")
    yield
    for leaf in ("weight", "bias"):
        unregister_head_layout(f"class_embed.*.{leaf}")


def test_a_registered_pattern_describes_every_tensor_it_matches(detr_layout: object) -> None:
    layouts = layouts_of(DetrHead(91))
    assert [x.tensor for x in layouts] == [f"class_embed.{i}.{leaf}" for i in range(6) for leaf in ("weight", "bias")]
    assert {x.group for x in layouts} == {"class_embed"}


def test_a_registered_pattern_that_matches_nothing_is_an_error(detr_layout: object) -> None:
    with pytest.raises(LayoutError, match=r"register_head_layout\('class_embed.\*.weight'\): expected a pattern"):
        layouts_of(nn.Linear(3, 3))


def test_a_layout_that_does_not_describe_its_tensor_is_an_error() -> None:
    register_head_layout("weight", rows_per_class=4)
    try:
        with pytest.raises(LayoutError, match=r"layout of weight: .* found \(3, 5\)"):
            layouts_of(nn.Linear(5, 3))
    finally:
        unregister_head_layout("weight")


def test_a_module_class_needs_a_function_and_a_pattern_must_not_have_one() -> None:
    with pytest.raises(LayoutError, match="a module class without a function"):
        register_head_layout(nn.Linear)
    with pytest.raises(LayoutError, match="a pattern with a function"):
        register_head_layout("weight", lambda module, context: [])


def test_a_registered_module_class_covers_its_subclasses() -> None:
    class Mine(nn.Linear):
        pass

    class Yours(Mine):
        pass

    register_head_layout(Mine, lambda module, context: [HeadLayout(f"{context.name}.weight", "thing", "mine")])
    try:
        assert [x.tensor for x in layouts_of(nn.Sequential(Yours(2, 3), nn.Linear(2, 3)))] == ["0.weight"]
    finally:
        unregister_head_layout(Mine)


def test_a_module_may_declare_its_own_layouts() -> None:
    class Head(nn.Linear):
        def head_layouts(self, context: object) -> list[HeadLayout]:
            return [HeadLayout("1.weight", "thing", "own", extra=1)]

    (layout,) = layouts_of(nn.Sequential(nn.ReLU(), Head(2, 4)))
    assert layout.extra == 1 and layout.num_classes(torch.zeros(4, 2).shape) == 3


def test_a_projects_own_class_of_a_known_name_is_another_head() -> None:
    """TFA and DeFRCN have their own FastRCNNOutputLayers, with other attributes."""

    class FastRCNNOutputLayers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cls_score, self.bbox_pred = nn.Linear(4, 4), nn.Linear(4, 12)

    assert layouts_of(nn.ModuleDict({"box_predictor": FastRCNNOutputLayers()})) == ()


def test_a_subclass_that_lacks_what_a_layout_reads_is_another_head() -> None:
    class Bare(Stock):
        def __init__(self, **kwargs: Any) -> None:
            super().__init__(ShapeSpec(channels=4), **kwargs)
            del self.box2box_transform

    made = {"box2box_transform": Box2BoxTransform((10.0, 10.0, 5.0, 5.0)), "num_classes": 3}
    assert has_layout(Bare) and layouts_of(nn.ModuleDict({"box_predictor": Bare(**made)})) == ()
    assert len(layouts_of(nn.ModuleDict({"box_predictor": Stock(ShapeSpec(channels=4), **made)}))) == 4


@pytest.mark.parametrize("how", ["registered", "declared"])
def test_a_layout_function_that_raises_is_named(how: str) -> None:
    class Head(nn.Linear):
        pass

    def broken(module: nn.Module, context: object) -> list[HeadLayout]:
        return [HeadLayout(str(module.nothing), "thing", "own")]

    if how == "declared":
        Head.head_layouts = broken  # type: ignore[attr-defined]
    else:
        register_head_layout(Head, broken)
    try:
        with pytest.raises(LayoutError, match=r"layout of 0, .*Head: .*no attribute 'nothing' \(line \d+ of .*Correct"):
            layouts_of(nn.Sequential(Head(2, 4)))
    finally:
        unregister_head_layout(Head)
