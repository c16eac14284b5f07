"""MultiTaskClassifier: shapes, what a batch may not do, losses and predictions."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.config import CfgNode
from detectron2.modeling import META_ARCH_REGISTRY, build_model
from helpers.classifier import TASKS, classifier, classifier_cfg, picture, pictures, step_on
from torch import nn

from d2_headadapt import MultiTaskClassifier
from d2_headadapt.config.settings import settings_of
from d2_headadapt.errors import ConfigError, DatasetError
from d2_headadapt.modeling.classifier import POOLING_REGISTRY
from d2_headadapt.modeling.task_dry_run import dry_run
from d2_headadapt.modeling.task_heads import TaskHeads
from d2_headadapt.setup.build import build_on_meta

WIKIART = {"artist": 129, "genre": 11, "style": 27}


class NotebookView(nn.Module):
    """The mistake: maps of 28 x 28 flattened as if they were of 16 x 16."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.view(-1, 256 * 16 * 16)


def wikiart_cfg(**task: Any) -> CfgNode:
    tasks = {name: {"classes": [f"{name} {i}" for i in range(k)], **task} for name, k in WIKIART.items()}
    cfg = classifier_cfg(tasks, INPUT_SIZE=[224, 224])
    cfg.MODEL.CONV_NET.CHANNELS = [64, 128, 256]
    cfg.SOLVER.IMS_PER_BATCH = 32
    return cfg


@pytest.fixture
def own_pooling() -> Iterator[None]:
    before = dict(POOLING_REGISTRY._obj_map)
    yield
    POOLING_REGISTRY._obj_map.clear()
    POOLING_REGISTRY._obj_map.update(before)


def register_pooling(module: nn.Module) -> str:
    def mine(cfg: CfgNode, shape: Any) -> nn.Module:
        return module

    POOLING_REGISTRY.register(mine)
    return "mine"


@pytest.mark.parametrize("pooling, width", [("avg", 256), ("flatten", 200_704)])
def test_wikiart_shapes(pooling: str, width: int) -> None:
    cfg = wikiart_cfg()
    cfg.MODEL.CLASSIFIER.POOLING = pooling
    model = build_on_meta(cfg).eval()
    assert all(head.predictor.in_features == width for head in model.heads)
    with torch.no_grad():
        logits = model.logits(torch.empty(32, 3, 224, 224, device="meta"))
    assert {name: tuple(value.shape) for name, value in logits.items()} == {n: (32, k) for n, k in WIKIART.items()}
    assert model.backbone.output_shape()["conv3"].stride == 8
    kinds = [type(layer) for layer in model.backbone.convolutions]
    assert kinds == [nn.Conv2d] * 3 and model.backbone.convolutions[0].kernel_size == (3, 3)


def test_flattened_wikiart_with_a_hidden_layer_has_308_million_head_parameters() -> None:
    counts = []
    for pooling in ("flatten", "avg"):
        cfg = wikiart_cfg(hidden=512)
        cfg.MODEL.CLASSIFIER.POOLING = pooling
        counts.append(sum(p.numel() for p in build_on_meta(cfg).heads.parameters()))
    assert counts == [308_368_551, 480_423]


@pytest.mark.parametrize("on_meta", [False, True])
def test_batch_98_is_refused_at_build_time_with_the_layer_and_both_shapes(own_pooling: None, on_meta: bool) -> None:
    cfg = wikiart_cfg()
    cfg.MODEL.CLASSIFIER.POOLING = register_pooling(NotebookView())
    with pytest.raises(ConfigError) as caught:
        build_on_meta(cfg) if on_meta else build_model(cfg)
    text = str(caught.value)
    assert "layer pooling (NotebookView)" in text
    assert "(32, 256, 28, 28)" in text and "(98, 65536)" in text


def test_a_view_that_fits_no_batch_is_refused_too(own_pooling: None) -> None:
    """Of 2 images the same line raises inside torch, which names neither the layer nor the map."""
    cfg = wikiart_cfg()
    cfg.SOLVER.IMS_PER_BATCH = 2
    cfg.MODEL.CLASSIFIER.POOLING = register_pooling(NotebookView())
    with pytest.raises(ConfigError, match=r"layer pooling \(NotebookView\).*\(2, 256, 28, 28\).*\[-1, 65536\]"):
        build_model(cfg)


