"""The Python path: a state dict adapted in one call, rows fitted from any loader, settings from plain names."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data import DatasetMapper, build_detection_train_loader, get_detection_dataset_dicts
from detectron2.data import transforms as T
from detectron2.data.datasets import register_coco_instances
from detectron2.structures import Boxes
from helpers.classifier import classifier, picture, pictures
from helpers.fit import SETTINGS, scene, scenes, tiny_model
from helpers.models import build_seeded, model_of, names, same_bits, state_of, stock_model
from helpers.real import fbnet_c4
from torch import nn

from d2_headadapt import (
    AdaptSettings,
    ClassTable,
    HeadAdaptCheckpointer,
    HeadAdaptError,
    adapt_state_dict,
    fit_rows,
    vocabulary,
)
from d2_headadapt.engine.own_loop import MappedCheck, entries_of
from d2_headadapt.errors import CheckpointFileError, ClassTableError, ConfigError, DatasetError, PlanRefused
from d2_headadapt.fit import fit_new_rows

ANY = MappedCheck(None, None)
QUICK = replace(SETTINGS, parts=("box",), penalties=(1e-2, 1e-3), box_penalties=(0.3, 0.1))
OLD, NEW = ["ant", "bee", "cat"], ["gnu", "Cat"]
SCORES = "roi_heads.box_predictor.cls_score.weight"
BOXES = "roi_heads.box_predictor.bbox_pred.weight"


@pytest.fixture
def old() -> nn.Module:
    return stock_model(3, seed=1)


@pytest.fixture
def model() -> nn.Module:
    return stock_model(2, seed=2)


def saved(model: nn.Module, folder: Path) -> Path:
    HeadAdaptCheckpointer(model, str(folder), settings=AdaptSettings.of(OLD)).save("old", iteration=7)
    return folder / "old.pth"


@pytest.mark.parametrize("form", ["state", "wrapped", "checkpoint", "path", "text path"])
def test_any_form_of_weights_gives_the_same_state(form: str, old: nn.Module, model: nn.Module, tmp_path: Path) -> None:
    path = saved(old, tmp_path)
    weights: Any = {
        "state": old.state_dict(),
        "wrapped": {f"module.{name}": value for name, value in old.state_dict().items()},
        "checkpoint": torch.load(path, weights_only=True),
        "path": path,
        "text path": str(path),
    }[form]
    source = {"source": OLD} if form in ("state", "wrapped") else {}
    before, given = state_of(model), state_of(old)
    state, plan = adapt_state_dict(weights, model, NEW, **source)
    assert same_bits(before, state_of(model)) and same_bits(given, state_of(old))
    assert list(state) == list(before)
    assert plan.new_classes() == {"thing": ("gnu",)}
    for tensor, per_class in ((SCORES, 1), (BOXES, 4)):
        assert torch.equal(state[tensor][per_class : 2 * per_class], given[tensor][2 * per_class : 3 * per_class])
        assert torch.equal(state[tensor][:per_class], before[tensor][:per_class])
    assert torch.equal(state[SCORES][2], given[SCORES][3])
    assert torch.equal(state["backbone.fpn_lateral2.weight"], given["backbone.fpn_lateral2.weight"])
    model.load_state_dict(state)


def test_it_is_what_the_checkpointer_loads(old: nn.Module, model: nn.Module, tmp_path: Path) -> None:
    path = saved(old, tmp_path)
    state, plan = adapt_state_dict(path, model, NEW)
    checkpointer = HeadAdaptCheckpointer(model, settings=AdaptSettings.of(NEW))
    checkpointer.load(str(path), checkpointables=[])
    assert same_bits(state, state_of(model))
    assert checkpointer.plan == plan


def test_nothing_in_a_dict_that_is_given_changes(old: nn.Module, model: nn.Module, tmp_path: Path) -> None:
    """Averages beside the model are another thing that a load would send through the plan."""
    checkpoint = torch.load(saved(old, tmp_path), weights_only=True)
    checkpoint["ema_state"] = state_of(old)
    keys, average = list(checkpoint), {**checkpoint["ema_state"]}
    adapt_state_dict(checkpoint, model, NEW)
    assert list(checkpoint) == keys
    assert same_bits(checkpoint["ema_state"], average) and same_bits(checkpoint["model"], state_of(old))


def test_settings_that_are_attached_count_where_none_are_given(old: nn.Module) -> None:
    model = model_of(NEW, SOURCE_CLASSES=OLD)
    _, plan = adapt_state_dict(old.state_dict(), model)
    assert plan.new_classes() == {"thing": ("gnu",)}
    _, plan = adapt_state_dict(old.state_dict(), model, ["ant", "bee"], source=OLD)
    assert plan.new_classes() == {}


def test_a_wrapped_model_gets_the_names_of_the_model_inside(old: nn.Module, model: nn.Module) -> None:
    state, _ = adapt_state_dict(old.state_dict(), nn.DataParallel(model), NEW, source=OLD)
    assert list(state) == list(model.state_dict())


@pytest.mark.parametrize(
    ("weights", "error", "words"),
    [
        (3, CheckpointFileError, "a value of type int"),
        ({}, CheckpointFileError, "an empty dict"),
        ({"model": 3}, CheckpointFileError, "a value of type int"),
        ({"fc.weight": [1.0]}, CheckpointFileError, "list under 'fc.weight'"),
        ({1: torch.zeros(2)}, CheckpointFileError, "a value of type dict"),
        ({"other.weight": torch.zeros(2)}, PlanRefused, "none that fits"),
        ("nowhere.pth", CheckpointFileError, "no such file"),
    ],
)
def test_weights_of_another_kind_are_refused(weights: Any, error: type[Exception], words: str) -> None:
    model = stock_model(2)
    before = state_of(model)
    with pytest.raises(error, match=words):
        adapt_state_dict(weights, model, NEW, source=OLD)
    assert same_bits(before, state_of(model))


def test_a_broken_value_is_refused_with_its_class(old: nn.Module, model: nn.Module) -> None:
    weights = state_of(old)
    weights[SCORES][2] = torch.nan
    with pytest.raises(HeadAdaptError, match="cat"):
        adapt_state_dict(weights, model, NEW, source=OLD)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"target": 5}, ClassTableError, "target"),
        ({"target": ["a"], "source": "cocoo"}, ClassTableError, "coco"),
        ({"target": ["a"], "alias": ["a=b"]}, ConfigError, "Nearest: 'aliases'"),
        ({"target": ["a"], "match": "names"}, ConfigError, "'name' or 'position'"),
        ({"target": {"thing": None}}, ConfigError, "Leave the label space out"),
    ],
)
def test_settings_from_plain_names_say_what_is_wrong(arguments: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        AdaptSettings.of(**arguments)


def test_settings_from_plain_names() -> None:
    settings = AdaptSettings.of({"thing": "voc", "colour": ["red", "blue"]}, source="none", aliases=["a=b"])
    assert len(settings.target["thing"]) == 20 and settings.target["colour"].names == ("red", "blue")
    assert settings.initialise == {"thing"} and not settings.source
    assert settings.aliases == ("a=b",)
    table = ClassTable(["x"])
    assert AdaptSettings.of(table, table).source == {"thing": table}
    assert AdaptSettings.of() == AdaptSettings()


@pytest.mark.parametrize("value", [["cat"], {"thing": ["cat"]}, None])
def test_names_in_place_of_tables_say_what_to_type(value: Any) -> None:
    with pytest.raises(ConfigError, match=r"AdaptSettings\.of"):
        AdaptSettings(target=value)


def test_a_loaders_images_fit_as_a_dataset_does() -> None:
    """The same rows, bit for bit, whether the images come mapped or from a dataset and its mapper."""
    dataset = scenes(12)
    expected, model = tiny_model("standard"), tiny_model("standard")
    fit_new_rows(expected, dataset, scene, new={"thing": (1,)}, settings=QUICK)
    mapped = [{**scene(entry), "image_id": entry["image_id"]} for entry in dataset]
    batches = [mapped[i : i + 4] for i in range(0, len(mapped), 4)]
    report = fit_rows(model, batches, {"thing": [1]}, settings=QUICK)
    assert report.images == 12 and "roi_heads.box_predictor" in report.solved
    assert same_bits(state_of(expected), state_of(model))
    other = tiny_model("standard")
    fit_rows(other, dataset, {"thing": [1]}, mapper=scene, settings=QUICK)
    assert same_bits(state_of(expected), state_of(other))


def test_labels_of_whole_images_fit_as_from_a_dataset() -> None:
    expected, model = classifier(), classifier()
    new, how = {"colour": [0, 1, 2], "light": [0, 1], "tags": [0, 1, 2, 3]}, replace(SETTINGS, images=24)
    fit_new_rows(expected, pictures(24), picture, new=new, settings=how)
    mapped = [{**picture(entry), "image_id": entry["image_id"]} for entry in pictures(24)]
    report = fit_rows(model, mapped, new, settings=how)
    assert report.solved == ("heads.colour", "heads.light", "heads.tags")
    assert same_bits(state_of(expected), state_of(model))


def test_an_endless_loader_ends_and_an_image_counts_once() -> None:
    mapped = [{**scene(entry), "file_name": f"{entry['image_id']}.png"} for entry in scenes(5)]
    assert len(entries_of(itertools.cycle([mapped]), 12, ANY)) == 5
    assert len(entries_of(itertools.cycle([mapped]), 3, ANY)) == 3
    assert len(entries_of([scene(entry) for entry in scenes(4)], 300, ANY)) == 4  # without names each is another


def test_labels_are_read_from_instances_and_tasks() -> None:
    mapped = scene(scenes(1)[0])
    mapped["instances"].gt_colour = torch.tensor([2, -1])
    mapped["instances"].gt_tags = torch.tensor([[1.0, 0, 1], [0, 0, 0]])
    mapped["tasks"] = {"light": torch.tensor(1), "mood": torch.tensor([0.0, 1.0])}
    [entry] = entries_of([mapped], 9, ANY)
    assert [box["category_id"] for box in entry["annotations"]] == mapped["instances"].gt_classes.tolist()
    assert [box["tasks"] for box in entry["annotations"]] == [
        {"colour": 2, "tags": [0, 2]},
        {"colour": None, "tags": []},
    ]
    assert entry["tasks"] == {"light": 1, "mood": [1]}


def test_a_checkpointer_and_a_plan_say_what_is_new(old: nn.Module, tmp_path: Path) -> None:
    path = saved(old, tmp_path)
    images = [scene(entry) for entry in scenes(10, classes=(0, 1))]
    fitted = []
    for kind in ("checkpointer", "plan"):
        model = stock_model(2, seed=2)
        checkpointer = HeadAdaptCheckpointer(model, settings=AdaptSettings.of(NEW))
        checkpointer.load(str(path), checkpointables=[])
        before = state_of(model)
        new: Any = checkpointer if kind == "checkpointer" else checkpointer.plan
        report = fit_rows(model, images, new, settings=QUICK)
        assert report.new == {"thing": (0,)}
        after = state_of(model)
        assert torch.equal(before[SCORES][1:], after[SCORES][1:])
        assert not torch.equal(before[SCORES][0], after[SCORES][0])
        assert checkpointer.untrained == ({} if kind == "checkpointer" else {"thing": ("gnu",)})
        fitted.append(after)
    assert same_bits(*fitted)


@pytest.mark.parametrize(
    ("images", "words"),
    [
        ([3], "a value of type int"),
        ([{"file_name": "a.png", "annotations": []}], "a dict with file_name, annotations"),
        ([[{"image": "a.png"}]], "a dict with image"),
    ],
)
def test_images_of_another_form_are_refused(images: Any, words: str) -> None:
    model = tiny_model("standard")
    before = state_of(model)
    with pytest.raises(DatasetError, match=words):
        fit_rows(model, images, {"thing": [1]}, settings=QUICK)
    assert same_bits(before, state_of(model))


BAD: dict[str, tuple[Any, str]] = {
    "rows first": (lambda d, t: {"image": d["image"].permute(1, 2, 0)}, r"3 channels.*permute\(2, 0, 1\)"),
    "flat": (lambda d, t: {"image": d["image"][0]}, r"pixels \(C, H, W\)"),
    "double": (lambda d, t: {"image": d["image"].double()}, "float64"),
    "no height": (lambda d, t: {"image": d["image"][:, :0]}, r"\(3, 0, 64\)"),
    "annotations": (lambda d, t: {"instances": []}, "a value of type list"),
    "tasks": (lambda d, t: {"tasks": None}, "under 'tasks', found None"),
    "no boxes": (lambda d, t: t.remove("gt_boxes"), "in gt_boxes, found NoneType"),
    "bare boxes": (lambda d, t: t.set("gt_boxes", t.gt_boxes.tensor), "in gt_boxes, found Tensor"),
    "broken boxes": (lambda d, t: t.set("gt_boxes", Boxes(t.gt_boxes.tensor * torch.nan)), "not finite"),
    "no classes": (lambda d, t: t.remove("gt_classes"), "in gt_classes, found NoneType"),
    "float classes": (lambda d, t: t.set("gt_classes", t.gt_classes.float()), "found torch.float32"),
    "class too high": (lambda d, t: t.set("gt_classes", t.gt_classes * 0 + 3), "a class of the model's 3, found 3"),
    "another size": (lambda d, t: t.__setattr__("_image_size", (128, 128)), r"\(128, 128\) of an image of \(64, 64\)"),
}


@pytest.mark.parametrize("mapper", [False, True])
@pytest.mark.parametrize("case", BAD)
def test_an_image_that_no_mapper_would_give_is_refused(case: str, mapper: bool) -> None:
    change, words = BAD[case]

    def spoilt(entry: dict[str, Any]) -> dict[str, Any]:
        mapped = scene(entry)
        return {**mapped, **(change(mapped, mapped["instances"]) or {})}

    model, dataset = tiny_model("standard"), scenes(3)
    before = state_of(model)
    images, how = (dataset, spoilt) if mapper else ([spoilt(entry) for entry in dataset], None)
    with pytest.raises(DatasetError, match=words):
        fit_rows(model, images, {"thing": [1]}, mapper=how, settings=QUICK)
    assert same_bits(before, state_of(model))


@pytest.mark.parametrize(
    ("images", "words"),
    [(None, "type NoneType"), (3, "type int"), ({"image": 3}, "type dict"), ([], "read only once"), (iter(()), "once")],
)
def test_images_that_are_none_are_refused(images: Any, words: str) -> None:
    with pytest.raises(DatasetError, match=words):
        fit_rows(tiny_model("standard"), images, {"thing": [1]})


@pytest.mark.parametrize(
    ("images", "mapper", "words"),
    [(scenes(2), "x", "a function"), (scenes(2), lambda entry: None, "type NoneType"), ([3], scene, "dicts of a dat")],
)
def test_a_mapper_that_is_none_is_refused(images: Any, mapper: Any, words: str) -> None:
    with pytest.raises(HeadAdaptError, match=words):
        fit_rows(tiny_model("standard"), images, {"thing": [1]}, mapper=mapper)


def test_a_first_image_that_cannot_be_read_is_passed_over() -> None:
    def broken(entry: dict[str, Any]) -> dict[str, Any]:
        if entry["image_id"] == 0:
            raise OSError("truncated")
        return scene(entry)

    report = fit_rows(tiny_model("standard"), scenes(10), {"thing": [1]}, mapper=broken, settings=QUICK)
    assert report.images == 9 and report.skipped == (("0", "truncated"),)


@pytest.mark.parametrize(
    ("new", "words"),
    [
        ({"thing": [3]}, "thing classes from 0 to 2, found 3"),
        ({"thing": [-1]}, "from 0 to 2, found -1"),
        ({"things": [1]}, r"\(thing\), found 'things'.*Nearest: 'thing'"),
        ({SCORES: [1]}, r"label spaces of the model \(thing\)"),
        ({3: [1]}, "found 3"),
    ],
)
def test_rows_that_no_head_has_are_refused(new: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        fit_rows(tiny_model("standard"), [scene(entry) for entry in scenes(3)], new)


def test_what_is_no_model_and_no_settings_is_refused(model: nn.Module) -> None:
    with pytest.raises(ConfigError, match="model: expected a model, found a value of type NoneType"):
        adapt_state_dict(model.state_dict(), None, NEW)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="model: expected a model, found a value of type OrderedDict"):
        fit_rows(model.state_dict(), [], {"thing": [1]})  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="settings: expected FitSettings, found a value of type dict"):
        fit_rows(model, [], {"thing": [1]}, settings={"images": 3})  # type: ignore[arg-type]


def test_a_wrapped_model_is_fitted_as_the_model_inside() -> None:
    images = [scene(entry) for entry in scenes(10)]
    bare, wrapped = tiny_model("standard"), tiny_model("standard")
    fit_rows(bare, images, {"thing": [1]}, settings=QUICK)
    report = fit_rows(nn.DataParallel(wrapped), images, {"thing": [1]}, settings=QUICK)
    assert "roi_heads.box_predictor" in report.solved and same_bits(state_of(bare), state_of(wrapped))


def test_nothing_new_reads_no_image(model: nn.Module) -> None:
    def never() -> Any:
        raise AssertionError
        yield

    assert fit_rows(model, never(), {"thing": []}).images == 0


@pytest.mark.parametrize(
    "form",
    [
        lambda x: x.to_sparse(),
        lambda x: x.to("meta"),
        lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8),
    ],
)
@pytest.mark.filterwarnings("ignore:.*quantize")
def test_tensors_without_rows_of_numbers_are_refused(form: Any, old: nn.Module, model: nn.Module) -> None:
    weights = {**state_of(old), SCORES: form(state_of(old)[SCORES])}
    with pytest.raises(CheckpointFileError, match=rf"under '{SCORES}'"):
        adapt_state_dict(weights, model, NEW, source=OLD)


def test_a_target_for_a_head_that_is_not_there_is_refused(old: nn.Module, model: nn.Module) -> None:
    with pytest.raises(ConfigError, match=r"target: .*\(thing\), found 'things'.*Nearest: 'thing'"):
        adapt_state_dict(old.state_dict(), model, {"things": NEW}, source=OLD)


@pytest.mark.parametrize("new", [None, 3, ["gnu"], {"thing": ["gnu"]}, {"thing": 1}, {"thing": [True]}])
def test_new_rows_of_another_form_are_refused(new: Any) -> None:
    with pytest.raises(ConfigError, match=r"\{'thing': \[4, 5\]\}"):
        fit_rows(tiny_model("standard"), [], new)


def test_a_checkpointer_that_loaded_nothing_is_refused() -> None:
    model = model_of(names(2))
    with pytest.raises(ConfigError, match="has loaded nothing"):
        fit_rows(model, [], HeadAdaptCheckpointer(model))


def test_several_processes_need_the_dataset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("detectron2.utils.comm.get_world_size", lambda: 2)
    with pytest.raises(DatasetError, match="mapper_at_test_size"):
        fit_rows(tiny_model("standard"), [], {"thing": [1]})


def test_real_photographs_through_detectron2s_own_loader(real: Path) -> None:
    """A state dict of COCO's 80 classes, a list of five, one of them new, and batches of the stock training loader."""
    cfg = get_cfg()
    fbnet_c4(real).add_fbnet_c4_config(cfg)
    cfg.MODEL.DEVICE, cfg.MODEL.MASK_ON, cfg.MODEL.ROI_HEADS.NUM_CLASSES = "cpu", False, 3
    model = build_seeded(cfg)
    weights = torch.load(real / "models" / "fbnet_c4_coco.pth", weights_only=True)
    state, plan = adapt_state_dict(weights, model, ["Person", "platelet", "zebra"], source="coco")
    model.load_state_dict(state)
    coco = vocabulary("coco")
    mine = {name: state[SCORES][i] for i, name in ((0, "person"), (2, "zebra"))}
    theirs = weights.get("model", weights)[SCORES]
    assert all(torch.equal(row, theirs[coco.index[name]]) for name, row in mine.items())
    assert torch.equal(state[SCORES][3], theirs[80]) and plan.new_classes() == {"thing": ("platelet",)}

    register_coco_instances("own_loop_cells", {}, str(real / "bccd/train.json"), str(real / "bccd/train"))
    platelets = []
    for entry in get_detection_dataset_dicts("own_loop_cells"):
        entry["annotations"] = [{**a, "category_id": 1} for a in entry["annotations"] if a["category_id"] == 2]
        platelets += [entry] if entry["annotations"] else []
    mapper = DatasetMapper(True, augmentations=[T.ResizeShortestEdge(200)], image_format=cfg.INPUT.FORMAT)
    loader = build_detection_train_loader(platelets, mapper=mapper, total_batch_size=4, num_workers=0)
    report = fit_rows(model, loader, plan, settings=replace(QUICK, images=12))
    assert report.solved == ("roi_heads.box_predictor",) and report.images == 12
    after = model.state_dict()[SCORES]
    assert not torch.equal(after[1], state[SCORES][1])
    assert torch.equal(after[[0, 2, 3]], state[SCORES][[0, 2, 3]])
