"""Labels of tasks in csv files and COCO jsons, and where they meet the tasks of a config."""

from __future__ import annotations

import csv
import itertools
import json
import logging
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from helpers.datasets import write_coco
from helpers.files import logged, texts
from PIL import Image

from d2_headadapt.adapt.classes import ClassTable
from d2_headadapt.config.keys import add_headadapt_config
from d2_headadapt.data.datasets import dataset_table, register_datasets, task_facts
from d2_headadapt.data.entry import absolute_entries, checked_entry
from d2_headadapt.data.task_datasets import say_about_tasks, settle_tasks, tasks_of_one_class, training_dicts
from d2_headadapt.data.task_spec import task_specs
from d2_headadapt.errors import ConfigError, DatasetError
from d2_headadapt.key import Key
from d2_headadapt.setup.yaml import load_config, resolve_config

CSV = """id,colour,tags,gender
1,red,new|cheap,Men
2,blue,,NA
3,NA,old,Women
4,red,new,NA
"""
Entry = Callable[..., dict[str, Any]]


def write_csv(folder: Path, text: str, *, images: bool = True) -> str:
    (folder / "images").mkdir(exist_ok=True)
    for row in csv.DictReader(text.removeprefix("\ufeff").splitlines()) if images else ():
        Image.new("RGB", (8, 6)).save(folder / "images" / f"{row['id']}.png")
    path = folder / "labels.csv"
    path.write_text(text, encoding="utf-8")
    return str(path)


@pytest.fixture
def entry(tmp_path: Path) -> Entry:
    """Write a csv and its images; return its entry."""

    def write(text: str = CSV, name: str = "d2ha_csv", **more: Any) -> dict[str, Any]:
        path = write_csv(tmp_path, text)
        tasks = {"colour": "colour", "tags": "tags", "sex": "gender"}
        found = {"name": name, "csv": path, "images": str(tmp_path / "images"), "file": "{id}.png", "tasks": tasks}
        return {**found, **more}

    return write


def config(train: str, test: str = "", **tasks: dict[str, Any]) -> CfgNode:
    cfg = get_cfg()
    add_headadapt_config(cfg)
    cfg.DATASETS.TRAIN = (train,)
    cfg.DATASETS.TEST = (test,) if test else ()
    for name, node in tasks.items():
        cfg.MODEL.TASKS[name] = CfgNode({"on": "image", **node})
    return cfg


def labels(name: str, task: str) -> list[Any]:
    return [one["tasks"].get(task) for one in DatasetCatalog.get(name)]


# --- csv


def test_csv_gives_names_levels_kinds_and_indices(entry: Entry) -> None:
    register_datasets([entry()])
    metadata = MetadataCatalog.get("d2ha_csv")
    assert metadata.evaluator_type == "tasks"
    assert metadata.task_classes == {
        "colour": ["blue", "red"],
        "tags": ["cheap", "new", "old"],
        "sex": ["Men", "Women"],
    }
    assert metadata.task_levels == dict.fromkeys(("colour", "tags", "sex"), "image")
    assert metadata.task_kinds == {"colour": "single", "tags": "multi", "sex": "single"}
    assert labels("d2ha_csv", "colour") == [1, 0, None, 1]
    assert labels("d2ha_csv", "tags") == [[0, 1], None, [2], [1]]
    assert labels("d2ha_csv", "sex") == [0, None, 1, None]
    assert dataset_table("d2ha_csv", "colour") == ClassTable(["blue", "red"])
    assert dataset_table("d2ha_csv") is None


def test_file_names_come_from_the_columns(entry: Entry, tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "blue_7.png")
    register_datasets(
        [entry("id,colour\n 7 ,blue\n", images=str(tmp_path), file="{colour}_{id}.png", tasks=["colour"])]
    )
    (one,) = DatasetCatalog.get("d2ha_csv")
    assert (one["file_name"], one["image_id"]) == (str(tmp_path / "blue_7.png"), "blue_7.png")


def test_missing_and_separator_are_the_entries(entry: Entry) -> None:
    register_datasets(
        [entry("\ufeffid,colour\n1,red;blue;?\n2,?\n3,NA\n", tasks=["colour"], missing="?", separator=";")]
    )
    assert MetadataCatalog.get("d2ha_csv").task_classes == {"colour": ["NA", "blue", "red"]}
    assert labels("d2ha_csv", "colour") == [[1, 2], None, [0]]


