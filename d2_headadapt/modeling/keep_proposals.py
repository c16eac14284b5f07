"""Second proposals: what the frozen RPN's features show beside its own proposals, seen by added classes only.

A   anchors per cell
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from detectron2.structures import Boxes, Instances, pairwise_iou
from torch import nn

from ..errors import ConfigError
from ..key import HEAD_ADAPT

MOST = 100
"""Second proposals of an image. With 300 the AP on blood cells was no higher and an image took half as long again."""
SAME = 0.7
"""A second proposal that overlaps an old one by so much (IoU) shows nothing new."""


@contextmanager
def inputs_of(module: nn.Module) -> Iterator[list[torch.Tensor]]:
    """Record what ``module`` is called with, in order, while the context is open."""
    seen: list[torch.Tensor] = []
    handle = module.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    try:
        yield seen
    finally:
        handle.remove()


def why_not_second(rpn: Any) -> str | None:
    """Say why this proposal generator cannot have second proposals; ``None`` where it can."""
    head = getattr(rpn, "rpn_head", None)
    layers = [getattr(head, name, None) for name in ("objectness_logits", "anchor_deltas")]
    if not all(isinstance(layer, nn.Conv2d) and layer.kernel_size == (1, 1) for layer in layers):
        return "its last layers are not 1x1 convolutions named objectness_logits and anchor_deltas"
    if rpn.anchor_generator.box_dim != 4:
        return "its boxes are rotated"
    return None


class SecondProposals(nn.Module):
    """Objectness and anchor deltas of their own on the hidden features of a frozen ``RPN``.

    Off until a fit finds that they pay: the buffer ``on`` says so, and travels with the weights.

    Args:
        rpn: detectron2's ``RPN``.

    Raises:
        ConfigError: an RPN of another kind.
    """

    on: torch.Tensor
    objectness_logits: nn.Conv2d
    anchor_deltas: nn.Conv2d

    def __init__(self, rpn: Any) -> None:
        super().__init__()
        problem = why_not_second(rpn)
        if problem is not None:
            raise ConfigError(
                HEAD_ADAPT.KEEP_PROPOSALS,
                expected="an RPN whose features a second layer can read",
                found=f"{type(rpn).__name__}: {problem}",
                fix=f"Set {HEAD_ADAPT.KEEP_PROPOSALS.set('off')}.",
            )
        for name in ("objectness_logits", "anchor_deltas"):
            old = getattr(rpn.rpn_head, name)
            layer = nn.Conv2d(old.in_channels, old.out_channels, 1)
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
            setattr(self, name, layer)
        self.register_buffer("on", torch.tensor(False))

    @torch.no_grad()
    def forward(self, rpn: Any, features: Mapping[str, torch.Tensor], proposals: Sequence[Instances]) -> list[Boxes]:
        """Propose second regions of each image, best first, at most :data:`MOST`.

        Args:
            rpn: whose features are read.
            features: of the backbone.
            proposals: the old ones; second ones that overlap them by :data:`SAME` are dropped.
        """
        maps = [features[name] for name in rpn.in_features]
        seen = hidden_of(rpn, maps)
        logits = [self.objectness_logits(x).permute(0, 2, 3, 1).flatten(1) for x in seen]
        deltas = [
            y.view(y.shape[0], -1, 4, y.shape[-2], y.shape[-1]).permute(0, 3, 4, 1, 2).flatten(1, -2)
            for y in (self.anchor_deltas(x) for x in seen)
        ]
        sizes = [image.image_size for image in proposals]
        found = rpn.predict_proposals(rpn.anchor_generator(maps), logits, deltas, sizes)
        return [
            new_boxes(second.proposal_boxes, old.proposal_boxes) for second, old in zip(found, proposals, strict=True)
        ]


class KeptRPN:
    """Put before the class of an RPN: what its last layers read stays until the packs have read it too."""

    hidden: tuple[torch.Tensor, list[torch.Tensor]] | None = None
    """The first feature map, and the hidden features by level."""

    def forward(self, images: Any, features: dict[str, torch.Tensor], gt_instances: Any = None) -> Any:
        """Run the parent."""
        with inputs_of(self.rpn_head.objectness_logits) as seen:  # type: ignore[attr-defined]
            out = super().forward(images, features, gt_instances)  # type: ignore[misc]
        self.hidden = (features[self.in_features[0]], seen)  # type: ignore[attr-defined]
        return out


def hidden_of(rpn: Any, maps: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Compute what the last layers of an RPN read of feature maps, again only where it was of others just now."""
    known: tuple[torch.Tensor, list[torch.Tensor]] | None = getattr(rpn, "hidden", None)
    if known is not None and known[0] is maps[0]:
        return known[1]
    with inputs_of(rpn.rpn_head.objectness_logits) as seen:
        rpn.rpn_head(list(maps))
    return seen


def new_boxes(second: Boxes, old: Boxes) -> Boxes:
    """Pick those of ``second`` that no box of ``old`` overlaps by :data:`SAME`, at most :data:`MOST`."""
    if old.tensor.shape[0] == 0:
        return Boxes(second.tensor[:MOST])
    near = (pairwise_iou(second, old) >= SAME).any(dim=1)
    return Boxes(second.tensor[~near][:MOST])
