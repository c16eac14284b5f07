"""Resume after the class list changed: 20 steps before, 20 after, and no moment of a carried class is lost."""

from __future__ import annotations

import copy
import io
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.config import CfgNode
from helpers.files import logged, texts
from helpers.models import state_of
from helpers.resume import CLS, NEW, OLD, cfg_for, train

from d2_headadapt.adapt.plan import AdaptPlan
from d2_headadapt.engine.train import Trainer
from d2_headadapt.errors import ResumeError

BOX = "roi_heads.box_predictor.bbox_pred.weight"


class AdamTrainer(Trainer):
    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: torch.nn.Module) -> torch.optim.Optimizer:
        # Two groups, as people make them: heads and the rest.
        heads = [p for n, p in model.named_parameters() if n.startswith("roi_heads") and p.requires_grad]
        rest = [p for n, p in model.named_parameters() if not n.startswith("roi_heads") and p.requires_grad]
        return torch.optim.AdamW([{"params": heads, "lr": 2e-4}, {"params": rest}], lr=1e-4)


def moments(trainer: Trainer, name: str) -> dict[str, torch.Tensor]:
    state = trainer.optimizer.state[dict(trainer.checkpointer.model.named_parameters())[name]]
    return {key: value.clone() for key, value in state.items() if torch.is_tensor(value) and value.dim()}


@pytest.mark.parametrize(("kind", "steps"), [(Trainer, 20), (AdamTrainer, 4)], ids=["SGD", "AdamW"])
def test_steps_before_and_after_another_class_list(tmp_path: Path, kind: type[Trainer], steps: int) -> None:
    before = train(kind, cfg_for(tmp_path, OLD, steps), resume=False)
    saved = {name: moments(before, name) for name in (CLS, BOX)}
    assert all(saved.values())

    cfg = cfg_for(tmp_path, NEW, 2 * steps, RESUME="adapt")
    after = kind(cfg)
    after.resume_or_load(resume=True)
    assert after.start_iter == steps
    for name, per in ((CLS, 1), (BOX, 4)):
        now = moments(after, name)
        assert now.keys() == saved[name].keys()
        for key, value in now.items():
            for t, class_name in enumerate(NEW):
                rows = value[t * per : (t + 1) * per]
                if class_name in OLD:
                    s = OLD.index(class_name)
                    assert torch.equal(rows, saved[name][key][s * per : (s + 1) * per])
                else:
                    assert not rows.any()
    weights = state_of(after.checkpointer.model)[CLS]
    old_weights = state_of(before.checkpointer.model)[CLS]
    assert torch.equal(weights[0], old_weights[3]) and torch.equal(weights[3], old_weights[4])
    other = "proposal_generator.rpn_head.conv.weight"
    for key, value in moments(before, other).items():
        assert torch.equal(moments(after, other)[key], value)
    after.train()
    assert after.iter == 2 * steps and (tmp_path / "out" / "model_final.pth").is_file()
    assert not torch.equal(state_of(after.checkpointer.model)[CLS], weights), "training went on"


def test_a_resume_with_another_class_list_is_refused_by_default_and_changes_nothing(tmp_path: Path) -> None:
    train(Trainer, cfg_for(tmp_path, OLD, 2), resume=False)
    trainer = Trainer(cfg_for(tmp_path, NEW, 4))
    kept = state_of(trainer.checkpointer.model)
    with pytest.raises(ResumeError, match=r"Set MODEL.HEAD_ADAPT.RESUME adapt to go on") as caught:
        trainer.resume_or_load(resume=True)
    assert "2 of 3 thing classes carried" in str(caught.value), "the message says what adapt would do"
    now = state_of(trainer.checkpointer.model)
    assert all(torch.equal(now[name], kept[name]) for name in kept)
    assert not trainer.optimizer.state


