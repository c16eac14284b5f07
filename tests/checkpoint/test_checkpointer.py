"""``HeadAdaptCheckpointer``: classes move by name, files stay stock's, and a failure leaves no trace."""

from __future__ import annotations

import copy
import logging
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.engine import DefaultPredictor
from detectron2.utils.file_io import PathManager
from helpers.files import HEAD, Runs, content, logged, save_stock, stock_warnings, texts, to_caffe2
from helpers.models import model_of, names, same_bits, state_of, stock_model, tiny_cfg
from torch import nn

import d2_headadapt.adapt.plan
import d2_headadapt.checkpoint.checkpointer
from d2_headadapt import AdaptSettings, ClassTable, HeadAdaptCheckpointer, vocabulary
from d2_headadapt.adapt.causes import Cause
from d2_headadapt.checkpoint.provenance import KEY
from d2_headadapt.errors import CheckpointFileError, ClassTableError, HeadAdaptError, PlanRefused, RankError

FIVE = names(5)
MIXED = ["class 3", "zebra", "class 0", "class 4"]


@pytest.fixture(scope="module")
def source() -> nn.Module:
    """A stock model of five classes, every element of it distinct from any initial value of another seed."""
    return stock_model(5, seed=21, masks=True)


@pytest.fixture(scope="module")
def stock_file(source: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_stock(source, tmp_path_factory.mktemp("stock") / "stock.pth")


def adapted(path: str, target: list[str], *, seed: int = 2, **keys: Any) -> tuple[nn.Module, HeadAdaptCheckpointer]:
    """A fresh model of ours for ``target`` after loading ``path``."""
    model = model_of(target, seed=seed, masks=True, **{"SOURCE_CLASSES": FIVE, **keys})
    checkpointer = HeadAdaptCheckpointer(model)
    checkpointer.load(path)
    return model, checkpointer


def rows_by_name(state: dict[str, torch.Tensor], classes: list[str]) -> dict[str, list[torch.Tensor]]:
    """Class name (and ``background``) -> its rows in every class-sized tensor of a tiny Mask R-CNN."""
    found: dict[str, list[torch.Tensor]] = {}
    for leaf in ("weight", "bias"):
        score, boxes = state[f"{HEAD}.cls_score.{leaf}"], state[f"{HEAD}.bbox_pred.{leaf}"]
        masks = state[f"roi_heads.mask_head.predictor.{leaf}"]
        assert len(score) == len(classes) + 1
        assert len(boxes) == 4 * len(classes)
        assert len(masks) == len(classes)
        for i, name in enumerate(classes):
            found.setdefault(name, []).extend([score[i], boxes[4 * i : 4 * i + 4], masks[i]])
        found.setdefault("background", []).append(score[-1])
    return found


def carried_by_name(
    before: dict[str, torch.Tensor], old: list[str], after: dict[str, torch.Tensor], new: list[str]
) -> bool:
    """The law: every class that both lists have, and background, has the rows it had, bit for bit."""
    ours, theirs = rows_by_name(after, new), rows_by_name(before, old)
    both = [name for name in ours if name in theirs]
    return all(torch.equal(a, b) for name in both for a, b in zip(ours[name], theirs[name], strict=True))


def test_every_row_moves_by_class_name(source: nn.Module, stock_file: str) -> None:
    model, checkpointer = adapted(stock_file, MIXED)
    assert carried_by_name(state_of(source), FIVE, state_of(model), MIXED)
    untouched = state_of(model_of(MIXED, seed=2, masks=True))
    fresh = rows_by_name(untouched, MIXED)["zebra"]
    assert all(map(torch.equal, rows_by_name(state_of(model), MIXED)["zebra"], fresh)), "new rows are the model's own"
    for name, value in model.state_dict().items():
        if name not in untouched or "box_predictor" in name or "mask_head.predictor" in name:
            continue
        assert torch.equal(value, source.state_dict()[name]), name
    assert checkpointer.untrained == {"thing": ("zebra",)}


def test_mutation_a_wrong_row_map_breaks_the_law(
    source: nn.Module, stock_file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    move = d2_headadapt.adapt.plan.move_rows

    def wrong(source, base, layout, classes):
        return move(source, base, layout, copy.copy(classes).__class__(classes.source, classes.target, (0, 1, 2, 3)))

    monkeypatch.setattr(d2_headadapt.adapt.plan, "move_rows", wrong)
    model, _ = adapted(stock_file, MIXED)
    assert not carried_by_name(state_of(source), FIVE, state_of(model), MIXED)


def test_mutation_background_first_breaks_the_law(
    source: nn.Module, stock_file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = d2_headadapt.adapt.plan.HeadLayout
    rows = layout.rows
    monkeypatch.setattr(layout, "rows", lambda self, c, k, axis=None: rows(self, c, k, axis) + self.extra)
    model, _ = adapted(stock_file, MIXED)
    assert not carried_by_name(state_of(source), FIVE, state_of(model), MIXED)


def test_the_same_count_with_other_names_is_remapped_by_name(source: nn.Module, stock_file: str) -> None:
    """The case that stock loads without a word, into the wrong rows."""
    permuted = ["class 4", "class 2", "class 0", "class 1", "class 3"]
    model, checkpointer = adapted(stock_file, permuted)
    assert carried_by_name(state_of(source), FIVE, state_of(model), permuted)
    assert checkpointer.untrained == {}
    wrong = stock_model(5, seed=2, masks=True)
    assert stock_warnings(wrong, stock_file) == []
    assert not carried_by_name(state_of(source), FIVE, state_of(wrong), permuted)


def test_nothing_in_common_carries_background_alone(source: nn.Module, stock_file: str) -> None:
    model, checkpointer = adapted(stock_file, ["zebra", "yak"])
    assert carried_by_name(state_of(source), FIVE, state_of(model), ["zebra", "yak"])
    assert checkpointer.untrained == {"thing": ("yak", "zebra")}


def test_every_stage_of_a_cascade_moves(tmp_path: Path) -> None:
    old = stock_model(5, "cascade", seed=4)
    path = save_stock(old, tmp_path / "c.pth")
    model = model_of(["class 2", "new"], "cascade", seed=5, SOURCE_CLASSES=FIVE)
    HeadAdaptCheckpointer(model).load(path)
    for i in range(3):
        ours, theirs = (m.roi_heads.box_predictor[i] for m in (model, old))
        assert torch.equal(ours.cls_score.weight[[0, 2]], theirs.cls_score.weight[[2, 5]])
        assert torch.equal(ours.bbox_pred.weight, theirs.bbox_pred.weight)


# --------------------------------------------------------------------------------------- stock on the other side


@pytest.mark.parametrize("kind", ["standard", "cascade", "c4"])
def test_stock_loads_our_file_without_a_word(kind: str, tmp_path: Path) -> None:
    model = model_of(FIVE, kind, seed=3, masks=True)
    checkpointer = HeadAdaptCheckpointer(model, str(tmp_path), optimizer=torch.optim.SGD(model.parameters(), 0.1))
    checkpointer.save("ours", iteration=7)
    other = stock_model(5, kind, seed=4, masks=True)
    assert stock_warnings(other, str(tmp_path / "ours.pth")) == []
    assert same_bits(state_of(model), state_of(other))


def test_we_load_stocks_file_without_a_warning_and_return_what_stock_returns(source: nn.Module, tmp_path: Path) -> None:
    DetectionCheckpointer(source, str(tmp_path), save_to_disk=True).save("s", iteration=12, note={"a": [1]})
    model = model_of(FIVE, seed=4, masks=True, SOURCE_CLASSES=FIVE)
    with logged("d2_headadapt", "fvcore", "detectron2") as said:
        left = HeadAdaptCheckpointer(model).load(str(tmp_path / "s.pth"))
    assert [r for r in said if r.levelno >= logging.WARNING] == []
    assert same_bits(state_of(model), state_of(source))
    assert left == DetectionCheckpointer(stock_model(5, masks=True)).load(str(tmp_path / "s.pth"))
    assert left["iteration"] == 12


def test_without_class_tables_it_behaves_as_stock_and_says_so(source: nn.Module, stock_file: str) -> None:
    model = stock_model(5, seed=9, masks=True)
    with logged("fvcore", "d2_headadapt") as said:
        HeadAdaptCheckpointer(model).load(stock_file)
    assert same_bits(state_of(model), state_of(source))
    assert "No class tables are attached to the model: heads are loaded as stock detectron2 does." in texts(said)


def test_what_was_carried_and_what_is_new_is_one_line(stock_file: str) -> None:
    with logged("d2_headadapt") as said:
        adapted(stock_file, MIXED)
    lines = [r.getMessage() for r in said if r.getMessage().startswith("3 of 4 thing classes carried")]
    assert len(lines) == 1
    assert "1 new (zebra)" in lines[0]
    assert "2 dropped" in lines[0]


# ---------------------------------------------------------------------------------------------------- forms of files


def test_a_prefix_of_data_parallel_is_removed(source: nn.Module, tmp_path: Path) -> None:
    wrapped = {f"module.{name}": value for name, value in source.state_dict().items()}
    torch.save({"model": wrapped}, tmp_path / "m.pth")
    model, _ = adapted(str(tmp_path / "m.pth"), MIXED)
    assert carried_by_name(state_of(source), FIVE, state_of(model), MIXED)


@pytest.mark.parametrize("side", ["file", "model"])
def test_a_compiled_module_is_seen_through(source: nn.Module, tmp_path: Path, side: str) -> None:
    """In a file of our own too, whose provenance names tensors as the compiled model does."""

    def compiled(model: nn.Module) -> nn.Module:
        model.roi_heads.box_predictor = torch.compile(model.roi_heads.box_predictor)
        return model

    old = model_of(FIVE, seed=1, masks=True)
    HeadAdaptCheckpointer(compiled(old) if side == "file" else old, str(tmp_path)).save("m")
    new = model_of(MIXED, seed=2, masks=True)
    new = compiled(new) if side == "model" else new
    checkpointer = HeadAdaptCheckpointer(new)
    checkpointer.load(str(tmp_path / "m.pth"))
    assert checkpointer.plan is not None and checkpointer.plan.coverage == 1.0
    states = [{n.replace("_orig_mod.", ""): v for n, v in state_of(m).items()} for m in (old, new)]
    assert carried_by_name(states[0], FIVE, states[1], MIXED)


def test_averages_that_moved_and_those_that_could_not_are_said(source: nn.Module, tmp_path: Path) -> None:
    state = source.state_dict()
    whole = {
        "model": state,
        "ema_model": {"n_averaged": torch.tensor(3), **{f"module.{n}": v for n, v in state.items()}},
    }
    torch.save({**whole, "shadow": {"params": list(state.values())}}, tmp_path / "m.pth")
    with logged("d2_headadapt") as said:
        adapted(str(tmp_path / "m.pth"), MIXED)
    assert [text for text in texts(said).splitlines() if "Averaged" in text or "shadow/" in text] == [
        "Averaged copies of the model went through the same plan: ema_model.",
        f"shadow/params of {tmp_path / 'm.pth'} holds head tensors of the old classes and was left as it was.",
    ]


def test_a_bare_state_dict_is_a_model(source: nn.Module, tmp_path: Path) -> None:
    torch.save(source.state_dict(), tmp_path / "m.pth")
    model, _ = adapted(str(tmp_path / "m.pth"), MIXED)
    assert carried_by_name(state_of(source), FIVE, state_of(model), MIXED)


def test_a_zoo_pickle_of_arrays_is_read(source: nn.Module, tmp_path: Path) -> None:
    arrays = {name: value.numpy() for name, value in source.state_dict().items()}
    (tmp_path / "z.pkl").write_bytes(pickle.dumps({"model": arrays, "__author__": "somebody"}))
    model, _ = adapted(str(tmp_path / "z.pkl"), MIXED)
    assert carried_by_name(state_of(source), FIVE, state_of(model), MIXED)


def test_a_caffe2_head_of_another_count_is_found_by_name(source: nn.Module, tmp_path: Path) -> None:
    """Stock leaves it under the name ``cls_score.weight``, where nothing takes it."""
    path = to_caffe2(source.state_dict(), tmp_path / "c2.pkl")
    model = model_of(MIXED, seed=2, SOURCE_CLASSES=FIVE)
    HeadAdaptCheckpointer(model).load(path)
    score, old = model.roi_heads.box_predictor.cls_score, source.roi_heads.box_predictor.cls_score
    assert torch.equal(score.weight[[0, 2, 3, 4]], old.weight[[3, 0, 4, 5]])
    assert torch.equal(score.bias[[0, 2, 3, 4]], old.bias[[3, 0, 4, 5]])
    boxes, old = model.roi_heads.box_predictor.bbox_pred, source.roi_heads.box_predictor.bbox_pred
    assert torch.equal(boxes.weight[:4], old.weight[12:16])


@pytest.mark.parametrize("flag", ["query", "key"])
def test_heuristics_that_are_asked_for_find_a_head_of_another_count(
    source: nn.Module, tmp_path: Path, flag: str
) -> None:
    shorter = {name.removeprefix("roi_heads."): value for name, value in source.state_dict().items()}
    torch.save({"model": shorter, **({"matching_heuristics": True} if flag == "key" else {})}, tmp_path / "h.pth")
    query = "?matching_heuristics=True" if flag == "query" else ""
    model, _ = adapted(f"{tmp_path / 'h.pth'}{query}", MIXED)
    assert carried_by_name(state_of(source), FIVE, state_of(model), MIXED)


def test_an_ambiguous_head_key_is_dropped_with_its_reason(source: nn.Module, tmp_path: Path) -> None:
    """One classifier, three stages of a cascade: nobody can say which."""
    state = {n: v for n, v in source.state_dict().items() if n.startswith("backbone.")}
    state["cls_score.weight"] = torch.zeros(6, 24)
    torch.save({"model": state, "matching_heuristics": True}, tmp_path / "h.pth")
    model = model_of(MIXED, "cascade", seed=2, SOURCE_CLASSES=FIVE)
    before = state_of(model)
    checkpointer = HeadAdaptCheckpointer(model)
    checkpointer.load(str(tmp_path / "h.pth"))
    assert checkpointer.plan is not None
    dropped = {t.name: t for t in checkpointer.plan.by_action("dropped")}["cls_score.weight"]
    assert dropped.cause is Cause.SEVERAL_PLACES and "fits 3 places in the model" in dropped.reason
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items() if "cls_score" in name)


def test_the_zoo_path_is_recognised_before_it_becomes_a_local_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = stock_model(20, seed=6)
    path = save_stock(old, tmp_path / "model_final.pth")
    monkeypatch.setattr(PathManager, "get_local_path", lambda asked, **_: path if "://" in asked else asked)
    model = model_of(["dog", "zebra"])
    address = "https://dl.fbaipublicfiles.com/detectron2/PascalVOC-Detection/faster_rcnn_R_50_C4/142202221/m.pth"
    HeadAdaptCheckpointer(model).load(address)
    dog = vocabulary("voc").names.index("dog")
    assert torch.equal(
        model.roi_heads.box_predictor.cls_score.weight[0], old.roi_heads.box_predictor.cls_score.weight[dog]
    )


def test_unknown_classes_of_the_same_count_are_copied_and_the_key_is_named(source: nn.Module, stock_file: str) -> None:
    model = model_of([*MIXED, "fifth"], seed=2, masks=True)
    with logged("d2_headadapt") as said:
        HeadAdaptCheckpointer(model).load(stock_file)
    assert same_bits(state_of(model), state_of(source))
    warnings = [r.getMessage() for r in said if r.levelno == logging.WARNING]
    (warning,) = warnings
    assert warning.startswith("unverified: 6 tensors of roi_heads copied by shape alone")
    assert "MODEL.HEAD_ADAPT.SOURCE_CLASSES verifies it" in warning


def test_unknown_classes_of_another_count_initialise_the_whole_group(stock_file: str) -> None:
    model = model_of(MIXED, seed=2, masks=True)
    before = state_of(model)
    checkpointer = HeadAdaptCheckpointer(model)
    checkpointer.load(stock_file)
    after = state_of(model)
    head = [name for name in after if "box_predictor" in name or "mask_head.predictor" in name]
    assert len(head) == 6
    assert all(torch.equal(after[name], before[name]) for name in head)
    assert checkpointer.untrained == {"thing": tuple(sorted(MIXED))}


def test_none_initialises_even_what_would_fit(source: nn.Module, stock_file: str) -> None:
    model, checkpointer = adapted(stock_file, FIVE, SOURCE_CLASSES="none")
    fresh = model_of(FIVE, seed=2, masks=True)
    assert torch.equal(model.roi_heads.box_predictor.cls_score.weight, fresh.roi_heads.box_predictor.cls_score.weight)
    assert checkpointer.untrained == {"thing": tuple(FIVE)}


# -------------------------------------------------------------------------------------------------------- provenance


def test_a_saved_file_names_its_classes_and_carries_them_without_a_key(stock_file: str, tmp_path: Path) -> None:
    """Adapt, save, adapt again: the second step needs no SOURCE_CLASSES."""
    model, _ = adapted(stock_file, MIXED)
    HeadAdaptCheckpointer(model, str(tmp_path)).save("one")
    back = model_of(["class 4", "class 3"], seed=8, masks=True)
    checkpointer = HeadAdaptCheckpointer(back)
    checkpointer.load(str(tmp_path / "one.pth"))
    assert carried_by_name(state_of(model), MIXED, state_of(back), ["class 4", "class 3"])
    assert checkpointer.plan is not None
    assert checkpointer.plan.source["thing"].names == tuple(MIXED)


def test_what_was_never_trained_is_remembered_until_an_iteration_was(stock_file: str, tmp_path: Path) -> None:
    """A file of random rows stays one, however often it is copied; training ends that."""
    model, checkpointer = adapted(stock_file, MIXED)
    checkpointer = HeadAdaptCheckpointer(model, str(tmp_path))
    checkpointer.load(stock_file)
    checkpointer.save("random")
    again = HeadAdaptCheckpointer(model_of(["zebra", "class 0"], masks=True))
    again.load(str(tmp_path / "random.pth"))
    assert again.untrained == {"thing": ("zebra",)}
    checkpointer.save("trained", iteration=0)
    again.load(str(tmp_path / "trained.pth"))
    assert again.untrained == {}


def test_the_saved_provenance_is_plain_and_beside_the_model(stock_file: str, tmp_path: Path) -> None:
    model, _ = adapted(stock_file, MIXED)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    HeadAdaptCheckpointer(model, str(tmp_path), optimizer=optimizer).save("p")
    loaded = torch.load(tmp_path / "p.pth", weights_only=True)
    assert loaded[KEY]["version"] == 1
    assert loaded[KEY]["tables"] == {"thing": MIXED}
    assert loaded[KEY]["optimizer"] == [[name for name, _ in model.named_parameters()]]
    assert KEY not in loaded["model"]
    assert {entry["tensor"] for entry in loaded[KEY]["layouts"]} >= {f"{HEAD}.cls_score.weight"}


def test_a_table_that_does_not_fit_the_model_is_never_saved(tmp_path: Path) -> None:
    """A user may attach settings to a model of another size; the file must not lie."""
    model = stock_model(5)
    settings = AdaptSettings(target={"thing": ClassTable(["a", "b"])})
    HeadAdaptCheckpointer(model, str(tmp_path), settings=settings).save("p")
    assert torch.load(tmp_path / "p.pth", weights_only=True)[KEY]["tables"] == {}


# ---------------------------------------------------------------------------------------------------------- failures


def _truncated(folder: Path, state: dict[str, torch.Tensor]) -> str:
    torch.save({"model": state}, folder / "x.pth")
    (folder / "x.pth").write_bytes((folder / "x.pth").read_bytes()[:-4000])
    return str(folder / "x.pth")


def _flipped(folder: Path, state: dict[str, torch.Tensor]) -> str:
    """One bit of one weight that would be taken; torch itself loads it."""
    torch.save({"model": state}, folder / "x.pth")
    data = bytearray((folder / "x.pth").read_bytes())
    value = state["backbone.bottom_up.stem.conv1.weight"].numpy().tobytes()
    data[data.index(value) + 9] ^= 1
    (folder / "x.pth").write_bytes(bytes(data))
    torch.load(folder / "x.pth", weights_only=True)
    return str(folder / "x.pth")


def _nan(folder: Path, state: dict[str, torch.Tensor]) -> str:
    state[f"{HEAD}.bbox_pred.weight"][13, 2] = float("nan")  # a row of class 3
    torch.save({"model": state}, folder / "x.pth")
    return str(folder / "x.pth")


def _infinite_background(folder: Path, state: dict[str, torch.Tensor]) -> str:
    state[f"{HEAD}.cls_score.bias"][-1] = float("inf")
    torch.save({"model": state}, folder / "x.pth")
    return str(folder / "x.pth")


def _nan_outside_the_head(folder: Path, state: dict[str, torch.Tensor]) -> str:
    state["proposal_generator.rpn_head.conv.bias"][0] = float("nan")
    torch.save({"model": state}, folder / "x.pth")
    return str(folder / "x.pth")


def _no_checkpoint(folder: Path, state: dict[str, torch.Tensor]) -> str:
    (folder / "x.pth").write_text("version: 2\n")
    return str(folder / "x.pth")


def _runs(folder: Path, state: dict[str, torch.Tensor]) -> str:
    (folder / "x.pkl").write_bytes(pickle.dumps({"model": {}, "x": Runs(str(folder / "ran"))}))
    return str(folder / "x.pkl")


def _other_architecture(folder: Path, state: dict[str, torch.Tensor]) -> str:
    torch.save({"model": {f"encoder.{i}": torch.zeros(3) for i in range(9)}}, folder / "x.pth")
    return str(folder / "x.pth")


def _other_provenance(folder: Path, state: dict[str, torch.Tensor]) -> str:
    torch.save({"model": state, KEY: {"version": 99}}, folder / "x.pth")
    return str(folder / "x.pth")


FAILURES: dict[str, tuple[Callable[..., str], type[HeadAdaptError], str]] = {
    "missing": (lambda folder, state: str(folder / "x.pth"), CheckpointFileError, "found no such file"),
    "truncated": (_truncated, CheckpointFileError, "x.pth: expected"),
    "flipped bit": (_flipped, CheckpointFileError, r"damaged values in backbone.bottom_up.stem.conv1.weight"),
    "no checkpoint": (_no_checkpoint, CheckpointFileError, "found text that begins 'version: 2"),
    "runs code": (_runs, CheckpointFileError, r"asks for '(_?io|builtins)\.open'.*TRUST_FILE"),
    "NaN in a carried row": (_nan, PlanRefused, "bbox_pred.weight: .*1 NaN .* in the rows of class 3"),
    "infinite background": (_infinite_background, PlanRefused, "cls_score.bias: .*in the rows of background"),
    "NaN elsewhere": (_nan_outside_the_head, PlanRefused, "rpn_head.conv.bias: expected finite numbers"),
    "another architecture": (_other_architecture, PlanRefused, r"none that fits \(encoder 0/9\)"),
    "newer provenance": (_other_provenance, CheckpointFileError, "version 99.*Upgrade"),
}


@pytest.mark.parametrize("kind", FAILURES)
def test_a_failed_load_leaves_no_trace_and_does_not_poison_the_next(
    kind: str, source: nn.Module, stock_file: str, tmp_path: Path
) -> None:
    """Model, class tables, files and the checkpointer itself are as they were; the next load works."""
    make, error, words = FAILURES[kind]
    path = make(tmp_path, state_of(source))
    model = model_of(MIXED, seed=2, masks=True, SOURCE_CLASSES=FIVE)
    checkpointer = HeadAdaptCheckpointer(model)
    before, files = state_of(model), content(tmp_path)
    with pytest.raises(error, match=words):
        checkpointer.load(path)
    assert same_bits(before, state_of(model))
    assert content(tmp_path) == files
    assert checkpointer.plan is None
    checkpointer.load(stock_file)
    assert carried_by_name(state_of(source), FIVE, state_of(model), MIXED)


def test_mutation_without_the_check_of_values_a_nan_is_loaded(
    source: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(d2_headadapt.adapt.plan, "check_finite", lambda *_: None)
    model, _ = adapted(_nan(tmp_path, state_of(source)), MIXED)
    assert not torch.isfinite(model.roi_heads.box_predictor.bbox_pred.weight).all()


def test_a_nan_that_nobody_takes_does_not_matter(source: nn.Module, tmp_path: Path) -> None:
    state = state_of(source)
    state[f"{HEAD}.cls_score.weight"][1, 0] = float("nan")  # class 1 is dropped
    torch.save({"model": state}, tmp_path / "x.pth")
    model, _ = adapted(str(tmp_path / "x.pth"), MIXED)
    assert torch.isfinite(model.roi_heads.box_predictor.cls_score.weight).all()


def test_stock_itself_is_poisoned_by_a_failed_load(stock_file: str) -> None:
    """Why the test above exists; where stock mends it, ours may be shorter."""
    checkpointer = DetectionCheckpointer(stock_model(5, masks=True))
    with pytest.raises(Exception, match=r"not found|No such"):
        checkpointer.load("/nowhere/x.pth")
    with pytest.raises(AssertionError):
        checkpointer.load(stock_file)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"ALIASES": ["lorry=class 3"]}, "'lorry=class 3': expected a class of the target table"),
        ({"ALIASES": ["zebra=class 9"]}, "'zebra=class 9': expected a class of the source table.*Nearest: 'class"),
    ],
)
def test_an_alias_to_a_name_that_does_not_exist_leaves_the_model(
    keys: dict[str, Any], words: str, stock_file: str
) -> None:
    model = model_of(MIXED, seed=2, masks=True, SOURCE_CLASSES=FIVE, **keys)
    before = state_of(model)
    with pytest.raises(ClassTableError, match=words):
        HeadAdaptCheckpointer(model).load(stock_file)
    assert same_bits(before, state_of(model))


