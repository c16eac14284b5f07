"""The doctor's checks of class embeddings: each finds what it is for, and is silent on the file beside it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from detectron2.config import CfgNode
from helpers.models import tiny_cfg

from d2_headadapt.doctor.context import DoctorContext
from d2_headadapt.doctor.finding import CHECKS, Finding
from d2_headadapt.doctor.running import examine
from d2_headadapt.doctor.text_checks import TITLES

NAMES = ["cat", "dog", "yak"]


def config(tmp_path: Path, rows: Any, names: list[str] | None = None, **keys: Any) -> CfgNode:
    np.save(tmp_path / "rows.npy", np.asarray(rows, dtype=np.float32))
    if names is not None:
        (tmp_path / "rows.json").write_text(json.dumps({"names": names, "encoder": "ViT-B/32"}))
    cfg = tiny_cfg(masks=False)
    cfg.MODEL.HEAD_ADAPT.TARGET_CLASSES = list(NAMES)
    cfg.MODEL.HEAD_ADAPT.PREDICTOR = "HeadAdaptTextOutputLayers"
    cfg.MODEL.HEAD_ADAPT.TEXT.FILE = str(tmp_path / "rows.npy")
    for key, value in keys.items():
        cfg.MODEL.HEAD_ADAPT.TEXT[key] = value
    return cfg


def found(cfg: CfgNode, code: str) -> list[Finding]:
    return list(CHECKS[code].function(DoctorContext(ready=cfg)))


def rows(count: int = 3, width: int = 512) -> Any:
    return np.random.default_rng(0).normal(size=(count, width))


def test_sound_embeddings_are_silent(tmp_path: Path) -> None:
    assert [found(config(tmp_path, rows(), NAMES), code) for code in TITLES] == [[] for _ in TITLES]


def test_who_reads_no_text_hears_nothing(tmp_path: Path) -> None:
    cfg = tiny_cfg(masks=False)
    assert [found(cfg, code) for code in TITLES] == [[] for _ in TITLES]


def zero(values: Any) -> Any:
    values[1] = 0
    return values


def twin(values: Any) -> Any:
    values[1] = values[0]
    return values


def mixed(values: Any) -> Any:
    values[1] /= np.linalg.norm(values[1])
    return values


@pytest.mark.parametrize(
    ("code", "values", "names", "keys", "words"),
    [
        ("HA401", rows(), None, {}, "names"),
        ("HA401", rows(1)[0], NAMES, {}, "(512,)"),
        ("HA402", rows(width=640), NAMES, {"PROJECTION": "never"}, "640"),
        ("HA403", rows(), ["cat", "dog", "zebra"], {}, "yak"),
        ("HA404", zero(rows()), NAMES, {}, "dog"),
        ("HA405", twin(rows()), NAMES, {}, "dog"),
        ("HA406", mixed(rows()), NAMES, {}, "norm"),
        ("HA407", rows(), NAMES, {"PRECEDENCE": "both"}, "both"),
    ],
)
def test_each_check_finds_what_it_is_for(
    code: str, values: Any, names: list[str] | None, keys: dict[str, Any], words: str, tmp_path: Path
) -> None:
    findings = found(config(tmp_path, values, names, **keys), code)
    assert findings and all(finding.code == code for finding in findings)
    assert any(words in f"{f.where} {f.found} {f.expected}" for f in findings), findings


def test_the_command_reports_embeddings(tmp_path: Path) -> None:
    cfg = config(tmp_path, rows(width=640), NAMES, PROJECTION="never")
    (tmp_path / "c.yaml").write_text(cfg.dump())
    report = examine(str(tmp_path / "c.yaml"))
    assert report.exit_code == 1
    assert "HA402" in {finding.code for finding in report.of("error")}
