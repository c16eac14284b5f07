"""Fit heads of classification tasks: new rows of each task's last layer, from images or boxes with known labels.

n   number of images, or of boxes
d   features that a task's last layer sees, plus one that is always 1
K   classes of a task
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from ..data.task_labels import MISSING
from ..key import MODEL
from ..modeling.task_boxes import has_tasks
from ..modeling.task_dry_run import padded_size
from ..modeling.task_heads import TaskHead, TaskHeads
from .boxes import region_features, stages_of
from .images import ImageStream, View
from .reservoir import Reservoir, room
from .rows import RowWriter, Solution
from .scores import held_out_loss
from .settings import FitSettings, PartReport
from .sharing import gathered, on_rank_zero, placed
from .solvers import KEEP_LOSS, Frame, Problem, Targets, logistic_rows, softmax_rows

WIDEST = 8192
"""A solve whitens the features, which takes the square of their number: 200,704 flattened ones would be 150 GB."""


@dataclass(frozen=True)
class _Part:
    """One head to be solved.

    Args:
        name: of the head in the model.
        head: of one task.
        place: of the heads that share its features: a cascade's stage, 0 elsewhere.
    """

    name: str
    head: TaskHead
    place: int

    @property
    def width(self) -> int:
        return self.head.predictor.in_features


def fit_tasks(
    model: Any, stream: ImageStream, writer: RowWriter, settings: FitSettings
) -> tuple[list[PartReport], dict[str, tuple[int, ...]]]:
    """Solve the new rows of every task's last layer.

    Images are those of a ``MultiTaskClassifier``, boxes the true ones of the images: at a cascade's later stages too,
    where the regions that a detection ends at lie close to them. Carried rows, and rows of new classes without an
    example, enter as constants.

    Args:
        model: with :class:`TaskHeads` on its images or in its box predictors.
        stream: the images.
        writer: knows the new classes; writes and undoes.
        settings: how.

    Returns:
        One report for each head with new rows, and the new classes without an example by task.
    """
    reports: list[PartReport] = []
    missing: dict[str, set[int]] = {}
    parts: list[_Part] = []
    for part in _parts(model):
        tensor = f"{part.name}.predictor.weight"
        problem = None if "task" in settings.parts else "FIT.PARTS leaves it out"
        if part.width > WIDEST:
            problem = f"{part.width} features are too many to solve; {MODEL.CLASSIFIER.POOLING.set('avg')!s} has fewer"
        if not writer.new(tensor):
            continue
        if problem is None:
            parts.append(part)
        else:
            reports.append(PartReport(part.name, "kept", problem))
            missing.setdefault(part.head.spec.name, set()).update(writer.new(tensor))
    if not parts:
        return reports, {task: tuple(sorted(classes)) for task, classes in missing.items()}
    reservoirs = collect_inputs(model, parts, stream.views("tasks"), settings)
    for part in parts:
        sample = gathered(reservoirs[part.name])
        device = part.head.predictor.weight.device

        def work(
            part: _Part = part, sample: dict[str, torch.Tensor] = sample, device: torch.device = device
        ) -> tuple[list[Solution], PartReport, tuple[int, ...]]:
            if not sample:
                nothing = PartReport(part.name, "kept", "no label of the task was found")
                return [], nothing, writer.new(f"{part.name}.predictor.weight")
            return solve_task(part.name, part.head, placed(sample, stream.held_out, device), writer, settings)

        solutions, report, without = on_rank_zero(work, part.name)
        writer.write(solutions)
        reports.append(report)
        missing.setdefault(part.head.spec.name, set()).update(without)
    return reports, {task: tuple(sorted(classes)) for task, classes in missing.items() if classes}


def _parts(model: Any) -> Iterator[_Part]:
    names = {id(module): name for name, module in model.named_modules()}
    if isinstance(getattr(model, "heads", None), TaskHeads) and hasattr(model, "image_features"):
        yield from (_Part(names[id(head)], head, 0) for head in model.heads)
    for stage in stages_of(getattr(model, "roi_heads", None), "roi_heads"):
        if has_tasks(stage.predictor):
            yield from (_Part(names[id(head)], head, stage.number) for head in stage.predictor.tasks)


def collect_inputs(
    model: Any, parts: list[_Part], views: Iterator[View], settings: FitSettings
) -> dict[str, Reservoir]:
    """Collect what each head's last layer sees of images or boxes whose label is known, and that label."""
    reservoirs = {part.name: Reservoir({}, max(2, room(settings.regions, part.width))) for part in parts}
    for view in views:
        shared: dict[int, torch.Tensor] = {}
        for part in parts:
            if part.place not in shared:
                shared[part.place] = _inputs(model, part, view)
            label = _labels(part.head, view)
            known = (label != MISSING) if label.dim() == 1 else (label != MISSING).any(1)
            if not bool(known.any()):
                continue
            x, label = part.head.features(shared[part.place][known]).float(), label[known]
            # Several labels make no strata: an image of a rare one is as good as many are.
            stratum = label if label.dim() == 1 else label.new_zeros(len(label), dtype=torch.int64)
            reservoirs[part.name].add(view.key, view.number, stratum, {"x": x, "label": label})
    return reservoirs


def _inputs(model: Any, part: _Part, view: View) -> torch.Tensor:
    """Compute (n, C) features of the one image, or of its boxes."""
    if not hasattr(model, "roi_heads"):
        found: torch.Tensor = model.image_features(view.features, padded_size(model.backbone, view.size), [view.size])
        return found
    stage = stages_of(model.roi_heads, "roi_heads")[part.place]
    return region_features(model.roi_heads, stage, view, view.truth.gt_boxes)


