"""Keys that describe ``MODEL.WEIGHTS`` are never applied to a file that says its own classes and went through them."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.files import HEAD, save_stock
from helpers.models import model_of, names, same_bits, state_of, stock_model

from d2_headadapt import AdaptSettings, ClassTable, HeadAdaptCheckpointer
from d2_headadapt.checkpoint.load import plan_file
from d2_headadapt.checkpoint.provenance import Provenance
from d2_headadapt.checkpoint.source_keys import Unused, applied_keys, keys_for
from d2_headadapt.errors import HeadAdaptError, PlanRefused

SOURCE = names(3)
TARGET = ["class 2", "lorry", "class 0"]
CLS = f"{HEAD}.cls_score.weight"
BACKBONE = "backbone.bottom_up.stem.conv1.weight"

KEYS: dict[str, dict[str, Any]] = {
    "source": {"source": {"thing": ClassTable(SOURCE)}},
    "none": {"initialise": frozenset({"thing"})},
    "aliases": {"source": {"thing": ClassTable(SOURCE)}, "aliases": ("lorry=class 1",)},
    "position": {"match": "position"},
    "include": {"include": ("backbone.*",), "min_coverage": 0.1},
    "exclude": {"exclude": ("backbone.*",), "source": {"thing": ClassTable(SOURCE)}, "min_coverage": 0.01},
    "rename": {"rename": (r"^roi_heads\.=roi_heads.",), "source": {"thing": ClassTable(SOURCE)}},
}
"""Every key about source weights, alone or with what it needs."""
RENAMED = (r"^net\.=roi_heads.",)


def settings_with(weights: str, **keys: Any) -> AdaptSettings:
    return AdaptSettings(target={"thing": ClassTable(TARGET)}, weights=weights, **keys)


def foreign(tmp_path: Path, name: str) -> str:
    """A stock file; for RENAME its heads have another name."""
    path = save_stock(stock_model(3), tmp_path / "foreign.pth")
    if name == "rename":
        stored = torch.load(path, weights_only=True)
        stored["model"] = {k.replace("roi_heads.", "net."): v for k, v in stored["model"].items()}
        torch.save(stored, path)
    return path


def keys_of(name: str) -> dict[str, Any]:
    return {**KEYS[name], **({"rename": RENAMED} if name == "rename" else {})}


def made_from(
    path: str, settings: AdaptSettings, folder: Path, *, trained: bool
) -> tuple[str, dict[str, torch.Tensor]]:
    """A file that a run with ``settings`` wrote after loading ``path``, and the weights in it."""
    model = model_of(TARGET, seed=4)
    checkpointer = HeadAdaptCheckpointer(model, str(folder), settings=settings)
    checkpointer.load(path, checkpointables=[])
    if trained:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.25)
    checkpointer.save("own", **({"iteration": 7} if trained else {}))
    return str(folder / "own.pth"), state_of(model)


def loaded(path: str, settings: AdaptSettings, **how: Any) -> dict[str, torch.Tensor]:
    model = model_of(TARGET, seed=9)
    HeadAdaptCheckpointer(model, settings=settings).load(path, checkpointables=[])
    return state_of(model)


@pytest.mark.parametrize("name", KEYS)
@pytest.mark.parametrize("trained", [True, False], ids=["own", "adapted"])
@pytest.mark.parametrize("given", ["as MODEL.WEIGHTS", "beside MODEL.WEIGHTS", "without MODEL.WEIGHTS"])
def test_a_file_of_our_own_is_loaded_whole_whatever_key_made_it(
    name: str, trained: bool, given: str, tmp_path: Path
) -> None:
    """A resume, an evaluation, a prediction and an adaptation with the yaml that made the file."""
    path = foreign(tmp_path, name)
    settings = settings_with(path, **keys_of(name))
    own, weights = made_from(path, settings, tmp_path, trained=trained)
    for_load = {"as MODEL.WEIGHTS": own, "beside MODEL.WEIGHTS": path, "without MODEL.WEIGHTS": ""}[given]
    assert same_bits(loaded(own, replace(settings, weights=for_load)), weights)


@pytest.mark.parametrize("name", KEYS)
def test_the_keys_hold_for_a_file_that_says_nothing(name: str, tmp_path: Path) -> None:
    path = foreign(tmp_path, name)
    settings, bare = settings_with(path, **keys_of(name)), settings_with(path)
    with_keys = plan_file(path, model_of(TARGET), settings)
    assert with_keys.to_json() != plan_file(path, model_of(TARGET), bare).to_json()


@pytest.mark.parametrize("name", sorted(KEYS.keys() - {"position", "source", "rename"}))
def test_mutation_keys_applied_once_more_lose_weights(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What happened before: the trained head or the backbone is dropped, or the load is refused."""
    path = foreign(tmp_path, name)
    settings = settings_with(path, **keys_of(name))
    own, weights = made_from(path, settings, tmp_path, trained=True)
    monkeypatch.setattr("d2_headadapt.checkpoint.load.keys_for", lambda settings, *_, **__: (settings, ()))
    with contextlib.suppress(HeadAdaptError):
        assert not same_bits(loaded(own, replace(settings, weights=own)), weights)


