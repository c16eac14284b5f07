from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from helpers.files import logged, texts

from d2_headadapt.data import categories as module
from d2_headadapt.data.categories import keypoint_names, read_categories, read_names
from d2_headadapt.errors import ClassTableError, DatasetError

CATEGORIES = [{"id": 7, "name": "café"}, {"id": 2, "name": "dog"}, {"id": 30, "name": "cat"}]
BY_ID = ["dog", "café", "cat"]


@pytest.fixture
def whole(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One element for each file that was parsed whole."""
    parsed: list[int] = []
    loads = json.loads

    def counted(text: bytes) -> Any:
        parsed.append(len(text))
        return loads(text)

    monkeypatch.setattr(module.json, "loads", counted)
    return parsed


def write(path: Path, content: Any, **how: Any) -> str:
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content, **how).encode())
    return str(path)


def names_of(path: str) -> list[str]:
    return [category["name"] for category in read_categories(path)]


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("ascii_only", [True, False])
def test_categories_are_cut_out_without_parsing_the_rest(
    tmp_path: Path, whole: list[int], indent: int | None, ascii_only: bool
) -> None:
    path = write(
        tmp_path / "a.json",
        {"images": [1, 2], "categories": CATEGORIES, "annotations": [3]},
        indent=indent,
        ensure_ascii=ascii_only,
    )
    assert names_of(path) == BY_ID
    assert whole == []


def test_categories_are_found_at_the_end_and_beyond_the_first_window(tmp_path: Path, whole: list[int]) -> None:
    many = [{"id": i, "name": f"é{i}"} for i in range(20_000)]
    path = write(tmp_path / "a.json", {"annotations": ["x" * 100_000], "categories": many}, ensure_ascii=False)
    assert names_of(path) == [f"é{i}" for i in range(20_000)]
    assert whole == []


def test_rest_of_the_file_need_not_even_be_json(tmp_path: Path) -> None:
    path = write(tmp_path / "a.json", b'{"categories": [{"id": 1, "name": "dog"}], "annotations": [{"id":')
    assert names_of(path) == ["dog"]


@pytest.mark.parametrize("window", range(1, 40))
def test_window_may_end_anywhere_also_inside_a_character(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: list[int], window: int
) -> None:
    monkeypatch.setattr(module, "_WINDOW", window)
    path = write(tmp_path / "a.json", {"categories": CATEGORIES, "info": "é"}, ensure_ascii=False)
    assert names_of(path) == BY_ID
    assert whole == []


def test_value_and_escaped_text_that_look_like_the_key_are_passed_over(tmp_path: Path, whole: list[int]) -> None:
    content = {"info": {"about": '"categories": [1]', "kind": "categories"}, "categories": CATEGORIES}
    assert names_of(write(tmp_path / "a.json", content)) == BY_ID
    assert whole == []


@pytest.mark.parametrize(
    "content",
    [
        {"info": {"categories": [{"id": 1, "name": "wrong"}]}, "categories": CATEGORIES},
        {"info": {"categories": "animals"}, "categories": CATEGORIES},
        {"categories": CATEGORIES, "annotations": [{"categories": [1]}]},
    ],
)
def test_second_key_of_that_name_has_the_whole_file_parsed(tmp_path: Path, whole: list[int], content: Any) -> None:
    assert names_of(write(tmp_path / "a.json", content)) == BY_ID
    assert len(whole) == 1


def test_key_written_with_escapes_and_other_encodings_have_the_whole_file_parsed(
    tmp_path: Path, whole: list[int]
) -> None:
    escaped = json.dumps({"categories": CATEGORIES}).replace("categories", "\\u0063ategories").encode()
    assert names_of(write(tmp_path / "a.json", escaped)) == BY_ID
    assert names_of(write(tmp_path / "b.json", json.dumps({"categories": CATEGORIES}).encode("utf-16"))) == BY_ID
    assert len(whole) == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "damaged JSON"),
        (b'{"images": [', "damaged JSON"),
        (b'{"categories": [{"id": 1, "name": "do', "damaged JSON"),
        (b"\xff\xfe\xfa not text", "damaged JSON"),
        ([1, 2], "no list of categories with id and name"),
        ({"images": []}, "no list of categories with id and name"),
        ({"categories": []}, "no list of categories with id and name"),
        ({"categories": {"1": "dog"}}, "no list of categories with id and name"),
        ({"categories": [{"id": 1}]}, "no list of categories with id and name"),
        ({"categories": ["dog"]}, "no list of categories with id and name"),
        ({"categories": [{"id": 1, "name": "dog"}, {"id": "b", "name": "cat"}]}, "category ids that have no order"),
        ({"categories": [{"id": 1, "name": "dog"}, {"id": 1, "name": "cat"}]}, "the category id 1 for 'dog' and 'cat'"),
    ],
)
def test_unusable_json_is_refused_naming_file_and_reason(tmp_path: Path, content: Any, message: str) -> None:
    path = write(tmp_path / "a.json", content)
    with pytest.raises(DatasetError, match=f"^{re.escape(path)}: expected a COCO json.*found {message}") as error:
        read_categories(path)
    assert error.value.exit_code == 1


def test_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"none\.json: expected a COCO json.*FileNotFoundError"):
        read_categories(str(tmp_path / "none.json"))


def test_keypoints_are_those_that_the_categories_declare() -> None:
    person = {"id": 1, "name": "person", "keypoints": ["nose", "eye"]}
    assert keypoint_names([{"id": 2, "name": "dog"}, person], "a.json") == ["nose", "eye"]
    assert keypoint_names([{"id": 2, "name": "dog"}, {"id": 3, "name": "cat", "keypoints": []}], "a.json") is None
    assert keypoint_names([person, {**person, "id": 2, "name": "child"}], "a.json") == ["nose", "eye"]


def test_two_lists_of_keypoints_are_refused_naming_both_categories() -> None:
    categories = [{"id": 1, "name": "a", "keypoints": ["x", "y"]}, {"id": 2, "name": "b", "keypoints": ["y", "x"]}]
    with pytest.raises(DatasetError, match=r"a\.json: .*different lists in 'a' and 'b'"):
        keypoint_names(categories, "a.json")


# --- lists of names


def test_text_file_has_one_name_a_line(tmp_path: Path) -> None:
    path = tmp_path / "classes.TXT"
    path.write_bytes("\ufeff# mine\r\ncafé\r\n\r\n  dog \n   # no class\ntraffic light # 2\n".encode())
    assert read_names(str(path), "thing", "KEY") == ["café", "dog", "traffic light # 2"]


@pytest.mark.parametrize("content", [["b", "a"], {"names": ["b", "a"]}, {"names": ["b", "a"], "version": 1}])
def test_json_list_of_names_keeps_its_order(tmp_path: Path, content: Any) -> None:
    assert read_names(write(tmp_path / "a.json", content), "thing", "KEY") == ["b", "a"]


def test_coco_json_gives_names_by_id_or_keypoints(tmp_path: Path) -> None:
    path = write(tmp_path / "a.json", {"categories": [*CATEGORIES, {"id": 1, "name": "person", "keypoints": ["nose"]}]})
    assert read_names(path, "thing", "KEY") == ["person", *BY_ID]
    assert read_names(path, "keypoint", "KEY") == ["nose"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", {"classes": ["a"]}, r"KEY, .*a\.json: expected a list of names.*found a JSON dict without them"),
        ("a.json", "dog", r"found a JSON str without them"),
        ("a.json", {"names": {"0": "dog"}}, r"found a JSON dict without them"),
        ("a.json", b"[", r"expected valid JSON or text in UTF-8"),
        ("a.txt", b"caf\xe9", r"expected valid JSON or text in UTF-8"),
        ("a.yaml", b"- dog", r"KEY: expected a \.json or \.txt file, found .*a\.yaml"),
    ],
)
def test_file_without_a_list_is_refused(tmp_path: Path, name: str, content: Any, message: str) -> None:
    with pytest.raises(ClassTableError, match=message):
        read_names(write(tmp_path / name, content), "thing", "KEY")


def test_coco_json_without_keypoints_is_refused_for_keypoints(tmp_path: Path) -> None:
    with pytest.raises(ClassTableError, match=r"for keypoints, one that declares them"):
        read_names(write(tmp_path / "a.json", {"categories": CATEGORIES}), "keypoint", "KEY")


@pytest.mark.real
@pytest.mark.parametrize("split", ["coco128/train.json", "coco128/val.json", "bccd/train.json"])
def test_cut_out_categories_are_those_of_the_whole_file(real: Path, whole: list[int], split: str) -> None:
    path = real / split
    content = json.JSONDecoder().decode(path.read_text())
    expected = sorted(content["categories"], key=lambda category: category["id"])
    assert read_categories(str(path)) == expected
    assert whole == []


def test_a_name_with_a_hash_in_a_txt(tmp_path: Path) -> None:
    path = tmp_path / "names.txt"
    path.write_bytes(b"# my classes\r\n#\r\n#!made by hand\r\n\\#1\r\ncat # small\r\nc#\r\n#2\r\n \r\nb\xc2\x85c\r\n")
    with logged("d2_headadapt") as said:
        assert read_names(str(path), "thing", "KEY") == ["#1", "cat # small", "c#", "b\x85c"]
    assert texts(said) == (
        f"{path}: #2 is taken as a comment; write \\#2 where it is a class, or '# ' before a comment."
    )
