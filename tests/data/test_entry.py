from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from d2_headadapt.data.entry import absolute_entries, checked_entry
from d2_headadapt.errors import ConfigError
from d2_headadapt.key import Key

GOOD = {"name": "my_train", "json": "/data/a.json", "images": "/data/images"}


def test_relative_paths_start_at_the_folder_given(tmp_path: Path) -> None:
    entry = {"name": "a", "json": "../a.json", "images": "images/"}
    (resolved,) = absolute_entries([entry], str(tmp_path / "configs"))
    assert resolved == {"name": "a", "json": str(tmp_path / "a.json"), "images": str(tmp_path / "configs" / "images")}
    assert entry["json"] == "../a.json"


def test_relative_folder_becomes_absolute_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert absolute_entries([{"json": "a.json"}], "configs")[0]["json"] == str(tmp_path / "configs" / "a.json")
    assert absolute_entries([{"json": "a.json"}], "")[0]["json"] == str(tmp_path / "a.json")


@pytest.mark.parametrize("path", ["/data/a.json", "s3://bucket/a.json", "https://example.org/a.json"])
def test_absolute_paths_and_uris_stay(path: str) -> None:
    for base in ("/base", "https://example.org/cfg"):
        assert absolute_entries([{"json": path, "images": path}], base) == [{"json": path, "images": path}]


def test_home_folder_is_expanded() -> None:
    assert absolute_entries([{"json": "~/a.json"}], "/base")[0]["json"] == os.path.expanduser("~/a.json")


def test_yaml_behind_a_uri_has_its_neighbours_behind_it() -> None:
    assert (
        absolute_entries([{"json": "a.json"}], "https://example.org/cfg/")[0]["json"]
        == "https://example.org/cfg/a.json"
    )


@pytest.mark.parametrize("entry", ["my_train", None, 3, {"json": 5}, {"json": ""}])
def test_what_cannot_be_resolved_is_left_to_the_check(entry: Any) -> None:
    assert absolute_entries([entry], "/base") == [entry]


def test_resolving_twice_is_resolving_once() -> None:
    once = absolute_entries([{"json": "a.json", "images": "b"}], "/base")
    assert absolute_entries(once, "/other") == once


def test_entry_is_read() -> None:
    raw = {
        **GOOD,
        "thing_classes": ["a"],
        "keypoint_names": ["left_eye", "right_eye"],
        "keypoint_flip_map": [["left_eye", "right_eye"]],
        "extra_keys": ["attributes"],
    }
    entry = checked_entry(raw, Key("DATASETS.REGISTER")[0])
    assert entry.metadata == {
        "json_file": "/data/a.json",
        "image_root": "/data/images",
        "evaluator_type": "coco",
        "thing_classes": ["a"],
        "keypoint_names": ["left_eye", "right_eye"],
        "keypoint_flip_map": [("left_eye", "right_eye")],
    }
    assert entry.extra_keys == ("attributes",)


def test_null_is_as_if_the_key_were_not_there() -> None:
    assert checked_entry({**GOOD, "thing_classes": None}, Key("X")) == checked_entry(GOOD, Key("X"))


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ("my_train", r"X\[0\]: expected a mapping with name, json and images, found 'my_train' \(str\)"),
        ({**GOOD, "image": "x"}, r"X\[0\]: expected the keys name, json, .*found 'image'.*Nearest: 'images'"),
        ({**GOOD, 3: "x"}, r"found 3\. "),
        ({"json": "a", "images": "b"}, r"X\[0\]\.name: expected a string, found nothing"),
        ({**GOOD, "json": None}, r"X\[0\]\.json: expected a string, found nothing"),
        ({**GOOD, "images": ""}, r"X\[0\]\.images: expected a string, found ''"),
        ({**GOOD, "name": 2024}, r"X\[0\]\.name: expected a string, found 2024 \(int\).*in quotes"),
        ({**GOOD, "thing_classes": "cat"}, r"X\[0\]\.thing_classes: expected a list of strings, found 'cat'"),
        ({**GOOD, "thing_classes": ["cat", 5]}, r"thing_classes: expected a list of strings.*quotes"),
        ({**GOOD, "extra_keys": {"a": 1}}, r"extra_keys: expected a list of strings"),
        ({**GOOD, "keypoint_flip_map": "ab"}, r"keypoint_flip_map: expected pairs of keypoint names, found 'ab'"),
        ({**GOOD, "keypoint_flip_map": [["a"]]}, r"keypoint_flip_map: expected pairs"),
        ({**GOOD, "keypoint_flip_map": [["a", "b", "c"]]}, r"keypoint_flip_map: expected pairs"),
        (
            {**GOOD, "keypoint_names": ["left_eye", "right_eye"], "keypoint_flip_map": [["left_eye", "right_ey"]]},
            r"found 'right_ey', which keypoint_names has not.*Nearest: 'right_eye'",
        ),
    ],
)
def test_wrong_entry_is_refused_with_its_place(raw: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        checked_entry(raw, Key("X")[0])
    assert error.value.exit_code == 1
