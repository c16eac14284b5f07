"""Which classes a file predicted, who says so first, and what is refused before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from detectron2.utils.file_io import PathManager
from helpers.files import HEAD, logged, save_stock, texts
from helpers.models import model_of, names, stock_model, tiny_cfg

from d2_headadapt import AdaptPlan, AdaptSettings, ClassTable, HeadAdaptCheckpointer
from d2_headadapt.adapt.causes import Cause
from d2_headadapt.adapt.plan import TensorPlan
from d2_headadapt.adapt.report import summary_line
from d2_headadapt.checkpoint.load import (
    LoadRequest,
    asks_heuristics,
    check_exists,
    plan_checkpoint,
    plan_file,
    refuse_plan,
    say_unused,
)
from d2_headadapt.checkpoint.provenance import KEY, Provenance
from d2_headadapt.errors import CheckpointFileError, PlanRefused
from d2_headadapt.setup.build import build_on_meta

ZOO = "detectron2://PascalVOC-Detection/faster_rcnn_R_50_C4/142202221/model_final_b1acc2.pkl"
THREE = ClassTable(["cat", "dog", "eel"], "mine")


def plan_of(
    stored: Mapping[str, torch.Tensor], model: torch.nn.Module, settings: AdaptSettings, known: Provenance, origin: str
) -> AdaptPlan:
    checkpoint = {"model": dict(stored), **({KEY: known.to_plain()} if known != Provenance() else {})}
    made = plan_checkpoint(LoadRequest(origin, settings), checkpoint, model)
    say_unused(made.unused)
    return made.plan


def planned(origin: str, settings: AdaptSettings, known: Provenance | None = None, count: int = 20) -> AdaptPlan:
    """Tensors of a stock model, and a model of ours for three classes."""
    stored = stock_model(count).state_dict()
    return plan_of(stored, model_of(THREE.names), settings, known or Provenance(), origin)


def test_the_file_is_asked_first_then_the_key_then_the_zoo_path() -> None:
    """Three answers, all of 20 classes: the order of section 6 of the design."""
    in_file, in_key = ClassTable(names(20, "file")), ClassTable(names(20, "key"))
    target, asked = {"thing": THREE}, {"thing": in_key}
    known = Provenance({"thing": in_file})
    plan = planned(ZOO, AdaptSettings(target=target, source=asked), known)
    assert plan.source["thing"].names[0] == "file 0"
    assert planned(ZOO, AdaptSettings(target=target, source=asked)).source["thing"].names[0] == "key 0"
    assert planned(ZOO, AdaptSettings(target=target)).source["thing"].names[0] == "aeroplane"
    assert planned("/somewhere/model_final.pth", AdaptSettings(target=target)).source == {}


def test_the_zoo_path_carries_by_name() -> None:
    plan = planned(ZOO, AdaptSettings(target={"thing": THREE}))
    voc = plan.source["thing"]
    found = plan.class_map("thing")
    assert found is not None
    assert found.carried == ((0, voc.names.index("cat")), (1, voc.names.index("dog")))


def test_a_file_that_contradicts_the_key_is_right_and_it_is_said() -> None:
    asked = AdaptSettings(target={"thing": THREE}, source={"thing": ClassTable(names(7))})
    with logged("d2_headadapt") as said:
        plan = planned("f.pth", asked, Provenance({"thing": ClassTable(names(20, "file"))}))
    assert len(plan.source["thing"]) == 20
    assert (
        "SOURCE_CLASSES (7 classes, 20 in the file) names other classes than the file itself does: the file is right"
        in texts(said)
    )


def test_a_table_for_a_space_that_the_model_lacks_is_one_line() -> None:
    source = {"thing": ClassTable(names(20)), "stuff": ClassTable(names(4))}
    with logged("d2_headadapt") as said:
        plan = planned("f.pth", AdaptSettings(target={"thing": THREE}, source=source))
    unused = "MODEL.HEAD_ADAPT.SOURCE_CLASSES_STUFF is set and not used: the model has no stuff head."
    assert texts(said) == f"{unused} It reads MODEL.HEAD_ADAPT.SOURCE_CLASSES."
    assert [record.levelname for record in said] == ["WARNING"]
    assert not plan.refused


def test_unknown_source_and_another_shape_initialises_the_whole_group_and_names_the_key() -> None:
    plan = planned("f.pth", AdaptSettings(target={"thing": THREE}))
    head = [t for t in plan.tensors if t.space == "thing"]
    assert len(head) == 4
    assert {t.action for t in head} == {"initialised"}
    assert all(t.cause is Cause.UNKNOWN_CLASSES for t in head)
    assert all("set MODEL.HEAD_ADAPT.SOURCE_CLASSES" in t.reason for t in head)
    assert plan.new_classes() == {"thing": THREE.names}


def test_unknown_source_and_the_same_shape_is_copied_as_stock_does_but_unverified() -> None:
    plan = planned("f.pth", AdaptSettings(target={"thing": THREE}), count=3)
    head = [t for t in plan.tensors if t.space == "thing"]
    assert {(t.action, t.verified) for t in head} == {("copied", False)}
    assert all(t.cause is Cause.SHAPES_AGREE for t in head)
    assert all("MODEL.HEAD_ADAPT.SOURCE_CLASSES verifies it" in t.reason for t in head)
    assert all(t.verified for t in plan.tensors if t.space is None)


@pytest.mark.parametrize("count", [3, 20])
def test_none_initialises_whatever_the_file_holds(count: int) -> None:
    known = Provenance({"thing": ClassTable(names(count))})
    plan = planned(ZOO, AdaptSettings(target={"thing": THREE}, initialise=frozenset({"thing"})), known, count)
    assert {t.action for t in plan.tensors if t.space == "thing"} == {"initialised"}
    assert "thing" not in plan.source


def test_without_a_target_the_files_own_table_is_the_target_where_it_fits() -> None:
    """Evaluation and prediction need no dataset."""
    own = ClassTable(["cat", "dog", "eel"])
    assert planned("f.pth", AdaptSettings(), Provenance({"thing": own}), 3).target == {"thing": own}
    assert planned("f.pth", AdaptSettings(), Provenance({"thing": ClassTable(names(20))})).target == {}


def test_a_plan_on_the_meta_device_is_the_plan_of_the_load(tmp_path: Path) -> None:
    """A plan says before what the load does."""
    path = save_stock(stock_model(5), tmp_path / "s.pth")
    cfg = tiny_cfg(masks=False)
    cfg.MODEL.HEAD_ADAPT.TARGET_CLASSES = ["class 4", "new", "class 0"]
    settings = AdaptSettings(
        target={"thing": ClassTable(cfg.MODEL.HEAD_ADAPT.TARGET_CLASSES)}, source={"thing": ClassTable(names(5))}
    )
    model = build_on_meta(cfg)
    assert {p.device.type for p in model.parameters()} == {"meta"}
    before = plan_file(path, model, settings)
    checkpointer = HeadAdaptCheckpointer(model_of(cfg.MODEL.HEAD_ADAPT.TARGET_CLASSES), settings=settings)
    checkpointer.load(path)
    assert checkpointer.plan is not None
    assert checkpointer.plan.to_json() == before.to_json()


def test_the_zoo_path_is_taken_in_a_plan_before_it_becomes_a_local_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save_stock(stock_model(20), tmp_path / "s.pth")
    fetched: list[str] = []
    monkeypatch.setattr(PathManager, "get_local_path", lambda asked, **_: fetched.append(asked) or path)
    plan = plan_file(ZOO, model_of(THREE.names), AdaptSettings(target={"thing": THREE}))
    assert fetched == [ZOO]
    assert plan.source["thing"].names[0] == "aeroplane"


def test_an_address_that_gives_no_file_is_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: str, **_: object) -> str:
        raise OSError("<urlopen error refused>")

    monkeypatch.setattr(PathManager, "get_local_path", fail)
    with pytest.raises(CheckpointFileError, match="expected a file that can be fetched, found OSError: <urlopen"):
        plan_file("https://example.invalid/x.pth", model_of(names(3)), AdaptSettings())


def test_anchors_are_not_taken_for_classes() -> None:
    """Three anchors and three classes: the proposal network of every model would be called unverified."""
    plan = planned("f.pth", AdaptSettings(target={"thing": THREE}, source={"thing": ClassTable(names(20))}))
    anchors = next(t for t in plan.tensors if t.name.endswith("objectness_logits.weight"))
    assert anchors.target_shape is not None
    assert anchors.target_shape[0] == 3
    assert all(t.verified for t in plan.tensors)


def test_a_missing_file_names_the_nearest_of_its_folder(tmp_path: Path) -> None:
    (tmp_path / "model_final.pth").touch()
    with pytest.raises(CheckpointFileError, match=r"found no such file\. .*Nearest: 'model_final.pth'"):
        check_exists(str(tmp_path / "model_fnal.pth"))
    with pytest.raises(CheckpointFileError, match="found a folder"):
        check_exists(str(tmp_path))
    with pytest.raises(CheckpointFileError, match="found no such file"):
        check_exists(str(tmp_path / "no" / "such" / "folder.pth"))
    check_exists(str(tmp_path / "model_final.pth?matching_heuristics=True"))
    check_exists("detectron2://nobody/asks/yet.pkl")


def test_one_query_is_known() -> None:
    assert asks_heuristics("a.pth?matching_heuristics=True")
    assert not asks_heuristics("a.pth?matching_heuristics=False")
    assert not asks_heuristics("a.pth")
    with pytest.raises(CheckpointFileError, match=r"expected no query but \?matching_heuristics=True, found token"):
        asks_heuristics("https://host/a.pth?token=1&matching_heuristics=True")


def plan_of_shares(found: int, total: int) -> AdaptPlan:
    """A plan in which ``found`` of the file's ``total`` tensors find a place."""
    model = {f"backbone.{i}": (2,) for i in range(found)} | {"head.0": (3,)}
    file = {f"backbone.{i}": (2,) for i in range(total)}
    from d2_headadapt import plan_adaptation

    return plan_adaptation(file, model, ())


