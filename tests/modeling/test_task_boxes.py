"""Tasks on boxes: labels of matched regions in training, the region of each detection in inference, stock untouched."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.layers import ShapeSpec
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.roi_heads import FastRCNNOutputLayers, StandardROIHeads
from detectron2.structures import Boxes, Instances, pairwise_iou
from detectron2.utils.events import EventStorage
from helpers.box_tasks import TASKS, labelled_batch, task_cfg, task_model
from helpers.commands import ROOT
from helpers.models import OURS, batch, build_seeded, detections, names, same_bits, tiny_cfg, training_losses
from torch import nn

import d2_headadapt.modeling.predictor
import d2_headadapt.modeling.roi_heads
from d2_headadapt import ClassTable, HeadAdaptCheckpointer, HeadAdaptOutputLayers
from d2_headadapt.data.task_spec import TaskSpec
from d2_headadapt.errors import ConfigError
from d2_headadapt.modeling.task_boxes import Predictions, carry_labels
from d2_headadapt.setup.task_checks import check_tasks

WORKER = Path(__file__).parents[1] / "workers" / "box_task_worker.py"
K = 5


def last_predictor(model: nn.Module) -> Any:
    found = model.roi_heads.box_predictor
    return found[-1] if isinstance(found, nn.ModuleList) else found


def seen_regions(model: nn.Module, inputs: list[Any]) -> tuple[list[Instances], torch.Tensor, list[Boxes]]:
    """Detections before any resizing, with the features and boxes of the regions that the predictor saw."""
    predictor = last_predictor(model)
    features: list[torch.Tensor] = []
    boxes: list[list[Boxes]] = []
    inference = predictor.inference

    def watch(predictions, proposals):
        boxes.append([p.proposal_boxes for p in proposals])
        return inference(predictions, proposals)

    hook = predictor.register_forward_pre_hook(lambda module, args: features.append(args[0]))
    predictor.inference = watch
    try:
        with torch.no_grad():
            found = model.eval().inference(inputs, do_postprocess=False)
    finally:
        hook.remove()
        del predictor.inference
    return found, features[0].flatten(1), boxes[0]


def regions_by_search(
    predictor: FastRCNNOutputLayers, features: torch.Tensor, boxes: list[Boxes], found: list[Instances]
) -> list[int]:
    """For every detection, the one region whose own scores and decoded boxes hold it, bit for bit."""
    scores = predictor.cls_score(features).softmax(-1)
    decoded = predictor.box2box_transform.apply_deltas(
        predictor.bbox_pred(features), torch.cat([b.tensor for b in boxes])
    )
    regions, start = [], 0
    for image, own in zip(found, boxes, strict=True):
        for i in range(len(image)):
            matching = []
            for r in range(start, start + len(own)):
                if not decoded[r].isfinite().all():
                    continue
                c = int(image.pred_classes[i])
                corner = 4 * c if decoded.shape[1] > 4 else 0
                box = Boxes(decoded[r : r + 1, corner : corner + 4].clone())
                box.clip(image.image_size)
                if scores[r, c] == image.scores[i] and torch.equal(box.tensor[0], image.pred_boxes.tensor[i]):
                    matching.append(r)
            assert len(matching) == 1
            regions += matching
        start += len(own)
    return regions


def task_scores(model: nn.Module, features: torch.Tensor) -> dict[str, torch.Tensor]:
    """Scores by the plain layers, without our forward."""
    found = {}
    for name, task in TASKS.items():
        head = last_predictor(model).tasks[name]
        x = head.hidden(features).relu() if task.get("hidden") else features
        logits = head.predictor(x)
        found[name] = logits.sigmoid() if task.get("kind") == "multi" else logits.softmax(-1)
    return found


def aligned(model: nn.Module, inputs: list[Any], broken: int = 0) -> bool:
    """Whether every detection has the scores of its own region, bit for bit; the first rows may be not finite."""
    predictor = last_predictor(model)

    def spoil(module, args, output):
        output = output.clone()
        output[:broken] = math.nan
        output[14 : 14 + broken] = math.inf
        return output

    hook = predictor.bbox_pred.register_forward_hook(spoil)
    with torch.no_grad():
        found, features, boxes = seen_regions(model, inputs)
        regions = regions_by_search(predictor, features, boxes, found)
        expected = task_scores(model, features[regions])
    hook.remove()
    assert len(regions) > 8 and len({len(image) for image in found} | {0}) > 1
    same = True
    # Two proposals on one cell of a coarse map may look alike.
    assert torch.cat(list(expected.values()), 1).unique(dim=0).shape[0] > 0.8 * len(set(regions))
    for name, scores in expected.items():
        mine = torch.cat([image.get(f"scores_{name}") for image in found])
        same = same and torch.equal(mine, scores)
        best = torch.cat([image.get(f"pred_{name}") for image in found])
        if name == "tags":
            assert best.dtype == torch.bool and torch.equal(best, mine >= 0.5)
        else:
            assert best.dtype == torch.int64 and torch.equal(best, mine.argmax(1))
    return same


@pytest.mark.parametrize("broken", [0, 3])
@pytest.mark.parametrize("agnostic", [False, True])
@pytest.mark.parametrize("kind", ["standard", "c4"])
def test_every_detection_has_the_scores_of_its_region(kind: str, agnostic: bool, broken: int) -> None:
    """Against a search over all regions, through suppression, in three images, also where stock drops rows."""
    assert aligned(task_model(kind, agnostic=agnostic), batch(K, images=3), broken)


@pytest.mark.parametrize("wrong", ["rows that stock dropped are counted", "all images count from the first"])
def test_mutation_a_wrong_region_is_seen(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The two ways to misread stock's kept indices."""

    def naive(self, predictions, proposals):
        instances, kept = FastRCNNOutputLayers.inference(self, predictions, proposals)
        starts = [0]
        for p in proposals[:-1]:
            starts.append(starts[-1] + len(p) if wrong.startswith("rows") else 0)
        rows = torch.cat([start + own for start, own in zip(starts, kept, strict=True)])
        self.classify(predictions.features[rows], instances)
        return instances, kept

    monkeypatch.setattr(HeadAdaptOutputLayers, "inference", naive)
    assert not aligned(task_model(), batch(K, images=3), broken=3)


