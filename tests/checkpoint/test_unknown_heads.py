"""Heads that nobody declared: where the class lists differ, each row is right by name, or nothing is loaded."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import foreign_heads as heads
from torch import nn

from d2_headadapt import AdaptPlan, AdaptSettings, Cause, HeadAdaptCheckpointer, HeadLayout
from d2_headadapt.adapt.discovery import Discovery
from d2_headadapt.adapt.plan import TensorPlan
from d2_headadapt.adapt.registry import register_head_layout, unregister_head_layout
from d2_headadapt.adapt.report import plan_markdown, plan_table
from d2_headadapt.checkpoint import load
from d2_headadapt.cli.plan_html import plan_html
from d2_headadapt.config.settings import attach_discovery
from d2_headadapt.errors import LayoutError, PlanRefused
from d2_headadapt.setup.count_keys import discover

OLD = ["ant", "bee", "cat", "dog", "emu"]
LISTS = {
    "same count, other order": ["emu", "cat", "ant", "bee", "dog"],
    "subset and new": ["dog", "gnu", "ant"],
    "one class": ["bee"],
}

Rows = Callable[[int, int], list[int]]
"""(class, number of classes) -> its rows, as the project's code reads them."""


def plain(i: int, k: int) -> list[int]:
    return [i]


def boxes(i: int, k: int) -> list[int]:
    return [4 * i + row for row in range(4)]


def five_anchors(i: int, k: int) -> list[int]:
    return [anchor * k + i for anchor in range(5)]


PROP = functools.partial(heads.detic, prop_score=True)
LEARNT = functools.partial(heads.detic, from_file=False)

# Head -> end of a tensor's name -> its class axis and its rows; written from the projects' code, not from layouts.
RIGHT: dict[str, tuple[heads.Make, dict[str, tuple[int, Rows]]]] = {
    "fcos": (heads.fcos, {"cls_logits.weight": (0, plain), "cls_logits.bias": (0, plain), ".logits.bias": (0, plain)}),
    "centernet": (heads.centernet, {"cls_logits.weight": (0, plain), "cls_logits.bias": (0, plain)}),
    "yolof": (heads.yolof, {"cls_score.weight": (0, five_anchors), "cls_score.bias": (0, five_anchors)}),
    "maskformer": (heads.maskformer, {"class_embed.weight": (0, plain), "class_embed.bias": (0, plain)}),
    "detr": (heads.detr, {"class_embed.weight": (0, plain), "class_embed.bias": (0, plain)}),
    "dino": (
        heads.dino,
        {"class_embed.0.weight": (0, plain), "class_embed.2.bias": (0, plain), "label_enc.weight": (0, plain)},
    ),
    "dn_detr": (heads.dn_detr, {"class_embed.weight": (0, plain), "label_enc.weight": (0, plain)}),
    "cosine": (heads.cosine, {"cls_score.weight": (0, plain), "bbox_pred.weight": (0, boxes)}),
    "sparse_rcnn": (heads.sparse_rcnn, {"class_logits.weight": (0, plain), "class_logits.bias": (0, plain)}),
    "detic prop_score": (PROP, {"prop_score.2.weight": (0, plain), "prop_score.2.bias": (0, plain)}),
    "detic learnt": (LEARNT, {"zs_weight": (1, plain)}),
}
LAST_ROW = ("class_embed", "class_logits", "prop_score", "zs_weight")
"""Of these the last row is background; also of the cosine head's classifier and dn_detr's label encoder."""

REFUSED: dict[str, heads.Make] = {
    "blendmask": heads.blendmask,
    "torchvision_like": heads.torchvision_like,
    "yolo_like": heads.yolo_like,
    "narrowing": heads.narrowing,
    "one_per_class": heads.one_per_class,
    "features_and_classes": heads.features_and_classes,
}


def built(make: heads.Make, k: int, *, twice: bool = True) -> nn.Module:
    """A model that can be built at other counts, or cannot."""
    torch.manual_seed(k)
    model = make(k)
    if twice:
        attach_discovery(model, lambda: discover(lambda counts: make(counts["NUM_CLASSES"]), {"NUM_CLASSES": k}))
    return model


