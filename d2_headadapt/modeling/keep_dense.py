"""``KEEP: exact`` behind a RetinaNet: a classifier and boxes of their own on the old head's features.

A   anchors per cell
N   number of classes of a pack
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from detectron2.structures import Instances
from torch import nn

from ..adapt.layouts import HeadLayout
from ..adapt.registry import ModuleContext
from ..config.keep import KeepSettings, PackSpec
from ..errors import ConfigError
from ..key import HEAD_ADAPT
from .keep import Keep, KeptModel, joined, pack_space
from .keep_proposals import inputs_of


class DensePack(nn.Module):
    """The classes that one session added to a RetinaNet.

    Args:
        spec: its classes.
        number: its place among the packs.
        model: a ``RetinaNet``, which is read and not changed.
    """

    def __init__(self, spec: PackSpec, number: int, model: Any) -> None:
        super().__init__()
        self.spec = spec
        self.space = pack_space(number)
        self.anchors = model.anchor_generator.num_anchors[0]
        self.cls_score = _like(model.head.cls_score, self.anchors * len(spec.classes))
        nn.init.normal_(self.cls_score.weight, std=0.01)
        nn.init.constant_(self.cls_score.bias, -math.log((1 - 0.01) / 0.01))  # type: ignore[arg-type]
        self.bbox_pred = _like(model.head.bbox_pred, model.head.bbox_pred.out_channels)
        # The model's own anchors, matcher, losses and decoding, for N classes; no child of this module.
        view = copy.copy(model)
        view.num_classes = len(spec.classes)
        self._view = (view,)

    @property
    def view(self) -> Any:
        """The model as if it had this pack's classes alone; its modules are the model's."""
        return self._view[0]

    def head_layouts(self, context: ModuleContext) -> Iterable[HeadLayout]:
        """Row = anchor x N + class; boxes know no class."""
        for leaf in ("weight", "bias"):
            yield HeadLayout(f"{context.name}.cls_score.{leaf}", self.space, self.space, "head", groups=self.anchors)
            yield HeadLayout(
                f"{context.name}.bbox_pred.{leaf}", self.space, self.space, "head", axes=(), rows_per_class=4,
                groups=self.anchors,
            )  # fmt: skip

    def begin(self, model: Any) -> None:
        """Start the boxes from the old ones, which are loaded by now."""
        self.bbox_pred.load_state_dict(model.head.bbox_pred.state_dict())

    def predictions(self, seen: tuple[list[torch.Tensor], list[torch.Tensor]]) -> list[list[torch.Tensor]]:
        """Predict logits and deltas by level, as ``RetinaNetHead`` does, of what its last layers read."""
        return [[self.cls_score(x) for x in seen[0]], [self.bbox_pred(x) for x in seen[1]]]


def _like(layer: nn.Conv2d, channels: int) -> nn.Conv2d:
    size: Any = layer.kernel_size
    padding: Any = layer.padding
    return nn.Conv2d(layer.in_channels, channels, size, padding=padding)


class KeptRetinaNet(KeptModel):
    """Put before the class of a RetinaNet: its own detections, then those of the packs."""

    keep: Keep

    def forward(self, batched_inputs: list[dict[str, Any]]) -> Any:
        """Run the parent, and keep what the last layers of its head read for the packs."""
        with inputs_of(self.head.cls_score) as scores, inputs_of(self.head.bbox_pred) as boxes:  # type: ignore[attr-defined]
            self.seen = (scores, boxes)
            out = super().forward(batched_inputs)  # type: ignore[misc]
        self.seen = ([], [])
        return out

    def forward_training(
        self, images: Any, features: list[torch.Tensor], predictions: Any, gt_instances: list[Instances]
    ) -> dict[str, torch.Tensor]:
        """Compute the losses of the packs that this session trains."""
        losses: dict[str, torch.Tensor] = {}
        for i in self.keep.settings.trained:
            pack: Any = self.keep.packs[i]
            targets = self.keep.own_targets(i, gt_instances)
            own = pack.view.forward_training(images, features, pack.predictions(self.seen), targets)
            several = len(self.keep.settings.trained) > 1
            losses.update({f"{name}_pack{i}" if several else name: value for name, value in own.items()})
        return losses

    def forward_inference(self, images: Any, features: list[torch.Tensor], predictions: Any) -> list[Instances]:
        """Detect like the parent, then add the detections of each pack."""
        out: list[Instances] = super().forward_inference(images, features, predictions)  # type: ignore[misc]
        for i, module in enumerate(self.keep.packs):
            pack: Any = module
            found = pack.view.forward_inference(images, features, pack.predictions(self.seen))
            out = [self._joined(a, b, i) for a, b in zip(out, found, strict=True)]
        return out

    def _joined(self, old: Instances, new: Instances, number: int) -> Instances:
        new.pred_classes = new.pred_classes + self.keep.offset(number)
        return joined(old, new, self.keep.settings, len(self.keep.settings.old))


def build_dense_packs(settings: KeepSettings, model: Any) -> Sequence[DensePack]:
    """Build the packs of a RetinaNet.

    Raises:
        ConfigError: a copied head, or second proposals, which a dense model does not have.
    """
    for key, asked, value in (
        ("KEEP_HEAD", any(spec.head == "copy" for spec in settings.packs), "shared"),
        ("KEEP_PROPOSALS", settings.proposals == "on", "auto"),
    ):
        if asked:
            raise ConfigError(
                HEAD_ADAPT[key],
                expected=f"{value}: {type(model).__name__} has no box head and no proposals",
                found="copy" if key == "KEEP_HEAD" else "on",
                fix=f"Set {HEAD_ADAPT[key].set(value)}.",
            )
    found = []
    with torch.random.fork_rng(devices=[]):
        for i, spec in enumerate(settings.packs):
            # The same rows on every rank, and no random number of the model's own stream.
            torch.manual_seed(i)
            found.append(DensePack(spec, i, model))
    return found
