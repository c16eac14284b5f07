"""Checks HA201 to HA210: files of labels, their ids, and what training finds in them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from ..errors import DatasetError
from ..key import DATALOADER, DATASETS
from .coco_json import Labels
from .finding import DoctorContext, Finding, check
from .reading import detected, from_json, image_tasks, listed, place, readable, some, unreadable


@check("HA201", "the labels of every dataset can be read", needs=("registered",), quick=True)
def labels_are_readable(context: DoctorContext) -> Iterable[Finding]:
    for name in context.dataset_names:
        finding = unreadable(context, "HA201", name)
        if finding is not None:
            yield finding


@check("HA202", "every annotation has a class of its dataset", needs=("registered",), quick=True)
def category_ids(context: DoctorContext) -> Iterable[Finding]:
    """Find category ids out of range: on a GPU such an id is a device-side assert, hours later (pains.md, 5)."""
    for name, labels in readable(context):
        stray = labels.category < 0
        if not stray.any() or not (labels.from_json or labels.ids):
            continue
        ids = Counter(repr(labels.category_id[m]) for m in np.flatnonzero(stray))
        allowed = _range(labels.ids)
        known = "'categories' of the same file" if labels.from_json else f"its {len(labels.names)} thing_classes"
        yield Finding(
            "HA202",
            "error",
            DatasetError(
                place(name, labels),
                found=f"category_id {', '.join(list(ids)[:4])} in {some(stray, labels)}",
                expected=f"a category id of {known}: {allowed}",
                fix="Correct these annotations, or add the category.",
            ),
        )


def _range(ids: Sequence[Any]) -> str:
    if len(ids) > 1 and all(isinstance(i, int) for i in ids) and ids[-1] - ids[0] == len(ids) - 1:
        return f"{ids[0]} to {ids[-1]}"
    return listed(ids, 12)


@check("HA203", "every annotation is of an image that is listed", needs=("registered",), quick=True, severity="warning")
def annotated_images(context: DoctorContext) -> Iterable[Finding]:
    for name, labels in from_json(context):
        lost = labels.image < 0
        if lost.any():
            yield Finding(
                "HA203",
                "error" if lost.all() and name in context.train_names else "warning",
                DatasetError(
                    place(name, labels),
                    found=f"{some(lost, labels)}: no image of that id, so detectron2 leaves them out",
                    expected="an image_id of the list of images",
                    fix="Correct image_id, or add the images; 1 and '1' are two ids.",
                ),
            )


@check("HA204", "ids of images, annotations and categories are unique", needs=("registered",), quick=True)
def unique_ids(context: DoctorContext) -> Iterable[Finding]:
    for name, labels in from_json(context):
        category_ids = [category.get("id") for category in labels.categories]
        inside = [labels.annotations[m] for m in np.flatnonzero(labels.image >= 0)]
        # detectron2 lets the duplicates of COCO's minival pass, by the file's name.
        known_minival = "minival" in labels.source
        for kind, values, harm, severity in (
            ("image", labels.images, "only the last of them is read, with the boxes of all", "error"),
            (
                "annotation",
                inside,
                "detectron2 stops at them, unless the file is a minival",
                "note" if known_minival else "error",
            ),
            ("category", category_ids, "a class would be there twice", "error"),
        ):
            twice = [value for value, count in Counter(map(repr, values)).items() if count > 1]
            if None in values or twice:
                lacks = sum(value is None for value in values)
                found = [f"{lacks} without an id"] if lacks else []
                found += [f"twice: {', '.join(v for v in twice if v != 'None')[:120]} ({harm})"] if twice else []
                yield Finding(
                    "HA204",
                    "error" if lacks or severity == "error" else "note",
                    DatasetError(
                        f"{place(name, labels)}, {kind} ids",
                        found="; ".join(found),
                        expected=f"one id for each {kind}, used once",
                        fix="Number them anew.",
                    ),
                )


@check("HA205", "no class 0 that stands for background", needs=("registered",), quick=True, severity="warning")
def background_class(context: DoctorContext) -> Iterable[Finding]:
    """Find a background class: Roboflow writes the dataset's name as category 0 (pains.md, 21)."""
    for name, labels in detected(context, context.train_names):
        if _empty_first(labels):
            yield Finding(
                "HA205",
                "warning",
                DatasetError(
                    place(name, labels),
                    found=f"class 0 is {labels.names[0]!r} (id {labels.ids[0]!r}), and no box has it: every other "
                    "class has one row later than it should, and one output learns nothing",
                    expected="only classes that are drawn; background is no class in detectron2",
                    fix=f"Remove the category {labels.names[0]!r} from train and test files; ids may start anywhere.",
                ),
            )


def _empty_first(labels: Labels) -> bool:
    """Tell whether class 0 has no annotation, name or place say that it is no class, and others have boxes."""
    if len(labels.ids) < 2 or (labels.category == 0).any() or not (labels.category > 0).any():
        return False
    supers = {category.get("supercategory") for category in labels.categories if category.get("id") != labels.ids[0]}
    background = str(labels.names[0]).strip("_ ").casefold() in ("background", "bg", "none")
    others = np.bincount(labels.category[labels.category >= 0], minlength=len(labels.ids))[1:]
    # The last is the weakest sign: where other classes are empty too, this one may just be rare.
    return background or labels.names[0] in supers or (labels.ids[0] == 0 and bool(others.all()))


