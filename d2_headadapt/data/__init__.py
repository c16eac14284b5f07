"""Register datasets; read their categories and the labels of tasks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..deferred import lazy_names as _lazy_names

if TYPE_CHECKING:
    from .datasets import register_datasets as register_datasets
    from .datasets import task_facts as task_facts
    from .entry import DatasetEntry as DatasetEntry
    from .task_labels import TaskFacts as TaskFacts
    from .task_mapper import TaskMapper as TaskMapper
    from .task_mapper import build_task_test_loader as build_task_test_loader
    from .task_mapper import build_task_train_loader as build_task_train_loader
    from .task_spec import TASK_DEFAULTS as TASK_DEFAULTS
    from .task_spec import TaskSpec as TaskSpec
    from .task_spec import task_specs as task_specs

_HOMES = {
    "TASK_DEFAULTS": "task_spec",
    "DatasetEntry": "entry",
    "TaskFacts": "task_labels",
    "TaskMapper": "task_mapper",
    "TaskSpec": "task_spec",
    "build_task_test_loader": "task_mapper",
    "build_task_train_loader": "task_mapper",
    "register_datasets": "datasets",
    "task_facts": "datasets",
    "task_specs": "task_spec",
}
__all__ = [*_HOMES]
__getattr__, __dir__ = _lazy_names(__name__, _HOMES)
