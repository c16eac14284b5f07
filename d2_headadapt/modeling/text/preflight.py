"""Check a file of class embeddings before a model is built.

RegionCLIP copies its file into the classifier inside the constructor (``modeling/roi_heads/fast_rcnn.py``), so another
width ends in "The size of tensor a (1024) must match the size of tensor b (640) at non-singleton dimension 1", another
list of classes in the same at dimension 0, and a file of one row in a model whose classes are all alike. Here each is
said by name. Nothing is changed.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_backbone
from detectron2.modeling.roi_heads import ROI_HEADS_REGISTRY, build_roi_heads
from torch import nn

from ...adapt.classes import ClassTable
from ...config.settings import AdaptSettings, with_keys
from ...errors import Finding, HeadAdaptError, TextError
from ...key import HEAD_ADAPT, MODEL
from ..predictor import PREDICTOR_REGISTRY
from .bundle import FILE_KEY, TextBundle, read_bundle
from .problems import as_text_error
from .problems import check_bundle as check_bundle

TEXT = HEAD_ADAPT.TEXT
CHOICES = {
    "BACKGROUND": ("learned", "zero", "file"),
    "PROJECTION": ("auto", "always", "never"),
    "PRECEDENCE": ("file", "checkpoint", "error"),
}


def reads_text(cfg: CfgNode) -> bool:
    """Tell whether the box predictor that ``cfg`` names is one of text embeddings."""
    name = with_keys(cfg).MODEL.HEAD_ADAPT.PREDICTOR
    return name in PREDICTOR_REGISTRY and bool(getattr(PREDICTOR_REGISTRY.get(name), "reads_text", False))


def preflight(cfg: CfgNode, target: ClassTable | None = None, *, region_width: int | None = None) -> list[Finding]:
    """Find everything that is wrong with the text embeddings of a config; empty where it uses none.

    Args:
        cfg: a config, frozen or not.
        target: the classes of the model; by default those that the config names.
        region_width: C of the region features, where it is known; else it is found where it matters.

    Raises:
        HeadAdaptError: the classes of the model cannot be told.
    """
    cfg = with_keys(cfg)
    node = cfg.MODEL.HEAD_ADAPT
    nearest = node.NEW_ROWS == "nearest"
    if not reads_text(cfg) and not nearest:
        return list(_no_effect(cfg))
    problems = list(_keys(cfg))
    if problems and any(p.severity == "error" for p in problems):
        return problems
    try:
        bundle = bundle_of(cfg)
    except HeadAdaptError as exc:
        return [*problems, Finding("HA401", "error", as_text_error(exc))]
    target = target or AdaptSettings.from_config(cfg).target.get("thing")
    if not reads_text(cfg):
        # Nearest rows need no class in the file: one that is not there keeps its recipe.
        return problems + check_bundle(bundle)
    width = (region_width or width_of_regions(cfg)) if node.TEXT.PROJECTION == "never" else None
    return problems + check_bundle(bundle, target or bundle.names, aliases=tuple(node.ALIASES), region_width=width)


def refuse_text(cfg: CfgNode, target: ClassTable | None = None, *, region_width: int | None = None) -> list[Finding]:
    """Raise the first error of :func:`preflight`, and return the warnings; its arguments.

    Raises:
        TextError: something that no model can be built with.
    """
    problems = preflight(cfg, target, region_width=region_width)
    for problem in problems:
        if problem.severity == "error":
            raise problem.error
    return problems


def bundle_of(cfg: CfgNode) -> TextBundle:
    """Read the embeddings that ``MODEL.HEAD_ADAPT.TEXT`` names.

    Raises:
        HeadAdaptError: as :func:`~d2_headadapt.modeling.text.bundle.read_bundle`.
    """
    text = with_keys(cfg).MODEL.HEAD_ADAPT.TEXT
    return read_bundle(
        str(text.FILE),
        text.NAMES,
        encoder=str(text.ENCODER),
        background=text.BACKGROUND == "file" and reads_text(cfg),
        trust=bool(cfg.MODEL.HEAD_ADAPT.TRUST_FILE),
    )


def width_of_regions(cfg: CfgNode) -> int | None:
    """Compute C, the width of the region features of ``cfg``'s model; ``None`` where it cannot be built.

    The backbone and the ROI heads are built with a linear classifier on the meta device, so that any registered head
    answers for itself.
    """
    cfg = with_keys(cfg).clone()
    cfg.defrost()
    cfg.MODEL.HEAD_ADAPT.PREDICTOR = "HeadAdaptOutputLayers"
    cfg.MODEL.HEAD_ADAPT.NEW_ROWS = "recipe"
    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            backbone = build_backbone(cfg)
            heads: Any = build_roi_heads(cfg, backbone.output_shape())
    # Whatever a user's own component raises: building the model says it, with its trace.
    except Exception:
        return None
    predictor = getattr(heads, "box_predictor", None)
    first: Any = predictor[0] if isinstance(predictor, nn.ModuleList) else predictor
    return getattr(getattr(first, "cls_score", None), "in_features", None)


def _no_effect(cfg: CfgNode) -> Iterator[Finding]:
    file = cfg.MODEL.HEAD_ADAPT.TEXT.FILE
    if file:
        yield Finding(
            "HA407",
            "warning",
            TextError(
                FILE_KEY,
                expected="a predictor of text embeddings, or NEW_ROWS nearest",
                found=f"{file!r}, which nothing reads: {HEAD_ADAPT.PREDICTOR} is {cfg.MODEL.HEAD_ADAPT.PREDICTOR!r}",
                fix=f"Set {HEAD_ADAPT.PREDICTOR.set('HeadAdaptTextOutputLayers')}, or leave the file out.",
            ),
        )


def _keys(cfg: CfgNode) -> Iterator[Finding]:
    text = cfg.MODEL.HEAD_ADAPT.TEXT
    if not text.FILE:
        yield Finding(
            "HA401",
            "error",
            TextError(
                FILE_KEY,
                expected="a file of class embeddings",
                found="none",
                fix=f"Name a .npy, .pth or .safetensors file: {FILE_KEY.set('clip.npy')}.",
            ),
        )
    for key, choices in CHOICES.items():
        if text[key] not in choices:
            yield Finding(
                "HA407",
                "error",
                TextError(
                    TEXT[key],
                    expected=f"one of {', '.join(choices)}",
                    found=repr(text[key]),
                    fix=f"Set {TEXT[key].set(choices[0])}.",
                ),
            )
    if not reads_text(cfg):
        return
    if not 0 < text.TEMPERATURE < float("inf"):
        yield Finding(
            "HA407",
            "error",
            TextError(
                TEXT.TEMPERATURE,
                expected="a positive number, the factor of the cosine",
                found=repr(text.TEMPERATURE),
                fix=f"Set {TEXT.TEMPERATURE.set(50.0)}.",
            ),
        )
    if text.TRAINABLE and text.PRECEDENCE == "file":
        yield Finding(
            "HA407",
            "error",
            TextError(
                TEXT.PRECEDENCE,
                expected="'checkpoint' or 'error' where TRAINABLE is True",
                found="'file', which would put the file's rows over the trained ones at every load, resumes included",
                fix=f"Set {TEXT.PRECEDENCE.set('checkpoint')}, or {TEXT.TRAINABLE.set(False)}.",
            ),
        )
    heads = cfg.MODEL.ROI_HEADS.NAME
    if heads in ROI_HEADS_REGISTRY and not hasattr(ROI_HEADS_REGISTRY.get(heads), "reads_box_tasks"):
        yield Finding(
            "HA407",
            "error",
            TextError(
                MODEL.ROI_HEADS.NAME,
                expected=f"ROI heads that read {HEAD_ADAPT.PREDICTOR}, such as HeadAdaptROIHeads",
                found=f"{heads!r}, which builds a linear classifier whatever that key says",
                fix=f"Set {MODEL.ROI_HEADS.NAME.set(f'HeadAdapt{heads}')}, or "
                f"{HEAD_ADAPT.PREDICTOR.set('HeadAdaptOutputLayers')}."
                if f"HeadAdapt{heads}" in ROI_HEADS_REGISTRY
                else f"Set {MODEL.ROI_HEADS.NAME.set('HeadAdaptROIHeads')}.",
            ),
        )
