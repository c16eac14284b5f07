"""T1: with ``KEEP: exact`` every old detection keeps its bits; T2: what must make that fail."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from detectron2.modeling.roi_heads.fast_rcnn import fast_rcnn_inference
from detectron2.structures import Boxes, Instances
from helpers.keep import KINDS, OLD, base_model, differs, extended, keep_settings, train_steps
from helpers.models import batch, detections, names, state_of, tiny_cfg, training_losses
from torch import nn

from d2_headadapt import ClassTable, KeepSettings, PackSpec, attach_keep, layouts_of
from d2_headadapt.errors import ClassTableError, ConfigError
from d2_headadapt.modeling.keep import KeptModel, KeptROIHeads, joined, keep_of, old_predictors

CASES = [(kind, masks, head) for kind in KINDS for masks in (False, True) for head in ("shared", "copy")]
CASES = [case for case in CASES if case[0] != "retinanet" or case[1:] == (False, "shared")]


@pytest.mark.parametrize(("kind", "masks", "head"), CASES)
def test_old_detections_keep_their_bits_through_training(kind: str, masks: bool, head: str) -> None:
    model, inputs = base_model(kind, masks=masks), batch(2, masks=masks)
    before, weights = detections(model, inputs), state_of(model)
    extended(model, keep_settings(head=head))
    start = state_of(model)
    assert differs(before, detections(model, inputs)) == []
    train_steps(model, inputs)
    assert differs(before, detections(model, inputs)) == []
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, start[name])}
    assert any("cls_score" in name for name in moved) and all("keep.packs.0." in name for name in moved)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in weights.items())


@pytest.mark.parametrize("kind", KINDS)
def test_old_detections_do_not_depend_on_the_batch_more_than_stocks_do(kind: str) -> None:
    """Batch 1 and 2: the base model's own calls have the same shapes in both."""
    model, inputs = base_model(kind), batch(2)
    alone = [detections(model, [image])[0] for image in inputs]
    extended(model)
    assert differs(alone, [detections(model, [image])[0] for image in inputs]) == []


def test_new_detections_stand_behind_the_old_ones() -> None:
    """Each of the two has a top-k of its own, of 8 in the tiny model."""
    model, inputs = base_model("standard"), batch(2)
    old = detections(model, inputs)
    sure_of_new_classes(extended(model))
    for before, after in zip(old, detections(model, inputs), strict=True):
        new = after["pred_classes"][len(before["scores"]) :]
        assert len(before["scores"]) == 8 and len(new) > 0 and set(new.tolist()) == {OLD}


def test_only_the_branch_is_trained() -> None:
    model = extended(base_model("standard", masks=True))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained and all(name.startswith("roi_heads.keep.packs.0.") and ".second." not in name for name in trained)
    losses = training_losses(model, batch(2, masks=True))
    assert set(losses) == {"loss_cls", "loss_box_reg", "loss_mask"}
    sum(losses.values()).backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == trained


def test_a_second_session_leaves_the_base_and_the_first_one_alone() -> None:
    """The first pack's detections are the same bits beside a second pack, trained or not."""
    inputs = batch(2)
    first = extended(base_model("standard"), keep_settings([["rhino", "gnu"]]))
    train_steps(first, inputs)
    before = detections(first, inputs)
    second = extended(base_model("standard"), keep_settings([["rhino", "gnu"], ["lion"]], ["lion", "class 1"]))
    assert second.load_state_dict(first.state_dict(), strict=False).unexpected_keys == []
    train_steps(second, inputs)
    assert differs(before, detections(second, inputs)) == []


def test_the_training_sets_indices_are_read_by_name() -> None:
    """Old classes in the training set are *other*; the order of its list does not matter."""
    inputs = batch(3)
    losses = []
    for labels in (["rhino", "class 3", "gnu"], ["class 3", "gnu", "rhino"]):
        model = extended(base_model("standard"), keep_settings([["rhino", "gnu"]], labels))
        moved = [dict(image) for image in inputs]
        for image in moved:
            image["instances"] = image["instances"][:]
            named = [["rhino", "class 3", "gnu"][k] for k in image["instances"].gt_classes.tolist()]
            image["instances"].gt_classes = torch.tensor([labels.index(name) for name in named], dtype=torch.int64)
        losses.append(training_losses(model, moved))
    assert all(torch.equal(losses[0][name], losses[1][name]) for name in losses[0])


def test_more_new_classes_than_old_ones_train() -> None:
    """A new class's index may be the old heads' index of background."""
    model = extended(base_model("cascade"), keep_settings([names(OLD + 3, "new")]))
    losses = training_losses(model, batch(OLD + 3))
    assert all(bool(torch.isfinite(value)) for value in losses.values())


