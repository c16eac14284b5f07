"""Flatten a model for export: one image in, named tensors out, before anything is scaled back to a photograph.

H, W   of the image that the model sees, in pixels
n      number of detections
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from detectron2.export import TracingAdapter
from detectron2.export.flatten import DictSchema, InstancesSchema, ListSchema
from detectron2.modeling.meta_arch import GeneralizedRCNN, PanopticFPN
from torch import nn

from ..modeling.classifier import MultiTaskClassifier


class FlatModel:
    """A model that is called with an image and answers with tensors by name, in the order of an exported tuple.

    As in stock's export tool, masks stay as the mask head gives them, (n, 1, side, side), and boxes are in the pixels
    of the image that was given. ``image_size`` (H, W) comes with detections.

    Args:
        model: in evaluation mode.
        image: (3, H, W), to learn the names from.

    Attributes:
        adapter: the module from an image to a tuple of tensors, which is exported.
        names: of the tensors of that tuple.
    """

    def __init__(self, model: nn.Module, image: torch.Tensor) -> None:
        self.model = model
        self.image = image
        self.adapter = TracingAdapter(model, [{"image": image}], infer).eval()
        self.adapter(image)
        self.names = _names(self.adapter.outputs_schema)

    def __call__(self, image: torch.Tensor) -> dict[str, torch.Tensor]:
        """Run the model eagerly on an image (3, H, W)."""
        return dict(zip(self.names, self.adapter(image), strict=True))


def infer(model: nn.Module, inputs: list[dict[str, torch.Tensor]]) -> Any:
    """Compute what an exported file does: the model's output for one image, without post-processing where it can."""
    if isinstance(model, MultiTaskClassifier):
        return _image_tasks(model, inputs)
    if isinstance(model, PanopticFPN):
        instances, maps = model.inference(inputs, do_postprocess=False)
        return {"instances": instances[0], "sem_seg": maps[0]}
    if isinstance(model, GeneralizedRCNN):
        return model.inference(inputs, do_postprocess=False)[0]
    return model(inputs)[0]


def _image_tasks(model: MultiTaskClassifier, inputs: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Give ``scores_<task>`` (K,) and ``pred_<task>``: (1,) int64, or (K,) bool for several labels."""
    images = model.preprocess_image(inputs)
    logits = model.logits(images.tensor, images.image_sizes)
    found: dict[str, torch.Tensor] = {}
    for head in model.heads:
        scores = head.scores(logits[head.spec.name])
        chosen = head.chosen(scores)
        found[f"scores_{head.spec.name}"] = scores[0]
        found[f"pred_{head.spec.name}"] = chosen[0] if head.spec.multi else chosen
    return found


def _names(schema: Any) -> tuple[str, ...]:
    """Name each flattened output by its innermost key, or by the whole path where two would be the same."""
    paths = list(_paths(schema, ()))
    short = [path[-1] if path else "output" for path in paths]
    return tuple(
        name if short.count(name) == 1 else ".".join(path) or f"output.{i}"
        for i, (name, path) in enumerate(zip(short, paths, strict=True))
    )


def _paths(schema: Any, above: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    if isinstance(schema, ListSchema):
        keys = schema.keys if isinstance(schema, DictSchema) else [str(i) for i in range(len(schema.schemas))]
        for key, inner in zip(keys, schema.schemas, strict=True):
            yield from _paths(inner, (*above, key))
        if isinstance(schema, InstancesSchema):
            yield (*above, "image_size")
    else:
        yield above
