"""A classifier of text embeddings: its logits, its place in detectron2's heads, and its way through checkpoints."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetMapper, build_detection_test_loader
from detectron2.solver import build_optimizer
from detectron2.utils.events import EventStorage
from helpers.files import HEAD
from helpers.models import batch, build_seeded, detections, same_bits, state_of, stock_model, tiny_cfg, training_losses
from helpers.real import fbnet_c4
from helpers.text import ALL, OLD, WIDTH, rows_of, text_cfg, text_model
from torch import nn
from torch.nn.functional import cosine_similarity

from d2_headadapt import (
    ClassTable,
    HeadAdaptCheckpointer,
    HeadAdaptTextOutputLayers,
    add_headadapt_config,
    layouts_of,
    vocabulary,
)
from d2_headadapt.adapt.causes import Cause
from d2_headadapt.data.datasets import register_datasets
from d2_headadapt.errors import PlanRefused, TextError
from d2_headadapt.modeling.text.predictor import TextClassifier
from d2_headadapt.setup.build import build_on_meta

NEW = ["zebra", "bus", "cat"]
EMBEDDINGS = f"{HEAD}.cls_score.embeddings"


def load(model: nn.Module, file: str) -> HeadAdaptCheckpointer:
    checkpointer = HeadAdaptCheckpointer(model)
    checkpointer.load(file)
    return checkpointer


def saved(model: nn.Module, path: Path, name: str = "text") -> str:
    """A checkpoint of a model that counts as trained."""
    HeadAdaptCheckpointer(model, str(path)).save(name, iteration=1)
    return str(path / f"{name}.pth")


@pytest.mark.parametrize("projection", ["auto", "always", "never"])
@pytest.mark.parametrize("background", ["learned", "zero", "file"])
def test_logits_are_temperature_times_cosine_with_background_last(projection: str, background: str) -> None:
    rows, own = rows_of(OLD), torch.randn(WIDTH)
    width = 24 if projection == "auto" else WIDTH
    layer = TextClassifier(
        width, rows, background=background, background_row=own, temperature=7.0, projection=projection
    )
    x = torch.randn(6, width)
    assert (layer.projection is None) == (projection == "never")
    inner = x if layer.projection is None else layer.projection(x)
    logits = layer(x)
    assert logits.shape == (6, 4)
    for k in range(3):
        torch.testing.assert_close(logits[:, k], 7 * cosine_similarity(inner, rows[k : k + 1]))
    if background == "zero":
        assert layer.background is None and (logits[:, 3] == 0).all()
    else:
        assert layer.background is not None
        row = own if background == "file" else layer.background
        torch.testing.assert_close(logits[:, 3], 7 * cosine_similarity(inner, row[None]))
        assert layer.background.requires_grad == (background == "learned")


def test_rows_that_are_as_wide_as_the_features_need_no_projection() -> None:
    assert TextClassifier(WIDTH, rows_of(OLD)).projection is None
    for rows in (torch.ones(WIDTH), rows_of(OLD)[:, :7]):
        with pytest.raises(TextError, match="one row per class"):
            TextClassifier(WIDTH, rows, projection="never")


@pytest.mark.parametrize("trainable", [False, True])
def test_frozen_rows_get_no_step_and_are_saved_all_the_same(trainable: bool, tmp_path: Path) -> None:
    cfg = text_cfg(tmp_path, OLD, TRAINABLE=trainable, PRECEDENCE="checkpoint")
    model = build_seeded(cfg)
    before = state_of(model)
    optimizer = build_optimizer(cfg, model)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    layer = model.roi_heads.box_predictor.cls_score
    assert (id(layer.embeddings) in held) == trainable
    assert id(layer.projection.weight) in held and id(layer.background) in held
    model.train()
    sum(training_losses(model, batch(3)).values()).backward()
    for group in optimizer.param_groups:
        group["lr"] = 0.1
    optimizer.step()
    after = state_of(model)
    assert torch.equal(before[EMBEDDINGS], after[EMBEDDINGS]) != trainable
    for leaf in ("projection.weight", "background"):
        assert not torch.equal(before[f"{HEAD}.cls_score.{leaf}"], after[f"{HEAD}.cls_score.{leaf}"])
    assert EMBEDDINGS in torch.load(saved(model, tmp_path), weights_only=True)["model"]


@pytest.mark.parametrize("kind", ["standard", "cascade", "c4"])
@pytest.mark.parametrize("agnostic", [False, True])
def test_every_kind_of_head_trains_and_detects(kind: str, agnostic: bool, tmp_path: Path) -> None:
    model = text_model(tmp_path, OLD, kind=kind, agnostic=agnostic)
    model.train()
    losses = training_losses(model, batch(3))
    assert any("loss_cls" in name for name in losses) and all(loss.isfinite() for loss in losses.values())
    sum(losses.values()).backward()
    model.eval()
    found = detections(model, batch(3))
    assert {int(c) for image in found for c in image["pred_classes"]} <= {0, 1, 2}
    predictors = [m for m in model.modules() if isinstance(m, HeadAdaptTextOutputLayers)]
    assert len(predictors) == (3 if kind == "cascade" else 1)
    for predictor in predictors:
        assert torch.equal(predictor.cls_score.embeddings, rows_of(OLD))
        boxes = 4 if agnostic or kind == "cascade" else 12
        assert predictor.bbox_pred.out_features == boxes


def test_everything_but_the_classifier_is_what_stock_would_have_drawn(tmp_path: Path) -> None:
    ours, stock = state_of(text_model(tmp_path, OLD, model_seed=4)), state_of(stock_model(3, seed=4))
    rest = {name for name in stock if "cls_score" not in name}
    assert {name for name in ours if "cls_score" not in name} == rest
    assert all(torch.equal(ours[name], stock[name]) for name in rest)


def test_a_linear_layer_of_the_same_width_is_not_taken_for_the_rows(tmp_path: Path) -> None:
    """Stock's (K + 1, C) may look like K + 1 embeddings: the tensors have other names."""
    cfg = text_cfg(tmp_path, OLD, PROJECTION="never")
    cfg.MODEL.ROI_BOX_HEAD.FC_DIM = WIDTH
    model = build_seeded(cfg)
    linear = tiny_cfg(masks=False, num_classes=3)
    linear.MODEL.ROI_BOX_HEAD.FC_DIM = WIDTH
    linear.MODEL.HEAD_ADAPT.TARGET_CLASSES = OLD
    file = saved(build_seeded(linear, 5), tmp_path)
    checkpointer = load(model, file)
    assert torch.equal(state_of(model)[EMBEDDINGS], rows_of(OLD))
    assert checkpointer.untrained == {"thing": tuple(sorted(OLD))}


