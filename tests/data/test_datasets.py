from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.evaluation import COCOEvaluator

from d2_headadapt.adapt.classes import ClassTable
from d2_headadapt.adapt.vocabularies import vocabulary
from d2_headadapt.data.datasets import (
    SPACE_METADATA,
    absolute_entries,
    check_same_classes,
    dataset_table,
    register_datasets,
    resolve_table,
    training_table,
)
from d2_headadapt.errors import ClassTableError, ConfigError, DatasetError
from d2_headadapt.key import Key

KEY = "MODEL.HEAD_ADAPT.TARGET_CLASSES"
Make = Callable[..., dict[str, Any]]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Write a COCO json with one image and one box of the first class; return its entry."""

    def write(name: str = "my_train", classes: tuple[str, ...] = ("dog", "cat"), **more: Any) -> dict[str, Any]:
        images = tmp_path / "images"
        images.mkdir(exist_ok=True)
        keypoints = more.pop("keypoints", None)
        categories = [{"id": 10 * (i + 1), "name": c} for i, c in enumerate(classes)]
        if keypoints:
            categories[0]["keypoints"] = keypoints
        path = tmp_path / f"{name}.json"
        box = {
            "id": 1,
            "image_id": 1,
            "category_id": 10,
            "bbox": [1, 2, 3, 4],
            "area": 12,
            "iscrowd": 0,
            "colour": "red",
        }
        content = {
            "images": [{"id": 1, "file_name": "a.jpg", "width": 8, "height": 8}],
            "annotations": [box],
            "categories": categories[::-1],
        }
        path.write_text(json.dumps(content))
        return {"name": name, "json": str(path), "images": str(images), **more}

    return write


def put(name: str, **metadata: Any) -> None:
    """Register an empty dataset with some metadata, as a user's own code would."""
    DatasetCatalog.register(name, list)
    MetadataCatalog.get(name).set(**metadata)


# --- registering


def test_entry_registers_what_register_coco_instances_would(make: Make) -> None:
    entry = make()
    register_datasets([entry])
    register_coco_instances("stock", {}, entry["json"], entry["images"])
    ours, stock = MetadataCatalog.get("my_train").as_dict(), MetadataCatalog.get("stock").as_dict()
    assert {**ours, "name": ""} == {**stock, "name": ""}
    assert DatasetCatalog.get("my_train") == DatasetCatalog.get("stock")
    assert MetadataCatalog.get("my_train").thing_classes == ["dog", "cat"]


def test_coco_evaluator_takes_the_dataset(make: Make, tmp_path: Path) -> None:
    register_datasets([make()])
    evaluator = COCOEvaluator("my_train", tasks=("bbox",), output_dir=str(tmp_path), distributed=False)
    evaluator.reset()
    assert evaluator.evaluate([]) == {}


def test_extra_keys_reach_the_dataset_dicts(make: Make) -> None:
    register_datasets([make("without"), make("with", extra_keys=["colour"])])
    assert "colour" not in DatasetCatalog.get("without")[0]["annotations"][0]
    assert DatasetCatalog.get("with")[0]["annotations"][0]["colour"] == "red"


def test_keypoints_reach_the_metadata(make: Make) -> None:
    pairs = [["left", "right"]]
    register_datasets([make(keypoint_names=["left", "right"], keypoint_flip_map=pairs)])
    metadata = MetadataCatalog.get("my_train")
    assert (metadata.keypoint_names, metadata.keypoint_flip_map) == (["left", "right"], [("left", "right")])


def test_same_entry_again_is_no_error_also_after_loading(make: Make) -> None:
    entry = make(thing_classes=["dog", "cat"])
    register_datasets([entry, dict(entry)])
    load = DatasetCatalog["my_train"]
    DatasetCatalog.get("my_train")
    register_datasets([entry])
    assert DatasetCatalog["my_train"] is load


@pytest.mark.parametrize("change", [{"extra_keys": ["colour"]}, {"images": "/"}, {"thing_classes": ["dog", "cat"]}])
def test_other_entry_under_a_used_name_is_refused(make: Make, change: dict[str, Any]) -> None:
    entry = make()
    register_datasets([entry])
    with pytest.raises(
        DatasetError, match=r"REGISTER\[0\] \('my_train'\): expected a name that no other.*my_train\.json"
    ) as e:
        register_datasets([{**entry, **change}])
    assert e.value.exit_code == 1


