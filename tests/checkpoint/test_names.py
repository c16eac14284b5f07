"""Names settled by name alone, where stock detectron2 also looks at shapes."""

from __future__ import annotations

import pytest
import torch
from detectron2.checkpoint.c2_model_loading import align_and_update_state_dicts
from helpers.files import HEAD, logged, to_caffe2
from helpers.models import model_of, names
from hypothesis import given
from hypothesis import strategies as st

import d2_headadapt.checkpoint.keys
from d2_headadapt.adapt.causes import Cause, Why
from d2_headadapt.checkpoint.keys import longest_suffix, settle_names, unwrapped
from d2_headadapt.files import read_checkpoint, shapes_of


def values(**shapes: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """Tensors of these shapes; ``__`` in a name is a dot."""
    return {name.replace("__", "."): torch.zeros(shape) for name, shape in shapes.items()}


DOTTED = st.lists(st.sampled_from("abc"), min_size=1, max_size=4).map(".".join)


def matches_stock(model: list[str], file: list[str]) -> bool:
    """Whether ours and stock's heuristic matching agree, with every shape alike."""
    tensors = {name: torch.full((1,), float(i)) for i, name in enumerate(file)}
    shapes = dict.fromkeys(model, (1,))
    settled = settle_names(tensors, shapes, heuristics=True)
    try:
        with logged("detectron2"):
            stock = align_and_update_state_dicts(
                {name: torch.zeros(shape) for name, shape in shapes.items()}, dict(tensors), c2_conversion=False
            )
    except ValueError:  # stock gives up where one key fits two places; ours drops that key and says why
        return bool(settled.dropped)
    return {n: v.item() for n, v in settled.tensors.items()} == {n: v.item() for n, v in stock.items()}


@given(st.lists(DOTTED, unique=True, min_size=1, max_size=6), st.lists(DOTTED, unique=True, min_size=1, max_size=6))
def test_heuristic_matching_is_stocks_where_every_shape_agrees(model: list[str], file: list[str]) -> None:
    assert matches_stock(model, file)


def test_mutation_the_shortest_suffix_is_not_stocks(monkeypatch) -> None:
    """With the shortest suffix instead of the longest, the law above fails."""
    monkeypatch.setattr(
        d2_headadapt.checkpoint.keys,
        "longest_suffix",
        lambda name, candidates: min(
            (c for c in candidates if name == c or name.endswith("." + c)), key=len, default=None
        ),
    )
    assert not matches_stock(["a.b.c", "c"], ["b.c", "c"])


def test_a_head_of_another_class_count_is_found_by_name() -> None:
    """Stock leaves it under the file's own name, where nothing would take it."""
    settled = settle_names(values(cls_score__weight=(81, 4)), {f"{HEAD}.cls_score.weight": (6, 4)}, heuristics=True)
    assert set(settled.tensors) == {f"{HEAD}.cls_score.weight"}
    assert settled.file_names == {f"{HEAD}.cls_score.weight": "cls_score.weight"}


def test_a_key_that_fits_several_places_is_dropped_with_its_reason() -> None:
    places = {f"box_predictor.{i}.cls_score.weight": (6, 4) for i in range(3)}
    settled = settle_names(values(cls_score__weight=(81, 4)), places, heuristics=True)
    assert settled.tensors == {}
    assert settled.dropped == {"cls_score.weight": Why(Cause.SEVERAL_PLACES, count=3, names=tuple(places))}


def test_of_several_places_the_only_one_of_its_shape_is_taken() -> None:
    """As in stock, which looks at shapes before it counts places."""
    places = {"stem.conv.weight": (8, 3), "neck.conv.weight": (8, 8)}
    settled = settle_names(values(conv__weight=(8, 8)), places, heuristics=True)
    assert set(settled.tensors) == {"neck.conv.weight"}
    assert not settled.dropped


def test_without_heuristics_names_are_exact() -> None:
    settled = settle_names(values(cls_score__weight=(6, 4)), {f"{HEAD}.cls_score.weight": (6, 4)})
    assert set(settled.tensors) == {"cls_score.weight"}


MODEL = ["backbone.stem.weight", "backbone.stem.bias", "roi_heads.cls.weight"]


@pytest.mark.parametrize(
    ("file", "model"),
    [
        (MODEL, MODEL),
        ([f"module.{n}" for n in MODEL], MODEL),
        ([f"module.module.{n}" for n in MODEL], MODEL),
        ([f"_orig_mod.{n}" for n in MODEL], MODEL),
        (["backbone._orig_mod.stem.weight", "backbone._orig_mod.stem.bias", MODEL[2]], MODEL),
        (["_orig_mod.module.backbone.stem.weight", *(f"_orig_mod.module.{n}" for n in MODEL[1:])], MODEL),
        (["_fsdp_wrapped_module.backbone._fsdp_wrapped_module.stem.weight", *MODEL[1:]], MODEL),
        (["backbone._checkpoint_wrapped_module.stem.weight", *MODEL[1:]], MODEL),
        ([f"_forward_module.model.{n}" for n in MODEL], MODEL),
        ([f"model.{n}" for n in MODEL], MODEL),
        ([f"net.detector.{n}" for n in MODEL], MODEL),
        # The live model is the wrapped one.
        (MODEL, [f"_orig_mod.{n}" for n in MODEL]),
        ([f"module.{n}" for n in MODEL], ["backbone._orig_mod.stem.weight", "backbone._orig_mod.stem.bias", MODEL[2]]),
    ],
)
def test_wrappers_are_seen_through(file: list[str], model: list[str]) -> None:
    tensors = {name: torch.full((1,), float(i)) for i, name in enumerate(file)}
    settled = settle_names(tensors, dict.fromkeys(model, (1,)))
    assert {name: int(value) for name, value in settled.tensors.items()} == {name: i for i, name in enumerate(model)}
    assert settled.file_names == {m: f for f, m in zip(file, model, strict=True) if f != m}


def test_what_stands_beside_a_wrapped_model_keeps_its_name() -> None:
    assert unwrapped(["n_averaged", *(f"module.{n}" for n in MODEL)], MODEL)["n_averaged"] == "n_averaged"
    assert unwrapped(["module.a", "module.b"], MODEL) == {"module.a": "a", "module.b": "b"}
    assert unwrapped(["module.a", "b"], MODEL) == {"module.a": "module.a", "b": "b"}
    assert unwrapped([], MODEL) == {}


def test_of_a_teacher_and_a_student_neither_is_taken() -> None:
    names = [f"{side}.{n}" for side in ("teacher", "student") for n in MODEL]
    assert unwrapped(names, MODEL) == {name: name for name in names}


def test_two_names_that_would_become_one_stay_two() -> None:
    names = ["backbone._orig_mod.stem.weight", *MODEL]
    assert unwrapped(names, MODEL) == {name: name for name in names}


def test_a_suffix_starts_after_a_dot() -> None:
    assert longest_suffix("roi.my_conv1.weight", {"conv1.weight": 0}) is None
    assert longest_suffix("roi.conv1.weight", {"conv1.weight": 0, "weight": 0}) == "conv1.weight"


def test_caffe2_puts_background_last_and_removes_its_boxes(tmp_path) -> None:
    model = model_of(names(5))
    state = model.state_dict()
    stored = read_checkpoint(to_caffe2(state, tmp_path / "c2.pkl"))
    assert stored["__author__"] == "Caffe2"
    tensors = {name: torch.from_numpy(value) for name, value in stored["model"].items()}
    settled = settle_names(tensors, shapes_of(state), caffe2=True)
    assert len(settled.tensors) == 6
    assert all(torch.equal(value, state[name]) for name, value in settled.tensors.items())


def test_settling_says_nothing_and_restores_the_logger(tmp_path) -> None:
    """Stock logs a line per head tensor; the plan says it better."""
    stored = read_checkpoint(to_caffe2(model_of(names(5)).state_dict(), tmp_path / "c2.pkl"))
    tensors = {name: torch.from_numpy(value) for name, value in stored["model"].items()}
    with logged("detectron2.checkpoint.c2_model_loading") as said:
        settle_names(tensors, {}, caffe2=True)
        assert not said
        settle = settle_names({"cls_score.weight": torch.zeros(3, 2)}, {})
        assert set(settle.tensors) == {"cls_score.weight"}
