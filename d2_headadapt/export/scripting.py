"""Script a model: our heads call ``super()``, which TorchScript does not compile, so a copy takes stock's classes.

Without tasks ours add nothing when they predict, and their state dict is stock's.
"""

from __future__ import annotations

import copy
from typing import NoReturn

import torch
from detectron2.export import scripting_with_instances
from detectron2.modeling.meta_arch import GeneralizedRCNN
from detectron2.modeling.roi_heads import CascadeROIHeads, FastRCNNOutputLayers, Res5ROIHeads, StandardROIHeads
from detectron2.structures import Boxes
from torch import nn

from ..errors import ExportError
from ..modeling.classifier import MultiTaskClassifier
from ..modeling.predictor import HeadAdaptOutputLayers
from ..modeling.roi_heads import HeadAdaptRes5ROIHeads, HeadAdaptROIHeads
from ..modeling.task_boxes import has_tasks
from ..modeling.text.predictor import HeadAdaptTextOutputLayers

STOCK: dict[type[nn.Module], type[nn.Module]] = {
    HeadAdaptROIHeads: StandardROIHeads,
    HeadAdaptRes5ROIHeads: Res5ROIHeads,
    HeadAdaptOutputLayers: FastRCNNOutputLayers,
    HeadAdaptTextOutputLayers: FastRCNNOutputLayers,
}
"""Our classes, and those that predict the same without tasks."""

FIELDS = {
    "proposal_boxes": Boxes,
    "objectness_logits": torch.Tensor,
    "pred_boxes": Boxes,
    "scores": torch.Tensor,
    "pred_classes": torch.Tensor,
    "pred_masks": torch.Tensor,
    "pred_keypoints": torch.Tensor,
    "pred_keypoint_heatmaps": torch.Tensor,
}
"""What ``Instances`` may hold in a scripted model; those of detectron2's tools/deploy/export_model.py."""


def as_stock(model: nn.Module) -> nn.Module:
    """Copy a model so that our heads are of stock's classes; its state dict is the same.

    Raises:
        ExportError: something of the model has no class of stock's, or stock's cannot be scripted either.
    """
    where = f"format scripted, {type(model).__name__}"
    if isinstance(model, MultiTaskClassifier):
        _refuse(where, "a detector", "tasks on images, whose outputs TorchScript does not compile")
    made = copy.deepcopy(model)
    for name, module in made.named_modules():
        kind = type(module)
        if has_tasks(module):
            _refuse(f"{where}, {name}", "a model without tasks", "tasks on boxes, which no class of stock's predicts")
        if isinstance(module, CascadeROIHeads):
            _refuse(f"{where}, {name}", "heads that stock detectron2 can script", f"{kind.__name__}, which it cannot")
        if kind in STOCK:
            module.__class__ = STOCK[kind]
        elif kind.__module__.partition(".")[0] == __name__.partition(".")[0] and isinstance(module, tuple(STOCK)):
            _refuse(f"{where}, {name}", f"one of {', '.join(k.__name__ for k in STOCK)}", kind.__name__)
    return made


def script(model: nn.Module) -> torch.jit.ScriptModule:
    """Script a model: called with ``({"image": (3, H, W)},)`` it gives a list with one dict of tensors.

    Args:
        model: in evaluation mode.

    Raises:
        ExportError: TorchScript does not compile it.
    """
    plain = as_stock(model)
    adapter: nn.Module = (_Proposals if isinstance(plain, GeneralizedRCNN) else _Dense)(plain)
    try:
        made: torch.jit.ScriptModule = scripting_with_instances(adapter.eval(), FIELDS)
    except Exception as exc:
        # The first line is often no more than a signature.
        text = " ".join(str(exc).split()) or type(exc).__name__
        _refuse(f"format scripted, {type(model).__name__}", "a model that TorchScript compiles", text[:300], exc)
    return made


class _Proposals(nn.Module):
    # Dicts instead of Instances, which a process that loads the file has no class for.
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: tuple[dict[str, torch.Tensor]]) -> list[dict[str, torch.Tensor]]:
        instances = self.model.inference(inputs, do_postprocess=False)  # type: ignore[operator]
        return [i.get_fields() for i in instances]


class _Dense(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: tuple[dict[str, torch.Tensor]]) -> list[dict[str, torch.Tensor]]:
        instances = self.model(inputs)
        return [i.get_fields() for i in instances]


def _refuse(where: str, expected: str, found: str, cause: BaseException | None = None) -> NoReturn:
    raise ExportError(where, expected=expected, found=found, fix="Type --format traced.") from cause