def test_a_cascade_scores_its_final_boxes() -> None:
    """Its boxes are those of no region: each is pooled alone here, through the last stage."""
    model = task_model("cascade")
    inputs = batch(K, images=3)
    with torch.no_grad():
        found = model.eval().inference(inputs, do_postprocess=False)
        heads = model.roi_heads
        images = model.preprocess_image(inputs)
        levels = model.backbone(images.tensor)
        assert sum(map(len, found)) > 8
        everything: dict[str, list[torch.Tensor]] = {name: [] for name in TASKS}
        for i, image in enumerate(found):
            maps = [levels[name][i : i + 1] for name in heads.box_in_features]
            for j in range(len(image)):
                pooled = heads.box_pooler(maps, [image.pred_boxes[j]])
                for name, scores in task_scores(model, heads.box_head[-1](pooled)).items():
                    everything[name].append(scores[0])
    for name, parts in everything.items():
        mine = torch.cat([image.get(f"scores_{name}") for image in found])
        # A matrix product of other height rounds differently.
        assert torch.allclose(mine, torch.stack(parts), atol=1e-5)
    mine = torch.cat([image.get(f"scores_{name}") for image in found for name in TASKS][: len(TASKS)], 1)
    places = found[0].pred_boxes.tensor.unique(dim=0).shape[0]
    assert places > 2 and mine.unique(dim=0).shape[0] >= places


