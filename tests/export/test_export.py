"""Models with our heads leave as TorchScript: the same bits as eager, and their class names in the file."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.export import TracingAdapter, scripting_with_instances
from helpers.box_tasks import TASKS, task_model
from helpers.classifier import classifier
from helpers.export import counting, image, keypoint_model, with_threshold
from helpers.fit import tiny_model
from helpers.models import OURS, build_seeded, model_of, names, same_bits, state_of, stock_model, tiny_cfg
from torch import nn

from d2_headadapt.adapt.classes import ClassTable
from d2_headadapt.errors import CheckpointFileError, ExportError
from d2_headadapt.export import ENTRY, ExportedModel, embed_tables, export_model, read_tables
from d2_headadapt.export.scripting import FIELDS, as_stock
from d2_headadapt.modeling.roi_heads import HeadAdaptROIHeads
from d2_headadapt.modeling.text.predictor import HeadAdaptTextOutputLayers, TextClassifier

TABLES = {
    "thing": ClassTable(names(5)),
    "colour": ClassTable(["rot", "grün", "blå"]),
}


def inference(model: nn.Module, inputs: list[dict[str, torch.Tensor]]) -> Any:
    """As stock's export tool calls a model: masks are not pasted into the image."""
    return model.inference(inputs, do_postprocess=False)


def traced(model: nn.Module, example: torch.Tensor) -> tuple[TracingAdapter, torch.jit.ScriptModule]:
    """The adapter, which is eager when called, and its trace."""
    adapter = TracingAdapter(model.eval(), [{"image": example}], inference).eval()
    module: torch.jit.ScriptModule = torch.jit.trace(adapter, adapter.flattened_inputs, check_trace=False)
    return adapter, module


def assert_same_bits(eager: tuple[torch.Tensor, ...], exported: tuple[torch.Tensor, ...]) -> None:
    assert len(eager) == len(exported)
    for one, other in zip(eager, exported, strict=True):
        assert one.dtype == other.dtype
        assert one.shape == other.shape
        assert torch.equal(one, other)


@pytest.mark.parametrize("kind", OURS)
@pytest.mark.parametrize(
    "build", [lambda kind: model_of(names(5), kind, masks=True), task_model], ids=["masks", "box tasks"]
)
def test_a_trace_gives_the_bits_of_eager_on_other_images(kind: str, build: Callable[[str], nn.Module]) -> None:
    images = [image(seed) for seed in range(6)]
    model = with_threshold(build(kind), images)
    adapter, module = traced(model, images[0])
    counts = set()
    for other in [*images, image(7, 64, 128)]:
        eager = adapter(other)
        assert_same_bits(eager, module(other))
        counts.add(len(eager[0]))
    # The number of detections is the first thing that a trace freezes.
    assert len(counts) > 1


def test_a_trace_of_two_images_gives_each_its_own_tasks() -> None:
    images = [image(seed) for seed in range(6)]
    model = with_threshold(task_model(), images)
    inputs = [{"image": images[0]}, {"image": images[1]}]
    adapter = TracingAdapter(model, inputs, inference).eval()
    module = torch.jit.trace(adapter, adapter.flattened_inputs, check_trace=False)
    # The other way round, so that each has the number of detections that the other had.
    for pair in ((images[1], images[0]), (images[3], images[5])):
        assert_same_bits(adapter(*pair), module(*pair))


def test_a_rebuilt_output_of_a_trace_has_the_fields_of_every_task() -> None:
    model = task_model()
    adapter, module = traced(model, image(0))
    (found,) = adapter.outputs_schema(module(image(1)))
    with torch.no_grad():
        (eager,) = inference(model, [{"image": image(1)}])
    assert len(eager) > 0
    assert set(found.get_fields()) == set(eager.get_fields())
    for name in TASKS:
        assert torch.equal(found.get(f"pred_{name}"), eager.get(f"pred_{name}"))
        assert torch.equal(found.get(f"scores_{name}"), eager.get(f"scores_{name}"))


