"""The keys that a foreign architecture counts its classes by are found, and no other is written."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from detectron2.config import CfgNode, get_cfg, instantiate
from detectron2.config import LazyCall as L
from detectron2.modeling import META_ARCH_REGISTRY
from helpers import foreign_heads as heads
from omegaconf import OmegaConf
from torch import nn

from d2_headadapt import AdaptSettings, HeadAdaptCheckpointer, add_headadapt_config
from d2_headadapt.setup import class_counts
from d2_headadapt.setup.class_counts import settle_counts
from d2_headadapt.setup.lazy.preparing import prepare

ARCHITECTURE = "D2haForeignCounts"


@pytest.fixture(autouse=True)
def architecture() -> Iterator[None]:
    def build(cfg: CfgNode) -> nn.Module:
        own = cfg.MODEL.OWN
        parts = {"thing": heads.fcos(own.NUM_CLASSES)}
        if own.MASKS:
            parts["masks"] = heads.fcos(own.MASK_NUM_CLASSES)
        return heads.tree(**parts)

    build.__name__ = ARCHITECTURE
    META_ARCH_REGISTRY.register(build)
    yield
    del META_ARCH_REGISTRY._obj_map[ARCHITECTURE]


def config(masks: bool = False, mask_count: int = 80) -> CfgNode:
    cfg = get_cfg()
    add_headadapt_config(cfg)
    cfg.MODEL.META_ARCHITECTURE = ARCHITECTURE
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.OWN = CfgNode({"NUM_CLASSES": 80, "MASK_NUM_CLASSES": mask_count, "MASKS": masks})
    return cfg


TABLE = AdaptSettings.of(["a", "b", "c"]).target


def test_the_key_that_is_read_is_written_and_the_idle_ones_stay() -> None:
    cfg = config()
    assert settle_counts(cfg, TABLE) == ["MODEL.OWN.NUM_CLASSES was 80, is 3, the classes of target"]
    assert (cfg.MODEL.OWN.NUM_CLASSES, cfg.MODEL.OWN.MASK_NUM_CLASSES) == (3, 80)
    assert (cfg.MODEL.ROI_HEADS.NUM_CLASSES, cfg.MODEL.RETINANET.NUM_CLASSES) == (80, 80)
    assert settle_counts(cfg, TABLE) == []


def test_keys_of_one_space_that_agree_are_all_written_and_others_are_left() -> None:
    cfg = config(masks=True)
    assert len(settle_counts(cfg, TABLE)) == 2
    assert (cfg.MODEL.OWN.NUM_CLASSES, cfg.MODEL.OWN.MASK_NUM_CLASSES) == (3, 3)
    # Two numbers count two things, and only the user can say which of them is the table's.
    cfg = config(masks=True, mask_count=40)
    settle_counts(cfg, TABLE)
    assert (cfg.MODEL.OWN.NUM_CLASSES, cfg.MODEL.OWN.MASK_NUM_CLASSES) == (80, 40)


def test_a_key_named_after_another_space_counts_the_only_table_there_is() -> None:
    """Mask2Former counts the things of an instance dataset under ``SEM_SEG_HEAD``."""
    cfg = config()
    stuff = AdaptSettings.of({"stuff": ["road", "sky"]}).target
    assert settle_counts(cfg, stuff) == ["MODEL.OWN.NUM_CLASSES was 80, is 2, the classes of target"]


def test_detectron2s_own_are_known_without_a_build(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(cfg: CfgNode) -> None:
        raise AssertionError("built for nothing")

    monkeypatch.setattr(class_counts, "discover_yaml", never)
    cfg = config()
    cfg.MODEL.META_ARCHITECTURE = "RetinaNet"
    assert settle_counts(cfg, TABLE) == ["MODEL.RETINANET.NUM_CLASSES was 80, is 3, the classes of target"]


def test_where_it_cannot_be_built_the_table_is_the_fallback() -> None:
    cfg = config()
    cfg.MODEL.pop("OWN")
    settle_counts(cfg, TABLE)
    assert cfg.MODEL.ROI_HEADS.NUM_CLASSES == 3


class Detector(nn.Module):
    """A head of somebody else's, with a part that follows its count."""

    def __init__(self, num_classes: int, criterion: nn.Module) -> None:
        super().__init__()
        self.class_embed, self.bbox_embed = nn.Linear(heads.WIDTH, num_classes + 1), heads.MLP()
        self.criterion = criterion


def test_a_lazy_model_of_foreign_heads_gets_its_count_and_moves_by_name() -> None:
    old, new = ["ant", "bee", "cat"], ["cat", "gnu"]
    model = L(Detector)(num_classes=80, criterion=L(heads.SetCriterion)(k="${..num_classes}"))
    keys = {"target_classes": new, "source_classes": old}
    tree = {"model": model, "head_adapt": keys, "dataloader": {}, "train": {"device": "cpu"}}
    lazy = OmegaConf.create(tree, flags={"allow_objects": True})
    prepared = prepare(lazy, reads_labels=False, required=False)
    assert lazy.model.num_classes == 2
    built = instantiate(prepared.lazy.model)
    file = Detector(3, heads.SetCriterion(3)).state_dict()
    state, plan = HeadAdaptCheckpointer(built).adapted({"model": dict(file)}, "old.pth")
    assert torch.equal(state["class_embed.weight"][[0, 2]], file["class_embed.weight"][[2, 3]])
    assert plan.new_classes() == {"thing": ("gnu",)} and "(model.num_classes)" in plan.found[0]
