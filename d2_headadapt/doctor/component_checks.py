"""Check HA128: the registries that a config names entries of."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from detectron2.config import CfgNode
from detectron2.modeling import (
    ANCHOR_GENERATOR_REGISTRY,
    BACKBONE_REGISTRY,
    META_ARCH_REGISTRY,
    PROPOSAL_GENERATOR_REGISTRY,
    ROI_BOX_HEAD_REGISTRY,
    ROI_HEADS_REGISTRY,
    ROI_KEYPOINT_HEAD_REGISTRY,
    ROI_MASK_HEAD_REGISTRY,
    SEM_SEG_HEADS_REGISTRY,
    StandardROIHeads,
)

from ..config.registries import not_registered
from ..key import MODEL, Key
from ..setup.task_checks import WITH_ROI_HEADS
from .finding import DoctorContext, Finding, check, is_stock

COMPONENTS: tuple[tuple[Key, Any, tuple[str, ...]], ...] = (
    (MODEL.BACKBONE.NAME, BACKBONE_REGISTRY, ()),
    (MODEL.PROPOSAL_GENERATOR.NAME, PROPOSAL_GENERATOR_REGISTRY, (*WITH_ROI_HEADS, "ProposalNetwork")),
    (MODEL.ANCHOR_GENERATOR.NAME, ANCHOR_GENERATOR_REGISTRY, (*WITH_ROI_HEADS, "ProposalNetwork", "RetinaNet")),
    (MODEL.ROI_HEADS.NAME, ROI_HEADS_REGISTRY, WITH_ROI_HEADS),
    (MODEL.SEM_SEG_HEAD.NAME, SEM_SEG_HEADS_REGISTRY, ("SemanticSegmentor", "PanopticFPN", "PanopticDeepLab")),
)
HEADS: tuple[tuple[Key, Any, Key | None], ...] = (
    (MODEL.ROI_BOX_HEAD.NAME, ROI_BOX_HEAD_REGISTRY, None),
    (MODEL.ROI_MASK_HEAD.NAME, ROI_MASK_HEAD_REGISTRY, MODEL.MASK_ON),
    (MODEL.ROI_KEYPOINT_HEAD.NAME, ROI_KEYPOINT_HEAD_REGISTRY, MODEL.KEYPOINT_ON),
)
"""Key, registry, and the switch; Res5ROIHeads builds no box head."""


@check(
    "HA128",
    "every component that the config names is registered",
    quick=True,
    yaml_only="a LazyConfig names classes, not entries of registries",
)
def components(context: DoctorContext) -> Iterator[Finding]:
    cfg = context.cfg
    architecture = cfg.MODEL.META_ARCHITECTURE
    yield from _unregistered(cfg, MODEL.META_ARCHITECTURE, META_ARCH_REGISTRY)
    if not is_stock(META_ARCH_REGISTRY, architecture):
        return
    for key, registry, readers in COMPONENTS:
        if architecture in readers or not readers:
            yield from _unregistered(cfg, key, registry)
    heads = cfg.MODEL.ROI_HEADS.NAME
    if architecture not in WITH_ROI_HEADS or heads not in ROI_HEADS_REGISTRY:
        return
    found = ROI_HEADS_REGISTRY.get(heads)
    if found.__module__.partition(".")[0] in ("detectron2", __name__.partition(".")[0]):
        for key, registry, switch in HEADS:
            if switch.of(cfg) if switch else issubclass(found, StandardROIHeads):
                yield from _unregistered(cfg, key, registry)


def _unregistered(cfg: CfgNode, key: Key, registry: Any) -> Iterator[Finding]:
    name = key.of(cfg)
    # detectron2's builder knows one name that stands for none.
    if name not in registry and (key, name) != (MODEL.PROPOSAL_GENERATOR.NAME, "PrecomputedProposals"):
        yield Finding("HA128", "error", not_registered(registry, key, name))