def test_two_entries_of_one_name_are_refused(make: Make) -> None:
    first, second = make("a"), make("b")
    with pytest.raises(DatasetError, match=r"REGISTER\[1\] \('a'\).*another entry of that name, with .*a\.json"):
        register_datasets([first, {**second, "name": "a"}])
    assert "a" not in DatasetCatalog


def test_builtin_name_is_refused_saying_so(make: Make) -> None:
    with pytest.raises(
        DatasetError, match=r"'coco_2017_train'.*registered under it already, with .*instances_train2017\.json"
    ) as e:
        register_datasets([make("coco_2017_train")])
    assert "DATASETS.TRAIN" in e.value.fix


def test_name_that_others_took_after_us_is_not_taken_for_ours(make: Make) -> None:
    entry = make()
    register_datasets([entry])
    DatasetCatalog.remove("my_train")
    DatasetCatalog.register("my_train", list)
    with pytest.raises(DatasetError, match="registered under it already"):
        register_datasets([entry])


def test_removed_dataset_can_be_registered_again(make: Make) -> None:
    entry = make()
    register_datasets([entry])
    DatasetCatalog.remove("my_train")
    register_datasets([entry])
    assert len(DatasetCatalog.get("my_train")) == 1


def test_metadata_of_another_dataset_under_the_name_is_refused(make: Make) -> None:
    MetadataCatalog.get("my_train").json_file = "other.json"
    with pytest.raises(DatasetError, match=r"metadata of another dataset under it: json_file is 'other\.json'"):
        register_datasets([make()])


def test_names_set_by_hand_that_differ_from_the_json_are_refused(make: Make) -> None:
    MetadataCatalog.get("my_train").thing_classes = ["cat", "dog"]
    with pytest.raises(DatasetError, match=r"MetadataCatalog, 'my_train'.*the same names in another order"):
        register_datasets([make()])


def test_thing_classes_that_differ_from_the_json_are_refused(make: Make) -> None:
    with pytest.raises(
        DatasetError, match=r"another list in .*my_train\.json \(2 classes\).*class 1: 'cow' in .*, 'cat' in"
    ):
        register_datasets([make(thing_classes=["dog", "cow"])])


@pytest.mark.parametrize(("key", "kind"), [("json", "a file"), ("images", "a folder")])
def test_missing_path_is_refused_naming_entry_and_path(make: Make, tmp_path: Path, key: str, kind: str) -> None:
    missing = str(tmp_path / "none")
    with pytest.raises(
        DatasetError, match=rf"REGISTER\[1\] \('b'\)\.{key}: expected {kind}, found .*none, which is not there"
    ):
        register_datasets([make("a"), {**make("b"), key: missing}])
    assert "a" not in DatasetCatalog  # all are checked before the first is registered


def test_folder_for_a_file_and_file_for_a_folder_are_refused(make: Make) -> None:
    entry = make()
    with pytest.raises(DatasetError, match=r"json: expected a file, found .*images, which is none"):
        register_datasets([{**entry, "json": entry["images"]}])
    with pytest.raises(DatasetError, match=r"images: expected a folder, found .*json, which is none"):
        register_datasets([{**entry, "images": entry["json"]}])


def test_wrong_entry_is_refused_with_its_number(make: Make) -> None:
    with pytest.raises(ConfigError, match=r"MY\.KEY\[1\]: expected the keys .*found 'jsn'.*Nearest: 'json'"):
        register_datasets([make(), {**make("b"), "jsn": "x"}], where=Key("MY.KEY"))


def test_relative_entries_after_resolving(make: Make, tmp_path: Path) -> None:
    make()
    entries = absolute_entries([{"name": "my_train", "json": "my_train.json", "images": "images"}], str(tmp_path))
    register_datasets(entries)
    assert dataset_table("my_train") == ClassTable(["dog", "cat"])


def test_entries_are_replayed_in_a_fresh_process(make: Make) -> None:
    code = (
        "import json, sys; from d2_headadapt.data.datasets import *; entries = json.loads(sys.argv[1]);"
        "register_datasets(entries); register_datasets(entries); print(*dataset_table('my_train').names)"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, json.dumps([make()])], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["dog", "cat"]


# --- the table of a dataset


def test_spaces_are_the_keys_of_detectron2(make: Make) -> None:
    assert SPACE_METADATA == {"thing": "thing_classes", "stuff": "stuff_classes", "keypoint": "keypoint_names"}


