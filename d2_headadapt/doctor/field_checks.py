"""Checks HA211 to HA220: class names against the metadata, and the fields that enabled heads ask of annotations."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from typing import Any

import numpy as np
from detectron2.data import MetadataCatalog
from detectron2.data.datasets.builtin import _PREDEFINED_SPLITS_COCO

from ..adapt.classes import did_you_mean
from ..data.datasets import task_facts
from ..data.task_datasets import tasks_of_one_class
from ..errors import ConfigError, DatasetError
from ..key import DATALOADER, DATASETS, INPUT, MODEL, TASKS, TEST
from .coco_json import MASK_BROKEN, MASK_NONE, MASK_POLYGON, MASK_RLE, Labels
from .finding import DoctorContext, Finding, check
from .reading import coco_path, detected, from_json, has_roi_heads, image_tasks, listed, place, some

OKS_SIGMAS_OF_COCO = 17
"""How many keypoints pycocotools' own sigmas are for."""


@check("HA211", "class names are distinct strings", needs=("registered",), quick=True)
def class_names(context: DoctorContext) -> Iterable[Finding]:
    for name, labels in from_json(context):
        seen: dict[str, int] = {}
        for k, one in enumerate(labels.names):
            key = str(one).strip() if isinstance(one, (str, int)) and not isinstance(one, bool) else ""
            if not key or key in seen:
                found = f"category {labels.ids[k]!r} is {one!r}"
                if key:
                    found += f" and category {labels.ids[seen[key]]!r} is {labels.names[seen[key]]!r}"
                yield Finding(
                    "HA211",
                    "error",
                    DatasetError(
                        f"{place(name, labels)}, categories",
                        found=found,
                        expected="different names",
                        fix="Rename one of the two, or give both one id."
                        if key
                        else "Give the category a name, in quotes.",
                    ),
                )
            seen.setdefault(key, k)


@check("HA212", "the metadata of every dataset says what its json says", needs=("registered",), quick=True)
def metadata_conflicts(context: DoctorContext) -> Iterable[Finding]:
    """Find class names that contradict the metadata, which detectron2 asserts on loading (pains.md, 9)."""
    for name, labels in from_json(context):
        metadata = MetadataCatalog.get(name)
        new_ids = {category: k for k, category in enumerate(labels.ids)}
        for key, in_json in (("thing_classes", labels.names), ("thing_dataset_id_to_contiguous_id", new_ids)):
            before = metadata.get(key)
            if before is None or before == in_json:
                continue
            if name in _builtin_coco():
                fix = (
                    f"Register your json under a name of your own in {DATASETS.REGISTER}, and use that name in "
                    f"{DATASETS.TRAIN} and {DATASETS.TEST}."
                )
                expected = f"COCO's own json under detectron2's own name {name!r}"
            elif isinstance(before, tuple) and list(before) == in_json:
                fix, expected = "Set it to a list.", "a list: detectron2 compares it with one"
            else:
                fix = f"Remove the line that sets MetadataCatalog.get({name!r}).{key}, or correct the json."
                expected = "the same, in the order of the category ids"
            yield Finding(
                "HA212",
                "error",
                DatasetError(
                    f"MetadataCatalog, {name!r}, {key}",
                    found=f"{_brief(before)}, but {labels.source} has {_brief(in_json)}; loading it stops at "
                    f"\"Attribute '{key}' "
                    'in the metadata cannot be set to a different value"',
                    expected=expected,
                    fix=fix,
                ),
            )
            break  # The second follows from the first.


def _builtin_coco() -> set[str]:
    return {name for splits in _PREDEFINED_SPLITS_COCO.values() for name in splits}


def _brief(value: Any) -> str:
    if isinstance(value, dict):
        return f"{{{', '.join(f'{k!r}: {v!r}' for k, v in list(value.items())[:4])}}} ({len(value)} ids)"
    return f"{listed(value, 4)} ({len(value)} classes)"


