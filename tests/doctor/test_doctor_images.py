"""HA231 to HA237: image files that are missing, damaged, of another size, turned, or in train and test."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from detectron2.data import MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.data.detection_utils import SizeMismatchError, check_image_size, read_image
from helpers.doctor import codes, data_report, one_of, registered_context, write_set
from PIL import Image

from d2_headadapt.doctor import image_checks
from d2_headadapt.doctor.finding import CHECKS, DoctorContext

WIDE = 96


def write_wide(folder: Path, name: str) -> Path:
    """A dataset whose images are wider than high, so that a quarter turn shows."""
    path = write_set(folder, name)
    content = json.loads(path.read_text())
    for one in content["images"]:
        one["width"] = WIDE
        file = path.with_suffix("") / one["file_name"]
        with Image.open(file) as image:
            wide = image.resize((WIDE, 64))
        wide.save(file)
    path.write_text(json.dumps(content))
    return path


def turn(file: Path, orientation: int, *, upright_again: bool = False) -> None:
    """Tag a file; with ``upright_again`` its pixels are laid down, so that the tag stands them up."""
    with Image.open(file) as image:
        pixels = image.transpose(Image.Transpose.ROTATE_90) if upright_again else image.copy()
    exif = Image.Exif()
    exif[image_checks.ORIENTATION] = orientation
    pixels.save(file, exif=exif)


def opens(path: Path, content: dict[str, Any]) -> bool:
    """Whether detectron2 reads every image of a json."""
    for one in content["images"]:
        file = str(path.with_suffix("") / one["file_name"])
        try:
            check_image_size(dict(one, file_name=file), read_image(file, "BGR"))
        except (OSError, SizeMismatchError):
            return False
    return True


def report_and_truth(path: Path) -> tuple[Any, bool]:
    return data_report(registered_context(path.parent, path)), opens(path, json.loads(path.read_text()))


def test_an_image_that_is_missing_is_an_error_and_named(tmp_path: Path) -> None:
    path = write_wide(tmp_path, "set")
    (tmp_path / "set" / "3.png").unlink()
    report, good = report_and_truth(path)
    found = one_of(report, "HA231")
    assert not good and found.severity == "error"
    assert "1 of 6" in found.found and str(tmp_path / "set" / "3.png") in found.found
    assert codes(report) == ["HA231"]


def test_a_wrong_folder_of_images_has_its_own_mend(tmp_path: Path) -> None:
    path = write_wide(tmp_path, "set")
    register_coco_instances("elsewhere", {}, str(path), str(tmp_path))
    context = DoctorContext("", ["DATASETS.TRAIN", "('elsewhere',)", "MODEL.MASK_ON", "False"])
    found = one_of(data_report(context), "HA231")
    assert "6 of 6" in found.found and "DATASETS.REGISTER" in found.fix


@pytest.mark.parametrize("damage", ["cut", "text", "empty", "none"])
def test_a_damaged_image_is_an_error(tmp_path: Path, damage: str) -> None:
    path = write_wide(tmp_path, "set")
    file = tmp_path / "set" / "2.png"
    data = file.read_bytes()
    file.write_bytes({"cut": data[: len(data) // 2], "text": b"no image", "empty": b"", "none": data}[damage])
    report, good = report_and_truth(path)
    assert good is (damage == "none")
    if good:
        assert codes(report) == []
    else:
        found = one_of(report, "HA232")
        assert found.severity == "error" and str(file) in found.found and "1 of 6" in found.found


def picture(mode: str, low: float, high: float) -> Image.Image:
    """A ramp from low to high, as wide and high as the labels say."""
    ramp = np.linspace(low, high, 64 * WIDE).reshape(64, WIDE)
    if mode == "LA":
        return Image.merge("LA", (Image.new("L", (WIDE, 64)), Image.fromarray(ramp.astype(np.uint8))))
    kind = {"I;16": np.uint16, "I": np.int32, "F": np.float32, "L": np.uint8}[mode]
    return Image.fromarray(ramp.astype(kind))


@pytest.mark.parametrize(
    ("mode", "low", "high", "shown"),
    [
        ("I;16", 300, 4095, "mode I;16, values 300 to 4095: 100% of its pixels become white"),
        ("I", 300, 70000, "mode I, values 300 to 70000: 100% of its pixels become white"),
        ("F", 0, 1, "mode F, values 0 to 1: all of it becomes black"),
        ("LA", 0, 255, "mode LA: all of it becomes one colour, because the picture is in its transparency"),
        ("I", 0, 255, ""),
        ("F", 0, 200, ""),
        ("L", 0, 255, ""),
        ("L", 7, 7, ""),
    ],
)
def test_a_picture_that_reading_loses_is_an_error(
    mode: str, low: float, high: float, shown: str, tmp_path: Path
) -> None:
    path = write_wide(tmp_path, "set")
    ending = ".tif" if mode in ("I", "F", "I;16") else ".png"
    content = json.loads(path.read_text())
    content["images"][0]["file_name"] = f"0{ending}"
    path.write_text(json.dumps(content))
    picture(mode, low, high).save(tmp_path / "set" / f"0{ending}")
    report = data_report(registered_context(tmp_path, path))
    found = [one for one in report.findings if one.code == "HA238"]
    assert len(found) == bool(shown) and all(shown in one.found and one.severity == "error" for one in found)
    seen = read_image(str(tmp_path / "set" / f"0{ending}"), "BGR")
    assert (np.unique(seen).size <= 2) == (bool(shown) or low == high), "as detectron2 reads it"


def test_a_scan_that_pillow_refuses_is_not_called_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_wide(tmp_path, "set")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    found = one_of(data_report(registered_context(tmp_path, path)), "HA232")
    assert "6 of 6" in found.found and "DecompressionBombError" in found.found
    assert found.fix.startswith("Cut them into tiles or scale them down")


@pytest.mark.parametrize(("size", "smaller"), [((48, 64), True), ((120, 64), False), ((WIDE, 64), None)])
def test_an_image_of_another_size_is_an_error(tmp_path: Path, size: tuple[int, int], smaller: bool | None) -> None:
    path = write_wide(tmp_path, "set")
    Image.new("RGB", size).save(tmp_path / "set" / "0.png")
    report, good = report_and_truth(path)
    assert good is (smaller is None)
    if smaller is None:
        assert codes(report) == []
    else:
        found = one_of(report, "HA233")
        assert f"{size[0]} x 64" in found.found and f"{WIDE} x 64" in found.expected
        assert ("smaller" in found.found) is smaller and "EXIF" not in found.found


@pytest.mark.parametrize(
    ("orientation", "upright_again", "code"),
    [(6, False, "HA233"), (6, True, None), (3, False, "HA234"), (1, False, None)],
)
def test_exif_orientation(tmp_path: Path, orientation: int, upright_again: bool, code: str | None) -> None:
    path = write_wide(tmp_path, "set")
    turn(tmp_path / "set" / "1.png", orientation, upright_again=upright_again)
    report, good = report_and_truth(path)
    assert codes(report) == ([code] if code else [])
    assert good is (code != "HA233")
    if code == "HA233":
        found = one_of(report, code)
        assert "EXIF orientation is 6" in found.found and f"64 x {WIDE}" in found.found
    if code == "HA234":
        assert one_of(report, code).severity == "note"


def test_a_sample_is_looked_at_and_all_images_when_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_checks, "SAMPLE", 2)
    path = write_wide(tmp_path, "set")
    looked: list[str] = []
    look = image_checks._look
    monkeypatch.setattr(image_checks, "_look", lambda i, file: (looked.append(file), look(i, file))[1])
    context = registered_context(tmp_path, path)
    assert codes(data_report(context)) == []
    first = list(looked)
    assert len(set(first)) == len(first) == 2  # Once, for all checks together.
    looked.clear()
    data_report(DoctorContext("", context.opts))
    assert looked == first
    missed = sorted(set(map(str, (tmp_path / "set").iterdir())) - set(first))[0]
    Path(missed).write_bytes(b"no image")
    assert "HA232" not in codes(data_report(DoctorContext("", context.opts)))
    looked.clear()
    found = one_of(data_report(DoctorContext("", context.opts, all_images=True)), "HA232")
    assert len(looked) == 6 and missed in found.found and "--all-images" not in found.found
    for file in (tmp_path / "set").iterdir():
        file.write_bytes(b"no image")
    found = one_of(data_report(DoctorContext("", context.opts)), "HA232")
    assert "2 of 2 images" in found.found and "--all-images" in found.found


def make_different(path: Path) -> None:
    """Every image of a set gets bytes that no other set has."""
    for file in path.with_suffix("").iterdir():
        file.write_bytes(file.read_bytes() + path.stem.encode())


def test_the_same_file_in_train_and_test_is_a_warning(tmp_path: Path) -> None:
    train = write_wide(tmp_path, "set")
    other = tmp_path / "set2.json"
    content = json.loads(train.read_text())
    content["images"] = content["images"][:2]
    content["annotations"] = [one for one in content["annotations"] if one["image_id"] < 2]
    other.write_text(json.dumps(content))
    # By another way to the same folder.
    (tmp_path / "set2").symlink_to(tmp_path / "set")
    found = one_of(data_report(registered_context(tmp_path, train, other)), "HA235")
    assert found.severity == "warning" and "2 of 2" in found.found and "'doctor_train'" in found.found


def test_the_same_name_in_another_folder_is_another_image(tmp_path: Path) -> None:
    train, test = write_wide(tmp_path, "train"), write_wide(tmp_path, "test")
    make_different(test)
    assert codes(data_report(registered_context(tmp_path, train, test))) == []


def test_a_copy_under_another_name_is_found_by_content(tmp_path: Path) -> None:
    train, test = write_wide(tmp_path, "train"), write_wide(tmp_path, "test")
    make_different(test)
    shutil.copy(tmp_path / "train" / "4.png", tmp_path / "test" / "1.png")
    found = one_of(data_report(registered_context(tmp_path, train, test)), "HA236")
    assert "1 of 6" in found.found and found.severity == "warning"
    assert str(tmp_path / "train" / "4.png") in found.found and str(tmp_path / "test" / "1.png") in found.found


def test_a_file_of_the_same_length_is_no_copy(tmp_path: Path) -> None:
    train, test = write_wide(tmp_path, "train"), write_wide(tmp_path, "test")
    make_different(test)
    for file in (tmp_path / "train").iterdir():
        file.write_bytes(file.read_bytes() + b"same")
    sizes = [{os.path.getsize(file) for file in (tmp_path / name).iterdir()} for name in ("train", "test")]
    assert sizes[0] & sizes[1]
    assert codes(data_report(registered_context(tmp_path, train, test))) == []


def test_images_at_an_address_are_left_alone_and_that_is_said(tmp_path: Path) -> None:
    path = write_wide(tmp_path, "set")
    register_coco_instances("far", {}, str(path), "s3://bucket/images")
    context = DoctorContext("", ["DATASETS.TRAIN", "('far',)", "MODEL.MASK_ON", "False"])
    found = one_of(data_report(context), "HA237")
    assert codes(data_report(context)) == ["HA237"] and found.severity == "note"
    assert "s3://bucket/images/0.png" in found.found


def test_no_image_is_read_in_a_quick_run() -> None:
    """The trainer runs the quick checks before every training."""
    reads = ("HA232", "HA233", "HA234", "HA236", "HA237", "HA238")
    assert [code for code in sorted(CHECKS) if "HA230" < code < "HA240" and not CHECKS[code].quick] == list(reads)


@pytest.mark.real
def test_copies_among_real_photographs_are_found(real: Path) -> None:
    """The photographs of products have copies under two ids, on both sides of the split."""
    register = [
        {
            "name": f"photographs_{part}",
            "csv": str(real / "fashion" / "labels.csv"),
            "images": str(real / "fashion" / "images"),
            "file": "{id}.jpg",
            "tasks": {"gender": "gender"},
            "missing": "NA",
            "split": {"part": part},
        }
        for part in ("train", "test")
    ]
    opts = ["MODEL.META_ARCHITECTURE", "MultiTaskClassifier", "DATASETS.REGISTER", str(register)]
    opts += ["DATASETS.TRAIN", "('photographs_train',)", "DATASETS.TEST", "('photographs_test',)"]
    report = data_report(DoctorContext("", opts, all_images=True))
    assert codes(report) == ["HA236"] and report.not_run == {}
    found = one_of(report, "HA236")
    one, other = (real / "fashion" / "images" / f"{i}.jpg" for i in (2638, 2640))
    assert str(one) in found.found and str(other) in found.found
    assert one.read_bytes() == other.read_bytes()


@pytest.mark.real
def test_real_images_that_lost_their_size_are_seen(real: Path, tmp_path: Path) -> None:
    """The json of one set with the images of another: half of what people mix up."""
    shutil.copytree(real / "bccd" / "val", tmp_path / "val")
    for file in sorted((tmp_path / "val").iterdir())[::2]:
        with Image.open(file) as image:
            small = image.resize((image.width // 2, image.height // 2))
        small.save(file)
    register_coco_instances("shrunk", {}, str(real / "bccd" / "val.json"), str(tmp_path / "val"))
    context = DoctorContext("", ["DATASETS.TRAIN", "('shrunk',)", "MODEL.MASK_ON", "False"], all_images=True)
    found = one_of(data_report(context), "HA233")
    assert f"{(len(os.listdir(tmp_path / 'val')) + 1) // 2} of 87" in found.found and "smaller" in found.found
    assert MetadataCatalog.get("shrunk").image_root == str(tmp_path / "val")