def test_a_pack_has_a_label_space_of_its_own() -> None:
    model = extended(base_model("standard", masks=True), keep_settings([["rhino"], ["lion"]]))
    spaces = {layout.tensor: layout.space for layout in layouts_of(model)}
    assert {space for name, space in spaces.items() if ".keep." not in name} == {"thing"}
    assert {space for name, space in spaces.items() if ".packs.1." in name} == {"added_1"}
    assert "roi_heads.keep.packs.0.mask_predictor.weight" in spaces


def test_the_models_own_random_stream_does_not_move() -> None:
    model = base_model("standard")
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    extended(model)
    assert torch.equal(torch.rand(3), wanted)


# What must make T1 fail.


def mutated(monkeypatch: pytest.MonkeyPatch, change: Any) -> list[str]:
    """Which old detections differ where ``change`` replaces what puts packs behind the old path."""
    model, inputs = base_model("standard"), batch(2)
    before = detections(model, inputs)
    extended(model)
    sure_of_new_classes(model)
    monkeypatch.setattr(KeptROIHeads, "_with_packs", change)
    return differs(before, detections(model, inputs))


def sure_of_new_classes(model: nn.Module) -> None:
    """A branch that finds its first class everywhere."""
    with torch.no_grad():
        model.get_parameter("roi_heads.keep.packs.0.predictors.0.cls_score.bias")[0] = 1e6


def both_heads(self: Any, proposals: list[Instances], calls: Any) -> Any:
    """Logits and boxes of the old head and of the first pack on the same regions of the first image and the rest."""
    old, (pack,) = old_predictors(self)[0], self.keep.packs
    new = pack.predictors[0](calls[0][0])
    return old, calls[0][1], new, pack.predictors[0]


def test_mutation_joint_softmax(monkeypatch: pytest.MonkeyPatch) -> None:
    def joint(self: Any, features: Any, proposals: Any, found: Any, calls: Any) -> Any:
        old, seen, new, _ = both_heads(self, proposals, calls)
        scores = torch.cat([seen[0][:, :OLD], new[0][:, :-1], seen[0][:, OLD:]], 1).softmax(1)
        only_old = torch.cat([scores[:, :OLD], scores[:, -1:]], 1).split([len(p) for p in proposals])
        sizes = [p.image_size for p in proposals]
        return fast_rcnn_inference(old.predict_boxes(seen, proposals), list(only_old), sizes, 0.0, 0.5, 8)[0]

    assert any("scores" in name for name in mutated(monkeypatch, joint))


def test_mutation_joint_nms(monkeypatch: pytest.MonkeyPatch) -> None:
    def joint(self: Any, features: Any, proposals: Any, found: Any, calls: Any) -> Any:
        _, _, new, pack = both_heads(self, proposals, calls)
        boxes, probs = pack.predict_boxes(new, proposals), pack.predict_probs(new, proposals)
        out = []
        for image, box, prob in zip(found, boxes, probs, strict=True):
            every = torch.cat([image.pred_boxes.tensor, box[:, :4]])
            score = torch.cat([image.scores, prob[:, 0]])
            kept = fast_rcnn_inference([every], [torch.stack([score, 1 - score], 1)],
                                                   [image.image_size], 0.0, 0.5, 100)[1][0]  # fmt: skip
            out.append(image[torch.isin(torch.arange(len(image)), kept)])
        return out

    assert mutated(monkeypatch, joint)


def test_mutation_joint_top_k(monkeypatch: pytest.MonkeyPatch) -> None:
    original = KeptROIHeads._with_packs

    def joint(self: Any, *args: Any) -> Any:
        return [image[image.scores.argsort(descending=True)[:8]] for image in original(self, *args)]

    assert mutated(monkeypatch, joint)


