"""Fit mask predictor rows: per-pixel logistic regression on the last feature map of the mask head.

S   side of the predicted mask
C   channels under the predictor
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.structures import Boxes, pairwise_iou
from torch import nn

from ..modeling.keep_proposals import inputs_of
from .images import ImageStream, View
from .reservoir import Reservoir, room, sample_view
from .rows import RowWriter, Solution
from .rpn import proposals_of
from .settings import FitSettings, PartReport
from .sharing import gathered, on_rank_zero, placed
from .solvers import KEEP_LOSS, Frame, Problem, Targets, logistic_rows

REGIONS_PER_VIEW, PIXELS_PER_REGION = 32, 48


def why_not(roi_heads: Any, writer: RowWriter, name: str) -> str | None:
    """Say why a mask head cannot be solved; ``None`` where it can."""
    predictor = getattr(roi_heads.mask_head, "predictor", None)
    if not isinstance(predictor, nn.Conv2d) or predictor.kernel_size != (1, 1):
        return "its predictor is not a 1x1 convolution"
    if f"{name}.mask_head.predictor.weight" not in writer.layouts or not hasattr(roi_heads.mask_head, "layers"):
        return "where its classes are is not known"
    tensor = f"{name}.mask_head.predictor.weight"
    if len(writer.writable_rows(tensor)) == 0:
        return "no row is new" if writer.layouts[tensor].axes else "one mask for all classes serves carried ones too"
    return None


def collect_pixels(model: Any, views: Iterator[View], settings: FitSettings) -> Reservoir:
    """Collect pixels of regions on objects: the features under the predictor, and whether the pixel is the object's."""
    roi_heads = model.roi_heads
    width = roi_heads.mask_head.predictor.in_channels
    reservoir = Reservoir({}, room(settings.regions, width))
    for view in views:
        truth = view.truth
        if not truth.has("gt_masks") or len(truth) == 0:
            continue
        boxes = Boxes.cat([proposals_of(model.proposal_generator, view, settings.proposals), truth.gt_boxes])
        overlap, matched = pairwise_iou(boxes, truth.gt_boxes).max(dim=1)
        near = (overlap >= 0.5).nonzero()[:, 0]
        near = near[sample_view(view.key, len(near), REGIONS_PER_VIEW)[0].to(near.device)]
        if len(near) == 0:
            continue
        boxes, matched = boxes[near], matched[near]
        with inputs_of(roi_heads.mask_head.predictor) as seen:
            roi_heads.mask_head.layers(_mask_features(roi_heads, view, boxes))
        x = seen[0].float()
        inside = truth.gt_masks[matched].crop_and_resize(boxes.tensor, x.shape[-1]).to(x.device)
        x = x.flatten(2).transpose(1, 2)
        pixels = torch.stack([
            sample_view(view.key + i, x.shape[1], PIXELS_PER_REGION)[0] for i in range(len(boxes))
        ]).to(x.device)  # fmt: skip
        x = x.gather(1, pixels[:, :, None].expand(-1, -1, x.shape[2]))
        label = truth.gt_classes[matched][:, None].expand(-1, pixels.shape[1]).flatten()
        reservoir.add(
            view.key, view.number, label,
            {"x": x.flatten(0, 1), "inside": inside.flatten(1).gather(1, pixels).flatten().float(), "label": label},
        )  # fmt: skip
    return reservoir


def _mask_features(roi_heads: Any, view: View, boxes: Boxes) -> torch.Tensor:
    if hasattr(roi_heads, "_shared_roi_transform"):
        features = [view.features[name] for name in roi_heads.in_features]
        return roi_heads._shared_roi_transform(features, [boxes])  # type: ignore[no-any-return]
    features = [view.features[name] for name in roi_heads.mask_in_features]
    return roi_heads.mask_pooler(features, [boxes])  # type: ignore[no-any-return]