@pytest.mark.parametrize("kind", OURS)
def test_boxes_from_elsewhere_get_tasks_too(kind: str) -> None:
    """``inference(detected_instances=...)``, which test-time augmentation uses, in the order of the boxes."""
    model = task_model(kind)
    inputs = batch(K, images=2)
    given = []
    for order in ([0, 1, 2], [2, 0, 1]):
        boxes = Boxes(torch.tensor([[2.0, 3, 30, 40], [10, 8, 50, 60], [0, 0, 64, 64]])[order])
        given.append(Instances((64, 64), pred_boxes=boxes, pred_classes=torch.tensor([0, 1, 2])[order]))
    with torch.no_grad():
        model.eval()
        one, two = (
            model.inference(inputs, detected_instances=[one, other], do_postprocess=False)
            for one, other in ((given[0], given[0]), (given[1], given[1]))
        )
    for image, other in zip(one, two, strict=True):
        for name in TASKS:
            mine = image.get(f"scores_{name}")
            assert mine.unique(dim=0).shape[0] == 3
            assert torch.allclose(mine[[2, 0, 1]], other.get(f"scores_{name}"), atol=1e-6)
            assert len(image.get(f"pred_{name}")) == 3


def loss_by_hand(logits: list[list[float]], labels: list[Any], multi: bool) -> float:
    """Mean over what is labelled, in Python numbers."""
    losses = []
    for row, label in zip(logits, labels, strict=True):
        if multi:
            for value, target in zip(row, label, strict=True):
                if target >= 0:
                    losses.append(math.log1p(math.exp(-value if target else value)))
        elif label >= 0:
            losses.append(math.log(sum(math.exp(v) for v in row)) - row[label])
    return sum(losses) / len(losses)


def small_predictor() -> HeadAdaptOutputLayers:
    torch.manual_seed(0)
    tasks = (
        TaskSpec("parity", "box", ClassTable(["even", "odd"]), loss_weight=0.5),
        TaskSpec("tags", "box", ClassTable(["a", "b", "c"]), kind="multi"),
    )
    made = HeadAdaptOutputLayers(
        ShapeSpec(channels=4), box2box_transform=Box2BoxTransform((10, 10, 5, 5)), num_classes=3, tasks=tasks
    )
    nn.init.normal_(made.tasks["parity"].predictor.weight)
    nn.init.normal_(made.tasks["tags"].predictor.weight)
    return made


def small_proposals() -> list[Instances]:
    """Regions of three images: the second has no label of any task, the third has no region."""
    boxes = Boxes(torch.tensor([[0.0, 0, 9, 9]]).repeat(6, 1))
    first = Instances((20, 20), proposal_boxes=boxes, gt_boxes=boxes)
    # 3 is background: the labels of such a region are those of some object, as stock detectron2 leaves its gt_boxes.
    first.gt_classes = torch.tensor([0, 3, 2, 3, 1, 2])
    first.gt_parity = torch.tensor([1, 0, -1, 1, 0, 1])
    first.gt_tags = torch.tensor([[1, 0, -1], [1, 1, 1], [-1, -1, -1], [1, 1, 1], [0, -1, 1], [1, 1, 0]]).float()
    second = Instances((20, 20), proposal_boxes=boxes[:2], gt_boxes=boxes[:2], gt_classes=torch.tensor([0, 3]))
    third = Instances((20, 20), proposal_boxes=boxes[:0], gt_boxes=boxes[:0], gt_classes=torch.tensor([]).long())
    return [first, second, third]


def test_losses_are_those_of_a_hand_computation() -> None:
    made, proposals = small_predictor(), small_proposals()
    x = torch.randn(8, 4)
    with EventStorage() as storage:
        losses = made.losses(made(x), proposals)
    rows = [0, 2, 4, 5]
    for name, factor in (("parity", 0.5), ("tags", 1.0)):
        layer = made.tasks[name].predictor
        logits = layer(x)[rows].tolist()
        labels = proposals[0].get(f"gt_{name}")[rows].tolist()
        assert losses[f"loss_task_{name}"].item() == pytest.approx(
            5 / 8 * factor * loss_by_hand(logits, labels, name == "tags"), rel=1e-5
        )
        right = [
            (guess >= 0 if name == "tags" else None, row, label)
            for row, label in zip(logits, labels, strict=True)
            for guess in row[:1]
        ]
        if name == "parity":
            known = [(row, label) for _, row, label in right if label >= 0]
            share = sum(row.index(max(row)) == label for row, label in known) / len(known)
        else:
            pairs = [
                (value, target)
                for _, row, label in right
                for value, target in zip(row, label, strict=True)
                if target >= 0
            ]
            share = sum((value >= 0) == bool(target) for value, target in pairs) / len(pairs)
        assert storage.latest()[f"task/{name}/accuracy"][0] == pytest.approx(share)


