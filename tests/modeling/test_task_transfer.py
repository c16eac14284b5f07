"""A trained model of three tasks under other tasks: what stays, stays bit for bit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from detectron2.modeling import build_model
from helpers.classifier import TASKS, classifier, classifier_cfg, picture, pictures, step_on
from torch import nn

from d2_headadapt import HeadAdaptCheckpointer
from d2_headadapt.adapt.report import plan_table
from d2_headadapt.cli.parser import main
from d2_headadapt.cli.plan_html import plan_html
from d2_headadapt.errors import ResumeError
from d2_headadapt.files import read_checkpoint

COLOURS = ["blue", "violet", "red"]
OTHER = {
    "colour": {"classes": COLOURS},
    "light": TASKS["light"],
    "mood": {"classes": ["calm", "wild"]},
}
"""Another list for one task, one task added, one removed, one as it was."""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three tasks: a few steps, and a checkpoint with its optimizer."""
    folder = tmp_path_factory.mktemp("trained")
    model = classifier(seed=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    for _ in range(3):
        step_on(model, optimizer, [picture(entry) for entry in pictures(8)])
    HeadAdaptCheckpointer(model, str(folder), optimizer=optimizer).save("model_final", iteration=2)
    return folder / "model_final.pth"


def load(path: Path, tasks: dict[str, Any], seed: int = 9, **keys: Any) -> tuple[nn.Module, HeadAdaptCheckpointer]:
    model = classifier(tasks, seed=seed).eval()
    checkpointer = HeadAdaptCheckpointer(model, **keys)
    checkpointer.load(str(path), checkpointables=None if keys else [])
    return model, checkpointer


def logits(model: nn.Module) -> dict[str, torch.Tensor]:
    images = torch.rand(6, 3, 32, 32, generator=torch.Generator().manual_seed(2)) * 4 - 2
    with torch.no_grad():
        found: dict[str, torch.Tensor] = model.eval().logits(images)
    return found


def test_the_logits_of_the_other_tasks_are_bit_equal(trained: Path) -> None:
    before = logits(load(trained, TASKS)[0])
    # In turn: another list for colour, a task added, one removed, and all at once.
    changes = [
        ({**TASKS, "colour": OTHER["colour"]}, ("light", "tags")),
        ({"mood": OTHER["mood"], **TASKS}, ("colour", "light", "tags")),
        ({name: TASKS[name] for name in ("colour", "light")}, ("colour", "light")),
        (OTHER, ("light",)),
    ]
    for tasks, kept in changes:
        after = logits(load(trained, tasks)[0])
        assert after.keys() == tasks.keys()
        for name in kept:
            assert torch.equal(before[name], after[name]), (name, list(tasks))
    assert not torch.equal(logits(classifier(seed=9))["light"], before["light"])


def test_rows_move_by_name_and_new_ones_keep_their_recipe(trained: Path) -> None:
    old, new = classifier(seed=1), classifier(OTHER, seed=9)
    fresh = {name: value.clone() for name, value in new.state_dict().items()}
    old.load_state_dict(read_checkpoint(str(trained))["model"])
    checkpointer = HeadAdaptCheckpointer(new)
    checkpointer.load(str(trained), checkpointables=[])
    for leaf in ("weight", "bias"):
        rows = old.state_dict()[f"heads.colour.predictor.{leaf}"]
        now = new.state_dict()[f"heads.colour.predictor.{leaf}"]
        assert torch.equal(now[0], rows[2]) and torch.equal(now[2], rows[0])
        assert torch.equal(now[1], fresh[f"heads.colour.predictor.{leaf}"][1])
        assert torch.equal(new.state_dict()[f"heads.mood.predictor.{leaf}"], fresh[f"heads.mood.predictor.{leaf}"])
        hidden = f"heads.light.hidden.{leaf}"
        assert torch.equal(new.state_dict()[hidden], old.state_dict()[hidden])
    assert checkpointer.untrained == {"colour": ("violet",), "mood": ("calm", "wild")}
    assert checkpointer.rows_to_fit() == {
        **{f"heads.colour.predictor.{leaf}": (1,) for leaf in ("weight", "bias")},
        **{f"heads.mood.predictor.{leaf}": (0, 1) for leaf in ("weight", "bias")},
    }


def test_a_file_says_the_classes_of_each_task(trained: Path, tmp_path: Path) -> None:
    tables = read_checkpoint(str(trained))["d2_headadapt"]["tables"]
    assert tables == {name: values["classes"] for name, values in TASKS.items()}
    _, checkpointer = load(trained, OTHER)
    checkpointer.save_dir = str(tmp_path)
    checkpointer.save("adapted")
    again = read_checkpoint(str(tmp_path / "adapted.pth"))["d2_headadapt"]
    assert again["tables"] == {name: values["classes"] for name, values in OTHER.items()}
    # Back to the first lists: what was carried both ways has its first bits.
    first, back = load(trained, TASKS)[0], load(tmp_path / "adapted.pth", TASKS, seed=5)[0]
    assert torch.equal(logits(first)["light"], logits(back)["light"])
    assert torch.equal(first.heads["colour"].predictor.weight[[0, 2]], back.heads["colour"].predictor.weight[[0, 2]])
    assert not torch.equal(first.heads["colour"].predictor.weight[1], back.heads["colour"].predictor.weight[1])


def resumed(trained: Path, tasks: dict[str, Any], mode: str) -> tuple[nn.Module, torch.optim.Optimizer]:
    cfg = classifier_cfg(tasks)
    cfg.MODEL.HEAD_ADAPT.RESUME = mode
    model = build_model(cfg)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    HeadAdaptCheckpointer(model, str(trained.parent), optimizer=optimizer).resume_or_load("", resume=True)
    return model, optimizer


def test_resume_refuses_other_tasks_and_adapts_their_moments_where_asked(trained: Path) -> None:
    same, optimizer = resumed(trained, TASKS, "refuse")
    saved = {n: optimizer.state[p]["momentum_buffer"].clone() for n, p in same.named_parameters()}
    assert all(bool(value.any()) for name, value in saved.items() if "predictor" in name)
    with pytest.raises(ResumeError, match=r"heads\.colour\.predictor\.weight"):
        resumed(trained, OTHER, "refuse")
    model, optimizer = resumed(trained, OTHER, "adapt")
    colour = model.heads["colour"].predictor.weight
    moments = optimizer.state[colour]["momentum_buffer"]
    old = saved["heads.colour.predictor.weight"]
    assert torch.equal(moments[[0, 2]], old[[2, 0]]) and not moments[1].any()
    light = optimizer.state[model.heads["light"].predictor.weight]["momentum_buffer"]
    assert torch.equal(light, saved["heads.light.predictor.weight"])
    assert model.heads["mood"].predictor.weight not in optimizer.state
    entries = pictures(4)
    batch = [picture(entry) for entry in entries]
    for image in batch:
        image["tasks"]["mood"] = torch.tensor(1)
    step_on(model, optimizer, batch)


def config_file(folder: Path, tasks: dict[str, Any]) -> Path:
    cfg = classifier_cfg({})
    model = {
        "META_ARCHITECTURE": "MultiTaskClassifier",
        "DEVICE": "cpu",
        "WEIGHTS": "",
        "BACKBONE": {"NAME": "build_conv_net_backbone"},
        "CONV_NET": {"CHANNELS": list(cfg.MODEL.CONV_NET.CHANNELS)},
        "CLASSIFIER": {"INPUT_SIZE": [32, 32]},
        "TASKS": {name: {"on": "image", **values} for name, values in tasks.items()},
    }
    path = folder / "tasks.yaml"
    path.write_text(yaml.safe_dump({"MODEL": model, "VERSION": 2}), encoding="utf-8")
    return path


def test_plan_and_adapt_say_and_write_every_task(trained: Path, tmp_path: Path, capsys: Any) -> None:
    config, page = config_file(tmp_path, OTHER), tmp_path / "plan.html"
    arguments = ["--config-file", str(config), "--weights", str(trained)]
    assert main(["plan", *arguments, "--html", str(page)]) == 0
    text = capsys.readouterr().out
    assert "colour classes carried: blue, red" in text
    assert "colour classes that are new: violet" in text
    assert "colour classes of the file that are dropped: green" in text
    assert "light classes carried: dark, bright" in text
    assert "2 tensors of heads.mood keep the model's initial values: not in the file" in text
    assert "tags classes of the file that are dropped: warm, cold, grey, loud" in text
    assert "mood classes that are new: calm, wild" in text
    last = text.splitlines()[-1]
    for words in ("2 of 3 colour classes carried", "2 of 2 light", "0 of 2 mood", "task tags is not in the model"):
        assert words in last
    html = page.read_text(encoding="utf-8")
    for task in ("colour", "light", "mood", "tags"):
        assert f"<h2>{task} classes</h2>" in html, task
    assert html.count("The model has no such task") == 1 and html.count("The file has no such task") == 1
    output = tmp_path / "new.pth"
    assert main(["adapt", *arguments, "--output", str(output)]) == 0
    data = read_checkpoint(str(output))
    assert data["d2_headadapt"]["tables"] == {name: values["classes"] for name, values in OTHER.items()}
    moved = classifier(OTHER, seed=3)
    moved.load_state_dict(data["model"])
    assert torch.equal(logits(moved)["light"], logits(load(trained, OTHER)[0])["light"])


def test_a_task_of_another_name_takes_nothing_and_a_file_without_tables_is_unverified(trained: Path) -> None:
    """Tables belong to tasks: two tasks of one list do not share rows."""
    _, checkpointer = load(trained, {"hue": TASKS["colour"], "light": TASKS["light"]})
    assert checkpointer.plan is not None
    actions = {t.name: t.action for t in checkpointer.plan.tensors}
    assert actions["heads.hue.predictor.weight"] == "initialised"
    assert actions["heads.colour.predictor.weight"] == "dropped"


def test_a_removed_task_is_said_whether_or_not_the_plan_has_a_target_for_it(trained: Path) -> None:
    plan = load(trained, OTHER)[1].plan
    assert plan is not None
    bare = replace(plan, target={name: table for name, table in plan.target.items() if name != "tags"})
    for one in (plan, bare):
        assert "tags classes of the file that are dropped: warm, cold, grey, loud" in plan_table(one)


def test_source_classes_name_the_rows_of_a_file_that_does_not(trained: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare.pth"
    torch.save({"model": read_checkpoint(str(trained))["model"]}, bare)
    tasks = {**TASKS, "colour": {"classes": COLOURS}}
    _, unnamed = load(bare, tasks)
    text = plan_table(unnamed.plan)
    assert "MODEL.TASKS.colour.source_classes" in text and "unverified" in text
    tasks = {**TASKS, "colour": {"classes": COLOURS, "source_classes": TASKS["colour"]["classes"]}}
    model, _ = load(bare, tasks)
    old = read_checkpoint(str(trained))["model"]["heads.colour.predictor.weight"]
    assert torch.equal(model.heads["colour"].predictor.weight[[0, 2]], old[[2, 0]])
    html = plan_html(unnamed.plan)
    assert "MODEL.TASKS.colour.source_classes" in html
    tasks["colour"]["source_classes"] = "none"
    _, fresh = load(bare, tasks)
    assert {t.action for t in fresh.plan.tensors if t.space == "colour"} == {"initialised"}
