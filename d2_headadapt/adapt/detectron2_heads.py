"""The layouts of detectron2's own heads, and of its PointRend, DeepLab and Panoptic-DeepLab projects.

Each function reads one module class of detectron2 (named in its docstring) and says where its classes are. Functions
are entered under the paths of classes, so that nothing here imports a project that may not be installed, and with the
attributes that they read: a project's own class of the same name, and a subclass that is another head, have none.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

from torch import nn

from ..key import MODEL, Key
from .layouts import HeadLayout
from .registry import ModuleContext, register_by_path

# For the package's face: whoever asks for layouts has those of detectron2 entered.
from .registry import layouts_of as layouts_of
from .registry import register_head_layout as register_head_layout

ROI_HEADS = ("ROIHeads", "StandardROIHeads", "Res5ROIHeads", "CascadeROIHeads")
SEMANTIC_HEADS = ("PointRendSemSegHead", "SemSegFPNHead", "DeepLabV3Head", "DeepLabV3PlusHead")


def _thing_group(context: ModuleContext) -> str:
    owner = context.owner(*ROI_HEADS)
    return owner[0] if owner and owner[0] else context.name or "thing"


def _pair(context: ModuleContext, child: str, space: str, group: str, **kinds: Any) -> Iterator[HeadLayout]:
    """Give a layer's weight and bias, where each exists, the same layout."""
    for leaf in ("weight", "bias"):
        yield HeadLayout(f"{context.name}.{child}.{leaf}".lstrip("."), space, group, **kinds)


def _agnostic(module: nn.Module, rows: int, rows_per_class: int, num_classes: int) -> bool:
    """Tell by the shape; of one class, by what the constructor or :func:`declare_agnostic` left on the module."""
    return rows != num_classes * rows_per_class or (num_classes == 1 and bool(getattr(module, "cls_agnostic", False)))


CHOICES: dict[str, Key] = {
    "FastRCNNOutputLayers": MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG,
    "MaskRCNNConvUpsampleHead": MODEL.ROI_MASK_HEAD.CLS_AGNOSTIC_MASK,
    "StandardPointHead": MODEL.POINT_HEAD.CLS_AGNOSTIC_MASK,
}
"""Module class of detectron2 -> the config key that makes it class-agnostic; stock modules do not remember it."""


def declare_agnostic(model: nn.Module, keys: Collection[Key]) -> None:
    """Leave on each module of :data:`CHOICES` whether its config key was set, where its constructor left nothing.

    Args:
        model: as built.
        keys: the config keys of :data:`CHOICES` that are true.
    """
    for module in model.modules():
        for name in (cls.__name__ for cls in type(module).__mro__):
            if CHOICES.get(name) in keys and not hasattr(module, "cls_agnostic"):
                module.cls_agnostic = True  # type: ignore[assignment]


@register_by_path(
    "detectron2.modeling.roi_heads.fast_rcnn.FastRCNNOutputLayers", needs=("box2box_transform.weights", "num_classes")
)
def fast_rcnn_layouts(module: Any, context: ModuleContext) -> Iterator[HeadLayout]:
    """Describe ``roi_heads/fast_rcnn.py``: K + 1 rows with background last, boxes class-major (4, or 5 rotated)."""
    group = _thing_group(context)
    part = "box_predictor"
    if isinstance(getattr(module, "cls_score", None), nn.Module):
        yield from _pair(context, "cls_score", "thing", group, part=part, extra=1)
    if isinstance(getattr(module, "bbox_pred", None), nn.Linear):
        box_dim = len(module.box2box_transform.weights)
        # Stock's cascade refuses to be built otherwise.
        in_cascade = module.num_classes == 1 and context.owner("CascadeROIHeads") is not None
        agnostic = in_cascade or _agnostic(module, module.bbox_pred.out_features, box_dim, module.num_classes)
        kinds: dict[str, Any] = {"axes": () if agnostic else ((0, 0),), "rows_per_class": box_dim, "by_choice": True}
        yield from _pair(context, "bbox_pred", "thing", group, part=part, **kinds)
    yield HeadLayout(f"{context.name}.fed_loss_cls_weights".lstrip("."), "thing", group, "fed_loss", rebuilt=True)


@register_by_path("detectron2.modeling.roi_heads.mask_head.MaskRCNNConvUpsampleHead", needs=("predictor.out_channels",))
def mask_layouts(module: Any, context: ModuleContext) -> Iterator[HeadLayout]:
    """Describe ``modeling/roi_heads/mask_head.py``: one output channel per class, or one in all."""
    owner = context.owner(*ROI_HEADS)
    num_classes = int(getattr(owner[1], "num_classes", 0)) if owner else module.predictor.out_channels
    agnostic = _agnostic(module, module.predictor.out_channels, 1, num_classes)
    axes = () if agnostic else ((0, 0),)
    yield from _pair(context, "predictor", "thing", _thing_group(context), part="mask_head", axes=axes, by_choice=True)


