"""The registered ROI heads: stock detectron2's three, with a predictor that knows its classes."""

from __future__ import annotations

from typing import Any

from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling.roi_heads import (
    ROI_HEADS_REGISTRY,
    CascadeROIHeads,
    FastRCNNOutputLayers,
    Res5ROIHeads,
    StandardROIHeads,
)

from .classes import ClassTable
from .predictor import replace_predictor
from .settings import AdaptSettings, apply_num_classes, attach_settings, with_keys


class KnowsItsClasses:
    """Put before a stock ROI-heads class, replaces the predictor it built and remembers the user's settings.

    A predictor that a subclass built itself, of another class than stock's, is left alone.
    """

    mask_on: bool
    mask_head: Any

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
        """The stock class's arguments, for the class count of the target table."""
        settings = AdaptSettings.from_config(cfg, registered_only=True)
        cfg = with_keys(cfg).clone()
        cfg.defrost()
        apply_num_classes(cfg, settings.target)
        ret: dict[str, Any] = super().from_config(cfg, input_shape)  # type: ignore[misc]
        table = settings.target.get("thing")
        if "box_predictor" in ret:
            ret["box_predictor"] = _ours(cfg, ret["box_predictor"], table)
        if "box_predictors" in ret:
            ret["box_predictors"] = [_ours(cfg, stock, table) for stock in ret["box_predictors"]]
        return {**ret, "settings": settings, "cls_agnostic_mask": cfg.MODEL.ROI_MASK_HEAD.CLS_AGNOSTIC_MASK}


def _ours(cfg: CfgNode, stock: Any, table: ClassTable | None) -> Any:
    if type(stock) is not FastRCNNOutputLayers:
        return stock
    shape = ShapeSpec(channels=stock.cls_score.in_features)
    return replace_predictor(cfg.MODEL.HEAD_ADAPT.PREDICTOR, cfg, stock, shape, table)


@ROI_HEADS_REGISTRY.register()
class HeadAdaptROIHeads(KnowsItsClasses, StandardROIHeads):
    """``StandardROIHeads`` with the box predictor that ``MODEL.HEAD_ADAPT.PREDICTOR`` names."""


@ROI_HEADS_REGISTRY.register()
class HeadAdaptCascadeROIHeads(KnowsItsClasses, CascadeROIHeads):
    """``CascadeROIHeads`` with our predictor at every stage."""


@ROI_HEADS_REGISTRY.register()
class HeadAdaptRes5ROIHeads(KnowsItsClasses, Res5ROIHeads):
    """``Res5ROIHeads`` (the C4 models) with our predictor."""
