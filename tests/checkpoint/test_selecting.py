"""Patterns on tensor names: each does what it says, and one that matches nothing is an error with the nearest names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.layers import FrozenBatchNorm2d
from helpers.models import model_of, state_of
from torch import nn

from d2_headadapt import AdaptPlan, Cause, HeadAdaptCheckpointer, Why
from d2_headadapt.checkpoint.keys import freeze, left_out, matched, rename
from d2_headadapt.errors import ConfigError

NAMES = ["backbone.conv1.weight", "backbone.conv1.bias", "heads.cls_score.weight"]


def test_rename_rules_apply_in_their_order() -> None:
    tensors = dict.fromkeys(["enc.conv1.weight", "enc.fc.weight"], 1)
    assert list(rename(tensors, [r"^enc\.=backbone.", r"\.fc\.=.linear."])) == [
        "backbone.conv1.weight",
        "backbone.linear.weight",
    ]
    assert list(tensors) == ["enc.conv1.weight", "enc.fc.weight"]


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("nonsense", "expected 'regex=replacement', found 'nonsense'"),
        ("=x", "expected 'regex=replacement'"),
        ("(=x", "expected a regular expression"),
        (r"a=\3", "expected a regular expression"),
        (r"^backbon\.=x.", "expected a pattern that matches one of 3 names, found none"),
        (r"conv1\.(weight|bias)=x", "expected a name of its own for every tensor, found backbone.x for"),
    ],
)
def test_a_rename_rule_that_is_none_is_refused(rule: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        rename(dict.fromkeys(NAMES, 1), [rule])
    assert "MODEL.HEAD_ADAPT.RENAME" in str(caught.value) and caught.value.exit_code == 1


def test_include_and_exclude() -> None:
    assert left_out(NAMES, [], []) == {}
    assert list(left_out(NAMES, ["backbone.*"], [])) == ["heads.cls_score.weight"]
    assert left_out(NAMES, ["backbone.*"], ["*.bias"]) == {
        "heads.cls_score.weight": Why(Cause.NOT_INCLUDED, key="MODEL.HEAD_ADAPT.INCLUDE"),
        "backbone.conv1.bias": Why(Cause.EXCLUDED, key="MODEL.HEAD_ADAPT.EXCLUDE"),
    }


def test_a_pattern_that_matches_nothing_lists_the_nearest_names() -> None:
    with pytest.raises(ConfigError, match=r"Nearest: 'heads.cls_score.weight'"):
        matched(NAMES, ["heads.cls_scores.weight"], "MODEL.HEAD_ADAPT.EXCLUDE")


def test_frozen_parameters_are_not_trained_and_their_batch_norm_keeps_its_statistics() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1), nn.BatchNorm2d(2)).train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    assert freeze(net, ["0.*", "1.*"]) == ["0.weight", "0.bias", "1.weight", "1.bias"]
    assert isinstance(net[1], FrozenBatchNorm2d) and isinstance(net[3], nn.BatchNorm2d)
    net(torch.randn(2, 3, 5, 5) + 3).sum().backward()
    assert [name for name, p in net.named_parameters() if p.grad is not None] == [
        "2.weight",
        "2.bias",
        "3.weight",
        "3.bias",
    ]
    assert torch.equal(net[1].running_mean, before["1.running_mean"])
    assert not torch.equal(net[3].running_mean, before["3.running_mean"])


def test_freezing_nothing_changes_nothing_and_a_dead_pattern_is_an_error() -> None:
    net = nn.Sequential(nn.Linear(2, 2))
    assert freeze(net, []) == []
    with pytest.raises(ConfigError, match=r"MODEL.HEAD_ADAPT.FREEZE, 'backbone.\*'"):
        freeze(net, ["backbone.*"])
    assert all(p.requires_grad for p in net.parameters())


HEAD = "roi_heads.box_predictor"
OLD, NEW = ["cat", "dog", "cow"], ["cow", "owl"]


def loaded(tmp_path: Path, **keys: Any) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], AdaptPlan]:
    """File, model after the load, and the plan, for keys under ``MODEL.HEAD_ADAPT``."""
    source = model_of(OLD, seed=1)
    HeadAdaptCheckpointer(source, str(tmp_path)).save("model")
    checkpointer = HeadAdaptCheckpointer(model_of(NEW, seed=2, **keys))
    checkpointer.load(str(tmp_path / "model.pth"))
    assert checkpointer.plan is not None
    return state_of(source), state_of(checkpointer.model), checkpointer.plan


def test_exclude_leaves_a_head_tensor_out_and_the_rest_of_its_group_is_carried(tmp_path: Path) -> None:
    old, new, plan = loaded(tmp_path, EXCLUDE=[f"{HEAD}.bbox_pred.*"])
    fresh = state_of(model_of(NEW, seed=2))
    assert torch.equal(new[f"{HEAD}.bbox_pred.weight"], fresh[f"{HEAD}.bbox_pred.weight"])
    assert torch.equal(new[f"{HEAD}.cls_score.weight"][0], old[f"{HEAD}.cls_score.weight"][2])
    boxes = plan.tensor(f"{HEAD}.bbox_pred.weight")
    assert boxes is not None and (boxes.action, boxes.cause) == ("initialised", Cause.EXCLUDED)
    assert boxes.reason == "MODEL.HEAD_ADAPT.EXCLUDE names it"


def test_include_takes_nothing_else(tmp_path: Path) -> None:
    old, new, plan = loaded(tmp_path, INCLUDE=["backbone.*"], MIN_COVERAGE=0.0)
    fresh = state_of(model_of(NEW, seed=2))
    for name, value in new.items():
        assert torch.equal(value, old[name] if name.startswith("backbone") else fresh[name]), name
    assert plan.new_classes() == {"thing": ("cow", "owl")}


def test_rename_brings_a_foreign_head_to_its_place(tmp_path: Path) -> None:
    source = model_of(OLD, seed=1)
    foreign = {f"net.{name.replace('cls_score', 'classifier')}": value for name, value in source.state_dict().items()}
    torch.save({"model": foreign}, tmp_path / "foreign.pth")
    keys = {"RENAME": [r"^net\.=", r"classifier=cls_score"], "SOURCE_CLASSES": OLD}
    model = model_of(NEW, seed=2, **keys)
    HeadAdaptCheckpointer(model).load(str(tmp_path / "foreign.pth"))
    expected = state_of(source)[f"{HEAD}.cls_score.weight"]
    assert torch.equal(state_of(model)[f"{HEAD}.cls_score.weight"][0], expected[2])


def test_a_dead_pattern_loads_nothing(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"MODEL.HEAD_ADAPT.EXCLUDE, 'roi_head\.\*'"):
        loaded(tmp_path, EXCLUDE=["roi_head.*"])
