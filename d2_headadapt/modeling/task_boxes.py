"""Choose which region features and which labels the heads of tasks on boxes see.

R   number of regions
K   number of classes of a task
C   number of features of a region
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from detectron2.structures import Instances
from detectron2.utils.events import get_event_storage
from torch import nn

from ..data.task_labels import MISSING
from ..errors import ConfigError
from ..key import TASKS
from .task_heads import TaskHead, TaskHeads


class Predictions(tuple[torch.Tensor, torch.Tensor]):
    """Scores and deltas, as stock detectron2 unpacks them, with the region features (R, C) that they came from.

    Tasks are classified only where they are asked for: on foreground regions in training, and on the few regions that
    become detections. Which these are is known only after this was made.
    """

    features: torch.Tensor

    def __new__(cls, pair: Iterable[torch.Tensor], features: torch.Tensor) -> Predictions:
        made = super().__new__(cls, pair)
        made.features = features
        return made


def features_of(predictions: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Return the region features (R, C) of a predictor with tasks from its predictions.

    Raises:
        ConfigError: somebody rebuilt the pair, and the features are gone.
    """
    if not isinstance(predictions, Predictions):
        raise ConfigError(
            TASKS,
            expected="the predictions that the box predictor's forward returned",
            found="a plain pair of scores and deltas, made by other ROI heads",
            fix="Pass the predictor's own return value to losses() and inference(), or remove the tasks on boxes.",
        )
    return predictions.features


def has_tasks(predictor: nn.Module) -> bool:
    """Tell whether a box predictor, of whatever class, classifies tasks."""
    return isinstance(getattr(predictor, "tasks", None), TaskHeads)


def carry_labels(heads: TaskHeads, truth: Instances, regions: Instances, matched: torch.Tensor) -> None:
    """Set ``gt_<task>`` of regions to that of the object each was matched to, in place.

    Args:
        heads: whose labels.
        truth: the objects of one image; fields that it does not have are missing in ``regions`` too.
        regions: of the same image.
        matched: (R,) indices into ``truth``; meaningless where it is empty.
    """
    for head in heads if len(truth) else ():
        field = f"gt_{head.spec.name}"
        if truth.has(field):
            regions.set(field, truth.get(field)[matched])


def task_labels(head: TaskHead, proposals: Sequence[Instances], chosen: Sequence[torch.Tensor]) -> torch.Tensor:
    """Join the labels of one task on the chosen regions of all images; missing where an image has none of it.

    Args:
        head: of the task.
        proposals: one for each image; ``gt_<task>`` may be absent.
        chosen: bool (R_i,) for each image.

    Returns:
        (n,) int64, or (n, K) float for several labels.
    """
    width, dtype = ((head.predictor.out_features,), torch.float32) if head.spec.multi else ((), torch.int64)
    field = f"gt_{head.spec.name}"
    parts = [
        image.get(field)[rows].to(dtype)
        if image.has(field)
        else torch.full((int(rows.sum()), *width), MISSING, dtype=dtype, device=rows.device)
        for image, rows in zip(proposals, chosen, strict=True)
    ]
    return torch.cat(parts)


@torch.no_grad()
def log_accuracies(logits: Mapping[str, torch.Tensor], labels: Mapping[str, torch.Tensor]) -> None:
    """Put ``task/<name>/accuracy`` of every task with a known label into the ``EventStorage``, as fast_rcnn does."""
    shares = {}
    for name, own in logits.items():
        known = labels[name] != MISSING
        guess = own.argmax(dim=1) if known.dim() == 1 else (own >= 0).to(labels[name].dtype)
        shares[name] = torch.stack([((guess == labels[name]) & known).sum(), known.sum()])
    # One wait for the device instead of two for each task.
    for name, (right, count) in zip(shares, torch.stack(list(shares.values())).tolist(), strict=True):
        if count:
            get_event_storage().put_scalar(f"task/{name}/accuracy", right / count)