@pytest.mark.parametrize(
    ("first", "second", "words"),
    [
        (
            Trainer,
            AdamTrainer,
            "AdamW (amsgrad, betas, eps), found that of another optimizer (dampening, momentum, nesterov)",
        ),
        (
            AdamTrainer,
            Trainer,
            "SGD (dampening, momentum, nesterov), found that of another optimizer (amsgrad, betas, eps)",
        ),
    ],
)
@pytest.mark.parametrize("classes", [OLD, NEW])
def test_another_optimizer_is_refused_and_nothing_is_changed(
    tmp_path: Path, first: type[Trainer], second: type[Trainer], words: str, classes: list[str]
) -> None:
    train(first, cfg_for(tmp_path, OLD, 1), resume=False)
    trainer = second(cfg_for(tmp_path, classes, 4, RESUME="adapt"))
    kept = state_of(trainer.checkpointer.model)
    with pytest.raises(ResumeError) as caught:
        trainer.resume_or_load(resume=True)
    assert str(caught.value) == (
        f"optimizer state of {tmp_path / 'out' / 'model_final.pth'}: expected that of {words}. Go on with the "
        "optimizer that the run was trained with, or start a new run from this file: without --resume, with it as "
        "MODEL.WEIGHTS and another OUTPUT_DIR."
    )
    now = state_of(trainer.checkpointer.model)
    assert all(torch.equal(now[name], kept[name]) for name in kept)
    assert not trainer.optimizer.state


def test_a_plain_resume_is_stocks(tmp_path: Path) -> None:
    """The same list: every moment comes back, and the run ends where one uninterrupted run would count."""
    before = train(Trainer, cfg_for(tmp_path, OLD, 3), resume=False)
    after = Trainer(cfg_for(tmp_path, OLD, 6))
    after.resume_or_load(resume=True)
    assert after.start_iter == 3
    for name in (CLS, BOX):
        for key, value in moments(before, name).items():
            assert torch.equal(moments(after, name)[key], value)


def test_what_was_said_of_the_weights_is_not_about_the_runs_own_checkpoint(tmp_path: Path) -> None:
    """SOURCE_CLASSES none forces new heads at the start; a resume must not do it again."""
    before = train(Trainer, cfg_for(tmp_path, OLD, 2), resume=False)
    after = Trainer(cfg_for(tmp_path, OLD, 4, SOURCE_CLASSES="none"))
    after.resume_or_load(resume=True)
    assert torch.equal(state_of(after.checkpointer.model)[CLS], state_of(before.checkpointer.model)[CLS])


def test_frozen_layers_may_change_between_runs(tmp_path: Path) -> None:
    """The optimizer's numbers move; the names in the file do not."""
    before = train(Trainer, cfg_for(tmp_path, OLD, 2), resume=False)
    after = Trainer(cfg_for(tmp_path, OLD, 4, FREEZE=["backbone.*"]))
    assert len(list(after.optimizer.param_groups[0]["params"])) < len(list(before.optimizer.param_groups[0]["params"]))
    after.resume_or_load(resume=True)
    for key, value in moments(before, CLS).items():
        assert torch.equal(moments(after, CLS)[key], value)
    after.train()


def test_nothing_left_to_train_and_shadowed_weights_are_said(tmp_path: Path) -> None:
    first = train(Trainer, cfg_for(tmp_path, OLD, 2), resume=False)
    cfg = cfg_for(tmp_path, OLD, 2).clone()
    cfg.defrost()
    cfg.MODEL.WEIGHTS = str(tmp_path / "elsewhere.pth")
    cfg.freeze()
    trainer = Trainer(cfg)
    with logged("d2_headadapt") as records:
        trainer.resume_or_load(resume=True)
    assert "Nothing is left to train: 2 of 2 iterations are done." in texts(records)
    assert "Set SOLVER.MAX_ITER higher." in texts(records)
    assert f"MODEL.WEIGHTS {tmp_path / 'elsewhere.pth'} is not read" in texts(records)
    assert [r.levelno for r in records if "Nothing is left" in r.getMessage()] == [logging.WARNING]
    assert first.iter == 2


