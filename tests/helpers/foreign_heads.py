"""Small re-creations of heads of public detectron2 projects: their module and tensor names and sizes, nothing else.

Each function makes the class-dependent part of a model for ``k`` classes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.roi_heads import FastRCNNOutputLayers
from torch import nn

WIDTH = 8


def tree(**children: nn.Module) -> nn.Module:
    """A module of these children."""
    module = nn.Module()
    for name, child in children.items():
        module.add_module(name, child)
    return module


def conv(out: int, width: int = WIDTH) -> nn.Conv2d:
    return nn.Conv2d(width, out, 3, padding=1)


def fcos(k: int) -> nn.Module:
    """AdelaiDet: FCOS of CondInst, with the semantic branch of its mask head (both K, sigmoid)."""
    head = tree(cls_tower=nn.Sequential(conv(WIDTH)), cls_logits=conv(k), bbox_pred=conv(4), ctrness=conv(1))
    branch = tree(seg_head=nn.Sequential(conv(WIDTH), conv(WIDTH)), logits=nn.Conv2d(WIDTH, k, 1))
    return tree(proposal_generator=tree(fcos_head=head), mask_branch=branch)


def centernet(k: int) -> nn.Module:
    """CenterNet2, one stage."""
    head = tree(bbox_tower=nn.Sequential(conv(WIDTH)), bbox_pred=conv(4), agn_hm=conv(1), cls_logits=conv(k))
    return tree(proposal_generator=tree(centernet_head=head))


class Decoder(nn.Module):
    """YOLOF's: five anchors, row = anchor x K + class."""

    def __init__(self, k: int, num_anchors: int = 5) -> None:
        super().__init__()
        self.num_classes, self.num_anchors = k, num_anchors
        self.cls_score = conv(num_anchors * k)
        self.bbox_pred = conv(num_anchors * 4)
        self.object_pred = conv(num_anchors)


def yolof(k: int) -> nn.Module:
    return tree(decoder=Decoder(k))


class SetCriterion(nn.Module):
    """DETR's weights of the classification loss: all 1, but for the one of "no object"."""

    def __init__(self, k: int, eos_coef: float = 0.1, eos_row: int = -1) -> None:
        super().__init__()
        weight = torch.ones(k + 1)
        weight[eos_row] = eos_coef
        self.register_buffer("empty_weight", weight)


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 4)])


def maskformer(k: int) -> nn.Module:
    predictor = tree(query_embed=nn.Embedding(5, WIDTH), class_embed=nn.Linear(WIDTH, k + 1), mask_embed=MLP())
    return tree(sem_seg_head=tree(predictor=predictor), criterion=SetCriterion(k))


def detr(k: int, criterion_k: int | None = None) -> nn.Module:
    """detrex: the model and its criterion have a count each."""
    criterion = SetCriterion(k if criterion_k is None else criterion_k)
    return tree(class_embed=nn.Linear(WIDTH, k + 1), bbox_embed=MLP(), criterion=criterion)


def dino(k: int) -> nn.Module:
    """detrex: one classifier per decoder layer, which the decoder holds too, and a label encoder (all K)."""
    stages = nn.ModuleList([copy.deepcopy(nn.Linear(WIDTH, k)) for _ in range(3)])
    decoder = tree(norm=nn.LayerNorm(WIDTH))
    decoder.class_embed = stages
    return tree(class_embed=stages, label_enc=nn.Embedding(k, WIDTH), transformer=tree(decoder=decoder))


def dn_detr(k: int) -> nn.Module:
    """Its label encoder keeps one row more for padding."""
    return tree(class_embed=nn.Linear(WIDTH, k), bbox_embed=MLP(), label_enc=nn.Embedding(k + 1, WIDTH - 1))


class ZeroShotClassifier(nn.Module):
    """Detic's: embeddings D x (K + 1), a zero column for background last; a buffer where they come from a file."""

    def __init__(self, k: int, from_file: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, 6)
        weight = torch.cat([torch.randn(6, k), torch.zeros(6, 1)], dim=1)
        if from_file:
            self.register_buffer("zs_weight", weight)
        else:
            self.zs_weight = nn.Parameter(weight)


