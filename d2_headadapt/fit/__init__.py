"""Solve the rows of new classes in closed form before the first iteration, so that heads start trained."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..deferred import lazy_names as _lazy_names

if TYPE_CHECKING:
    from ..data.task_datasets import every_training_dict as training_dicts  # noqa: F401
    from ..data.task_mapper import Mapper as Mapper
    from ..data.task_mapper import mapper_at_test_size as mapper_at_test_size
    from .fit import fit_new_rows as fit_new_rows
    from .hook import FitHook as FitHook
    from .report import fit_json as fit_json
    from .report import fit_lines as fit_lines
    from .settings import FitReport as FitReport
    from .settings import FitSettings as FitSettings
    from .settings import PartReport as PartReport

_HOMES = {
    "FitHook": "hook",
    "FitReport": "settings",
    "FitSettings": "settings",
    "Mapper": ".data.task_mapper",
    "PartReport": "settings",
    "fit_json": "report",
    "fit_lines": "report",
    "fit_new_rows": "fit",
    "mapper_at_test_size": ".data.task_mapper",
    "training_dicts": ".data.task_datasets:every_training_dict",
}
__all__ = [*_HOMES]
__getattr__, __dir__ = _lazy_names(__name__, _HOMES)