def test_mutation_merged_proposals(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = base_model("standard"), batch(2)
    before = detections(model, inputs)
    extended(model)
    original = KeptROIHeads.forward

    def merged(self: Any, images: Any, features: Any, proposals: Any, targets: Any = None) -> Any:
        extra = self.keep.packs[0].second(self.keep.rpn, features, proposals)
        more = [Instances(p.image_size, proposal_boxes=Boxes.cat([p.proposal_boxes, e])) for p, e in
                zip(proposals, extra, strict=True)]  # fmt: skip
        return original(self, images, features, more, targets)

    monkeypatch.setattr(KeptROIHeads, "forward", merged)
    assert differs(before, detections(model, inputs))


def test_mutation_one_tensor_is_not_frozen() -> None:
    model, inputs = base_model("standard"), batch(2)
    before = detections(model, inputs)
    extended(model, keep_settings(head="copy"))
    # Weight decay alone moves it: no loss reaches it.
    parameter = model.get_parameter("roi_heads.box_predictor.cls_score.weight")
    parameter.requires_grad_(True)
    parameter.grad = torch.zeros_like(parameter)
    torch.optim.SGD([parameter], 0.1, weight_decay=0.1).step()
    assert any("scores" in name for name in differs(before, detections(model, inputs)))


def with_batch_norm() -> nn.Module:
    return base_model("standard", MODEL__FPN__NORM="BN")


def test_batch_norm_does_not_move() -> None:
    model, inputs = with_batch_norm(), batch(2)
    before = detections(model, inputs)
    extended(model)
    train_steps(model, inputs)
    assert differs(before, detections(model, inputs)) == []


def test_mutation_batch_norm_in_train_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = with_batch_norm(), batch(2)
    before = detections(model, inputs)
    extended(model)
    monkeypatch.delattr(KeptModel, "train")
    model.train()
    model.proposal_generator.eval()
    model.roi_heads.training = False
    train_steps(model, inputs, 1)
    assert differs(before, detections(model, inputs))


# Suppress.


def test_a_sure_new_detection_hides_the_old_one_under_it() -> None:
    settings = keep_settings([["rhino"]], detections="suppress", suppress_score=0.6)
    boxes = torch.tensor([[0.0, 0, 10, 10], [20, 20, 30, 30], [0, 0, 10, 11]])
    old = Instances((40, 40), pred_boxes=Boxes(boxes), scores=torch.ones(3), pred_classes=torch.tensor([0, 1, OLD]))
    for score, left in ((0.5, [0, 1, OLD]), (0.7, [1, OLD])):
        new = Instances(
            (40, 40), pred_boxes=Boxes(boxes[:1]), scores=torch.tensor([score]), pred_classes=torch.tensor([OLD])
        )
        assert joined(old, new, settings, OLD).pred_classes.tolist() == [*left, OLD]


# What a user can get wrong.


def test_what_cannot_be_extended_is_refused() -> None:
    model = base_model("standard")
    with pytest.raises(ConfigError, match=r"a model of the base's 3 classes .* found one of 5"):
        attach_keep(model, KeepSettings(ClassTable(["a", "b", "c"]), (PackSpec(("d",)),)))
    extended(model)
    with pytest.raises(ConfigError, match=r"without added classes, found .*, which has some"):
        attach_keep(model, keep_settings())
    with pytest.raises(ConfigError, match=r"expected a GeneralizedRCNN or RetinaNet .* found Linear"):
        attach_keep(nn.Linear(2, 2), keep_settings())
    with pytest.raises(ConfigError, match=r"KEEP_HEAD: expected shared: .* has no box head"):
        attach_keep(base_model("retinanet"), keep_settings(head="copy"))


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"detections": "hide"}, "KEEP_DETECTIONS: expected one of append, suppress"),
        ({"proposals": "yes"}, "KEEP_PROPOSALS: expected one of auto, on, off"),
        ({"head": "own"}, "KEEP_HEAD: expected one of shared, copy"),
        ({"suppress_score": 0}, "KEEP_SUPPRESS_SCORE: expected a score above 0"),
    ],
)
def test_a_wrong_choice_is_named(keys: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        keep_settings(**keys)


def test_a_config_that_nobody_settled_is_refused() -> None:
    """And so is nothing where ``KEEP`` is empty."""
    cfg = tiny_cfg()
    assert KeepSettings.from_config(cfg) is None
    cfg.MODEL.HEAD_ADAPT.KEEP = "exact"
    with pytest.raises(ConfigError, match=r"Call resolve_config\(cfg\) of d2_headadapt.setup.yaml first"):
        KeepSettings.from_config(cfg)
    cfg.MODEL.HEAD_ADAPT.TARGET_CLASSES = names(OLD)
    cfg.MODEL.HEAD_ADAPT.KEEP_PACKS = [{"classes": ["rhino"], "head": "copy"}]
    settings = KeepSettings.from_config(cfg)
    assert settings is not None and settings.table.names[-1] == "rhino" and settings.trained == (0,)
    cfg.MODEL.HEAD_ADAPT.KEEP_PACKS = [["rhino"]]
    with pytest.raises(ConfigError, match="KEEP_PACKS out: it is written by this package"):
        KeepSettings.from_config(cfg)


def test_a_new_class_of_an_old_name_is_refused() -> None:
    with pytest.raises(ClassTableError):
        keep_settings([["class 1"]])


def test_a_model_that_is_not_extended_has_no_packs() -> None:
    assert keep_of(base_model("c4")) is None
