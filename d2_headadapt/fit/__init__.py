"""Heads that start trained: new rows are solved in closed form before the first iteration."""

from __future__ import annotations

from .entry import fit_new_rows
from .images import Mapper
from .options import FitReport, FitSettings, PartReport
from .report import fit_json, fit_lines
from .training import FitHook, mapper_at_test_size, training_dicts

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
