"""The classifiers of tasks: one small head for each, on features that somebody else computes.

N   number of images, or of regions
C   number of features
K   number of classes of a task
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import nn

from ..adapt.layouts import HeadLayout
from ..adapt.registry import ModuleContext
from ..data.task_labels import MISSING
from ..data.task_spec import TaskSpec


class TaskHead(nn.Module):
    """A linear classifier, or one with a hidden layer.

    Args:
        in_features: C.
        spec: its task.
    """

    class_weights: torch.Tensor | None

    def __init__(self, in_features: int, spec: TaskSpec) -> None:
        super().__init__()
        self.spec = spec
        self.hidden = nn.Linear(in_features, spec.hidden) if spec.hidden else None
        self.predictor = nn.Linear(spec.hidden or in_features, len(spec.table))
        if self.hidden is not None:
            nn.init.kaiming_normal_(self.hidden.weight, nonlinearity="relu")
            nn.init.zeros_(self.hidden.bias)
        # As detectron2's own classifiers begin (modeling/roi_heads/fast_rcnn.py).
        nn.init.normal_(self.predictor.weight, std=0.01)
        nn.init.zeros_(self.predictor.bias)
        weights = None if spec.class_weights is None else torch.tensor(spec.class_weights)
        # Not in the checkpoint: it belongs to the data, not to the model.
        self.register_buffer("class_weights", weights, persistent=False)

    def features(self, x: torch.Tensor) -> torch.Tensor:
        """Compute what the last layer sees, (N, C) or (N, hidden)."""
        return x if self.hidden is None else F.relu(self.hidden(x))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute logits (N, K) of features (N, C)."""
        logits: torch.Tensor = self.predictor(self.features(x))
        return logits

    def scores(self, logits: torch.Tensor) -> torch.Tensor:
        """Compute probabilities (N, K): of one class each (softmax), or class by class (sigmoid)."""
        return logits.sigmoid() if self.spec.multi else logits.softmax(dim=-1)

    def chosen(self, scores: torch.Tensor) -> torch.Tensor:
        """Choose the best class (N,) int64, or for multi-label tasks (N, K) bool: the scores of 0.5 or more."""
        return scores >= 0.5 if self.spec.multi else scores.argmax(dim=1)

    def loss(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Compute the mean cross entropy over what is labelled; zero, with a graph, where nothing is.

        The mean is over this process's labels, as stock's losses are over this process's regions. Where one of two
        processes has all labels of a step, its gradient counts half of what one process would make of both halves,
        because DDP takes the mean over processes. A common count would need an exchange in every step, and would hang
        whatever calls the model in one process only, as the doctor and hooks of one's own do.

        Args:
            logits: (N, K).
            labels: (N,) int64 with :data:`MISSING`, or for several labels (N, K) of 0, 1 and :data:`MISSING`.
        """
        known = labels != MISSING
        if not bool(known.any()):
            # Every rank must see every parameter in its graph, or DDP waits forever.
            return logits.sum() * 0.0
        gamma = self.spec.focal_gamma
        if self.spec.multi:
            target = labels.to(logits.dtype).clamp(min=0)
            losses = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
            weights = torch.ones_like(losses) if self.class_weights is None else self.class_weights.expand_as(losses)
        else:
            logits, labels = logits[known], labels[known]
            losses = F.cross_entropy(logits, labels, reduction="none")
            weights = torch.ones_like(losses) if self.class_weights is None else self.class_weights[labels]
            known = known[known]
        if gamma:
            losses = losses * (1 - torch.exp(-losses)) ** gamma
        weights = weights * known
        return (losses * weights).sum() / weights.sum().clamp(min=1e-12)

    def head_layouts(self, context: ModuleContext) -> Iterable[HeadLayout]:
        """Describe the last layer, whose rows belong to the task's classes; a hidden layer serves them all."""
        for leaf in ("weight", "bias"):
            tensor = f"{context.name}.predictor.{leaf}".lstrip(".")
            yield HeadLayout(tensor, self.spec.name, context.name or self.spec.name, "task_head")


class TaskHeads(nn.Module):
    """One head for each task, on the same features.

    Args:
        in_features: C.
        specs: the tasks.
    """

    def __init__(self, in_features: int, specs: Sequence[TaskSpec]) -> None:
        super().__init__()
        self.specs = tuple(specs)
        for spec in specs:
            self.add_module(_module_name(spec.name), TaskHead(in_features, spec))

    def __iter__(self) -> Iterator[TaskHead]:
        return (self[spec.name] for spec in self.specs)

    def __len__(self) -> int:
        return len(self.specs)

    def __getitem__(self, name: str) -> TaskHead:
        return cast(TaskHead, self.get_submodule(_module_name(name)))

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """Compute logits (N, K) by task of features (N, C)."""
        return {head.spec.name: head(x) for head in self}

    def losses(self, logits: Mapping[str, torch.Tensor], labels: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Compute weighted losses as ``loss_task_<name>``; a task without an entry in ``labels`` has none.

        Args:
            logits: of :meth:`forward`.
            labels: see :meth:`TaskHead.loss`.
        """
        found: dict[str, torch.Tensor] = {}
        for head in self:
            name, own = head.spec.name, logits[head.spec.name]
            given = labels.get(name)
            if given is None:
                given = torch.full(own.shape if head.spec.multi else own.shape[:1], MISSING, device=own.device)
            found[f"loss_task_{name}"] = head.loss(own, given) * head.spec.loss_weight
        return found


def _module_name(task: str) -> str:
    """Prefix a task's name, which may be that of a module's attribute (``type``)."""
    return f"{task}_" if hasattr(TaskHeads, task) or task in ("specs", "training") else task
