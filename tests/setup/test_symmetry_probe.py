"""The training loss tells the rows of a class where the shape does not."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.config import CfgNode
from detectron2.modeling import ROI_HEADS_REGISTRY, FastRCNNOutputLayers, StandardROIHeads, build_model
from helpers.models import tiny_cfg
from torch import nn
from torch.nn import functional as F

from d2_headadapt.adapt.discovery import Discovery, Evidence
from d2_headadapt.setup.count_keys import discover
from d2_headadapt.setup.symmetry_probe import probe_refused

KEY = "NUM_CLASSES"
Loss = Callable[[torch.Tensor, int, int], torch.Tensor]


class Toy(nn.Module):
    """One linear layer of ``rows`` outputs on the pixels of one image, and a loss of its own."""

    def __init__(self, k: int, rows: int, loss: Loss) -> None:
        super().__init__()
        self.k, self.loss = k, loss
        self.head = nn.Linear(12, rows)

    def forward(self, batch: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        features = batch[0]["image"].float().flatten()[:12] / 255
        return {"loss": self.loss(self.head(features), self.k, int(batch[0]["instances"].gt_classes[0]))}


def background_last(out: torch.Tensor, k: int, c: int) -> torch.Tensor:
    return F.cross_entropy(out[None], torch.tensor([c]))


def background_first(out: torch.Tensor, k: int, c: int) -> torch.Tensor:
    return F.cross_entropy(out[None], torch.tensor([c + 1]))


def four_of_each_class(out: torch.Tensor, k: int, c: int) -> torch.Tensor:
    return (out.view(k, 4)[c] - 1).square().sum()


def four_anchors(out: torch.Tensor, k: int, c: int) -> torch.Tensor:
    return F.cross_entropy(out.view(4, k), torch.full((4,), c))


def nothing_of_classes(out: torch.Tensor, k: int, c: int) -> torch.Tensor:
    return out.square().sum()


CASES: dict[str, tuple[Callable[[int], int], Loss, dict[str, Any]]] = {
    "background last": (lambda k: k + 1, background_last, {"axes": ((0, 0),), "extra": 1}),
    "background first": (lambda k: k + 1, background_first, {"axes": ((0, 1),), "extra": 0}),
    "four of each class": (lambda k: 4 * k, four_of_each_class, {"rows_per_class": 4, "groups": 1}),
    "four anchors": (lambda k: 4 * k, four_anchors, {"rows_per_class": 1, "groups": 4}),
}


def look(rows: Callable[[int], int], loss: Loss) -> tuple[Discovery, Discovery]:
    def build(counts: Mapping[str, int]) -> nn.Module:
        return Toy(counts[KEY], rows(counts[KEY]), loss)

    found = discover(build, {KEY: 7})
    assert len(found.refused) == 2 and not found.found
    return found, probe_refused(build, {KEY: 7}, found)


@pytest.mark.parametrize("name", CASES)
def test_the_loss_decides_between_two_meanings(name: str) -> None:
    rows, loss, expected = CASES[name]
    _, probed = look(rows, loss)
    assert not probed.refused and {x.evidence for x in probed.found} == {Evidence.SYMMETRY}
    for layout in probed.layouts:
        assert {key: getattr(layout, key) for key in expected} == expected


def test_without_a_signal_it_stays_refused() -> None:
    found, probed = look(lambda k: k + 1, nothing_of_classes)
    assert probed == found


def test_random_states_stay_as_they_were() -> None:
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    look(lambda k: k + 1, background_last)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1].tolist(), random.getstate()) == before[1:]


class Unknown(nn.Module):
    """A predictor of no class that anybody knows, with names of its own, around detectron2's losses."""

    def __init__(self, stock: FastRCNNOutputLayers) -> None:
        super().__init__()
        self.first, self.second = stock.cls_score, stock.bbox_pred
        self.parts = [stock]  # In a list: its tensors have no other name.

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.first(x.flatten(1)), self.second(x.flatten(1))

    def losses(self, predictions: Any, proposals: Any) -> Any:
        return self.parts[0].losses(predictions, proposals)


def test_a_whole_detector_with_an_unknown_predictor() -> None:
    """Scores by the loss of sampled regions; four rows of boxes per class by the regression of foreground."""

    class UnknownHeads(StandardROIHeads):
        @classmethod
        def from_config(cls, cfg: CfgNode, input_shape: Any) -> dict[str, Any]:
            ret: dict[str, Any] = super().from_config(cfg, input_shape)
            ret["box_predictor"] = Unknown(ret["box_predictor"])
            return ret

    ROI_HEADS_REGISTRY.register(UnknownHeads)
    try:
        cfg = tiny_cfg(ours=False, masks=False)
        cfg.MODEL.ROI_HEADS.NAME = "UnknownHeads"

        def build(counts: Mapping[str, int]) -> nn.Module:
            changed = cfg.clone()
            changed.MODEL.ROI_HEADS.NUM_CLASSES = counts[KEY]
            model: nn.Module = build_model(changed)
            return model

        found = discover(build, {KEY: 5})
        place = "roi_heads.box_predictor"
        assert {x.sized.tensor for x in found.refused} == {
            f"{place}.{name}.{leaf}" for name in ("first", "second") for leaf in ("weight", "bias")
        }
        probed = probe_refused(build, {KEY: 5}, found)
    finally:
        del ROI_HEADS_REGISTRY._obj_map["UnknownHeads"]
    assert not probed.refused
    kinds = {x.tensor: (x.axes, x.rows_per_class, x.groups, x.extra) for x in probed.layouts}
    for leaf in ("weight", "bias"):
        assert kinds[f"{place}.first.{leaf}"] == (((0, 0),), 1, 1, 1)
        assert kinds[f"{place}.second.{leaf}"] == (((0, 0),), 4, 1, 0)
