"""Scenes of coloured squares, drawn when they are read: what a tiny network with random features can tell apart."""

from __future__ import annotations

from typing import Any

import torch
from detectron2.structures import BitMasks, Boxes, Instances
from torch import nn

from d2_headadapt.fit import FitSettings

from .models import build_seeded, tiny_cfg

COLOURS = torch.tensor([[230.0, 40, 40], [40, 230, 40], [40, 40, 230]])
SIDE = 64
SETTINGS = FitSettings(images=40, proposals=12, rpn="always", held_out=0.3, regions=2000)


def scenes(count: int, classes: tuple[int, ...] = (0, 1, 2)) -> list[dict[str, Any]]:
    """A detectron2 dataset with two squares per image."""
    out: list[dict[str, Any]] = []
    for i in range(count):
        generator = torch.Generator().manual_seed(1000 + i)
        annotations = []
        for k in range(2):
            x, y = (torch.rand(2, generator=generator) * 12 + torch.tensor([32.0 * k, 8.0])).tolist()
            kind = int(torch.randint(len(classes), (1,), generator=generator))
            annotations.append({"bbox": [x, y, x + 20, y + 20], "category_id": classes[kind]})
        out.append({"image_id": i, "annotations": annotations})
    return out


def scene(entry: dict[str, Any]) -> dict[str, Any]:
    """Draw one."""
    generator = torch.Generator().manual_seed(int(entry["image_id"]))
    image = 100 + 20 * torch.rand(3, SIDE, SIDE, generator=generator)
    masks = []
    for a in entry["annotations"]:
        x0, y0, x1, y1 = (round(value) for value in a["bbox"])
        image[:, y0:y1, x0:x1] = COLOURS[a["category_id"] % 3][:, None, None]
        mask = torch.zeros(SIDE, SIDE, dtype=torch.bool)
        mask[y0:y1, x0:x1] = True
        masks.append(mask)
    truth = Instances((SIDE, SIDE))
    truth.gt_boxes = Boxes(torch.tensor([a["bbox"] for a in entry["annotations"]]).reshape(-1, 4))
    truth.gt_classes = torch.tensor([a["category_id"] for a in entry["annotations"]], dtype=torch.int64)
    if masks:
        truth.gt_masks = BitMasks(torch.stack(masks))
    return {"image": image.byte(), "instances": truth, "height": SIDE, "width": SIDE}


def tiny_model(kind: str, *, num_classes: int = 3, masks: bool = False, **keys: Any) -> nn.Module:
    """A tiny detectron2 model with random features: ``standard``, ``cascade``, ``c4`` or ``retinanet``."""
    cfg = tiny_cfg("standard" if kind == "retinanet" else kind, num_classes=num_classes, masks=masks, ours=False)
    if kind == "retinanet":
        cfg.MODEL.META_ARCHITECTURE = "RetinaNet"
        cfg.MODEL.BACKBONE.NAME = "build_retinanet_resnet_fpn_backbone"
        cfg.MODEL.RESNETS.OUT_FEATURES = ["res3", "res4", "res5"]
        cfg.MODEL.FPN.IN_FEATURES = ["res3", "res4", "res5"]
        cfg.MODEL.RETINANET.NUM_CLASSES = num_classes
        cfg.MODEL.RETINANET.NUM_CONVS = 1
    for key, value in keys.items():
        node, names = cfg, key.split("__")
        for name in names[:-1]:
            node = node[name]
        node[names[-1]] = value
    return build_seeded(cfg, 0).eval()
