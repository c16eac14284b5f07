"""The fit on tiny networks with random features, and on the real model."""

from __future__ import annotations

import copy
import os
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.structures import Boxes, pairwise_iou
from helpers.commands import ROOT
from helpers.fit import SETTINGS, scene, scenes, tiny_model
from helpers.models import build_seeded, same_bits, state_of
from helpers.real import fbnet_c4
from helpers.streams import random_streams
from PIL import Image

from d2_headadapt.data.random_states import random_states_kept
from d2_headadapt.errors import ConfigError, LayoutError
from d2_headadapt.fit import FitHook, FitReport, FitSettings, fit_new_rows, mapper_at_test_size
from d2_headadapt.fit import boxes as boxes_room
from d2_headadapt.fit import fit as entry_room
from d2_headadapt.fit.boxes import region_features, stages_of
from d2_headadapt.fit.images import choose_images
from d2_headadapt.fit.lookahead import LookaheadSettings
from d2_headadapt.fit.rows import RowWriter, Solution

WORKER = Path(__file__).parents[1] / "workers" / "fit_worker.py"
HEADS = "roi_heads.box_predictor"


def fit(model: Any, new: Any = (0, 1, 2), count: int = 30, settings: FitSettings = SETTINGS, **keys: Any) -> FitReport:
    new = new if isinstance(new, dict) else {"thing": new}
    return fit_new_rows(model, scenes(count, **keys), scene, new=new, settings=settings)


def changed(before: dict[str, torch.Tensor], model: Any) -> dict[str, list[int]]:
    """Rows of each tensor that are not the same bit for bit."""
    out: dict[str, list[int]] = {}
    for name, value in model.state_dict().items():
        rows = [i for i in range(len(value)) if not torch.equal(value[i], before[name][i])] if value.dim() else []
        if rows:
            out[name] = rows
    return out


def accuracy(model: Any) -> float:
    """Share of squares of new scenes whose class the box head names, among the classes."""
    stage = stages_of(model.roi_heads, "roi_heads")[-1]
    right = total = 0
    with torch.no_grad():
        for entry in scenes(80)[60:]:
            found = scene(entry)
            images = model.preprocess_image([found])
            view = SimpleNamespace(features=model.backbone(images.tensor))
            x = region_features(model.roi_heads, stage, view, found["instances"].gt_boxes)
            guess = stage.predictor(x)[0][:, :-1].argmax(1)
            right += int((guess == found["instances"].gt_classes).sum())
            total += len(guess)
    return right / total


@pytest.mark.parametrize("kind", ["standard", "cascade", "c4"])
def test_every_kind_of_box_head_starts_trained(kind: str) -> None:
    model = tiny_model(kind)
    before = state_of(model)
    report = fit(model)
    # Chance is a third; the last stage of a cascade has seen few regions.
    assert accuracy(model) > (0.6 if kind == "cascade" else 0.75)
    stages = 3 if kind == "cascade" else 1
    assert len([name for name in report.solved if name.startswith(HEADS)]) == stages
    assert "proposal_generator" in report.solved
    last = ("cls_score", "bbox_pred", "objectness_logits", "anchor_deltas")
    assert {name.split(".")[-2] for name in changed(before, model)} == set(last)
    assert not model.training


@pytest.mark.parametrize("kind", ["standard", "cascade", "c4"])
def test_carried_rows_keep_every_bit(kind: str) -> None:
    model = tiny_model(kind)
    before = state_of(model)
    fit(model, (1,), settings=replace(SETTINGS, rpn="never"))
    found = changed(before, model)
    assert found and all(name.split(".")[-2] in ("cls_score", "bbox_pred") for name in found)
    for name, rows in found.items():
        assert rows == ([1] if "cls_score" in name else [4, 5, 6, 7]), name
    # Cascade's regressor knows no class: it counts as carried.
    assert any("bbox_pred" in name for name in found) == (kind != "cascade")