@check("HA213", "every object has a mask where the model predicts masks", needs=("registered",), quick=True)
def masks_are_there(context: DoctorContext) -> Iterable[Finding]:
    if not (has_roi_heads(context.cfg) and context.cfg.MODEL.MASK_ON):
        return
    for name, labels in detected(context, context.train_names):
        lacking = labels.objects & (labels.mask == MASK_NONE)
        if lacking.any():
            every = bool((lacking == labels.objects).all())
            yield Finding(
                "HA213",
                "error",
                DatasetError(
                    place(name, labels),
                    found=f"no segmentation in {'any annotation' if every else some(lacking, labels)}: training "
                    "stops at \"Cannot find field 'gt_masks'\" or a KeyError",
                    expected=f"a segmentation in every annotation, because {MODEL.MASK_ON.is_on()}",
                    fix=f"Set {MODEL.MASK_ON.set(False)}."
                    if every
                    else f"Set {MODEL.MASK_ON.set(False)}, or draw these masks.",
                ),
            )


@check("HA214", "polygons have three points at least", needs=("registered",), quick=True, severity="warning")
def polygons_have_points(context: DoctorContext) -> Iterable[Finding]:
    for name, labels in detected(context, context.train_names):
        broken = labels.objects & (labels.mask == MASK_BROKEN)
        if labels.from_json and broken.any():
            # detectron2 leaves the annotation out even where nobody asks for masks.
            yield Finding(
                "HA214",
                "error" if broken.sum() == labels.objects.sum() else "warning",
                DatasetError(
                    place(name, labels),
                    found=f"a segmentation without a polygon of three points in {some(broken, labels)}: detectron2 "
                    "leaves these objects out, boxes too",
                    expected="polygons [x1, y1, x2, y2, x3, y3, ...], or no segmentation",
                    fix="Draw these masks, or remove the key segmentation from the annotations.",
                ),
            )


@check("HA215", f"masks have the format that {INPUT.MASK_FORMAT} names", needs=("registered",), quick=True)
def mask_format(context: DoctorContext) -> Iterable[Finding]:
    cfg = context.cfg
    if not (has_roi_heads(cfg) and cfg.MODEL.MASK_ON) or cfg.INPUT.MASK_FORMAT != "polygon":
        return
    for name, labels in detected(context, context.train_names):
        coded = labels.objects & (labels.mask == MASK_RLE)
        if coded.any():
            mixed = bool((labels.objects & (labels.mask == MASK_POLYGON)).any())
            yield Finding(
                "HA215",
                "error",
                DatasetError(
                    place(name, labels),
                    found=f"run-length masks in {some(coded, labels)}{', polygons in others' if mixed else ''}",
                    expected=f"polygons, because {INPUT.MASK_FORMAT} is polygon",
                    fix=f"Set {INPUT.MASK_FORMAT.set('bitmask')}.",
                ),
            )


@check("HA216", "every object has the keypoints that are declared", needs=("registered",), quick=True)
def keypoint_counts(context: DoctorContext) -> Iterable[Finding]:
    cfg = context.cfg
    if not (has_roi_heads(cfg) and cfg.MODEL.KEYPOINT_ON):
        return
    for name, labels in detected(context):
        training = name in context.train_names
        names = _keypoint_names(context, name, labels)
        objects = labels.objects
        if training and cfg.MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE > 0:
            shown = np.bincount(labels.image[objects], labels.visible[objects] > 0, len(labels.images))
            objects = objects & (shown[labels.image] > 0)  # detectron2 leaves the other images out.
        lacking = objects & (labels.keypoints == 0)
        if training and (lacking.any() or not objects.any()):
            every = not (labels.visible > 0).any()
            yield Finding(
                "HA216",
                "error",
                DatasetError(
                    place(name, labels),
                    found=f"no keypoints in {'any annotation' if every else some(lacking, labels)}: training stops "
                    'at "Cannot '
                    "find field 'gt_keypoints'\"",
                    expected=f"keypoints in every annotation, because {MODEL.KEYPOINT_ON.is_on()}",
                    fix=f"Set {MODEL.KEYPOINT_ON.set(False)}."
                    if every
                    else "Give these objects keypoints, 0, 0, 0 for each unseen.",
                ),
            )
        wrong = objects & (labels.keypoints != 0) & (labels.keypoints != 3 * len(names))
        if wrong.any():
            first = int(labels.keypoints[np.flatnonzero(wrong)[0]])
            yield Finding(
                "HA216",
                "error",
                DatasetError(
                    place(name, labels),
                    found=f"{first} numbers, which are {first / 3:g} keypoints, in {some(wrong, labels)}",
                    expected=f"{3 * len(names)} numbers, x, y and visibility of {len(names)} keypoints "
                    f"({listed(names)})",
                    fix="Correct 'keypoints' of the category, or these annotations.",
                ),
            )