@pytest.mark.parametrize("region", [1, 3])
def test_background_does_not_count(region: int) -> None:
    """Whatever label such a region has."""
    made, proposals, changed = small_predictor(), small_proposals(), small_proposals()
    changed[0].gt_parity[region] = 1 - changed[0].gt_parity[region]
    foreground = small_proposals()
    foreground[0].gt_parity[0] = 0
    x = torch.randn(8, 4)
    with EventStorage():
        one, other, third = (made.losses(made(x), p)["loss_task_parity"] for p in (proposals, changed, foreground))
    assert torch.equal(one, other)
    assert not torch.equal(one, third)


@pytest.mark.parametrize("proposals", [small_proposals()[1:], small_proposals()[2:]], ids=["no label", "no region"])
def test_without_a_label_losses_are_zero_and_reach_every_parameter(proposals: list[Instances]) -> None:
    made = small_predictor()
    rows = sum(map(len, proposals))
    with EventStorage() as storage:
        losses = made.losses(made(torch.randn(rows, 4)), proposals)
    mine = {name: value for name, value in losses.items() if name.startswith("loss_task_")}
    assert list(mine) == ["loss_task_parity", "loss_task_tags"]
    sum(mine.values()).backward()
    assert all(value.item() == 0 for value in mine.values())
    assert all(p.grad is not None and not p.grad.any() for p in made.tasks.parameters())
    assert not any(name.startswith("task/") for name in storage.latest())


def test_predictions_are_the_pair_that_stock_unpacks() -> None:
    made, x = small_predictor(), torch.randn(5, 2, 2, 1)
    predictions = made(x)
    scores, deltas = predictions
    assert isinstance(predictions, tuple) and len(predictions) == 2 and isinstance(predictions, Predictions)
    assert torch.equal(predictions.features, x.flatten(1))
    assert torch.equal(scores, made.cls_score(x.flatten(1))) and torch.equal(deltas, made.bbox_pred(x.flatten(1)))
    with EventStorage(), pytest.raises(ConfigError, match="own return value"):
        made.losses((scores, deltas), small_proposals()[2:])


@pytest.mark.parametrize("kind", OURS)
def test_tasks_change_nothing_of_the_detector(kind: str) -> None:
    """Same seed, masks on: stream, initial weights, training losses and detections are stock's, bit for bit."""
    stock = build_seeded(tiny_cfg(kind, ours=False))
    stream = torch.get_rng_state()
    ours = build_seeded(task_cfg(kind, masks=True))
    assert torch.equal(stream, torch.get_rng_state())
    state = ours.state_dict()
    added = [name for name in state if ".tasks." in name]
    assert len(added) == 8
    where = "roi_heads.box_predictor.2.tasks." if kind == "cascade" else "roi_heads.box_predictor.tasks."
    assert all(name.startswith(where) for name in added)
    assert same_bits(stock.state_dict(), {name: value for name, value in state.items() if name not in added})
    inputs = labelled_batch(masks=True)
    expected, losses = training_losses(stock, inputs), training_losses(ours, inputs)
    suffix = "_stage2" if kind == "cascade" else ""
    mine = [f"loss_task_{name}{suffix}" for name in TASKS]
    assert set(losses) == {*expected, *mine} and all(losses[name] > 0 for name in mine)
    assert same_bits(expected, {name: losses[name] for name in expected})
    for one, other in zip(detections(stock, inputs), detections(ours, inputs), strict=True):
        assert set(other) == {*one, *(f"{field}_{name}" for field in ("pred", "scores") for name in TASKS)}
        assert same_bits(one, {name: other[name] for name in one})


def matched_labels(model: nn.Module, inputs: list[Any]) -> list[tuple[Instances, Instances]]:
    """Regions of the last predictor in training beside the ground truth of their image."""
    predictor, seen = last_predictor(model), []
    losses = predictor.losses
    predictor.losses = lambda predictions, proposals: (seen.extend(proposals), losses(predictions, proposals))[1]
    try:
        training_losses(model, inputs)
    finally:
        del predictor.losses
    return list(zip(seen, (entry["instances"] for entry in inputs), strict=True))