def saved(model: nn.Module, folder: Path) -> str:
    HeadAdaptCheckpointer(model, str(folder), settings=AdaptSettings.of(OLD)).save("old")
    return str(folder / "old.pth")


def loaded(path: str, model: nn.Module, names: Sequence[str], **more: object) -> AdaptPlan:
    checkpointer = HeadAdaptCheckpointer(model, settings=AdaptSettings.of(list(names), **more))
    checkpointer.load(path)
    assert checkpointer.plan is not None
    return checkpointer.plan


@pytest.mark.parametrize("case", LISTS)
@pytest.mark.parametrize("name", RIGHT)
def test_every_row_is_right_by_name(tmp_path: Path, name: str, case: str) -> None:
    make, places = RIGHT[name]
    names = LISTS[case]
    old, new = built(make, len(OLD)), built(make, len(names))
    before = {key: value.clone() for key, value in new.state_dict().items()}
    plan = loaded(saved(old, tmp_path), new, names)
    source, after = old.state_dict(), new.state_dict()
    for end, (axis, rows) in places.items():
        tensors = [key for key in after if key.endswith(end)]
        assert tensors, end
        for key in tensors:
            for i, entry in enumerate(names):
                here = after[key].index_select(axis, torch.tensor(rows(i, len(names))))
                if entry in OLD:
                    there = source[key].index_select(axis, torch.tensor(rows(OLD.index(entry), len(OLD))))
                else:
                    there = before[key].index_select(axis, torch.tensor(rows(i, len(names))))
                assert torch.equal(here, there), (key, entry)
            if any(word in key for word in LAST_ROW):
                extra = after[key].shape[axis] - len(names)
                assert extra in (0, 1)
                if extra:
                    assert torch.equal(after[key].select(axis, -1), source[key].select(axis, -1)), key
    assert any(line.startswith("found by building with ") for line in plan.found)
    assert set(plan.new_classes().get("thing", ())) == set(names) - set(OLD)


@pytest.mark.parametrize("case", LISTS)
@pytest.mark.parametrize("name", REFUSED)
def test_a_head_with_two_meanings_is_refused_and_nothing_is_loaded(tmp_path: Path, name: str, case: str) -> None:
    make, names = REFUSED[name], LISTS[case]
    new = built(make, len(names))
    before = {key: value.clone() for key, value in new.state_dict().items()}
    with pytest.raises(PlanRefused, match="no layout moves its rows"):
        loaded(saved(built(make, len(OLD)), tmp_path), new, names)
    assert all(torch.equal(value, before[key]) for key, value in new.state_dict().items())


@pytest.mark.parametrize("case", LISTS)
@pytest.mark.parametrize("name", [*RIGHT, *REFUSED])
def test_a_model_that_cannot_be_built_twice_is_refused(tmp_path: Path, name: str, case: str) -> None:
    """Its class-sized tensors show by the shapes of both sides, whatever they are called and wherever they are."""
    if name == "detic learnt" or name == "one_per_class":
        pytest.skip("a declared layer of detectron2's, or nothing in a shape, tells its classes")
    make, names = RIGHT[name][0] if name in RIGHT else REFUSED[name], LISTS[case]
    path = saved(built(make, len(OLD), twice=False), tmp_path)
    with pytest.raises(PlanRefused):
        loaded(path, built(make, len(names), twice=False), names)


@pytest.mark.parametrize("twice", [True, False])
@pytest.mark.parametrize("name", [*RIGHT, *REFUSED])
def test_unchanged_classes_are_a_plain_copy_and_nothing_is_built(tmp_path: Path, name: str, twice: bool) -> None:
    make = RIGHT[name][0] if name in RIGHT else REFUSED[name]
    old, new = built(make, len(OLD)), make(len(OLD))
    path = saved(old, tmp_path)

    def never() -> Discovery:
        raise AssertionError("built for nothing")

    if twice:
        attach_discovery(new, never)
    loaded(path, new, OLD)
    assert all(torch.equal(value, old.state_dict()[key]) for key, value in new.state_dict().items())


