"""HA3xx: what is wrong with a checkpoint, or with the run in OUTPUT_DIR, said before anything is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from helpers.files import save_stock
from helpers.models import build_seeded, model_of, stock_model, tiny_cfg

from d2_headadapt.checkpoint.checkpointer import HeadAdaptCheckpointer
from d2_headadapt.doctor.finding import CHECKS, DoctorContext, Finding
from d2_headadapt.doctor.running import run_checks

ANIMALS, TOOLS = ["cat", "dog", "emu", "fox", "gnu"], ["axe", "saw", "nail", "vise", "file"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``stock.pth`` of five unnamed classes, and ``own.pth`` of the animals."""
    made = tmp_path_factory.mktemp("weights")
    save_stock(stock_model(5, seed=1), made / "stock.pth")
    HeadAdaptCheckpointer(model_of(ANIMALS), str(made), save_to_disk=True).save("own")
    (made / "last_checkpoint").unlink()
    return made


@pytest.fixture(autouse=True)
def _datasets() -> None:
    for name in ("d2ha_doctor_train", "d2ha_doctor_test"):
        DatasetCatalog.register(name, list)
        MetadataCatalog.get(name).thing_classes = ANIMALS


def config(weights: object = "", output: object = "/nonexistent", *, train: bool = True, **keys: Any) -> CfgNode:
    """A tiny config of our heads; keys go under MODEL.HEAD_ADAPT. ``train`` says that it is not an evaluation."""
    cfg = tiny_cfg(masks=False)
    cfg.MODEL.WEIGHTS, cfg.OUTPUT_DIR = str(weights), str(output)
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = (("d2ha_doctor_train",) if train else ()), ("d2ha_doctor_test",)
    cfg.MODEL.HEAD_ADAPT.TARGET_CLASSES = ANIMALS
    for key, value in keys.items():
        cfg.MODEL.HEAD_ADAPT[key] = value
    return cfg


def findings(cfg: CfgNode, *codes: str) -> list[Finding]:
    """What the checks of weights and resume say, in the order of their codes; of some codes only where given."""
    chosen = [one for code, one in CHECKS.items() if code.startswith("HA3") and (not codes or code in codes)]
    report = run_checks(DoctorContext(ready=cfg), chosen)
    assert "HA100" not in {f.code for f in report.findings}, report.findings
    return sorted(report.findings, key=lambda f: f.code)


def codes(found: Sequence[Finding]) -> list[tuple[str, str]]:
    return [(f.code, f.severity) for f in found]


def test_a_named_file_of_the_same_classes_and_an_empty_folder_are_silent(folder: Path, tmp_path: Path) -> None:
    assert findings(config(folder / "own.pth", tmp_path)) == []
    assert findings(config(folder / "stock.pth", tmp_path, SOURCE_CLASSES=ANIMALS)) == []
    assert findings(config("", tmp_path)) == [], "nothing to load is no mistake"


