"""Fit box heads: ``cls_score`` and ``bbox_pred`` of the standard, cascade and C4 ROI heads.

R   regions of a view
K   classes of the head; label K is background
C   features of a region
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from detectron2.structures import Boxes, pairwise_iou
from torch import nn

from .images import ImageStream, View
from .reservoir import Reservoir, room
from .rows import RowWriter, Solution
from .rpn import proposals_of
from .scores import solve_boxes, solve_scores
from .settings import FitSettings, PartReport
from .sharing import gathered, on_rank_zero, placed
from .text import is_text, solve_text, why_not_text


@dataclass(frozen=True)
class Stage:
    """One box predictor.

    Args:
        number: of the cascade; 0 elsewhere.
        name: of the predictor in the model.
        predictor: a ``FastRCNNOutputLayers``.
        threshold: overlap from which a region is an object.
    """

    number: int
    name: str
    predictor: Any
    threshold: float

    @property
    def classifier(self) -> str:
        """Name of the tensor that holds a row for each class."""
        return f"{self.name}.cls_score.{'embeddings' if is_text(self.predictor.cls_score) else 'weight'}"


def stages_of(roi_heads: Any, name: str) -> list[Stage]:
    """List every box predictor of the ROI heads."""
    predictor = getattr(roi_heads, "box_predictor", None)
    if isinstance(predictor, nn.ModuleList):
        matchers = roi_heads.proposal_matchers
        return [
            Stage(i, f"{name}.box_predictor.{i}", one, float(matchers[i].thresholds[-2]))
            for i, one in enumerate(predictor)
        ]
    if predictor is None:
        return []
    # Thresholds stand between -inf and +inf; with an ignore band the upper one is where objects begin.
    return [Stage(0, f"{name}.box_predictor", predictor, float(roi_heads.proposal_matcher.thresholds[-2]))]


def why_not(roi_heads: Any, stage: Stage) -> str | None:
    """Say why a predictor cannot be solved; ``None`` where it can."""
    layers = [getattr(stage.predictor, name, None) for name in ("cls_score", "bbox_pred")]
    if is_text(layers[0]):
        if bool(getattr(stage.predictor, "use_sigmoid_ce", False)):
            return "a text classifier with sigmoids is trained, not solved"
        return why_not_text(layers[0])
    if not all(isinstance(layer, nn.Linear) for layer in layers):
        return "cls_score and bbox_pred are not linear layers"
    if len(stage.predictor.box2box_transform.weights) != 4:
        return "its boxes are rotated"
    if not any(hasattr(roi_heads, pooler) for pooler in ("box_pooler", "pooler")):
        return f"how {type(roi_heads).__name__} pools regions is not known"
    return None


def region_features(roi_heads: Any, stage: Stage, view: View, boxes: Boxes) -> torch.Tensor:
    """Compute what the stage's predictor sees of some boxes, (R, C)."""
    if hasattr(roi_heads, "_shared_roi_transform"):
        x = roi_heads._shared_roi_transform([view.features[name] for name in roi_heads.in_features], [boxes])
        return x.mean(dim=(2, 3))  # type: ignore[no-any-return]
    head = roi_heads.box_head[stage.number] if isinstance(roi_heads.box_head, nn.ModuleList) else roi_heads.box_head
    x = head(roi_heads.box_pooler([view.features[name] for name in roi_heads.box_in_features], [boxes]))
    return x.flatten(1)  # type: ignore[no-any-return]


def region_boxes(rpn: Any, roi_heads: Any, stages: Sequence[Stage], stage: Stage, view: View, limit: int) -> Boxes:
    """Compute the boxes that a stage sees: proposals and the image's own boxes, moved by the stages before it."""
    boxes = proposals_of(rpn, view, limit)
    boxes = Boxes.cat([Boxes(boxes.tensor.detach()), view.truth.gt_boxes])
    for earlier in stages[: stage.number]:
        predictor = earlier.predictor
        _, deltas = predictor(region_features(roi_heads, earlier, view, boxes))
        moved = Boxes(predictor.box2box_transform.apply_deltas(deltas, boxes.tensor))
        moved.clip(view.size)
        boxes = moved[moved.nonempty()]
    return boxes


def collect_regions(
    model: Any, stages: Sequence[Stage], stage: Stage, views: Iterator[View], num_classes: int, settings: FitSettings
) -> Reservoir:
    """Collect regions with their best object, its class, the overlap and the box deltas toward it."""
    rpn, roi_heads = model.proposal_generator, model.roi_heads

    def see(view: View) -> tuple[Boxes, torch.Tensor]:
        boxes = region_boxes(rpn, roi_heads, stages, stage, view, settings.proposals)
        return boxes, region_features(roi_heads, stage, view, boxes) if len(boxes) else boxes.tensor

    return collect_seen(see, stage, views, num_classes, settings)