def _labels(head: TaskHead, view: View) -> torch.Tensor:
    """Return (n,) int64, or (n, K) for several labels; all missing where the image says nothing of the task."""
    name = head.spec.name
    if head.spec.on == "image":
        label = view.tasks.get(name)
        count = 1
    else:
        label = view.truth.get(f"gt_{name}") if view.truth.has(f"gt_{name}") else None
        count = len(view.truth)
    shape = (count, len(head.spec.table)) if head.spec.multi else (count,)
    if label is None:
        return torch.full(shape, MISSING, device=head.predictor.weight.device)
    return label.reshape(shape)


def solve_task(
    name: str, head: TaskHead, sample: dict[str, torch.Tensor], writer: RowWriter, settings: FitSettings
) -> tuple[list[Solution], PartReport, tuple[int, ...]]:
    """Solve new rows of one head: multinomial, or one by one where there may be several labels.

    Args:
        name: of the head in the model.
        head: whose last layer.
        sample: ``x``, ``label``, ``weight`` and ``held``, (n, ...).
        writer: knows the new classes.
        settings: penalties.

    Returns:
        Rows to write, the report, and the new classes without an example.
    """
    new = writer.new(f"{name}.predictor.weight")
    label = sample["label"]
    positive = label == 1 if head.spec.multi else F.one_hot(label, len(head.spec.table)).bool()
    shown = positive.any(0).tolist()
    seen, missing = [k for k in new if shown[k]], tuple(k for k in new if not shown[k])
    if not seen:
        return [], PartReport(name, "kept", "no image shows a new class"), missing
    solver = _several(sample, seen) if head.spec.multi else _one_of(head, sample, seen)
    held, everything = sample["held"], torch.ones_like(sample["held"])
    counts = solver.weight.sum(1) > 0
    problem = Problem(solver.solve, lambda solution: solver.loss(held, solution), held, ~held, counts=counts)
    penalty, score = problem.choose(settings.penalties, KEEP_LOSS)
    weight, bias = solver.frame.rows(solver.solve(everything, penalty, None))
    solutions = [
        Solution(f"{name}.predictor.weight", torch.tensor(seen), weight.cpu()),
        Solution(f"{name}.predictor.bias", torch.tensor(seen), bias.cpu()),
    ]
    what = "images" if head.spec.on == "image" else "boxes"
    reason = f"{len(seen)} new classes, from {what} with labels"
    report = PartReport(name, "solved", reason, len(label), 0, {"predictor": penalty}, score)
    return solutions, report, missing


@dataclass(frozen=True)
class _Regression:
    """The regression of one head's new rows.

    Args:
        frame: of the features.
        z: (n, d).
        target: (n, C); with ``fixed`` its last column stands for all rows that stay.
        weight: (n, 1), or (n, C) where single labels are missing.
        fixed: (n,) log-sum-exp of the logits that stay; ``None`` where none does, and for several labels.
        several: there may be several labels.
    """

    frame: Frame
    z: torch.Tensor
    target: torch.Tensor
    weight: torch.Tensor
    fixed: torch.Tensor | None
    several: bool

    def _targets(self, rows: torch.Tensor) -> Targets:
        target, weight = self.target[rows], self.weight[rows]
        return lambda piece: (target[piece], weight[piece])

    def solve(self, rows: torch.Tensor, penalty: float, start: torch.Tensor | None) -> torch.Tensor:
        """Solve the new rows, (d, C), on some of the n."""
        z, targets, columns = self.z[rows], self._targets(rows), self.target.shape[1]
        if self.several:
            return logistic_rows(z, targets, penalty, prior=z.new_zeros(z.shape[1], columns), start=start)
        fixed = None if self.fixed is None else self.fixed[rows]
        return softmax_rows(z, targets, penalty, columns=columns, fixed=fixed, start=start)

    def loss(self, rows: torch.Tensor, solution: torch.Tensor) -> float:
        """Compute the mean loss on some of the n."""
        fixed = None if self.fixed is None else self.fixed[rows]
        return held_out_loss(self.z[rows], solution, self._targets(rows), fixed, self.several)


def _several(sample: Mapping[str, torch.Tensor], seen: list[int]) -> _Regression:
    frame = Frame.of(sample["x"])
    label = sample["label"][:, seen]
    weight = sample["weight"][:, None] * (label != MISSING)
    return _Regression(frame, frame.apply(sample["x"]), label.clamp(min=0).to(weight), weight, None, True)


def _one_of(head: TaskHead, sample: Mapping[str, torch.Tensor], seen: list[int]) -> _Regression:
    frame = Frame.of(sample["x"])
    label, weight = sample["label"], sample["weight"]
    if head.class_weights is not None:
        weight = weight * head.class_weights.to(weight)[label]
    still = [k for k in range(len(head.spec.table)) if k not in seen]
    logits: torch.Tensor = head.predictor(sample["x"].to(head.predictor.weight)).float()
    fixed = torch.logsumexp(logits[:, still], dim=1) if still else None
    where = torch.full((len(head.spec.table),), len(seen), dtype=torch.int64, device=label.device)
    where[seen] = torch.arange(len(seen), device=label.device)
    target = F.one_hot(where[label], len(seen) + bool(still)).to(sample["x"])
    return _Regression(frame, frame.apply(sample["x"]), target, weight[:, None], fixed, False)