def test_split_is_by_file_name_and_seed_alone(entry: Entry) -> None:
    rows = [f"{i},{'red' if i % 3 else 'blue'}" for i in range(400)]
    parts: dict[Any, set[str]] = {}
    for order, text in (("as it is", rows), ("backwards", rows[::-1])):
        for seed in (0, 1):
            for part in ("train", "test"):
                name = f"{order} {seed} {part}"
                split = {"part": part, "held_out": 0.25, "seed": seed}
                register_datasets([entry("\n".join(["id,colour", *text]) + "\n", name, tasks=["colour"], split=split)])
                parts[order, seed, part] = {one["image_id"] for one in DatasetCatalog.get(name)}
    every = {f"{i}.png" for i in range(400)}
    for seed in (0, 1):
        train, test = parts["as it is", seed, "train"], parts["as it is", seed, "test"]
        assert train | test == every
        assert not train & test
        # 100 is expected; five standard deviations are 43.
        assert 57 < len(test) < 143
        assert parts["backwards", seed, "test"] == test
    assert parts["as it is", 0, "test"] != parts["as it is", 1, "test"]


def test_classes_are_those_of_both_parts(entry: Entry) -> None:
    text = "id,colour\n" + "".join(f"{i},c{i:02}\n" for i in range(12))
    for part in ("train", "test"):
        register_datasets([entry(text, f"d2ha_{part}", tasks=["colour"], split={"part": part, "held_out": 0.5})])
        assert len(MetadataCatalog.get(f"d2ha_{part}").task_classes["colour"]) == 12
    both = [sorted(labels(f"d2ha_{part}", "colour")) for part in ("train", "test")]
    assert sorted(both[0] + both[1]) == list(range(12))
    assert all(both)


def test_missing_images_are_one_error_with_the_first_and_the_count(entry: Entry, tmp_path: Path) -> None:
    register_datasets([entry()])
    for i in (2, 4):
        (tmp_path / "images" / f"{i}.png").unlink()
    with pytest.raises(DatasetError, match=r"no file .*images/2\.png; 2 of 4 images are not there"):
        DatasetCatalog.get("d2ha_csv")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"tasks": {"colour": "color"}},
            r"one column 'color', which its tasks names.*none; there are id, colour.*'colour'",
        ),
        ({"file": "{ids}.png"}, r"one column 'ids', which its file names.*Nearest: 'id'"),
        ({"file": "{id.png"}, r"a pattern such as"),
    ],
)
def test_wrong_column_is_refused_with_the_nearest(entry: Entry, change: dict[str, Any], message: str) -> None:
    with pytest.raises(DatasetError, match=message):
        register_datasets([entry(**change)])
    assert "d2ha_csv" not in DatasetCatalog


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("id,colour,tags,gender\n1,red,a,b,c\n", r"labels\.csv, line 2: expected 4 cells as in the header, found 5"),
        ("id,colour,tags,gender\n1,red\n", r"line 2: expected 4 cells.*found 2"),
        ("id,colour,colour,tags,gender\n1,red,a,b,c\n", r"one column 'colour'.*found two of them"),
        ("id,colour,tags,gender\n", r"a csv with a header line and rows, found 1 lines"),
        ('id,colour,tags,gender\n1,"red,a,b\n', r"a csv in UTF-8.*Error: unexpected end of data"),
    ],
)
def test_damaged_csv_is_refused(entry: Entry, tmp_path: Path, text: str, message: str) -> None:
    made = entry()
    write_csv(tmp_path, text, images=False)
    with pytest.raises(DatasetError, match=message):
        register_datasets([made])


def test_two_rows_of_one_image_are_refused(entry: Entry) -> None:
    register_datasets([entry("id,colour\n1,red\n2,red\n 1,blue\n", tasks=["colour"])])
    with pytest.raises(DatasetError, match=r"labels\.csv, line 4: .*found 1\.png, which line 2 has too"):
        DatasetCatalog.get("d2ha_csv")


def test_a_part_without_rows_is_refused(entry: Entry) -> None:
    split = {"part": "test", "held_out": 0.0001}
    register_datasets([entry(split=split)])
    with pytest.raises(DatasetError, match="found no row in its test part"):
        DatasetCatalog.get("d2ha_csv")