def test_the_plan_is_beside_the_checkpoints_and_in_tensorboard(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(Trainer, cfg_for(tmp_path, OLD, 1), resume=False)
    weights = tmp_path / "old.pth"
    (tmp_path / "out" / "model_final.pth").rename(weights)
    cfg = cfg_for(tmp_path, NEW, 1).clone()
    cfg.defrost()
    cfg.MODEL.WEIGHTS, cfg.OUTPUT_DIR = str(weights), str(tmp_path / "second")
    cfg.freeze()
    train(Trainer, cfg, resume=False)
    plan = AdaptPlan.from_json((tmp_path / "second" / "head_adapt_plan.json").read_text())
    assert plan.new_classes() == {"thing": ("owl",)}
    texts_of = [EventAccumulator(str(path)).Reload() for path in (tmp_path / "second").glob("events.*")]
    found = [e.Tensors(tag)[0] for e in texts_of for tag in e.Tags()["tensors"] if tag.startswith("head_adapt/plan")]
    assert len(found) == 1 and b"owl" in found[0].tensor_proto.string_val[0]


OPTIMIZER = ("trainer", "_trainer", "optimizer")
WRONG_TYPES: list[tuple[tuple[Any, ...], Any, str]] = [
    (("trainer",), 5, r"entry trainer: expected a mapping, found int '5'"),
    (("trainer",), [1], r"entry trainer: expected a mapping, found list"),
    (OPTIMIZER, None, r"entry trainer/_trainer/optimizer: expected a mapping"),
    (OPTIMIZER, [], r"entry trainer/_trainer/optimizer: expected a mapping, found list"),
    ((*OPTIMIZER, "state"), "x", r"optimizer/state: expected a mapping, found str 'x'"),
    ((*OPTIMIZER, "state", 0), 5, r"optimizer/state/0: expected a mapping, found int '5'"),
    (
        (*OPTIMIZER, "state", 0, "momentum_buffer"),
        "text",
        r"state/0/momentum_buffer: expected a tensor or number, found str 'text'",
    ),
    ((*OPTIMIZER, "state", 0, "momentum_buffer"), [1.0], r"tensor or number, found list"),
    ((*OPTIMIZER, "param_groups"), 5, r"param_groups: expected a list, found int '5'"),
    ((*OPTIMIZER, "param_groups", 0), "x", r"param_groups/0: expected a mapping"),
    ((*OPTIMIZER, "param_groups", 0, "params"), 3, r"0/params: expected a list"),
    ((*OPTIMIZER, "param_groups", 0, "lr"), "fast", r"0/lr: expected a number, found str"),
    (("trainer", "_trainer", "hooks"), 7, r"hooks: expected a mapping, found int '7'"),
]


def test_an_entry_of_the_wrong_type_is_one_line_and_changes_nothing(tmp_path: Path) -> None:
    train(Trainer, cfg_for(tmp_path, OLD, 2), resume=False)
    trainer = Trainer(cfg_for(tmp_path, OLD, 4))
    kept = state_of(trainer.checkpointer.model)
    before = copy.deepcopy(trainer.optimizer.state_dict())
    path = tmp_path / "out" / "model_final.pth"
    whole = path.read_bytes()
    for place, value, found in WRONG_TYPES:
        content = torch.load(io.BytesIO(whole), weights_only=False)
        at = content
        for key in place[:-1]:
            at = at[key]
        at[place[-1]] = value
        torch.save(content, path)
        with pytest.raises(ResumeError, match=found) as caught:
            trainer.resume_or_load(resume=True)
        assert "\n" not in str(caught.value) and "without --resume" in caught.value.fix
        assert all(torch.equal(value, kept[name]) for name, value in state_of(trainer.checkpointer.model).items())
        assert trainer.optimizer.state_dict() == before and trainer.start_iter == 0
    path.write_bytes(whole)
    trainer.resume_or_load(resume=True)
    assert trainer.start_iter == 2, "what is right is resumed"


def test_a_failure_while_the_optimizer_is_loaded_leaves_model_and_optimizer_as_they_were(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(Trainer, cfg_for(tmp_path, OLD, 2), resume=False)
    trainer = Trainer(cfg_for(tmp_path, OLD, 4))
    kept = state_of(trainer.checkpointer.model)

    def fail(state: Any, right: Any = trainer.optimizer.load_state_dict) -> None:
        right(state)
        if state["state"]:
            raise KeyError("the disk is on fire")

    monkeypatch.setattr(trainer.optimizer, "load_state_dict", fail)
    with pytest.raises(KeyError, match="on fire"):
        trainer.resume_or_load(resume=True)
    now = state_of(trainer.checkpointer.model)
    assert all(torch.equal(now[name], kept[name]) for name in kept)
    assert not any(trainer.optimizer.state.values())
