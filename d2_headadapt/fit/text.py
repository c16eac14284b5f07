"""Fit text classifiers: the projection of region features into the space of class embeddings, on frozen features.

The class rows stay what the text encoder wrote, so classes that no image shows are scored too. What is solved is the
projection of region features and the learned background: a softmax over temperature x cosine, as in Detic.

n   number of regions
d   features, plus one that is always 1
K   classes; column K is background
D   width of the embeddings
r   dimensions of the space of the class rows and one more: no other direction changes a logit for the better
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from ..modeling.text.predictor import TextClassifier
from .rows import RowWriter, Solution
from .scores import ScoreSolution
from .settings import FitSettings
from .solvers import CHUNK, KEEP_LOSS, Frame, Problem, whitening

STEPS = 40
"""Of L-BFGS: on coco128 (penalty 0.03, temperature 50) the loss was 1.07 after 10 and 0.48 after 30."""

GRADIENT_TOLERANCE = 1e-6


def is_text(layer: Any) -> bool:
    """Tell whether a ``cls_score`` is one that :func:`solve_text` solves."""
    return isinstance(layer, TextClassifier)


def why_not_text(layer: Any) -> str | None:
    """Say why a text classifier cannot be solved; ``None`` where it can."""
    return "it has no projection: the features are in the space of the embeddings" if layer.projection is None else None


@dataclass(frozen=True)
class Projection:
    """A problem: which way do region features go into the space of the class rows?

    Args:
        rows: (C, r) unit rows of the C classes that some image shows.
        temperature: factor of the cosine.
        background: (r,) row of background where it is fixed; ``None`` where its logit is 0.
        learned: ``background`` is only where its solution starts.
    """

    rows: torch.Tensor
    temperature: float
    background: torch.Tensor | None
    learned: bool

    @property
    def width(self) -> int:
        """The rank r of the projection."""
        return int(self.rows.shape[1])

    def start(self, d: int) -> torch.Tensor:
        """Return (d + 1, r): every region at the mean of the rows; the last row is that of background."""
        found = self.rows.new_zeros(d + 1, self.width)
        found[d - 1] = F.normalize(self.rows.mean(0), dim=0)
        if self.background is not None:
            found[d] = self.background
        return found

    def logits(self, z: torch.Tensor, theta: torch.Tensor) -> torch.Tensor:
        """Compute logits (n, C + 1) of regions (n, d) under a solution (d + 1, r)."""
        x = self.temperature * F.normalize(z @ theta[:-1], dim=1)
        if self.background is None:
            return torch.cat([x @ self.rows.t(), x.new_zeros(len(x), 1)], dim=1)
        row = F.normalize(theta[-1] if self.learned else self.background, dim=0)
        return torch.cat([x @ self.rows.t(), (x @ row)[:, None]], dim=1)

    def loss(self, z: torch.Tensor, target: torch.Tensor, weight: torch.Tensor, theta: torch.Tensor) -> torch.Tensor:
        """Compute the weighted mean cross entropy toward (n, C + 1) ``target``."""
        total = z.new_zeros(())
        for i in range(0, len(z), CHUNK):
            part = slice(i, i + CHUNK)
            log_p = F.log_softmax(self.logits(z[part], theta), dim=1)
            total = total - (weight[part, None] * target[part] * log_p).sum()
        return total / weight.sum()

    def solve(
        self,
        z: torch.Tensor,
        target: torch.Tensor,
        weight: torch.Tensor,
        penalty: float,
        start: torch.Tensor | None = None,
        steps: int = STEPS,
    ) -> torch.Tensor:
        """Solve by L-BFGS :meth:`loss` + penalty / 2 |projection - start|^2, where start is :meth:`start`.

        Args:
            z: (n, d).
            target: (n, C + 1).
            weight: (n,).
            penalty: on everything but the intercept.
            start: solution to begin with.
            steps: of L-BFGS.

        Returns:
            (d + 1, r).
        """
        d = z.shape[1]
        prior = self.start(d)
        strength = z.new_full((d, 1), penalty)
        strength[-1] = min(penalty, 1.0) * 1e-3
        parts = [slice(i, i + CHUNK) for i in range(0, len(z), CHUNK)]
        whiten = whitening(z, parts, strength)
        begin = prior if start is None else start
        offset = torch.linalg.solve(whiten, begin[:-1] - prior[:-1]).contiguous().requires_grad_()
        row = begin[-1].clone().requires_grad_()

        def theta() -> tuple[torch.Tensor, torch.Tensor]:
            away = whiten @ offset
            return torch.cat([prior[:-1] + away, row[None]]), away

        def closure() -> torch.Tensor:
            solver.zero_grad()
            solution, away = theta()
            value = self.loss(z, target, weight, solution) + 0.5 * (strength * away * away).sum()
            value.backward()  # type: ignore[no-untyped-call]
            return value

        solver = torch.optim.LBFGS(
            [offset, row],
            max_iter=steps,
            history_size=10,
            line_search_fn="strong_wolfe",
            tolerance_grad=GRADIENT_TOLERANCE,
            tolerance_change=1e-8,
        )
        with torch.enable_grad():
            solver.step(closure)  # type: ignore[no-untyped-call]
            return theta()[0].detach()


def solve_text(
    stage: Any, sample: dict[str, torch.Tensor], share: torch.Tensor, writer: RowWriter, num_classes: int,
    settings: FitSettings,
) -> ScoreSolution:  # fmt: skip
    """Solve projection and learned background of a text classifier; its class rows and temperature stay.

    A class that no region shows takes no part in the softmax that is solved, and is scored by its embedding.

    Args:
        stage: whose predictor.
        sample: ``x``, ``label``, ``weight`` and ``held``, (n, ...).
        share: (n,) how much of a region is its object; the rest is background.
        writer: knows the new classes.
        num_classes: K.
        settings: penalties.
    """
    tensor, layer = f"{stage.name}.cls_score", stage.predictor.cls_score
    label, weight, held = sample["label"], sample["weight"], sample["held"]
    shown = set(label[share > 0].tolist())
    seen = [k for k in range(num_classes) if k in shown]
    if not seen:
        return ScoreSolution([], "no image shows a class", writer.new(f"{tensor}.embeddings"))
    rows = F.normalize(writer.value(f"{tensor}.embeddings").to(label.device), dim=1)[seen]
    old = None if layer.background is None else writer.value(f"{tensor}.background").to(label.device)
    learned = layer.background is not None and bool(layer.background.requires_grad)
    basis = _basis(rows if old is None or learned else torch.cat([rows, F.normalize(old, dim=0)[None]]), extra=learned)
    row = None
    if old is not None:
        # The learned one starts in the one direction that is no class's.
        row = basis[:, -1] @ basis if learned else F.normalize(old, dim=0) @ basis
    projection = Projection(rows @ basis, layer.temperature, row, learned)
    frame = Frame.of(sample["x"])
    z = frame.apply(sample["x"])
    where = torch.full((num_classes + 1,), len(seen), dtype=torch.int64, device=label.device)
    where[seen] = torch.arange(len(seen), device=label.device)
    target = z.new_zeros(len(z), len(seen) + 1)
    target.scatter_(1, where[label][:, None], share[:, None])
    target[:, -1] += 1 - share

    def solve(own: torch.Tensor, penalty: float, start: torch.Tensor | None) -> torch.Tensor:
        return projection.solve(z[own], target[own], weight[own], penalty, start)

    def loss(theta: torch.Tensor) -> float:
        return float(projection.loss(z[held], target[held], weight[held], theta))

    problem = Problem(solve, loss, held, ~held, projection.start(z.shape[1]))
    penalty, score = problem.choose(settings.penalties, KEEP_LOSS)
    theta = solve(torch.ones_like(held), penalty, None)
    wide = theta @ basis.t()
    matrix, bias = frame.rows(wide[:-1])
    every = torch.arange(len(bias))
    solutions = [
        Solution(f"{tensor}.projection.weight", every, matrix.cpu()),
        Solution(f"{tensor}.projection.bias", every, bias.cpu()),
    ]
    if learned:
        solutions.append(Solution(f"{tensor}.background", every, F.normalize(wide[-1], dim=0).cpu()))
    what = " and background" if learned else ""
    reason = f"the projection{what}, from {len(seen)} of {num_classes} classes; their embeddings stay"
    # No class is missing: one without a region is scored by its embedding.
    return ScoreSolution(solutions, reason, (), 0, {"projection": penalty}, score)


def _basis(rows: torch.Tensor, *, extra: bool) -> torch.Tensor:
    """Compute (D, r) orthonormal: the space of ``rows`` (C, D) and, where there is room, one direction outside."""
    _, values, directions = torch.linalg.svd(rows.double(), full_matrices=extra and rows.shape[0] < rows.shape[1])
    rank = int((values > 1e-6 * values[0]).sum())
    found: torch.Tensor = directions[: rank + int(extra)].t().to(rows.dtype)
    return found