# --- entries


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"json": "a.json"}, r"X\.json: expected no such key in an entry with csv"),
        ({"thing_classes": ["a"]}, r"X\.thing_classes: expected no such key in an entry with csv"),
        ({"file": None}, r"X\.file: expected a string, found nothing"),
        ({"tasks": None}, r"X\.tasks: expected a mapping from tasks to columns, found nothing"),
        ({"tasks": {"colour": 3}}, r"X\.tasks: expected a mapping from tasks to columns"),
        ({"missing": [False]}, r"X\.missing: expected a list of strings"),
        ({"separator": ""}, r"X\.separator: expected a string"),
        ({"split": {"part": "val"}}, r"X\.split: expected part \(train or test\)"),
        ({"split": {"part": "test", "held_out": 25}}, r"X\.split: .*a share between 0 and 1"),
        ({"split": {"part": "test", "share": 0.5}}, r"X\.split: "),
        ({"colum": "x"}, r"X: expected the keys name, json, images, csv, .*found 'colum'"),
    ],
)
def test_wrong_csv_entry_is_refused(change: dict[str, Any], message: str) -> None:
    good = {"name": "a", "csv": "/a.csv", "images": "/a", "file": "{id}.jpg", "tasks": {"colour": "colour"}}
    assert checked_entry(good, Key("X")).csv == "/a.csv"
    with pytest.raises(ConfigError, match=message):
        checked_entry({**good, **change}, Key("X"))


@pytest.mark.parametrize("tasks", [3, {"parity": {"on": "boxes"}}, {"parity": {}}, {"parity": None}])
def test_wrong_tasks_of_a_json_are_refused(tasks: Any) -> None:
    good = {"name": "a", "json": "/a.json", "images": "/a", "tasks": {"parity": {True: "box"}, "scene": "image"}}
    assert checked_entry(good, Key("X")).tasks == (("parity", "box"), ("scene", "image"))
    with pytest.raises(ConfigError, match=r"X\.tasks: expected a list of"):
        checked_entry({**good, "tasks": tasks}, Key("X"))


def test_csv_paths_are_relative_as_json_s_are() -> None:
    (found,) = absolute_entries([{"csv": "a.csv", "images": "b"}], "/base")
    assert found == {"csv": "/base/a.csv", "images": "/base/b"}


def test_another_csv_under_a_used_name_is_refused(entry: Entry) -> None:
    register_datasets([entry()])
    register_datasets([entry()])
    with pytest.raises(DatasetError, match=r"registered under it already, with .*labels\.csv"):
        register_datasets([entry(missing="?")])


# --- COCO json


def write_attributes(folder: Path, **changes: Any) -> dict[str, Any]:
    """A COCO json whose boxes say their parity by name, their weight by index, and whose images say their scene."""
    path = write_coco(folder, ["cat", "dog"])
    content = json.loads(path.read_text())
    for i, box in enumerate(content["annotations"]):
        box["attributes"] = {"parity": ["even", "odd"][i % 2], "weight": i % 3, "marks": ["a", "b"][: i % 3]}
    content["annotations"][0]["attributes"] = {"parity": None}
    for i, image in enumerate(content["images"]):
        image["attributes"] = {"scene": ["out", "in"][i % 2]}
    changes.pop("edit", lambda _: None)(content)
    path.write_text(json.dumps(content))
    return {"name": "d2ha_json", "json": str(path), "images": str(folder / "data"), **changes}


def box_labels(name: str, task: str) -> list[Any]:
    return [a["tasks"].get(task) for one in DatasetCatalog.get(name) for a in one["annotations"]]


def test_attributes_of_a_json_are_read_by_name_and_by_index(tmp_path: Path) -> None:
    register_datasets([write_attributes(tmp_path, tasks=["parity", "weight", "marks", "scene"])])
    metadata = MetadataCatalog.get("d2ha_json")
    assert metadata.evaluator_type == "coco"
    assert metadata.task_levels == {"parity": "box", "weight": "box", "marks": "box", "scene": "image"}
    cfg = config(
        "d2ha_json",
        parity={"on": "box"},
        weight={"on": "box", "classes": ["light", "middle", "heavy"]},
        marks={"on": "box", "kind": "multi"},
        scene={},
    )
    settle_tasks(cfg)
    assert box_labels("d2ha_json", "parity") == [None, 1, 0, 1, 0, 1, 0, 1]
    assert box_labels("d2ha_json", "weight") == [None, 1, 2, 0, 1, 2, 0, 1]
    # An empty list is a label: none of them. No list is none.
    assert box_labels("d2ha_json", "marks") == [None, [0], [0, 1], [], [0], [0, 1], [], [0]]
    assert labels("d2ha_json", "scene") == [1, 0, 1, 0]
    annotation = DatasetCatalog.get("d2ha_json")[0]["annotations"][0]
    assert not {"attributes", "id"} & set(annotation)