def test_a_new_key_about_our_own_file_as_source_holds(tmp_path: Path) -> None:
    """Fine-tuning goes on from a file of ours, and its mask head or backbone may be left out this time."""
    path = foreign(tmp_path, "source")
    own, weights = made_from(path, settings_with(path, **KEYS["source"]), tmp_path, trained=True)
    again = loaded(own, settings_with(own, exclude=("backbone.*",), min_coverage=0.01))
    assert torch.equal(again[CLS], weights[CLS])
    assert not torch.equal(again[BACKBONE], weights[BACKBONE])


def test_a_new_alias_about_our_own_file_holds(tmp_path: Path) -> None:
    path = foreign(tmp_path, "source")
    own, weights = made_from(path, settings_with(path, **KEYS["source"]), tmp_path, trained=True)
    model = model_of(["truck"], seed=2)
    asked = AdaptSettings(target={"thing": ClassTable(["truck"])}, aliases=("truck=lorry",), weights="other.pth")
    HeadAdaptCheckpointer(model, settings=asked).load(own, checkpointables=[])
    assert torch.equal(state_of(model)[CLS][0], weights[CLS][1])


def known(tables: Mapping[str, list[str]], **more: Any) -> Provenance:
    return Provenance({space: ClassTable(listed, "f.pth") for space, listed in tables.items()}, **more)


@pytest.mark.parametrize("own", [True, False])
def test_position_goes_by_name_where_the_run_itself_wrote_the_file(own: bool) -> None:
    """Classes in another order, and MATCH position still in the yaml: the names in the file decide."""
    settings = AdaptSettings(target={"thing": ClassTable(["b", "a"])}, match="position", weights="w.pth")
    applied = {} if own else {"match": "position"}
    used, unused = keys_for(settings, known({"thing": ["a", "b"]}, applied=applied), "w.pth", own=own)
    assert used.match == "name"
    assert [str(key.key) for key in unused] == ["MODEL.HEAD_ADAPT.MATCH"]


def test_position_over_a_file_that_names_its_classes_needs_to_be_told_twice() -> None:
    settings = AdaptSettings(target={"thing": ClassTable(["b", "a"])}, match="position", weights="w.pth")
    with pytest.raises(PlanRefused) as error:
        keys_for(settings, known({"thing": ["a", "b"]}), "w.pth")
    assert str(error.value) == (
        "MODEL.HEAD_ADAPT.MATCH: expected name, because the file names its own classes, found position, which gives "
        "class 0 'b' the rows of 'a' of w.pth. Set MODEL.HEAD_ADAPT.MATCH name. Where the names in the file are wrong, "
        "set MODEL.HEAD_ADAPT.MATCH position_over_names."
    )
    twice = replace(settings, match="position_over_names")
    assert keys_for(twice, known({"thing": ["a", "b"]}), "w.pth")[0].match == "position"
    assert keys_for(twice, known({"thing": ["a", "b"]}), "w.pth", own=True)[0].match == "name"


