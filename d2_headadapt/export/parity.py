"""Compare an exported file's outputs with eager's: differences field by field, and what is too much.

n   number of detections
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

TOLERANCE = 1e-4
"""Allowed difference, as a share of the field's largest value in the image and at least of 1: of a score 1e-4, of a box
0.08 pixels in an image of 800. Eager itself differs by that much between two machines."""

Outputs = Mapping[str, torch.Tensor]


@dataclass
class Parity:
    """The differences that comparing images found.

    Attributes:
        images, detections: how many were compared.
        largest: by field, the largest difference; of a class, a label or a size, how many are others.
        shares: by field, the largest difference as a share of what it is measured by, see :data:`TOLERANCE`.
        swapped: detections that stand in another place, because their scores are equal but for rounding.
        ties: detections that only one side has, because rounding decides: at the score threshold, at the limit of an
            image, or in a suppression that eager decides otherwise for an image that is changed by next to nothing.
        problems: what is refused, one line each.
    """

    images: int = 0
    detections: int = 0
    largest: dict[str, float] = field(default_factory=dict)
    shares: dict[str, float] = field(default_factory=dict)
    swapped: int = 0
    ties: int = 0
    problems: list[str] = field(default_factory=list)

    def add(
        self,
        image: str,
        eager: Outputs,
        exported: Outputs,
        cuts: Sequence[float] = (),
        limit: int | None = None,
        nearly: Callable[[], Sequence[Outputs]] = tuple,
    ) -> None:
        """Compare the outputs of one image.

        Args:
            image: its name, for problems.
            eager, exported: tensors by name; ``exported`` may lack ``image_size``, as scripted models do.
            cuts: scores below which a detection is dropped.
            limit: most detections of an image, where there is one.
            nearly: gives eager's outputs for images that are next to the same; asked where one side has a detection
                that the other has not.
        """
        self.images += 1
        missing = [name for name in eager if name not in exported and name != "image_size"]
        if missing:
            self.problems.append(f"{image}: {', '.join(missing)} missing")
            return
        eager = {name: value for name, value in eager.items() if name in exported}
        exported = {name: exported[name] for name in eager}
        if "scores" in eager and "pred_boxes" in eager:
            eager, exported = self._paired(image, eager, exported, cuts, limit, nearly)
        for name, value in eager.items():
            scores = eager.get(f"scores_{name.removeprefix('pred_')}") if name.startswith("pred_") else None
            self._compare(f"{image}: {name}", name, value, exported[name], scores)

    def _paired(
        self,
        image: str,
        eager: Outputs,
        exported: Outputs,
        cuts: Sequence[float],
        limit: int | None,
        nearly: Callable[[], Sequence[Outputs]],
    ) -> tuple[Outputs, Outputs]:
        """Pair both outputs' detections in the same order, leaving out those that only one of them has."""
        counts = eager["scores"].shape, exported["scores"].shape
        self.detections += counts[0][0]
        pairs, alone = _pair(eager, exported)
        self.swapped += sum(i != j for i, j in pairs) if counts[0] == counts[1] else 0
        again = nearly() if any(alone) else ()
        for own, other, rows, who in (
            (eager, exported, alone[0], "eager"),
            (exported, eager, alone[1], "the exported file"),
        ):
            full = [float(other["scores"].min())] if limit is not None and len(other["scores"]) >= limit else []
            # Of eager itself, some runs must lack what only eager has, and some must have what only the file has.
            seen = [set(_pair(own, run)[1][0]) for run in again]
            for row in rows:
                score = float(own["scores"][row])
                if any(abs(score - cut) <= TOLERANCE for cut in (*cuts, *full)) or any(
                    (row in lacking) == (own is eager) for lacking in seen
                ):
                    self.ties += 1
                else:
                    self.problems.append(f"{image}: a detection of score {score:.4f} that only {who} has")
        left, right = (torch.tensor([pair[side] for pair in pairs], dtype=torch.int64) for side in (0, 1))
        per_detection = [
            name
            for name, value in eager.items()
            if name not in ("image_size", "sem_seg") and (value.shape[:1], exported[name].shape[:1]) == counts
        ]
        return (
            {**eager, **{name: eager[name][left] for name in per_detection}},
            {**exported, **{name: exported[name][right] for name in per_detection}},
        )

    def _compare(
        self, where: str, name: str, eager: torch.Tensor, exported: torch.Tensor, scores: torch.Tensor | None
    ) -> None:
        if eager.shape != exported.shape or eager.dtype != exported.dtype:
            found = f"{exported.dtype} {tuple(exported.shape)}"
            self.problems.append(f"{where} is {found}, not {eager.dtype} {tuple(eager.shape)}")
            return
        if eager.is_floating_point():
            # What is no number in both (a keypoint without a map) is the same.
            same = (eager == exported) | (eager.isnan() & exported.isnan())
            difference = torch.where(same, torch.zeros_like(eager), (eager - exported).abs())
            largest = float(difference.max()) if difference.numel() else 0.0
            finite = eager[eager.isfinite()]
            scale = max(1.0, float(finite.abs().max())) if finite.numel() else 1.0
            share = largest / scale
        else:
            wrong = eager != exported
            if scores is not None and wrong.any():
                wrong = wrong & ~_ties(eager, exported, scores)
            largest, share = float(wrong.sum()), float(wrong.any())
        self.largest[name] = max(self.largest.get(name, 0.0), largest)
        self.shares[name] = max(self.shares.get(name, 0.0), share)
        if not share <= TOLERANCE:
            self.problems.append(f"{where} differs by {largest:.3g}")