def test_extra_keys_stay_beside_tasks(tmp_path: Path) -> None:
    register_datasets([write_attributes(tmp_path, tasks={"parity": {"on": "box"}}, extra_keys=["attributes", "id"])])
    annotation = DatasetCatalog.get("d2ha_json")[0]["annotations"][1]
    assert annotation["attributes"]["weight"] == 1
    assert annotation["id"] == 2


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"a": 1}, r"box 3: .*found \{'a': 1\} \(dict\)"),
    ],
)
def test_attribute_of_another_type_is_refused(tmp_path: Path, value: Any, message: str) -> None:
    def edit(content: dict[str, Any]) -> None:
        content["annotations"][2]["attributes"]["parity"] = value

    with pytest.raises(DatasetError, match=message):
        register_datasets([write_attributes(tmp_path, tasks=["parity"], edit=edit)])


def test_true_and_false_are_two_classes_and_an_empty_string_is_no_label(tmp_path: Path) -> None:
    """CVAT writes checkboxes so, and an empty text where nobody typed anything."""

    def edit(content: dict[str, Any]) -> None:
        values = [True, False, "", "true", [""], " ", ["", False], True]
        for box, value in zip(content["annotations"], itertools.cycle(values), strict=False):
            box["attributes"] = {"parity": value}

    register_datasets([write_attributes(tmp_path, tasks=["parity"], missing=["?"], edit=edit)])
    facts = task_facts("d2ha_json")["parity"]
    assert facts.classes == ("false", "true") and not facts.multi
    seen = box_labels("d2ha_json", "parity")
    assert seen[:8] == [1, 0, None, 1, None, None, 0, 1][: len(seen)]


def test_a_task_that_is_left_with_one_class_is_said(tmp_path: Path) -> None:
    def edit(content: dict[str, Any]) -> None:
        for i, box in enumerate(content["annotations"]):
            box["attributes"] = {"parity": ["even", ""][i % 2]}

    register_datasets([write_attributes(tmp_path, tasks=["parity"], edit=edit)])
    name = "d2ha_json"
    cfg = config(name, parity={"on": "box"})
    assert tasks_of_one_class(cfg) == {"parity": "even"}
    with logged("d2_headadapt") as said:
        say_about_tasks(cfg)
    assert "Task 'parity' has one class, 'even', so there is nothing to learn" in texts(said)
    assert tasks_of_one_class(config(name, parity={"on": "box", "classes": ["even", "odd"]})) == {}
    assert tasks_of_one_class(config(name, parity={"on": "box", "kind": "multi"})) == {}


def test_a_task_of_both_levels_must_be_said(tmp_path: Path) -> None:
    def edit(content: dict[str, Any]) -> None:
        content["images"][0]["attributes"]["parity"] = "odd"

    with pytest.raises(DatasetError, match=r"task 'parity': expected attributes of either.*tasks: \{parity: \{on: box"):
        register_datasets([write_attributes(tmp_path, tasks=["parity"], edit=edit)])
    register_datasets([write_attributes(tmp_path, tasks={"parity": {"on": "box"}}, edit=edit)])


# --- datasets meet tasks


def test_labels_are_indices_of_the_model_s_classes(entry: Entry) -> None:
    """Also after another config of the same process, with another list."""
    register_datasets([entry()])
    cfg = config("d2ha_csv", colour={"classes": ["green", "Red", "blue"]})
    for _ in range(2):
        settle_tasks(cfg)
        assert labels("d2ha_csv", "colour") == [1, 2, None, 1]
        assert MetadataCatalog.get("d2ha_csv").task_classes["colour"] == ["green", "Red", "blue"]
        settle_tasks(config("d2ha_csv", colour={}))
        assert labels("d2ha_csv", "colour") == [1, 0, None, 1]