def test_a_users_module_that_fails_half_way_leaves_no_trace(stock_file: str) -> None:
    """Modules may convert old formats while they load, and fail after others were written to."""
    model = model_of(MIXED, seed=2, masks=True, SOURCE_CLASSES=FIVE)

    def fail(*_: Any) -> None:
        raise RuntimeError("an old format")

    hook = model.roi_heads.mask_head.register_load_state_dict_pre_hook(fail)
    before = state_of(model)
    checkpointer = HeadAdaptCheckpointer(model)
    with pytest.raises(RuntimeError, match="an old format"):
        checkpointer.load(stock_file)
    assert same_bits(before, state_of(model))
    hook.remove()
    checkpointer.load(stock_file)
    assert not same_bits(before, state_of(model))


def test_a_half_precision_model_stays_one(source: nn.Module, stock_file: str) -> None:
    model = model_of(MIXED, seed=2, masks=True, SOURCE_CLASSES=FIVE).half()
    HeadAdaptCheckpointer(model).load(stock_file)
    assert {p.dtype for p in model.parameters()} == {torch.float16}
    half = {name: value.half() for name, value in state_of(source).items()}
    assert carried_by_name(half, FIVE, state_of(model), MIXED)


def test_stocks_predictor_reads_our_file_without_a_word(tmp_path: Path) -> None:
    """Deployment code knows nothing of this package but the import."""
    model = model_of(FIVE, seed=4)
    HeadAdaptCheckpointer(model, str(tmp_path)).save("p")
    cfg = tiny_cfg(masks=False)
    cfg.MODEL.WEIGHTS = str(tmp_path / "p.pth")
    cfg.DATASETS.TEST = ()
    with logged("fvcore", "detectron2") as said:
        predictor = DefaultPredictor(cfg)
    assert [r for r in said if r.levelno >= logging.WARNING] == []
    assert same_bits(state_of(predictor.model), state_of(model))