@check("HA206", "every class has boxes to train on", needs=("registered",), quick=True, severity="warning")
def classes_without_data(context: DoctorContext) -> Iterable[Finding]:
    counts: Counter[str] = Counter()
    names: dict[str, None] = {}
    skip: set[str] = set()
    sources = []
    for name, labels in detected(context, context.train_names):
        if not labels.objects.any():
            continue  # HA208 says it.
        sources.append(name)
        here = np.bincount(labels.category[labels.objects], minlength=len(labels.names))
        for k, class_name in enumerate(map(str, labels.names)):
            names[class_name] = None
            counts[class_name] += int(here[k])
        if _empty_first(labels):
            skip.add(str(labels.names[0]))
    empty = [one for one in names if not counts[one] and one not in skip]
    if empty:
        yield Finding(
            "HA206",
            "warning",
            DatasetError(
                f"{DATASETS.TRAIN}, {', '.join(map(repr, sources))}",
                found=f"no box of {len(empty)} of {len(names)} classes: {listed(empty, 12)}",
                expected="boxes of every class that the model shall predict",
                fix="Add images of them, or remove the categories; without boxes their rows are only pushed down, "
                "carried rows too.",
            ),
        )


@check("HA207", "images say their file and size", needs=("registered",), quick=True)
def image_entries(context: DoctorContext) -> Iterable[Finding]:
    for name, labels in from_json(context):
        sizes = ~(labels.sizes > 0).all(axis=1) if len(labels.sizes) else np.zeros(0, bool)
        nameless = np.array([not file for file in labels.files], bool)
        for flags, what in ((sizes, "width and height, positive numbers"), (nameless, "file_name")):
            if flags.any():
                first = labels.images[int(np.flatnonzero(flags)[0])]
                yield Finding(
                    "HA207",
                    "error",
                    DatasetError(
                        f"{place(name, labels)}, images",
                        found=f"{int(flags.sum())} of {len(flags)} without, such as image {first!r}",
                        expected=what,
                        fix="Write them into the json: detectron2 reads them for every image.",
                    ),
                )


@check("HA208", "there is something to train on and to test on", needs=("registered",), quick=True)
def anything_there(context: DoctorContext) -> Iterable[Finding]:
    for name, labels in readable(context):
        if not labels.images:
            yield Finding(
                "HA208",
                "error",
                DatasetError(
                    place(name, labels), found="no image", expected="images", fix="Correct the path or the file."
                ),
            )
    cfg = context.cfg
    if image_tasks(cfg) or not cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS:
        return
    # Each set by itself: one that gives nothing is as good as left out, and all of them stop detectron2.
    for name, labels in detected(context, context.train_names):
        if len(labels.category) and (labels.category < 0).all() and (labels.from_json or labels.ids):
            continue  # HA202 has said what is wrong with every annotation.
        if labels.images and not labels.objects.any():
            crowd = "only crowds (iscrowd 1)" if labels.crowd.any() else "no annotation of a listed image and class"
            others = len(context.train_names) > 1
            yield Finding(
                "HA208",
                "warning" if others else "error",
                DatasetError(
                    place(name, labels),
                    found=f"{crowd} in {len(labels.images)} images: training leaves all of them out",
                    expected="boxes of single objects",
                    fix="Set iscrowd to 0 where an object is drawn, or label the images.",
                ),
            )


@check("HA209", "most images have boxes", needs=("registered",), quick=True, severity="note")
def images_without_boxes(context: DoctorContext) -> Iterable[Finding]:
    filtered = context.cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS and not image_tasks(context.cfg)
    for name, labels in detected(context, context.train_names):
        if not labels.objects.any():
            continue
        empty = len(labels.images) - len(np.unique(labels.image[labels.objects]))
        if empty > 0.01 * len(labels.images):
            what = "training leaves them out" if filtered else "they are trained on as background"
            yield Finding(
                "HA209",
                "note",
                DatasetError(
                    place(name, labels),
                    found=f"{empty} of {len(labels.images)} images have no box of a single object: {what}",
                    expected="boxes in nearly every image, unless these are empty on purpose",
                    fix=f"To keep them, set {DATALOADER.FILTER_EMPTY_ANNOTATIONS.set(False)}."
                    if filtered
                    else "If objects are drawn nowhere in them by mistake, label them.",
                ),
            )


@check("HA210", "no annotation has the id 0 in a test set", needs=("registered",), quick=True, severity="warning")
def annotation_id_zero(context: DoctorContext) -> Iterable[Finding]:
    """Find annotation id 0: COCO's evaluation takes a match with it for no match at all."""
    for name, labels in from_json(context, context.test_names):
        if 0 in labels.annotations:
            yield Finding(
                "HA210",
                "warning",
                DatasetError(
                    place(name, labels),
                    found=f"the id 0 for {labels.annotation(labels.annotations.index(0))}",
                    expected="annotation ids from 1 on: COCO's evaluation counts a match with annotation 0 as a miss",
                    fix="Add 1 to every annotation id.",
                ),
            )