def test_coverage_below_the_minimum_is_refused_with_every_submodule_and_the_key() -> None:
    with pytest.raises(PlanRefused) as error:
        refuse_plan(plan_of_shares(4, 10), 0.5, "f.pth")
    text = str(error.value)
    assert "f.pth: expected at least 50%" in text
    assert "found 40% (by submodule: backbone 4/10)" in text
    assert "MODEL.HEAD_ADAPT.MIN_COVERAGE 0.39" in text


def test_the_key_that_the_refusal_names_is_enough() -> None:
    refuse_plan(plan_of_shares(4, 10), 0.39, "f.pth")
    refuse_plan(plan_of_shares(5, 10), 0.5, "f.pth")


def test_a_backbone_alone_counts_in_full() -> None:
    """Pre-trained backbones are the most common file of all."""
    model = model_of(names(3))
    backbone = {n: v for n, v in model.state_dict().items() if n.startswith("backbone.")}
    plan = plan_of(backbone, model, AdaptSettings(target={"thing": ClassTable(names(3))}), Provenance(), "b.pkl")
    assert plan.coverage == 1
    refuse_plan(plan, 1.0, "b.pkl")
    assert plan.new_classes() == {"thing": tuple(names(3))}


def test_nothing_that_fits_is_refused_whatever_the_minimum() -> None:
    with pytest.raises(PlanRefused, match=r"expected tensors that the model has, found none that fits \(backbone 0/3"):
        refuse_plan(plan_of_shares(0, 3), 0.0, "f.pth")


