"""Files of class embeddings, in every convention, and whose rows they hold."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from d2_headadapt import ClassTable, vocabulary
from d2_headadapt.errors import CheckpointFileError, TextError
from d2_headadapt.modeling.text.bundle import TextBundle, read_bundle

NAMES = ["cat", "dog", "traffic light"]


@pytest.fixture()
def rows() -> torch.Tensor:
    """Of values that float16 holds exactly."""
    return torch.randn(3, 8, generator=torch.Generator().manual_seed(0)).half().float()


def saved(path: Path, value: object) -> str:
    if path.suffix == ".npy":
        np.save(path, value)
    else:
        torch.save(value, path)
    return str(path)


def test_every_format_gives_the_same_rows(tmp_path: Path, rows: torch.Tensor) -> None:
    save_file({"embeddings": rows}, tmp_path / "a.safetensors")
    torch.save(rows, tmp_path / "legacy.pth", _use_new_zipfile_serialization=False)
    paths = [
        saved(tmp_path / "half.npy", rows.half().numpy()),
        saved(tmp_path / "big.npy", rows.numpy().astype(">f8")),
        saved(tmp_path / "one.pth", rows),
        saved(tmp_path / "half.pth", rows.half()),
        saved(tmp_path / "parameter.pth", torch.nn.Parameter(rows)),
        saved(tmp_path / "dict.pth", {"text_embeddings": rows, "other": torch.zeros(2, 2)}),
        saved(tmp_path / "model.pth", {"model": {"anything": rows}}),
        str(tmp_path / "a.safetensors"),
        str(tmp_path / "legacy.pth"),
    ]
    for path in paths:
        bundle = read_bundle(path, NAMES)
        assert torch.equal(bundle.matrix, rows), path
        assert bundle.matrix.dtype == torch.float32 and not bundle.matrix.requires_grad
        assert bundle.names.names == tuple(NAMES)


def test_detics_transposed_matrix_with_its_zero_column(tmp_path: Path, rows: torch.Tensor) -> None:
    columns = torch.cat([rows, torch.zeros(1, 8)]).t().contiguous()
    bundle = read_bundle(saved(tmp_path / "zs.pth", columns), NAMES)
    assert torch.equal(bundle.matrix, rows)
    assert bundle.background is None


@pytest.mark.parametrize("last", [0.5, None])
def test_columns_without_the_zero_column_are_refused_with_both_readings(
    last: float | None, tmp_path: Path, rows: torch.Tensor
) -> None:
    columns = rows.t() if last is None else torch.cat([rows, torch.full((1, 8), last)]).t()
    with pytest.raises(TextError) as error:
        read_bundle(saved(tmp_path / "t.npy", columns.numpy()), NAMES)
    width = 3 if last is None else 4
    assert f"as rows, 8 classes of width {width}; as columns, {width} of width 8" in error.value.found
    assert "matrix.T" in error.value.fix


def test_a_square_file_that_fits_both_ways_is_refused(tmp_path: Path) -> None:
    matrix = torch.randn(3, 4)
    matrix[:, -1] = 0
    with pytest.raises(TextError, match="fits both ways"):
        read_bundle(saved(tmp_path / "t.pth", matrix), NAMES)


def test_background_is_an_entry_or_the_last_row(tmp_path: Path, rows: torch.Tensor) -> None:
    background = torch.arange(8.0)
    entry = saved(tmp_path / "entry.pth", {"embeddings": rows, "cls_bg_score": background[None]})
    last = saved(tmp_path / "last.npy", torch.cat([rows, background[None]]).numpy())
    for path in (entry, last):
        bundle = read_bundle(path, NAMES, background=True)
        assert torch.equal(bundle.matrix, rows) and bundle.background is not None
        assert torch.equal(bundle.background, background)
    with pytest.raises(TextError, match="BACKGROUND file"):
        read_bundle(last, NAMES)
    with pytest.raises(TextError, match="no entry 'background'"):
        read_bundle(saved(tmp_path / "none.npy", rows.numpy()), NAMES, background=True)
    with pytest.raises(TextError, match="of 8 numbers"):
        read_bundle(saved(tmp_path / "odd.pth", {"embeddings": rows, "bg": torch.ones(5)}), NAMES)
    # A last row of zeros is Detic's background, turned.
    zeros = read_bundle(saved(tmp_path / "zeros.npy", torch.cat([rows, torch.zeros(1, 8)]).numpy()), NAMES)
    assert torch.equal(zeros.matrix, rows) and zeros.background is None


def test_the_sidecar_says_names_encoder_and_norm_and_the_arguments_win(tmp_path: Path, rows: torch.Tensor) -> None:
    path = saved(tmp_path / "clip.npy", rows.numpy())
    facts = {"names": NAMES, "encoder": "ViT-B/32", "normalised": True}
    (tmp_path / "clip.json").write_text(json.dumps(facts))
    bundle = read_bundle(path)
    assert (bundle.names.names, bundle.encoder, bundle.normalised) == (tuple(NAMES), "ViT-B/32", True)
    other = read_bundle(path, ["a", "b", "c"], encoder="RN50")
    assert (other.names.names, other.encoder) == (("a", "b", "c"), "RN50")
    (tmp_path / "clip.json").write_text('{"names": [')
    with pytest.raises(TextError, match=r"clip\.json: expected valid JSON"):
        read_bundle(path)
    (tmp_path / "clip.json").write_text('{"names": ["a", "b", "c"], "normalised": "no"}')
    with pytest.raises(TextError, match='"normalised": false'):
        read_bundle(path)


def test_normalised_is_measured_where_nobody_says(tmp_path: Path, rows: torch.Tensor) -> None:
    unit = torch.nn.functional.normalize(rows, dim=1)
    assert read_bundle(saved(tmp_path / "unit.npy", unit.half().numpy()), NAMES).normalised
    assert not read_bundle(saved(tmp_path / "raw.npy", rows.numpy()), NAMES).normalised


@pytest.mark.parametrize(
    ("shape", "named"),
    [((80, 16), "coco (80)"), ((16, 81), "coco (80)"), ((81, 16), "coco (80)"), ((365, 16), "objects365 (365)")],
)
def test_without_names_the_vocabularies_of_that_size_are_named(
    shape: tuple[int, int], named: str, tmp_path: Path
) -> None:
    path = saved(tmp_path / "clip.npy", np.ones(shape, np.float32))
    with pytest.raises(TextError) as error:
        read_bundle(path)
    assert named in error.value.fix
    assert f"MODEL.HEAD_ADAPT.TEXT.NAMES {named.split()[0]}" in error.value.fix
    assert "clip.json" in error.value.expected


def test_without_names_and_without_a_vocabulary_of_that_size_all_are_listed(tmp_path: Path) -> None:
    with pytest.raises(TextError, match=r"No vocabulary has that many classes.*lvis_v1 \(1203\)"):
        read_bundle(saved(tmp_path / "clip.npy", np.ones((17, 31), np.float32)))


@pytest.mark.parametrize("shape", [(8,), (1, 8), (3, 1), (), (1, 3, 8)])
def test_what_torch_would_repeat_for_every_class_is_refused(shape: tuple[int, ...], tmp_path: Path) -> None:
    path = saved(tmp_path / "clip.npy", np.ones(shape, np.float32))
    if shape != (1, 3, 8):  # Anything else would silently be copied into the classifier's three rows.
        torch.empty(3, 8).copy_(torch.ones(shape))
    with pytest.raises(TextError, match="a matrix of 3 rows"):
        read_bundle(path, NAMES)


def test_one_class_may_have_one_row(tmp_path: Path) -> None:
    assert read_bundle(saved(tmp_path / "clip.npy", np.ones((1, 8), np.float32)), ["cat"]).width == 8


@pytest.mark.parametrize(
    "value", [np.ones((3, 8), np.int64), np.array([{"a": 1}] * 3, dtype=object), np.ones((3, 8), np.complex64)]
)
def test_what_is_no_matrix_of_floats_is_refused(value: np.ndarray, tmp_path: Path) -> None:
    with pytest.raises(TextError):
        read_bundle(saved(tmp_path / "clip.npy", value), NAMES)


def npy(header: str, data: bytes = bytes(96)) -> bytes:
    """A ``.npy`` file with this header."""
    text = header.encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + data


@pytest.mark.parametrize(
    "header",
    [
        "{'descr': '<f4', 'fortran_order': False, 'shape': (10000000, 800000)}",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (10000, 100000)}",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (99999999999999999999, 8)}",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (-3, 8)}",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (0, 8)}",
        "{'descr': '<f4', 'fortran_order': False, 'shape': ('3', 8)}",
        "{'descr': '|O', 'fortran_order': False, 'shape': (3, 8)}",
        "{'descr': [], 'fortran_order': False, 'shape': (3, 8)}",
        "{'descr': '<f4'}",
        "(" * 5000,
        "[" * 9000 + "]" * 9000,
        "-" * 9000 + "1",
        "",
    ],
    ids=lambda header: header[-30:],
)
def test_a_header_that_promises_what_the_file_has_not_is_one_line(header: str, tmp_path: Path) -> None:
    path = tmp_path / "clip.npy"
    path.write_bytes(npy(header))
    with pytest.raises(TextError) as caught:
        read_bundle(str(path), NAMES)
    assert str(path) in caught.value.where and "\n" not in str(caught.value) and caught.value.fix


def test_a_torch_file_goes_through_the_restricted_reader(tmp_path: Path, rows: torch.Tensor) -> None:
    path = saved(tmp_path / "evil.pth", {"embeddings": rows, "run": Path})
    with pytest.raises(CheckpointFileError):
        read_bundle(path, NAMES)
    good = Path(saved(tmp_path / "good.pth", rows))
    damaged = bytearray(good.read_bytes())
    at = damaged.find(rows.numpy().tobytes()[:16])
    damaged[at + 2] ^= 1
    good.write_bytes(bytes(damaged))
    with pytest.raises(CheckpointFileError):
        read_bundle(str(good), NAMES)


@pytest.mark.parametrize("value", [{}, {"a": torch.ones(3, 8), "b": torch.ones(3, 8)}, {"names": NAMES}])
def test_a_dict_without_one_matrix_is_refused(value: object, tmp_path: Path) -> None:
    with pytest.raises(TextError, match="one matrix of class rows"):
        read_bundle(saved(tmp_path / "clip.pth", value), NAMES)


def test_a_missing_file_names_its_neighbours(tmp_path: Path, rows: torch.Tensor) -> None:
    saved(tmp_path / "clip_coco.npy", rows.numpy())
    with pytest.raises(TextError, match=r"Nearest: 'clip_coco\.npy'"):
        read_bundle(str(tmp_path / "clip_cocoo.npy"), NAMES)


def bundle_of(rows: torch.Tensor) -> TextBundle:
    return TextBundle(ClassTable(NAMES), rows, None, "", False, "clip.npy")


def test_rows_are_picked_by_name_alias_and_spelling(rows: torch.Tensor) -> None:
    target = ClassTable(["Traffic-Light", "hound", "cat"])
    found, missing = bundle_of(rows).rows_for(target, ["hound=dog", "truck=lorry"])
    assert torch.equal(found, rows[[2, 1, 0]]) and missing == ()


def test_classes_without_a_row_are_named_with_the_nearest(rows: torch.Tensor) -> None:
    found, missing = bundle_of(rows).rows_for(ClassTable(["trafic light", "cat", "plane"]))
    assert torch.equal(found, rows[[0]]) and missing == ("trafic light", "plane")
    with pytest.raises(TextError) as error:
        bundle_of(rows).require(ClassTable(["trafic light", "cat"]))
    assert "none for trafic light" in error.value.found
    assert "Nearest: 'traffic light'" in error.value.fix
    assert "ALIASES \"['trafic light=" in error.value.fix


def test_the_values_are_read_on_the_meta_device_too(tmp_path: Path, rows: torch.Tensor) -> None:
    with torch.device("meta"):
        bundle = read_bundle(saved(tmp_path / "clip.npy", rows.numpy()), NAMES)
        found = bundle.require(ClassTable(["dog"]))
    assert torch.equal(found, rows[[1]])


def test_one_lvis_file_serves_a_list_of_cocos_classes(real: Path) -> None:
    """Same prompts, other files: a class has the same direction in both."""
    lvis = read_bundle(str(real / "text" / "lvis_v1_clip_a+cname.npy"), "lvis_v1")
    coco = read_bundle(str(real / "text" / "coco_clip_a+cname.npy"), "coco")
    target = ClassTable(["zebra", "person", "cup", "elephant"])
    cosines = torch.nn.functional.cosine_similarity(lvis.require(target), coco.require(target))
    assert lvis.matrix.shape == (1203, 512) and not lvis.normalised
    assert (cosines > 0.999).all()
    # LVIS calls it car_(automobile), so its prompt is another: a reviewed alias finds it.
    car = ClassTable(["car"])
    assert torch.nn.functional.cosine_similarity(lvis.require(car), coco.require(car)).item() == pytest.approx(
        0.962, abs=0.002
    )
    assert lvis.rows_for(vocabulary("lvis_v1"))[1] == ()
