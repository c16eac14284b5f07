"""Text classifiers solved on frozen features: the way into text space moves, class rows never do."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.fit import SETTINGS, scene, scenes
from helpers.models import build_seeded, state_of, tiny_cfg
from torch import nn

from d2_headadapt import HeadAdaptCheckpointer
from d2_headadapt.fit import fit_new_rows
from d2_headadapt.fit.solvers import Frame
from d2_headadapt.fit.text import Projection

ROOT = Path(__file__).resolve().parents[2]
COLOURS = ["red", "green", "blue"]
CLASSIFIER = "roi_heads.box_predictor.cls_score"


def regions(classes: int = 8, count: int = 30) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Features (n, 12), labels (n,) and unit class rows (classes, 6): noise around a linear image of the rows."""
    generator = torch.Generator().manual_seed(5)
    rows = F.normalize(torch.randn(classes, 6, generator=generator), dim=1)
    label = torch.arange(classes).repeat_interleave(count)
    way = torch.randn(6, 12, generator=generator)
    return rows[label] @ way + 0.1 * torch.randn(len(label), 12, generator=generator), label, rows


def test_classes_without_a_region_are_found_by_their_rows() -> None:
    """Six classes are fitted; two more, which no region showed, are told apart by embedding alone."""
    x, label, rows = regions()
    fitted = label < 6
    frame = Frame.of(x[fitted])
    z = frame.apply(x)
    target = F.one_hot(label[fitted], 9)[:, [*range(6), 8]].float()
    problem = Projection(rows[:6], 20.0, None, False)
    weight = torch.ones(int(fitted.sum()))
    start = float(problem.loss(z[fitted], target, weight, problem.start(z.shape[1])))
    theta = problem.solve(z[fitted], target, weight, 1e-3)
    assert float(problem.loss(z[fitted], target, weight, theta)) < 0.2 * start
    assert torch.equal(theta, problem.solve(z[fitted], target, weight, 1e-3)), "no random number is drawn"
    unseen = z[~fitted] @ theta[:-1] @ rows[6:].t()
    assert float((unseen.argmax(1) == label[~fitted] - 6).float().mean()) > 0.9


def text_model(path: Path) -> nn.Module:
    rows = np.random.default_rng(3).normal(size=(3, 10)).astype(np.float32)
    np.save(path / "colours.npy", rows)
    cfg = tiny_cfg(masks=False, num_classes=3)
    node = cfg.MODEL.HEAD_ADAPT
    node.PREDICTOR, node.TARGET_CLASSES = "HeadAdaptTextOutputLayers", COLOURS
    node.TEXT.FILE, node.TEXT.NAMES = str(path / "colours.npy"), COLOURS
    return build_seeded(cfg)


def test_a_fit_solves_projection_and_background_and_keeps_the_rows(tmp_path: Path) -> None:
    model = text_model(tmp_path)
    before = state_of(model)
    report = fit_new_rows(model, scenes(20), scene, new={"thing": (0, 1, 2)}, settings=SETTINGS)
    after = state_of(model)
    (part,) = [part for part in report.parts if part.part == "roi_heads.box_predictor"]
    assert part.action == "solved"
    none, best = part.score["held-out loss"]
    assert best < 0.8 * none
    changed = {name for name in after if not torch.equal(before[name], after[name])}
    leaves = ("projection.weight", "projection.bias", "background")
    assert {f"{CLASSIFIER}.{leaf}" for leaf in leaves} <= changed
    assert f"{CLASSIFIER}.embeddings" not in changed
    assert not any(name.startswith(("backbone", "roi_heads.box_head")) for name in changed)


def test_a_model_that_was_solved_counts_as_trained_and_its_file_says_so(tmp_path: Path) -> None:
    model = text_model(tmp_path)
    plain = {name: value for name, value in model.state_dict().items() if not name.startswith(CLASSIFIER)}
    torch.save({"model": plain}, tmp_path / "linear.pth")
    checkpointer = HeadAdaptCheckpointer(model, str(tmp_path))
    checkpointer.load(str(tmp_path / "linear.pth"), checkpointables=[])
    assert f"{CLASSIFIER}.embeddings" in checkpointer.rows_to_fit()
    with checkpointer.fitted_rows():
        fit_new_rows(model, scenes(20), scene, new=checkpointer.rows_to_fit(), settings=SETTINGS)
    assert f"{CLASSIFIER}.embeddings" not in checkpointer.rows_to_fit()


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> Any:
    """``tools/text_real.py`` as a module."""
    spec = importlib.util.spec_from_file_location("text_real", ROOT / "tools" / "text_real.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "text_real", module)
    spec.loader.exec_module(module)
    return module


@pytest.mark.real
def test_classes_of_coco_that_were_held_out_are_found_by_name_alone(tool: Any, real: Path, tmp_path: Path) -> None:
    """Twenty names added to a text head of sixty, without training; the control gives each another's row."""
    arms = tool.run_text(tool.Show(real, tmp_path), 50.0, more=False)["arms"]
    unseen, control = (arms[f"text head, 20 names added{words}"]["unseen"] for words in ("", ", shuffled"))
    assert unseen > 2.0
    assert unseen > 3 * control