def labels_are_those_of_the_nearest_object(model: nn.Module) -> bool:
    count, same = 0, True
    for regions, truth in matched_labels(model, labelled_batch(missing=0.2)):
        if not len(truth):
            continue
        overlap = pairwise_iou(regions.proposal_boxes, truth.gt_boxes)
        for i in (regions.gt_classes < K).nonzero()[:, 0].tolist():
            nearest = int(overlap[i].argmax())
            count += 1
            for name in TASKS:
                mine = regions.get(f"gt_{name}")[i] if regions.has(f"gt_{name}") else torch.tensor(-2)
                same = same and torch.equal(mine, truth.get(f"gt_{name}")[nearest])
    assert count > 2
    return same


@pytest.mark.parametrize("kind", OURS)
def test_a_region_learns_the_labels_of_the_object_it_matched(kind: str) -> None:
    assert labels_are_those_of_the_nearest_object(near_objects(task_model(kind)))


def near_objects(model: nn.Module) -> nn.Module:
    """A cascade's later stages match only what earlier ones left close to an object: here boxes stay as they are."""
    for name, value in model.named_parameters():
        if "bbox_pred" in name and "roi_heads" in name:
            nn.init.zeros_(value)
    return model


def test_mutation_a_cascade_that_drops_or_shuffles_labels_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    model = near_objects(task_model("cascade"))
    monkeypatch.setattr(d2_headadapt.modeling.roi_heads, "carry_labels", lambda *arguments: None)
    assert not labels_are_those_of_the_nearest_object(model)

    def shifted(heads, truth, regions, matched):
        carry_labels(heads, truth, regions, (matched + 1) % max(len(truth), 1))

    monkeypatch.setattr(d2_headadapt.modeling.roi_heads, "carry_labels", shifted)
    assert not labels_are_those_of_the_nearest_object(model)


@pytest.mark.parametrize("kind", OURS)
def test_no_detection_has_empty_fields(kind: str) -> None:
    """Evaluators get tensors of the right widths, of no row."""
    model = task_model(kind)
    for predictor in model.roi_heads.box_predictor if kind == "cascade" else [model.roi_heads.box_predictor]:
        predictor.test_score_thresh = 2.0
    with torch.no_grad():
        found = [output["instances"] for output in model.eval()(batch(K, images=2))]
    for image in found:
        assert len(image) == 0 and instances_to_coco_json(image, 1) == []
        assert image.pred_parity.shape == (0,) and image.scores_colour.shape == (0, 4)
        assert image.pred_tags.shape == (0, 3) and image.pred_tags.dtype == torch.bool


def test_another_list_for_one_task_leaves_the_others_bit_for_bit(tmp_path: Path) -> None:
    """One task gets another list, one goes, one comes; nothing is trained."""
    old = task_model()
    HeadAdaptCheckpointer(old, str(tmp_path)).save("three")
    tasks: dict[str, Mapping[str, Any]] = {
        "shape": {"on": "box", "classes": ["round", "square"]},
        "colour": {**TASKS["colour"], "classes": ["blue", "violet", "red"]},
        "tags": TASKS["tags"],
    }
    new = build_seeded(task_cfg("standard", tasks), seed=4)
    fresh = {name: value.clone() for name, value in new.state_dict().items()}
    HeadAdaptCheckpointer(new, str(tmp_path)).load(str(tmp_path / "three.pth"))
    inputs = batch(K, images=3)
    for one, other in zip(detections(old, inputs), detections(new, inputs), strict=True):
        assert len(one["scores"]) > 2
        assert same_bits({"x": one["scores_tags"]}, {"x": other["scores_tags"]})
        assert torch.equal(one["pred_boxes"], other["pred_boxes"]) and torch.equal(one["scores"], other["scores"])
        assert "pred_parity" not in other and other["scores_shape"].shape[1] == 2
    where = "roi_heads.box_predictor.tasks."
    before, after = old.state_dict(), new.state_dict()
    for leaf in ("weight", "bias"):
        name = f"{where}colour.predictor.{leaf}"
        # blue, violet, red of red, green, blue, yellow
        assert torch.equal(after[name][[0, 2]], before[name][[2, 0]])
        assert torch.equal(after[name][1], fresh[name][1])
        assert torch.equal(after[f"{where}shape.predictor.{leaf}"], fresh[f"{where}shape.predictor.{leaf}"])
        assert torch.equal(after[f"{where}colour.hidden.{leaf}"], before[f"{where}colour.hidden.{leaf}"])