def test_without_a_table_the_rows_of_the_file_are_the_classes(tmp_path: Path) -> None:
    cfg = text_cfg(tmp_path, ALL)
    cfg.MODEL.HEAD_ADAPT.TARGET_CLASSES = None
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 5
    assert build_seeded(cfg).roi_heads.box_predictor.class_table == ClassTable(ALL)
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 4
    with pytest.raises(TextError, match="TARGET_CLASSES"):
        build_seeded(cfg)


def test_it_builds_on_the_meta_device_and_its_layouts_hold(tmp_path: Path) -> None:
    model = build_on_meta(text_cfg(tmp_path, OLD))
    assert {value.device.type for value in model.roi_heads.state_dict().values()} == {"meta"}
    layouts = {layout.tensor.removeprefix(f"{HEAD}."): layout for layout in layouts_of(model)}
    assert layouts["cls_score.embeddings"].num_classes((3, WIDTH)) == 3
    assert layouts["cls_score.background"].agnostic and layouts["cls_score.projection.weight"].agnostic
    assert layouts["cls_score.embeddings"].group != layouts["bbox_pred.weight"].group


def shifted(model: nn.Module, by: float = 0.25) -> nn.Module:
    """The model after "training" its class rows."""
    with torch.no_grad():
        model.roi_heads.box_predictor.cls_score.embeddings += by
    return model


@pytest.mark.parametrize("precedence", ["file", "checkpoint", "error"])
def test_precedence_where_both_bring_the_rows(precedence: str, tmp_path: Path) -> None:
    file = saved(shifted(text_model(tmp_path, OLD, model_seed=1)), tmp_path)
    model = text_model(tmp_path, NEW, PRECEDENCE=precedence)
    before = state_of(model)
    if precedence == "error":
        with pytest.raises(TextError) as error:
            load(model, file)
        trained = rows_of(["bus", "cat"]) + 0.25
        cosines = cosine_similarity(trained, rows_of(["bus", "cat"]))
        worst = ["bus", "cat"][int(cosines.argmin())]
        assert f"most for '{worst}', with a cosine of {cosines.min():.4f}" in error.value.found
        assert same_bits(before, state_of(model))
        return
    checkpointer = load(model, file)
    wanted = rows_of(NEW)
    theirs = torch.load(file, weights_only=True)["model"]
    if precedence == "checkpoint":
        wanted[1:] = theirs[EMBEDDINGS][[2, 0]]
    assert torch.equal(state_of(model)[EMBEDDINGS], wanted)
    assert checkpointer.plan is not None
    entry = next(t for t in checkpointer.plan.tensors if t.name == EMBEDDINGS)
    assert entry.action == {"file": "kept", "checkpoint": "carried"}[precedence] and not entry.new
    # What leads to the rows came from the checkpoint either way.
    for leaf in ("projection.weight", "projection.bias", "background"):
        name = f"{HEAD}.cls_score.{leaf}"
        assert torch.equal(state_of(model)[name], theirs[name])


