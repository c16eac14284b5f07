"""What ``python`` and ``torchrun`` do with a script, ``run`` does: arguments, paths, packages, exits; and mistakes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers.commands import cli
from helpers.repository import SOURCE, Repository, adopted

from d2_headadapt.cli.run import checkpointers
from d2_headadapt.cli.run.checkpointers import _say_torchrun_alone

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
PACKAGE = """
import json
import sys

from detectron2.checkpoint import DetectionCheckpointer
from torch import multiprocessing, nn

from .part import NUMBER


def work(rank, number):
    made = DetectionCheckpointer(nn.Linear(1, 1))
    with open(f"worked_{rank}.json", "w") as f:
        json.dump([type(made).__name__, number, NUMBER, __name__, sys.argv[1:]], f)


if __name__ == "__main__":
    multiprocessing.spawn(work, args=(7,), nprocs=2)
    sys.exit(3)
"""
FAILS = """
import sys

from detectron2.config import get_cfg
from detectron2.engine import launch


def main(how):
    if how == "theirs":
        raise RuntimeError("a mistake of the script")
    cfg = get_cfg()
    cfg.DATASETS.REGISTER = [{"name": "x", "json": "nowhere.json", "images": "."}]
    cfg.merge_from_list(["SEED", 1])


if __name__ == "__main__":
    launch(main, int(sys.argv[2]), dist_url="auto", args=(sys.argv[1],))
"""


def test_torchrun_starts_the_processes(tmp_path: Path) -> None:
    repository = Repository(tmp_path)
    joins = "import torch.distributed as dist\ndist.init_process_group('gloo')\n"
    joins += "from detectron2.utils import comm\ncomm.create_local_process_group(2)\n"
    script = repository.folder / "their_train.py"
    script.write_text(script.read_text().replace("    cfg = get_cfg()", f"    exec({joins!r})\n    cfg = get_cfg()"))
    ran = adopted(*SOURCE, "their_train.py", "--config-file", "c.yaml", cwd=tmp_path, under=TORCHRUN)
    assert ran.code == 0, ran.err[-3000:]
    seen = [repository.seen(rank) for rank in (0, 1)]
    assert [one["checkpointer"] for one in seen] == ["HeadAdaptCheckpointer"] * 2
    assert repository.carried(0) == repository.carried(1) == [True, False, True, True]
    assert seen[0]["hash"] == seen[1]["hash"]
    assert "but the script did not join them" not in ran.out + ran.err


def test_processes_of_torchrun_that_do_not_meet_are_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """detectron2's launch starts one process in each of them, as it does without this package."""
    told: list[str] = []
    # Not by what is logged: how often a record is handled depends on the loggers that other tests set up.
    monkeypatch.setattr(checkpointers.logger, "warning", lambda text, *_: told.append(text))
    _say_torchrun_alone.cache_clear()
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setenv("WORLD_SIZE", "2")
    for _ in range(2):
        _say_torchrun_alone()
    _say_torchrun_alone.cache_clear()
    (text,) = told
    assert "the script did not join them" in text


def test_a_package_with_relative_imports_and_processes_of_its_own(tmp_path: Path) -> None:
    """Functions of ``__main__`` are found again in the processes; the script's exit code is the command's."""
    package = tmp_path / "theirs"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "part.py").write_text("NUMBER = 5\n")
    (package / "train.py").write_text(PACKAGE)
    ran = adopted("-m", "theirs.train", "--fit", "--", "-m", "x", cwd=tmp_path)
    assert ran.code == 3, ran.err[-3000:]
    for rank in (0, 1):
        name, number, constant, module, arguments = json.loads((tmp_path / f"worked_{rank}.json").read_text())
        assert (name, number, constant, module) == ("HeadAdaptCheckpointer", 7, 5, "__mp_main__")
        assert arguments == ["--fit", "--", "-m", "x"], "its arguments are untouched"


def test_a_mistake_of_the_user_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "fails.py").write_text(FAILS)
    ran = adopted("fails.py", "ours", 2, cwd=tmp_path)
    assert ran.code == 1
    assert "Traceback" not in ran.err
    assert ran.err.count("error: DATASETS.REGISTER[0] ('x').json: expected a file, found ") == 1
    assert ran.err.splitlines()[-1].endswith("starts at the folder of the yaml that holds the entry.")


def test_a_mistake_of_the_script_is_a_traceback(tmp_path: Path) -> None:
    (tmp_path / "fails.py").write_text(FAILS)
    ran = adopted("fails.py", "theirs", 2, cwd=tmp_path)
    assert ran.code == 1
    assert "RuntimeError: a mistake of the script" in ran.err
    assert 'fails.py", line 10, in main' in ran.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nothing.py"], "d2-headadapt run: expected a Python script, found no file 'nothing.py'"),
        (["-m", "no_such.module"], "d2-headadapt run -m: expected a module that python -m can run, found no module"),
        (["-m", "json"], "d2-headadapt run -m: expected a module that python -m can run, found no module 'json'"),
        ([], "d2-headadapt run: expected a script, found none"),
    ],
)
def test_what_cannot_be_run_is_one_line(words: list[str], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.path", ["", *__import__("sys").path])
    ran = cli("run", *words)
    assert ran.code == 2
    assert ran.complaint.startswith(f"error: {message}") and ran.complaint.count("\n") == 1


def test_a_wrong_default_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "fails.py").write_text(FAILS)
    ran = adopted("--set", "MODEL.HEAD_ADAPT.SOURCE_CLASES", "coco", "fails.py", "theirs", 1, cwd=tmp_path)
    assert ran.code == 1
    assert ran.complaint.startswith(
        "error: --set: expected a config key that exists, found MODEL.HEAD_ADAPT.SOURCE_CLASES."
    )
    assert "Nearest: 'MODEL.HEAD_ADAPT.SOURCE_CLASSES'" in ran.complaint and ran.complaint.count("\n") == 1
