"""The registered ROI heads: stock detectron2's, bit for bit, where no class changes."""

from __future__ import annotations

import pytest
import torch
from detectron2.modeling.roi_heads import FastRCNNOutputLayers
from helpers.models import (
    OURS,
    batch,
    build_seeded,
    detections,
    names,
    same_bits,
    tiny_cfg,
    training_losses,
)

import d2_headadapt.modeling.roi_heads
from d2_headadapt import PREDICTOR_REGISTRY, ClassTable, HeadAdaptOutputLayers
from d2_headadapt.config.settings import settings_of


def is_stock(kind: str, **keys: object) -> dict[str, bool]:
    """Whether our heads, with no class change, are stock's in every respect that a user can see."""
    seen = {}
    stock = build_seeded(tiny_cfg(kind, ours=False))
    stream = torch.get_rng_state()
    cfg = tiny_cfg(kind)
    for key, value in keys.items():
        cfg.MODEL.HEAD_ADAPT[key] = value
    ours = build_seeded(cfg)
    seen["random stream"] = torch.equal(stream, torch.get_rng_state())
    seen["initial weights"] = same_bits(stock.state_dict(), ours.state_dict())
    inputs = batch(5, masks=True)
    expected, losses = training_losses(stock, inputs), training_losses(ours, inputs)
    seen["losses"] = same_bits(expected, losses) and len(losses) > 3
    seen["detections"] = all(map(same_bits, detections(stock, inputs), detections(ours, inputs)))
    return seen


@pytest.mark.parametrize("kind", OURS)
def test_without_a_class_change_everything_is_stock_bit_for_bit(kind: str) -> None:
    """Same seed, random initialisation, masks on: same stream, weights, training losses and detections."""
    assert all(is_stock(kind, TARGET_CLASSES=names(5)).values())


def test_mutation_a_predictor_that_draws_again_is_not_stock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Building ours after stock's in the same stream moves it, and every later module with it."""

    def draw_again(name, cfg, stock, input_shape, class_table, tasks):
        build = PREDICTOR_REGISTRY.get(name)
        return build(cfg, input_shape, box2box_transform=stock.box2box_transform, class_table=class_table)

    monkeypatch.setattr(d2_headadapt.modeling.roi_heads, "replace_predictor", draw_again)
    seen = is_stock("standard")
    assert not seen["random stream"]
    assert not seen["initial weights"]
    assert not seen["losses"]


def test_mutation_other_initial_rows_are_not_stock(monkeypatch: pytest.MonkeyPatch) -> None:
    """One row that was drawn anew is enough to be seen."""
    replace = d2_headadapt.modeling.roi_heads.replace_predictor

    def redraw(*arguments):
        ours = replace(*arguments)
        ours.reinitialise_rows([0], torch.Generator().manual_seed(1))
        return ours

    monkeypatch.setattr(d2_headadapt.modeling.roi_heads, "replace_predictor", redraw)
    seen = is_stock("standard")
    assert seen["random stream"]
    assert not seen["losses"]
    assert not seen["detections"]


@pytest.mark.parametrize("kind", OURS)
def test_every_stage_has_our_predictor_with_the_table(kind: str) -> None:
    cfg = tiny_cfg(kind)
    cfg.MODEL.HEAD_ADAPT.TARGET_CLASSES = ["cat", "dog", "eel"]
    heads = build_seeded(cfg).roi_heads
    predictors = list(heads.box_predictor) if kind == "cascade" else [heads.box_predictor]
    assert len(predictors) == (3 if kind == "cascade" else 1)
    for predictor in predictors:
        assert isinstance(predictor, HeadAdaptOutputLayers)
        assert predictor.class_table == ClassTable(["cat", "dog", "eel"])
        assert predictor.cls_score.out_features == 4
    assert heads.num_classes == 3
    assert heads.mask_head.predictor.out_channels == 3


def test_stock_build_model_keeps_the_users_config() -> None:
    """The class count is settled on a clone: a config is the user's."""
    cfg = tiny_cfg(num_classes=80)
    cfg.MODEL.HEAD_ADAPT.TARGET_CLASSES = ["cat"]
    cfg.freeze()
    before = cfg.dump()
    model = build_seeded(cfg)
    assert cfg.dump() == before
    assert model.roi_heads.num_classes == 1


def test_settings_reach_the_checkpointer_through_stock_build_model() -> None:
    cfg = tiny_cfg()
    cfg.MODEL.HEAD_ADAPT.TARGET_CLASSES = ["cat"]
    cfg.MODEL.HEAD_ADAPT.ALIASES = ["cat=kitten"]
    found = settings_of(build_seeded(cfg))
    assert found is not None
    assert found.aliases == ("cat=kitten",)
    assert found.target["thing"].names == ("cat",)


def test_a_config_without_our_keys_builds_our_heads() -> None:
    """Only the name of the heads was changed in somebody's yaml."""
    cfg = tiny_cfg(ours=False)
    cfg.MODEL.ROI_HEADS.NAME = "HeadAdaptROIHeads"
    cfg.DATASETS.TRAIN = ("nobody_registered_this",)
    assert type(build_seeded(cfg).roi_heads.box_predictor) is HeadAdaptOutputLayers


@pytest.mark.parametrize("agnostic", [False, True])
def test_the_mask_head_of_one_class_says_whether_it_is_agnostic(agnostic: bool) -> None:
    """Both have one output channel: only the config tells them apart."""
    cfg = tiny_cfg(num_classes=1)
    cfg.MODEL.ROI_MASK_HEAD.CLS_AGNOSTIC_MASK = agnostic
    cfg.MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG = agnostic
    heads = build_seeded(cfg).roi_heads
    assert heads.mask_head.predictor.out_channels == 1
    assert heads.mask_head.cls_agnostic is agnostic
    assert heads.box_predictor.cls_agnostic is agnostic


def test_a_predictor_that_a_subclass_built_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody's own predictor is not stock's to replace."""

    class Mine(FastRCNNOutputLayers):
        pass

    monkeypatch.setattr("detectron2.modeling.roi_heads.roi_heads.FastRCNNOutputLayers", Mine)
    assert type(build_seeded(tiny_cfg()).roi_heads.box_predictor) is Mine


@pytest.mark.parametrize("kind", OURS)
def test_images_without_objects_backpropagate(kind: str) -> None:
    model = build_seeded(tiny_cfg(kind))
    losses = training_losses(model, batch(5, images=1, masks=True))
    sum(losses.values()).backward()
    gradient = next(p.grad for name, p in model.named_parameters() if name.endswith("cls_score.weight"))
    assert torch.isfinite(gradient).all()
    assert gradient.abs().sum() > 0
