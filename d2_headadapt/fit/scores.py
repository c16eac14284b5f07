"""Solve a box predictor's rows from regions with labels, on one device.

n   number of regions
d   features, plus one that is always 1
K   classes of the head; column K is background
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F

from .rows import RowWriter, Solution
from .settings import FitSettings
from .solvers import CHUNK, KEEP_BOX, KEEP_LOSS, Frame, Problem, Targets, logistic_rows, ridge_rows, softmax_rows


@dataclass(frozen=True)
class ScoreSolution:
    """The result of solving ``cls_score``.

    Args:
        solutions: rows to write; none where nothing could be solved.
        reason: what was solved, or why nothing was.
        missing: new classes without a region.
        left_out: regions on which a carried class is confident.
        penalties, score: see :class:`d2_headadapt.fit.settings.PartReport`.
    """

    solutions: list[Solution]
    reason: str
    missing: tuple[int, ...]
    left_out: int = 0
    penalties: Mapping[str, float] = field(default_factory=dict)
    score: Mapping[str, tuple[float, float]] = field(default_factory=dict)


def solve_scores(
    stage: Any, sample: dict[str, torch.Tensor], share: torch.Tensor, writer: RowWriter, num_classes: int,
    settings: FitSettings,
) -> ScoreSolution:  # fmt: skip
    """Solve new rows of ``cls_score``: multinomial, or one by one where the predictor uses sigmoids.

    Carried rows, rows of classes without a region and, with any class carried, background enter as constants.

    Args:
        stage: whose predictor.
        sample: ``x``, ``label``, ``weight``, ``held`` and more, (n, ...).
        share: (n,) how much of a region is its object; the rest is background.
        writer: knows the new classes.
        num_classes: K.
        settings: penalties and ``confident``.
    """
    tensor = f"{stage.name}.cls_score"
    new = writer.new(f"{tensor}.weight")
    carried = list(writer.carried(f"{tensor}.weight"))
    label, weight = sample["label"], sample["weight"]
    shown = set(label[share > 0].tolist())
    seen = [k for k in new if k in shown]
    missing = tuple(k for k in new if k not in shown)
    if not seen:
        return ScoreSolution([], "no image shows a new class", missing)
    sigmoid = bool(getattr(stage.predictor, "use_sigmoid_ce", False))
    old = {leaf: writer.value(f"{tensor}.{leaf}").to(label.device) for leaf in ("weight", "bias")}
    logits = _logits(sample["x"], old["weight"], old["bias"])
    keep = torch.ones_like(label, dtype=torch.bool)
    if carried:
        p = logits.sigmoid() if sigmoid else logits.softmax(dim=1)
        # An object that nobody labelled is not background for the new rows.
        keep = ~((label == num_classes) & (p[:, carried].max(dim=1).values >= settings.confident))
    left_out = int((~keep).sum())
    # Background has rows of its own only in a softmax, and they are solved only where no class is carried.
    columns = seen + ([num_classes] if not carried and not sigmoid else [])
    still = [k for k in range(num_classes + 1) if k not in columns]
    fixed = torch.logsumexp(logits[:, still], dim=1) if still and not sigmoid else None
    frame = Frame.of(sample["x"][keep])
    z = frame.apply(sample["x"])
    where = torch.full((num_classes + 1,), len(columns), dtype=torch.int64, device=label.device)
    where[columns] = torch.arange(len(columns), device=label.device)
    width = len(columns) + int(fixed is not None)

    def targets(rows: torch.Tensor) -> Targets:
        columns_of, shares, weights = where[label[rows]], share[rows], weight[rows]

        def part(piece: slice) -> tuple[torch.Tensor, torch.Tensor]:
            column = columns_of[piece]
            target = z.new_zeros(len(column), len(columns) + 1)
            target.scatter_(1, column[:, None], shares[piece, None])
            if not sigmoid:
                # What is not the object is background, wherever its column is.
                target[:, where[num_classes]] += 1 - shares[piece]
            return target[:, :width], weights[piece, None]

        return part

    def solve(rows: torch.Tensor, penalty: float, start: torch.Tensor | None) -> torch.Tensor:
        if sigmoid:
            zero = z.new_zeros(z.shape[1], width)
            return logistic_rows(z[rows], targets(rows), penalty, prior=zero, start=start)
        own = None if fixed is None else fixed[rows]
        return softmax_rows(z[rows], targets(rows), penalty, columns=width, fixed=own, start=start)

    held, rest = sample["held"] & keep, ~sample["held"] & keep

    def loss(solution: torch.Tensor) -> float:
        return held_out_loss(z[held], solution, targets(held), None if fixed is None else fixed[held], sigmoid)

    penalty, score = Problem(solve, loss, held, rest).choose(settings.penalties, KEEP_LOSS)
    rows, biases = frame.rows(solve(keep, penalty, None))
    solutions = [
        Solution(f"{tensor}.weight", torch.tensor(columns), rows.cpu()),
        Solution(f"{tensor}.bias", torch.tensor(columns), biases.cpu()),
    ]
    reason = f"{len(seen)} new classes" + ("" if carried or sigmoid else " and background")
    return ScoreSolution(solutions, reason, missing, left_out, {"cls_score": penalty}, score)


def _logits(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return torch.cat([x[i : i + CHUNK] @ weight.t() + bias for i in range(0, len(x), CHUNK)])


def held_out_loss(
    z: torch.Tensor, solution: torch.Tensor, targets: Targets, fixed: torch.Tensor | None, sigmoid: bool
) -> float:
    """Compute what :func:`softmax_rows` or :func:`logistic_rows` minimises, without its penalty.

    Args:
        z: (n, d).
        solution: (d, C).
        targets: of those n.
        fixed: see :func:`softmax_rows`.
        sigmoid: the columns are classifiers of their own.
    """
    logits = z @ solution
    target, weight = targets(slice(0, len(z)))
    if sigmoid:
        losses = F.softplus(logits) - target * logits
    else:
        if fixed is not None:
            logits = torch.cat([logits, fixed[:, None]], dim=1)
        losses = -(target * F.log_softmax(logits, dim=1)).sum(1, keepdim=True)
    return float((weight * losses).sum() / weight.sum())


def solve_boxes(
    stage: Any, sample: dict[str, torch.Tensor], writer: RowWriter, num_classes: int, settings: FitSettings
) -> tuple[list[Solution], dict[str, float]]:
    """Solve new rows of ``bbox_pred``: one ridge solution for all new classes, then each class toward it.

    Args:
        stage: whose predictor.
        sample: ``x``, ``label``, ``overlap``, ``delta``, ``weight`` and ``held``, (n, ...).
        writer: knows the new classes.
        num_classes: K.
        settings: penalties.

    Returns:
        Rows to write, none for an agnostic regressor that serves carried classes; and the penalties.
    """
    tensor = f"{stage.name}.bbox_pred"
    layout = writer.layouts[f"{tensor}.weight"]
    writable_rows = writer.writable_rows(f"{tensor}.weight")
    # Beside a text classifier, which is solved whole, boxes of some classes may be carried.
    boxes = writer.new(f"{tensor}.weight")
    classes = [k for k in writer.new(stage.classifier) if layout.agnostic or k in boxes]
    new = torch.tensor(classes, device=sample["label"].device)
    near = (sample["overlap"] >= stage.threshold) & torch.isin(sample["label"], new)
    if len(writable_rows) == 0 or not near.any():
        return [], {}
    # The deviation of regions on objects, not of all.
    part = {key: value[near] for key, value in sample.items()}
    frame = Frame.of(part["x"])
    z = frame.apply(part["x"])
    old_rows = {leaf: writer.value(f"{tensor}.{leaf}").to(z.device) for leaf in ("weight", "bias")}
    old = frame.solution(old_rows["weight"], old_rows["bias"])
    held, label, count = part["held"], part["label"], float(part["weight"].sum())
    prior = _prior(old, layout.agnostic, list(writer.carried(f"{tensor}.weight")))
    chosen: dict[str, float] = {}

    def ridge(rows: torch.Tensor, penalty: float, toward: torch.Tensor) -> torch.Tensor:
        return ridge_rows(z[rows], part["delta"][rows], part["weight"][rows], penalty * count, toward)

    def error(solution: torch.Tensor) -> float:
        squares = ((z[held] @ solution - part["delta"][held]) ** 2).sum(1)
        return float((squares * part["weight"][held]).sum() / part["weight"][held].sum())

    together = Problem(lambda rows, p, _: ridge(rows, p, prior), error, held, ~held, prior)
    penalty, _ = together.choose(settings.box_penalties, KEEP_BOX)
    chosen["bbox_pred"] = penalty
    everything = torch.ones_like(held)
    shared = ridge(everything, penalty, prior)
    if layout.agnostic:
        weight, bias = frame.rows(shared)
        return _both(tensor, torch.arange(4), weight, bias), chosen

    def by_class(rows: torch.Tensor, penalty: float, toward: torch.Tensor) -> torch.Tensor:
        found = [
            ridge(own, penalty, toward) if bool((own := rows & (label == k)).any()) else toward for k in new.tolist()
        ]
        return torch.stack(found)

    def class_error(solutions: torch.Tensor) -> float:
        squares = z.new_zeros(())
        for k, solution in zip(new.tolist(), solutions, strict=True):
            own = held & (label == k)
            squares += (((z[own] @ solution - part["delta"][own]) ** 2).sum(1) * part["weight"][own]).sum()
        return float(squares / part["weight"][held].sum())

    # The shared solution that a class leans on here has not seen the held-out images either.
    half = ridge(~held, penalty, prior) if held.any() else shared
    alike = torch.stack([half] * len(new))
    apart = Problem(lambda rows, p, _: by_class(rows, p, half), class_error, held, ~held, alike)
    penalty, _ = apart.choose(settings.box_penalties, KEEP_BOX)
    chosen["bbox_pred by class"] = penalty
    solved = by_class(everything, penalty, shared)
    shown = [i for i, k in enumerate(new.tolist()) if bool((label == k).any())]
    rows = layout.rows([int(new[i]) for i in shown], num_classes)
    pairs = [frame.rows(solved[i]) for i in shown]
    return _both(tensor, rows, torch.cat([w for w, _ in pairs]), torch.cat([b for _, b in pairs])), chosen


def _prior(old: torch.Tensor, agnostic: bool, carried: list[int]) -> torch.Tensor:
    """Return (d, 4): the regressor itself where it is agnostic, else the carried classes' mean, else zero."""
    if agnostic:
        return old
    by_class = old.view(len(old), -1, 4)
    return by_class[:, carried].mean(1) if carried else torch.zeros_like(by_class[:, 0])


def _both(tensor: str, rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> list[Solution]:
    return [Solution(f"{tensor}.weight", rows, weight.cpu()), Solution(f"{tensor}.bias", rows, bias.cpu())]
