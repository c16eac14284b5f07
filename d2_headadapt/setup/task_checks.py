"""Refuse tasks that nothing would read, before a model is built."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from detectron2.config import CfgNode
from detectron2.modeling import META_ARCH_REGISTRY, ROI_HEADS_REGISTRY

from ..data.task_spec import checked_task
from ..errors import ConfigError
from ..key import MODEL, TASKS

# detectron2's own architectures that hand their ground truth to MODEL.ROI_HEADS.NAME.
WITH_ROI_HEADS = ("GeneralizedRCNN", "PanopticFPN")
# Fields of detectron2's that pred_<name> or gt_<name> would overwrite.
TAKEN = ("classes", "boxes", "masks", "keypoints", "keypoint_heatmaps", "densepose", "proposals")


def check_tasks(cfg: CfgNode) -> None:
    """Raise where a declared task has no reader in the model that the config names.

    Architectures that are not detectron2's own may read tasks as they like. ROI heads say with a class attribute
    ``reads_box_tasks = True`` that they read those of boxes.

    Raises:
        ConfigError: a task of images in an architecture for detection or segmentation, one of boxes where no ROI heads
            read them, or one whose name is a field of detections.
    """
    levels: dict[str, str] = {name: checked_task(name, node)["on"] for name, node in _tasks(cfg).items()}
    architecture = cfg.MODEL.META_ARCHITECTURE
    heads = cfg.MODEL.ROI_HEADS.NAME
    # Names that nobody registered get their own message where the model is built.
    known = architecture in META_ARCH_REGISTRY and META_ARCH_REGISTRY.get(architecture).__module__
    ours = "MultiTaskClassifier"
    for name, level in levels.items():
        if level == "image" and known and known.startswith("detectron2."):
            raise ConfigError(
                TASKS[name].on,
                expected=f"an architecture that classifies images, as {ours} does",
                found=f"image, and {MODEL.META_ARCHITECTURE} {architecture}, which would never read the task",
                fix=f"Set {MODEL.META_ARCHITECTURE.set(ours)}, or {TASKS[name].on.set('box')}.",
            )
        if level != "box":
            continue
        if name in TAKEN:
            raise ConfigError(
                TASKS[name],
                expected="a name that is no field of detections",
                found=f"{name!r}: pred_{name} is detectron2's",
                fix=f"Rename the task, as in {name}_task.",
            )
        if architecture == ours or (known and known.startswith("detectron2.") and architecture not in WITH_ROI_HEADS):
            raise ConfigError(
                TASKS[name].on,
                expected=f"an architecture with ROI heads ({', '.join(WITH_ROI_HEADS)})",
                found=f"box, and {MODEL.META_ARCHITECTURE} {architecture}, which has none",
                fix=f"Set {MODEL.META_ARCHITECTURE.set(WITH_ROI_HEADS[0])}, or {TASKS[name].on.set('image')}.",
            )
        if architecture in WITH_ROI_HEADS and heads in ROI_HEADS_REGISTRY and not _reads_box_tasks(heads):
            raise ConfigError(
                MODEL.ROI_HEADS.NAME,
                expected=f"ROI heads that read tasks on boxes ({name}): {', '.join(_readers())}",
                found=repr(heads),
                fix=f"Set {MODEL.ROI_HEADS.NAME.set(TWINS.get(heads, _readers()[0]))}.",
            )


TWINS = {
    "StandardROIHeads": "HeadAdaptROIHeads",
    "CascadeROIHeads": "HeadAdaptCascadeROIHeads",
    "Res5ROIHeads": "HeadAdaptRes5ROIHeads",
}
"""The heads of this package by the name of detectron2's that they extend."""


def _tasks(cfg: CfgNode) -> Mapping[str, Any]:
    tasks: Mapping[str, Any] = cfg.MODEL.get("TASKS", {})
    return tasks


def _reads_box_tasks(name: str) -> bool:
    return bool(getattr(ROI_HEADS_REGISTRY.get(name), "reads_box_tasks", False))


def _readers() -> list[str]:
    return [name for name, _ in ROI_HEADS_REGISTRY if _reads_box_tasks(name)]