def test_embeddings_that_the_config_names_win_over_the_file(tmp_path: Path) -> None:
    names = LISTS["subset and new"]
    new = built(heads.detic, len(names))
    before = {key: value.clone() for key, value in new.state_dict().items()}
    loaded(saved(built(heads.detic, len(OLD)), tmp_path), new, names)
    own = [key for key in before if key.endswith(("zs_weight", "freq_weight"))]
    assert len(own) == 6 and all(torch.equal(new.state_dict()[key], before[key]) for key in own)


def test_the_line_that_is_shown_works_when_typed(tmp_path: Path) -> None:
    names = LISTS["same count, other order"]
    old = built(heads.torchvision_like, len(OLD))
    path = saved(old, tmp_path)
    typed: list[str] = []

    def register(pattern: str, **arguments: object) -> None:
        register_head_layout(pattern, **arguments)  # type: ignore[arg-type]
        typed.append(pattern)

    try:
        while len(typed) < 5:
            try:
                new = built(heads.torchvision_like, len(names))
                plan = loaded(path, new, names)
                break
            except PlanRefused as refused:
                lines = refused.fix.removeprefix("Declare it: ").split("; or set ")[0].split(" or ")
                # This project has background first, which is the meaning that is shown with an offset.
                line = next(text for text in lines if "axes=((0, 1),)" in text or "axes=((0, 4),)" in text)
                eval(line, {"register_head_layout": register})
    finally:
        for pattern in typed:
            unregister_head_layout(pattern)
    assert plan.refused == ()
    weight = new.state_dict()["box_predictor.cls_score.weight"]
    stored = old.state_dict()["box_predictor.cls_score.weight"]
    for i, entry in enumerate(names):
        assert torch.equal(weight[i + 1], stored[OLD.index(entry) + 1])
    assert torch.equal(weight[0], stored[0])


def test_unknown_heads_start_afresh_or_stay_where_the_user_says_so(tmp_path: Path) -> None:
    names = LISTS["same count, other order"]
    old = built(heads.blendmask, len(OLD))
    path, weight = saved(old, tmp_path), "basis_module.seg_head.3.weight"
    new = built(heads.blendmask, len(OLD))
    with torch.no_grad():
        new.state_dict()[weight].fill_(7.0)
    afresh = loaded(path, new, names, unknown_heads="reinitialise").tensor(weight)
    assert afresh is not None and (afresh.action, afresh.cause) == ("initialised", Cause.UNKNOWN_AFRESH)
    assert afresh.new == (0, 1, 2, 3, 4) and bool((new.state_dict()[weight] == 7.0).all())
    plan = loaded(path, new, names, unknown_heads="keep")
    kept = plan.tensor(weight)
    assert kept is not None and (kept.action, kept.verified) == ("copied", False)
    assert torch.equal(new.state_dict()[weight], old.state_dict()[weight])
    assert "UNKNOWN_HEADS" in plan_table(plan)