@pytest.mark.parametrize(
    "build",
    [
        lambda: classifier(),
        lambda: tiny_model("retinanet", MODEL__RETINANET__SCORE_THRESH_TEST=0.0),
        keypoint_model,
        lambda: panoptic_model(),
        lambda: embedded_model(),
    ],
    ids=["classifier", "retinanet", "keypoints", "panoptic", "text"],
)
def test_other_architectures_are_traced_to_the_same_bits(build: Callable[[], nn.Module]) -> None:
    """Sizes that are no multiple of the backbone's stride are padded inside the file."""
    made = export_model(build(), "traced", TABLES, [image(1)], side=64)
    assert made.parity.images == 4 and made.size is None
    assert set(made.parity.largest.values()) == {0.0}


def embedded_model() -> nn.Module:
    """A text classifier in place of ours, without a file of embeddings."""
    model = model_of(names(5))
    predictor = model.roi_heads.box_predictor
    predictor.__class__ = HeadAdaptTextOutputLayers
    predictor.cls_score = TextClassifier(predictor.cls_score.in_features, torch.randn(5, 12))
    return model


def panoptic_model() -> nn.Module:
    cfg = tiny_cfg()
    cfg.MODEL.META_ARCHITECTURE = "PanopticFPN"
    cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES = 6
    cfg.MODEL.SEM_SEG_HEAD.CONVS_DIM = 8
    cfg.MODEL.SEM_SEG_HEAD.NORM = ""
    return build_seeded(cfg)


@pytest.mark.parametrize("kind", ["standard", "c4"])
def test_our_heads_are_scripted_to_the_same_bits(kind: str) -> None:
    images = [image(seed) for seed in range(4)]
    model = with_threshold(model_of(names(5), kind, masks=True), images)
    made = export_model(model, "scripted", TABLES, images, side=64)
    assert set(made.parity.largest.values()) == {0.0} and made.parity.swapped == 0
    assert set(made.parity.largest) == {"pred_boxes", "scores", "pred_classes", "pred_masks"}
    assert len(counting(ExportedModel(made.content), images)) > 1


@pytest.mark.parametrize("build", [keypoint_model, embedded_model], ids=["keypoints", "text"])
def test_other_parts_of_a_detector_are_scripted_to_the_same_bits(build: Callable[[], nn.Module]) -> None:
    made = export_model(build(), "scripted", TABLES, side=96)
    assert set(made.parity.largest.values()) == {0.0} and made.parity.detections


def test_a_scripted_copy_is_of_stocks_classes_and_the_model_is_left_alone() -> None:
    model = model_of(names(5), masks=True)
    before = {name: type(module) for name, module in model.named_modules()}
    plain = as_stock(model)
    assert same_bits(state_of(plain), state_of(model))
    kinds = {type(module).__module__.partition(".")[0] for module in plain.modules()}
    assert "d2_headadapt" not in kinds
    assert before == {name: type(module) for name, module in model.named_modules()}
    assert "d2_headadapt" in {kind.__module__.partition(".")[0] for kind in before.values()}


def test_a_scripted_retinanet_leaves_clipping_to_its_caller_as_stocks_does() -> None:
    model = tiny_model("retinanet", MODEL__RETINANET__SCORE_THRESH_TEST=0.0)
    made = export_model(model, "scripted", TABLES, side=96)
    assert set(made.parity.largest.values()) == {0.0} and made.parity.detections
    assert ExportedModel(made.content)(image(1))["pred_boxes"].min() < 0


class Registered(HeadAdaptROIHeads):
    """Of a user."""