class Unwilling:
    """A checkpointable whose state nobody can load; it counts how often it was asked."""

    def __init__(self) -> None:
        self.state: dict[str, Any] = {"a": 1}

    def state_dict(self) -> dict[str, Any]:
        return dict(self.state)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.state = state
        if state.get("a") == 2:
            raise ValueError("two is too many")


def test_a_checkpointable_that_fails_takes_the_model_back(stock_file: str, tmp_path: Path) -> None:
    """Half a resume is worse than none."""
    trained = model_of(FIVE, seed=30, masks=True)
    first = Unwilling()
    first.state = {"a": 2}
    HeadAdaptCheckpointer(trained, str(tmp_path), schedule=first).save("x", iteration=3)
    model, live = model_of(FIVE, seed=31, masks=True), Unwilling()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    before = state_of(model)
    with pytest.raises(ValueError, match="two is too many"):
        HeadAdaptCheckpointer(model, optimizer=optimizer, schedule=live).load(str(tmp_path / "x.pth"))
    assert same_bits(before, state_of(model))
    assert live.state == {"a": 1}


def test_a_load_of_weights_with_other_classes_is_no_resume(stock_file: str) -> None:
    """``load(path)`` loads every checkpointable that the file has: this one has none."""
    model = model_of(MIXED, seed=2, masks=True, SOURCE_CLASSES=FIVE)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    checkpointer = HeadAdaptCheckpointer(model, optimizer=optimizer)
    checkpointer.load(stock_file)
    assert checkpointer.plan is not None
    assert checkpointer.plan.by_action("carried")


