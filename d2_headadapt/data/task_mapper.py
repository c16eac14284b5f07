"""detectron2's mapper and loaders, with the labels of tasks carried to the model.

Where ``cfg.MODEL.TASKS`` is not empty, ``Trainer.build_train_loader(cfg)`` returns :func:`build_task_train_loader`, and
``build_test_loader(cfg, name)`` returns :func:`build_task_test_loader`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.data import DatasetMapper, build_detection_test_loader, build_detection_train_loader
from detectron2.data import transforms as T

from ..errors import DatasetError
from ..key import TASKS
from .task_datasets import settle_tasks, training_dicts
from .task_labels import MISSING
from .task_spec import TaskSpec, task_specs


class TaskMapper(DatasetMapper):
    """``DatasetMapper`` that also gives ``d["tasks"]``, and in training ``gt_<task>`` of ``d["instances"]``.

    ``d["tasks"]`` has an entry for every task on images: int64 of shape (), or for several labels float32 (K,) of 0
    and 1. ``gt_<task>``, for every task on boxes, is int64 (N,) or float32 (N, K), row by row with ``gt_boxes`` of the
    N objects that augmentation left. ``MISSING`` (-1) stands where nobody labelled.

    From a config, images get the size ``MODEL.CLASSIFIER.INPUT_SIZE`` where a ``MultiTaskClassifier`` flattens.

    Args:
        is_train: see ``DatasetMapper``, as for all others.
        tasks: the tasks of the model.

    Raises:
        DatasetError: on a call, for a label that is no index of its task's classes.
    """

    @configurable
    def __init__(self, is_train: bool, *, tasks: Sequence[TaskSpec], **kwargs: Any) -> None:
        super().__init__(is_train, **kwargs)
        self.tasks = tuple(tasks)

    @classmethod
    def from_config(cls, cfg: CfgNode, is_train: bool = True) -> dict[str, Any]:
        """Read the parent's arguments and the tasks; a classifier of flattened maps gets images of its one size."""
        found: dict[str, Any] = super().from_config(cfg, is_train)
        if cfg.MODEL.META_ARCHITECTURE == "MultiTaskClassifier" and cfg.MODEL.CLASSIFIER.POOLING == "flatten":
            # Flattened features have one width, so images have one size, which detectron2 has no key for.
            found["augmentations"].append(T.Resize(tuple(cfg.MODEL.CLASSIFIER.INPUT_SIZE)))
        return {**found, "tasks": task_specs(cfg, required=is_train)}

    def __call__(self, dataset_dict: dict[str, Any]) -> dict[str, Any]:
        mapped: dict[str, Any] = super().__call__(dataset_dict)
        place = f"image {dataset_dict['file_name']}"
        labels = dataset_dict.get("tasks", {})
        on_images = [spec for spec in self.tasks if spec.on == "image"]
        mapped["tasks"] = {spec.name: label_tensor(labels.get(spec.name), spec, place) for spec in on_images}
        return mapped

    def _transform_annotations(
        self, dataset_dict: dict[str, Any], transforms: Any, image_shape: tuple[int, int]
    ) -> None:
        annotations = dataset_dict["annotations"]
        # In place of their classes, objects carry their positions through filters and augmentation.
        classes = [annotation["category_id"] for annotation in annotations]
        for position, annotation in enumerate(annotations):
            annotation["category_id"] = position
        super()._transform_annotations(dataset_dict, transforms, image_shape)
        instances = dataset_dict["instances"]
        left = instances.gt_classes.tolist()
        instances.gt_classes = torch.tensor([classes[i] for i in left], dtype=torch.int64)
        place = f"an object of image {dataset_dict['file_name']}"
        for spec in self.tasks:
            if spec.on == "box":
                labels = [annotations[i].get("tasks", {}).get(spec.name) for i in left]
                instances.set(f"gt_{spec.name}", label_tensors(labels, spec, place))


