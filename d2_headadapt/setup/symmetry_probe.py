"""Ask a model's own training loss which rows are those of a class, where shapes leave several meanings.

Every class-sized tensor of a model for three classes is filled with one number, so that no class differs from another.
Then the loss of one image whose every object is of class c is the same problem for c = 0, 1 and 2, but for the names of
the rows: what differs in the gradient between the three is what belongs to a class. One reading of a tensor that alone
contains these rows is its meaning. This runs a forward and a backward pass three times, so it is done on request.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from detectron2.structures import BitMasks, Boxes, Instances, Keypoints
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import EventStorage
from torch import nn

from ..adapt.discovery import ClassSized, Discovery, Evidence, Found, Refusal, RefusalCause
from ..adapt.layouts import HeadLayout
from .shape_builds import nothing_changed

CLASSES = 3
"""Two could not tell the rows of a class from those of the other."""
Batch = Callable[[str, int], Any]
_TOLERANCE = 1e-4
"""Of the largest gradient of a tensor: the same sum in another order differs by less, another class by far more."""


def synthetic_batch(space: str, c: int, *, size: int = 64) -> list[dict[str, Any]]:
    """Draw one random image of ``size`` pixels a side, in detectron2's format, whose objects are all of class ``c``.

    Args:
        space: where ``c`` counts: ``thing`` (boxes and masks), ``stuff`` (every pixel) or ``keypoint`` (of one object
            that shows no other keypoint).
        c: 0, 1 or 2.
    """
    generator = torch.Generator().manual_seed(0)
    instances = Instances((size, size))
    corners = torch.rand(4, 2, generator=generator) * size / 2
    instances.gt_boxes = Boxes(torch.cat([corners, corners + size / 4 + torch.rand(4, 2, generator=generator) * 8], 1))
    instances.gt_classes = torch.full((4,), c if space == "thing" else 0)
    instances.gt_masks = BitMasks(torch.rand(4, size, size, generator=generator) > 0.5)
    points = torch.zeros(4, CLASSES, 3)
    shown = c if space == "keypoint" else 0
    points[:, shown, :2], points[:, shown, 2] = corners + size / 8, 2
    instances.gt_keypoints = Keypoints(points)
    image = (torch.rand(3, size, size, generator=generator) * 255).byte()
    stuff = torch.full((size, size), c if space == "stuff" else 0)
    return [{"image": image, "height": size, "width": size, "instances": instances, "sem_seg": stuff}]


def probe_refused(
    build: Callable[[Mapping[str, int]], nn.Module],
    counts: Mapping[str, int],
    found: Discovery,
    batch: Batch = synthetic_batch,
) -> Discovery:
    """Decide refused tensors by the symmetry of the training loss; what shows no signal stays refused.

    Args:
        build: makes the model on the CPU with these counts, initialised.
        counts: key -> the config's own count.
        found: by :func:`d2_headadapt.setup.count_keys.discover`.
        batch: (label space, class) -> what the model trains on.

    Raises:
        Exception: whatever the model raises on that batch.
    """
    decided: dict[str, HeadLayout] = {}
    for family in found.families:
        open_ = [
            refusal
            for refusal in found.refused
            if refusal.sized.key == family.keys[0]
            and refusal.cause in (RefusalCause.TWO_MEANINGS, RefusalCause.FEATURES_OR_CLASSES_FIRST)
        ]
        if open_:
            three = {**counts, **dict.fromkeys(family.keys, CLASSES)}
            sized = [x for x in found.sized.values() if x.key == family.keys[0]]
            with nothing_changed():
                gradients = _gradients(build(three), sized, family.space, batch)
            decided.update(_decide(open_, gradients))
    entries = [Found(x.sized, decided[x.sized.tensor], Evidence.SYMMETRY) for x in found.refused if _in(x, decided)]
    return replace(
        found,
        found=(*found.found, *entries),
        refused=tuple(x for x in found.refused if not _in(x, decided)),
    )


def _in(refusal: Refusal, decided: Mapping[str, HeadLayout]) -> bool:
    return refusal.sized.tensor in decided


def _gradients(
    model: nn.Module, sized: Sequence[ClassSized], space: str, batch: Batch
) -> list[dict[str, torch.Tensor]]:
    """Compute the gradient of every class-sized parameter for each class's image."""
    model.train()
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
    names = {x.tensor for x in sized}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in names:
                parameter.fill_(0.01)
    gradients = []
    for c in range(CLASSES):
        # A copy each, because a model may keep what it saw (RetinaNet a moving normaliser).
        one = copy.deepcopy(model)
        seed_all_rng(1)
        with torch.enable_grad(), EventStorage():
            losses = one(batch(space, c))
            total = torch.stack(list(losses.values())).sum() if isinstance(losses, Mapping) else losses
            total.backward()
        parameters = dict(one.named_parameters(remove_duplicate=False))
        gradients.append({n: p.grad for n, p in parameters.items() if n in names and p.grad is not None})
    return gradients


def _decide(refused: Sequence[Refusal], gradients: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, HeadLayout]:
    decided: dict[str, HeadLayout] = {}
    for refusal in refused:
        name = refusal.sized.tensor
        seen = [gradient[name] for gradient in gradients if name in gradient]
        if len(seen) == CLASSES:
            left = [meaning for meaning in refusal.meanings if _contains(meaning, seen)]
            if len(left) == 1:
                decided[name] = left[0]
    # A weight whose features were all zero, or another stage that saw nothing, goes with its like.
    for refusal in refused:
        like = [
            other.sized.tensor
            for other in refused
            if other.sized.tensor in decided
            and [(a.slope, a.rest) for a in other.sized.axes] == [(a.slope, a.rest) for a in refusal.sized.axes]
            and other.sized.tensor.rpartition(".")[0] == refusal.sized.tensor.rpartition(".")[0]
        ]
        for meaning in refusal.meanings if like and refusal.sized.tensor not in decided else ():
            if meaning.same_kind(decided[like[0]]):
                decided[refusal.sized.tensor] = meaning
    return decided


def _contains(meaning: HeadLayout, seen: Sequence[torch.Tensor]) -> bool:
    """Tell whether every class axis showed something of each class, and all of it within that class's rows."""
    for axis in meaning.class_axes:
        if not meaning.fits(seen[0].shape, CLASSES):
            return False
        flat = torch.stack([g.movedim(axis, 0).flatten(1) if g.dim() > 1 else g[:, None] for g in seen])
        limit = _TOLERANCE * float(flat.abs().max())
        for c in range(CLASSES):
            one, other = (flat[i] for i in range(CLASSES) if i != c)
            apart = ((flat[c] - one).abs().amax(1) > limit) & ((flat[c] - other).abs().amax(1) > limit)
            alike = (one - other).abs().amax(1) <= limit
            rows = set((apart & alike).nonzero().flatten().tolist())
            if not rows or not rows <= set(meaning.rows([c], CLASSES, axis).tolist()):
                return False
    return True