def test_a_view_of_the_right_width_is_accepted(own_pooling: None) -> None:
    """The law is about the batch, not about how somebody flattens."""
    cfg = classifier_cfg()
    cfg.MODEL.CLASSIFIER.POOLING = register_pooling(nn.Flatten(1))
    assert build_model(cfg).heads["colour"].predictor.in_features == 8 * 4 * 4


class OddHeads(TaskHeads):
    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {name: logits.view(-1, 1) for name, logits in super().forward(x).items()}


class OddClassifier(MultiTaskClassifier):
    def build_heads(self, in_features: int, specs: Any) -> TaskHeads:
        return OddHeads(in_features, specs)


def test_a_head_of_the_users_own_that_loses_the_batch_is_refused_at_build_time() -> None:
    META_ARCH_REGISTRY.register(OddClassifier)
    try:
        cfg = classifier_cfg()
        cfg.MODEL.META_ARCHITECTURE = "OddClassifier"
        with pytest.raises(ConfigError, match=r"layer heads, task colour .*logits \(16, 3\).*found \(48, 1\)"):
            build_model(cfg)
    finally:
        META_ARCH_REGISTRY._obj_map.pop("OddClassifier")


def test_another_size_is_one_error_for_flattened_features_and_nothing_for_pooled() -> None:
    images = torch.zeros(5, 3, 48, 40)
    with pytest.raises(ConfigError) as caught:
        classifier(POOLING="flatten").logits(images)
    text = str(caught.value)
    assert "layer pooling" in text and "(N, 8, 4, 4)" in text and "(5, 8, 6, 5)" in text
    assert "32 x 32" in text and "POOLING avg" in text
    assert classifier().logits(images)["colour"].shape == (5, 3)


def test_a_smaller_image_in_a_flattened_batch_is_the_same_error() -> None:
    """Padding must not stand in for the cells that an image lacks."""
    model = classifier(POOLING="flatten").eval()
    batch = [{"image": torch.zeros(3, 32, 32)}, {"image": torch.zeros(3, 32, 24)}]
    with pytest.raises(ConfigError, match=r"\(1, 8, 4, 3\)"):
        model(batch)


def test_only_the_cells_of_an_image_are_pooled_not_those_of_its_padding() -> None:
    model = classifier()
    maps = torch.rand(2, 8, 8, 8)
    found = model.image_features({"conv3": maps}, (64, 64), [(16, 23), (64, 64)])
    expected = torch.stack([maps[0, :, :2, :3].mean((1, 2)), maps[1].mean((1, 2))])
    assert torch.allclose(found, expected)
    same = model.image_features({"conv3": maps}, (64, 64), [(16, 24), (16, 24)])
    assert torch.allclose(same, maps[:, :, :2, :3].mean((2, 3)))


def test_building_moves_no_random_stream_but_its_own_layers() -> None:
    """The dry run draws nothing: the same seed gives the layers that they have without it."""
    torch.manual_seed(4)
    np.random.seed(4)
    random.seed(4)
    model = build_model(classifier_cfg())
    after = torch.rand(1), np.random.rand(), random.random()
    torch.manual_seed(4)
    np.random.seed(4)
    random.seed(4)
    backbone = type(model.backbone)(3, [4, 6, 8])
    heads = TaskHeads(8, model.heads.specs)
    assert (torch.rand(1), np.random.rand(), random.random()) == after
    for ours, plain in ((model.backbone, backbone), (model.heads, heads)):
        assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), plain.parameters(), strict=True))
    assert all(module.training for module in model.modules())


