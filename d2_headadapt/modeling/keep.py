"""``KEEP: exact``: new classes in a branch behind an unmodified detector, whose detections stay bit for bit.

The old modules, their tensors and the shapes of their calls are untouched: their own softmax, non-maximum suppression,
top-k and mask call. The branch reads the region features that the old path computed, has a softmax of its own over its
N classes and *other*, and its detections are put behind the old ones.

R   number of regions
N   number of classes of a pack; row N is *other*
C   number of features of a region
S   number of stages of a cascade; 1 elsewhere
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling.roi_heads import FastRCNNOutputLayers
from detectron2.modeling.roi_heads.fast_rcnn import fast_rcnn_inference
from detectron2.modeling.roi_heads.mask_head import mask_rcnn_inference, mask_rcnn_loss
from detectron2.structures import Boxes, Instances, pairwise_iou
from torch import nn

from ..adapt.detectron2_heads import fast_rcnn_layouts
from ..adapt.layouts import HeadLayout
from ..adapt.registry import ModuleContext
from ..config.keep import KeepSettings, PackSpec
from ..errors import ConfigError
from ..key import HEAD_ADAPT
from .keep_proposals import SecondProposals, inputs_of, why_not_second
from .task_boxes import has_tasks

OVERLAP = 0.5
"""IoU from which a new detection can hide an old one (``KEEP_DETECTIONS: suppress``)."""


@dataclass(frozen=True)
class Regions:
    """The boxes that a box head sees, stage by stage.

    Args:
        boxes: by stage and image.
        features: (R, C) by stage, the first image's regions first.
    """

    boxes: list[list[Boxes]]
    features: list[torch.Tensor]

    def joined(self, other: Regions) -> Regions:
        """Join the regions of each image with those of ``other``, which come after."""
        boxes = [
            [Boxes(torch.cat([a.tensor, b.tensor])) for a, b in zip(mine, theirs, strict=True)]
            for mine, theirs in zip(self.boxes, other.boxes, strict=True)
        ]
        features = []
        for k, (mine, theirs) in enumerate(zip(self.features, other.features, strict=True)):
            first = torch.split(mine, [b.tensor.shape[0] for b in self.boxes[k]])
            second = torch.split(theirs, [b.tensor.shape[0] for b in other.boxes[k]])
            features.append(torch.cat([x for pair in zip(first, second, strict=True) for x in pair]))
        return Regions(boxes, features)


def old_predictors(roi_heads: Any) -> list[Any]:
    """List the box predictors of ROI heads, by stage."""
    predictor = roi_heads.box_predictor
    return list(predictor) if isinstance(predictor, nn.ModuleList) else [predictor]


def old_heads(roi_heads: Any) -> list[nn.Module]:
    """List what makes region features of pooled regions, by stage."""
    if hasattr(roi_heads, "res5"):
        return [roi_heads.res5]
    head = roi_heads.box_head
    return list(head) if isinstance(head, nn.ModuleList) else [head]


def pooled(roi_heads: Any, features: Mapping[str, torch.Tensor], boxes: list[Boxes]) -> torch.Tensor:
    """Pool the crops that a box head reads, (R, channels, height, width)."""
    if hasattr(roi_heads, "res5"):
        found: torch.Tensor = roi_heads.pooler([features[name] for name in roi_heads.in_features], boxes)
    else:
        found = roi_heads.box_pooler([features[name] for name in roi_heads.box_in_features], boxes)
    return found


def region_features(head: nn.Module, crops: torch.Tensor) -> torch.Tensor:
    """Compute (R, C) of pooled regions: a C4 model's last stage gives maps, of which it takes the mean."""
    x: torch.Tensor = head(crops)
    return x.mean(dim=[2, 3]) if x.dim() == 4 else x.flatten(1)


