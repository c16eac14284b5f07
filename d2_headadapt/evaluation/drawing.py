"""Draw predictions with detectron2's ``Visualizer``: boxes with labels of tasks, image tasks in the corner.

H, W    of the image, in pixels
n       number of detections
K       number of classes of a task
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from detectron2.data import Metadata
from detectron2.structures import Instances
from detectron2.utils.colormap import colormap
from detectron2.utils.visualizer import VisImage, Visualizer
from numpy.typing import NDArray

from ..data.task_spec import TaskSpec

MARGIN = 0.01
"""Between the corner of the image and its text, as a share of the longer side."""


def draw_tasks(
    image: NDArray[np.uint8],
    output: Mapping[str, Any],
    metadata: Metadata | None,
    specs: Sequence[TaskSpec],
    *,
    least_score: float = 0.5,
    scale: float = 1.0,
) -> VisImage:
    """Draw what a model says of an image; the same colours for the same input.

    Args:
        image: RGB (H, W, 3) uint8.
        output: one of the model's: tasks on images as ``scores_<task>`` and ``pred_<task>``, detections as
            ``instances``.
        metadata: whose ``thing_classes`` and ``thing_colors`` are used; ``None`` draws numbers of classes.
        specs: the tasks to write; those that the output lacks are left out.
        least_score: of a box that is drawn.
        scale: of the drawing.

    Returns:
        VisImage: ``get_image()`` gives (scale H, scale W, 3), ``save(path)`` writes a file.
    """
    visualizer = Visualizer(image, metadata, scale=scale)
    if "instances" in output:
        instances = output["instances"].to(torch.device("cpu"))
        instances = instances[instances.scores >= least_score]
        visualizer.overlay_instances(
            boxes=instances.pred_boxes,
            masks=np.asarray(instances.pred_masks) if instances.has("pred_masks") else None,
            keypoints=instances.pred_keypoints if instances.has("pred_keypoints") else None,
            labels=box_labels(instances, metadata.get("thing_classes") if metadata is not None else None, specs),
            assigned_colors=_colours(instances, metadata),
        )
    lines = image_lines(output, specs)
    if lines:
        margin = MARGIN * max(image.shape[:2])
        visualizer.draw_text("\n".join(lines), (margin, margin), color="w", horizontal_alignment="left")
    return visualizer.output


def image_lines(output: Mapping[str, Any], specs: Sequence[TaskSpec]) -> list[str]:
    """Write one line for each task on images that the output holds, in the order of ``specs``.

    Args:
        output: with ``pred_<task>`` and ``scores_<task>`` (K,).
        specs: the tasks; those on boxes are left out.
    """
    return [
        task_line(spec, output[f"pred_{spec.name}"], output[f"scores_{spec.name}"])
        for spec in specs
        if spec.on == "image" and f"scores_{spec.name}" in output
    ]


def box_labels(instances: Instances, classes: Sequence[str] | None, specs: Sequence[TaskSpec]) -> list[str]:
    """Write the text of each detection: its class and score, then a line for each task on boxes.

    Args:
        instances: n detections with ``pred_classes``, ``scores`` and, by task, ``pred_<task>`` and ``scores_<task>``.
        classes: names of the classes; ``None`` for their numbers.
        specs: the tasks; those on images, and those that the detections lack, are left out.
    """
    there = [spec for spec in specs if spec.on == "box" and instances.has(f"scores_{spec.name}")]
    labels = []
    for i, (k, score) in enumerate(zip(instances.pred_classes.tolist(), instances.scores.tolist(), strict=True)):
        lines = [f"{classes[k] if classes else k} {score:.0%}"]
        for spec in there:
            found = instances.get(f"pred_{spec.name}")[i]
            predicted = found.nonzero().flatten().tolist() if spec.multi else int(found)
            lines.append(task_line(spec, predicted, instances.get(f"scores_{spec.name}")[i]))
        labels.append("\n".join(lines))
    return labels


def task_line(spec: TaskSpec, predicted: int | Sequence[int], scores: Sequence[float] | torch.Tensor) -> str:
    """Write what one task predicts: ``colour: red 93%``, or ``tags: striped 80%, woollen 61%``, surest first.

    Args:
        spec: the task.
        predicted: class index; for a multi-label task any number of them.
        scores: (K,).
    """
    chosen = sorted(predicted, key=lambda k: -float(scores[k])) if not isinstance(predicted, int) else [predicted]
    said = ", ".join(f"{spec.table.names[k]} {float(scores[k]):.0%}" for k in chosen)
    return f"{spec.name}: {said or 'none'}"


def _colours(instances: Instances, metadata: Metadata | None) -> list[Any]:
    """Give each class a colour of its own; the visualizer would draw random ones."""
    own = metadata.get("thing_colors") if metadata is not None else None
    palette = np.asarray(own) / 255 if own else colormap(rgb=True, maximum=1)
    return [palette[k % len(palette)] for k in instances.pred_classes.tolist()]