def test_a_solution_that_names_a_carried_row_is_refused_before_anything_is_written() -> None:
    """The mutation of the law above: a solver that writes one row too many."""
    model = tiny_model("standard")
    before = state_of(model)
    writer = RowWriter(model, {"thing": (1,)})
    good = Solution(f"{HEADS}.cls_score.weight", torch.tensor([1]), torch.zeros(1, 24))
    for rows in ([1, 2], [3]):
        bad = Solution(f"{HEADS}.cls_score.weight", torch.tensor(rows), torch.zeros(len(rows), 24))
        with pytest.raises(LayoutError, match="rows that are carried"):
            writer.write([good, bad])
    with pytest.raises(LayoutError):
        writer.write([Solution("proposal_generator.rpn_head.conv.weight", torch.tensor([0]), torch.zeros(1, 8, 3, 3))])
    with pytest.raises(LayoutError, match="finite"):
        writer.write([Solution(f"{HEADS}.cls_score.weight", torch.tensor([1]), torch.full((1, 24), torch.nan))])
    assert same_bits(before, state_of(model))
    writer.write([good])
    assert changed(before, model) == {f"{HEADS}.cls_score.weight": [1]}
    writer.undo()
    assert same_bits(before, state_of(model))


def test_heads_of_one_space_may_differ_in_what_is_new() -> None:
    """A file with trained boxes and no masks: the boxes are not solved again."""
    model = tiny_model("standard", masks=True)
    before = state_of(model)
    report = fit(model, {f"roi_heads.mask_head.predictor.{leaf}": (0, 1, 2) for leaf in ("weight", "bias")})
    assert {name.rpartition(".")[0] for name in changed(before, model)} <= {"roi_heads.mask_head.predictor"}
    assert any(part.part.startswith(HEADS) and part.reason == "no row is new" for part in report.parts)


def test_the_rpn_is_left_alone_unless_every_carried_class_is_labelled() -> None:
    model = tiny_model("standard")
    report = fit(model, (1,), classes=(1, 2))
    assert "1 carried classes are not labelled" in report.parts[0].reason
    report = fit(tiny_model("standard"), (1,))
    assert report.parts[0].action == "solved"


def test_regions_on_which_a_carried_class_is_confident_are_left_out_and_counted() -> None:
    model = tiny_model("standard")
    fit(model)
    model.roi_heads.box_predictor.cls_score.weight.data[2].normal_(0, 0.01)
    sure = FitSettings(images=40, proposals=12, rpn="never", confident=0.2, regions=2000)
    # Classes 0 and 1 stand in the images, and only class 2 is labelled.
    dataset = [
        {
            **entry,
            "shown": entry["annotations"],
            "annotations": [a for a in entry["annotations"] if a["category_id"] == 2],
        }
        for entry in scenes(30)
    ]
    mapper = lambda entry: {  # noqa: E731
        **scene(entry), "image": scene({**entry, "annotations": entry["shown"]})["image"],
    }  # fmt: skip
    report = fit_new_rows(model, dataset, mapper, new={"thing": (2,)}, settings=sure)
    assert report.parts[-1].left_out > 10 and "left out" in report.parts[-1].line()


def test_nothing_happens_when_no_row_is_new() -> None:
    model = tiny_model("standard")
    before, states = state_of(model), random_streams()
    assert fit(model, ()) == FitReport()
    assert same_bits(before, state_of(model))
    assert random_streams() == states


def test_a_fit_moves_no_global_random_stream() -> None:
    model = tiny_model("standard").train()

    def mapper(entry: dict[str, Any]) -> dict[str, Any]:
        np.random.rand(), random.random(), torch.rand(1)
        return scene(entry)

    states = random_streams()
    fit_new_rows(model, scenes(6), mapper, new={"thing": (0, 1, 2)}, settings=SETTINGS)
    assert random_streams() == states
    assert model.training and model.backbone.training
    with random_states_kept():
        torch.rand(1)
    assert random_streams() == states


def test_a_failed_fit_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("cascade").train()
    before, written = state_of(model), []

    def fail(stage: Any, *args: Any) -> Any:
        if stage.number < 2:
            return boxes_room_solve(stage, *args)
        written.append(changed(before, model))
        raise RuntimeError("the last stage fails")

    boxes_room_solve = boxes_room.solve_boxes
    monkeypatch.setattr(boxes_room, "solve_boxes", fail)
    with pytest.raises(RuntimeError, match="the last stage"):
        fit(model)
    # The RPN and two stages had been written by then, because later stages stand on them.
    assert len(written[0]) >= 8
    assert same_bits(before, state_of(model)) and model.training