def moved_boxes(roi_heads: Any, stage: int, predictions: Any, boxes: list[Boxes], sizes: Sequence[Any]) -> list[Boxes]:
    """Move a cascade stage's boxes, as ``CascadeROIHeads`` does at test time."""
    given = [Instances(size, proposal_boxes=image) for size, image in zip(sizes, boxes, strict=True)]
    found = [Boxes(image) for image in old_predictors(roi_heads)[stage].predict_boxes(predictions, given)]
    for image, size in zip(found, sizes, strict=True):
        image.clip(size)
    return found


@torch.no_grad()
def regions_of(
    roi_heads: Any, features: Mapping[str, torch.Tensor], boxes: list[Boxes], sizes: Sequence[Any]
) -> Regions:
    """Compute what the old box head sees of some boxes, stage by stage."""
    heads, predictors = old_heads(roi_heads), old_predictors(roi_heads)
    by_stage, seen = [boxes], []
    for stage, head in enumerate(heads):
        seen.append(region_features(head, pooled(roi_heads, features, by_stage[-1])))
        if stage + 1 < len(heads):
            by_stage.append(moved_boxes(roi_heads, stage, predictors[stage](seen[-1]), by_stage[-1], sizes))
    return Regions(by_stage, seen)


@contextmanager
def seen_by(predictors: Sequence[nn.Module]) -> Iterator[list[tuple[torch.Tensor, Any]]]:
    """Input (R, C) and output of the calls of some box predictors, in order."""
    calls: list[tuple[torch.Tensor, Any]] = []
    handles = [
        predictor.register_forward_hook(lambda _, args, out: calls.append((args[0].detach().flatten(1), out)))
        for predictor in predictors
    ]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


class PackPredictor(FastRCNNOutputLayers):
    """``FastRCNNOutputLayers`` of a pack: a label space of its own, so that no plan mixes its rows with old ones."""

    def __init__(self, space: str, group: str, **kwargs: Any) -> None:
        """
        Args:
            space: the pack's label space.
            group: the pack; its tensors change together.
            kwargs: the parent's.
        """
        super().__init__(**kwargs)
        self.space, self.group = space, group
        self.cls_agnostic = bool(kwargs.get("cls_agnostic_bbox_reg", False))

    def head_layouts(self, context: ModuleContext) -> Iterable[HeadLayout]:
        """Describe the parent's layouts in the pack's own label space."""
        for layout in fast_rcnn_layouts(self, context):
            yield replace(layout, space=self.space, group=self.group)


