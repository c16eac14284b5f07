"""What passes of detectron2's own tests on stock passes with our heads and checkpointer in place."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from helpers.commands import ROOT, Ran, python

TOOL = ROOT / "tools" / "detectron2_tests.py"
VARIABLE = "D2HA_DETECTRON2_SRC"
LIMIT = 1800.0
"""Seconds; the two runs took 90 side by side on two free cores."""
HEADS = """
import unittest
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling.roi_heads import build_roi_heads
from torch import nn

class Both(unittest.TestCase):
    def test_that_builds(self):
        cfg = get_cfg()
        cfg.MODEL.ROI_HEADS.NAME = "StandardROIHeads"
        cfg.MODEL.ROI_BOX_HEAD.NAME, cfg.MODEL.ROI_BOX_HEAD.NUM_FC = "FastRCNNConvFCHead", 1
        DetectionCheckpointer(nn.Linear(1, 1))
        assert "ROIHeads" in type(build_roi_heads(cfg, {"res4": ShapeSpec(channels=2, stride=16)})).__name__

    def test_that_fails_anyway(self):
        raise AssertionError("for want of compiled ops")

    @unittest.skip("no GPU")
    def test_on_a_gpu(self):
        pass
"""
STOCK_ALONE = """
    def test_for_stock_alone(self):
        assert type(DetectionCheckpointer(nn.Linear(1, 1))) is DetectionCheckpointer
"""


def tool(*arguments: object, source: Path | None) -> Ran:
    return python(TOOL, *arguments, env={VARIABLE: str(source or "")}, timeout=LIMIT)


def test_what_passes_on_stock_passes_under_run(tmp_path: Path) -> None:
    source = os.environ.get(VARIABLE)
    if not source:
        pytest.skip(f"{VARIABLE} names no source of detectron2")
    ran = tool("--json", tmp_path / "told.json", source=Path(source))
    assert ran.code == 0, ran.out + ran.err
    told = json.loads((tmp_path / "told.json").read_text())
    kinds = [stock for stock, _ in told["tests"].values()]
    assert kinds.count("passed") >= 40, ran.out


@pytest.mark.parametrize("worse", [False, True])
def test_mutation_a_test_that_run_breaks_is_named(tmp_path: Path, worse: bool) -> None:
    (tmp_path / "tests" / "modeling").mkdir(parents=True)
    (tmp_path / "tests" / "modeling" / "test_x.py").write_text(HEADS + (STOCK_ALONE if worse else ""))
    ran = tool(source=tmp_path)
    assert ran.code == (1 if worse else 0), ran.out + ran.err
    assert "1 ROI heads and" in ran.out and "for want of compiled ops" in ran.out
    named = "error: passes on stock, not under run: tests.modeling.test_x.Both::test_for_stock_alone"
    assert (ran.err.strip() == named) if worse else not ran.err, ran.err


def test_tests_that_build_nothing_of_ours_say_nothing(tmp_path: Path) -> None:
    (tmp_path / "tests" / "modeling").mkdir(parents=True)
    (tmp_path / "tests" / "modeling" / "test_x.py").write_text("def test_one():\n    pass\n")
    ran = tool(source=tmp_path)
    assert ran.code == 1
    assert "made no heads of this package and no checkpointers of this package" in ran.err


def test_no_source_is_said(tmp_path: Path) -> None:
    without = tool(source=None)
    assert without.code == 0 and f"not run, because {VARIABLE} names no source" in without.out
    wrong = tool(source=tmp_path)
    assert wrong.code == 2 and "is neither a source tree nor a git directory of detectron2" in wrong.err
