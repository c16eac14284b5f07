"""What is wrong with an image, in one line, for a fit, predict and export alike."""

from __future__ import annotations

from pathlib import Path

import pytest
from detectron2.data.detection_utils import read_image
from PIL import Image

from d2_headadapt.data.images import UNREADABLE, why_unreadable


def good(path: Path) -> None:
    Image.new("RGB", (40, 30)).save(path)


def cut(path: Path) -> None:
    Image.effect_noise((64, 64), 50).save(path)
    path.write_bytes(path.read_bytes()[:-1500])


def broken_header(path: Path) -> None:
    good(path)
    data = bytearray(path.read_bytes())
    data[20:24] = b"\xff\xff\xff\xff"
    path.write_bytes(data)


def text(path: Path) -> None:
    path.write_text("no image")


@pytest.mark.parametrize("spoil", [cut, broken_header, text, lambda path: path.write_bytes(b""), lambda path: None])
@pytest.mark.parametrize("ending", ["png", "bmp", "tif"])
def test_a_file_that_is_no_image_is_one_line(tmp_path: Path, spoil, ending: str) -> None:
    path = tmp_path / f"a.{ending}"
    spoil(path)
    if spoil is broken_header and ending != "png":
        return
    with pytest.raises(UNREADABLE) as caught:
        read_image(str(path), format="BGR")
    assert why_unreadable(caught.value) and "\n" not in why_unreadable(caught.value)


def test_more_pixels_than_pillow_opens_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
    with pytest.raises(UNREADABLE) as caught:
        read_image(str(tmp_path / "a.png"), format="BGR")
    assert why_unreadable(caught.value) == (
        "it has more than the 1000 pixels that Pillow opens: cut it into tiles, or scale it down"
    )
