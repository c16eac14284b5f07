"""HA226 to HA229: what an evaluation and detectron2's mapper read and meet too late, hours after the start."""

from __future__ import annotations

from collections.abc import Iterable

from ..data.dicts import Needs, problems_of
from ..errors import DatasetError
from ..key import DATASETS, MODEL
from .coco_json import BOX_GOOD, MASK_NONE, VALUE_NONE, VALUE_WRONG
from .finding import DoctorContext, Finding, check
from .reading import WITHOUT_BOXES, coco_path, detected, has_roi_heads, place, readable, some


@check("HA226", "what the evaluation reads is in every annotation of a test set", needs=("registered",), quick=True)
def evaluation_reads(context: DoctorContext) -> Iterable[Finding]:
    """Find what COCO's evaluation reads when the training is over."""
    cfg = context.cfg
    roi_heads = has_roi_heads(cfg)
    for name, labels in detected(context, context.test_names):
        if coco_path(context, name) is None:
            continue
        there = labels.image >= 0
        keys = [("area", labels.area), ("iscrowd", labels.crowd_said)]
        keys += [("num_keypoints", labels.count)] if roi_heads and cfg.MODEL.KEYPOINT_ON else []
        for key, kinds in keys:
            wrong, lacking = there & (kinds == VALUE_WRONG), there & (kinds == VALUE_NONE)
            if wrong.any():
                yield Finding(
                    "HA226",
                    "error",
                    DatasetError(
                        place(name, labels),
                        found=f"{key} that is no number in {some(wrong, labels)}: the evaluation stops there, after "
                        "the training",
                        expected=f"{key} as a number, without quotes",
                        fix=f"Write the numbers without quotes, or remove the key {key}: it is filled in then.",
                    ),
                )
            if lacking.any():
                how = {"area": "that of the box", "iscrowd": "0", "num_keypoints": "the number of labelled points"}[key]
                yield Finding(
                    "HA226",
                    "note",
                    DatasetError(
                        place(name, labels),
                        found=f"no {key} in {some(lacking, labels)}: {how} is filled in for the evaluation",
                        expected=f"{key} in every annotation, which detectron2's own tools stop without",
                        fix=f"Write {key} into the json if other tools shall read it.",
                    ),
                )
        lacking = there & (labels.mask == MASK_NONE)
        if roi_heads and cfg.MODEL.MASK_ON and lacking.any():
            yield Finding(
                "HA226",
                "error",
                DatasetError(
                    place(name, labels),
                    found=f"no segmentation in {some(lacking, labels)}: the evaluation stops at KeyError "
                    "'segmentation', after the training",
                    expected=f"a segmentation in every annotation, because {MODEL.MASK_ON.is_on()}",
                    fix=f"Set {MODEL.MASK_ON.set(False)}, or draw these masks.",
                ),
            )


@check("HA227", "a test set has objects to find", needs=("registered",), quick=True)
def anything_to_find(context: DoctorContext) -> Iterable[Finding]:
    for name, labels in detected(context, context.test_names):
        if not labels.images or (labels.objects & (labels.box_kind == BOX_GOOD)).any() or not labels.from_json:
            continue
        crowds = (labels.crowd & (labels.image >= 0)).any()
        yield Finding(
            "HA227",
            "error",
            DatasetError(
                place(name, labels),
                found=f"{'only crowds (iscrowd 1)' if crowds else 'no box'} in {len(labels.images)} images: AP is not "
                "a number",
                expected="boxes of single objects",
                fix=f"Label some images of the test set, or remove it from {DATASETS.TEST}.",
            ),
        )


@check("HA228", "every dict of a dataset has what detectron2 reads", needs=("registered",))
def dicts_are_whole(context: DoctorContext) -> Iterable[Finding]:
    """Check datasets that a function gives; the trainer checks them when it loads them."""
    boxes = context.cfg.MODEL.META_ARCHITECTURE not in WITHOUT_BOXES
    for name in context.dataset_names:
        if coco_path(context, name) is not None:
            continue
        needs = Needs(boxes=boxes and name in context.train_names, ids=name in context.test_names)
        for problem in problems_of(context.dicts(name), needs):
            yield Finding(
                "HA228",
                "error",
                DatasetError(f"dataset {name!r}", found=problem.found, expected=problem.expected, fix=problem.fix),
            )


@check("HA229", "a training set has a list of annotations", needs=("registered",), quick=True)
def annotations_are_listed(context: DoctorContext) -> Iterable[Finding]:
    """Find sets without annotations, at which detectron2 stops in an assertion."""
    if context.cfg.MODEL.META_ARCHITECTURE in WITHOUT_BOXES:
        return
    for name, labels in readable(context, context.train_names):
        if labels.labelled or not labels.from_json:
            continue  # HA228 looks at dicts.
        near = [key for key in labels.keys if "annot" in key.lower() or "label" in key.lower()]
        yield Finding(
            "HA229",
            "error",
            DatasetError(
                place(name, labels),
                found=f"no list under the key 'annotations'; its keys are {', '.join(map(repr, labels.keys))}",
                expected="a list of annotations, because the model is trained on boxes",
                fix=f"Rename {near[0]!r} to 'annotations', if it is the list."
                if near
                else "Use the json with the labels.",
            ),
        )