def test_metadata_comes_first(make: Make) -> None:
    put("my_train", thing_classes=["a", "b"], stuff_classes=["c"], json_file="missing.json", evaluator_type="coco")
    assert dataset_table("my_train") == ClassTable(["a", "b"])
    assert dataset_table("my_train", "stuff") == ClassTable(["c"])
    table = dataset_table("my_train")
    assert table is not None
    assert table.origin == "my_train"


def test_json_answers_by_category_id_before_the_dataset_is_loaded(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    register_datasets([make()])
    with caplog.at_level(logging.INFO):
        assert dataset_table("my_train") == ClassTable(["dog", "cat"])
    assert MetadataCatalog.get("my_train").get("thing_classes") is None
    assert caplog.records == []
    DatasetCatalog.get("my_train")
    assert MetadataCatalog.get("my_train").thing_classes == ["dog", "cat"]


def test_json_answers_for_keypoints_and_has_no_stuff(make: Make) -> None:
    register_datasets([make("with", keypoints=["nose", "tail"]), make("without")])
    assert dataset_table("with", "keypoint") == ClassTable(["nose", "tail"])
    assert dataset_table("without", "keypoint") is None
    assert dataset_table("with", "stuff") is None


def test_dataset_that_sets_its_names_when_loaded_is_loaded_once_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    calls = []

    def load() -> list[dict[str, Any]]:
        calls.append(1)
        MetadataCatalog.get("lazy").thing_classes = ["x", "y"]
        return []

    DatasetCatalog.register("lazy", load)
    with caplog.at_level(logging.INFO):
        assert dataset_table("lazy", "stuff") is None
        assert dataset_table("lazy", "thing") == ClassTable(["x", "y"])
        assert dataset_table("lazy", "keypoint") is None
    assert calls == [1]
    assert [record.getMessage() for record in caplog.records] == [
        "Loading dataset 'lazy' to learn its classes: its metadata has no stuff_classes."
    ]


def test_other_dataset_under_the_same_name_is_loaded_anew() -> None:
    for names in (["x"], ["y"]):
        DatasetCatalog.register("lazy", lambda names=names: MetadataCatalog.get("lazy").set(thing_classes=names))
        assert dataset_table("lazy") == ClassTable(names)
        DatasetCatalog.remove("lazy")
        MetadataCatalog.remove("lazy")


def test_json_file_of_another_loader_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "own.json"
    path.write_text(json.dumps({"categories": [{"id": 1, "name": "wrong"}]}))
    DatasetCatalog.register("own", lambda: MetadataCatalog.get("own").set(thing_classes=["right"]))
    MetadataCatalog.get("own").set(json_file=str(path), evaluator_type="lvis")
    assert dataset_table("own") == ClassTable(["right"])


@pytest.mark.parametrize("name", ["coco_2017_train", "voc_2007_train", "lvis_v1_train", "ade20k_sem_seg_train"])
def test_builtin_dataset_without_its_files_has_what_its_metadata_says_and_nothing_else(name: str) -> None:
    for space, key in SPACE_METADATA.items():
        assert (dataset_table(name, space) is None) == (MetadataCatalog.get(name).get(key) is None)


def test_keypoints_are_read_from_the_json_also_when_things_are_known(make: Make) -> None:
    register_datasets([make(keypoints=["nose"], thing_classes=["dog", "cat"])])
    assert dataset_table("my_train", "keypoint") == ClassTable(["nose"])


def test_dataset_without_classes_has_no_table() -> None:
    put("bare", evaluator_type="other")
    assert dataset_table("bare") is None
    assert dataset_table("bare", "colour") is None


def test_dataset_whose_files_are_missing_is_refused() -> None:
    DatasetCatalog.register("gone", lambda: Path("/no/such/file").read_text())
    with pytest.raises(DatasetError, match=r"dataset 'gone': expected files that can be read, found .*No such file"):
        dataset_table("gone")


def test_coco_json_that_is_missing_or_damaged_is_refused(tmp_path: Path) -> None:
    register_coco_instances("gone", {}, str(tmp_path / "gone.json"), str(tmp_path))
    with pytest.raises(DatasetError, match=r"gone\.json: expected a COCO json.*FileNotFoundError"):
        dataset_table("gone")
    (tmp_path / "bad.json").write_text('{"images": [')
    register_coco_instances("bad", {}, str(tmp_path / "bad.json"), str(tmp_path))
    with pytest.raises(DatasetError, match=r"bad\.json: .*damaged JSON"):
        dataset_table("bad")


def test_unregistered_dataset_names_the_nearest() -> None:
    with pytest.raises(
        DatasetError, match=r"dataset 'coco_2017_trian': expected a registered.*'coco_2017_train'"
    ) as error:
        dataset_table("coco_2017_trian")
    assert error.value.exit_code == 1
    assert "coco_2017_trian" not in MetadataCatalog.list()


def test_a_name_that_is_there_twice_is_refused_naming_the_dataset(make: Make) -> None:
    register_datasets([make(classes=("cat", "cat"))])
    with pytest.raises(ClassTableError, match=r"^my_train: expected different names, found 'cat' twice"):
        dataset_table("my_train")


def test_names_that_differ_by_spelling_or_are_numbers_are_a_table(make: Make) -> None:
    register_datasets([make(classes=("Traffic-Light", "traffic light", "-", "--", 7))])
    assert dataset_table("my_train") == ClassTable(["Traffic-Light", "traffic light", "-", "--", "7"])


def test_every_builtin_dataset_with_metadata_has_a_table() -> None:
    for name in DatasetCatalog.list():
        for space, key in SPACE_METADATA.items():
            if MetadataCatalog.get(name).get(key):
                table = dataset_table(name, space)
                assert table is not None
                assert list(table.names) == list(MetadataCatalog.get(name).get(key))


@pytest.mark.real
def test_coco128_has_the_names_of_coco(real: Path) -> None:
    for split in ("train", "val"):
        register_coco_instances(
            f"coco128_{split}", {}, str(real / f"coco128/{split}.json"), str(real / f"coco128/{split}")
        )
    assert training_table(["coco128_train", "coco128_val"]) == vocabulary("coco")


# --- several datasets


def test_training_table_is_the_one_table(make: Make) -> None:
    register_datasets([make("a"), make("b")])
    put("bare", evaluator_type="other")
    assert training_table(["a", "bare", "b"]) == ClassTable(["dog", "cat"])
    assert training_table(["bare"]) is None
    assert training_table([]) is None
    assert training_table(["a"], "keypoint") is None


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (["a", "c", "b"], r"the same names in another order in two \(3 classes\).*class 1: 'b' in one, 'c' in two"),
        (["a", "b", "d"], r"another list in two \(3 classes\).*class 2: 'c' in one, 'd' in two"),
        (["a", "b"], r"another list in two \(2 classes\).*class 2: 'c' in one, missing in two"),
        (["a", "b", "c", "d"], r"another list in two \(4 classes\).*class 3: missing in one, 'd' in two"),
        (["A", "b", "c"], r"another list in two \(3 classes\).*class 0: 'a' in one, 'A' in two"),
    ],
)
def test_lists_that_differ_are_refused_with_the_first_difference(second: list[str], message: str) -> None:
    put("one", thing_classes=["a", "b", "c"])
    put("two", thing_classes=second)
    with pytest.raises(
        DatasetError, match=rf"DATASETS\.TRAIN: expected the 3 classes of one, found {message}"
    ) as error:
        training_table(["one", "two"])
    assert error.value.exit_code == 1
    with pytest.raises(DatasetError, match=rf"DATASETS\.TEST: expected the 3 classes of one, found {message}"):
        check_same_classes(ClassTable(["a", "b", "c"], origin="one"), "two")