def test_what_was_found_is_said_wherever_a_plan_is_shown(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    names = LISTS["subset and new"]
    plan = loaded(saved(built(heads.fcos, len(OLD)), tmp_path), built(heads.fcos, len(names)), names)
    said = "found by building with 3, 4 and 13 classes (NUM_CLASSES)"
    assert said in caplog.text and said in plan_table(plan)
    assert said in plan_markdown(plan).replace("\\", "") and plan.to_json()["found"] == list(plan.found)
    assert AdaptPlan.from_json(plan.to_json()).found == plan.found
    assert said in plan_html(plan, notes=plan.found)


def test_a_declared_layout_that_the_builds_contradict_is_an_error(tmp_path: Path) -> None:
    names = LISTS["subset and new"]
    path = saved(built(heads.yolof, len(OLD)), tmp_path)
    register_head_layout("decoder.bbox_pred.bias", groups=5, extra=5)
    try:
        with pytest.raises(LayoutError, match="follows no class count"):
            loaded(path, built(heads.yolof, len(names)), names)
    finally:
        unregister_head_layout("decoder.bbox_pred.bias")


def test_a_model_that_was_changed_after_it_was_built_is_not_the_one_that_was_looked_at(tmp_path: Path) -> None:
    names = LISTS["subset and new"]
    path = saved(built(heads.fcos, len(OLD)), tmp_path)
    new = built(heads.fcos, len(names) + 1)
    new.proposal_generator.fcos_head.cls_logits = heads.conv(len(names))  # type: ignore[union-attr]
    new.mask_branch.logits = nn.Conv2d(heads.WIDTH, len(names), 1)  # type: ignore[union-attr]
    with pytest.raises(PlanRefused, match="cannot be built with others"):
        loaded(path, new, names)


def test_a_head_with_a_count_of_its_own_is_refused_and_its_key_is_named(tmp_path: Path) -> None:
    def make(counts: object) -> nn.Module:
        k = counts["NUM_CLASSES"]  # type: ignore[index]
        attributes = nn.Linear(8, counts["ATTRIBUTES.NUM_CLASSES"])  # type: ignore[index]
        return heads.tree(head=heads.tree(cls_logits=heads.conv(k)), attributes=attributes)

    def model(k: int) -> nn.Module:
        counts = {"NUM_CLASSES": k, "ATTRIBUTES.NUM_CLASSES": 40}
        one = make(counts)
        attach_discovery(one, lambda: discover(make, counts))
        return one

    with pytest.raises(PlanRefused, match="a count that is not the class table's") as caught:
        loaded(saved(model(5), tmp_path), model(3), LISTS["subset and new"])
    assert caught.value.where == "attributes.weight"


def test_names_in_common_and_nothing_carried_is_never_a_success(tmp_path: Path) -> None:
    wide = heads.WIDTH

    def other(k: int) -> nn.Module:
        return heads.tree(class_embed=nn.Linear(wide + 2, k + 1), bbox_embed=heads.MLP())

    def detr(k: int) -> nn.Module:
        return heads.tree(class_embed=nn.Linear(wide, k + 1), bbox_embed=heads.MLP())

    names = LISTS["subset and new"]
    path = saved(built(detr, len(OLD)), tmp_path)
    with pytest.raises(PlanRefused, match="2 thing classes that file and model have in common"):
        loaded(path, built(other, len(names)), names)
    plan = loaded(path, built(other, len(names)), names, source="none")
    assert [t.action for t in plan.tensors if t.space] == ["initialised"] * 2


def silently_by_position(path: str, make: heads.Make) -> bool:
    """Whether a file with the same number of classes in another order goes in as it lies, without a complaint."""
    names, stored = LISTS["same count, other order"], torch.load(path, weights_only=True)["model"]
    new = built(make, len(names))
    try:
        loaded(path, new, names)
    except PlanRefused:
        return False
    return all(torch.equal(value, stored[key]) for key, value in new.state_dict().items())


def test_mutation_without_the_gate_a_head_goes_in_by_position(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(built(heads.torchvision_like, len(OLD)), tmp_path)
    assert not silently_by_position(path, heads.torchvision_like)
    stock = load.know_heads
    monkeypatch.setattr(load, "know_heads", lambda *args: replace(stock(*args), refused=()))
    assert silently_by_position(path, heads.torchvision_like)


def test_mutation_without_the_found_layouts_a_head_goes_in_by_position(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = saved(built(heads.fcos, len(OLD)), tmp_path)
    assert not silently_by_position(path, heads.fcos)
    stock = load.know_heads
    monkeypatch.setattr(load, "know_heads", lambda *args: replace(stock(*args), layouts=()))
    assert silently_by_position(path, heads.fcos)


def test_lost_spaces_are_those_of_which_nothing_is_carried() -> None:
    table = AdaptSettings.of(["a", "b"]).target
    layout = HeadLayout("w", "thing", "g")
    start = TensorPlan("w", "initialised", "thing", "g", (2, 3), (2, 4), new=(0, 1))
    assert AdaptPlan((start,), table, table, (layout,)).lost == ("thing",)
    moved = TensorPlan("v", "carried", "thing", "g", (2,), (2,), carried=((0, 0),), new=(1,))
    assert AdaptPlan((start, moved), table, table, (layout,)).lost == ()
    absent = TensorPlan("w", "initialised", "thing", "g", None, (2, 4), new=(0, 1))
    assert AdaptPlan((absent,), table, table, (layout,)).lost == ()