def test_precedence_error_is_silent_where_the_rows_agree(tmp_path: Path) -> None:
    file = saved(text_model(tmp_path, OLD, model_seed=1), tmp_path)
    model = text_model(tmp_path, NEW, PRECEDENCE="error")
    load(model, file)
    assert torch.equal(state_of(model)[EMBEDDINGS], rows_of(NEW))


@pytest.mark.parametrize("precedence", ["file", "checkpoint"])
def test_adding_a_class_is_adding_its_row(precedence: str, tmp_path: Path) -> None:
    """With one box regressor for all classes nothing is left to train."""
    source = text_model(tmp_path, OLD, agnostic=True, model_seed=1)
    file = saved(source, tmp_path)
    model = text_model(tmp_path, [*OLD, "zebra"], agnostic=True, PRECEDENCE=precedence)
    checkpointer = load(model, file)
    assert checkpointer.untrained == {} and checkpointer.rows_to_fit() == {}
    x = torch.randn(9, 24)
    with torch.no_grad():
        old, new = (m.roi_heads.box_predictor(x)[0] for m in (source, model))
        inner = source.roi_heads.box_predictor.cls_score.projection(x)
    torch.testing.assert_close(new[:, [0, 1, 2, 4]], old)
    torch.testing.assert_close(new[:, 3], 50 * cosine_similarity(inner, rows_of(["zebra"])))


def test_mutation_rows_that_nobody_gave_would_be_untrained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = HeadAdaptTextOutputLayers.head_layouts
    monkeypatch.setattr(
        HeadAdaptTextOutputLayers,
        "head_layouts",
        lambda self, context: [replace(layout, given="") for layout in given(self, context)],
    )
    file = saved(text_model(tmp_path, OLD, agnostic=True, model_seed=1), tmp_path)
    checkpointer = load(text_model(tmp_path, [*OLD, "zebra"], agnostic=True), file)
    assert checkpointer.untrained == {"thing": ("zebra",)}


def test_class_specific_boxes_of_an_added_class_are_still_to_be_learnt(tmp_path: Path) -> None:
    file = saved(text_model(tmp_path, OLD, model_seed=1), tmp_path)
    checkpointer = load(text_model(tmp_path, [*OLD, "zebra"]), file)
    assert checkpointer.untrained == {"thing": ("zebra",)}
    assert {name.removeprefix(f"{HEAD}.") for name in checkpointer.rows_to_fit()} == {
        "bbox_pred.weight",
        "bbox_pred.bias",
    }


def test_from_a_linear_classifier_boxes_are_carried_and_the_rest_is_said(tmp_path: Path) -> None:
    linear = tiny_cfg(masks=False)
    linear.MODEL.HEAD_ADAPT.TARGET_CLASSES = OLD
    source = build_seeded(linear, 1)
    file = saved(source, tmp_path)
    model = text_model(tmp_path, NEW)
    checkpointer = load(model, file)
    boxes = f"{HEAD}.bbox_pred.weight"
    theirs, ours = state_of(source)[boxes].unflatten(0, (3, 4)), state_of(model)[boxes].unflatten(0, (3, 4))
    assert torch.equal(ours[1:], theirs[[2, 0]])
    assert checkpointer.plan is not None
    planned = {t.name: t for t in checkpointer.plan.tensors}
    assert (planned[EMBEDDINGS].action, planned[EMBEDDINGS].cause) == ("initialised", Cause.NOT_IN_FILE)
    assert planned[f"{HEAD}.cls_score.weight"].action == "dropped"
    # The projection is untrained, so no class is known yet, whatever its embedding says.
    assert checkpointer.untrained == {"thing": tuple(sorted(NEW))}