def test_two_processes_of_which_one_has_no_label(tmp_path: Path) -> None:
    """DDP never waits for a gradient, and both ranks end with the same bits."""
    ran = train_on_two_ranks(tmp_path)
    assert ran.returncode == 0, ran.stderr[-3000:]
    one, other = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert same_bits(one, other)
    start = task_model().state_dict()
    moved = [name for name in start if ".tasks." in name and not torch.equal(start[name], one[name])]
    assert len(moved) == 8


def test_mutation_a_loss_without_a_graph_stops_two_processes(tmp_path: Path) -> None:
    ran = train_on_two_ranks(tmp_path, "mutation")
    assert ran.returncode != 0
    assert "Expected to have finished reduction" in ran.stderr or "element 0 of tensors" in ran.stderr


def train_on_two_ranks(folder: Path, *more: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(WORKER), str(folder), *more]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)


IMAGE = {"scene": {"on": "image", "classes": ["in", "out"]}}
BOX = {"parity": TASKS["parity"]}


@pytest.mark.parametrize(
    ("tasks", "keys", "text"),
    [
        (IMAGE, {}, "MODEL.TASKS.scene.on: expected an architecture that classifies images"),
        (BOX, {"ROI_HEADS.NAME": "StandardROIHeads"}, "Set MODEL.ROI_HEADS.NAME HeadAdaptROIHeads."),
        (BOX, {"ROI_HEADS.NAME": "CascadeROIHeads"}, "Set MODEL.ROI_HEADS.NAME HeadAdaptCascadeROIHeads."),
        (BOX, {"META_ARCHITECTURE": "RetinaNet"}, "RetinaNet, which has none"),
        (BOX, {"META_ARCHITECTURE": "MultiTaskClassifier"}, "MultiTaskClassifier, which has none"),
        ({"classes": TASKS["parity"]}, {}, "pred_classes is detectron2's"),
    ],
)
def test_a_task_that_nothing_would_read_is_an_error(tasks: Any, keys: dict[str, str], text: str) -> None:
    cfg = task_cfg(tasks=tasks)
    cfg.merge_from_list([part for key, value in keys.items() for part in (f"MODEL.{key}", value)])
    with pytest.raises(ConfigError) as caught:
        check_tasks(cfg)
    assert text in str(caught.value)


@pytest.mark.parametrize("keys", [{}, {"META_ARCHITECTURE": "SomebodysOwn"}, {"ROI_HEADS.NAME": "SomebodysOwn"}])
def test_a_task_that_may_have_a_reader_is_none(keys: dict[str, str]) -> None:
    cfg = task_cfg(tasks=BOX)
    cfg.merge_from_list([part for key, value in keys.items() for part in (f"MODEL.{key}", value)])
    check_tasks(cfg)
    check_tasks(CfgNode({"MODEL": {**tiny_cfg(ours=False).MODEL}}))


def test_a_predictor_of_somebodys_own_cannot_have_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would never read them."""

    class Mine(FastRCNNOutputLayers):
        pass

    monkeypatch.setattr("detectron2.modeling.roi_heads.roi_heads.FastRCNNOutputLayers", Mine)
    with pytest.raises(ConfigError, match="Mine, which knows no tasks"):
        build_seeded(task_cfg())
    assert type(build_seeded(task_cfg(tasks={})).roi_heads.box_predictor) is Mine


def test_stock_heads_know_no_tasks() -> None:
    """What ``check_tasks`` says of them."""
    assert not hasattr(StandardROIHeads, "reads_box_tasks") and names(1) == ["class 0"]