def _pair(eager: Outputs, exported: Outputs) -> tuple[list[tuple[int, int]], tuple[list[int], list[int]]]:
    """Match rows of the same detection, and list the rows that have no partner on the other side."""
    counts = len(eager["scores"]), len(exported["scores"])
    if not all(counts):
        return [], (list(range(counts[0])), list(range(counts[1])))
    boxes = eager["pred_boxes"], exported["pred_boxes"]
    scale = max(1.0, float(boxes[0].abs().max()))
    cost = (boxes[0][:, None] - boxes[1][None]).abs().amax(dim=2) / scale
    cost = torch.maximum(cost, (eager["scores"][:, None] - exported["scores"][None]).abs())
    if "pred_classes" in eager:
        cost[eager["pred_classes"][:, None] != exported["pred_classes"][None]] = torch.inf
    pairs: list[tuple[int, int]] = []
    free = set(range(counts[1]))
    for i in range(counts[0]):
        # The same place first: two detections may be the same but for a mask or a task.
        order = sorted(free, key=lambda j: (float(cost[i, j]) > TOLERANCE, j != i, float(cost[i, j])))
        if order and cost[i, order[0]] <= TOLERANCE:
            pairs.append((i, order[0]))
            free.discard(order[0])
    paired = {i for i, _ in pairs}
    return pairs, ([i for i in range(counts[0]) if i not in paired], sorted(free))


def _ties(eager: torch.Tensor, exported: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """Mark labels that differ only because two scores, or a score and 0.5, are equal but for rounding."""
    if eager.dtype == torch.bool:
        return (scores - 0.5).abs() <= TOLERANCE
    rows = scores if scores.dim() == 2 else scores[None]
    picked = (rows.gather(1, labels.reshape(-1, 1))[:, 0] for labels in (eager, exported))
    first, second = picked
    return ((first - second).abs() <= TOLERANCE).reshape(eager.shape)


def score_cuts(model: nn.Module) -> tuple[list[float], int | None]:
    """Read the scores below which a model drops a detection, and how many it keeps of an image at most."""
    modules: list[Any] = list(model.modules())
    cuts = [float(module.test_score_thresh) for module in modules if hasattr(module, "test_score_thresh")]
    names = ("test_topk_per_image", "max_detections_per_image")
    limits = [int(getattr(module, name)) for module in modules for name in names if hasattr(module, name)]
    return cuts, min((limit for limit in limits if limit > 0), default=None)
