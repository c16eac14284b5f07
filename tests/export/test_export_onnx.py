"""Models with our heads leave as ONNX: onnxruntime gives eager's numbers, for images of any size and any detections."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch
from detectron2.export import STABLE_ONNX_OPSET_VERSION, TracingAdapter
from helpers.box_tasks import TASKS, task_model
from helpers.classifier import TASKS as IMAGE_TASKS
from helpers.classifier import classifier
from helpers.export import counting, image, keypoint_model, with_threshold
from helpers.fit import tiny_model
from helpers.models import model_of, names
from helpers.text import ALL, text_model
from torch import nn

from d2_headadapt.adapt.classes import ClassTable
from d2_headadapt.errors import CheckpointFileError, ConfigError, ExportError
from d2_headadapt.export import ENTRY, TOLERANCE, ExportedModel, embed_tables, export_model, formats, read_tables
from d2_headadapt.export.flat import FlatModel

TABLES = {"thing": ClassTable(names(5)), "colour": ClassTable(["rot", "grün", "blå"])}
IMAGES = [image(1), image(3), image(7, 64, 128), image(8, 101, 70)]


def assert_parity(model: nn.Module, images: list[torch.Tensor]) -> ExportedModel:
    """Export, and compare here as well, field by field, without the package's own comparison."""
    made = export_model(model, "onnx", TABLES, images[:1], side=64)
    exported = ExportedModel(made.content)
    eager = FlatModel(model.eval(), images[0])
    for each in images:
        found, expected = exported(each), eager(each)
        assert list(found) == list(expected) == list(exported.names)
        for name, value in expected.items():
            assert found[name].dtype == value.dtype and found[name].shape == value.shape, name
            scale = max(1.0, float(value.abs().max())) if value.is_floating_point() and value.numel() else 1.0
            torch.testing.assert_close(found[name], value.detach(), rtol=0, atol=TOLERANCE * scale)
    return exported


@pytest.mark.parametrize(
    "build",
    [
        lambda: model_of(names(5), masks=True),
        lambda: model_of(names(5), "cascade", masks=True),
        lambda: task_model(),
        lambda: task_model("cascade"),
        lambda: task_model("c4"),
    ],
    ids=["masks", "cascade masks", "tasks", "cascade tasks", "c4 tasks"],
)
def test_detections_are_eagers_whatever_their_number_and_the_images_size(build: Callable[[], nn.Module]) -> None:
    model = with_threshold(build(), IMAGES)
    exported = assert_parity(model, IMAGES)
    # The number of detections is the first thing that a trace freezes.
    assert len(counting(exported, IMAGES)) > 1


def test_an_image_without_a_detection_has_empty_outputs() -> None:
    images = [image(seed) for seed in range(4)]
    model = task_model()
    # Noise of one brightness scores above, that of the other below.
    model = with_threshold(model, images)
    exported = assert_parity(model, images[::-1])
    assert {0} < counting(exported, images)
    found = next(found for found in map(exported, images) if not len(found["scores"]))
    assert found["pred_boxes"].shape == (0, 4)
    assert found["scores_colour"].shape == (0, len(TASKS["colour"]["classes"]))


def test_a_dense_detector_and_a_text_classifier(tmp_path: Path) -> None:
    assert_parity(tiny_model("retinanet", MODEL__RETINANET__SCORE_THRESH_TEST=0.0), IMAGES)
    assert_parity(text_model(tmp_path, list(ALL)[:3]), IMAGES)


def test_tasks_on_images_are_named_outputs() -> None:
    exported = assert_parity(classifier(), IMAGES)
    assert set(exported.names) == {f"{kind}_{name}" for name in IMAGE_TASKS for kind in ("pred", "scores")}
    found = exported(image(1, 40, 50))
    assert found["pred_colour"].item() == found["scores_colour"].argmax()
    assert found["pred_tags"].tolist() == (found["scores_tags"] >= 0.5).tolist()


def test_a_model_of_one_image_size_is_a_file_of_one_image_size() -> None:
    made = export_model(classifier(POOLING="flatten"), "onnx", TABLES)
    assert made.size == (32, 32)
    session = onnxruntime.InferenceSession(made.content, providers=["CPUExecutionProvider"])
    assert session.get_inputs()[0].shape == [3, 32, 32]
    with pytest.raises(ConfigError, match="images of 32 x 32"):
        export_model(classifier(POOLING="flatten"), "onnx", TABLES, [image(1)])


def test_a_file_says_its_classes_and_its_outputs_and_runs_without_us(tmp_path: Path) -> None:
    made = export_model(classifier(), "onnx", TABLES, facts={"channels": "RGB"})
    path = tmp_path / "model.onnx"
    path.write_bytes(made.content)
    assert read_tables(str(path)) == TABLES and list(read_tables(str(path))) == list(TABLES)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    stored = json.loads(session.get_modelmeta().custom_metadata_map[ENTRY])
    assert stored["tables"]["colour"] == ["rot", "grün", "blå"]
    about = stored["extra"]["export"]
    assert about["channels"] == "RGB" and about["format"] == "onnx" and about["size"] is None
    assert about["outputs"] == [output.name for output in session.get_outputs()]
    assert session.get_inputs()[0].shape == [3, "height", "width"]
    assert onnx.load(str(path)).opset_import[0].version == formats.OPSET
    onnx.checker.check_model(str(path))


def test_tables_go_into_somebody_elses_file_and_its_metadata_stays(tmp_path: Path) -> None:
    path = str(tmp_path / "model.onnx")
    model = onnx.load_model_from_string(export_model(classifier(), "onnx", TABLES).content)
    model.metadata_props.add(key="author", value="somebody")
    other = {"thing": ClassTable(["yak"])}
    embed_tables(model, path, other)
    assert read_tables(path) == other
    assert {prop.key: prop.value for prop in onnx.load(path).metadata_props}["author"] == "somebody"
    with pytest.raises(CheckpointFileError, match="with class tables only"):
        ExportedModel.open(path)
    del model.metadata_props[:]
    Path(path).write_bytes(model.SerializeToString())
    with pytest.raises(CheckpointFileError, match=r"d2_headadapt\.json among its extra files or metadata, found none"):
        read_tables(path)


def test_mutation_detectron2s_own_opset_gives_other_boxes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its RoIAlign lacks the half-pixel shift, and torch only warns of it."""
    monkeypatch.setattr(formats, "OPSET", STABLE_ONNX_OPSET_VERSION)
    with pytest.raises(ExportError, match="expected the numbers of eager"):
        export_model(model_of(names(5), "c4"), "onnx", TABLES, side=64)


def test_keypoints_are_refused_with_the_reason() -> None:
    with pytest.raises(ExportError, match="keypoint head, whose loop over detections") as caught:
        export_model(keypoint_model(), "onnx", TABLES, side=64)
    assert caught.value.fix.startswith("Type --format traced")


def test_stocks_keypoints_cannot_be_exported_either() -> None:
    adapter = TracingAdapter(
        keypoint_model(ours=False).eval(),
        [{"image": image(1)}],
        lambda model, inputs: model.inference(inputs, do_postprocess=False),
    )
    with pytest.raises(torch.onnx.errors.SymbolicValueError):
        torch.onnx.export(adapter, adapter.flattened_inputs, None, dynamo=False, opset_version=formats.OPSET)