class DeticFastRCNNOutputLayers(FastRCNNOutputLayers):
    def __init__(self, k: int, from_file: bool, prop_score: bool) -> None:
        transform = Box2BoxTransform((10.0, 10.0, 5.0, 5.0))
        super().__init__(ShapeSpec(channels=WIDTH), box2box_transform=transform, num_classes=k)
        del self.cls_score, self.bbox_pred
        self.register_buffer("freq_weight", torch.ones(k))
        self.cls_score = ZeroShotClassifier(k, from_file)
        self.bbox_pred = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 4))
        if prop_score:
            self.prop_score = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, k + 1))


def detic(k: int, *, from_file: bool = True, prop_score: bool = False) -> nn.Module:
    stages = nn.ModuleList([DeticFastRCNNOutputLayers(k, from_file, prop_score) for _ in range(3)])
    return tree(roi_heads=tree(box_predictor=stages))


class CosineSimOutputLayers(nn.Module):
    """few-shot-object-detection's: no bias, and a class of its own."""

    def __init__(self, k: int) -> None:
        super().__init__()
        self.cls_score = nn.Linear(WIDTH, k + 1, bias=False)
        self.bbox_pred = nn.Linear(WIDTH, 4 * k)


def cosine(k: int) -> nn.Module:
    return tree(roi_heads=tree(box_predictor=CosineSimOutputLayers(k)))


class RCNNHead(nn.Module):
    """SparseR-CNN's, with the softmax loss."""

    def __init__(self, k: int) -> None:
        super().__init__()
        self.cls_module = nn.ModuleList([nn.Linear(WIDTH, WIDTH, False), nn.LayerNorm(WIDTH)])
        self.class_logits = nn.Linear(WIDTH, k + 1)
        self.bboxes_delta = nn.Linear(WIDTH, 4)


def sparse_rcnn(k: int) -> nn.Module:
    series = nn.ModuleList([RCNNHead(k) for _ in range(3)])
    return tree(head=tree(head_series=series), criterion=SetCriterion(k))


def blendmask(k: int) -> nn.Module:
    """AdelaiDet: the semantic loss of its basis module has background first."""
    seg_head = nn.Sequential(
        nn.Conv2d(WIDTH, WIDTH, 3, bias=False), nn.BatchNorm2d(WIDTH), nn.ReLU(), nn.Conv2d(WIDTH, k + 1, 1)
    )
    fcos_head = tree(cls_logits=conv(k), bbox_pred=conv(4), ctrness=conv(1))
    return tree(proposal_generator=tree(fcos_head=fcos_head), basis_module=tree(seg_head=seg_head))


def torchvision_like(k: int) -> nn.Module:
    """Background first, in the boxes too; the names are detectron2's."""
    return tree(box_predictor=tree(cls_score=nn.Linear(WIDTH, k + 1), bbox_pred=nn.Linear(WIDTH, 4 * (k + 1))))


def yolo_like(k: int) -> nn.Module:
    """Three anchors of four coordinates, one objectness and K classes each."""
    return tree(head=conv(3 * (5 + k)))


def narrowing(k: int) -> nn.Module:
    """A hidden width that follows the count: its rows are no classes."""
    branch = nn.Sequential(tree(conv=conv(k), bn=nn.BatchNorm2d(k)), nn.Conv2d(k, k, 1))
    return tree(detect=tree(cv3=nn.ModuleList([branch])))


def one_per_class(k: int) -> nn.Module:
    """A layer for each class."""
    return tree(heads=nn.ModuleList([nn.Linear(WIDTH, 1) for _ in range(k)]))


def features_and_classes(k: int) -> nn.Module:
    """A second stage that sees features and the scores of the first."""
    return tree(first=conv(k), second=conv(WIDTH, WIDTH + k))


Make = Callable[[int], nn.Module]