def test_third_dataset_is_compared_too() -> None:
    for name, names in (("one", ["a"]), ("two", ["a"]), ("three", ["b"])):
        put(name, thing_classes=names)
    with pytest.raises(DatasetError, match=r"'a' in one, 'b' in three"):
        training_table(["one", "two", "three"])


def test_train_without_its_comma_is_one_dataset() -> None:
    """As for detectron2's loaders."""
    put("my_train", thing_classes=["a", "b"])
    assert training_table("my_train") == training_table(["my_train"]) == ClassTable(["a", "b"])


def test_same_classes_pass_and_a_dataset_without_any_too() -> None:
    put("same", thing_classes=["a", "b"])
    check_same_classes(ClassTable(["a", "b"]), "same")
    check_same_classes(ClassTable(["a", "b"]), "same", "keypoint")


def test_where_is_the_callers() -> None:
    put("other", stuff_classes=["b"])
    with pytest.raises(DatasetError, match=rf"^{KEY}_STUFF: "):
        check_same_classes(ClassTable(["a"]), "other", "stuff", f"{KEY}_STUFF")


# --- what a user writes


def test_nothing_is_no_table() -> None:
    assert resolve_table(None, key=Key(KEY)) is None


@pytest.mark.parametrize("value", [["b", "a"], ("b", "a")])
def test_list_is_itself(value: Any) -> None:
    table = resolve_table(value, key=Key(KEY))
    assert table == ClassTable(["b", "a"])
    assert table is not None
    assert table.origin == KEY