@register_by_path(
    "detectron2.modeling.meta_arch.retinanet.RetinaNetHead", needs=("cls_score", "bbox_pred.out_channels")
)
def retinanet_layouts(module: Any, context: ModuleContext) -> Iterator[HeadLayout]:
    """Describe ``meta_arch/retinanet.py`` and ``fcos.py``: row = anchor x K + class; boxes are class-agnostic."""
    anchors = module.bbox_pred.out_channels // 4
    group = context.name or "thing"
    yield from _pair(context, "cls_score", "thing", group, part="head", groups=anchors)
    yield from _pair(context, "bbox_pred", "thing", group, part="head", axes=(), rows_per_class=4, groups=anchors)


@register_by_path("detectron2.modeling.roi_heads.keypoint_head.KRCNNConvDeconvUpsampleHead", needs=("score_lowres",))
def keypoint_layouts(module: Any, context: ModuleContext) -> Iterator[HeadLayout]:
    """Describe ``roi_heads/keypoint_head.py``: a transposed convolution, so output channels are axis 1."""
    weight, bias = _pair(context, "score_lowres", "keypoint", context.name or "keypoint", part="keypoint_head")
    yield HeadLayout(weight.tensor, weight.space, weight.group, weight.part, axes=((1, 0),))
    yield bias


@register_by_path(
    "detectron2.modeling.meta_arch.semantic_seg.SemSegFPNHead",
    "deeplab.semantic_seg.DeepLabV3Head",
    "deeplab.semantic_seg.DeepLabV3PlusHead",
)
def semantic_layouts(module: Any, context: ModuleContext) -> Iterator[HeadLayout]:
    """Describe ``meta_arch/semantic_seg.py`` and DeepLab: one channel per class, no background row."""
    if isinstance(getattr(module, "predictor", None), nn.Module):
        owner = context.owner("PointRendSemSegHead")
        group = owner[0] if owner else context.name
        yield from _pair(context, "predictor", "stuff", group or "stuff", part="sem_seg_head")


@register_by_path("point_rend.mask_head.ConvFCHead", needs=("output_shape", "prediction"))
def coarse_mask_layouts(module: Any, context: ModuleContext) -> Iterator[HeadLayout]:
    """Describe PointRend's ``mask_head.py``: the last linear layer is viewed as (K, side, side).

    Implicit PointRend predicts the weights and biases of a small network instead: its last layer's (K, channels)
    weights and K biases stand at the end of the weights and of the biases.
    """
    implicit = context.owner("ImplicitPointRendMaskHead")
    if implicit is not None:
        head: Any = implicit[1].point_head
        before = sum(head.num_weight_params[:-1])
        between = sum(head.num_bias_params[:-1])
        axes = ((0, before, head.channels), (0, between, 1))
        yield from _pair(context, "prediction", "thing", _thing_group(context), part="mask_head", axes=axes)
        return
    side = module.output_shape[-1] * module.output_shape[-2]
    yield from _pair(context, "prediction", "thing", _thing_group(context), part="mask_head", rows_per_class=side)


@register_by_path(
    "point_rend.point_head.StandardPointHead",
    needs=("fc_layers", "predictor.out_channels", "predictor.in_channels", "coarse_pred_each_layer"),
)
def point_head_layouts(module: Any, context: ModuleContext) -> Iterator[HeadLayout]:
    """Describe PointRend's ``point_head.py``: K coarse channels follow the features in every layer's input."""
    semantic = context.owner("PointRendSemSegHead")
    if semantic is not None:
        space, group, part = "stuff", semantic[0] or "stuff", "sem_seg_head"
        coarse: Any = semantic[1]
        num_classes: int = coarse.coarse_sem_seg_head.predictor.out_channels
    else:
        owner = context.owner(*ROI_HEADS)
        space, group, part = "thing", _thing_group(context), "mask_head"
        num_classes = int(getattr(owner[1], "num_classes", 0)) if owner else module.predictor.out_channels
    layers = [f"fc{i + 1}" for i in range(len(module.fc_layers))]
    for i, layer in enumerate(layers):
        if i == 0 or module.coarse_pred_each_layer:
            offset = getattr(module, layer).in_channels - num_classes
            yield HeadLayout(f"{context.name}.{layer}.weight".lstrip("."), space, group, part, axes=((1, offset),))
    rows = module.predictor.out_channels
    inputs = ((1, module.predictor.in_channels - num_classes),) if module.coarse_pred_each_layer else ()
    outputs = () if _agnostic(module, rows, 1, num_classes) else ((0, 0),)
    weight, bias = _pair(context, "predictor", space, group, part=part)
    yield HeadLayout(weight.tensor, space, group, part, axes=(*outputs, *inputs), by_choice=space == "thing")
    yield HeadLayout(bias.tensor, space, group, part, axes=outputs, by_choice=space == "thing")
