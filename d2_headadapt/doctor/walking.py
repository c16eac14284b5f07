"""Run the parts of a detector one by one on zeros or on the meta device, to see where shapes do not fit.

A whole detector does not run on the meta device (which boxes survive depends on values), its parts do. What stands
between them, pooling and non-maximum suppression, is replaced by the shape that it hands on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from detectron2.modeling.backbone import Backbone
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from detectron2.modeling.meta_arch.panoptic_fpn import PanopticFPN
from detectron2.modeling.meta_arch.semantic_seg import SemanticSegmentor
from detectron2.modeling.proposal_generator import RPN
from detectron2.modeling.roi_heads import CascadeROIHeads, Res5ROIHeads, StandardROIHeads
from detectron2.modeling.roi_heads.keypoint_head import BaseKeypointRCNNHead
from detectron2.modeling.roi_heads.mask_head import BaseMaskRCNNHead
from torch import nn

from ..adapt.report import shape_text
from ..modeling.task_boxes import has_tasks
from ..modeling.task_dry_run import evaluating, padded_size

SIDE = 64
"""Height and width (pixels) of the image that is thought of, before padding."""


@dataclass(frozen=True)
class Trouble:
    """The place where a walk stopped.

    Args:
        module: dotted name of the innermost module that was running.
        kind: its class.
        inputs: shapes of the tensors that it got.
        part: dotted name of the part of the detector that was run, and its class.
        message: torch's; or what came out, where the batch was lost.
        batch_lost: the part ran, and gives another number of rows than it got.
    """

    module: str
    kind: str
    inputs: str
    part: str
    message: str
    batch_lost: bool = False


class Stopped(Exception):
    """An exception that carries the trouble out of a walk."""

    def __init__(self, trouble: Trouble) -> None:
        self.trouble = trouble
        super().__init__(trouble.message)


@torch.no_grad()
def walk(model: nn.Module, channels: int, batch: int) -> Trouble | None:
    """Run the parts of a detector in evaluation mode; return the first trouble, or ``None``.

    Parts whose surroundings are not detectron2's own (a class that overrides how its heads are called) are left out:
    nobody knows what they get.

    Args:
        model: on the meta device, or on the CPU.
        channels: of an image.
        batch: number of images, and of regions in the box, mask and keypoint heads.
    """
    with _Watched(model) as watched, evaluating(model), torch.random.fork_rng(devices=[]):
        try:
            _run_parts(model, watched, channels, batch)
        except Stopped as stopped:
            return stopped.trouble
    return None


class _Watched:
    """A stack of the modules that are running, by hooks that go when the walk ends."""

    def __init__(self, model: nn.Module) -> None:
        self.names = {id(module): name for name, module in model.named_modules()}
        self.device = next((p.device for p in model.parameters()), torch.device("cpu"))
        self.running: list[tuple[nn.Module, str]] = []
        self._handles: list[Any] = []
        self._model = model

    def __enter__(self) -> _Watched:
        for module in self._model.modules():
            self._handles.append(module.register_forward_pre_hook(self._enter))
            self._handles.append(module.register_forward_hook(self._leave))
        return self

    def __exit__(self, *unused: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _enter(self, module: nn.Module, inputs: Any) -> None:
        self.running.append((module, ", ".join(shape_text(t.shape) for t in tensors_of(inputs))))

    def _leave(self, *unused: Any) -> None:
        self.running.pop()

    def run(self, part: nn.Module, call: Callable[..., Any], *inputs: Any, rows: int) -> Any:
        """Run a part and check that every tensor of its output has ``rows`` rows."""
        name = f"{self.names[id(part)]} ({type(part).__name__})"
        given = ", ".join(shape_text(t.shape) for t in tensors_of(inputs))
        self.running.clear()
        try:
            made = call(*inputs)
        except Exception as error:
            module, shapes = self.running[-1] if self.running else (part, given)
            message = " ".join(str(error).split()) or type(error).__name__
            raise Stopped(
                Trouble(self.names[id(module)], type(module).__name__, shapes or given, name, message)
            ) from error
        for tensor in tensors_of(made):
            if tensor.dim() == 0 or tensor.shape[0] != rows:
                raise Stopped(
                    Trouble(self.names[id(part)], type(part).__name__, given, name, shape_text(tensor.shape), True)
                )
        return made


def tensors_of(value: Any) -> Iterator[torch.Tensor]:
    """Yield every tensor in nested lists, tuples and dicts."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from tensors_of(inner)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from tensors_of(inner)


