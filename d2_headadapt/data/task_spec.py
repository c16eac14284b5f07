"""Classification tasks: the entries of ``MODEL.TASKS``, checked."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog

from ..adapt.classes import SPACES, ClassTable, did_you_mean
from ..errors import ConfigError, DatasetError
from ..key import DATASETS, TASKS, pairs
from .datasets import resolve_table

LEVELS = ("image", "box")
KINDS = ("single", "multi")
TASK_DEFAULTS: Mapping[str, Any] = {
    "on": None,
    "classes": None,
    "source_classes": None,
    "kind": "single",
    "loss_weight": 1.0,
    "class_weights": None,
    "focal_gamma": 0.0,
    "hidden": 0,
}
"""The keys of a task, and what holds where one is left out."""


@dataclass(frozen=True)
class TaskSpec:
    """One classification task.

    Args:
        name: of the task, and of its label space.
        on: ``"image"`` or ``"box"``.
        table: its K classes.
        kind: ``"single"`` (one class of K, softmax) or ``"multi"`` (any number of them, sigmoids).
        loss_weight: factor on its loss.
        class_weights: K factors on the losses of its classes, else ``None``.
        focal_gamma: exponent of the focal loss (Lin et al. 2017); 0 is cross entropy.
        hidden: width of a hidden layer before the last one; 0 for none.
    """

    name: str
    on: str
    table: ClassTable
    kind: str = "single"
    loss_weight: float = 1.0
    class_weights: tuple[float, ...] | None = None
    focal_gamma: float = 0.0
    hidden: int = 0

    @property
    def multi(self) -> bool:
        """Whether the task is multi-label: a thing may have several of the classes."""
        return self.kind == "multi"


def task_specs(cfg: CfgNode, *, on: str | None = None, required: bool = False) -> tuple[TaskSpec, ...]:
    """Read the tasks of a config, in its order.

    Args:
        cfg: with ``MODEL.TASKS``; without the key there is none.
        on: only tasks of this level.
        required: raise for a task whose classes nobody tells, instead of leaving it out.

    Raises:
        ConfigError: a task, or a key of one, that cannot be used.
        ClassTableError, DatasetError: its classes cannot be found.

    Example:
        >>> from detectron2.config import CfgNode, get_cfg
        >>> from d2_headadapt import add_headadapt_config
        >>> from d2_headadapt.data import task_specs
        >>> cfg = get_cfg()
        >>> add_headadapt_config(cfg)
        >>> cfg.MODEL.TASKS.colour = CfgNode({"on": "box", "classes": ["red", "blue"], "loss_weight": 0.5})
        >>> [(spec.name, spec.table.names, spec.kind) for spec in task_specs(cfg)]
        [('colour', ('red', 'blue'), 'single')]
    """
    found: list[TaskSpec] = []
    for name, node in cfg.MODEL.get("TASKS", {}).items():
        values = checked_task(name, node)
        if on is not None and values["on"] != on:
            continue
        table = _classes(cfg, name, values, required)
        if table is not None:
            found.append(_spec(cfg, name, values, table))
    return tuple(found)


def source_tables(cfg: CfgNode) -> dict[str, ClassTable | None]:
    """Read the classes that a file had for a task, where a user names them; ``None`` to take nothing."""
    found: dict[str, ClassTable | None] = {}
    for name, node in cfg.MODEL.get("TASKS", {}).items():
        value = checked_task(name, node)["source_classes"]
        if isinstance(value, str) and value.lower() == "none":
            found[name] = None
        elif value is not None:
            table = resolve_table(value, key=TASKS[name].source_classes, space=name)
            if table is not None:
                found[name] = table
    return found


def complete_tasks(cfg: CfgNode) -> None:
    """Write every key that a task leaves out, so that a command line can set it, and a wrong key is an error there."""
    for name, node in cfg.MODEL.TASKS.items():
        if isinstance(node, Mapping):
            cfg.MODEL.TASKS[name] = CfgNode({**TASK_DEFAULTS, **node})


def checked_task(name: Any, node: Any) -> dict[str, Any]:
    """Check and complete one entry of ``MODEL.TASKS``.

    Raises:
        ConfigError: where the entry, a key or a value cannot be used.
    """
    place = TASKS[str(name)]
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z]\w*", name) or name in SPACES:
        raise ConfigError(
            place,
            expected=f"a task name of letters, digits and _ that is none of {', '.join(SPACES)}",
            found=repr(name),
            fix="Rename the task.",
        )
    if not isinstance(node, Mapping):
        raise ConfigError(
            place,
            expected=f"a mapping with the keys {', '.join(TASK_DEFAULTS)}",
            found=repr(node),
            fix=f"Write {pairs({'on': 'box', 'classes': ['first', 'second']}, str(name))}.",
        )
    # A bare `on` is a truth value in YAML 1.1.
    values = {**TASK_DEFAULTS, **{"on" if key is True else key: value for key, value in node.items()}}
    for key in values:
        if key not in TASK_DEFAULTS:
            raise ConfigError(
                place[str(key)],
                expected=f"one of {', '.join(TASK_DEFAULTS)}",
                found=repr(key),
                fix=f"Remove or rename it.{did_you_mean(str(key), TASK_DEFAULTS)}",
            )

    def number(key: str, low: float) -> bool:
        value = values[key]
        return isinstance(value, (int, float)) and not isinstance(value, bool) and value >= low

    checks = (
        ("on", values["on"] in LEVELS, "image or box"),
        ("kind", values["kind"] in KINDS, "single or multi"),
        ("loss_weight", number("loss_weight", 0), "a number from 0 on"),
        ("focal_gamma", number("focal_gamma", 0), "a number from 0 on"),
        ("hidden", number("hidden", 0) and isinstance(values["hidden"], int), "a width, 0 for none"),
    )
    for key, good, expected in checks:
        if not good:
            raise ConfigError(place[key], expected=expected, found=repr(values[key]), fix="Correct the key.")
    return values


def _classes(cfg: CfgNode, name: str, values: Mapping[str, Any], required: bool) -> ClassTable | None:
    key = TASKS[name].classes
    if values["classes"] is not None:
        return resolve_table(values["classes"], key=key, space=name)
    first: ClassTable | None = None
    for dataset in cfg.DATASETS.TRAIN:
        names = MetadataCatalog.get(dataset).get("task_classes", {}).get(name) if dataset in DatasetCatalog else None
        if not names:
            continue
        table = ClassTable(names, origin=dataset)
        if first is not None and first.names != table.names:
            raise DatasetError(
                key,
                expected=f"the {len(first)} classes of {first.origin}",
                found=f"another list in {table.origin} ({len(table)} classes)",
                fix=f"List the classes of both: {key.set(['first', 'second'])}.",
            )
        first = first or table
    if first is None and required:
        raise ConfigError(
            key,
            expected="the classes of the task",
            found=f"none, and no dataset of {DATASETS.TRAIN} {tuple(cfg.DATASETS.TRAIN)} tells them",
            fix=f"List them: {pairs({'classes': ['first', 'second']}, name)}, or name the task's column under "
            f"{DATASETS.REGISTER}.",
        )
    return first


def _spec(cfg: CfgNode, name: str, values: Mapping[str, Any], table: ClassTable) -> TaskSpec:
    return TaskSpec(
        name,
        values["on"],
        table,
        values["kind"],
        float(values["loss_weight"]),
        _weights(cfg, name, values["class_weights"], table),
        float(values["focal_gamma"]),
        int(values["hidden"]),
    )


def _weights(cfg: CfgNode, name: str, value: Any, table: ClassTable) -> tuple[float, ...] | None:
    if value is None:
        return None
    if value == "balanced":
        # n / (K * count), as scikit-learn's class_weight="balanced"; a class without a label weighs 1.
        labels = [
            label for dataset in cfg.DATASETS.TRAIN if dataset in DatasetCatalog for label in _labels(dataset, name)
        ]
        counts = Counter(labels)
        return tuple(len(labels) / (len(table) * counts[k]) if counts[k] else 1.0 for k in range(len(table)))
    good = isinstance(value, Sequence) and not isinstance(value, str) and len(value) == len(table)
    if not good or not all(isinstance(w, (int, float)) and w >= 0 for w in value):
        raise ConfigError(
            TASKS[name].class_weights,
            expected=f"balanced, or {len(table)} numbers from 0 on, one for each class of {table.origin}",
            found=repr(value),
            fix="Correct the key.",
        )
    return tuple(float(w) for w in value)


def _labels(dataset: str, name: str) -> Iterable[int]:
    for entry in DatasetCatalog.get(dataset):
        for holder in (entry, *entry.get("annotations", ())):
            label = holder.get("tasks", {}).get(name)
            if label is not None:
                yield from label if isinstance(label, (list, tuple)) else (label,)
