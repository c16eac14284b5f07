"""Solve linear models on frozen features: pure functions on tensors.

n   number of regions
d   number of features, plus one that is always 1
C   number of columns (rows of a detectron2 layer)

Features are centred and divided by **one** global deviation. Region features hold dead dimensions (a deviation of 1e-7
beside 2.7), and dividing by each dimension's own deviation gives weights of 1e5. Solutions are ``(d, C)``, their last
row the intercept, which is (almost) not penalised.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

KEEP_LOSS, KEEP_BOX = 0.97, 0.9
"""Share of the best held-out gain that a stronger penalty must keep: classifiers, and box regressors."""
NOTHING = 1e3
"""A penalty that leaves nothing but the intercept."""
CHUNK = 16384
"""Regions at once: bounds what the logits of 1,203 classes take."""

Targets = Callable[[slice], tuple[torch.Tensor, torch.Tensor]]
"""Gives ``(targets (m, C), weights (m, 1) or (m, C))`` of a slice of the regions."""


@dataclass(frozen=True)
class Frame:
    """The change of coordinates between a layer's rows and a solution.

    Args:
        centre: (d - 1,) mean of the features.
        scale: their one deviation.
    """

    centre: torch.Tensor
    scale: float

    @classmethod
    def of(cls, features: torch.Tensor) -> Frame:
        """Make the frame of features (n, d - 1); a scale of 1 where all are equal."""
        # Two passes in double precision, so that large means do not eat the deviation.
        centre = features.mean(0, dtype=torch.float64)
        parts = [features[i : i + CHUNK] for i in range(0, len(features), CHUNK)]
        squares = sum(float(((part.double() - centre) ** 2).sum()) for part in parts)
        scale = math.sqrt(squares / max(features.numel(), 1))
        return cls(centre.to(features.dtype), scale if scale > 1e-8 else 1.0)

    def apply(self, features: torch.Tensor) -> torch.Tensor:
        """Transform features (n, d - 1) to (n, d)."""
        ones = features.new_ones(len(features), 1)
        return torch.cat([(features - self.centre) / self.scale, ones], dim=1)

    def solution(self, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        """Convert rows (C, d - 1) and biases (C,) to a solution (d, C)."""
        return torch.cat([weight.t() * self.scale, (bias + weight @ self.centre)[None]])

    def rows(self, solution: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Convert a solution (d, C) to rows (C, d - 1) and biases (C,)."""
        weight = solution[:-1].t() / self.scale
        return weight, solution[-1] - weight @ self.centre


def softmax_rows(
    z: torch.Tensor,
    targets: Targets,
    penalty: float,
    *,
    columns: int,
    fixed: torch.Tensor | None = None,
    start: torch.Tensor | None = None,
    steps: int = 20,
) -> torch.Tensor:
    """Solve multinomial logistic regression by L-BFGS: mean cross entropy + penalty / 2 |solution|^2.

    Args:
        z: (n, d).
        targets: of C columns, the last of which is background.
        penalty: on everything but the intercept.
        columns: C.
        fixed: (n,) log-sum-exp of the logits that stay as they are (carried classes and background). The last column
            then has no rows of its own: to every other row, constants look like one constant.
        start: solution to start from.
        steps: of L-BFGS.

    Returns:
        (d, C), or (d, C - 1) with ``fixed``.
    """
    free = columns if fixed is None else columns - 1

    def loss_and_slope(logits: torch.Tensor, part: slice) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        if fixed is not None:
            logits = torch.cat([logits, fixed[part, None]], dim=1)
        target, weight = targets(part)
        log_p = F.log_softmax(logits, dim=1)
        loss = -(weight * target * log_p).sum()
        slope = weight * (log_p.exp() * target.sum(1, keepdim=True) - target)
        return loss, slope[:, :free], weight.sum()

    initial = z.new_zeros(z.shape[1], free) if start is None else start
    return _descend(z, loss_and_slope, penalty, torch.zeros_like(initial), initial, steps)


def logistic_rows(
    z: torch.Tensor,
    targets: Targets,
    penalty: float,
    *,
    prior: torch.Tensor,
    start: torch.Tensor | None = None,
    steps: int = 20,
) -> torch.Tensor:
    """Solve C independent logistic regressions by L-BFGS: mean BCE + penalty / 2 |solution - prior|^2.

    Args:
        z: (n, d).
        targets: of C columns.
        penalty: on everything but the intercept.
        prior: (d, C).
        start: solution to start from; the prior by default.
        steps: of L-BFGS.
    """

    def loss_and_slope(logits: torch.Tensor, part: slice) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        target, weight = targets(part)
        weight = weight.expand_as(target)
        loss = (weight * (F.softplus(logits) - target * logits)).sum()
        return loss, weight * (logits.sigmoid() - target), weight.sum() / target.shape[1]

    return _descend(z, loss_and_slope, penalty, prior, prior if start is None else start, steps)


