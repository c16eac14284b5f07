"""Boxes and masks of one class, and those that serve all classes, in models as detectron2 builds them."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from helpers.models import STOCK, build_seeded, tiny_cfg

from d2_headadapt import AdaptSettings, HeadAdaptCheckpointer
from d2_headadapt.adapt.registry import layouts_of
from d2_headadapt.config.settings import attach_settings
from d2_headadapt.errors import PlanRefused

COCO = ["cat", "person", "dog"]


def build(classes: list[str], kind: str, *, agnostic: bool, ours: bool, attach: bool = True, seed: int = 0):
    cfg = tiny_cfg(kind, num_classes=len(classes), ours=ours)
    cfg.MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG = agnostic
    cfg.MODEL.ROI_MASK_HEAD.CLS_AGNOSTIC_MASK = agnostic
    if ours:
        cfg.MODEL.HEAD_ADAPT.TARGET_CLASSES = classes
    model = build_seeded(cfg, seed)
    settings = AdaptSettings.from_config(cfg) if ours else AdaptSettings.of(classes)
    if attach:
        found = AdaptSettings.from_config(cfg)
        settings = AdaptSettings(target=settings.target, agnostic=found.agnostic)
        attach_settings(model, settings)
    return model, settings


def class_free(name: str) -> bool:
    return "bbox_pred" in name or "mask_head.predictor" in name


@pytest.mark.parametrize("ours", [True, False], ids=["ours", "stock"])
@pytest.mark.parametrize("kind", sorted(STOCK))
@pytest.mark.parametrize(("old", "new"), [(COCO, ["person"]), (["person"], ["gnu"]), (["person"], ["gnu", "person"])])
def test_an_agnostic_head_is_carried_to_and_from_one_class(
    tmp_path: Path, kind: str, ours: bool, old: list[str], new: list[str]
) -> None:
    model, settings = build(old, kind, agnostic=True, ours=ours)
    HeadAdaptCheckpointer(model, str(tmp_path), settings=settings).save("old")
    saved = [x for x in layouts_of(model) if class_free(x.tensor)]
    assert saved and all(x.agnostic for x in saved), "the file would say that one class has rows of its own"
    other, settings = build(new, kind, agnostic=True, ours=ours, seed=1)
    checkpointer = HeadAdaptCheckpointer(other, settings=settings)
    checkpointer.load(str(tmp_path / "old.pth"))
    theirs, mine = model.state_dict(), other.state_dict()
    for name in filter(class_free, mine):
        assert torch.equal(mine[name], theirs[name]), name
    for name in (n for n in mine if ".cls_score." in n):
        wanted = [old.index("person")] if "person" in old and "person" in new else []
        assert torch.equal(mine[name][[new.index("person")] if wanted else []], theirs[name][wanted]), name
        assert torch.equal(mine[name][-1], theirs[name][-1]), "background"


def test_a_stock_cascade_says_by_itself_that_its_boxes_are_agnostic() -> None:
    model, _ = build(["person"], "cascade", agnostic=True, ours=False, attach=False)
    assert all(x.agnostic for x in layouts_of(model) if "bbox_pred" in x.tensor)


def test_a_trained_head_that_cannot_be_taken_is_refused_and_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Classes in common, and none of them carried, is never a load."""
    model, settings = build(COCO, "standard", agnostic=True, ours=True)
    HeadAdaptCheckpointer(model, str(tmp_path), settings=settings).save("old")
    other, settings = build(["person", "dog"], "standard", agnostic=False, ours=True)
    with (
        caplog.at_level(logging.WARNING),
        pytest.raises(PlanRefused, match=r"found no head that takes one: .*4 rows per"),
    ):
        HeadAdaptCheckpointer(other, settings=settings).load(str(tmp_path / "old.pth"))
    said = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert said == [
        "discarded: 6 tensors of roi_heads keep the model's initial values: "
        "class-agnostic in the file, 4 rows per class in the model"
    ]
