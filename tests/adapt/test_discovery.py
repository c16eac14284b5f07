"""What shapes at several class counts say, on heads with the names and sizes of public projects."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from helpers import foreign_heads as heads
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from d2_headadapt.adapt.class_axes import TensorFacts, class_sized, observe
from d2_headadapt.adapt.discovery import (
    AxisSize,
    ClassSized,
    Conflict,
    CountFamily,
    Discovery,
    Evidence,
    RefusalCause,
    check_declared,
    settle_layouts,
    undeclared,
)
from d2_headadapt.adapt.layouts import HeadLayout
from d2_headadapt.adapt.registry import layouts_of, register_head_layout, unregister_head_layout
from d2_headadapt.errors import LayoutError
from d2_headadapt.setup.count_keys import discover


def look(make: heads.Make, k: int = 7, key: str = "MODEL.X.NUM_CLASSES") -> Discovery:
    return discover(lambda counts: make(counts[key]), {key: k})


def kinds(found: Discovery) -> dict[str, tuple[object, ...]]:
    """Tensor -> axes, rows per class, groups, extra, rebuilt, evidence."""
    return {
        x.sized.tensor: (
            x.layout.axes,
            x.layout.rows_per_class,
            x.layout.groups,
            x.layout.extra,
            x.layout.rebuilt,
            x.evidence,
        )
        for x in found.found
    }


def weight_and_bias(name: str, *kind: object) -> dict[str, tuple[object, ...]]:
    return {f"{name}.weight": kind, f"{name}.bias": kind}


OUT = ((0, 0),)
ONE = (OUT, 1, 1, 0, False, Evidence.ONE_MEANING)
REBUILT = (OUT, 1, 1, 0, True, Evidence.BUFFER)
REBUILT_LAST = (OUT, 1, 1, 1, True, Evidence.BUFFER)


def last(evidence: Evidence, axis: int = 0) -> tuple[object, ...]:
    return (((axis, 0),), 1, 1, 1, False, evidence)


FOUND: dict[str, tuple[heads.Make, dict[str, tuple[object, ...]]]] = {
    "AdelaiDet FCOS, CondInst": (
        heads.fcos,
        {
            **weight_and_bias("proposal_generator.fcos_head.cls_logits", *ONE),
            **weight_and_bias("mask_branch.logits", *ONE),
        },
    ),
    "CenterNet": (heads.centernet, weight_and_bias("proposal_generator.centernet_head.cls_logits", *ONE)),
    "YOLOF": (heads.yolof, weight_and_bias("decoder.cls_score", OUT, 1, 5, 0, False, Evidence.ANCHORS)),
    "MaskFormer": (
        heads.maskformer,
        {
            **weight_and_bias("sem_seg_head.predictor.class_embed", *last(Evidence.LOSS_WEIGHTS)),
            "criterion.empty_weight": REBUILT_LAST,
        },
    ),
    "DETR": (
        heads.detr,
        {
            **weight_and_bias("class_embed", *last(Evidence.LOSS_WEIGHTS)),
            "criterion.empty_weight": REBUILT_LAST,
        },
    ),
    "DINO": (
        heads.dino,
        {
            **{
                name: kind
                for i in range(3)
                for place in ("class_embed", "transformer.decoder.class_embed")
                for name, kind in weight_and_bias(f"{place}.{i}", *ONE).items()
            },
            "label_enc.weight": ONE,
        },
    ),
    "DN-DETR": (
        heads.dn_detr,
        {**weight_and_bias("class_embed", *ONE), "label_enc.weight": last(Evidence.KNOWN_HEAD)},
    ),
    "Detic": (
        heads.detic,
        {
            name: kind
            for i in range(3)
            for name, kind in {
                f"roi_heads.box_predictor.{i}.freq_weight": REBUILT,
                f"roi_heads.box_predictor.{i}.cls_score.zs_weight": last(Evidence.FRAMEWORK_CLASS, axis=1),
            }.items()
        },
    ),
    "Detic's second classifier": (
        lambda k: heads.detic(k, prop_score=True),
        {
            name: kind
            for i in range(3)
            for name, kind in {
                f"roi_heads.box_predictor.{i}.freq_weight": REBUILT,
                f"roi_heads.box_predictor.{i}.cls_score.zs_weight": last(Evidence.FRAMEWORK_CLASS, axis=1),
                **weight_and_bias(f"roi_heads.box_predictor.{i}.prop_score.2", *last(Evidence.KNOWN_HEAD)),
            }.items()
        },
    ),
    "few-shot cosine": (
        heads.cosine,
        {
            "roi_heads.box_predictor.cls_score.weight": last(Evidence.KNOWN_HEAD),
            **weight_and_bias(
                "roi_heads.box_predictor.bbox_pred", OUT, 4, 1, 0, False, Evidence.BOXES_BESIDE_CLASSIFIER
            ),
        },
    ),
    "SparseR-CNN": (
        heads.sparse_rcnn,
        {
            **{
                name: kind
                for i in range(3)
                for name, kind in weight_and_bias(
                    f"head.head_series.{i}.class_logits", *last(Evidence.LOSS_WEIGHTS)
                ).items()
            },
            "criterion.empty_weight": REBUILT_LAST,
        },
    ),
}


@pytest.mark.parametrize("k", [1, 5, heads.WIDTH, 80])
@pytest.mark.parametrize("name", FOUND)
def test_heads_of_public_projects_are_found_undeclared(name: str, k: int) -> None:
    """One class, and as many classes as channels, are no special cases: sizes are compared, never looked up."""
    make, expected = FOUND[name]
    found = look(make, k)
    assert kinds(found) == expected
    assert not found.refused and not found.stuck and not found.idle
    shapes = {key: tuple(value.shape) for key, value in make(k).state_dict().items()}
    for layout in found.layouts:
        assert layout.fits(shapes[layout.tensor], k)


REFUSED: dict[str, tuple[heads.Make, dict[str, tuple[RefusalCause, int]]]] = {
    "BlendMask": (
        heads.blendmask,
        {f"basis_module.seg_head.3.{leaf}": (RefusalCause.TWO_MEANINGS, 2) for leaf in ("weight", "bias")},
    ),
    "torchvision": (
        heads.torchvision_like,
        {
            **{f"box_predictor.cls_score.{leaf}": (RefusalCause.TWO_MEANINGS, 2) for leaf in ("weight", "bias")},
            **{f"box_predictor.bbox_pred.{leaf}": (RefusalCause.TWO_MEANINGS, 4) for leaf in ("weight", "bias")},
        },
    ),
    "YOLO": (heads.yolo_like, {f"head.{leaf}": (RefusalCause.TWO_MEANINGS, 4) for leaf in ("weight", "bias")}),
    "hidden width": (
        heads.narrowing,
        {
            f"detect.cv3.0.{name}": (RefusalCause.HIDDEN_WIDTH, 0)
            for name in (
                *(f"0.conv.{leaf}" for leaf in ("weight", "bias")),
                *(f"0.bn.{leaf}" for leaf in ("weight", "bias", "running_mean", "running_var")),
                *(f"1.{leaf}" for leaf in ("weight", "bias")),
            )
        },
    ),
    "one layer per class": (
        heads.one_per_class,
        {
            f"heads.{i}.{leaf}": (RefusalCause.ONE_TENSOR_PER_CLASS, 0)
            for i in range(7)
            for leaf in ("weight", "bias")
        },
    ),
    "features and classes": (
        heads.features_and_classes,
        {"second.weight": (RefusalCause.FEATURES_OR_CLASSES_FIRST, 2)},
    ),
    "a buffer that nobody knows": (
        lambda k: _with_buffer(torch.zeros(k, 4)),
        {"prototypes": (RefusalCause.CARRIED_OR_REBUILT, 1)},
    ),
    "a square of the count": (lambda k: heads.tree(pairs=nn.Linear(4, k * k)), {
        "pairs.weight": (RefusalCause.NOT_AFFINE, 0),
        "pairs.bias": (RefusalCause.NOT_AFFINE, 0),
    }),
}  # fmt: skip


def _with_buffer(value: torch.Tensor, name: str = "prototypes") -> nn.Module:
    module = nn.Module()
    module.register_buffer(name, value)
    return module


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_two_meanings_is_refused_with_both(name: str) -> None:
    make, expected = REFUSED[name]
    found = look(make)
    assert {x.sized.tensor: (x.cause, len(x.meanings)) for x in found.refused} == expected
    assert not expected.keys() & {x.tensor for x in found.layouts}
    for refusal in found.refused:
        shape = refusal.sized.shape
        assert all(meaning.fits(shape, 7) for meaning in refusal.meanings)
        assert refusal.sized.tensor in str(refusal.error()) and "MODEL.X.NUM_CLASSES" in str(refusal.error())


@pytest.mark.parametrize("place", [0, 1])
def test_a_line_that_a_refusal_gives_declares_that_meaning(place: int) -> None:
    """The line is typed as it stands, and afterwards nothing is open."""
    found = look(heads.blendmask)
    line = found.refused[0].lines[place]
    assert line.startswith("register_head_layout('basis_module.seg_head.3.weight'")
    patterns = [refusal.pattern for refusal in found.refused]
    try:
        for refusal in found.refused:
            exec(refusal.lines[place], {"register_head_layout": register_head_layout})
        declared = layouts_of(heads.blendmask(7))
    finally:
        for pattern in patterns:
            unregister_head_layout(pattern)
    assert [x.same_kind(refusal.meanings[place]) for x, refusal in zip(declared, found.refused, strict=True)]
    assert undeclared(declared, found) == () and len(undeclared((), found)) == 2
    assert check_declared(found, declared) == ()


def test_a_pattern_stands_for_like_tensors_only() -> None:
    def make(k: int) -> nn.Module:
        stages = [heads.tree(scores=nn.Sequential(nn.Linear(4, 4), nn.Linear(4, k + 1))) for _ in range(3)]
        return heads.tree(stages=nn.ModuleList(stages))

    found = look(make)
    assert {x.pattern for x in found.refused} == {
        "stages.*.scores.*.weight",
        "stages.*.scores.*.bias",
    } or all("*" not in x.pattern for x in found.refused)
    names = make(7).state_dict()
    from fnmatch import fnmatchcase

    refused = {x.sized.tensor for x in found.refused}
    for refusal in found.refused:
        assert {name for name in names if fnmatchcase(name, refusal.pattern)} <= refused


def test_where_an_embedding_pads_decides() -> None:
    def make(padding: int) -> heads.Make:
        return lambda k: heads.tree(labels=nn.Embedding(k + 1, 4, padding_idx=padding if padding >= 0 else k))

    assert kinds(look(make(0))) == {"labels.weight": (((0, 1),), 1, 1, 0, False, Evidence.PADDING_INDEX)}
    assert kinds(look(make(-1))) == {"labels.weight": last(Evidence.PADDING_INDEX)}
    assert look(lambda k: heads.tree(labels=nn.Embedding(k + 1, 4))).refused


def test_a_normalisation_of_class_scores_is_refused_not_rebuilt() -> None:
    found = look(lambda k: heads.tree(scores=heads.conv(k), norm=nn.BatchNorm2d(k, affine=False)))
    assert {x.sized.tensor: x.cause for x in found.refused} == dict.fromkeys(
        ["norm.running_mean", "norm.running_var"], RefusalCause.HIDDEN_WIDTH
    )


def test_embeddings_of_a_file_stay_and_trained_ones_are_carried() -> None:
    name = "roi_heads.box_predictor.0.cls_score.zs_weight"
    for from_file, kept in ((True, "file"), (False, "")):
        found = look(lambda k, from_file=from_file: heads.detic(k, from_file=from_file))
        assert {x.given for x in found.layouts if x.tensor == name} == {kept}


def test_tensors_of_one_count_key_are_one_group() -> None:
    """Half of them carried would be worse than none."""
    found = look(heads.dn_detr)
    assert {x.group for x in found.layouts} == {"MODEL.X.NUM_CLASSES"}
    assert {x.part for x in found.layouts} == {"class_embed", "label_enc"}
    assert {x.group for x in look(heads.cosine).layouts} == {"roi_heads.box_predictor"}


# Mutations: what decides is taken away or turned round, and the answer changes.


def _eos_first(k: int) -> nn.Module:
    model = heads.maskformer(k)
    model.criterion = heads.SetCriterion(k, eos_row=0)
    return model


def _no_eos(k: int) -> nn.Module:
    model = heads.maskformer(k)
    model.criterion = heads.SetCriterion(k, eos_coef=1.0)
    del model.sem_seg_head.predictor.mask_embed
    return model


def _two_classifiers(k: int) -> nn.Module:
    model = heads.sparse_rcnn(k)
    model.add_module("seg_head", heads.conv(k + 1))
    return model


def _nameless_anchors(k: int) -> nn.Module:
    model = heads.yolof(k)
    del model.decoder.num_anchors, model.decoder.bbox_pred
    return model


def _four_anchors_and_a_classifier(k: int) -> nn.Module:
    model = heads.cosine(k)
    model.roi_heads.box_predictor.num_anchors = 4
    return model


MUTATIONS: dict[str, tuple[heads.Make, str]] = {
    "the loss weights say first, the name says last": (_eos_first, "sem_seg_head.predictor.class_embed.weight"),
    "the loss weights say nothing, no neighbour": (_no_eos, "sem_seg_head.predictor.class_embed.weight"),
    "the loss weights may be another classifier's": (_two_classifiers, "seg_head.weight"),
    "nothing states the anchors": (_nameless_anchors, "decoder.cls_score.weight"),
    "boxes or anchors": (_four_anchors_and_a_classifier, "roi_heads.box_predictor.bbox_pred.weight"),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_mutation_without_its_evidence_a_head_is_refused(name: str) -> None:
    make, tensor = MUTATIONS[name]
    found = look(make)
    assert {x.sized.tensor: x.cause for x in found.refused}[tensor] is RefusalCause.TWO_MEANINGS


def test_mutation_loss_weights_alone_put_no_object_first() -> None:
    def make(k: int) -> nn.Module:
        return heads.tree(classifier=nn.Linear(4, k + 1), criterion=heads.SetCriterion(k, eos_row=0))

    assert kinds(look(make))["classifier.weight"] == (((0, 1),), 1, 1, 0, False, Evidence.LOSS_WEIGHTS)


def test_mutation_a_copy_of_a_framework_class_is_not_that_class() -> None:
    """Only the class that detectron2 itself defines fixes the order, not one that has its name."""
    layers = type("FastRCNNOutputLayers", (nn.Module,), {})()
    layers.cls_score = nn.Linear(4, 8)

    def make(k: int) -> nn.Module:
        model = type(layers)()
        model.cls_score = nn.Linear(4, k + 1)
        return heads.tree(box_predictor=model)

    assert {x.cause for x in look(make).refused} == {RefusalCause.TWO_MEANINGS}


# Declared layouts are held against what is seen.

SCORES = HeadLayout("roi_heads.box_predictor.cls_score.weight", "thing", "g", extra=1)
CONFLICTS = {
    "background first": (replace(SCORES, axes=((0, 1),), extra=0), Conflict.OTHER_PLACE),
    "no background": (replace(SCORES, extra=0), Conflict.OTHER_SIZE),
    "the other axis": (replace(SCORES, axes=((1, 0),)), Conflict.OTHER_SIZE),
    "agnostic": (replace(SCORES, axes=(), extra=0), Conflict.AGNOSTIC_BUT_CLASS_SIZED),
    "boxes by coordinate": (
        HeadLayout("roi_heads.box_predictor.bbox_pred.weight", "thing", "g", groups=4),
        Conflict.OTHER_PLACE,
    ),
    "a tensor that no count sizes": (HeadLayout("other.weight", "thing", "g"), Conflict.NOT_CLASS_SIZED),
}


def cosine_and_more(k: int) -> nn.Module:
    model = heads.cosine(k)
    model.add_module("other", nn.Linear(4, 7))
    return model


@pytest.mark.parametrize("name", CONFLICTS)
def test_mutation_a_wrong_declaration_is_seen(name: str) -> None:
    found = look(cosine_and_more)
    assert check_declared(found, [SCORES]) == ()
    wrong, conflict = CONFLICTS[name]
    (disagreement,) = check_declared(found, [wrong])
    assert (disagreement.declared, disagreement.conflict) == (wrong, conflict)
    with pytest.raises(LayoutError, match=f"layout of {wrong.tensor}: expected what was declared"):
        raise disagreement.error()


def test_a_declaration_decides_between_the_meanings_of_a_refused_tensor() -> None:
    found = look(heads.yolo_like)
    blocks = HeadLayout("head.weight", "thing", "g", axes=((0, 5), (0, 5), (0, 5)))
    assert check_declared(found, [blocks]) == ()
    (wrong,) = check_declared(found, [replace(blocks, axes=((0, 5), (0, 5)))])
    assert wrong.conflict is Conflict.OTHER_SIZE


def test_one_class_and_agnostic_are_told_apart_by_building_more_classes() -> None:
    """Both have four rows at one class; what was read off that shape is corrected."""

    def make(agnostic: bool) -> heads.Make:
        def build(k: int) -> nn.Module:
            model = heads.cosine(k)
            model.roi_heads.box_predictor.bbox_pred = nn.Linear(4, 4 if agnostic else 4 * k)
            return model

        return build

    name = "roi_heads.box_predictor.bbox_pred.weight"
    by_class = HeadLayout(name, "thing", "g", rows_per_class=4)
    serves_all = replace(by_class, axes=(), by_choice=True)
    for agnostic in (True, False):
        found = look(make(agnostic), k=1)
        for declared in (by_class, serves_all):
            settled = {x.tensor: x for x in settle_layouts([declared], found)}[name]
            assert settled == (serves_all if agnostic else by_class)
    assert settle_layouts([serves_all], look(make(True), k=3))[0] == serves_all


def test_declared_layouts_come_first_and_name_the_space_of_their_key() -> None:
    found = look(heads.cosine)
    declared = replace(SCORES, space="fine", group="mine")
    settled = settle_layouts([declared], found)
    assert settled[0] is declared and {x.space for x in settled} == {"fine"} and len(settled) == 3


def test_plain_form_survives_json() -> None:
    for make in (heads.detic, heads.blendmask, heads.narrowing, heads.maskformer):
        found = look(make)
        again = Discovery.from_json(json.loads(json.dumps(found.to_json())))
        assert again == found and again.describe() == found.describe()
    with pytest.raises(LayoutError, match="a stored discovery"):
        Discovery.from_json({"families": []})


def test_it_says_what_it_found_and_with_which_counts() -> None:
    assert look(heads.yolof, k=80).describe() == [
        "found by building with 80, 81 and 90 classes (MODEL.X.NUM_CLASSES): decoder.cls_score.weight/bias (1 row per "
        "class, 5 anchors)"
    ]
    assert look(heads.blendmask).describe()[1:] == [
        "refused, following MODEL.X.NUM_CLASSES: basis_module.seg_head.*.weight/bias: "
        "the shape has more than one meaning"
    ]
    (line,) = look(heads.dino).describe()
    assert line.endswith(
        "class_embed.*.weight/bias (1 row per class), label_enc.weight (1 row per class), "
        "transformer.decoder.class_embed.*.weight/bias (1 row per class)"
    )


@given(
    k=st.integers(1, 300),
    axes=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 300)), min_size=1, max_size=4),
    steps=st.lists(st.integers(1, 20), min_size=2, max_size=3, unique=True),
)
def test_every_line_is_solved(k: int, axes: list[tuple[int, int]], steps: list[int]) -> None:
    def facts(count: int) -> dict[str, TensorFacts]:
        return {"t": TensorFacts(tuple(slope * count + rest for slope, rest in axes))}

    family = CountFamily(("KEY",), k, "thing", (k,))
    sized = class_sized(facts(k), {step: facts(k + step) for step in steps}, family)
    lines = tuple(AxisSize(i, slope, rest) for i, (slope, rest) in enumerate(axes) if slope)
    assert [x.axes for x in sized] == ([lines] if lines else [])


def test_a_tensor_of_two_counts_is_refused() -> None:
    keys = {"A.NUM_CLASSES": 3, "B.NUM_CLASSES": 4}
    found = discover(lambda c: heads.tree(both=nn.Linear(2, c["A.NUM_CLASSES"] + c["B.NUM_CLASSES"])), keys)
    assert {x.cause for x in found.refused} == {RefusalCause.TWO_COUNTS} and not found.layouts


def test_facts_name_base_classes_and_neighbours() -> None:
    facts = observe(heads.detic(3))["roi_heads.box_predictor.1.cls_score.zs_weight"]
    assert not facts.parameter and facts.kind == "other"
    assert (
        "detectron2.modeling.roi_heads.fast_rcnn.FastRCNNOutputLayers"
        in dict(facts.around)["roi_heads.box_predictor.1"]
    )


def test_sizes_are_spelt() -> None:
    sized = ClassSized("t", "KEY", "thing", (8, 3), (AxisSize(0, 1, 1), AxisSize(1, 3, 0)))
    assert sized.sizes == "axis 0 = 1 K + 1, axis 1 = 3 K"
