"""Render what a fit did, in words and as JSON. Pure functions from a report to text."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from tabulate import tabulate

from ..adapt.classes import ClassTable, shorten
from .settings import FitReport, PartReport

_HEADERS = ("part", "action", "why", "regions", "left out", "penalties", "held out, before -> after")
_MOST = 12


def fit_lines(report: FitReport, tables: Mapping[str, ClassTable]) -> str:
    """Put the report into a table with a row for each part, then the classes without an example and the skipped images.

    Args:
        report: of :func:`d2_headadapt.fit.fit_new_rows`.
        tables: the model's classes by label space; a class of a space without a table is named by its number.
    """
    text = [tabulate([_row(part) for part in report.parts], headers=_HEADERS, disable_numparse=True)]
    text += [
        f"{space} classes without an example, which keep their initial rows: {shorten(names, _MOST)}"
        for space, names in _named(report.without_examples, tables).items()
    ]
    skipped = [f"{name} ({reason})" for name, reason in report.skipped]
    text += [f"images passed over: {shorten(skipped, _MOST)}"] if skipped else []
    return "\n".join([*text, report.line()])


def fit_json(report: FitReport, tables: Mapping[str, ClassTable], untrained: Mapping[str, Sequence[str]]) -> str:
    """Write the report as JSON: that of :meth:`FitReport.to_json`, with classes by their names.

    Args:
        report: of :func:`d2_headadapt.fit.fit_new_rows`.
        tables: the model's classes by label space.
        untrained: classes by label space of which some row was neither carried, fitted nor trained.
    """
    data = {
        **report.to_json(),
        "new": _named(report.new, tables),
        "without_examples": _named(report.without_examples, tables),
        "untrained": {space: list(names) for space, names in untrained.items()},
    }
    return json.dumps(data, indent=1, ensure_ascii=False) + "\n"


def _row(part: PartReport) -> tuple[str, ...]:
    penalties = [f"{name} {value:g}" for name, value in part.penalties.items()]
    score = [f"{name.removeprefix('held-out ')} {old:.3g} -> {new:.3g}" for name, (old, new) in part.score.items()]
    counts = [str(count) if part.action == "solved" else "" for count in (part.regions, part.left_out)]
    return (part.part, part.action, part.reason, *counts, ", ".join(penalties), ", ".join(score))


def _named(classes: Mapping[str, Sequence[int]], tables: Mapping[str, ClassTable]) -> dict[str, list[str]]:
    return {
        space: [tables[space].names[k] if space in tables else f"class {k}" for k in found]
        for space, found in classes.items()
    }