def fit_masks(model: Any, name: str, stream: ImageStream, writer: RowWriter, settings: FitSettings) -> PartReport:
    """Solve the mask predictor: one solution for all classes, then each new class toward it.

    Args:
        model: a ``GeneralizedRCNN`` with masks.
        name: of its ROI heads.
        stream: the images; mirrored ones are not used.
        writer: knows the new classes; writes and undoes.
        settings: how.
    """
    part = f"{name}.mask_head.predictor"
    problem = why_not(model.roi_heads, writer, name) if "mask" in settings.parts else "FIT.PARTS leaves it out"
    if problem is not None:
        return PartReport(part, "kept", problem)
    sample = gathered(collect_pixels(model, stream.views("masks", mirror=False), settings))
    device = model.roi_heads.mask_head.predictor.weight.device

    def work() -> tuple[list[Solution], PartReport]:
        shown = set(sample["label"].tolist()) if sample else set()
        # An agnostic predictor learns from every mask.
        wanted = sorted(shown) if writer.layouts[f"{part}.weight"].agnostic else writer.new(f"{part}.weight")
        seen = [k for k in wanted if k in shown]
        if not seen:
            return [], PartReport(part, "kept", "no image shows a mask of a new class")
        solutions, penalty = solve_masks(part, placed(sample, stream.held_out, device), seen, writer, settings)
        penalties = {"predictor": penalty}
        return solutions, PartReport(part, "solved", f"{len(seen)} new classes", len(sample["weight"]), 0, penalties)

    solutions, report = on_rank_zero(work, part)
    writer.write(solutions)
    return report


def solve_masks(
    part: str, sample: dict[str, torch.Tensor], seen: list[int], writer: RowWriter, settings: FitSettings
) -> tuple[list[Solution], float]:
    """Solve rows of some classes of a mask predictor; return them and the penalty.

    Args:
        part: the predictor's name in the model.
        sample: ``x``, ``inside``, ``label``, ``weight`` and ``held``, (n, ...), of :func:`collect_pixels`.
        seen: the classes.
        writer: knows the carried ones.
        settings: the penalties to choose from.
    """
    layout = writer.layouts[f"{part}.weight"]
    weight, bias = writer.value(f"{part}.weight").to(sample["x"].device), writer.value(f"{part}.bias").to(sample["x"])
    label, inside = sample["label"], sample["inside"][:, None]
    new = torch.isin(label, torch.tensor(seen, device=label.device))
    frame = Frame.of(sample["x"])
    z, weights = frame.apply(sample["x"]), sample["weight"].to(sample["x"])[:, None]

    def targets(rows: torch.Tensor) -> Targets:
        own, strength = inside[rows], weights[rows]
        return lambda piece: (own[piece], strength[piece])

    def solve(rows: torch.Tensor, penalty: float, toward: torch.Tensor) -> torch.Tensor:
        return logistic_rows(z[rows], targets(rows), penalty, prior=toward)

    old = frame.solution(weight.flatten(1), bias)
    carried = list(writer.carried(f"{part}.weight"))
    # Carried classes' mean is a mask regressor that somebody trained; an agnostic one leans on itself.
    prior = old[:, carried].mean(1, keepdim=True) if carried else torch.zeros_like(old[:, :1])
    prior = old if layout.agnostic else prior
    held, rest = sample["held"] & new, ~sample["held"] & new

    def loss(solution: torch.Tensor) -> float:
        logits = z[held] @ solution
        losses = F.softplus(logits) - inside[held] * logits
        return float((weights[held] * losses).sum() / weights[held].sum())

    problem = Problem(lambda rows, p, _: solve(rows, p, prior), loss, held, rest, prior)
    penalty, _ = problem.choose(settings.penalties, KEEP_LOSS)
    shared = solve(new, penalty, prior)
    if layout.agnostic:
        rows, found = torch.arange(1), [shared]
    else:
        rows = layout.rows(seen, weight.shape[0])
        # A class of few pixels stays near the shared solution: its penalty counts for as many as all have together.
        total = float(weights[new].sum())
        found = []
        for k in seen:
            own = label == k
            found.append(solve(own, penalty * total / float(weights[own].sum()), shared))
    pairs = [frame.rows(solution) for solution in found]
    values = torch.cat([w for w, _ in pairs]).reshape(-1, *weight.shape[1:])
    return [
        Solution(f"{part}.weight", rows, values.cpu()),
        Solution(f"{part}.bias", rows, torch.cat([b for _, b in pairs]).cpu()),
    ], penalty  # fmt: skip
