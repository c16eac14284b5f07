"""A box predictor whose classifier is a matrix of class embeddings.

R   number of regions
K   number of classes
C   width of the region features
D   width of the embeddings

Logits are temperature x cosine, as in Detic's ``zero_shot_classifier.py`` and RegionCLIP's ``fast_rcnn.py``. Losses,
inference, boxes and tasks are those of :class:`HeadAdaptOutputLayers`.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from torch import nn
from torch.nn.functional import normalize

from ...adapt.classes import ClassTable
from ...adapt.detectron2_heads import fast_rcnn_layouts
from ...adapt.layouts import HeadLayout
from ...adapt.plan import AdaptPlan, TensorPlan
from ...adapt.registry import ModuleContext
from ...errors import TextError
from ...key import HEAD_ADAPT
from ..predictor import PREDICTOR_REGISTRY, HeadAdaptOutputLayers
from .bundle import FILE_KEY, TextBundle
from .preflight import bundle_of, refuse_text
from .problems import check_bundle

logger = logging.getLogger(__name__)

FACTS = "text"
"""Key of provenance's ``extra``: what the class embeddings of a saved model are."""

AGREE = 1 - 1e-4
"""From this cosine on two embeddings of a class are the same; float16 keeps five digits of it."""


class TextClassifier(nn.Module):
    """A classifier by cosine of region features with class embeddings, background last.

    Attributes:
        embeddings: (K, D), as they were given: the forward normalises them. Not called ``weight``, because a
            linear layer's rows of the same width would be taken for them.
        projection: a linear layer C -> D, or ``None``.
        background: (D,), or ``None`` where its logit is 0.
    """

    def __init__(
        self,
        in_features: int,
        rows: torch.Tensor,
        *,
        background: str = "learned",
        background_row: torch.Tensor | None = None,
        temperature: float = 50.0,
        trainable: bool = False,
        projection: str = "auto",
    ) -> None:
        """
        Args:
            in_features: C.
            rows: (K, D), finite and not zero.
            background: ``"learned"``, ``"zero"``, or ``"file"`` for ``background_row``, (D,), which is as frozen as
                the rows.
            background_row: see there.
            temperature: factor of the cosine.
            trainable: of the class rows; projection and a learned background always are.
            projection: ``"auto"`` where C is not D, ``"always"`` or ``"never"``.

        Raises:
            TextError: rows that are no matrix, or of another width than C without a projection.
        """
        super().__init__()
        if rows.dim() != 2 or (projection == "never" and rows.shape[1] != in_features):
            raise TextError(
                "TextClassifier",
                expected=f"rows (K, D){f' with D = {in_features}' if projection == 'never' else ''}",
                found=str(tuple(rows.shape)),
                fix="Pass one row per class, and projection='auto' where their width is not the features'.",
            )
        width = int(rows.shape[1])
        self.in_features = in_features
        self.temperature = temperature
        needed = projection == "always" or (projection == "auto" and width != in_features)
        self.projection = nn.Linear(in_features, width) if needed else None
        # Filled, not wrapped, so that on the meta device they are on the meta device.
        self.embeddings = nn.Parameter(torch.empty(rows.shape), requires_grad=trainable)
        learned = background == "learned"
        self.background = None
        if background != "zero":
            self.background = nn.Parameter(torch.empty(width), requires_grad=learned or trainable)
        with torch.no_grad():
            self.embeddings.copy_(rows)
            if self.background is not None and background_row is not None and not learned:
                self.background.copy_(background_row)
            elif self.background is not None:
                self.background.copy_(normalize(torch.randn(width), dim=0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute logits (R, K + 1) of region features (R, C)."""
        if self.projection is not None:
            x = self.projection(x)
        x = self.temperature * normalize(x, dim=1)
        scores = x @ normalize(self.embeddings, dim=1).t()
        if self.background is None:
            return torch.cat([scores, scores.new_zeros(len(scores), 1)], dim=1)
        return torch.cat([scores, (x @ normalize(self.background, dim=0))[:, None]], dim=1)


@PREDICTOR_REGISTRY.register()
class HeadAdaptTextOutputLayers(HeadAdaptOutputLayers):
    """A :class:`HeadAdaptOutputLayers` with a :class:`TextClassifier` as ``cls_score``.

    A class without a row in the checkpoint is scored by its embedding at once: only its boxes, where they are
    class-specific, are new.

    Attributes:
        bundle: the embeddings of the file, before rows were picked.
        precedence: ``"file"``, ``"checkpoint"`` or ``"error"``: whose rows count at a load.
    """

    reads_text = True
    cls_score: Any

    @configurable
    def __init__(
        self,
        input_shape: ShapeSpec,
        *,
        bundle: TextBundle,
        class_table: ClassTable,
        aliases: Iterable[str] = (),
        background: str = "learned",
        temperature: float = 50.0,
        trainable: bool = False,
        projection: str = "auto",
        precedence: str = "file",
        **kwargs: Any,
    ) -> None:
        """
        Args:
            input_shape: of the region features, (C,) or (C, H, W).
            bundle: the embeddings; the rows of ``class_table`` are picked by name.
            class_table: the K classes.
            aliases: ``"target=source"``, see :meth:`TextBundle.rows_for`.
            background, temperature, trainable, projection: see :class:`TextClassifier`.
            precedence: ``"file"``, ``"checkpoint"`` or ``"error"``: whose rows count at a load.
            kwargs: the parent's.

        Raises:
            TextError: embeddings that do not fit the classes or the region features.
        """
        super().__init__(input_shape, class_table=class_table, **kwargs)
        width = self.cls_score.in_features
        aliases = tuple(aliases)
        for problem in check_bundle(
            bundle, class_table, aliases=aliases, region_width=width if projection == "never" else None
        ):
            if problem.severity == "error":
                raise problem.error
        with torch.device("cpu"):
            rows = bundle.require(class_table, aliases)
        self.bundle = bundle
        self.precedence = precedence
        # In place of the linear layer that stock's constructor makes.
        self.cls_score = TextClassifier(
            width,
            rows,
            background=background,
            background_row=bundle.background,
            temperature=temperature,
            trainable=trainable,
            projection=projection,
        )

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec, class_table: ClassTable | None = None) -> dict[str, Any]:
        """Read the parent's arguments, the embeddings of ``TEXT.FILE`` and the keys beside it.

        Raises:
            TextError: embeddings that do not fit, or no class list to pick their rows by.
        """
        refuse_text(cfg, class_table, region_width=input_shape.channels)
        text, bundle = cfg.MODEL.HEAD_ADAPT.TEXT, bundle_of(cfg)
        if class_table is None:
            if len(bundle.names) != cfg.MODEL.ROI_HEADS.NUM_CLASSES:
                raise TextError(
                    HEAD_ADAPT.TARGET_CLASSES,
                    expected=f"the {cfg.MODEL.ROI_HEADS.NUM_CLASSES} classes of the model, to pick their rows by name",
                    found=f"none, and {len(bundle.names)} rows in {bundle.path}",
                    fix=f"Name them: {HEAD_ADAPT.TARGET_CLASSES.set('names.txt')}.",
                )
            class_table = bundle.names
        return {
            **super().from_config(cfg, input_shape),
            "bundle": bundle,
            "class_table": class_table,
            "aliases": tuple(cfg.MODEL.HEAD_ADAPT.ALIASES),
            "background": text.BACKGROUND,
            "temperature": float(text.TEMPERATURE),
            "trainable": bool(text.TRAINABLE),
            "projection": text.PROJECTION,
            "precedence": text.PRECEDENCE,
        }

    def head_layouts(self, context: ModuleContext) -> Iterable[HeadLayout]:
        """Describe boxes and federated-loss weights, and the classifier in a head group of its own.

        A checkpoint with a linear classifier still gives its boxes and masks.
        """
        yield from fast_rcnn_layouts(self, context)
        name = f"{context.name}.cls_score".lstrip(".")
        given = "file" if self.precedence == "file" else "checkpoint"
        yield HeadLayout(f"{name}.embeddings", "thing", name, "text", given=given)
        for leaf in ("projection.weight", "projection.bias"):
            yield HeadLayout(f"{name}.{leaf}", "thing", name, "text", axes=())
        # A part of its own: a model with BACKGROUND zero has none, and its projection is as good.
        yield HeadLayout(f"{name}.background", "thing", name, "text background", axes=())

    def facts(self) -> dict[str, Any]:
        """Describe the embeddings for a saved file, in plain types."""
        return {
            "names": list(self.class_table.names) if self.class_table is not None else [],
            "encoder": self.bundle.encoder,
            "width": self.bundle.width,
            "normalised": self.bundle.normalised,
            "file": os.path.basename(self.bundle.path),
            "temperature": self.cls_score.temperature,
        }


def text_predictors(model: nn.Module) -> Iterator[tuple[str, HeadAdaptTextOutputLayers]]:
    """List the text classifiers of a model, each with its name; one per stage of a cascade."""
    for name, module in model.named_modules():
        if isinstance(module, HeadAdaptTextOutputLayers):
            yield name, module


def text_facts(model: nn.Module) -> dict[str, Any] | None:
    """Describe the embeddings for a file saved from ``model``; ``None`` where it has none."""
    return next((module.facts() for _, module in text_predictors(model)), None)


def refuse_other_text(
    model: nn.Module, plan: AdaptPlan, stored: Mapping[str, torch.Tensor], facts: Any, origin: str
) -> None:
    """Raise where a checkpoint's embeddings are not those that the model was built with.

    Args:
        model: as built; nothing is loaded yet.
        plan: of the load.
        stored: the checkpoint's tensors under the model's names.
        facts: :func:`text_facts` of the checkpoint, where it has them.
        origin: the checkpoint, for messages.

    Raises:
        TextError: embeddings of another encoder; or, where ``PRECEDENCE`` is ``error``, a carried class whose two
            embeddings differ.
    """
    for name, module in text_predictors(model):
        tensor = f"{name}.cls_score.embeddings".lstrip(".")
        entry = plan.tensor(tensor)
        if entry is None or entry.action not in ("copied", "carried", "kept") or tensor not in stored:
            continue
        encoder = facts.get("encoder") if isinstance(facts, Mapping) else None
        ours = module.bundle.encoder
        if encoder and ours and str(encoder).casefold() != ours.casefold():
            raise TextError(
                f"{FILE_KEY}, {module.bundle.path}",
                expected=f"embeddings of {encoder}, which the classifier of {origin} was trained with",
                found=f"those of {ours}",
                fix=f"Use a file that {encoder} wrote, or start without that classifier: "
                f"{HEAD_ADAPT.EXCLUDE.set(['*.cls_score.*'])}.",
            )
        if module.precedence == "error":
            _refuse_difference(module, entry, plan, stored[tensor], origin)


def _refuse_difference(
    module: HeadAdaptTextOutputLayers, entry: TensorPlan, plan: AdaptPlan, stored: torch.Tensor, origin: str
) -> None:
    pairs = entry.carried
    if not pairs:
        return
    ours, theirs = (torch.tensor(side) for side in zip(*pairs, strict=True))
    cosines = nn.functional.cosine_similarity(
        module.cls_score.embeddings.detach().cpu().double()[ours], stored.detach().cpu().double()[theirs], dim=1
    )
    worst = int(cosines.argmin())
    if cosines[worst] < AGREE:
        name = plan.target["thing"].names[pairs[worst][0]]
        raise TextError(
            f"{FILE_KEY}, {module.bundle.path}",
            expected=f"the embeddings that {origin} has, since {HEAD_ADAPT.TEXT.PRECEDENCE} is 'error'",
            found=f"others for {int((cosines < AGREE).sum())} of {len(pairs)} classes; most for {name!r}, with a "
            f"cosine of {cosines[worst]:.4f}",
            fix=f"Set {HEAD_ADAPT.TEXT.PRECEDENCE.set('checkpoint')} to keep what was trained, or file to take the "
            "file's.",
        )