def collect_seen(
    see: Callable[[View], tuple[Boxes, torch.Tensor]],
    stage: Stage,
    views: Iterator[View],
    num_classes: int,
    settings: FitSettings,
) -> Reservoir:
    """Collect like :func:`collect_regions`, of what ``see`` gives: a view's boxes and what the predictor reads."""
    width = stage.predictor.cls_score.in_features
    regions = max(2, room(settings.regions, width))
    low = settings.soft_iou[0] + stage.threshold - 0.5
    reservoir = Reservoir({num_classes: regions // 2}, regions // 2)
    for view in views:
        boxes, x = see(view)
        if len(boxes) == 0:
            continue
        x = x.float()
        truth = view.truth
        if len(truth):
            overlap, matched = pairwise_iou(boxes, truth.gt_boxes).max(dim=1)
            label = truth.gt_classes[matched]
            target = truth.gt_boxes.tensor[matched]
        else:
            overlap = x.new_zeros(len(boxes))
            label = torch.full((len(boxes),), num_classes, device=x.device)
            target = boxes.tensor
        label = torch.where(overlap >= low, label, torch.full_like(label, num_classes))
        # Far regions have no meaningful deltas (their logarithm may be infinite), and none is used.
        near = overlap >= stage.threshold
        delta = x.new_zeros(len(boxes), 4)
        delta[near] = stage.predictor.box2box_transform.get_deltas(boxes.tensor[near], target[near])
        reservoir.add(view.key, view.number, label, {"x": x, "overlap": overlap, "label": label, "delta": delta})
    return reservoir


def fit_boxes(
    model: Any, name: str, stream: ImageStream, writer: RowWriter, settings: FitSettings
) -> tuple[list[PartReport], tuple[int, ...]]:
    """Solve every box predictor of ``model.roi_heads``, stage by stage.

    Args:
        model: a ``GeneralizedRCNN``.
        name: of its ROI heads.
        stream: the images.
        writer: knows the new classes; writes and undoes.
        settings: how.

    Returns:
        One report per stage, and the new classes without any region.
    """
    reports: list[PartReport] = []
    missing: tuple[int, ...] = ()
    stages = stages_of(model.roi_heads, name)
    for stage in stages:
        classifier = stage.classifier
        num_classes = writer.num_classes(classifier)
        problem = why_not(model.roi_heads, stage)
        if not writer.new(classifier):
            problem = "no row is new"
        if problem is None and model.proposal_generator is None:
            problem = "the model makes no proposals of its own"
        if problem is not None:
            reports.append(PartReport(stage.name, "kept", problem))
            continue
        title = f"box head, stage {stage.number + 1} of {len(stages)}" if len(stages) > 1 else "box head"
        sample = gathered(collect_regions(model, stages, stage, stream.views(title), num_classes, settings))
        device = stage.predictor.bbox_pred.weight.device

        def work(
            stage: Stage = stage, sample: dict[str, torch.Tensor] = sample, device: torch.device = device,
            num_classes: int = num_classes,
        ) -> tuple[list[Any], PartReport, tuple[int, ...]]:  # fmt: skip
            if not sample:
                nothing = PartReport(stage.name, "kept", "no region was found")
                return [], nothing, writer.new(stage.classifier)
            return solve_stage(stage, placed(sample, stream.held_out, device), writer, num_classes, settings)

        solutions, report, without = on_rank_zero(work, stage.name)
        # A class without a region at any stage keeps an initial row there.
        missing = tuple(sorted({*missing, *without}))
        writer.write(solutions)
        reports.append(report)
    return reports, missing


def solve_stage(
    stage: Stage, sample: dict[str, torch.Tensor], writer: RowWriter, num_classes: int, settings: FitSettings
) -> tuple[list[Solution], PartReport, tuple[int, ...]]:
    """Solve one box predictor from its regions.

    Args:
        stage: whose predictor.
        sample: of :func:`collect_regions`, with ``held`` (n,): the regions that choose penalties; on one device.
        writer: knows the new classes; nothing is written.
        num_classes: K.
        settings: how.

    Returns:
        What to write, what to report, and the new classes without a region.
    """
    low, high = (overlap + stage.threshold - 0.5 for overlap in settings.soft_iou)
    share = ((sample["overlap"] - low) / max(min(high, 1.0) - low, 1e-6)).clamp(0, 1)
    share = torch.where(sample["label"] == num_classes, torch.zeros_like(share), share)
    solve = solve_text if is_text(stage.predictor.cls_score) else solve_scores
    scores = solve(stage, sample, share, writer, num_classes, settings)
    if not scores.solutions:
        return [], PartReport(stage.name, "kept", scores.reason), scores.missing
    boxes, penalties = solve_boxes(stage, sample, writer, num_classes, settings)
    report = PartReport(
        stage.name, "solved", scores.reason, len(sample["weight"]), scores.left_out,
        {**scores.penalties, **penalties}, scores.score,
    )  # fmt: skip
    return [*scores.solutions, *boxes], report, scores.missing
