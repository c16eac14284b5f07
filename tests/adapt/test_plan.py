"""A plan as data: JSON both ways, summary, coverage, and what ``apply`` refuses."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from d2_headadapt.adapt.classes import ClassTable
from d2_headadapt.adapt.layouts import HeadLayout
from d2_headadapt.adapt.plan import ACTIONS, AdaptPlan
from d2_headadapt.adapt.planner import plan_adaptation
from d2_headadapt.adapt.report import plan_json, plan_table, summary_line
from d2_headadapt.errors import PlanRefused

SOURCE = ClassTable(["cat", "dog", "cow", "pig"], "the old list")
TARGET = ClassTable(["pig", "owl", "cat"], "the new list")
LAYOUTS = (
    HeadLayout("heads.cls_score.weight", "thing", "heads", "box", extra=1),
    HeadLayout("heads.cls_score.bias", "thing", "heads", "box", extra=1),
    HeadLayout("heads.bbox_pred.weight", "thing", "heads", "box", rows_per_class=4),
    HeadLayout("heads.bbox_pred.bias", "thing", "heads", "box", rows_per_class=4),
)


def state(k: int, seed: int) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {
        "backbone.conv": torch.randn(3, 3, generator=g),
        "heads.cls_score.weight": torch.randn(k + 1, 5, generator=g),
        "heads.cls_score.bias": torch.randn(k + 1, generator=g),
        "heads.bbox_pred.weight": torch.randn(4 * k, 5, generator=g),
        "heads.bbox_pred.bias": torch.randn(4 * k, generator=g),
    }


def shapes(tensors: dict[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in tensors.items()}


@pytest.fixture
def plan() -> AdaptPlan:
    file_shapes = {**shapes(state(4, 0)), "old.thing": (2,)}
    model_shapes = {**shapes(state(3, 1)), "backbone.new": (7,)}
    return plan_adaptation(
        file_shapes, model_shapes, LAYOUTS, source_tables={"thing": SOURCE}, target_tables={"thing": TARGET}
    )


def test_the_json_has_the_promised_keys_and_plain_types(plan: AdaptPlan) -> None:
    data: dict[str, Any] = json.loads(plan_json(plan))
    assert data["version"] == 1
    assert data["source"] == {"thing": list(SOURCE.names)} and data["target"] == {"thing": list(TARGET.names)}
    keys = ["name", "action", "space", "group", "source_shape", "target_shape", "carried", "new", "dropped",
            "background", "verified", "cause", "facts", "reason"]  # fmt: skip
    assert all(list(t) == keys and t["action"] in ACTIONS for t in data["tensors"])
    scores = next(t for t in data["tensors"] if t["name"] == "heads.cls_score.weight")
    assert scores["carried"] == [[0, 3], [2, 0]] and scores["new"] == [1] and scores["dropped"] == [1, 2]
    assert scores["background"] is True and scores["verified"] is True
    assert data["summary"] == {
        "actions": {"copied": 1, "carried": 4, "initialised": 0, "kept": 1, "dropped": 1, "refused": 0},
        "groups": {"heads": {"carried": 4}},
        "classes": {"thing": {"carried": 2, "new": 1, "dropped": 2}},
    }


def test_a_plan_read_back_is_the_same_and_applies_the_same(plan: AdaptPlan) -> None:
    again = AdaptPlan.from_json(plan_json(plan))
    assert again == plan and again.to_json() == plan.to_json()
    assert summary_line(again) == summary_line(plan) and plan_table(again) == plan_table(plan)
    file, model = {**state(4, 0), "old.thing": torch.zeros(2)}, {**state(3, 1), "backbone.new": torch.ones(7)}
    one, two = plan.apply(file, model), again.apply(file, model)
    assert one.keys() == two.keys() == model.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_plan_of_a_higher_version_is_refused_by_name(plan: AdaptPlan) -> None:
    with pytest.raises(PlanRefused, match=r"expected version 1, found version 2\. Upgrade"):
        AdaptPlan.from_json({**plan.to_json(), "version": 2})
    with pytest.raises(PlanRefused, match="expected the JSON that `d2-headadapt plan --json` writes"):
        AdaptPlan.from_json("{}")


def test_apply_leaves_both_inputs_as_they_were(plan: AdaptPlan) -> None:
    file, model = {**state(4, 0), "old.thing": torch.zeros(2)}, {**state(3, 1), "backbone.new": torch.ones(7)}
    before = [{k: v.clone() for k, v in d.items()} for d in (file, model)]
    out = plan.apply(file, model)
    for kept, now in zip(before, (file, model), strict=True):
        assert kept.keys() == now.keys() and all(torch.equal(kept[k], now[k]) for k in kept)
    assert torch.equal(out["backbone.new"], torch.ones(7)) and torch.equal(out["backbone.conv"], file["backbone.conv"])
    new_row = TARGET.names.index("owl")
    assert torch.equal(out["heads.cls_score.weight"][new_row], model["heads.cls_score.weight"][new_row])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_broken_number_in_a_carried_row_refuses_the_whole_load(plan: AdaptPlan, bad: float) -> None:
    file, model = {**state(4, 0), "old.thing": torch.zeros(2)}, {**state(3, 1), "backbone.new": torch.ones(7)}
    file["heads.bbox_pred.weight"][4 * SOURCE.names.index("pig") + 2, 1] = bad
    with pytest.raises(
        PlanRefused, match=r"heads.bbox_pred.weight: .* 1 NaN or infinite values of 80 in the rows of pig"
    ):
        plan.apply(file, model)


def test_a_broken_background_row_refuses_too(plan: AdaptPlan) -> None:
    file, model = {**state(4, 0), "old.thing": torch.zeros(2)}, {**state(3, 1), "backbone.new": torch.ones(7)}
    file["heads.cls_score.bias"][4] = float("nan")
    with pytest.raises(PlanRefused, match="in the rows of background"):
        plan.apply(file, model)


def test_a_broken_number_in_a_dropped_row_harms_nobody(plan: AdaptPlan) -> None:
    file, model = {**state(4, 0), "old.thing": torch.zeros(2)}, {**state(3, 1), "backbone.new": torch.ones(7)}
    file["heads.cls_score.weight"][SOURCE.names.index("dog"), 1] = float("nan")
    assert torch.isfinite(plan.apply(file, model)["heads.cls_score.weight"]).all()


def test_large_finite_values_are_not_mistaken_for_broken_ones(plan: AdaptPlan) -> None:
    """Their sum overflows; each of them is finite."""
    file, model = {**state(4, 0), "old.thing": torch.zeros(2)}, {**state(3, 1), "backbone.new": torch.ones(7)}
    file["backbone.conv"].fill_(3e38)
    assert torch.equal(plan.apply(file, model)["backbone.conv"], file["backbone.conv"])


def test_coverage_counts_the_files_tensors_by_submodule(plan: AdaptPlan) -> None:
    assert plan.coverage == pytest.approx(5 / 6)
    assert plan.coverage_by_submodule() == {"backbone": (1, 1), "heads": (4, 4), "old": (0, 1)}


def test_the_report_names_classes_not_numbers(plan: AdaptPlan) -> None:
    assert summary_line(plan) == (
        "2 of 3 thing classes carried from the old list (4), 1 new (owl), 2 dropped; "
        "tensors: 1 copied, 4 carried, 1 kept, 1 dropped"
    )
    table = plan_table(plan)
    for expected in ("(5, 5)", "(4, 5)", "background carried", "thing classes that are new: owl", "not in the file"):
        assert expected in table