def test_a_refused_tensor_is_named_before_coverage() -> None:
    """A source table of the wrong length is the user's mistake, not the architecture's."""
    plan = planned("f.pth", AdaptSettings(target={"thing": THREE}, source={"thing": ClassTable(names(19), "my list")}))
    with pytest.raises(
        PlanRefused, match=rf"{HEAD}.* holds 20 classes .*but my list names 19: correct .*SOURCE_CLASSES"
    ):
        refuse_plan(plan, 1.0, "f.pth")


def test_a_short_source_list_is_padded_only_where_the_model_has_the_same_rows_without_a_name() -> None:
    """The mistake of one class too many, made in both trainings; else a list that is too short is refused."""
    stored, short = stock_model(6).state_dict(), {"thing": ClassTable(names(5))}
    padded = ClassTable(["class 3", "gnu", "class 0", "class 1", "class 2"]).padded(6)
    for target, refused in (
        (padded, False),
        (ClassTable(["class 3", "gnu", "class 0", "class 1", "emu", "elk"]), True),
    ):
        settings = AdaptSettings(target={"thing": target}, source=short)
        plan = plan_of(stored, model_of(target.names, num_classes=6), settings, Provenance(), "f.pth")
        assert bool(plan.refused) == refused
    settings = AdaptSettings(target={"thing": padded}, source=short)
    plan = plan_of(stored, model_of(padded.names, num_classes=6), settings, Provenance(), "f.pth")
    found = plan.class_map("thing")
    assert found is not None and found.carried == ((0, 3), (2, 0), (3, 1), (4, 2), (5, 5)) and found.new == (1,)
    assert "4 of 5 thing classes carried" in summary_line(plan) and "1 row without a name" in summary_line(plan)


def test_a_guessed_target_yields_to_the_classes_that_a_file_names_itself() -> None:
    known = Provenance({"thing": ClassTable(["ant", "bee", "cat"])})
    stored, guess = stock_model(3).state_dict(), {"thing": ClassTable(["cow"]).padded(3)}
    for yields, source, names_of_target in (
        (frozenset[str](), {}, guess["thing"].names),
        (frozenset({"thing"}), {}, ("ant", "bee", "cat")),
    ):
        settings = AdaptSettings(target=guess, source=source, yields=yields)
        plan = plan_of(stored, model_of(None, num_classes=3), settings, known, "f.pth")
        assert plan.target["thing"].names == names_of_target


def test_little_of_a_file_is_refused_and_as_stock_does_it_a_warning() -> None:
    plan = AdaptPlan((TensorPlan("a", "dropped", source_shape=(2,)),))
    with pytest.raises(PlanRefused, match="found none that fits"):
        refuse_plan(plan, 0.5, "f.pth")
    with logged("d2_headadapt") as said:
        refuse_plan(plan, 0.5, "f.pth", as_stock=True)
    assert [record.levelname for record in said] == ["WARNING"] and "Loaded all the same" in texts(said)