def test_what_cannot_be_scripted_is_refused_naming_tracing() -> None:
    other = model_of(names(5))
    other.roi_heads.__class__ = Registered
    for model, found in (
        (task_model(), "roi_heads.box_predictor: expected a model without tasks, found tasks on boxes"),
        (classifier(), "expected a detector, found tasks on images"),
        (model_of(names(5), "cascade"), "roi_heads: expected heads that stock detectron2 can script"),
        (panoptic_model(), "PanopticFPN: expected a model that TorchScript compiles"),
        (other, "TorchScript compiles"),
    ):
        with pytest.raises(ExportError, match=re.escape(found)) as caught:
            export_model(model, "scripted", TABLES, side=64)
        assert caught.value.fix == "Type --format traced."


@pytest.mark.parametrize("build", [lambda: stock_model(5, "cascade"), lambda: panoptic_model()])
def test_stocks_cannot_be_scripted_either(build: Callable[[], nn.Module]) -> None:
    with pytest.raises(RuntimeError):
        scripting_with_instances(build().eval(), FIELDS)


def tiny_trace() -> torch.jit.ScriptModule:
    module: torch.jit.ScriptModule = torch.jit.trace(nn.Linear(2, 3).eval(), (torch.zeros(1, 2),))
    return module


def test_the_file_of_a_detector_gives_its_tables_and_its_outputs(tmp_path: Path) -> None:
    path = str(tmp_path / "model.ts")
    adapter, module = traced(task_model(), image(0))
    tables = {"thing": ClassTable(names(5)), **{name: ClassTable(task["classes"]) for name, task in TASKS.items()}}
    embed_tables(module, path, tables)
    found = read_tables(path)
    assert found == tables
    assert list(found) == list(tables)
    assert_same_bits(adapter(image(1)), torch.jit.load(path)(image(1)))


def test_torch_gives_the_same_entry(tmp_path: Path) -> None:
    path = str(tmp_path / "model.ts")
    embed_tables(tiny_trace(), path, TABLES)
    extra = {ENTRY: ""}
    torch.jit.load(path, _extra_files=extra)
    with zipfile.ZipFile(path) as archive:
        stored = archive.read(f"archive/extra/{ENTRY}")
    assert extra[ENTRY] in (stored, stored.decode())
    assert read_tables(path) == TABLES


def test_a_file_that_torch_named_itself_is_read_too(tmp_path: Path) -> None:
    source, path = str(tmp_path / "a.ts"), str(tmp_path / "b.ts")
    embed_tables(tiny_trace(), source, TABLES)
    extra = {ENTRY: ""}
    torch.jit.save(torch.jit.load(source, _extra_files=extra), path, _extra_files=extra)
    assert read_tables(path) == TABLES


@pytest.mark.parametrize(("module", "tables"), [(nn.Linear(2, 3), TABLES), (None, {})], ids=["eager", "no tables"])
def test_what_cannot_be_embedded_leaves_the_old_file(
    module: nn.Module | None, tables: dict[str, ClassTable], tmp_path: Path
) -> None:
    path = tmp_path / "model.ts"
    path.write_bytes(b"old")
    with pytest.raises(CheckpointFileError):
        embed_tables(module or tiny_trace(), str(path), tables)  # type: ignore[arg-type]
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointFileError, match="mkdir -p"):
        embed_tables(tiny_trace(), str(tmp_path / "none" / "model.ts"), TABLES)


def test_files_without_tables_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.ts"
    with pytest.raises(CheckpointFileError, match="FileNotFoundError"):
        read_tables(str(path))
    path.write_bytes(b"no zip")
    with pytest.raises(CheckpointFileError, match="neither a zip archive nor an ONNX graph"):
        read_tables(str(path))
    tiny_trace().save(str(path))
    with pytest.raises(CheckpointFileError, match="embed_tables"):
        read_tables(str(path))
    for content, found in (("{", "JSONDecodeError"), ("[]", "list"), ('{"version": 99}', "version 99")):
        torch.jit.save(tiny_trace(), str(path), _extra_files={ENTRY: content})
        with pytest.raises(CheckpointFileError, match=found):
            read_tables(str(path))