def _keypoint_names(context: DoctorContext, name: str, labels: Labels) -> list[str]:
    found = MetadataCatalog.get(name).get("keypoint_names")
    declared = [category["keypoints"] for category in labels.categories if category.get("keypoints")]
    return list(found or (declared[0] if declared else ()))


@check("HA217", "keypoints have a flip map and sigmas", needs=("registered",), quick=True)
def keypoint_metadata(context: DoctorContext) -> Iterable[Finding]:
    """Find missing keypoint sigmas, which are asked for when the training is over (pains.md, 22)."""
    cfg = context.cfg
    if not (has_roi_heads(cfg) and cfg.MODEL.KEYPOINT_ON):
        return
    for name in context.train_names:
        metadata = MetadataCatalog.get(name)
        lacks = [key for key in ("keypoint_names", "keypoint_flip_map") if metadata.get(key) is None]
        # Without flips too detectron2 reads the map, and HA125 says so.
        if cfg.INPUT.RANDOM_FLIP != "none" and lacks:
            yield Finding(
                "HA217",
                "error",
                DatasetError(
                    f"MetadataCatalog, {name!r}",
                    found=f"no {' and no '.join(lacks)}",
                    expected="both, because training flips images: left and right change places",
                    fix=f"Add keypoint_names and keypoint_flip_map to its entry in {DATASETS.REGISTER}.",
                ),
            )
    sigmas = len(cfg.TEST.KEYPOINT_OKS_SIGMAS)
    for name, labels in detected(context, context.test_names):
        count = len(_keypoint_names(context, name, labels))
        if count and count != (sigmas or OKS_SIGMAS_OF_COCO) and coco_path(context, name) is not None:
            yield Finding(
                "HA217",
                "error",
                DatasetError(
                    TEST.KEYPOINT_OKS_SIGMAS,
                    found=f"{sigmas} numbers" if sigmas else f"nothing, which stands for COCO's {OKS_SIGMAS_OF_COCO}",
                    expected=f"{count} numbers, one for each keypoint of {name!r}; evaluation stops without them",
                    fix=f"Write {TEST.KEYPOINT_OKS_SIGMAS.write([0.05] * count)}.",
                ),
            )