# ------------------------------------------------------------------------------------------------------------ saving


def test_a_save_that_fails_leaves_the_old_file_and_its_tag(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk in the middle of ``model_final``."""
    model = model_of(FIVE)
    checkpointer = HeadAdaptCheckpointer(model, str(tmp_path))
    checkpointer.save("model_final", iteration=1)
    before = content(tmp_path)
    save = torch.save

    def half(data: Any, file: Any, **keys: Any) -> None:
        save(data, file, **keys)
        file.truncate(1000)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", half)
    for name in ("model_final", "model_0000009"):
        with pytest.raises(CheckpointFileError, match="No space left on device"):
            checkpointer.save(name, iteration=9)
        assert content(tmp_path) == before
    monkeypatch.undo()
    model_of(FIVE, seed=3)
    HeadAdaptCheckpointer(model_of(FIVE, seed=3)).load(str(tmp_path / "model_final.pth"))


def test_mutation_a_write_in_place_is_not_atomic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpointer = HeadAdaptCheckpointer(model_of(FIVE), str(tmp_path))
    checkpointer.save("model_final", iteration=1)
    before = content(tmp_path)

    def in_place(path: str, data: Any) -> None:
        Path(path).write_bytes(b"half")
        raise CheckpointFileError(path, expected="", found="No space left on device", fix="")

    monkeypatch.setattr(d2_headadapt.checkpoint.checkpointer, "write_checkpoint", in_place)
    with pytest.raises(CheckpointFileError):
        checkpointer.save("model_final", iteration=9)
    assert content(tmp_path) != before


def test_the_last_checkpoint_is_tagged_as_stock_does(tmp_path: Path) -> None:
    checkpointer = HeadAdaptCheckpointer(model_of(FIVE), str(tmp_path))
    assert not checkpointer.has_checkpoint()
    checkpointer.save("model_0000001", iteration=1)
    stock = DetectionCheckpointer(stock_model(5), str(tmp_path))
    assert stock.get_checkpoint_file() == str(tmp_path / "model_0000001.pth")
    assert checkpointer.get_all_checkpoint_files() == [str(tmp_path / "model_0000001.pth")]


def test_nothing_is_saved_without_a_folder_or_where_it_is_not_wanted(tmp_path: Path) -> None:
    HeadAdaptCheckpointer(model_of(FIVE)).save("x")
    HeadAdaptCheckpointer(model_of(FIVE), str(tmp_path), save_to_disk=False).save("x")
    assert list(tmp_path.iterdir()) == []


def test_an_empty_path_loads_nothing() -> None:
    model = model_of(FIVE)
    before = state_of(model)
    checkpointer = HeadAdaptCheckpointer(model)
    assert checkpointer.load("") == {}
    assert same_bits(before, state_of(model))
    assert checkpointer.plan is None


def test_the_model_keeps_none_of_the_files_memory(stock_file: str, tmp_path: Path) -> None:
    """Tensors of a file are views of it: a model that kept one would change with the file."""
    path = tmp_path / "x.pth"
    path.write_bytes(Path(stock_file).read_bytes())
    model, _ = adapted(str(path), MIXED)
    before = state_of(model)
    with path.open("r+b") as file:
        file.write(b"\0" * path.stat().st_size)
    assert same_bits(before, state_of(model))


class WithExtraState(nn.Module):
    """A module that keeps something beside its tensors, as quantisation and third-party layers do."""

    def __init__(self, note: str) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)
        self.note = note

    def get_extra_state(self) -> dict[str, str]:
        return {"note": self.note}

    def set_extra_state(self, state: dict[str, str]) -> None:
        self.note = state["note"]


def test_extra_state_of_a_module_goes_and_comes_with_the_file(tmp_path: Path) -> None:
    HeadAdaptCheckpointer(WithExtraState("written"), str(tmp_path)).save("model")
    model = WithExtraState("other")
    HeadAdaptCheckpointer(model).load(str(tmp_path / "model.pth"))
    assert model.note == "written"


def test_a_last_checkpoint_that_names_a_deleted_file_says_what_to_do(tmp_path: Path) -> None:
    model = WithExtraState("written")
    checkpointer = HeadAdaptCheckpointer(model, str(tmp_path))
    checkpointer.save("model")
    (tmp_path / "model.pth").rename(tmp_path / "model_2.pth")
    with pytest.raises(CheckpointFileError, match=r"into its last_checkpoint, or start without --resume.*model_2.pth"):
        checkpointer.resume_or_load("", resume=True)


def test_a_run_that_only_some_ranks_can_go_on_with_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("d2_headadapt.checkpoint.checkpointer.everywhere", lambda here: [True, here])
    checkpointer = HeadAdaptCheckpointer(stock_model(2), str(tmp_path))
    with pytest.raises(RankError, match="expected a run to go on with on every rank, or on none, found none on rank 1"):
        checkpointer.resume_or_load("", resume=True)
    monkeypatch.setattr("d2_headadapt.checkpoint.checkpointer.everywhere", lambda here: [here, here])
    assert checkpointer.resume_or_load("", resume=False) == checkpointer.resume_or_load("", resume=True) == {}