def test_a_resume_with_reordered_classes_and_position_is_not_said_to_be_the_same(tmp_path: Path) -> None:
    model = model_of(["a", "b"], seed=1)
    HeadAdaptCheckpointer(model, str(tmp_path), settings=AdaptSettings.of(["a", "b"], match="position")).save("own")
    turned = AdaptSettings.of(["b", "a"], match="position")
    plan = plan_file(str(tmp_path / "own.pth"), model_of(["b", "a"]), turned, own=True)
    assert plan.maps["thing"].rows == (1, 0)
    assert not any(t.reason == "same classes, same order" for t in plan.tensors if t.name == CLS)


def test_a_guess_stays_an_assumption_that_can_be_corrected(tmp_path: Path) -> None:
    """Rows that were copied by shape: what is written says so, each load repeats it, and a key corrects it."""
    path = save_stock(stock_model(3), tmp_path / "s.pth")
    guessed = AdaptSettings.of(["cat", "dog", "eel"])
    own, weights = made_from(path, replace(guessed, target={"thing": ClassTable(TARGET)}), tmp_path, trained=False)
    assert torch.load(own, weights_only=True)["d2_headadapt"]["extra"]["assumed"] == ["thing"]
    again = plan_file(own, model_of(TARGET), AdaptSettings.of(TARGET))
    assert again.assumed == ("thing",)
    from d2_headadapt.adapt.report import plan_notices

    (notice,) = plan_notices(again)
    assert notice.code == "unverified"
    assert notice.where == "the 3 thing classes of the file are assumed (class 2, lorry, class 0)"
    assert notice.type_this == "MODEL.HEAD_ADAPT.SOURCE_CLASSES names.txt"
    corrected = AdaptSettings.of(TARGET, source=["lorry", "class 0", "class 2"], weights=own)
    right = plan_file(own, model_of(TARGET), corrected)
    assert right.maps["thing"].rows == (2, 0, 1) and right.assumed == ()
    assert torch.equal(loaded(own, corrected)[CLS][1], weights[CLS][0])


def test_an_assumption_outlives_a_second_adaptation_and_ends_with_training(tmp_path: Path) -> None:
    path = save_stock(stock_model(3), tmp_path / "s.pth")
    plain = AdaptSettings.of(TARGET)
    for _ in range(2):
        path, _ = made_from(path, plain, tmp_path, trained=False)
        assert plan_file(path, model_of(TARGET), plain).assumed == ("thing",)
    path, _ = made_from(path, plain, tmp_path, trained=True)
    assert plan_file(path, model_of(TARGET), plain).assumed == ()


def test_what_went_into_a_file_survives_the_next_one() -> None:
    first = applied_keys(AdaptSettings(exclude=("a.*",), aliases=("x=y",)), Provenance())
    second = applied_keys(AdaptSettings(aliases=("v=w",)), Provenance(applied=first))
    assert second == {"exclude": ["a.*"], "aliases": ["x=y", "v=w"]}
    assert Provenance.from_plain(Provenance(applied=second).to_plain(), "f.pth").applied == second


@pytest.mark.parametrize(
    ("applied", "cause"), [({"exclude": ["a.*"]}, Unused.APPLIED), ({}, Unused.OTHER_FILE)], ids=["applied", "other"]
)
def test_what_is_not_used_is_said_with_its_reason(applied: dict[str, Any], cause: Unused) -> None:
    settings = AdaptSettings(exclude=("a.*",), weights="base.pth")
    _, (key,) = keys_for(settings, known({"thing": ["a"]}, applied=applied), "own.pth")
    assert (str(key.key), key.cause) == ("MODEL.HEAD_ADAPT.EXCLUDE", cause)
    assert key.sentence().startswith("MODEL.HEAD_ADAPT.EXCLUDE ['a.*'] ")