def test_to_a_linear_classifier_nothing_of_it_is_taken(tmp_path: Path) -> None:
    file = saved(text_model(tmp_path, OLD, model_seed=1), tmp_path)
    linear = tiny_cfg(masks=False)
    linear.MODEL.HEAD_ADAPT.TARGET_CLASSES = NEW
    # Names in common and no row of them: only with the user's word.
    with pytest.raises(PlanRefused, match=r"SOURCE_CLASSES none to start them afresh"):
        load(build_seeded(linear), file)
    linear.MODEL.HEAD_ADAPT.SOURCE_CLASSES = "none"
    model = build_seeded(linear)
    before = state_of(model)
    checkpointer = load(model, file)
    assert torch.equal(state_of(model)[f"{HEAD}.cls_score.weight"], before[f"{HEAD}.cls_score.weight"])
    assert checkpointer.untrained == {"thing": tuple(sorted(NEW))}


def test_embeddings_of_another_encoder_are_refused_and_nothing_is_loaded(tmp_path: Path) -> None:
    file = saved(text_model(tmp_path, OLD, ENCODER="SigLIP-a", model_seed=1), tmp_path)
    for encoder in ("", "siglip-A"):
        load(text_model(tmp_path, OLD, ENCODER=encoder), file)
    model = text_model(tmp_path, OLD, ENCODER="SigLIP-b")
    before = state_of(model)
    with pytest.raises(TextError, match="embeddings of SigLIP-a"):
        load(model, file)
    assert same_bits(before, state_of(model))


def test_a_zero_background_takes_the_projection_of_a_learned_one_and_the_other_way_round(tmp_path: Path) -> None:
    for one, other in (("learned", "zero"), ("zero", "learned")):
        source = text_model(tmp_path, OLD, BACKGROUND=one, model_seed=1)
        model = text_model(tmp_path, OLD, BACKGROUND=other)
        load(model, saved(source, tmp_path, one))
        name = f"{HEAD}.cls_score.projection.weight"
        assert torch.equal(state_of(model)[name], state_of(source)[name])


def test_a_saved_file_says_what_its_embeddings_are_and_stock_loads_it(tmp_path: Path) -> None:
    file = saved(text_model(tmp_path, OLD, ENCODER="SigLIP", model_seed=1), tmp_path)
    stored = torch.load(file, weights_only=True)
    assert stored["d2_headadapt"]["extra"]["text"] == {
        "names": OLD,
        "encoder": "SigLIP",
        "width": WIDTH,
        "normalised": False,
        "file": "clip0.npy",
        "temperature": 50.0,
    }
    stock = stock_model(3)
    DetectionCheckpointer(stock).load(file)
    assert torch.equal(state_of(stock)[f"{HEAD}.bbox_pred.weight"], stored["model"][f"{HEAD}.bbox_pred.weight"])


def test_a_model_without_embeddings_says_nothing_of_them(tmp_path: Path) -> None:
    cfg = tiny_cfg(masks=False)
    file = saved(build_seeded(cfg), tmp_path)
    assert "text" not in torch.load(file, weights_only=True)["d2_headadapt"]["extra"]


def test_trained_rows_and_their_moments_survive_a_resume(tmp_path: Path) -> None:
    cfg = text_cfg(tmp_path, OLD, TRAINABLE=True, PRECEDENCE="checkpoint")

    def started() -> tuple[nn.Module, torch.optim.Optimizer, HeadAdaptCheckpointer]:
        model = build_seeded(cfg)
        optimizer = build_optimizer(cfg, model)
        return model, optimizer, HeadAdaptCheckpointer(model, str(tmp_path), optimizer=optimizer)

    model, optimizer, checkpointer = started()
    model.train()
    for group in optimizer.param_groups:
        group["lr"] = 0.01
    sum(training_losses(model, batch(3)).values()).backward()
    optimizer.step()
    checkpointer.save("model_0000000", iteration=0)
    again, second, resumed = started()
    resumed.resume_or_load("", resume=True)
    assert same_bits(state_of(model), state_of(again))
    row = again.roi_heads.box_predictor.cls_score.embeddings
    assert not torch.equal(row, rows_of(OLD))
    assert torch.equal(
        second.state[row]["momentum_buffer"],
        optimizer.state[model.roi_heads.box_predictor.cls_score.embeddings]["momentum_buffer"],
    )


