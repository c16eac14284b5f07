"""The fit inside ``Trainer``: asked for by a key, before iteration 1, of new rows only, and never on a resume."""

from __future__ import annotations

from pathlib import Path

import torch
from detectron2.utils.env import seed_all_rng
from helpers.models import state_of
from test_resuming import CLS, NEW, OLD, cfg_for, train, writers_are_closed

from d2_headadapt.engine import Trainer
from d2_headadapt.fit.training import FitHook

__all__ = ["writers_are_closed"]


def second_run(tmp_path: Path, fit: bool) -> Trainer:
    """A run on another class list, loaded and stopped before its first iteration."""
    cfg = cfg_for(tmp_path, NEW, 2).clone()
    cfg.defrost()
    cfg.MODEL.WEIGHTS, cfg.OUTPUT_DIR = str(tmp_path / "old.pth"), str(tmp_path / f"fit {fit}")
    cfg.MODEL.HEAD_ADAPT.FIT.ENABLED = fit
    cfg.freeze()
    seed_all_rng(5)
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=False)
    return trainer


def hooks_of(trainer: Trainer) -> list[FitHook]:
    return [hook for hook in trainer._hooks if isinstance(hook, FitHook)]


def test_only_new_rows_are_solved_and_only_when_asked(tmp_path: Path) -> None:
    train(Trainer, cfg_for(tmp_path, OLD, 1), resume=False)
    (tmp_path / "out" / "model_final.pth").rename(tmp_path / "old.pth")
    plain, fitted = second_run(tmp_path, False), second_run(tmp_path, True)
    assert not hooks_of(plain)
    before = state_of(fitted.checkpointer.model)
    assert all(torch.equal(value, before[name]) for name, value in state_of(plain.checkpointer.model).items())
    random = torch.random.get_rng_state()
    (hook,) = hooks_of(fitted)
    hook.before_train()
    assert torch.equal(torch.random.get_rng_state(), random), "the fit drew from the global stream"
    after = state_of(fitted.checkpointer.model)
    changed = (after[CLS] != before[CLS]).any(1)
    assert changed.tolist() == [name not in OLD for name in NEW] + [False]
    assert hook.report is not None and "roi_heads.box_predictor" in hook.report.solved


def test_a_resume_is_not_fitted_again(tmp_path: Path) -> None:
    train(Trainer, cfg_for(tmp_path, OLD, 1), resume=False)
    cfg = cfg_for(tmp_path, NEW, 2, RESUME="adapt").clone()
    cfg.defrost()
    cfg.MODEL.HEAD_ADAPT.FIT.ENABLED = True
    cfg.freeze()
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=True)
    before = state_of(trainer.checkpointer.model)
    (hook,) = hooks_of(trainer)
    hook.before_train()
    assert hook.report is None
    assert all(torch.equal(value, before[name]) for name, value in state_of(trainer.checkpointer.model).items())
