"""Heads that start trained: new rows are solved in closed form before the first iteration."""

from __future__ import annotations

from ..data.task_datasets import every_training_dict as training_dicts
from ..data.task_mapper import Mapper, mapper_at_test_size
from .fit import fit_new_rows
from .hook import FitHook
from .report import fit_json, fit_lines
from .settings import FitReport, FitSettings, PartReport

__all__ = [
    "FitHook",
    "FitReport",
    "FitSettings",
    "Mapper",
    "PartReport",
    "fit_json",
    "fit_lines",
    "fit_new_rows",
    "mapper_at_test_size",
    "training_dicts",
]
