"""Solve box regressors per anchor, those of the RPN and of RetinaNet, which are class-agnostic.

A   anchors per cell
C   channels of the layer's input
N   cells
"""

from __future__ import annotations

import torch

from .settings import FitSettings
from .solvers import KEEP_BOX, Problem, ridge_rows


def solve_anchor_boxes(
    z: torch.Tensor,
    near: torch.Tensor,
    sample: dict[str, torch.Tensor],
    held: torch.Tensor,
    old: torch.Tensor,
    settings: FitSettings,
) -> tuple[torch.Tensor, float]:
    """Solve ridge regressions toward the old values, anchor by anchor, on cells whose anchor lies on an object.

    Args:
        z: (N, C + 1) features.
        near: (N, A), whether an anchor lies on an object.
        sample: ``delta`` (N, A, 4) and ``weight`` (N,).
        held: (N,), the cells by which the penalty is chosen.
        old: (C + 1, 4 A), what the layer was.
        settings: the penalties to choose from.

    Returns:
        The solution, shaped as ``old``, and the penalty.
    """
    anchors = near.shape[1]
    count = float(near.sum()) / anchors
    weight = sample["weight"].to(z)

    def ridge(rows: torch.Tensor, penalty: float) -> torch.Tensor:
        out = old.clone()
        for i in range(anchors):
            own, columns = rows & near[:, i], slice(4 * i, 4 * i + 4)
            if own.any():
                out[:, columns] = ridge_rows(
                    z[own], sample["delta"][own, i], weight[own], penalty * count, old[:, columns]
                )
        return out

    def error(solution: torch.Tensor) -> float:
        found = (z[held] @ solution).view(-1, anchors, 4)
        squares = ((found - sample["delta"][held]) ** 2).sum(2) * near[held]
        return float(squares.sum() / near[held].sum().clamp(min=1))

    problem = Problem(lambda rows, p, _: ridge(rows, p), error, held, ~held, old, near.any(1))
    penalty, _ = problem.choose(settings.box_penalties, KEEP_BOX)
    return ridge(torch.ones_like(held), penalty), penalty
