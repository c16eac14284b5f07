"""What this package logs is shown once, whatever a script set up: nothing, detectron2's logger, the root's, or ours."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from detectron2.utils.logger import setup_logger
from helpers.commands import Ran, fresh_loggers, python
from helpers.models import model_of

from d2_headadapt import said
from d2_headadapt.checkpoint.checkpointer import HeadAdaptCheckpointer

ANIMALS = ["cat", "dog", "emu", "fox", "gnu"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("said")
    torch.save({"model": model_of(ANIMALS).state_dict()}, made / "five.pth")
    HeadAdaptCheckpointer(model_of(ANIMALS), str(made), save_to_disk=True).save("own")
    return made


LOAD = """
import logging, sys
sys.path.insert(0, {helpers!r})
from helpers.models import model_of
from detectron2.utils.logger import setup_logger
from detectron2.utils import comm
from d2_headadapt import HeadAdaptCheckpointer
{setup}
model = model_of(["gnu", "owl"], num_classes=2)
{late}
HeadAdaptCheckpointer(model).load(sys.argv[1])
"""
HELPERS = str(Path(__file__).parent)


def loaded(setup: str, folder: Path, file: str = "own.pth", late: str = "") -> Ran:
    (folder / "script.py").write_text(LOAD.format(helpers=HELPERS, setup=setup, late=late))
    return python("script.py", file, cwd=folder)


@pytest.mark.parametrize(
    ("setup", "late"),
    [
        ("", ""),
        ("setup_logger()", ""),
        ("setup_logger(); setup_logger(name='fvcore'); setup_logger(name='d2_headadapt')", ""),
        ("setup_logger(); logging.basicConfig(level=logging.INFO, stream=sys.stdout)", ""),
        ("", "setup_logger(name='d2_headadapt')"),
        ("setup_logger('out')", "setup_logger('out', name='fvcore')"),
    ],
)
def test_the_plan_is_shown_once(setup: str, late: str, folder: Path) -> None:
    ran = loaded(setup, folder, late=late)
    assert ran.code == 0, ran.err
    assert (ran.out + ran.err).count("1 of 2 thing classes carried") == 1
    assert (ran.out + ran.err).count("Plan of own.pth") == 1


def test_a_script_that_asks_for_warnings_only_gets_those(folder: Path) -> None:
    quiet = loaded("logging.basicConfig(level=logging.WARNING)", folder)
    assert quiet.code == 0 and "Plan of" not in quiet.out + quiet.err
    ran = loaded("logging.basicConfig(level=logging.WARNING)", folder, "five.pth")
    (line,) = [line for line in ran.err.splitlines() if line.startswith("WARNING:")]
    assert "discarded: 4 tensors of roi_heads keep the model's initial values" in line
    key = "MODEL.HEAD_ADAPT.SOURCE_CLASSES"
    assert line.endswith(
        f"the classes of the file are unknown: set {key}; type: {key} names.txt (or a dataset, vocabulary, .json file "
        "or list of names; the shapes of the file hold 5)"
    )


@pytest.mark.parametrize("before", [lambda: None, lambda: setup_logger(name=said.NAME), lambda: said.be_heard()])
def test_a_run_s_folder_gets_every_line_and_the_screen_each_once(
    before: Callable[[], object], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A script, a notebook's second run and our commands all set up the same logger."""
    with fresh_loggers():
        before()
        said.log_to(str(tmp_path / "a"), 0)
        said.log_to(str(tmp_path / "b"), 0)
        logging.getLogger(f"{said.NAME}.any").info("one line")
        assert capsys.readouterr().out.count("one line") == 1
        for name in "ab":
            assert (tmp_path / name / "log.txt").read_text().count("one line") == 1
