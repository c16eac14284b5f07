"""Solve the RPN's last layer again, toward the values it had.

A   anchors per cell
C   channels of the layer's input
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.structures import Boxes, ImageList, pairwise_iou

from ..modeling.keep_proposals import inputs_of, why_not_second
from .anchors import solve_anchor_boxes
from .images import ImageStream, View
from .reservoir import Reservoir, sample_view
from .rows import RowWriter, Solution
from .settings import FitSettings, PartReport
from .sharing import gathered, on_rank_zero, placed, summed
from .solvers import KEEP_LOSS, Frame, Problem, logistic_rows

OBJECT, CLUTTER = 1, 0
"""Strata: cells where some anchor is an object, and all others."""
CELLS_PER_VIEW = 512


def proposals_of(rpn: Any, view: View, limit: int) -> Boxes:
    """Compute the best proposals of a view, (at most limit, 4) pixels, as the model makes them at test time."""
    found, _ = rpn(_image_list(view), dict(view.features), None)
    boxes: Boxes = found[0].proposal_boxes[:limit]
    return boxes


def _image_list(view: View) -> ImageList:
    # The proposal generator reads the size only.
    return ImageList(torch.zeros(1, 1, 1, 1), [view.size])


def recall(rpn: Any, views: Iterator[View], limit: int) -> float:
    """Measure the share of objects that a proposal covers, mean over IoU 0.5, 0.55 ... 0.95, over all processes."""
    return float(recalls(rpn, views, limit).mean())


def recalls(rpn: Any, views: Iterator[View], limit: int) -> torch.Tensor:
    """Measure the shares (10,) of objects that a proposal covers by 0.5, 0.55 ... 0.95, over all processes."""
    thresholds = torch.arange(0.5, 1.0, 0.05)
    hits = torch.zeros(len(thresholds) + 1, dtype=torch.int64)
    for view in views:
        boxes = proposals_of(rpn, view, limit)
        if len(view.truth) and len(boxes):
            best = pairwise_iou(view.truth.gt_boxes, boxes).max(dim=1).values.cpu()
            hits[:-1] += (best[:, None] >= thresholds).sum(0)
        hits[-1] += len(view.truth)
    hits = summed(hits)
    return hits[:-1].double() / max(int(hits[-1]), 1)


def collect_anchors(rpn: Any, views: Iterator[View], settings: FitSettings) -> Reservoir:
    """Collect cells of the RPN's feature maps with the labels that detectron2's own matcher gives their anchors."""
    # Cells are narrow and 15 of them may share one row of features, so clutter may take as much again.
    half = max(1, settings.regions // 2)
    reservoir = Reservoir({OBJECT: half, CLUTTER: 2 * half}, 0)
    for view in views:
        features = [view.features[name] for name in rpn.in_features]
        with inputs_of(rpn.rpn_head.objectness_logits) as seen:
            rpn.rpn_head(features)
        x = torch.cat([level[0].flatten(1).t() for level in seen])
        anchors = Boxes.cat(rpn.anchor_generator(features))
        truth = view.truth.gt_boxes
        matched, labels = rpn.anchor_matcher(pairwise_iou(truth, anchors))
        if rpn.anchor_boundary_thresh >= 0:
            labels[~anchors.inside_box(view.size, rpn.anchor_boundary_thresh)] = -1
        # detectron2 draws a fixed number of anchors per image; weights say what its draw expects.
        positives, negatives = int((labels == 1).sum()), int((labels == 0).sum())
        taken = min(positives, int(rpn.batch_size_per_image * rpn.positive_fraction))
        weights = torch.zeros(len(labels), device=labels.device)
        weights[labels == 1] = taken / max(positives, 1)
        weights[labels == 0] = (rpn.batch_size_per_image - taken) / max(negatives, 1)
        if len(truth):
            deltas = rpn.box2box_transform.get_deltas(anchors.tensor, truth.tensor[matched])
        else:
            deltas = torch.zeros_like(anchors.tensor)
        a = rpn.anchor_generator.num_anchors[0]
        labels, weights, deltas = labels.view(-1, a), weights.view(-1, a), deltas.view(-1, a, 4)
        objects = (labels == 1).any(1)
        clutter = (~objects).nonzero()[:, 0]
        numbers, stands_for = sample_view(view.key, len(clutter), CELLS_PER_VIEW)
        clutter = clutter[numbers.to(clutter.device)]
        cells = torch.cat([objects.nonzero()[:, 0], clutter])
        weights[clutter] *= stands_for
        reservoir.add(
            view.key,
            view.number,
            objects[cells].long(),
            {"x": x[cells].float(), "label": labels[cells].to(torch.int8), "anchor_weight": weights[cells],
             "delta": deltas[cells].float()},
        )  # fmt: skip
    return reservoir


def solve(
    sample: dict[str, torch.Tensor],
    weight: torch.Tensor,
    bias: torch.Tensor,
    deltas: tuple[torch.Tensor, torch.Tensor],
    settings: FitSettings,
) -> tuple[tuple[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor], dict[str, float]]:
    """Solve objectness by logistic regression and deltas by ridge, both toward the old values.

    Args:
        sample: of :func:`collect_anchors`, with ``held``, the cells that choose the penalties.
        weight, bias: (A, C) and (A,) of the objectness layer.
        deltas: (4A, C) and (4A,) of the delta layer.
        settings: the penalties.

    Returns:
        New values of both layers, and the penalties.
    """
    frame = Frame.of(sample["x"])
    z = frame.apply(sample["x"])
    label = (sample["label"] == 1).to(z.dtype)
    weights = sample["anchor_weight"] * sample["weight"].to(z)[:, None] * (sample["label"] >= 0)
    held = sample["held"]
    chosen: dict[str, float] = {}

    def objectness(rows: torch.Tensor, penalty: float, start: torch.Tensor | None) -> torch.Tensor:
        zs, ys, ws = z[rows], label[rows], weights[rows]
        return logistic_rows(zs, lambda part: (ys[part], ws[part]), penalty, prior=prior, start=start)

    def loss(solution: torch.Tensor) -> float:
        logits = z[held] @ solution
        return float((weights[held] * (F.softplus(logits) - label[held] * logits)).sum() / weights[held].sum())

    prior = frame.solution(weight, bias)
    everything = torch.ones_like(held)
    penalty, _ = Problem(objectness, loss, held, ~held, prior).choose(settings.penalties, KEEP_LOSS)
    chosen["objectness_logits"] = penalty
    logits = frame.rows(objectness(everything, penalty, None))

    boxes, chosen["anchor_deltas"] = solve_anchor_boxes(z, label > 0, sample, held, frame.solution(*deltas), settings)
    return logits, frame.rows(boxes), chosen


def fit_rpn(
    rpn: Any, name: str, stream: ImageStream, writer: RowWriter, settings: FitSettings, limit: int
) -> PartReport:
    """Solve the RPN's last layer and keep the solution where it pays.

    Args:
        rpn: the proposal generator.
        name: its name in the model.
        stream: the images.
        writer: writes and undoes.
        settings: how.
        limit: proposals per image at test time, for recall.
    """
    problem = why_not_second(rpn)
    if problem is not None:
        return PartReport(name, "kept", problem)
    judged = settings.rpn == "auto"
    if judged and not stream.held_out:
        return PartReport(name, "kept", "too few images to judge by held-out recall")
    reservoir = collect_anchors(rpn, stream.views("RPN"), settings)
    sample = gathered(reservoir)
    head = f"{name}.rpn_head"
    layers = ("objectness_logits", "anchor_deltas")
    tensors = [f"{head}.{layer}.{leaf}" for layer in layers for leaf in ("weight", "bias")]
    device = rpn.rpn_head.objectness_logits.weight.device

    def work() -> tuple[list[Solution], dict[str, float], int]:
        if not sample or not bool((sample["label"] == 1).any()):
            return [], {}, 0
        ow, ob, dw, db = (writer.value(tensor).to(device) for tensor in tensors)
        here, old_deltas = placed(sample, stream.held_out, device), (dw.flatten(1), db)
        logits, deltas, chosen = solve(here, ow.flatten(1), ob, old_deltas, settings)
        found: list[Solution] = []
        for tensor, old, value in zip(tensors, (ow, ob, dw, db), (*logits, *deltas), strict=True):
            found.append(Solution(tensor, torch.arange(len(old)), value.reshape(old.shape).cpu()))
        return found, chosen, len(sample["weight"])

    before = recall(rpn, stream.views("recall", mirror=False, held_out_only=True), limit) if judged else 0.0
    solutions, chosen, regions = on_rank_zero(work, name)
    if not solutions:
        return PartReport(name, "kept", "no anchor lies on an object")
    writer.write(solutions, shared=True)
    if not judged:
        return PartReport(name, "solved", "asked for", regions, 0, chosen)
    after = recall(rpn, stream.views("recall", mirror=False, held_out_only=True), limit)
    score = {"held-out recall": (before, after)}
    if after <= before + 0.005:
        writer.undo(tensors)
        return PartReport(name, "kept", "held-out recall does not rise", regions, 0, chosen, score)
    return PartReport(name, "solved", "held-out recall rises", regions, 0, chosen, score)
