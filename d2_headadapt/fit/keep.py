"""Solve the classes that were added behind an unmodified model, on exactly the regions that they will see.

Unlabelled old objects are the best examples of *other*, so no region is left out. Photos without a new class
(``KEEP_NEGATIVES``) have room of their own in the sample: an image of the training set shows few old scenes.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from detectron2.structures import Boxes, Instances
from detectron2.utils import comm
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..data.negatives import negative_images
from ..data.random_states import random_states_kept
from ..data.task_mapper import Mapper
from ..key import HEAD_ADAPT, shown
from ..modeling.keep import Keep, Pack, keep_of, regions_of
from ..modeling.keep_dense import DensePack
from ..modeling.task_dry_run import evaluating
from .boxes import Stage, collect_seen, solve_stage, stages_of
from .dense import fit_dense
from .images import FeatureCache, ImageStream, View, choose_images
from .masks import collect_pixels, solve_masks
from .rows import RowWriter, Solution
from .rpn import collect_anchors, proposals_of, recalls, solve
from .settings import FitReport, FitSettings, PartReport
from .sharing import gathered, on_rank_zero, placed

logger = logging.getLogger(__name__)
EVERY = 1_000_000
"""More proposals than any model has: the branch is fitted on all that it will see."""
GAIN = 0.02
"""What held-out recall must gain by second proposals, which take a fifth more time. At 0.005 they were switched on for
a class of which the old proposals find 98 %."""


def fit_packs(
    model: nn.Module,
    dataset: Sequence[dict[str, Any]],
    mapper: Mapper,
    *,
    new: Mapping[str, Sequence[int]],
    settings: FitSettings | None = None,
    cache: FeatureCache | None = None,
) -> FitReport:
    """Solve the rows of added classes in closed form; nothing else is written, and nothing random is drawn.

    Args:
        model: of :func:`d2_headadapt.attach_keep`, its weights loaded.
        dataset: the training set; its category ids are those of ``KeepSettings.training_names``.
        mapper: see :data:`d2_headadapt.fit.images.Mapper`.
        new: see :func:`d2_headadapt.fit.fit_new_rows`; label spaces are those of the packs.
        settings: how.
        cache: backbone features of an earlier fit of the same images.

    Raises:
        RankError, LayoutError, DatasetError: the solution failed, or the negatives cannot be used. Whatever is raised,
            the model is as it was.
    """
    settings = replace(settings or FitSettings(), proposals=EVERY)
    started = time.perf_counter()
    if isinstance(model, DistributedDataParallel):
        model = model.module
    keep: Any = keep_of(model)
    writer = RowWriter(model, new)
    before = {name: value.clone() for name, value in keep.state_dict().items()}
    reports: list[FitReport] = []
    try:
        with random_states_kept(), evaluating(model), torch.no_grad():
            negatives = negative_images(keep.settings.negatives)
            for number in keep.settings.trained:
                if writer.new_in(keep.packs[number].space):
                    fitter = _PackFitter(model, keep, number, writer, settings)
                    reports.append(fitter.fit(dataset, negatives, mapper, cache if len(keep.packs) == 1 else None))
    except BaseException:
        keep.load_state_dict(before)
        raise
    report = FitReport(
        tuple(part for one in reports for part in one.parts),
        {space: classes for one in reports for space, classes in one.new.items()},
        {space: classes for one in reports for space, classes in one.without_examples.items()},
        max((one.images for one in reports), default=0),
        tuple(dict(entry for one in reports for entry in one.skipped).items()),
        time.perf_counter() - started,
        tuple(sorted({position for one in reports for position in one.chosen})),
    )
    for part in report.parts:
        logger.info("fit: %s", part.line())
    logger.info("%s", report.line())
    if not keep.settings.negatives:
        logger.warning("%s", shown(NO_NEGATIVES))
    return report


NO_NEGATIVES = (
    "The added classes saw no photo without them. Where your images are of another kind than the old ones (microscopy "
    f"beside photos), they will be found on old scenes too. Set {HEAD_ADAPT.KEEP_NEGATIVES} to a folder of photos "
    "without them; no labels are needed."
)


def own_dataset(keep: Keep, number: int, dataset: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Restrict the training set to one pack's objects, with the pack's own class indices."""
    lookup = keep.settings.lookup(number)
    found = []
    for entry in dataset:
        own = [
            {**a, "category_id": lookup[a["category_id"]]}
            for a in entry.get("annotations", ())
            if lookup[a["category_id"]] >= 0
        ]
        found.append({**entry, "annotations": own})
    return found


