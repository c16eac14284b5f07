"""Fit RetinaNet: the classifier's new rows, anchor by anchor, and its boxes where no class is carried.

A   anchors per cell
K   classes
C   input channels of the last layers, 9 C with their 3x3 window unfolded
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.structures import Boxes
from torch import nn

from ..modeling.keep_proposals import inputs_of
from .anchors import solve_anchor_boxes
from .images import ImageStream, View
from .reservoir import Reservoir, room, sample_view
from .rows import RowWriter, Solution
from .rpn import CLUTTER, OBJECT
from .settings import FitSettings, PartReport
from .sharing import gathered, on_rank_zero, placed
from .solvers import KEEP_LOSS, Frame, Problem, Targets, logistic_rows

CELLS_PER_VIEW = 256
CLUTTER_PER_OBJECT = 3.0
"""Background weighs at most so many times what objects weigh. Focal loss does the same to the easy majority; plain
frequencies would leave every score below the threshold of 0.05 at which detectron2 forgets a box."""


def why_not(model: Any) -> str | None:
    """Say why a dense head cannot be solved; ``None`` where it can."""
    layers = [getattr(model.head, name, None) for name in ("cls_score", "bbox_pred")]
    if not all(isinstance(layer, nn.Conv2d) for layer in layers) or hasattr(model.head, "ctrness"):
        return "it is not a RetinaNet head"
    if not hasattr(model, "anchor_matcher"):
        return "its anchors are not matched by overlap"
    return None


def collect_cells(model: Any, views: Iterator[View], settings: FitSettings) -> Reservoir:
    """Collect cells with the windows that ``cls_score`` and ``bbox_pred`` see, and the labels of their anchors."""
    width = sum(layer.weight[0].numel() for layer in (model.head.cls_score, model.head.bbox_pred))
    half = max(1, room(settings.regions, width) // 2)
    reservoir = Reservoir({OBJECT: half, CLUTTER: half}, 0)
    k = model.num_classes
    for view in views:
        features = [view.features[name] for name in model.head_in_features]
        with inputs_of(model.head.cls_score) as scores, inputs_of(model.head.bbox_pred) as boxes:
            model.head(features)
        anchors = Boxes.cat(model.anchor_generator(features))
        label, target = (part[0] for part in model.label_anchors([anchors], [view.truth]))
        a = model.anchor_generator.num_anchors[0]
        near = (label >= 0) & (label < k)
        delta = torch.zeros_like(anchors.tensor)
        delta[near] = model.box2box_transform.get_deltas(anchors.tensor[near], target[near])
        label, delta = label.view(-1, a), delta.view(-1, a, 4)
        objects = near.view(-1, a).any(1)
        clutter = (~objects).nonzero()[:, 0]
        numbers, stands_for = sample_view(view.key, len(clutter), CELLS_PER_VIEW)
        clutter = clutter[numbers.to(clutter.device)]
        cells = torch.cat([objects.nonzero()[:, 0], clutter])
        stands = torch.ones(len(objects), device=label.device)
        stands[clutter] = stands_for
        reservoir.add(
            view.key, view.number, objects[cells].long(),
            {"score_x": _windows(scores, cells, model.head.cls_score).float(),
             "box_x": _windows(boxes, cells, model.head.bbox_pred).float(),
             "label": label[cells], "delta": delta[cells].float(), "stands_for": stands[cells]},
        )  # fmt: skip
    return reservoir


def _windows(levels: list[torch.Tensor], cells: torch.Tensor, layer: nn.Conv2d) -> torch.Tensor:
    """Cut (n, 9 C) windows of cells, counted through the levels in order, without unfolding a whole map."""
    out = levels[0].new_zeros(len(cells), layer.weight[0].numel())
    start = 0
    height, width = layer.kernel_size
    for level in levels:
        _, _, rows, columns = level.shape
        here = (cells >= start) & (cells < start + rows * columns)
        own = cells[here] - start
        padded = F.pad(level[0], (width // 2, width // 2, height // 2, height // 2))
        y, x = own // columns, own % columns
        parts = [padded[:, y + i, x + j] for i in range(height) for j in range(width)]
        # Channels first, then the window, as a convolution's weight is laid out.
        out[here] = torch.stack(parts, dim=1).permute(2, 0, 1).flatten(1)
        start += rows * columns
    return out


def fit_dense(
    model: Any, name: str, stream: ImageStream, writer: RowWriter, settings: FitSettings
) -> tuple[PartReport, tuple[int, ...]]:
    """Solve a RetinaNet head.

    Args:
        model: a ``RetinaNet``.
        name: of its head.
        stream: the images.
        writer: knows the new classes; writes and undoes.
        settings: how.

    Returns:
        The report, and the new classes without an anchor.
    """
    classifier = f"{name}.cls_score.weight"
    problem = why_not(model) if "dense" in settings.parts else "FIT.PARTS leaves it out"
    if problem is not None:
        return PartReport(name, "kept", problem), writer.new(classifier)
    sample = gathered(collect_cells(model, stream.views("dense head"), settings))
    device = model.head.cls_score.weight.device

    def work() -> tuple[list[Solution], PartReport, tuple[int, ...]]:
        new = writer.new(classifier)
        shown = set(sample["label"].flatten().tolist()) if sample else set()
        seen = [k for k in new if k in shown]
        missing = tuple(k for k in new if k not in shown)
        if not seen:
            return [], PartReport(name, "kept", "no image shows a new class"), missing
        here = placed(sample, stream.held_out, device)
        solutions, left_out, penalty = _solve_scores(name, here, seen, writer, model.num_classes, settings)
        boxes, penalties = _solve_boxes(name, here, writer, model.num_classes, settings)
        reason = f"{len(seen)} new classes" + (" and boxes" if boxes else "")
        penalties = {"cls_score": penalty, **penalties}
        report = PartReport(name, "solved", reason, len(sample["weight"]), left_out, penalties)
        return [*solutions, *boxes], report, missing

    solutions, report, missing = on_rank_zero(work, name)
    writer.write(solutions)
    return report, missing


def _solve_scores(
    name: str, sample: dict[str, torch.Tensor], seen: list[int], writer: RowWriter, k: int, settings: FitSettings
) -> tuple[list[Solution], int, float]:
    """Solve rows ``anchor x K + class``: each a logistic regression of its own, toward its recipe."""
    tensor = f"{name}.cls_score"
    layout = writer.layouts[f"{tensor}.weight"]
    weight, bias = writer.value(f"{tensor}.weight"), writer.value(f"{tensor}.bias")
    rows = layout.rows(seen, k).view(layout.groups, len(seen))
    frame = Frame.of(sample["score_x"])
    z, label = frame.apply(sample["score_x"]), sample["label"]
    carried = torch.tensor(writer.carried(f"{tensor}.weight"), dtype=torch.int64)
    flat = weight.flatten(1).to(z.device), bias.to(z.device)
    weights: list[torch.Tensor] = []
    priors: list[torch.Tensor] = []
    left_out = 0
    for i in range(layout.groups):
        own = (sample["weight"] * sample["stands_for"]) * (label[:, i] >= 0)
        if len(carried):
            # An object that nobody labelled is not background for the new rows.
            logits = sample["score_x"] @ flat[0][i * k + carried].t() + flat[1][i * k + carried]
            confident = (label[:, i] == k) & (logits.sigmoid().max(dim=1).values >= settings.confident)
            left_out += int(confident.sum())
            own = own * ~confident
        objects, clutter = float(own[label[:, i] < k].sum()), float(own[label[:, i] == k].sum())
        if clutter > CLUTTER_PER_OBJECT * objects > 0:
            own = torch.where(label[:, i] == k, own * (CLUTTER_PER_OBJECT * objects / clutter), own)
        weights.append(own)
        # Directions of the recipe are chance; only its intercept says something.
        prior = z.new_zeros(z.shape[1], len(seen))
        prior[-1] = flat[1][rows[i].to(z.device)]
        priors.append(prior)
    where = torch.full((k + 1,), len(seen), dtype=torch.int64, device=z.device)
    where[seen] = torch.arange(len(seen), device=z.device)

    def targets(i: int, chosen: torch.Tensor) -> Targets:
        column, own = where[label[chosen, i].clamp(min=0)], weights[i][chosen]

        def part(piece: slice) -> tuple[torch.Tensor, torch.Tensor]:
            target = F.one_hot(column[piece], len(seen) + 1)[:, :-1].to(z.dtype)
            return target, own[piece, None]

        return part

    def solve(chosen: torch.Tensor, penalty: float) -> torch.Tensor:
        zs = z[chosen]
        found = [logistic_rows(zs, targets(i, chosen), penalty, prior=priors[i]) for i in range(layout.groups)]
        return torch.cat(found, dim=1)

    held, everything = sample["held"], torch.ones_like(sample["held"])

    def loss(solution: torch.Tensor) -> float:
        total = z.new_zeros(2)
        for i in range(layout.groups):
            logits = z[held] @ solution[:, i * len(seen) : (i + 1) * len(seen)]
            target, own = targets(i, held)(slice(0, len(logits)))
            total[0] += (own * (F.softplus(logits) - target * logits)).sum()
            total[1] += own.sum()
        return float(total[0] / total[1].clamp(min=1e-6))

    problem = Problem(lambda rows, p, _: solve(rows, p), loss, held, ~held, torch.cat(priors, dim=1))
    penalty, _ = problem.choose(settings.penalties, KEEP_LOSS)
    solved, intercepts = frame.rows(solve(everything, penalty))
    flat_rows = rows.flatten()
    return [
        Solution(f"{tensor}.weight", flat_rows, solved.reshape(-1, *weight.shape[1:]).cpu()),
        Solution(f"{tensor}.bias", flat_rows, intercepts.cpu()),
    ], left_out, penalty  # fmt: skip


def _solve_boxes(
    name: str, sample: dict[str, torch.Tensor], writer: RowWriter, k: int, settings: FitSettings
) -> tuple[list[Solution], dict[str, float]]:
    """Solve the class-agnostic box regressor toward its old values, only where no class is carried."""
    tensor = f"{name}.bbox_pred"
    if len(writer.writable_rows(f"{tensor}.weight")) == 0:
        return [], {}
    weight, bias = writer.value(f"{tensor}.weight"), writer.value(f"{tensor}.bias")
    frame = Frame.of(sample["box_x"])
    z = frame.apply(sample["box_x"])
    near = (sample["label"] >= 0) & (sample["label"] < k)
    old = frame.solution(weight.flatten(1).to(z.device), bias.to(z.device))
    boxes, penalty = solve_anchor_boxes(z, near, sample, sample["held"], old, settings)
    rows, intercepts = frame.rows(boxes)
    return [
        Solution(f"{tensor}.weight", torch.arange(len(weight)), rows.reshape(weight.shape).cpu()),
        Solution(f"{tensor}.bias", torch.arange(len(bias)), intercepts.cpu()),
    ], {"bbox_pred": penalty}  # fmt: skip