class Pack(nn.Module):
    """The classes that one session added: a classifier and class-specific boxes a stage, masks, and proposals.

    Args:
        spec: its classes.
        number: its place among the packs.
        roi_heads: the old ones, which are read and not changed.
        rpn: the proposal generator; ``None`` where proposals come from elsewhere.
        second: whether it may have second proposals.
    """

    def __init__(self, spec: PackSpec, number: int, roi_heads: Any, rpn: Any, *, second: bool) -> None:
        super().__init__()
        self.spec = spec
        self.space = pack_space(number)
        old = old_predictors(roi_heads)
        predictors = []
        for stage, one in enumerate(old):
            kwargs: dict[str, Any] = {
                name: getattr(one, name)
                for name in ("smooth_l1_beta", "box_reg_loss_type", "loss_weight")
                if hasattr(one, name)
            }
            # Only the last stage's boxes are used, as in a cascade's old path.
            kwargs["cls_agnostic_bbox_reg"] = stage + 1 < len(old)
            predictors.append(
                PackPredictor(
                    self.space,
                    self.space,
                    input_shape=ShapeSpec(channels=one.bbox_pred.in_features),
                    box2box_transform=one.box2box_transform,
                    num_classes=len(spec.classes),
                    **kwargs,
                )
            )
        self.predictors = nn.ModuleList(predictors)
        self.heads = nn.ModuleList(copy.deepcopy(head) for head in old_heads(roi_heads) if spec.head == "copy")
        self.second = SecondProposals(rpn) if second else None
        self.mask_predictor: nn.Conv2d | None = None
        if getattr(roi_heads, "mask_on", False) and roi_heads.mask_head.predictor.out_channels > 1:
            self.mask_predictor = nn.Conv2d(roi_heads.mask_head.predictor.in_channels, len(spec.classes), 1)
            nn.init.normal_(self.mask_predictor.weight, std=0.001)
            nn.init.zeros_(self.mask_predictor.bias)  # type: ignore[arg-type]

    @property
    def num_classes(self) -> int:
        """N."""
        return len(self.spec.classes)

    def head_layouts(self, context: ModuleContext) -> Iterable[HeadLayout]:
        """Describe the mask predictor, one channel a class; the box predictors describe themselves."""
        for leaf in ("weight", "bias"):
            if self.mask_predictor is not None:
                yield HeadLayout(f"{context.name}.mask_predictor.{leaf}", self.space, self.space, "mask_head")

    def begin(self, roi_heads: Any) -> None:
        """Start a copied box head from the old one's weights, which are loaded by now."""
        for mine, old in zip(self.heads, old_heads(roi_heads), strict=False):
            mine.load_state_dict(old.state_dict())

    def own_regions(
        self, roi_heads: Any, rpn: Any, features: Mapping[str, torch.Tensor], proposals: Sequence[Instances],
        known: Regions,
    ) -> Regions:  # fmt: skip
        """Compute the regions of the old proposals, and those of second proposals where they are on."""
        if self.second is not None and bool(self.second.on):
            boxes = self.second(rpn, features, proposals)
            known = known.joined(regions_of(roi_heads, features, boxes, [p.image_size for p in proposals]))
        return known

    def predictions(
        self, roi_heads: Any, features: Mapping[str, torch.Tensor], regions: Regions
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Predict scores (R, N + 1) and deltas of each stage."""
        seen = self.inputs(roi_heads, features, regions)
        return [predictor(x) for predictor, x in zip(self.predictors, seen, strict=True)]

    def inputs(self, roi_heads: Any, features: Mapping[str, torch.Tensor], regions: Regions) -> list[torch.Tensor]:
        """Compute what each stage's predictor reads, (R, C): features of the old box head, or of the copied one."""
        if not len(self.heads):
            return regions.features
        crops = [pooled(roi_heads, features, boxes).detach() for boxes in regions.boxes]
        return [region_features(head, x) for head, x in zip(self.heads, crops, strict=True)]

    def detect(
        self, roi_heads: Any, features: Mapping[str, torch.Tensor], regions: Regions, sizes: Sequence[Any]
    ) -> list[Instances]:
        """Detect with the pack's own class indices, and with masks and tasks where old ones have them."""
        stages = self.predictions(roi_heads, features, regions)
        by_stage: list[list[torch.Tensor]] = []
        for predictor, predicted, boxes in zip(self.predictors, stages, regions.boxes, strict=True):
            given = [Instances(size, proposal_boxes=image) for size, image in zip(sizes, boxes, strict=True)]
            by_stage.append(list(predictor.predict_probs(predicted, given)))  # type: ignore[operator]
        scores = [torch.stack(image).mean(dim=0) for image in zip(*by_stage, strict=True)]
        last: Any = self.predictors[-1]
        boxes_found = last.predict_boxes(stages[-1], given)
        # The user's own thresholds, as the old path has them now.
        old = old_predictors(roi_heads)[-1]
        limits = old.test_score_thresh, old.test_nms_thresh, old.test_topk_per_image
        found: list[Instances] = fast_rcnn_inference(boxes_found, scores, list(sizes), *limits)[0]
        if getattr(roi_heads, "mask_on", False):
            mask_rcnn_inference(self.mask_logits(roi_heads, features, [image.pred_boxes for image in found]), found)
        if getattr(roi_heads, "keypoint_on", False):
            found = roi_heads._forward_keypoint(features, found)
        if has_tasks(old):
            old.classify(roi_heads.task_features(features, [image.pred_boxes for image in found]), found)
        return found

    def mask_logits(self, roi_heads: Any, features: Mapping[str, torch.Tensor], boxes: list[Boxes]) -> torch.Tensor:
        """Compute (R, N, side, side) of boxes, or (R, 1, side, side) where one mask serves all classes."""
        if hasattr(roi_heads, "res5"):
            crops = roi_heads.res5(pooled(roi_heads, features, boxes))
        else:
            crops = roi_heads.mask_pooler([features[name] for name in roi_heads.mask_in_features], boxes)
        with inputs_of(roi_heads.mask_head.predictor) as seen:
            logits: torch.Tensor = roi_heads.mask_head.layers(crops)
        return logits if self.mask_predictor is None else self.mask_predictor(seen[0])

    def losses(
        self, roi_heads: Any, rpn: Any, features: Mapping[str, torch.Tensor], proposals: list[Instances],
        targets: list[Instances],
    ) -> dict[str, torch.Tensor]:  # fmt: skip
        """Compute ``loss_cls`` and ``loss_box_reg`` of each stage, and ``loss_mask``.

        Args:
            roi_heads, rpn: the old ones.
            features: of the backbone.
            proposals: of the old RPN.
            targets: with ``gt_classes`` of this pack; other objects are left out of them.
        """
        sizes = [image.image_size for image in proposals]
        features = {name: value.detach() for name, value in features.items()}
        if self.second is not None and bool(self.second.on):
            extra = self.second(rpn, features, proposals)
            proposals = [_with_boxes(image, more) for image, more in zip(proposals, extra, strict=True)]
        # Old ROI heads sample, and call everything background that has their own number of classes as its label.
        background = roi_heads.num_classes
        shifted = [_with_classes(image, image.gt_classes + background + 1) for image in targets]
        sampled = roi_heads.label_and_sample_proposals(proposals, shifted)
        regions = regions_of(roi_heads, features, [image.proposal_boxes for image in sampled], sizes)
        losses: dict[str, torch.Tensor] = {}
        for stage, predicted in enumerate(self.predictions(roi_heads, features, regions)):
            given = sampled
            if stage:
                given = [Instances(size, proposal_boxes=b) for size, b in zip(sizes, regions.boxes[stage], strict=True)]
                given = roi_heads._match_and_label_boxes(given, stage, shifted)
            given = [_with_classes(image, self._own_labels(image.gt_classes, background)) for image in given]
            predictor: Any = self.predictors[stage]
            suffix = f"_stage{stage}" if len(self.predictors) > 1 else ""
            losses.update({name + suffix: value for name, value in predictor.losses(predicted, given).items()})
        if self.mask_predictor is not None:
            own = [_with_classes(image, self._own_labels(image.gt_classes, background)) for image in sampled]
            chosen = [image[(image.gt_classes >= 0) & (image.gt_classes < self.num_classes)] for image in own]
            logits = self.mask_logits(roi_heads, features, [image.proposal_boxes for image in chosen])
            losses["loss_mask"] = mask_rcnn_loss(logits, chosen)
        return losses

    def _own_labels(self, labels: torch.Tensor, background: int) -> torch.Tensor:
        own = torch.where(labels == background, torch.full_like(labels, self.num_classes), labels - background - 1)
        return torch.where(labels < 0, labels, own)


def _with_classes(image: Instances, classes: torch.Tensor) -> Instances:
    out = Instances(image.image_size, **image.get_fields())
    out.set("gt_classes", classes)
    return out


def _with_boxes(image: Instances, more: Boxes) -> Instances:
    boxes = Boxes(torch.cat([image.proposal_boxes.tensor, more.tensor]))
    # Nobody reads these logits; ground truth is given some, so all must have them.
    return Instances(image.image_size, proposal_boxes=boxes, objectness_logits=boxes.tensor.new_zeros(len(boxes)))


class Keep(nn.Module):
    """The packs of a model, and what they need to know of it.

    Args:
        settings: old and added classes.
        packs: one for each of ``settings.packs``.
        rpn: the old proposal generator; not a child of this module.
    """

    def __init__(self, settings: KeepSettings, packs: Iterable[nn.Module], rpn: Any) -> None:
        super().__init__()
        self.settings = settings
        self.packs = nn.ModuleList(packs)
        self._rpn = (rpn,)

    @property
    def rpn(self) -> Any:
        """The old proposal generator."""
        return self._rpn[0]

    def train(self, mode: bool = True) -> Keep:
        """Switch mode like the parent, of the packs that this session trains."""
        super().train(mode)
        for i, pack in enumerate(self.packs):
            pack.train(mode and i in self.settings.trained)
        return self

    def offset(self, number: int) -> int:
        """Return the class index of a pack's first class."""
        return len(self.settings.old) + sum(len(pack.classes) for pack in self.settings.packs[:number])

    def own_targets(self, number: int, targets: Sequence[Instances]) -> list[Instances]:
        """Pick the objects of a pack's classes, with its own class indices."""
        lookup = torch.tensor(self.settings.lookup(number), dtype=torch.int64)
        found = []
        for image in targets:
            own = lookup.to(image.gt_classes.device)[image.gt_classes]
            found.append(_with_classes(image, own)[own >= 0])
        return found


class KeptModel:
    """Put before a model's class: everything old stays in evaluation mode, whatever ``train`` is told."""

    def train(self, mode: bool = True) -> Any:
        """Switch mode of the packs alone: no running mean moves and no dropout is drawn in the old path."""
        super().train(mode)  # type: ignore[misc]
        for module in self.modules():  # type: ignore[attr-defined]
            module.training = False
        keep_of(self).train(mode)  # type: ignore[union-attr]
        self.training = mode
        return self


class KeptROIHeads:
    """Put before the class of ROI heads: their own detections, then those of the packs."""

    keep: Keep

    def forward(
        self, images: Any, features: dict[str, torch.Tensor], proposals: list[Instances],
        targets: list[Instances] | None = None,
    ) -> tuple[list[Instances], dict[str, torch.Tensor]]:  # fmt: skip
        """Detect; with targets, which only training gives, compute the losses of the packs."""
        if targets is not None:
            losses: dict[str, torch.Tensor] = {}
            for i in self.keep.settings.trained:
                pack: Any = self.keep.packs[i]
                own = pack.losses(self, self.keep.rpn, features, proposals, self.keep.own_targets(i, targets))
                several = len(self.keep.settings.trained) > 1
                losses.update({f"{name}_pack{i}" if several else name: value for name, value in own.items()})
            return proposals, losses
        with seen_by(old_predictors(self)) as calls:
            found, losses = super().forward(images, features, proposals, targets)  # type: ignore[misc]
        return self._with_packs(features, proposals, found, calls), losses

    def _with_packs(
        self, features: dict[str, torch.Tensor], proposals: list[Instances], old: list[Instances],
        calls: Sequence[tuple[torch.Tensor, Any]],
    ) -> list[Instances]:  # fmt: skip
        sizes = [image.image_size for image in proposals]
        boxes = [[image.proposal_boxes for image in proposals]]
        stages = len(old_predictors(self))
        for stage in range(stages - 1):
            boxes.append(moved_boxes(self, stage, calls[stage][1], boxes[-1], sizes))
        known = Regions(boxes, [x for x, _ in calls[:stages]])
        out = old
        for i, module in enumerate(self.keep.packs):
            pack: Any = module
            regions = pack.own_regions(self, self.keep.rpn, features, proposals, known)
            new = pack.detect(self, features, regions, sizes)
            out = [self._joined(a, b, i) for a, b in zip(out, new, strict=True)]
        if getattr(self.keep.rpn, "hidden", None) is not None:
            self.keep.rpn.hidden = None
        return out

    def _joined(self, old: Instances, new: Instances, number: int) -> Instances:
        new.pred_classes = new.pred_classes + self.keep.offset(number)
        return joined(old, new, self.keep.settings, len(self.keep.settings.old))


def joined(old: Instances, new: Instances, settings: KeepSettings, old_classes: int) -> Instances:
    """Old detections, then new ones; with ``suppress`` without the old ones that a sure new one covers.

    Args:
        old: of the base model, and of earlier packs.
        new: with class indices of the extended table.
        settings: how they meet.
        old_classes: the base model's number of classes; only its detections can be hidden.
    """
    if settings.detections == "suppress":
        sure = new.pred_boxes[new.scores >= settings.suppress_score]
        hidden = (pairwise_iou(old.pred_boxes, sure) >= OVERLAP).any(dim=1) & (old.pred_classes < old_classes)
        old = old[~hidden]
    out = Instances(old.image_size)
    for name, value in old.get_fields().items():
        other = new.get(name)
        out.set(name, torch.cat([value, other]) if isinstance(value, torch.Tensor) else type(value).cat([value, other]))
    return out


def keep_of(model: Any) -> Keep | None:
    """Find the packs of a model; ``None`` where it has none."""
    return next((module for module in model.modules() if isinstance(module, Keep)), None)


def pack_space(number: int) -> str:
    """Name the label space of a pack, for plans and messages."""
    return f"added_{number}"


def put_before(module: nn.Module, mixin: type) -> None:
    """Make ``mixin`` the first base class of one module; its tensors, and other modules of its class, stay."""
    cls = type(module)
    module.__class__ = type(f"Kept{cls.__name__}", (mixin, cls), {"__module__": __name__})


def freeze_old(model: nn.Module, keep: Keep) -> None:
    """Freeze all but the packs that this session trains; second proposals are solved, never trained."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for i in keep.settings.trained:
        for name, parameter in keep.packs[i].named_parameters():
            parameter.requires_grad_(not name.startswith("second."))


def build_packs(settings: KeepSettings, roi_heads: Any, rpn: Any) -> list[Pack]:
    """Build the packs of ROI heads.

    Raises:
        ConfigError: ROI heads that no branch can stand behind.
    """
    problem = why_not_roi_heads(roi_heads)
    if problem is not None:
        raise ConfigError(
            HEAD_ADAPT.KEEP,
            expected="StandardROIHeads, Res5ROIHeads or CascadeROIHeads, or ROI heads derived from them",
            found=f"{type(roi_heads).__name__}: {problem}",
            fix=f"Set {HEAD_ADAPT.KEEP} '' to train one head for all classes.",
        )
    # Asked for by name, an RPN that cannot have them is an error; by default it only has none.
    second = settings.proposals == "on" or (settings.proposals == "auto" and why_not_second(rpn) is None)
    found = []
    with torch.random.fork_rng(devices=[]):
        for i, spec in enumerate(settings.packs):
            # The same rows on every rank, and no random number of the model's own stream.
            torch.manual_seed(i)
            found.append(Pack(spec, i, roi_heads, rpn, second=second))
    return found


def why_not_roi_heads(roi_heads: Any) -> str | None:
    """Say why no branch can stand behind these ROI heads; ``None`` where one can."""
    if not hasattr(roi_heads, "box_predictor") or not (hasattr(roi_heads, "box_pooler") or hasattr(roi_heads, "res5")):
        return "where they pool regions is not known"
    for predictor in old_predictors(roi_heads):
        if not isinstance(predictor, FastRCNNOutputLayers) or not isinstance(predictor.bbox_pred, nn.Linear):
            return f"{type(predictor).__name__} is no FastRCNNOutputLayers"
        if len(predictor.box2box_transform.weights) != 4:
            return "their boxes are rotated"
    if getattr(roi_heads, "mask_on", False):
        head = roi_heads.mask_head
        if not isinstance(getattr(head, "predictor", None), nn.Conv2d) or not hasattr(head, "layers"):
            return f"how {type(head).__name__} predicts masks is not known"
    return None