class BranchProposals:
    """The boxes that a pack sees, called as an RPN is: the old proposals, then its second ones.

    Args:
        pack: whose second proposals.
        rpn: the old one.
        second: with second proposals.
    """

    def __init__(self, pack: Any, rpn: Any, *, second: bool) -> None:
        self._pack, self._rpn, self._second = pack, rpn, second

    def __call__(
        self, images: Any, features: dict[str, torch.Tensor], _: None
    ) -> tuple[list[Instances], dict[str, Any]]:
        """Compute the proposals of each image."""
        found, _ = self._rpn(images, features, None)
        if not self._second:
            return found, {}
        extra = self._pack.second(self._rpn, features, found)
        boxes = [Boxes(torch.cat([a.proposal_boxes.tensor, b.tensor])) for a, b in zip(found, extra, strict=True)]
        return [Instances(a.image_size, proposal_boxes=b) for a, b in zip(found, boxes, strict=True)], {}


class _PackFitter:
    """Solves one pack, part by part."""

    def __init__(self, model: Any, keep: Keep, number: int, writer: RowWriter, settings: FitSettings) -> None:
        self.model, self.keep, self.number, self.writer, self.settings = model, keep, number, writer, settings
        self.pack: Any = keep.packs[number]
        self.name = next(name for name, module in model.named_modules() if module is self.pack)
        self.missing: set[int] = set()

    def fit(
        self, dataset: Sequence[dict[str, Any]], negatives: Sequence[dict[str, Any]], mapper: Mapper,
        cache: FeatureCache | None,
    ) -> FitReport:  # fmt: skip
        """Solve proposals, boxes and masks, or a dense head."""
        own = own_dataset(self.keep, self.number, dataset)
        new = self.writer.new_in(self.pack.space)
        chosen = choose_images(own, new, self.settings)
        stream = self._stream(own, mapper, chosen, cache)
        if len(stream) == 0:
            nothing = PartReport(self.name, "kept", "the training set has no images")
            return FitReport((nothing,), {self.pack.space: new}, {self.pack.space: new})
        others = choose_images(negatives, (), self.settings)
        beside = self._stream(negatives, mapper, others, None)
        if isinstance(self.pack, DensePack):
            # Cells without an object have room of their own in its sample already.
            both = [*chosen, *(len(own) + position for position in others)]
            stream, beside = self._stream([*own, *negatives], mapper, both, None), self._stream([], mapper, [], None)
            parts = self._dense(stream)
        else:
            parts = [*self._second(stream), *self._boxes(stream, beside), *self._masks(stream)]
        without = {self.pack.space: tuple(sorted(self.missing))} if self.missing else {}
        skipped = tuple(sorted({**stream.skipped, **beside.skipped}.items()))
        return FitReport(
            tuple(parts), {self.pack.space: new}, without, len(stream) + len(beside) - len(skipped), skipped, 0.0,
            tuple(chosen),
        )  # fmt: skip

    def _stream(
        self, dicts: Sequence[dict[str, Any]], mapper: Mapper, chosen: Sequence[int], cache: FeatureCache | None
    ) -> ImageStream:
        rank, world = comm.get_rank(), comm.get_world_size()
        return ImageStream(self.model, dicts, mapper, chosen, self.settings, rank, world, cache)

    def _source(self) -> BranchProposals:
        second = self.pack.second is not None and bool(self.pack.second.on)
        return BranchProposals(self.pack, self.keep.rpn, second=second)

    def _dense(self, stream: ImageStream) -> list[PartReport]:
        report, missing = fit_dense(self.pack.view, self.name, stream, self.writer, self.settings)
        self.missing |= set(missing)
        return [report]

    def _second(self, stream: ImageStream) -> list[PartReport]:
        """Second proposals: solved toward the old layer, and on where held-out recall gains :data:`GAIN` by them."""
        name, second, rpn = f"{self.name}.second", self.pack.second, self.keep.rpn
        if second is None:
            return []
        if "rpn" not in self.settings.parts:
            return [PartReport(name, "kept", "FIT.PARTS leaves it out")]
        asked = self.keep.settings.proposals == "on"
        if not stream.held_out and not asked:
            return [PartReport(name, "kept", "too few images to judge by held-out recall")]
        second.on.fill_(False)
        held = {"mirror": False, "held_out_only": bool(stream.held_out)}
        old = recalls(self._source(), stream.views("recall", **held), EVERY)
        sample = gathered(collect_anchors(rpn, stream.views("second proposals"), self.settings))
        layers = ("objectness_logits", "anchor_deltas")

        def work() -> tuple[list[Solution], dict[str, float], int]:
            if not sample or not bool((sample["label"] == 1).any()):
                return [], {}, 0
            device = rpn.rpn_head.objectness_logits.weight.device
            here = placed(sample, stream.held_out, device)
            (ow, ob), (dw, db) = (
                (layer.weight.detach().float().flatten(1), layer.bias.detach().float())
                for layer in (getattr(rpn.rpn_head, one) for one in layers)
            )
            logits, deltas, chosen = solve(here, ow, ob, (dw, db), self.settings)
            found = []
            for layer, (weight, bias) in zip(layers, (logits, deltas), strict=True):
                rows = torch.arange(len(bias))
                found.append(Solution(f"{name}.{layer}.weight", rows, weight[:, :, None, None].cpu()))
                found.append(Solution(f"{name}.{layer}.bias", rows, bias.cpu()))
            return found, chosen, len(sample["weight"])

        solutions, chosen, regions = on_rank_zero(work, name)
        if not solutions:
            return [PartReport(name, "kept", "no anchor lies on an object")]
        self.writer.write(solutions, shared=True)
        second.on.fill_(True)
        both = recalls(self._source(), stream.views("recall", **held), EVERY)
        score = {"held-out recall": (float(old.mean()), float(both.mean()))}
        told = f"the old proposals find {float(old[0]):.0%} of the new objects, with second ones {float(both[0]):.0%}"
        if not asked and float(both.mean()) < float(old.mean()) + GAIN:
            second.on.fill_(False)
            return [PartReport(name, "kept", f"off: {told}", regions, 0, chosen, score)]
        return [PartReport(name, "solved", f"on: {told}", regions, 0, chosen, score)]

    def _boxes(self, stream: ImageStream, beside: ImageStream) -> list[PartReport]:
        if "box" not in self.settings.parts:
            return [PartReport(self.name, "kept", "FIT.PARTS leaves it out")]
        reports = []
        for old in stages_of(self.model.roi_heads, "roi_heads"):
            predictor = self.pack.predictors[old.number]
            stage = Stage(old.number, f"{self.name}.predictors.{old.number}", predictor, old.threshold)
            if not self.writer.new(stage.classifier):
                continue
            title = f"box head of {self.pack.space}"
            see, count = self._see(stage.number), self.pack.num_classes
            samples = []
            for views in (stream, beside):
                found = gathered(collect_seen(see, stage, views.views(title), count, self.settings))
                if found:
                    held = torch.isin(found["view"] // 2, torch.tensor(sorted(views.held_out), dtype=torch.int64))
                    samples.append({**found, "held": held})

            def work(stage: Stage = stage, samples: list[dict[str, torch.Tensor]] = samples) -> Any:
                if not samples:
                    nothing = PartReport(stage.name, "kept", "no region was found")
                    return [], nothing, self.writer.new(stage.classifier)
                device = stage.predictor.bbox_pred.weight.device
                sample = {key: torch.cat([one[key] for one in samples]).to(device) for key in samples[0]}
                return solve_stage(stage, sample, self.writer, self.pack.num_classes, self.settings)

            solutions, report, missing = on_rank_zero(work, stage.name)
            self.missing |= set(missing)
            self.writer.write(solutions)
            reports.append(report)
        return reports

    def _see(self, stage: int) -> Callable[[View], tuple[Boxes, torch.Tensor]]:
        """Compute what a stage's predictor reads of a view's proposals and objects."""
        source, roi_heads, pack = self._source(), self.model.roi_heads, self.pack

        def see(view: View) -> tuple[Boxes, torch.Tensor]:
            boxes = torch.cat([proposals_of(source, view, EVERY).tensor, view.truth.gt_boxes.tensor])
            regions = regions_of(roi_heads, view.features, [Boxes(boxes)], [view.size])
            x = pack.inputs(roi_heads, view.features, regions)[stage]
            (seen,) = regions.boxes[stage]
            whole = seen.nonempty()
            return seen[whole], x[whole]

        return see

    def _masks(self, stream: ImageStream) -> list[PartReport]:
        part = f"{self.name}.mask_predictor"
        new = self.writer.new(f"{part}.weight")
        if not isinstance(self.pack, Pack) or self.pack.mask_predictor is None or not new:
            return []
        if "mask" not in self.settings.parts:
            return [PartReport(part, "kept", "FIT.PARTS leaves it out")]
        facade = SimpleNamespace(proposal_generator=self._source(), roi_heads=self.model.roi_heads)
        sample = gathered(collect_pixels(facade, stream.views("masks", mirror=False), self.settings))

        def work() -> tuple[list[Solution], PartReport]:
            seen = sorted(set(sample["label"].tolist()) & set(new)) if sample else []
            if not seen:
                return [], PartReport(part, "kept", "no image shows a mask of a new class")
            device = self.model.roi_heads.mask_head.predictor.weight.device
            here = placed(sample, stream.held_out, device)
            solutions, penalty = solve_masks(part, here, seen, self.writer, self.settings)
            report = PartReport(
                part, "solved", f"{len(seen)} new classes", len(sample["weight"]), 0, {"predictor": penalty}
            )
            return solutions, report

        solutions, report = on_rank_zero(work, part)
        self.writer.write(solutions)
        return [report]
