"""``d2-headadapt export``: what it writes was compared with eager, and what differs is not written."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data.detection_utils import read_image
from detectron2.data.transforms import ResizeShortestEdge
from helpers.commands import Ran, cli
from helpers.export import COLOURS, NAMES, image, saved_classifier, saved_detector
from helpers.models import build_seeded, model_of, names
from helpers.real import fbnet_c4
from PIL import Image

from d2_headadapt import HeadAdaptCheckpointer, add_headadapt_config, vocabulary
from d2_headadapt.errors import ExportError
from d2_headadapt.export import TOLERANCE, ExportedModel, Parity, entry, export_model, read_tables
from d2_headadapt.export.flat import FlatModel
from d2_headadapt.export.formats import exported_bytes


def export(place: tuple[Path, Path], form: str, output: Path, *more: Any) -> Ran:
    config, weights = place
    return cli("export", "--config-file", config, "--weights", weights, "--format", form, "--output", output, *more)


def pictures(folder: Path) -> list[Path]:
    """Two images of different sizes."""
    made = []
    for i, (height, width) in enumerate(((70, 90), (90, 64))):
        pixels = image(i + 1, height, width).permute(1, 2, 0).numpy().astype(np.uint8)
        made.append(folder / f"{i}.png")
        Image.fromarray(pixels).save(made[-1])
    return made


@pytest.mark.parametrize(("form", "name"), [("traced", "m.ts"), ("onnx", "m.onnx")])
def test_a_detector_with_a_task_leaves_with_its_names(form: str, name: str, tmp_path: Path) -> None:
    output = tmp_path / name
    ran = export(saved_detector(tmp_path), form, output, "--image", *pictures(tmp_path))
    assert ran.code == 0, ran.err
    assert re.search(r"compared with eager on 5 images with [1-9]\d* detections", ran.out)
    for field in ("pred_boxes", "scores_colour", "pred_colour"):
        assert re.search(rf"^{field} .* {TOLERANCE:g}$", ran.out, re.MULTILINE)
    size = output.stat().st_size
    ratio = size / (tmp_path / "trained.pth").stat().st_size
    assert f"{size / 1e6:.2f} MB, {ratio:.2f} of the checkpoint; takes images of any size" in ran.out
    assert ran.out.endswith(f"wrote {output}\n")
    assert {space: list(table.names) for space, table in read_tables(str(output)).items()} == {
        "thing": NAMES,
        "colour": COLOURS,
    }
    about = ExportedModel.open(str(output)).facts.extra["export"]
    assert about["channels"] == "BGR" and about["tasks"] == {"colour": "single"}
    assert "ResizeShortestEdge" in about["resize"][0] and "64" in about["resize"][0]


def test_an_existing_output_needs_force(tmp_path: Path) -> None:
    place, output = saved_classifier(tmp_path), tmp_path / "m.ts"
    output.write_bytes(b"old")
    ran = export(place, "traced", output)
    assert ran.code == 1 and "add --force" in ran.err and output.read_bytes() == b"old"
    assert export(place, "traced", output, "--force").code == 0
    assert list(read_tables(str(output))) == ["colour"]


@pytest.mark.parametrize(
    ("form", "name", "found"),
    [
        ("onnx", "m.ts", "ends in .onnx"),
        ("traced", "m.onnx", "ends in .ts or .pt"),
        ("traced", "trained.pth", "ends in .ts"),
        ("traced", "none/m.ts", "mkdir -p"),
    ],
)
def test_an_output_that_cannot_be_is_refused_before_anything_is_built(
    form: str, name: str, found: str, tmp_path: Path
) -> None:
    ran = export(saved_classifier(tmp_path), form, tmp_path / name)
    assert ran.code == 1 and found in ran.err and ran.out == ""


def test_a_format_that_is_none_is_a_wrong_command_line(tmp_path: Path) -> None:
    assert export(saved_classifier(tmp_path), "caffe2", tmp_path / "m.pb").code == 2


def test_a_task_cannot_be_scripted(tmp_path: Path) -> None:
    ran = export(saved_classifier(tmp_path), "scripted", tmp_path / "m.ts")
    assert ran.code == 1 and ran.err.count("error: ") == 1 and "Type --format traced." in ran.err
    assert not (tmp_path / "m.ts").exists()


def test_a_fixed_size_is_said_and_another_one_refused(tmp_path: Path) -> None:
    place, output = saved_classifier(tmp_path, POOLING="flatten"), tmp_path / "m.ts"
    ran = export(place, "traced", output)
    assert ran.code == 0 and "takes images of 32 x 32 only" in ran.out
    assert ExportedModel.open(str(output)).facts.extra["export"]["size"] == [32, 32]
    ran = export(place, "traced", output, "--force", "--image", pictures(tmp_path)[0])
    assert ran.code == 1 and "images of 32 x 32" in ran.err


def test_an_image_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(b"no image")
    ran = export(saved_classifier(tmp_path), "traced", tmp_path / "m.ts", "--image", tmp_path / "x.png")
    assert ran.code == 1 and "x.png: expected an image that can be read" in ran.err


def test_a_model_that_fails_by_itself_is_said_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """Detectron2's keypoint heads stop by an assert without a word where their maps are no numbers."""
    model = model_of(names(5))

    def failing(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError

    monkeypatch.setattr(type(model), "inference", failing)
    with pytest.raises(ExportError, match=r"GeneralizedRCNN: .*found AssertionError\. .*before any export"):
        export_model(model, "traced", {}, side=64)


def test_random_parameters_are_not_exported(tmp_path: Path) -> None:
    place, output = saved_detector(tmp_path), tmp_path / "m.ts"
    ran = export(place, "traced", output, "MODEL.RPN.CONV_DIMS", "[4]")
    assert ran.code == 1 and f"error: {place[1]}: expected every parameter" in ran.err and not output.exists()


def test_where_nothing_is_detected_nothing_was_compared(tmp_path: Path) -> None:
    ran = export(saved_detector(tmp_path, threshold=1.0), "traced", tmp_path / "m.ts")
    assert ran.code == 1 and "found no detection in 3 images" in ran.err and "--image FILE" in ran.err
    assert not (tmp_path / "m.ts").exists()


@pytest.mark.parametrize("package", ["onnx", "onnxruntime"])
def test_without_the_packages_of_onnx_one_line_says_what_to_type(
    package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    ran = export(saved_classifier(tmp_path), "onnx", tmp_path / "m.onnx")
    assert ran.code == 1 and f"expected the package {package}" in ran.err and "pip install" in ran.err
    assert not (tmp_path / "m.onnx").exists()


def test_mutation_a_file_of_other_weights_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(flat: FlatModel, *args: Any, **kwargs: Any) -> bytes:
        with torch.no_grad():
            flat.model.heads["colour"].predictor.bias += torch.tensor([0.0, 0.01])
        content = exported_bytes(flat, *args, **kwargs)
        with torch.no_grad():
            flat.model.heads["colour"].predictor.bias -= torch.tensor([0.0, 0.01])
        return content

    monkeypatch.setattr(entry, "exported_bytes", wrong)
    place = saved_classifier(tmp_path)
    ran = export(place, "traced", tmp_path / "m.ts")
    assert ran.code == 1 and "scores_colour differs by" in ran.err and "Nothing was written" in ran.err
    assert not (tmp_path / "m.ts").exists()


def test_mutation_a_size_that_the_trace_froze_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Why images of several sizes are compared: with int(), the first one's cells would be cut out of all."""
    model = model_of(names(5))
    padded = type(model).preprocess_image

    def frozen(self: Any, inputs: Any) -> Any:
        images = padded(self, inputs)
        images.image_sizes = [(int(size[0]), int(size[1])) for size in images.image_sizes]
        return images

    monkeypatch.setattr(type(model), "preprocess_image", frozen)
    with pytest.raises(ExportError, match=r"a drawn image of 88 x 65"):
        export_model(model, "traced", {}, side=64)


def outputs(scores: list[float], **more: torch.Tensor) -> dict[str, torch.Tensor]:
    """Detections in a row, 20 pixels each."""
    places = torch.arange(len(scores)) * 20.0
    boxes = torch.stack([places, places, places + 10, places + 10], dim=1)
    classes = torch.zeros(len(scores), dtype=torch.int64)
    return {"pred_boxes": boxes, "scores": torch.tensor(scores), "pred_classes": classes, **more}


def compared(eager: dict[str, torch.Tensor], other: dict[str, torch.Tensor], limit: int | None = None) -> Parity:
    parity = Parity()
    parity.add("x", eager, other, [0.05], limit)
    return parity


def test_scores_that_are_equal_but_for_rounding_may_change_places() -> None:
    eager = outputs([0.9, 0.5, 0.5 - 1e-6])
    other = {name: value[[0, 2, 1]] for name, value in eager.items()}
    parity = compared(eager, other)
    assert parity.problems == [] and parity.swapped == 2 and parity.largest["pred_boxes"] == 0.0
    far = outputs([0.9, 0.5, 0.4])
    assert compared(far, {name: value[[0, 2, 1]] for name, value in far.items()}).problems == []
    assert compared(far, {**far, "scores": far["scores"][[0, 2, 1]]}).problems


def test_only_at_a_cut_may_one_side_have_a_detection_more() -> None:
    at, above = outputs([0.9, 0.05 + 1e-6]), outputs([0.9, 0.3])
    less = {name: value[:1] for name, value in at.items()}
    assert compared(at, less).problems == compared(less, at).problems == []
    assert compared(above, less).problems == ["x: a detection of score 0.3000 that only eager has"]
    assert compared(less, above).problems == ["x: a detection of score 0.3000 that only the exported file has"]
    # The limit of an image is a cut as well: the last place went to another of two equal ones.
    tied = outputs([0.9, 0.6, 0.6])
    one, two = ({name: value[rows] for name, value in tied.items()} for rows in ([0, 1], [0, 2]))
    assert compared(one, two, limit=2).problems == [] and len(compared(one, two, limit=3).problems) == 2


def test_a_suppression_that_eager_itself_decides_otherwise_is_a_tie() -> None:
    """Of boxes that overlap by the threshold but for rounding, one is suppressed here and not there."""
    both = outputs([0.9, 0.3])
    one = {name: value[:1] for name, value in both.items()}
    for eager, other, nearly, ties in (
        (both, one, [both, one], 1),
        (one, both, [one, both], 1),
        (both, one, [both, both], 0),
        (one, both, [one, one], 0),
    ):
        parity = Parity()
        parity.add("x", eager, other, nearly=lambda nearly=nearly: nearly)
        assert parity.ties == ties and len(parity.problems) == 1 - ties


def test_labels_may_differ_only_where_their_scores_are_equal() -> None:
    def task(label: int, scores: list[float]) -> dict[str, torch.Tensor]:
        return {"pred_colour": torch.tensor([label]), "scores_colour": torch.tensor([scores])}

    tied, clear = [0.5, 0.5 - 1e-6, 0.0], [0.5, 0.3, 0.2]
    assert compared(outputs([0.9], **task(0, tied)), outputs([0.9], **task(1, tied))).problems == []
    assert compared(outputs([0.9], **task(0, clear)), outputs([0.9], **task(1, clear))).problems
    tags = {"scores_tags": torch.tensor([0.5 + 1e-6, 0.9])}
    eager, other = torch.tensor([True, True]), torch.tensor([False, True])
    assert compared({"pred_tags": eager, **tags}, {"pred_tags": other, **tags}).problems == []
    assert compared({"pred_tags": eager, **tags}, {"pred_tags": ~other, **tags}).problems


def test_another_image_size_is_another_one() -> None:
    eager = {"image_size": torch.tensor([64, 96])}
    assert compared(eager, {"image_size": torch.tensor([96, 64])}).problems == ["x: image_size differs by 2"]


def test_shapes_types_missing_outputs_and_numbers_that_are_none() -> None:
    eager = {"sem_seg": torch.tensor([[1.0, torch.nan]])}
    assert compared(eager, {"sem_seg": eager["sem_seg"].clone()}).problems == []
    assert compared(eager, {"sem_seg": torch.tensor([[1.0, 2.0]])}).problems == ["x: sem_seg differs by nan"]
    assert "is torch.float32 (2,)" in compared(eager, {"sem_seg": eager["sem_seg"][0]}).problems[0]
    assert "torch.float64" in compared(eager, {"sem_seg": eager["sem_seg"].double()}).problems[0]
    assert compared(eager, {}).problems == ["x: sem_seg missing"]
    # What is large is compared by its own size, what is small by 1.
    wide = {"sem_seg": torch.tensor([1000.0, 0.0])}
    assert compared(wide, {"sem_seg": wide["sem_seg"] + 0.05}).problems == []
    assert compared(wide, {"sem_seg": wide["sem_seg"] + 0.2}).problems == ["x: sem_seg differs by 0.2"]


@pytest.mark.real
def test_a_real_detector_detects_the_same_on_real_photographs(real: Path, tmp_path: Path) -> None:
    cfg = get_cfg()
    add_headadapt_config(cfg)
    fbnet_c4(real).add_fbnet_c4_config(cfg)
    cfg.MODEL.ROI_HEADS.NAME = "HeadAdaptROIHeads"
    cfg.MODEL.HEAD_ADAPT.TARGET_CLASSES = cfg.MODEL.HEAD_ADAPT.SOURCE_CLASSES = "coco"
    config, weights = tmp_path / "c.yaml", real / "models" / "fbnet_c4_coco.pth"
    config.write_text(cfg.dump())
    photographs = sorted((real / "coco128" / "val").glob("*.jpg"))[:10]
    model = build_seeded(cfg).eval()
    HeadAdaptCheckpointer(model).load(str(weights), checkpointables=[])
    more = ["--import", real / "models" / "fbnet_c4.py", "--image", *photographs[:2]]
    resize = ResizeShortestEdge([cfg.INPUT.MIN_SIZE_TEST] * 2, cfg.INPUT.MAX_SIZE_TEST)
    seen = []
    for path in photographs[2:]:
        pixels = read_image(str(path), format="BGR")
        pixels = resize.get_transform(pixels).apply_image(pixels)
        seen.append(torch.as_tensor(np.ascontiguousarray(pixels.transpose(2, 0, 1)), dtype=torch.float32))
    for form, name in (("traced", "m.ts"), ("onnx", "m.onnx")):
        output = tmp_path / name
        ran = export((config, weights), form, output, *more)
        assert ran.code == 0, ran.err
        exported = ExportedModel.open(str(output))
        assert exported.facts.tables["thing"] == vocabulary("coco")
        count = 0
        for pixels in seen:
            with torch.no_grad():
                (eager,) = model.inference([{"image": pixels}], do_postprocess=False)
            found = exported(pixels)
            count += len(eager)
            expected = {
                "pred_boxes": eager.pred_boxes.tensor,
                "scores": eager.scores,
                "pred_classes": eager.pred_classes,
            }
            if form == "traced":
                assert all(torch.equal(found[field], value) for field, value in expected.items())
            assert compared(expected, found, limit=cfg.TEST.DETECTIONS_PER_IMAGE).problems == []
        assert count > 100
    # A stock detector of this author cannot be scripted: its RPN head's types are not annotated.
    ran = export((config, weights), "scripted", tmp_path / "s.ts", *more)
    assert ran.code == 1 and "FBNetRPNHead" in ran.err
