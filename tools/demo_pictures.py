"""The PNGs of the demonstrations: curves of AP, and images with each model's boxes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
from demo_arms import GROUPS, ArmResult, grouped_curve, groups_with_truth
from detectron2.data import MetadataCatalog
from detectron2.structures import BoxMode, Instances
from detectron2.utils.visualizer import Visualizer
from matplotlib.figure import Figure
from numpy.typing import NDArray

# Inches of one image.
WIDTH = 2.9
DPI = 110
# Seen on light and on dark backgrounds.
PALETTE = ("#e6194b", "#00b894", "#f39c12", "#3b82f6", "#d946ef", "#65a30d", "#8b5cf6", "#06b6d4")

Array = NDArray[Any]


def draw_curves(
    path: Path,
    results: Sequence[ArmResult],
    carried: Sequence[str],
    new: Sequence[str],
    title: str,
    lines: dict[str, dict[str, float]] | None = None,
) -> None:
    """AP over iterations, one panel for each group of classes that has ground truth.

    Args:
        path: of the PNG.
        results: one curve each.
        carried, new: the groups.
        title: over all panels.
        lines: horizontal lines to compare with: name -> group -> AP.
    """
    curves = {result.arm: grouped_curve(result, carried, new) for result in results}
    groups = groups_with_truth(list(curves.values()))
    names = {GROUPS[0]: [*carried, *new], GROUPS[1]: carried, GROUPS[2]: new}
    figure = Figure(figsize=(max(4.6 * len(groups), 7.0), 4.2), layout="constrained")
    panels = figure.subplots(1, len(groups), sharey=True, squeeze=False)[0]
    for panel, group in zip(panels, groups, strict=True):
        for arm, curve in curves.items():
            x, y = [p["iteration"] for p in curve], [p[group] for p in curve]
            panel.plot(x, y, "o-", color=arm.colour, label=arm.name, markersize=4)
        for name, values in (lines or {}).items():
            if group in values:
                panel.axhline(values[group], color="0.4", linestyle="--", label=name)
        panel.set_title(f"{group}\n{_few(names[group])}", fontsize=10)
        panel.set_xlabel("iterations of fine-tuning")
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("box AP on held-out images")
    panels[0].set_ylim(bottom=-1)
    handles = {
        label: handle for panel in panels for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)
    }
    figure.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=len(handles))
    figure.suptitle(title)
    figure.savefig(path, dpi=DPI)


def draw_predictions(
    path: Path,
    results: Sequence[ArmResult],
    samples: Sequence[dict[str, Any]],
    dataset: str,
    title: str,
    threshold: float = 0.5,
) -> None:
    """Ground truth and each arm's boxes, before the first iteration and after the last; a row for each image.

    Args:
        path: of the PNG.
        results: two columns each.
        samples: with ``file_name`` and ``annotations``.
        dataset: whose class names to write.
        title: over all.
        threshold: least score of a box that is drawn.
    """
    last = results[0].curve[-1][0]
    columns = [("ground truth", [None] * len(samples))]
    columns += [(f"{r.arm.name}\nstep 0", list(r.pictures[0])) for r in results]
    columns += [(f"{r.arm.name}\n{last} iterations", list(r.pictures[-1])) for r in results]
    images = [cv2.imread(sample["file_name"])[:, :, ::-1] for sample in samples]
    height = sum(WIDTH * image.shape[0] / image.shape[1] + 0.1 for image in images)
    figure = Figure(figsize=(WIDTH * len(columns), height + 0.9), layout="constrained")
    ratios = [image.shape[0] / image.shape[1] for image in images]
    cells = figure.subplots(len(images), len(columns), squeeze=False, height_ratios=ratios)
    for row, (image, sample) in enumerate(zip(images, samples, strict=True)):
        for column, (name, predictions) in enumerate(columns):
            cell = cells[row][column]
            cell.imshow(_drawn(image, sample, predictions[row], dataset, threshold))
            cell.axis("off")
            if row == 0:
                cell.set_title(name, fontsize=11)
    figure.suptitle(f"{title} (boxes with a score of {threshold} or more)")
    figure.savefig(path, dpi=DPI)


def _drawn(
    image: Array, sample: dict[str, Any], predictions: Instances | None, dataset: str, threshold: float
) -> Array:
    metadata = MetadataCatalog.get(dataset)
    names = metadata.thing_classes
    if predictions is None:
        classes = [annotation["category_id"] for annotation in sample["annotations"]]
        boxes = [BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYXY_ABS) for a in sample["annotations"]]
        labels = [names[i] for i in classes]
    else:
        kept = predictions[predictions.scores >= threshold]
        classes, boxes = kept.pred_classes.tolist(), kept.pred_boxes.tensor.tolist()
        labels = [f"{names[i]} {score:.0%}" for i, score in zip(classes, kept.scores.tolist(), strict=True)]
    # At the size that it has in the figure, so that text and lines keep theirs. Piece by piece, because
    # overlay_instances draws boxes half transparent, in random colours.
    visualizer = Visualizer(image, metadata, scale=WIDTH * DPI / image.shape[1])
    lowest = image.shape[0] - 16 / visualizer.output.scale
    for i, box, label in zip(classes, boxes, labels, strict=True):
        visualizer.draw_box(box, alpha=1.0, edge_color=PALETTE[i % len(PALETTE)])
        visualizer.draw_text(label, (box[0], min(box[3], lowest)), color="w", horizontal_alignment="left")
    result: Array = visualizer.output.get_image()
    return result


def _few(names: Sequence[str], most: int = 6) -> str:
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"
