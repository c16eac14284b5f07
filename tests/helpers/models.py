"""Tiny detectron2 models: the zoo's own architectures with few channels, so that a step takes milliseconds."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import build_model
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils.env import seed_all_rng
from torch import nn

from d2_headadapt import add_headadapt_config

STOCK = {"standard": "StandardROIHeads", "cascade": "CascadeROIHeads", "c4": "Res5ROIHeads"}
OURS = {"standard": "HeadAdaptROIHeads", "cascade": "HeadAdaptCascadeROIHeads", "c4": "HeadAdaptRes5ROIHeads"}


def tiny_cfg(kind: str = "standard", *, num_classes: int = 5, masks: bool = True, ours: bool = True) -> CfgNode:
    """A Faster or Mask R-CNN of one of our three kinds, on the CPU.

    Args:
        kind: ``standard`` (FPN), ``cascade`` (FPN) or ``c4``.
        num_classes: classes of a model without a class table.
        masks: with a mask head.
        ours: our ROI heads and keys; otherwise a config that has never heard of this package.
    """
    cfg = get_cfg()
    if ours:
        add_headadapt_config(cfg)
    m = cfg.MODEL
    m.DEVICE = "cpu"
    m.WEIGHTS = ""
    m.RESNETS.STEM_OUT_CHANNELS = 8
    m.RESNETS.RES2_OUT_CHANNELS = 16
    m.RESNETS.WIDTH_PER_GROUP = 4
    m.MASK_ON = masks
    m.ROI_HEADS.NAME = (OURS if ours else STOCK)[kind]
    m.ROI_HEADS.NUM_CLASSES = num_classes
    m.ROI_HEADS.BATCH_SIZE_PER_IMAGE = 16
    m.RPN.POST_NMS_TOPK_TRAIN = 24
    m.RPN.POST_NMS_TOPK_TEST = 12
    m.ROI_HEADS.SCORE_THRESH_TEST = 0.0
    cfg.TEST.DETECTIONS_PER_IMAGE = 8
    m.ROI_MASK_HEAD.POOLER_RESOLUTION = 14
    m.ROI_MASK_HEAD.CONV_DIM = 8
    if kind == "c4":
        m.RPN.IN_FEATURES = ["res4"]
        m.ROI_BOX_HEAD.POOLER_RESOLUTION = 14
        m.ROI_MASK_HEAD.NAME = "MaskRCNNConvUpsampleHead"
        return cfg
    m.BACKBONE.NAME = "build_resnet_fpn_backbone"
    m.RESNETS.OUT_FEATURES = ["res2", "res3", "res4", "res5"]
    m.FPN.IN_FEATURES = ["res2", "res3", "res4", "res5"]
    m.FPN.OUT_CHANNELS = 8
    m.ANCHOR_GENERATOR.SIZES = [[16], [32], [64], [96], [128]]
    m.RPN.IN_FEATURES = ["p2", "p3", "p4", "p5", "p6"]
    m.ROI_HEADS.IN_FEATURES = ["p2", "p3", "p4", "p5"]
    m.ROI_BOX_HEAD.NAME = "FastRCNNConvFCHead"
    m.ROI_BOX_HEAD.NUM_FC = 1
    m.ROI_BOX_HEAD.FC_DIM = 24
    m.ROI_BOX_HEAD.POOLER_RESOLUTION = 7
    m.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG = kind == "cascade"
    m.ROI_MASK_HEAD.NAME = "MaskRCNNConvUpsampleHead"
    m.ROI_MASK_HEAD.NUM_CONV = 1
    return cfg


def names(count: int, prefix: str = "class") -> list[str]:
    """``count`` class names."""
    return [f"{prefix} {i}" for i in range(count)]


def model_of(
    classes: Sequence[str] | None = None, kind: str = "standard", *, seed: int = 0, masks: bool = False, **keys: Any
) -> nn.Module:
    """One of our tiny models.

    Args:
        classes: TARGET_CLASSES; ``None`` leaves them unknown.
        kind, masks: see :func:`tiny_cfg`.
        seed: of its weights.
        keys: more keys under ``MODEL.HEAD_ADAPT``, or ``num_classes``.
    """
    cfg = tiny_cfg(kind, masks=masks, num_classes=keys.pop("num_classes", 5))
    cfg.MODEL.HEAD_ADAPT.TARGET_CLASSES = None if classes is None else list(classes)
    for key, value in keys.items():
        cfg.MODEL.HEAD_ADAPT[key] = value
    return build_seeded(cfg, seed)


def stock_model(num_classes: int, kind: str = "standard", *, seed: int = 0, masks: bool = False) -> nn.Module:
    """A tiny model that knows nothing of this package."""
    return build_seeded(tiny_cfg(kind, num_classes=num_classes, masks=masks, ours=False), seed)


def build_seeded(cfg: CfgNode, seed: int = 0) -> nn.Module:
    """``build_model`` after seeding every generator."""
    seed_all_rng(seed)
    model: nn.Module = build_model(cfg)
    return model


def state_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """A copy of the model's state."""
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def same_bits(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> bool:
    """Both have the same names, shapes, types and bits."""
    return list(one) == list(other) and all(
        one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]) for name in one
    )


def batch(num_classes: int, *, images: int = 2, size: int = 64, masks: bool = False, seed: int = 3) -> list[Any]:
    """Random images with boxes (and masks) as a training batch; the last image has no object."""
    generator = torch.Generator().manual_seed(seed)
    inputs = []
    for i in range(images):
        objects = 3 if i + 1 < images else 0
        corner = torch.rand(objects, 2, generator=generator) * size * 0.4
        boxes = torch.cat([corner, corner + 12 + torch.rand(objects, 2, generator=generator) * size * 0.4], 1)
        instances = Instances((size, size))
        instances.gt_boxes = Boxes(boxes)
        instances.gt_classes = torch.randint(0, num_classes, (objects,), generator=generator)
        if masks:
            instances.gt_masks = BitMasks(torch.rand(objects, size, size, generator=generator) > 0.5)
        image = (torch.rand(3, size, size, generator=generator) * 255).byte()
        inputs.append({"image": image, "height": size, "width": size, "instances": instances})
    return inputs


def training_losses(model: nn.Module, inputs: list[Any], seed: int = 11) -> dict[str, torch.Tensor]:
    """One training forward pass from a fixed random state."""
    from detectron2.utils.events import EventStorage

    seed_all_rng(seed)
    with EventStorage():
        losses: dict[str, torch.Tensor] = model.train()(copy.deepcopy(inputs))
    return losses


def detections(model: nn.Module, inputs: list[Any]) -> list[dict[str, torch.Tensor]]:
    """Boxes, scores, classes and masks of every image."""
    with torch.no_grad():
        outputs = model.eval()(copy.deepcopy(inputs))
    found = []
    for output in outputs:
        fields = output["instances"].get_fields()
        found.append({name: getattr(value, "tensor", value) for name, value in fields.items()})
    return found