@check("HA218", "every task has labels that it knows", needs=("settings",), quick=True)
def task_labels(context: DoctorContext) -> Iterable[Finding]:
    """Find task labels that only loading would refuse; HA104 names a task without any label."""
    for task, label in tasks_of_one_class(context.part("registered")).items():
        yield Finding(
            "HA218",
            "warning",
            ConfigError(
                TASKS[task],
                found=f"one class, {label!r}: there is nothing to learn, and empty labels count as missing",
                expected="two classes at least",
                fix=f"Name the classes in {TASKS[task].classes}, or remove the task.",
            ),
        )
    for task, node in context.cfg.MODEL.get("TASKS", {}).items():
        for key, names in ((DATASETS.TRAIN, context.train_names), (DATASETS.TEST, context.test_names)):
            # Datasets that the user's own function loads tell it only by being loaded.
            ours = [name for name in names if task_facts(name)]
            labelled = [name for name in ours if task in task_facts(name) and task_facts(name)[task].labels]
            if ours and len(ours) == len(names) and not labelled:
                known = {other for name in ours for other in task_facts(name)} - {task}
                training = key == DATASETS.TRAIN
                if not training or node.get("classes") is not None:
                    yield Finding(
                        "HA218",
                        "error" if training else "warning",
                        DatasetError(
                            TASKS[task],
                            found=f"no label of it in {key}, {listed(ours)}",
                            expected="a label of it in one image or box at least",
                            fix=f"Add the task to tasks of these entries in {DATASETS.REGISTER}, and its labels to "
                            "the file." + did_you_mean(task, known),
                        ),
                    )
            for name in labelled:
                fact, table = task_facts(name)[task], context.tables[task]
                strange = [one for one in fact.classes if table.find(one) is None]
                if strange and coco_path(context, name) is not None:  # A csv is loaded, see HA201.
                    yield Finding(
                        "HA218",
                        "error",
                        DatasetError(
                            f"{fact.source}, dataset {name!r}",
                            found=f"labels {listed(strange)}",
                            expected=f"the {len(table)} classes of task {task!r}: {listed(table.names)}",
                            fix=f"Correct the labels, or add them to {TASKS[task].classes}."
                            + did_you_mean(strange[0], table.names),
                        ),
                    )


@check("HA219", "no annotation has 'ignore' set", needs=("registered",), quick=True)
def ignored_annotations(context: DoctorContext) -> Iterable[Finding]:
    for name, labels in from_json(context):
        ignored = labels.ignore & (labels.image >= 0)
        if ignored.any():
            yield Finding(
                "HA219",
                "error",
                DatasetError(
                    place(name, labels),
                    found=f"'ignore' in {some(ignored, labels)}: detectron2's loader stops at it",
                    expected="iscrowd 1, which detectron2 has in its place",
                    fix="Replace 'ignore': 1 by 'iscrowd': 1.",
                ),
            )


@check("HA220", "a crop has what it needs", needs=("registered",), quick=True)
def crops(context: DoctorContext) -> Iterable[Finding]:
    """Find crops that fail: with masks, detectron2 computes boxes anew, and cuts polygons with shapely."""
    cfg = context.cfg
    if not (cfg.INPUT.CROP.ENABLED and has_roi_heads(cfg) and cfg.MODEL.MASK_ON):
        return
    without_shapely = importlib.util.find_spec("shapely") is None
    filtered = cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS and not image_tasks(cfg)
    for name, labels in detected(context, context.train_names):
        if without_shapely and (labels.objects & (labels.mask == MASK_POLYGON)).any():
            yield Finding(
                "HA220",
                "error",
                ConfigError(
                    INPUT.CROP.ENABLED,
                    found=f"True, with polygons in {place(name, labels)} and no shapely in this Python: training stops "
                    "at \"No module named 'shapely'\"",
                    expected="shapely, with which detectron2 cuts polygons",
                    fix=f"Type: pip install shapely, or set {INPUT.CROP.ENABLED.set(False)}.",
                ),
            )
        empty = len(labels.images) - len(np.unique(labels.image[labels.objects]))
        if empty and not filtered:
            yield Finding(
                "HA220",
                "error",
                ConfigError(
                    INPUT.CROP.ENABLED,
                    found=f"True, with masks, and {empty} of {len(labels.images)} images of {place(name, labels)} "
                    "without objects: training stops at \"Cannot find field 'gt_masks'\"",
                    expected="an object in every image, or no crop",
                    fix=f"Set {INPUT.CROP.ENABLED.set(False)}, or leave these images out."
                    if image_tasks(cfg)
                    else f"Set {INPUT.CROP.ENABLED.set(False)} or {DATALOADER.FILTER_EMPTY_ANNOTATIONS.set(True)}.",
                ),
            )
