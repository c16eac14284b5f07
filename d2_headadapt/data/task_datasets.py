"""Bring the datasets of a config together with its tasks: classes, levels, and what training sees."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog, get_detection_dataset_dicts

from ..adapt.classes import did_you_mean
from ..errors import ConfigError, DatasetError
from ..key import DATASETS, TASKS
from .datasets import set_task_labels, task_facts
from .task_spec import TaskSpec, task_specs

logger = logging.getLogger(__name__)


def settle_tasks(cfg: CfgNode, *, also: Sequence[str] = (), required: bool = False) -> None:
    """Make the labels of registered datasets indices of the classes that the model predicts.

    Datasets of ``DATASETS.REGISTER`` keep names in their files; from here on, loading one gives indices of the class
    tables of ``MODEL.TASKS``, which are also in its metadata.

    Args:
        cfg: its datasets are registered.
        also: datasets beside those of ``DATASETS.TRAIN`` and ``DATASETS.TEST``.
        required: see :func:`d2_headadapt.data.task_spec.task_specs`.

    Raises:
        ConfigError, ClassTableError: a task that cannot be used.
        DatasetError: a task on boxes whose labels are on images, or the reverse, or a task without any label.
    """
    names = [name for name in dict.fromkeys((*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST, *also)) if task_facts(name)]
    for name in names:
        set_task_labels(name, {})
    for task, node in cfg.MODEL.get("TASKS", {}).items():
        if isinstance(node, Mapping) and node.get("classes") is None:
            _refuse_unlabelled(task, [name for name in cfg.DATASETS.TRAIN if task in task_facts(name)])
    # Weights that balance classes would load the data, whose labels are not settled yet.
    bare = cfg.clone()
    bare.defrost()
    for node in bare.MODEL.get("TASKS", {}).values():
        if isinstance(node, CfgNode) and node.get("class_weights") == "balanced":
            node.class_weights = None
    specs = {spec.name: spec for spec in task_specs(bare, required=required)}
    for name in names:
        facts = task_facts(name)
        for task in facts:
            if task in specs and specs[task].on != facts[task].level:
                raise ConfigError(
                    TASKS[task].on,
                    expected=f"{facts[task].level}, because dataset {name!r} has {facts[task].source}",
                    found=repr(specs[task].on),
                    fix=f"Set it to {facts[task].level}, or label the other level.",
                )
        set_task_labels(name, {task: (spec.table.names, spec.kind) for task, spec in specs.items()})


def say_about_tasks(cfg: CfgNode) -> None:
    """Log labels of tasks that the model has not, and tasks with nothing to learn because they have one class."""
    for name in dict.fromkeys((*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST)):
        unused = [task for task in task_facts(name) if task not in cfg.MODEL.get("TASKS", {})]
        if unused:
            logger.info("Dataset %r has labels of tasks that %s has not: %s.", name, TASKS, ", ".join(unused))
    for task, label in tasks_of_one_class(cfg).items():
        logger.warning(
            "Task %r has one class, %r, so there is nothing to learn: empty labels count as missing. Name its classes "
            "in %s, or remove the task.",
            task,
            label,
            TASKS[task].classes,
        )


def tasks_of_one_class(cfg: CfgNode) -> dict[str, str]:
    """Return tasks whose classes the training data tells and of which it shows one alone: task -> its label.

    A task of several labels for each image or box is none of them: whether its one label is there can be learned.
    """
    found: dict[str, str] = {}
    for task, node in cfg.MODEL.get("TASKS", {}).items():
        facts = [task_facts(name)[task] for name in cfg.DATASETS.TRAIN if task in task_facts(name)]
        names = {one for fact in facts for one in fact.classes}
        declared = isinstance(node, Mapping) and (node.get("classes") is not None or node.get("kind") == "multi")
        if len(names) == 1 and not declared and not any(fact.multi for fact in facts):
            found[task] = names.pop()
    return found


def _refuse_unlabelled(task: str, names: Sequence[str]) -> None:
    if names and not any(task_facts(name)[task].labels for name in names):
        raise _without_labels(task, names)


def _without_labels(task: str, names: Sequence[str]) -> DatasetError:
    sources = [f"{task_facts(name)[task].source} in dataset {name!r}" for name in names if task in task_facts(name)]
    known = {other for name in names for other in MetadataCatalog.get(name).get("task_levels", {})} - {task}
    return DatasetError(
        TASKS[task],
        expected="a label somewhere in the training data",
        found=f"none in {' or '.join(sources)}" if sources else f"no such task in {', '.join(map(repr, names))}",
        fix=f"Label it, or remove the task.{did_you_mean(task, known)}",
    )


def training_dicts(cfg: CfgNode, specs: Sequence[TaskSpec] | None = None) -> list[dict[str, Any]]:
    """Load the dataset dicts of ``DATASETS.TRAIN``, after checking that every task has a label somewhere.

    Where the config has tasks on images, an image without objects is kept for its image labels.

    Args:
        cfg: its datasets are registered.
        specs: the config's tasks, where they are known.

    Raises:
        DatasetError: a task without any label, or see :func:`settle_tasks`.
    """
    settle_tasks(cfg, required=True)
    specs = task_specs(cfg, required=True) if specs is None else specs
    on_images = [spec.name for spec in specs if spec.on == "image"]
    filters = cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS
    keypoints = cfg.MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE if cfg.MODEL.KEYPOINT_ON else 0
    proposals = cfg.DATASETS.PROPOSAL_FILES_TRAIN if cfg.MODEL.LOAD_PROPOSALS else None
    dicts: list[dict[str, Any]] = []
    # One by one, because detectron2 takes all datasets to have annotations where the first has.
    for i, name in enumerate(cfg.DATASETS.TRAIN):
        dicts += get_detection_dataset_dicts(
            [name],
            filter_empty=filters and not on_images,
            min_keypoints=keypoints,
            proposal_files=[proposals[i]] if proposals else None,
        )
    if filters and on_images:
        kept = [one for one in dicts if _has_objects(one) or any(_is_known(one, task) for task in on_images)]
        logger.info("%d of %d images are left: the others have neither objects nor labels.", len(kept), len(dicts))
        dicts = kept
    for spec in specs:
        holders = dicts if spec.on == "image" else (ann for one in dicts for ann in one.get("annotations", ()))
        if not any(_is_known(holder, spec.name) for holder in holders):
            raise _without_labels(spec.name, cfg.DATASETS.TRAIN)
    return dicts


def every_training_dict(cfg: CfgNode) -> list[dict[str, Any]]:
    """Load the dataset dicts of ``DATASETS.TRAIN`` of ``cfg``, images without objects included; ids are contiguous.

    Raises:
        DatasetError: a dataset that shows no image, or whose labels do not fit its classes.
    """
    # Only from here on the labels of tasks are indices.
    settle_tasks(cfg, required=True)
    try:
        dicts: list[dict[str, Any]] = get_detection_dataset_dicts(cfg.DATASETS.TRAIN, filter_empty=False)
    except AssertionError as exc:
        raise DatasetError(
            DATASETS.TRAIN, expected="datasets with images", found=str(exc), fix="Correct the dataset."
        ) from exc
    return dicts


def _has_objects(one: Mapping[str, Any]) -> bool:
    return any(not annotation.get("iscrowd", 0) for annotation in one.get("annotations", ()))


def _is_known(holder: Mapping[str, Any], task: str) -> bool:
    label = holder.get("tasks", {}).get(task)
    return label is not None
