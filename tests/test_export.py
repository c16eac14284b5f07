"""Models with our heads leave as TorchScript: the same numbers as eager, and their class names in the file."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.export import TracingAdapter, scripting_with_instances
from detectron2.structures import Boxes
from detectron2.utils.testing import convert_scripted_instances
from helpers.box_tasks import TASKS, task_model
from helpers.models import OURS, model_of, names, state_of, stock_model
from torch import nn

from d2_headadapt.classes import ClassTable
from d2_headadapt.errors import CheckpointFileError
from d2_headadapt.exporting import ENTRY, embed_tables, read_tables

FIELDS = {
    "proposal_boxes": Boxes,
    "objectness_logits": torch.Tensor,
    "pred_boxes": Boxes,
    "scores": torch.Tensor,
    "pred_classes": torch.Tensor,
    "pred_masks": torch.Tensor,
}
TABLES = {
    "thing": ClassTable(names(5)),
    "colour": ClassTable(["rot", "grün", "blå"]),
}


def image(seed: int, height: int = 96, width: int = 96) -> torch.Tensor:
    """Noise (3, height, width); even and odd seeds are of different brightness."""
    noise = torch.rand(3, height, width, generator=torch.Generator().manual_seed(seed))
    return noise * (255 if seed % 2 else 120)


def inference(model: nn.Module, inputs: list[dict[str, torch.Tensor]]) -> Any:
    """As stock's export tool calls a model: masks are not pasted into the image."""
    return model.inference(inputs, do_postprocess=False)


def with_threshold(model: nn.Module, images: list[torch.Tensor]) -> nn.Module:
    """Leave about half of all detections, so that images differ in their number."""
    with torch.no_grad():
        found = model.eval()([{"image": each} for each in images])
    last = model.roi_heads.box_predictor
    last = last[-1] if isinstance(last, nn.ModuleList) else last
    last.test_score_thresh = float(torch.cat([each["instances"].scores for each in found]).median())
    return model


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


def assert_scripts(model: nn.Module, reference: nn.Module) -> None:
    """Script ``model`` and compare it with ``reference``, eager."""
    scripted = scripting_with_instances(model.eval(), FIELDS)
    with torch.no_grad():
        (eager,) = inference(reference.eval(), [{"image": image(1)}])
        found = convert_scripted_instances(scripted.inference([{"image": image(1)}], do_postprocess=False)[0])
    assert len(eager) > 0
    assert_same_bits(
        tuple(getattr(value, "tensor", value) for value in eager.get_fields().values()),
        tuple(getattr(found.get(name), "tensor", found.get(name)) for name in eager.get_fields()),
    )


@pytest.mark.parametrize("kind", ["standard", "c4"])
@pytest.mark.xfail(strict=True, raises=RuntimeError, reason="TorchScript compiles no super(), which our heads call")
def test_our_heads_can_be_scripted(kind: str) -> None:
    model = model_of(names(5), kind, masks=True)
    assert_scripts(model, model)


@pytest.mark.parametrize("kind", ["standard", "c4"])
def test_without_tasks_stock_heads_take_the_weights_and_can_be_scripted(kind: str) -> None:
    ours = model_of(names(5), kind, masks=True)
    stock = stock_model(5, kind, masks=True, seed=1)
    stock.load_state_dict(state_of(ours), strict=True)
    assert_scripts(stock, ours)


def test_stock_cascades_cannot_be_scripted_either() -> None:
    with pytest.raises(RuntimeError, match="CascadeROIHeads"):
        scripting_with_instances(stock_model(5, "cascade").eval(), FIELDS)


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
    with pytest.raises(CheckpointFileError, match="BadZipFile"):
        read_tables(str(path))
    tiny_trace().save(str(path))
    with pytest.raises(CheckpointFileError, match="embed_tables"):
        read_tables(str(path))
    for content, found in (("{", "JSONDecodeError"), ("[]", "list"), ('{"version": 99}', "version 99")):
        torch.jit.save(tiny_trace(), str(path), _extra_files={ENTRY: content})
        with pytest.raises(CheckpointFileError, match=found):
            read_tables(str(path))
