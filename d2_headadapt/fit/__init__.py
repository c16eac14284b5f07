"""Heads that start trained: new rows are solved in closed form before the first iteration."""

from __future__ import annotations

from .entry import fit_new_rows
from .images import Mapper
from .options import FitReport, FitSettings, PartReport
from .training import FitHook, mapper_at_test_size, new_rows_of

__all__ = [
    "FitHook",
    "FitReport",
    "FitSettings",
    "Mapper",
    "PartReport",
    "fit_new_rows",
    "mapper_at_test_size",
    "new_rows_of",
]
