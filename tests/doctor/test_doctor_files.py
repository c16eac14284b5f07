"""HA231 and HA201: image names that one change finds, and files of another encoding or of another tool."""

from __future__ import annotations

import codecs
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from helpers.doctor import data_report, one_of, registered_context, write_set

from d2_headadapt.data.categories import read_categories
from d2_headadapt.doctor.coco_json import read_coco
from d2_headadapt.doctor.missing_files import rewrite_that_finds
from d2_headadapt.errors import DatasetError


@pytest.fixture(autouse=True)
def _datasets() -> Iterator[None]:
    before = set(DatasetCatalog.list())
    yield
    for name in set(DatasetCatalog.list()) - before:
        DatasetCatalog.remove(name)
        MetadataCatalog.pop(name, None)


def tree(folder: Path, *files: str) -> None:
    for file in files:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).touch()


@pytest.mark.parametrize(
    ("there", "said", "what", "relative"),
    [
        (["a/1.jpg", "a/2.jpg"], ["a\\1.jpg", "a\\2.jpg"], "slashes in place of backslashes", "a/1.jpg"),
        (["1.jpg", "2.jpg"], ["train/1.jpg", "train/2.jpg"], "the first folder left out", "1.jpg"),
        (["1.jpg", "2.jpg"], ["C:\\x\\y\\1.jpg", "C:\\x\\y\\2.jpg"], "the folders left out", "1.jpg"),
        (["1.jpg", "2.jpg"], ["/data/me/1.jpg", "/data/me/2.jpg"], "the folders left out", "1.jpg"),
        (["train/1.jpg", "train/2.jpg"], ["1.jpg", "2.jpg"], "the folder train in front", "train/1.jpg"),
        (["../val/1.jpg", "../val/2.jpg"], ["1.jpg", "2.jpg"], "the folder val beside", "../val/1.jpg"),
        (["../1.jpg", "../2.jpg"], ["1.jpg", "2.jpg"], "the folder above", "../1.jpg"),
        (["a b.jpg", "ä.jpg"], ["a%20b.jpg", "%C3%A4.jpg"], "percent-escapes undone", "a b.jpg"),
        (["a%20b.jpg", "c%20.jpg"], ["a b.jpg", "c .jpg"], "percent-escapes", "a%20b.jpg"),
        (["1.JPG", "2.JPG"], ["1.jpg", "2.jpg"], "the ending in capitals", "1.JPG"),
        (["1.jpg", "2.jpg"], ["1.JPG", "2.JPG"], "the ending in small letters", "1.jpg"),
        (["1.jpg"], ["1.jpeg", "2.jpeg"], None, None),
        (["1.JPG", "2.jpg"], ["1.jpg", "3.jpg"], None, None),
    ],
)
def test_the_one_change_that_finds_all(
    there: list[str], said: list[str], what: str | None, relative: str | None, tmp_path: Path
) -> None:
    root = tmp_path / "images"
    root.mkdir()
    tree(root, *there)
    found = rewrite_that_finds(str(root), said)
    assert (found and found.what) == what
    if found is not None:
        assert found.example == f"{said[0]} as {relative}" and found.fix.endswith(".")


def test_a_folder_that_is_named_twice(tmp_path: Path) -> None:
    """images: a/train, and file_name train/1.jpg."""
    tree(tmp_path / "a" / "train", "1.jpg")
    found = rewrite_that_finds(str(tmp_path / "a" / "train"), ["train/1.jpg"])
    assert found is not None and found.what == "the first folder left out"
    missing = rewrite_that_finds(str(tmp_path / "a" / "train" / "train"), ["1.jpg"])
    assert missing is not None and missing.fix.startswith("Write images: ") and "a/train" in missing.fix


def test_the_finding_has_the_line_to_correct(tmp_path: Path) -> None:
    path = write_set(tmp_path, "set")
    (tmp_path / "set" / "inner").mkdir()
    for file in (tmp_path / "set").glob("*.png"):
        shutil.move(file, tmp_path / "set" / "inner")
    found = one_of(data_report(registered_context(tmp_path, path)), "HA231")
    folder = tmp_path / "set" / "inner"
    assert found.fix == (
        "All of them are found with the folder inner in front: 0.png as inner/0.png. Write images: "
        f"{folder} in its entry of DATASETS.REGISTER."
    )


GOOD = '{"images": [], "annotations": [], "categories": [{"id": 1, "name": "é"}]}'


@pytest.mark.parametrize(
    ("content", "found", "fix"),
    [
        (codecs.BOM_UTF8 + GOOD.encode(), "a byte-order mark in front of the JSON", "sed -i"),
        (GOOD.encode("utf-16"), "text in UTF-16", "iconv -f UTF-16 -t UTF-8"),
        (GOOD.encode("latin-1"), "text that is not in UTF-8 (byte 0xe9 at 68)", "iconv -f LATIN1 -t UTF-8"),
        (b'{"version": "5", "shapes": [], "imagePath": "a.jpg"}', "LabelMe", "Export it as COCO"),
        (b'{"a.jpg123": {"filename": "a.jpg", "regions": []}}', "VGG Image Annotator", "Export it as COCO"),
        (b'{"_via_img_metadata": {}, "_via_settings": {}}', "VGG Image Annotator", "Export it as COCO"),
        (b'[{"id": 1, "data": {}, "annotations": []}]', "Label Studio", "Export it as COCO"),
        (b'[{"image": "a.jpg", "annotations": []}]', "CreateML", "Export it as COCO"),
        (b'<annotation><folder/></annotation>', "Pascal VOC", "Export it as COCO"),
        (b'<?xml version="1.0"?>\n<annotations><version>1.1</version></annotations>', "CVAT", "Export it as COCO"),
        (b"0 0.5 0.5 0.1 0.1\n3 0.2 0.2 0.1 0.1\n", "YOLO", "Export it as COCO"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("read", [read_coco, read_categories])
def test_a_file_of_another_kind_is_named(
    content: bytes, found: str, fix: str, read: Callable[[str], Any], tmp_path: Path
) -> None:
    path = tmp_path / "my labels.json"
    path.write_bytes(content)
    if read is read_categories and content.startswith((codecs.BOM_UTF8, codecs.BOM_UTF16_LE)):
        return  # Python finds the encoding out, and the categories are cut out of a file.
    with pytest.raises(DatasetError) as caught:
        read(str(path))
    assert found in caught.value.found and fix in caught.value.fix and str(path) in caught.value.where


def test_what_is_merely_damaged_keeps_its_place(tmp_path: Path) -> None:
    path = tmp_path / "cut.json"
    path.write_text(json.dumps({"images": [], "annotations": []})[:-5])
    with pytest.raises(DatasetError, match="JSONDecodeError"):
        read_coco(str(path))