def test_label_outside_the_table_names_file_line_label_and_nearest(entry: Entry) -> None:
    register_datasets([entry()])
    settle_tasks(config("d2ha_csv", colour={"classes": ["reed", "blue"]}))
    with pytest.raises(
        DatasetError,
        match=r"labels\.csv, line 2: expected one of the 2 classes of task 'colour', or its index, found 'red'\..*"
        r"MODEL\.TASKS\.colour\.classes\. Nearest: 'reed'",
    ):
        DatasetCatalog.get("d2ha_csv")


def test_label_outside_the_table_names_the_annotation(tmp_path: Path) -> None:
    register_datasets([write_attributes(tmp_path, tasks=["weight"])])
    settle_tasks(config("d2ha_json", weight={"on": "box", "classes": ["light", "heavy"]}))
    with pytest.raises(DatasetError, match=r"data\.json, annotation 3: expected one of the 2 classes.*found 2\."):
        DatasetCatalog.get("d2ha_json")


def test_several_labels_for_a_single_task_are_refused(entry: Entry) -> None:
    register_datasets([entry()])
    settle_tasks(config("d2ha_csv", tags={"kind": "single"}))
    with pytest.raises(
        DatasetError, match=r"line 2: expected one label for task 'tags'.*MODEL\.TASKS\.tags\.kind multi"
    ):
        DatasetCatalog.get("d2ha_csv")


def test_spellings_that_differ_are_two_classes(entry: Entry) -> None:
    register_datasets([entry("id,colour\n1,Navy Blue\n2,navy_blue\n", tasks=["colour"])])
    cfg = config("d2ha_csv", colour={})
    settle_tasks(cfg)
    assert [spec.table.names for spec in task_specs(cfg)] == [("Navy Blue", "navy_blue")]


def test_task_on_the_other_level_is_refused(entry: Entry) -> None:
    register_datasets([entry()])
    with pytest.raises(
        ConfigError, match=r"MODEL\.TASKS\.colour\.on: expected image, because dataset 'd2ha_csv'.*column"
    ):
        settle_tasks(config("d2ha_csv", colour={"on": "box"}))


@pytest.mark.parametrize("classes", [None, ["red"]])
def test_task_without_any_label_is_refused_naming_dataset_and_column(entry: Entry, classes: Any) -> None:
    register_datasets([entry("id,colour,hue\n1,red,NA\n2,blue,\n", tasks={"colour": "colour", "tint": "hue"})])
    cfg = config("d2ha_csv", tint={"classes": classes}, colour={})
    with pytest.raises(
        DatasetError, match=r"MODEL\.TASKS\.tint: .*none in column 'hue' of .*labels\.csv in dataset 'd2ha_csv'"
    ):
        training_dicts(cfg)


def test_task_that_no_data_knows_is_refused_with_the_nearest(entry: Entry) -> None:
    register_datasets([entry()])
    with pytest.raises(DatasetError, match=r"MODEL\.TASKS\.color: .*no such task in 'd2ha_csv'.*Nearest: 'colour'"):
        training_dicts(config("d2ha_csv", color={"classes": ["red"]}))


def test_labels_of_the_held_out_part_do_not_count(entry: Entry) -> None:
    """The whole csv has a label, the training part none."""
    text = "id,colour,hue\n" + "".join(f"{i},red,NA\n" for i in range(40))
    split = {"part": "train", "held_out": 0.5}
    register_datasets([entry(text, "probe", tasks=["colour"], split={**split, "part": "test"})])
    held_out = DatasetCatalog.get("probe")[0]["image_id"].removesuffix(".png")
    text = text.replace(f"\n{held_out},red,NA", f"\n{held_out},red,dark")
    register_datasets([entry(text, tasks=["colour", "hue"], split=split)])
    with pytest.raises(DatasetError, match=r"MODEL\.TASKS\.hue: .*none in column 'hue'"):
        training_dicts(config("d2ha_csv", hue={}, colour={}))


def test_unused_task_of_the_data_is_one_line(entry: Entry, caplog: pytest.LogCaptureFixture) -> None:
    cfg = config("d2ha_csv", "d2ha_csv", colour={})
    cfg.MODEL.META_ARCHITECTURE = "MultiTaskClassifier"
    cfg.MODEL.DEVICE = "cpu"
    cfg.DATASETS.REGISTER = [entry()]
    with caplog.at_level(logging.INFO, "d2_headadapt"):
        settings = resolve_config(cfg)
    assert settings.target["colour"].names == ("blue", "red")
    assert [r.getMessage() for r in caplog.records] == [
        "Dataset 'd2ha_csv' has labels of tasks that MODEL.TASKS has not: tags, sex."
    ]