def test_string_is_a_dataset_then_a_vocabulary_then_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("voc", "classes.txt"):
        (tmp_path / name).write_text("from file\n")
    assert resolve_table("classes.txt", key=Key(KEY)) == ClassTable(["from file"])
    assert resolve_table("voc", key=Key(KEY)) == vocabulary("voc")
    put("voc", thing_classes=["from dataset"])
    put("classes.txt", thing_classes=["from dataset"])
    assert resolve_table("voc", key=Key(KEY)) == ClassTable(["from dataset"])
    assert resolve_table("classes.txt", key=Key(KEY)) == ClassTable(["from dataset"])


def test_space_is_heeded(make: Make, tmp_path: Path) -> None:
    entry = make(keypoints=["nose"])
    assert resolve_table("coco", key=Key(KEY), space="stuff") == vocabulary("coco", "stuff")
    assert resolve_table(entry["json"], key=Key(KEY), space="keypoint") == ClassTable(["nose"])
    assert resolve_table(entry["json"], key=Key(KEY)) == ClassTable(["dog", "cat"])
    put("both", thing_classes=["t"], stuff_classes=["s"])
    assert resolve_table("both", key=Key(KEY), space="stuff") == ClassTable(["s"])


def test_file_names_itself_in_errors(tmp_path: Path) -> None:
    path = tmp_path / "classes.txt"
    path.write_text("dog\ndog\n")
    with pytest.raises(ClassTableError, match=r"^.*classes\.txt: .*'dog' twice"):
        resolve_table(str(path), key=Key(KEY))
    path.write_text("# nothing\n")
    with pytest.raises(ClassTableError, match=r"classes\.txt: expected at least one class name"):
        resolve_table(str(path), key=Key(KEY))


def test_dataset_without_that_space_is_refused() -> None:
    put("things_only", thing_classes=["a"])
    with pytest.raises(
        DatasetError, match=r"expected a dataset with keypoint_names, found 'things_only', which has none"
    ):
        resolve_table("things_only", key=Key(KEY), space="keypoint")


def test_unknown_string_names_near_datasets_and_vocabularies() -> None:
    with pytest.raises(
        ClassTableError, match=rf"^{KEY}: .*'coco_2017_trian', which is none of these.*coco_2017_train"
    ) as error:
        resolve_table("coco_2017_trian", key=Key(KEY))
    assert error.value.exit_code == 1
    with pytest.raises(ClassTableError, match=r"Vocabularies: lvis_v1, lvis_v0\.5\."):
        resolve_table("lvis_v2", key=Key(KEY))
    with pytest.raises(ClassTableError, match=r"Nearest datasets: none\. Vocabularies: cityscapes, coco, .*voc"):
        resolve_table("qqqqq", key=Key(KEY))


def test_names_in_one_string_are_shown_as_the_list_to_type() -> None:
    with pytest.raises(ClassTableError) as error:
        resolve_table("left wing, right wing", key=Key(KEY))
    assert f"{KEY} \"['left wing', 'right wing']\"" in error.value.fix


def test_missing_file_is_said_to_be_one() -> None:
    with pytest.raises(ClassTableError, match=r"'classes\.json', which is a file that is not there"):
        resolve_table("classes.json", key=Key(KEY))


def test_number_is_refused_with_the_quotes_to_type() -> None:
    with pytest.raises(ClassTableError, match=r"found 365 \(int\)") as error:
        resolve_table(365, key=Key(KEY))
    assert f"{KEY} \"'365'\"" in error.value.fix
    assert f"{KEY} \"['365']\"" in error.value.fix


def test_number_in_a_list_is_refused_with_the_quotes_to_type() -> None:
    with pytest.raises(
        ClassTableError, match=rf"{KEY}, class 1: expected a string, found 7.5 \(float\)\. Put it in quotes: '7.5'"
    ):
        resolve_table(["six", 7.5], key=Key(KEY))


@pytest.mark.parametrize("value", ["", "  ", {"names": ["a"]}])
def test_empty_string_and_mapping_are_refused(value: Any) -> None:
    with pytest.raises(ClassTableError, match=r"expected a dataset, a vocabulary, a file or a list.*leave the key out"):
        resolve_table(value, key=Key(KEY))


def test_empty_list_is_refused() -> None:
    with pytest.raises(ClassTableError, match=rf"{KEY}: expected at least one class name"):
        resolve_table([], key=Key(KEY))