def _descend(
    z: torch.Tensor,
    loss_and_slope: Callable[[torch.Tensor, slice], tuple[torch.Tensor, torch.Tensor, torch.Tensor]],
    penalty: float,
    prior: torch.Tensor,
    initial: torch.Tensor,
    steps: int,
) -> torch.Tensor:
    parts = [slice(i, i + CHUNK) for i in range(0, len(z), CHUNK)]
    total = sum(float(loss_and_slope(z[part] @ prior, part)[2]) for part in parts)
    if total <= 0:
        return prior.clone()
    strength = prior.new_full((prior.shape[0], 1), penalty)
    # A trace of penalty keeps the intercept of a column without examples where it was.
    strength[-1] = min(penalty, 1.0) * 1e-3
    # Box features are so correlated that plain L-BFGS has not arrived after 40 steps (bccd: AP 40.9, 41.4 after 200).
    whiten = whitening(z, parts, strength)
    offset = torch.linalg.solve(whiten, initial - prior)

    def closure() -> torch.Tensor:
        away = whiten @ offset
        theta = prior + away
        value: torch.Tensor = 0.5 * (strength * away * away).sum()
        slope = strength * away
        for part in parts:
            loss, by_logit, _ = loss_and_slope(z[part] @ theta, part)
            value = value + loss / total
            slope = slope + z[part].t() @ (by_logit / total)
        offset.grad = whiten @ slope
        return value

    solver = torch.optim.LBFGS(
        [offset],
        max_iter=steps,
        history_size=20,
        line_search_fn="strong_wolfe",
        tolerance_grad=1e-5,
        tolerance_change=1e-7,
    )
    solver.step(closure)  # type: ignore[no-untyped-call]
    found: torch.Tensor = prior + whiten @ offset.detach()
    return found


def whitening(z: torch.Tensor, parts: Sequence[slice], strength: torch.Tensor) -> torch.Tensor:
    """Compute the (d, d) symmetric inverse root of a typical Hessian: p (1 - p) is about 0.1 where it matters."""
    gram = sum((z[part].t() @ z[part] for part in parts), z.new_zeros(z.shape[1], z.shape[1]))
    hessian = 0.1 * gram.double() / len(z) + torch.diag(strength[:, 0].double() + 1e-6)
    values, vectors = torch.linalg.eigh(hessian)
    root: torch.Tensor = (vectors * values.clamp(min=1e-9).rsqrt()) @ vectors.t()
    narrow: torch.Tensor = root.to(z.dtype)
    return narrow


def ridge_rows(
    z: torch.Tensor, target: torch.Tensor, weight: torch.Tensor, penalty: float, prior: torch.Tensor
) -> torch.Tensor:
    """Solve weighted least squares toward a prior: sum w |target - z solution|^2 + penalty |solution - prior|^2.

    Args:
        z: (n, d).
        target: (n, C).
        weight: (n,).
        penalty: absolute, so that a class of few regions stays nearer to the prior than one of many.
        prior: (d, C).

    Returns:
        (d, C), solved in double precision.
    """
    wide = z.double()
    weighted = wide * weight.double()[:, None]
    strength = torch.full((z.shape[1],), penalty, dtype=torch.float64, device=z.device)
    strength[-1] = penalty * 1e-2
    gram = weighted.t() @ wide + torch.diag(strength)
    right = weighted.t() @ (target.double() - wide @ prior.double())
    solved: torch.Tensor = prior.double() + torch.linalg.solve(gram, right)
    return solved.to(z.dtype)


@dataclass(frozen=True)
class Problem:
    """One regression, and what its penalty is chosen by.

    Args:
        solve: (which of the n regions, penalty, solution to start from or ``None``) -> solution.
        loss: of a solution, on the held-out regions.
        held: (n,) bool, the held-out regions.
        rest: (n,) bool, those that a solution is made from while penalties are judged.
        nothing: the solution without the regions; ``None`` for what a penalty of :data:`NOTHING` leaves.
        counts: (n,) bool, those that say something; ``None`` for all.
    """

    solve: Callable[[torch.Tensor, float, torch.Tensor | None], torch.Tensor]
    loss: Callable[[torch.Tensor], float]
    held: torch.Tensor
    rest: torch.Tensor
    nothing: torch.Tensor | None = None
    counts: torch.Tensor | None = None

    def choose(self, penalties: Sequence[float], share: float) -> tuple[float, dict[str, tuple[float, float]]]:
        """Choose the penalty by held-out loss (see :func:`choose_penalty`), or the middle one if none can be judged.

        Returns:
            The penalty, and the held-out loss without and with a solution under ``held-out loss``; empty if not judged.
        """
        held, rest = (part if self.counts is None else part & self.counts for part in (self.held, self.rest))
        if not bool(held.any()) or not bool(rest.any()):
            return penalties[len(penalties) // 2], {}
        none = self.loss(self.solve(self.rest, NOTHING, None) if self.nothing is None else self.nothing)
        penalty, best = choose_penalty(
            penalties, lambda p, start: self.solve(self.rest, p, start), self.loss, none, share
        )
        return penalty, {"held-out loss": (none, best)}


def choose_penalty(
    penalties: Sequence[float],
    solve: Callable[[float, torch.Tensor | None], torch.Tensor],
    loss: Callable[[torch.Tensor], float],
    none: float,
    share: float,
) -> tuple[float, float]:
    """Choose the strongest penalty that keeps ``share`` of what the best one gains on held-out regions.

    A strong penalty means a solution of small norm, and fine-tuning then starts calmly: the gradients that reach the
    features below are as large as the rows above.

    Args:
        penalties: strongest first.
        solve: (penalty, solution to start from) -> solution, on the regions that are not held out.
        loss: of a solution on the held-out regions.
        none: the held-out loss without a solution.
        share: 0 to 1.

    Returns:
        The penalty and its held-out loss; the first penalty where none gains anything.
    """
    losses: list[float] = []
    solution: torch.Tensor | None = None
    for penalty in penalties:
        solution = solve(penalty, solution)
        losses.append(loss(solution))
        # After a turn, or without more to gain, weaker penalties cost time and norm only.
        if len(losses) > 1 and losses[-2] - losses[-1] < 0.5 * (1 - share) * (none - min(losses)):
            break
    gain = none - min(losses)
    if gain <= 0:
        return penalties[0], losses[0]
    return next((p, x) for p, x in zip(penalties, losses, strict=False) if none - x >= share * gain)
