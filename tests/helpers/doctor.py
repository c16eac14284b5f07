"""Datasets on disk for the doctor, and what its checks say of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from detectron2.data.datasets import register_coco_instances

from d2_headadapt.doctor.finding import CHECKS, DoctorContext, Finding
from d2_headadapt.doctor.running import Report, run_checks

from .datasets import write_coco

Change = Callable[[dict[str, Any]], object]


def write_set(folder: Path, name: str, change: Change | None = None, *, images: int = 6) -> Path:
    """A good dataset of three classes, two boxes an image, with one change in its json."""
    path = write_coco(folder, ["cat", "dog", "bird"], name=name, images=images)
    content = json.loads(path.read_text())
    for annotation in content["annotations"]:
        annotation["id"] += 1
    if change is not None:
        change(content)
    path.write_text(json.dumps(content))
    return path


def registered_context(
    folder: Path, train: Path | None = None, test: Path | None = None, *opts: object, **named: Any
) -> DoctorContext:
    """A context of a Faster R-CNN on jsons that stock detectron2 registers, as a user's own script would."""
    sets = {"TRAIN": train, "TEST": test}
    pairs: list[str] = ["MODEL.MASK_ON", "False", "MODEL.WEIGHTS", ""]
    for which, path in sets.items():
        name = f"doctor_{which.lower()}"
        if path is not None:
            register_coco_instances(name, {}, str(path), str(path.with_suffix("")))
        pairs += [f"DATASETS.{which}", str((name,) if path is not None else ())]
    return DoctorContext("", [*pairs, *map(str, opts)], **named)


def data_report(context: DoctorContext) -> Report:
    """What the checks of datasets say; none of them may crash."""
    report = run_checks(context, [one for code, one in CHECKS.items() if code.startswith("HA2")])
    crashed = [finding for finding in report.findings if finding.code == "HA100"]
    assert not crashed, crashed
    return report


def one_of(report: Report, code: str) -> Finding:
    """The only finding of a code."""
    found = [finding for finding in report.findings if finding.code == code]
    assert len(found) == 1, (code, report.findings)
    return found[0]


def codes(report: Report) -> list[str]:
    return sorted({finding.code for finding in report.findings})