def _run_parts(model: nn.Module, watched: _Watched, channels: int, batch: int) -> None:
    backbone = getattr(model, "backbone", None)
    if not isinstance(backbone, Backbone):
        return
    height, width = padded_size(backbone, (SIDE, SIDE))
    image = torch.zeros(batch, channels, height, width, device=watched.device)
    features = watched.run(backbone, backbone, image, rows=batch)
    if isinstance(model, DenseDetector):
        levels = [features[f] for f in model.head_in_features or sorted(features)]
        watched.run(model.head, model.head, levels, rows=batch)
    if isinstance(model, (SemanticSegmentor, PanopticFPN)):
        head = model.sem_seg_head
        watched.run(head, lambda maps: head(maps)[0], features, rows=batch)
    generator = getattr(model, "proposal_generator", None)
    if isinstance(generator, RPN):
        levels = [features[f] for f in generator.in_features]
        watched.run(generator.rpn_head, generator.rpn_head, levels, rows=batch)
    _run_roi_heads(getattr(model, "roi_heads", None), watched, features, batch)


def _run_roi_heads(heads: Any, watched: _Watched, features: Mapping[str, torch.Tensor], rows: int) -> None:
    kind = type(heads)
    if isinstance(heads, Res5ROIHeads):
        if kind.forward is Res5ROIHeads.forward and kind._shared_roi_transform is Res5ROIHeads._shared_roi_transform:
            pooled = _pooled(features, heads.in_features, heads.pooler, rows)
            maps = watched.run(heads.res5, heads.res5, pooled, rows=rows)
            with _said_by(heads, watched, maps):
                vectors = maps.mean(dim=[2, 3])
            _run_predictor(heads.box_predictor, watched, vectors, rows)
            _run_layers(getattr(heads, "mask_head", None), watched, maps, rows)
        return
    if not isinstance(heads, StandardROIHeads):
        return
    if isinstance(heads, CascadeROIHeads) and kind._forward_box is CascadeROIHeads._forward_box:
        pooled = _pooled(features, heads.box_in_features, heads.box_pooler, rows)
        if kind._run_stage is CascadeROIHeads._run_stage:
            for head, predictor in zip(heads.box_head, heads.box_predictor, strict=True):
                _run_predictor(predictor, watched, watched.run(head, head, pooled, rows=rows), rows)
    elif kind._forward_box is StandardROIHeads._forward_box:
        pooled = _pooled(features, heads.box_in_features, heads.box_pooler, rows)
        vectors = watched.run(heads.box_head, heads.box_head, pooled, rows=rows)
        _run_predictor(heads.box_predictor, watched, vectors, rows)
    for name in ("mask", "keypoint"):
        stock = getattr(kind, f"_forward_{name}") is getattr(StandardROIHeads, f"_forward_{name}")
        pooler = getattr(heads, f"{name}_pooler", None)
        if stock and pooler is not None:
            pooled = _pooled(features, getattr(heads, f"{name}_in_features"), pooler, rows)
            _run_layers(getattr(heads, f"{name}_head", None), watched, pooled, rows)


def _pooled(features: Mapping[str, torch.Tensor], names: Sequence[str], pooler: Any, rows: int) -> torch.Tensor:
    """Compute the shape of pooled regions: the channels of a map, the pooler's height and width."""
    first = features[names[0]]
    return first.new_zeros(rows, first.shape[1], *pooler.output_size)


def _run_predictor(predictor: nn.Module, watched: _Watched, vectors: torch.Tensor, rows: int) -> None:
    made = watched.run(predictor, predictor, vectors, rows=rows)
    seen = getattr(made, "features", None)
    if has_tasks(predictor) and isinstance(seen, torch.Tensor):
        tasks: Any = predictor.tasks
        watched.run(tasks, tasks, seen, rows=rows)


def _run_layers(head: Any, watched: _Watched, maps: torch.Tensor, rows: int) -> None:
    """Run a mask or keypoint head without its loss."""
    for base in (BaseMaskRCNNHead, BaseKeypointRCNNHead):
        if isinstance(head, base) and type(head).forward is base.forward:
            watched.run(head, head.layers, maps, rows=rows)


@contextmanager
def _said_by(part: nn.Module, watched: _Watched, given: torch.Tensor) -> Iterator[None]:
    """Turn an exception between two modules into trouble of the part around them."""
    try:
        yield
    except Exception as error:
        name, kind = watched.names[id(part)], type(part).__name__
        raise Stopped(Trouble(name, kind, shape_text(given.shape), f"{name} ({kind})", str(error))) from error