def test_weights_that_balance_are_counted_with_the_model_s_classes(entry: Entry) -> None:
    """Labels that still were the file's indices would be counted for other classes, or fall outside."""
    cfg = config("d2ha_csv", colour={"classes": ["green", "red", "blue"], "class_weights": "balanced"})
    cfg.MODEL.META_ARCHITECTURE = "MultiTaskClassifier"
    cfg.DATASETS.REGISTER = [entry()]
    resolve_config(cfg)
    (spec,) = task_specs(cfg)
    assert spec.class_weights == pytest.approx((1.0, 3 / (3 * 2), 3 / (3 * 1)))


def test_empty_images_stay_where_they_have_an_image_label(tmp_path: Path) -> None:
    def edit(content: dict[str, Any]) -> None:
        content["annotations"] = [a for a in content["annotations"] if a["image_id"] not in (1, 2)]
        content["images"][2]["attributes"] = {}

    register_datasets([write_attributes(tmp_path, tasks=["parity", "scene"], edit=edit)])
    kept = [one["image_id"] for one in training_dicts(config("d2ha_json", scene={}, parity={"on": "box"}))]
    assert kept == [0, 1, 3]
    # Without a task on images, as in stock.
    assert [one["image_id"] for one in training_dicts(config("d2ha_json", parity={"on": "box"}))] == [0, 3]
    cfg = config("d2ha_json", scene={})
    cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS = False
    assert [one["image_id"] for one in training_dicts(cfg)] == [0, 1, 2, 3]


def test_a_dataset_with_and_one_without_boxes_train_together(entry: Entry, tmp_path: Path) -> None:
    (tmp_path / "j").mkdir()
    register_datasets([write_attributes(tmp_path / "j", tasks=["scene"]), entry(tasks=["colour"])])
    cfg = config("d2ha_json", scene={}, colour={})
    cfg.DATASETS.TRAIN = ("d2ha_json", "d2ha_csv")
    # Row 3 of the csv has no colour.
    assert Counter("annotations" in one for one in training_dicts(cfg)) == {True: 4, False: 3}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "MODEL:\n  TASKS:\n    colour: {classes: [a]}\n    shape: {classes: [b]}\n    colour: {classes: [c]}\n",
            r"c\.yaml, MODEL\.TASKS: expected different names, found 'colour' in lines 3 and 5",
        ),
        (
            "MODEL:\n  TASKS:\n    colour:\n      hidden: 3\n      hidden: 4\n",
            r"MODEL\.TASKS\.colour: expected different names, found 'hidden' in lines 4 and 5",
        ),
    ],
)
def test_two_tasks_of_one_name_are_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "c.yaml").write_text(text)
    (tmp_path / "child.yaml").write_text("_BASE_: c.yaml\n")
    for name in ("c.yaml", "child.yaml"):
        with pytest.raises(ConfigError, match=message):
            load_config(str(tmp_path / name))


# --- real


def test_fashion_is_read_from_its_config_entry(real: Path) -> None:
    folder = real / "fashion"
    columns = ["master", "sub", "article", "colour", "usage", "gender"]
    shared = {"csv": str(folder / "labels.csv"), "images": str(folder / "images"), "file": "{id}.jpg", "tasks": columns}
    for part in ("train", "test"):
        register_datasets([{**shared, "name": f"fashion_{part}", "split": {"part": part, "held_out": 0.25, "seed": 0}}])
    metadata = MetadataCatalog.get("fashion_train")
    assert [len(metadata.task_classes[task]) for task in columns] == [4, 13, 20, 25, 6, 5]
    assert set(metadata.task_kinds.values()) == {"single"}
    parts = [DatasetCatalog.get(f"fashion_{part}") for part in ("train", "test")]
    assert sum(map(len, parts)) == 1200
    assert 240 < len(parts[1]) < 360
    assert sum("gender" not in one["tasks"] for part in parts for one in part) == 314
    first = next(one for part in parts for one in part if one["image_id"] == "1164.jpg")
    assert {t: metadata.task_classes[t][i] for t, i in first["tasks"].items()} == {
        **{"master": "Apparel", "sub": "Topwear", "article": "Tshirts"},
        **{"colour": "Blue", "usage": "Sports", "gender": "Men"},
    }