def test_tasks_stand_on_the_same_regions(tmp_path: Path) -> None:
    cfg = text_cfg(tmp_path, OLD)
    cfg.MODEL.TASKS.colour = CfgNode({"on": "box", "classes": ["red", "green"]})
    predictor = build_seeded(cfg).roi_heads.box_predictor
    assert predictor.tasks["colour"].predictor.in_features == 24


def real_cfg(real: Path, classes: str | list[str], file: str, vocabulary: str) -> CfgNode:
    cfg = get_cfg()
    add_headadapt_config(cfg)
    fbnet_c4(real).add_fbnet_c4_config(cfg)
    cfg.MODEL.ROI_HEADS.NAME = "HeadAdaptROIHeads"
    cfg.DATALOADER.NUM_WORKERS = 0
    node = cfg.MODEL.HEAD_ADAPT
    node.PREDICTOR, node.TARGET_CLASSES, node.SOURCE_CLASSES = "HeadAdaptTextOutputLayers", classes, "coco"
    node.TEXT.FILE, node.TEXT.NAMES = str(real / "text" / f"{file}.npy"), vocabulary
    node.TEXT.ENCODER = "ViT-B/32"
    return cfg


def test_a_real_detector_gets_clips_classes_trains_and_then_takes_a_class_from_lvis(real: Path, tmp_path: Path) -> None:
    data = json.loads((real / "coco128" / "train.json").read_text())
    data["images"] = data["images"][:4]
    kept = {image["id"] for image in data["images"]}
    data["annotations"] = [a for a in data["annotations"] if a["image_id"] in kept]
    (tmp_path / "few.json").write_text(json.dumps(data))
    images = str(real / "coco128" / "train")
    register_datasets([{"name": "d2ha_text_few", "json": str(tmp_path / "few.json"), "images": images}])
    cfg = real_cfg(real, "coco", "coco_clip_a+cname", "coco")
    model = build_seeded(cfg)
    checkpointer = HeadAdaptCheckpointer(model, str(tmp_path))
    checkpointer.load(str(real / "models" / "fbnet_c4_coco.pth"))
    layer = model.roi_heads.box_predictor.cls_score
    assert (layer.projection.in_features, layer.projection.out_features) == (160, 512)
    file = torch.load(real / "models" / "fbnet_c4_coco.pth", weights_only=True)["model"]
    assert torch.equal(state_of(model)[f"{HEAD}.bbox_pred.weight"], file[f"{HEAD}.bbox_pred.weight"])

    cfg.SOLVER.BASE_LR = 0.01
    optimizer = build_optimizer(cfg, model)
    inputs = list(build_detection_test_loader(cfg, "d2ha_text_few", mapper=DatasetMapper(cfg, is_train=True)))
    model.train()
    values = []
    with EventStorage():
        for _ in range(6):
            torch.manual_seed(0)
            losses = model([entry for part in inputs for entry in part])
            optimizer.zero_grad()
            sum(losses.values()).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 10.0)
            optimizer.step()
            values.append(float(losses["loss_cls"].detach()))
    assert values[-1] < 0.8 * values[0]
    checkpointer.save("trained", iteration=6)
    assert torch.load(tmp_path / "trained.pth", weights_only=True)["d2_headadapt"]["extra"]["text"]["width"] == 512

    linear = real_cfg(real, "coco", "coco_clip_a+cname", "coco")
    linear.MODEL.ROI_HEADS.NAME = "StandardROIHeads"
    stock = build_seeded(linear)
    DetectionCheckpointer(stock).load(str(tmp_path / "trained.pth"))
    trained, loaded = state_of(model), state_of(stock)
    shared = [name for name in loaded if "cls_score" not in name]
    assert len(shared) > 100 and all(torch.equal(loaded[name], trained[name]) for name in shared)

    # Three classes of the COCO list, and one that COCO lacks, all from the LVIS file.
    other = real_cfg(real, ["zebra", "lantern", "person", "cup"], "lvis_v1_clip_a+cname", "lvis_v1")
    moved = build_seeded(other, 2)
    after = load(moved, str(tmp_path / "trained.pth"))
    assert after.untrained == {"thing": ("lantern",)}
    x = torch.randn(20, 160)
    model.eval()
    moved.eval()
    with torch.no_grad():
        before, now = (m.roi_heads.box_predictor(x)[0] for m in (model, moved))
    coco = [vocabulary("coco").names.index(name) for name in ("zebra", "person", "cup")]
    # The same prompt in two files: float16 rounding apart.
    torch.testing.assert_close(now[:, [0, 2, 3, 4]], before[:, [*coco, 80]], atol=0.05, rtol=0)