@pytest.mark.parametrize("kind", ["missing", "truncated", "page"])
def test_a_file_that_cannot_be_read_is_an_error(kind: str, folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "stocc.pth"
    if kind != "missing":
        text = (folder / "stock.pth").read_bytes()
        path.write_bytes(text[: len(text) // 2] if kind == "truncated" else b"<!DOCTYPE html><html>404</html>")
    (found,) = findings(config(path))
    assert codes([found]) == [("HA301", "error")] and str(path) in found.where


def test_an_address_that_cannot_be_reached_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    from detectron2.utils.file_io import PathManager

    def offline(path: str, **unused: Any) -> str:
        raise OSError("no network")

    monkeypatch.setattr(PathManager, "get_local_path", offline)
    (found,) = findings(config("detectron2://ImageNetPretrained/MSRA/R-50.pkl"))
    assert codes([found]) == [("HA301", "warning")] and "no network" in found.found


def test_a_file_of_another_architecture_is_refused_with_the_share_by_submodule(tmp_path: Path) -> None:
    path = tmp_path / "renamed.pth"
    state = {name.replace("backbone.", "encoder."): v for name, v in stock_model(5).state_dict().items()}
    torch.save({"model": state}, path)
    (found,) = findings(config(path, SOURCE_CLASSES=ANIMALS), "HA302", "HA311")
    assert codes([found]) == [("HA302", "error")]
    assert "encoder 0/" in found.found and "MODEL.HEAD_ADAPT.MIN_COVERAGE" in found.fix
    assert findings(config(path, SOURCE_CLASSES=ANIMALS, MIN_COVERAGE=0.0), "HA302") == []
    (found,) = findings(config(save_stock(stock_model(5, "c4"), path), SOURCE_CLASSES=ANIMALS), "HA302", "HA311")
    assert found.code == "HA302" and "none that fits" in found.found


def test_a_head_of_unknown_classes_is_a_warning_that_names_the_key(folder: Path) -> None:
    (found,) = findings(config(folder / "stock.pth"))
    assert codes([found]) == [("HA303", "warning")]
    assert "MODEL.HEAD_ADAPT.SOURCE_CLASSES" in found.fix


def test_a_trained_head_that_is_thrown_away_is_a_warning(tmp_path: Path) -> None:
    cfg = tiny_cfg(masks=False)
    cfg.MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG = True
    cfg.MODEL.HEAD_ADAPT.TARGET_CLASSES = ANIMALS
    HeadAdaptCheckpointer(build_seeded(cfg), str(tmp_path), save_to_disk=True).save("agnostic")
    (found,) = findings(config(tmp_path / "agnostic.pth"), "HA312")
    assert codes([found]) == [("HA312", "warning")]
    assert found.found == (
        "4 tensors of roi_heads keep the model's initial values: class-agnostic in the file, 4 rows per class in the "
        "model"
    )
    assert found.fix == (
        "Build the head as the file has it, or name it in MODEL.HEAD_ADAPT.EXCLUDE if it is to be trained anew."
    )
    assert findings(config(tmp_path / "agnostic.pth", EXCLUDE=["roi_heads.box_predictor.*"]), "HA312") == []


def test_another_list_of_the_same_length_is_seen(folder: Path) -> None:
    (by_name,) = findings(config(folder / "own.pth", TARGET_CLASSES=TOOLS))
    assert codes([by_name]) == [("HA304", "note")]
    assert "row 0 is 'cat' in the file and 'axe' in the model" in by_name.found
    (by_position,) = findings(config(folder / "own.pth", TARGET_CLASSES=TOOLS, MATCH="position_over_names"))
    assert codes([by_position]) == [("HA304", "warning")]
    assert findings(config(folder / "own.pth", TARGET_CLASSES=ANIMALS[:4]), "HA304") == []


def run_folder(place: Path, classes: Sequence[str] = ANIMALS, iteration: int = 99) -> Path:
    """The OUTPUT_DIR of a run of ours: weights, momentum and an iteration."""
    model = model_of(classes, num_classes=len(classes))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    checkpointer = HeadAdaptCheckpointer(model, str(place), save_to_disk=True, optimizer=optimizer)
    checkpointer.save("model_0000099", iteration=iteration)
    return place


def test_a_run_in_the_output_folder_is_said_where_other_weights_are_named(folder: Path, tmp_path: Path) -> None:
    place = run_folder(tmp_path)
    (found,) = findings(config(folder / "own.pth", place))
    assert codes([found]) == [("HA305", "warning")]
    assert "own.pth is not read" in found.found and "OUTPUT_DIR" in found.fix
    assert findings(config(place / "model_0000099.pth", place)) == [], "its own checkpoint is no other run"


def test_a_note_that_names_no_file_is_said_and_stops_no_other_check(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "last_checkpoint").write_text("model_gone.pth")
    (found,) = findings(config(folder / "own.pth", tmp_path))
    assert codes([found]) == [("HA305", "warning")] and "model_gone.pth" in found.found


@pytest.mark.parametrize(("max_iter", "left"), [(100, False), (60, False), (101, True)])
def test_a_run_without_iterations_left(max_iter: int, left: bool, tmp_path: Path) -> None:
    cfg = config("", run_folder(tmp_path, iteration=99))
    cfg.SOLVER.MAX_ITER = max_iter
    found = findings(cfg, "HA306")
    assert codes(found) == ([] if left else [("HA306", "warning")])
    assert left or "has done 100" in found[0].found


def test_moments_of_another_class_list(tmp_path: Path) -> None:
    place = run_folder(tmp_path, TOOLS[:3])
    (found,) = findings(config("", place), "HA307")
    assert "MODEL.HEAD_ADAPT.RESUME adapt" in found.fix and "cls_score" in found.found
    assert findings(config("", place, RESUME="adapt"), "HA307") == []
    assert findings(config("", run_folder(tmp_path)), "HA307") == []


def test_moments_of_the_same_count_but_other_classes(tmp_path: Path) -> None:
    assert codes(findings(config("", run_folder(tmp_path, TOOLS)), "HA307")) == [("HA307", "warning")]


def test_an_evaluation_with_untrained_rows_is_an_error_that_knows_the_count(folder: Path, tmp_path: Path) -> None:
    cfg = config(folder / "stock.pth", train=False, TARGET_CLASSES=None)
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 80
    (found,) = findings(cfg, "HA308")
    assert codes([found]) == [("HA308", "error")]
    assert "hold 5 classes" in found.found and found.fix == "Set MODEL.ROI_HEADS.NUM_CLASSES 5."
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 5
    assert findings(cfg, "HA308") == []
    cfg = config(folder / "own.pth", train=False, TARGET_CLASSES=[*ANIMALS, "yak"])
    assert "yak" in findings(cfg, "HA308")[0].found
    assert findings(config(folder / "own.pth", TARGET_CLASSES=[*ANIMALS, "yak"]), "HA308") == [], "it is trained"
    cfg.MODEL.HEAD_ADAPT.ALLOW_NEW_ROWS_AT_EVAL = True
    assert findings(cfg, "HA308") == []


@pytest.mark.parametrize(
    ("key", "wrong", "right"),
    [
        ("INCLUDE", ["backbon.*"], ["backbone.*", "roi_heads.*", "proposal_generator.*"]),
        ("EXCLUDE", ["*.cls_scor.*"], ["*.cls_score.*"]),
        ("RENAME", ["^encoder=backbone"], ["^roi_heads.box_head=roi_heads.head"]),
        ("FREEZE", ["backbone.stem.*"], ["backbone.bottom_up.stem.*"]),
    ],
)
def test_a_pattern_that_matches_nothing(key: str, wrong: list[str], right: list[str], folder: Path) -> None:
    (found,) = findings(config(folder / "own.pth", **{key: wrong}), "HA301", "HA309")
    assert codes([found]) == [("HA309", "error")]
    assert found.where == f"MODEL.HEAD_ADAPT.{key}, {wrong[0]!r}"
    assert findings(config(folder / "own.pth", **{key: right}), "HA301", "HA309") == []


def test_an_alias_that_names_no_class(folder: Path) -> None:
    target = [*ANIMALS[:4], "wildebeest"]
    (found,) = findings(config(folder / "own.pth", TARGET_CLASSES=target, ALIASES=["wildebeast=gnu"]), "HA301", "HA310")
    assert codes([found]) == [("HA310", "error")] and "'wildebeast'" in found.found
    assert findings(config(folder / "own.pth", TARGET_CLASSES=target, ALIASES=["wildebeest=gnu"]), "HA310") == []
    (idle,) = findings(config(folder / "stock.pth", ALIASES=["cat=dog"]), "HA310")
    assert codes([idle]) == [("HA310", "warning")] and "SOURCE_CLASSES" in idle.fix


def test_a_deeper_backbone_fills_a_shallow_one_and_is_seen(tmp_path: Path) -> None:
    deep = tiny_cfg(masks=False, ours=False)
    deep.MODEL.RESNETS.DEPTH = 101
    path = save_stock(build_seeded(deep), tmp_path / "r101.pth")
    cfg = config(path, SOURCE_CLASSES=ANIMALS, MIN_COVERAGE=0.2)
    (found,) = findings(cfg, "HA302", "HA311")
    assert codes([found]) == [("HA311", "warning")]
    assert "have no place in the model" in found.found and "MODEL.RESNETS.DEPTH" in found.fix
    cfg.MODEL.RESNETS.DEPTH = 101
    assert findings(cfg, "HA302", "HA311") == []


def test_an_imagenet_backbone_below_a_new_fpn_is_silent(tmp_path: Path) -> None:
    state = {k: v for k, v in stock_model(5).state_dict().items() if k.startswith("backbone.bottom_up.")}
    torch.save({"model": state}, tmp_path / "imagenet.pth")
    assert findings(config(tmp_path / "imagenet.pth")) == []


def test_one_mistake_is_said_once(folder: Path) -> None:
    """A file that cannot be planned on is said by one check, and the checks that need the plan are not run."""
    cfg = config(folder / "own.pth", EXCLUDE=["nothing"])
    report = run_checks(DoctorContext(ready=cfg), [one for code, one in CHECKS.items() if code.startswith("HA3")])
    assert [f.code for f in report.findings] == ["HA309"]
    assert {"HA302", "HA303", "HA304", "HA308", "HA311"} <= set(report.not_run)


def test_one_mean_with_weights_of_three_channels_is_named(folder: Path) -> None:
    cfg = config(folder / "own.pth")
    cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD, cfg.INPUT.FORMAT = [120.0], [1.0], "L"
    (found,) = findings(cfg, "HA313")
    assert codes([found]) == [("HA313", "warning")]
    assert found.found.startswith("1 value, so backbone.")
    assert found.found.endswith("own.pth 3: this layer starts from random values")
    assert found.fix.startswith("Write INPUT.FORMAT: BGR, and three values")
    assert findings(config(folder / "own.pth"), "HA313") == []


def test_a_discarded_head_and_near_names_are_warnings(folder: Path) -> None:
    (discarded,) = findings(config(folder / "stock.pth", TARGET_CLASSES=["cat", "dog"]), "HA312")
    assert codes([discarded]) == [("HA312", "warning")] and "keep the model's initial values" in discarded.found
    assert "SOURCE_CLASSES" in discarded.fix and "hold 5" in discarded.fix
    (near,) = findings(config(folder / "own.pth", TARGET_CLASSES=["cats", "hound"]), "HA314")
    assert codes([near]) == [("HA314", "warning")]
    assert "2 new thing classes have names near to dropped ones" in near.found and "hound=dog" in near.fix
