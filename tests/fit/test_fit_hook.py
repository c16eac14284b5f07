"""The fit inside ``Trainer``: asked for by a key, before iteration 1, of new rows only, and never on a resume."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.utils.env import seed_all_rng
from helpers.files import logged
from helpers.models import state_of
from helpers.resume import CLS, NEW, OLD, cfg_for, train, writers_are_closed

from d2_headadapt.engine.train import Trainer
from d2_headadapt.fit import hook as training
from d2_headadapt.fit.hook import SKIP, FitHook
from d2_headadapt.fit.lookahead import Lookahead

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


def test_a_training_averages_its_steps_and_solves_rows_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seen in a whole training: a method that nobody calls would pass a test that calls it."""
    train(Trainer, cfg_for(tmp_path, OLD, 1), resume=False)
    cfg = cfg_for(tmp_path, NEW, 7).clone()
    (tmp_path / "out" / "model_final.pth").rename(tmp_path / "old.pth")
    cfg.defrost()
    cfg.MODEL.WEIGHTS, cfg.OUTPUT_DIR = str(tmp_path / "old.pth"), str(tmp_path / "new")
    cfg.MODEL.HEAD_ADAPT.FIT.REFITS = [3]
    cfg.freeze()
    calls: list[tuple[str, int]] = []
    step, fit = Lookahead.step, training.fit_new_rows

    def stepping(self: Lookahead) -> None:
        calls.append(("average", trainer.iter + 1))
        step(self)

    def fitting(*args: Any, **keys: Any) -> Any:
        calls.append(("fit", trainer.iter + 1 if hasattr(trainer, "storage") and trainer.iter >= 0 else 0))
        return fit(*args, **keys)

    monkeypatch.setattr(Lookahead, "step", stepping)
    monkeypatch.setattr(training, "fit_new_rows", fitting)
    seed_all_rng(5)
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=False)
    trainer.train()
    assert [name for name, _ in calls] == ["fit", "fit", "average"]
    assert calls[1:] == [("fit", 3), ("average", 5)]


def test_a_fit_says_first_what_how_many_and_how_to_skip_and_of_a_refit_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With an estimate where it takes long; a clock that jumps stands for that."""
    train(Trainer, cfg_for(tmp_path, OLD, 1), resume=False)
    (tmp_path / "out" / "model_final.pth").rename(tmp_path / "old.pth")
    trainer = second_run(tmp_path, True)
    (hook,) = hooks_of(trainer)
    times = iter(range(0, 10_000, 3))
    monkeypatch.setattr("d2_headadapt.fit.images.time.perf_counter", lambda: float(next(times)))
    with logged("d2_headadapt") as records:
        hook.before_train()
    said = [record.getMessage() for record in records if record.name.startswith("d2_headadapt.fit")]
    new, images = len(set(NEW) - set(OLD)), hook.report.images
    begins = f"fit: solving the rows of {new} new thing class{'es' * (new > 1)} on {images} of {images} images"
    assert said[0].startswith(begins)
    assert said[0].endswith(f"; fewer: MODEL.HEAD_ADAPT.FIT.IMAGES {images // 3}; none: {SKIP!s}")
    (estimate,) = [line for line in said if "more; further passes" in line]
    assert re.fullmatch(rf"fit: \w[\w ]*, \d of {images} images in \d+ s: about \d+ s more; .*", estimate)
    assert said[-1].startswith(f"fitted {new} of {new} new classes on {images} images in ")
    assert not any("FIT.RPN or FIT.PARTS" in line for line in said)
    trainer.iter, trainer.optimizer.state = 49, trainer.optimizer.state
    with logged("d2_headadapt") as records:
        hook._refit(50, hook.report)
    (line,) = [record.getMessage() for record in records if record.name.startswith("d2_headadapt.fit")]
    assert line.startswith(f"iteration 50: fitted {new} of {new} new classes on ")