def test_undoing_is_what_restores_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mutation of the law above."""
    model = tiny_model("standard")
    before = state_of(model)
    monkeypatch.setattr(entry_room.RowWriter, "undo", lambda self, tensors=None: None)
    monkeypatch.setattr(boxes_room, "solve_boxes", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        fit(model)
    assert not same_bits(before, state_of(model))


def test_retinanet_is_solved_and_its_carried_rows_keep_every_bit() -> None:
    model = tiny_model("retinanet")
    before = state_of(model)
    report = fit(model)
    assert report.solved == ("head",) and "boxes" in report.parts[0].reason
    scored = model.eval()([scene(entry) for entry in scenes(34)[30:]])
    assert all(float(output["instances"].scores.max()) > 0.3 for output in scored)
    model = tiny_model("retinanet")
    fit(model, (1,))
    found = changed(before, model)
    assert set(found) == {"head.cls_score.weight", "head.cls_score.bias"}
    assert all(row % 3 == 1 for rows in found.values() for row in rows)


def test_mask_rows_are_solved_per_pixel() -> None:
    model = tiny_model("standard", masks=True)
    before = state_of(model)
    report = fit(model, (1, 2))
    assert "roi_heads.mask_head.predictor" in report.solved
    assert changed(before, model)["roi_heads.mask_head.predictor.weight"] == [1, 2]
    entry = scene(next(e for e in scenes(60)[40:] if {a["category_id"] for a in e["annotations"]} == {1, 2}))
    with torch.no_grad():
        features = model.backbone(model.preprocess_image([entry]).tensor)
        names = model.roi_heads.mask_in_features
        around = Boxes(entry["instances"].gt_boxes.tensor + torch.tensor([-6.0, -6, 6, 6]))
        logits = model.roi_heads.mask_head.layers(model.roi_heads.mask_pooler([features[n] for n in names], [around]))
    inside = entry["instances"].gt_masks.crop_and_resize(around.tensor, logits.shape[-1])
    for i, k in enumerate(entry["instances"].gt_classes.tolist()):
        assert logits[i, k][inside[i]].mean() > logits[i, k][~inside[i]].mean() + 0.2


def test_sigmoid_heads_are_solved_row_by_row() -> None:
    model = tiny_model("standard", MODEL__ROI_BOX_HEAD__USE_SIGMOID_CE=True)
    before = state_of(model)
    fit(model)
    # Background has no meaning there, so its row is nobody's.
    assert changed(before, model)[f"{HEADS}.cls_score.weight"] == [0, 1, 2]
    assert accuracy(model) > 0.75


def test_classes_without_examples_keep_their_recipe_and_are_named() -> None:
    model = tiny_model("standard", num_classes=5)
    before = state_of(model)
    report = fit(model, range(5), classes=(0, 2))
    assert report.without_examples == {"thing": (1, 3, 4)} and "3 have no example" in report.line()
    found = changed(before, model)
    assert found[f"{HEADS}.cls_score.weight"] == [0, 2, 5]
    assert set(found[f"{HEADS}.bbox_pred.weight"]) <= {0, 1, 2, 3, 8, 9, 10, 11}


def test_no_example_at_all_changes_nothing() -> None:
    model = tiny_model("standard")
    before = state_of(model)
    empty = [{"image_id": i, "annotations": []} for i in range(5)]
    report = fit_new_rows(model, empty, scene, new={"thing": (0, 1, 2)}, settings=SETTINGS)
    assert report.solved == () and "fitted nothing" in report.line()
    assert fit_new_rows(model, [], scene, new={"thing": (0,)}, settings=SETTINGS).solved == ()
    assert same_bits(before, state_of(model))


@pytest.mark.parametrize("classes", [1, 1203])
def test_one_image_and_any_number_of_classes(classes: int) -> None:
    model = tiny_model("standard", num_classes=classes)
    report = fit(model, range(classes), count=1, classes=(classes - 1,))
    assert f"{HEADS}" in report.solved
    assert len(report.without_examples.get("thing", ())) == classes - 1
    assert all(bool(torch.isfinite(value).all()) for value in model.state_dict().values())


def test_images_that_cannot_be_read_are_reported_and_passed_over() -> None:
    def mapper(entry: dict[str, Any]) -> dict[str, Any]:
        if entry["image_id"] == 3:
            raise OSError("image file is truncated")
        return scene(entry)

    report = fit_new_rows(tiny_model("standard"), scenes(12), mapper, new={"thing": (0, 1, 2)}, settings=SETTINGS)
    assert report.skipped == (("3", "image file is truncated"),) and report.images == 11
    assert report.line().endswith("; 1 images passed over (the first: 3, image file is truncated)") and report.solved


def test_nan_in_features_says_nan() -> None:
    def mapper(entry: dict[str, Any]) -> dict[str, Any]:
        mapped = scene(entry)
        if entry["image_id"] in (3, 5):
            mapped["image"] = mapped["image"].float() * (torch.nan if entry["image_id"] == 3 else torch.inf)
        return mapped

    report = fit_new_rows(tiny_model("standard"), scenes(12), mapper, new={"thing": (0, 1, 2)}, settings=SETTINGS)
    told = dict(report.skipped)
    assert told["3"].startswith("the backbone gives NaN in ") and report.images == 10 and report.solved
    assert "the first: 3, the backbone gives NaN in " in report.line()


def test_an_image_past_pillows_limit_is_passed_over() -> None:
    def mapper(entry: dict[str, Any]) -> dict[str, Any]:
        if entry["image_id"] == 3:
            raise Image.DecompressionBombError("Image size (400000000 pixels) exceeds limit")
        return scene(entry)

    report = fit_new_rows(tiny_model("standard"), scenes(12), mapper, new={"thing": (0, 1, 2)}, settings=SETTINGS)
    assert report.images == 11 and report.solved
    assert report.skipped[0][1].endswith(" pixels that Pillow opens: cut it into tiles, or scale it down")


def test_images_with_rare_classes_come_first() -> None:
    dataset = scenes(300, (0, 1))
    dataset[123]["annotations"][0]["category_id"] = 2
    chosen = choose_images(dataset, (0, 1, 2), FitSettings(images=30))
    assert 123 in chosen and len(chosen) == 30 == len(set(chosen)) and chosen == sorted(chosen)
    assert chosen != choose_images(dataset, (0, 1, 2), FitSettings(images=30, seed=1))


@pytest.fixture(scope="module")
def alone() -> dict[str, torch.Tensor]:
    model = tiny_model("standard")
    fit(model, count=13)
    return state_of(model)


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """What the ranks of two jobs wrote, and what was said; one process starts both."""
    folder = tmp_path_factory.mktemp("jobs")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(WORKER), str(folder), "2", "4"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    return folder, done.stderr


@pytest.mark.parametrize("processes", [2, 4])
def test_any_number_of_processes_gives_the_same_rows(
    processes: int, alone: dict[str, torch.Tensor], jobs: tuple[Path, str]
) -> None:
    folder, said = jobs
    states = [torch.load(path, weights_only=True) for path in sorted((folder / str(processes)).glob("*.pt"))]
    assert len(states) == processes, said[-3000:]
    for state in states:
        assert same_bits(alone, state)


@pytest.mark.parametrize(
    "key, value", [("images", 0), ("rpn", "perhaps"), ("penalties", (1e-3, 1e-2)), ("parts", ("x",))]
)
def test_settings_that_cannot_work_name_their_key(key: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"MODEL\.HEAD_ADAPT\.FIT\.{key.upper()}"):
        FitSettings(**{key: value})


def hook(model: Any, start: int = 0, **keys: Any) -> FitHook:
    made = FitHook(lambda: scenes(20), scene, lambda: {"thing": (0, 1, 2)}, SETTINGS, LookaheadSettings(**keys))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.1, momentum=0.9)
    made.trainer = SimpleNamespace(start_iter=start, iter=start, max_iter=1000, model=model, optimizer=optimizer)
    return made


def test_the_hook_fits_before_training() -> None:
    made = hook(tiny_model("standard"))
    made.before_train()
    assert made.report is not None and HEADS in made.report.solved


def test_every_fifth_step_goes_back_half_of_the_way_until_the_calm_ends() -> None:
    model = tiny_model("standard")
    made = hook(model, calm_iters=10, refits=())
    made.before_train()
    weight, begun = model.roi_heads.box_head.fc1.weight, model.roi_heads.box_head.fc1.weight.detach().clone()
    moved = []
    for made.trainer.iter in range(12):
        with torch.no_grad():
            weight.add_(1.0)
        made.after_step()
        moved.append(round(float((weight - begun).mean()), 3))
    assert moved == [1, 2, 3, 4, 2.5, 3.5, 4.5, 5.5, 6.5, 5.0, 6.0, 7.0]


def test_rows_are_solved_again_at_marks_and_their_momentum_is_forgotten() -> None:
    model = tiny_model("standard")
    made = hook(model, refits=(3,), calm_iters=0)
    made.before_train()
    classifier = model.roi_heads.box_predictor.cls_score.weight
    shared = model.proposal_generator.rpn_head.conv.weight
    solved, optimizer = classifier.detach().clone(), made.trainer.optimizer
    with torch.no_grad():
        classifier.add_(1.0)
    for parameter in (classifier, shared):
        optimizer.state[parameter]["momentum_buffer"] = torch.ones_like(parameter)
    moved = classifier.detach().clone()
    made.trainer.iter = 1
    made.after_step()
    assert torch.equal(classifier, moved), "no mark"
    made.trainer.iter = 2
    made.after_step()
    assert float((classifier - solved).abs().max()) < 0.5, "solved again"
    assert float(optimizer.state[classifier]["momentum_buffer"].abs().max()) == 0
    assert float(optimizer.state[shared]["momentum_buffer"].min()) == 1, "what was not written keeps its momentum"
    carried = hook(model, refits=(3,))
    carried._new = lambda: {"thing": (1,)}
    carried.before_train()
    with torch.no_grad():
        classifier.add_(1.0)
    moved = classifier.detach().clone()
    carried.trainer.iter = 2
    carried.after_step()
    assert torch.equal(classifier[[0, 2, 3]], moved[[0, 2, 3]]), "training's own rows are not solved"


def test_backbone_features_are_kept_between_solutions_only_while_the_backbone_is_frozen() -> None:
    seen: list[int] = []
    for frozen in (True, False):
        model = tiny_model("standard")
        model.backbone.requires_grad_(not frozen)
        made = hook(model, refits=(3,), calm_iters=0)
        count: list[int] = []
        handle = model.backbone.register_forward_hook(lambda *_, count=count: count.append(1))
        made.before_train()
        first = len(count)
        made.trainer.iter = 2
        made.after_step()
        handle.remove()
        seen.append(len(count) - first)
    assert seen[0] == 0 and seen[1] == 20


def test_a_continued_run_is_not_fitted_again_and_stays_calm() -> None:
    model = tiny_model("standard")
    first = hook(model)
    assert first.state_dict() == {}
    first.before_train()
    before, second = state_of(model), hook(model, start=100)
    second.load_state_dict(first.state_dict())
    second.before_train()
    assert second.report is None and same_bits(before, state_of(model))
    second.trainer.iter = 199
    second.after_step()
    assert same_bits(before, state_of(model)), "its classes may be others, so nothing is solved again"
    weight = model.roi_heads.box_head.fc1.weight
    with torch.no_grad():
        weight.add_(1.0)
    second.trainer.iter = 204
    second.after_step()
    assert torch.allclose(weight, before["roi_heads.box_head.fc1.weight"] + 0.5), "and it goes on averaging"


@pytest.mark.parametrize("keys", [{"calm_iters": -1}, {"refits": (0,)}], ids=str)
def test_a_calm_that_cannot_work_names_its_key(keys: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"MODEL.HEAD_ADAPT.FIT.{next(iter(keys)).upper()}"):
        LookaheadSettings(**keys)


def test_the_real_model_detects_blood_cells_before_its_first_iteration(real: Path) -> None:
    """A sixth of the training set, no class in common with COCO: stock starts at AP 0.4."""
    cfg = get_cfg()
    fbnet_c4(real).add_fbnet_c4_config(cfg)
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 3
    model = build_seeded(cfg)
    DetectionCheckpointer(model).load(str(real / "models" / "fbnet_c4_coco.pth"))
    before = state_of(model)
    for part in ("train", "val"):
        register_coco_instances(f"cells_{part}", {}, str(real / "bccd" / f"{part}.json"), str(real / "bccd" / part))
    train, val = DatasetCatalog.get("cells_train"), DatasetCatalog.get("cells_val")[:24]
    settings = FitSettings(images=36, mirror=False)
    report = fit_new_rows(model, train, mapper_at_test_size(cfg), new={"thing": (0, 1, 2)}, settings=settings)
    assert report.solved == ("proposal_generator", HEADS)
    layers = ("cls_score", "bbox_pred", "objectness_logits", "anchor_deltas")
    assert {name.split(".")[-2] for name in changed(before, model)} == set(layers)
    # Of every object, the best box of its class: overlap of 0.5 with a score of 0.3.
    found = total = 0
    mapper = mapper_at_test_size(cfg)
    for entry in val:
        mapped = mapper(copy.deepcopy(entry))
        truth = mapped.pop("instances")
        with torch.no_grad():
            output = model.eval()([{"image": mapped["image"]}])[0]["instances"]
        output = output[output.scores > 0.3]
        overlap = pairwise_iou(truth.gt_boxes, output.pred_boxes) >= 0.5
        same = truth.gt_classes[:, None] == output.pred_classes[None]
        found += int((overlap & same).any(1).sum())
        total += len(truth)
    assert found / total > 0.6