class KeepsATensor(nn.Module):
    """Something that the meta device cannot run: a tensor that is no buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)
        self.dropout = nn.Dropout(0.5)
        self.norm = nn.BatchNorm1d(2)
        self.table = [torch.ones(2)]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.dropout(self.layer(x) * self.table[0]))


def test_a_dry_run_falls_back_to_zeros_and_changes_nothing() -> None:
    module = KeepsATensor()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    state = torch.get_rng_state()
    assert dry_run(module, (4, 3)).shape == (4, 2)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert module.training and module.norm.training
    with pytest.raises(RuntimeError):
        dry_run(module, (4, 5))


def test_training_gives_one_loss_for_each_task_and_lowers_all() -> None:
    model = classifier()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    batch = [picture(entry) for entry in pictures(12)]
    first = step_on(model, optimizer, batch)
    assert set(first) == {"loss_task_colour", "loss_task_light", "loss_task_tags"}
    for _ in range(60):
        last = step_on(model, optimizer, batch)
    assert all(last[name] < 0.5 * first[name] for name in first), (first, last)


def test_a_batch_without_a_label_of_one_task_trains_the_others() -> None:
    model = classifier()
    batch = [picture({**entry, "tasks": {**entry["tasks"], "light": None}}) for entry in pictures(4)]
    losses = model.train()(batch)
    assert float(losses["loss_task_light"]) == 0 and float(losses["loss_task_colour"]) > 0
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in model.parameters())
    assert not model.heads["light"].predictor.weight.grad.any()


def test_labels_that_no_task_mapper_made_are_named() -> None:
    with pytest.raises(DatasetError, match=r"tasks\['colour'\].*TaskMapper"):
        classifier().train()([{"image": torch.zeros(3, 32, 32), "tasks": {"colour": 1}}])


def test_predictions_agree_with_the_logits() -> None:
    model = classifier(seed=3).eval()
    batch = [picture(entry) for entry in pictures(5)]
    with torch.no_grad():
        model.heads["tags"].predictor.bias.copy_(torch.tensor([2.0, -2.0, 2.0, -2.0]))
        found = model(batch)
        images = model.preprocess_image(batch)
        logits = model.logits(images.tensor)
    assert len(found) == 5
    for i, out in enumerate(found):
        assert set(out) == {"tasks", *(f"{kind}_{name}" for kind in ("pred", "scores") for name in TASKS)}
        assert out["tasks"].keys() == TASKS.keys()
        # The model takes these functions of the whole batch. Of one row, the vector instructions of some processors
        # round differently: by an ulp, 6e-8 below 1.
        assert torch.allclose(out["scores_colour"], logits["colour"][i].softmax(0), atol=1e-6)
        assert torch.allclose(out["tasks"]["tags"], logits["tags"][i].sigmoid(), atol=1e-6)
        assert out["pred_colour"] == int(logits["colour"][i].argmax()) and isinstance(out["pred_colour"], int)
        assert out["pred_tags"] == [0, 2]


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda cfg: cfg.MODEL.TASKS.clear(), "MODEL.TASKS: expected at least one task on images"),
        (lambda cfg: cfg.MODEL.TASKS.light.update({"on": "box"}), "MODEL.TASKS.light.on: expected image"),
        (
            lambda cfg: cfg.MODEL.CLASSIFIER.update(IN_FEATURE="conv2"),
            "IN_FEATURE: expected a feature of .*: conv3",
        ),
        (lambda cfg: cfg.MODEL.CLASSIFIER.update(POOLING="flaten"), "POOLING: expected one of .*Nearest: 'flatten'"),
        (lambda cfg: cfg.MODEL.TASKS.light.update(classes=None), "MODEL.TASKS.light.classes"),
    ],
)
def test_what_cannot_be_built_is_one_error(change: Any, message: str) -> None:
    cfg = classifier_cfg()
    change(cfg)
    with pytest.raises(ConfigError, match=message):
        build_model(cfg)


@pytest.mark.parametrize("pooling", ["avg", "flatten"])
def test_any_backbone_of_detectron2_is_taken(pooling: str) -> None:
    """FPN pads its images to a multiple of 32, and its last feature is p6."""
    cfg = classifier_cfg(POOLING=pooling, INPUT_SIZE=[80, 64])
    cfg.MODEL.BACKBONE.NAME = "build_resnet_fpn_backbone"
    cfg.MODEL.RESNETS.OUT_FEATURES = cfg.MODEL.FPN.IN_FEATURES = ["res2", "res3", "res4", "res5"]
    cfg.MODEL.CLASSIFIER.IN_FEATURE = "p4"
    model = build_on_meta(cfg)
    width = 256 * (1 if pooling == "avg" else 5 * 4)
    assert model.heads["colour"].predictor.in_features == width
    cfg.MODEL.CLASSIFIER.IN_FEATURE = ""
    assert build_on_meta(cfg).in_feature == "p6"


def test_the_checkpointer_finds_the_tables_on_a_model_of_stock_build_model() -> None:
    found = settings_of(classifier())
    assert found is not None and {name: list(table.names) for name, table in found.target.items()} == {
        name: values["classes"] for name, values in TASKS.items()
    }
