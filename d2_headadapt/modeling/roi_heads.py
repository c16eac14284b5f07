"""The registered ROI heads: stock detectron2's three, with a predictor that knows its classes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling.roi_heads import (
    ROI_HEADS_REGISTRY,
    CascadeROIHeads,
    FastRCNNOutputLayers,
    Res5ROIHeads,
    StandardROIHeads,
)
from detectron2.structures import Boxes, Instances, pairwise_iou
from torch import nn

from ..adapt.classes import ClassTable
from ..config.settings import AdaptSettings, apply_num_classes, attach_settings, with_keys
from ..data.task_spec import TaskSpec, task_specs
from ..errors import ConfigError
from ..key import HEAD_ADAPT, TASKS
from .predictor import replace_predictor
from .task_boxes import carry_labels, features_of, has_tasks


class HeadAdaptMixin:
    """A mixin before a stock ROI-heads class: it replaces the box predictor and keeps the user's settings.

    A predictor that a subclass built itself, of another class than stock's, is left alone. Tasks on boxes are part of
    the predictor, in a cascade of the last one.
    """

    reads_box_tasks = True
    mask_on: bool
    mask_head: Any
    box_predictor: Any

    @configurable
    def __init__(
        self, *, settings: AdaptSettings | None = None, cls_agnostic_mask: bool = False, **kwargs: Any
    ) -> None:
        """
        Args:
            settings: left on the module for the checkpointer.
            cls_agnostic_mask: one mask for all classes; a one-class mask head has the same shape.
            kwargs: the stock class's.
        """
        super().__init__(**kwargs)
        if settings is not None:
            attach_settings(self, settings)  # type: ignore[arg-type]
        if self.mask_on:
            self.mask_head.cls_agnostic = cls_agnostic_mask

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        """Read the parent's arguments, for the class count of the target table."""
        settings = AdaptSettings.from_config(cfg)
        cfg = with_keys(cfg).clone()
        cfg.defrost()
        apply_num_classes(cfg, settings.target)
        ret: dict[str, Any] = super().from_config(cfg, input_shape)  # type: ignore[misc]
        table = settings.target.get("thing")
        tasks = task_specs(cfg, on="box")
        if "box_predictor" in ret:
            ret["box_predictor"] = _ours(cfg, ret["box_predictor"], table, tasks)
        if "box_predictors" in ret:
            *early, last = ret["box_predictors"]
            ret["box_predictors"] = [*(_ours(cfg, stock, table) for stock in early), _ours(cfg, last, table, tasks)]
        return {**ret, "settings": settings, "cls_agnostic_mask": cfg.MODEL.ROI_MASK_HEAD.CLS_AGNOSTIC_MASK}

    def forward_with_given_boxes(
        self, features: dict[str, torch.Tensor], instances: list[Instances]
    ) -> list[Instances]:
        """Run the parent's mask and keypoint heads, and the tasks of boxes that do not have them yet.

        Detections of the standard and C4 heads have the tasks of their region already. Those of a cascade, whose final
        boxes are those of no region, and boxes that come from elsewhere (``inference(detected_instances=...)``) are
        pooled once more.

        Args:
            features: by name of the feature map.
            instances: with ``pred_boxes`` and ``pred_classes``; get ``pred_<task>`` and ``scores_<task>`` in place.
        """
        instances = super().forward_with_given_boxes(features, instances)  # type: ignore[misc]
        predictor: Any = self.box_predictor[-1] if isinstance(self.box_predictor, nn.ModuleList) else self.box_predictor
        if has_tasks(predictor):
            fields = [f"scores_{head.spec.name}" for head in predictor.tasks]
            if not all(image.has(field) for image in instances for field in fields):
                boxes = [image.pred_boxes for image in instances]
                predictor.classify(self.task_features(features, boxes), instances)
        return instances

    def task_features(self, features: dict[str, torch.Tensor], boxes: list[Boxes]) -> torch.Tensor:
        """Compute what the heads of tasks see of boxes.

        Args:
            features: the backbone's maps by name, (N, C, H, W).
            boxes: one :class:`Boxes` for each of the N images, in pixels of the network's input.

        Returns:
            (R, F), R the number of boxes in all, those of the first image first.
        """
        return self._task_features(features, boxes)

    def _task_features(self, features: dict[str, torch.Tensor], boxes: list[Boxes]) -> torch.Tensor:
        raise NotImplementedError


def _ours(cfg: CfgNode, stock: Any, table: ClassTable | None, tasks: Sequence[TaskSpec] = ()) -> Any:
    if type(stock) is not FastRCNNOutputLayers:
        if tasks:
            raise ConfigError(
                TASKS[tasks[0].name],
                expected="a box predictor that this package replaces, FastRCNNOutputLayers",
                found=f"{type(stock).__name__}, which knows no tasks",
                fix=f"Register it as {HEAD_ADAPT.PREDICTOR}, derived from HeadAdaptOutputLayers, or drop the task.",
            )
        return stock
    shape = ShapeSpec(channels=stock.cls_score.in_features)
    return replace_predictor(cfg.MODEL.HEAD_ADAPT.PREDICTOR, cfg, stock, shape, table, tasks)


@ROI_HEADS_REGISTRY.register()
class HeadAdaptROIHeads(HeadAdaptMixin, StandardROIHeads):
    """``StandardROIHeads`` with the box predictor that ``MODEL.HEAD_ADAPT.PREDICTOR`` names."""

    def _task_features(self, features: dict[str, torch.Tensor], boxes: list[Boxes]) -> torch.Tensor:
        pooled = self.box_pooler([features[name] for name in self.box_in_features], boxes)
        return features_of(self.box_predictor(self.box_head(pooled)))


@ROI_HEADS_REGISTRY.register()
class HeadAdaptCascadeROIHeads(HeadAdaptMixin, CascadeROIHeads):
    """``CascadeROIHeads`` with our predictor at every stage, and the tasks at the last."""

    def _task_features(self, features: dict[str, torch.Tensor], boxes: list[Boxes]) -> torch.Tensor:
        # A stage reads nothing of a proposal but its box.
        proposals = [Instances((0, 0), proposal_boxes=image) for image in boxes]
        maps = [features[name] for name in self.box_in_features]
        return features_of(self._run_stage(maps, proposals, self.num_cascade_stages - 1))

    @torch.no_grad()
    def _match_and_label_boxes(
        self, proposals: list[Instances], stage: int, targets: list[Instances]
    ) -> list[Instances]:
        """Match like the parent, and add ``gt_<task>`` of the same match."""
        proposals = super()._match_and_label_boxes(proposals, stage, targets)
        predictor = self.box_predictor[stage]
        if has_tasks(predictor):
            for image, truth in zip(proposals, targets, strict=True):
                # The parent does not hand out its match; the matcher has no state, so this is the same one.
                matched, _ = self.proposal_matchers[stage](pairwise_iou(truth.gt_boxes, image.proposal_boxes))
                carry_labels(predictor.tasks, truth, image, matched)
        return proposals


@ROI_HEADS_REGISTRY.register()
class HeadAdaptRes5ROIHeads(HeadAdaptMixin, Res5ROIHeads):
    """``Res5ROIHeads`` (the C4 models) with our predictor."""

    def _task_features(self, features: dict[str, torch.Tensor], boxes: list[Boxes]) -> torch.Tensor:
        pooled: torch.Tensor = self._shared_roi_transform([features[name] for name in self.in_features], boxes)
        return pooled.mean(dim=[2, 3])