def label_tensor(label: Any, spec: TaskSpec, place: str) -> torch.Tensor:
    """Convert one label of a dataset dict to int64 (), or several to float32 (K,); ``None`` is all ``MISSING``.

    Args:
        label: an index, a list of indices where the task takes several, or ``None``.
        spec: its task.
        place: where it stands, for the message.

    Raises:
        DatasetError: a label of another form, or outside the K classes.
    """
    size = len(spec.table)
    if label is None:
        return torch.full((size,), float(MISSING)) if spec.multi else torch.tensor(MISSING)
    indices = label if isinstance(label, (list, tuple)) else [label]
    good = spec.multi or not isinstance(label, (list, tuple))
    if not good or not all(isinstance(i, int) and 0 <= i < size for i in indices):
        raise DatasetError(
            place,
            expected=f"{'a list of indices' if spec.multi else 'an index'} below {size}, the number of classes of task "
            f"{spec.name!r}",
            found=repr(label),
            fix=f"Correct the labels under the key tasks, or classes and kind under {TASKS}.",
        )
    if not spec.multi:
        return torch.tensor(int(label))
    return torch.zeros(size).index_fill(0, torch.tensor(indices, dtype=torch.int64), 1.0)


def label_tensors(labels: Iterable[Any], spec: TaskSpec, place: str) -> torch.Tensor:
    """Stack labels of N things, int64 (N,) or float32 (N, K); see :func:`label_tensor`."""
    rows = [label_tensor(label, spec, place) for label in labels]
    if rows:
        return torch.stack(rows)
    return torch.zeros((0, len(spec.table))) if spec.multi else torch.zeros(0, dtype=torch.int64)


def build_task_train_loader(cfg: CfgNode, **kwargs: Any) -> Iterable[list[Mapping[str, Any]]]:
    """Build detectron2's training loader over :func:`.task_datasets.training_dicts` with a :class:`TaskMapper`.

    Args:
        cfg: its datasets are registered.
        kwargs: others of ``build_detection_train_loader``, such as ``mapper`` or ``sampler``.

    Raises:
        DatasetError: a task without any label in the training data, or one outside its classes.
    """
    dataset = training_dicts(cfg)
    mapper = kwargs.pop("mapper", None) or TaskMapper(cfg, True)
    loader: Iterable[list[Mapping[str, Any]]] = build_detection_train_loader(
        cfg, dataset=dataset, mapper=mapper, **kwargs
    )
    return loader


def build_task_test_loader(cfg: CfgNode, name: str, **kwargs: Any) -> Iterable[list[Mapping[str, Any]]]:
    """Build detectron2's test loader of one dataset with a :class:`TaskMapper`; labels are those of the config's tasks.

    Args:
        cfg: its datasets are registered.
        name: a registered dataset.
        kwargs: others of ``build_detection_test_loader``, such as ``mapper`` or ``batch_size``.
    """
    settle_tasks(cfg, also=[name])
    mapper = kwargs.pop("mapper", None) or TaskMapper(cfg, False)
    loader: Iterable[list[Mapping[str, Any]]] = build_detection_test_loader(cfg, name, mapper=mapper, **kwargs)
    return loader


Mapper = Callable[[dict[str, Any]], dict[str, Any]]
"""Turns a dataset's entry into ``{"image": (C, H, W), "instances": Instances}``, at test resolution, without chance.

With tasks on images it also gives ``tasks``: labels by task, as a task head takes those of
one image. Those on boxes are fields ``gt_<task>`` of the instances.
"""


def mapper_at_test_size(cfg: CfgNode) -> Mapper:
    """Make a mapper to images as the model will see them when it predicts, with labels, without augmentation.

    Args:
        cfg: whose ``INPUT`` keys count, those for tests.
    """
    size = cfg.INPUT.MIN_SIZE_TEST
    kind: Callable[..., Mapper] = DatasetMapper
    augmentations = [T.ResizeShortestEdge(size, cfg.INPUT.MAX_SIZE_TEST)] if size else []
    if cfg.MODEL.get("TASKS"):
        in_tests = TaskMapper.from_config(cfg, False)
        # A classifier that flattens has images of one size.
        kind, augmentations = partial(TaskMapper, tasks=in_tests["tasks"]), in_tests["augmentations"]
    mapper = kind(
        is_train=True,
        augmentations=augmentations,
        image_format=cfg.INPUT.FORMAT,
        use_instance_mask=cfg.MODEL.MASK_ON,
        instance_mask_format=cfg.INPUT.MASK_FORMAT,
    )
    return mapper
