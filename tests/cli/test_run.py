"""``d2-headadapt run``: somebody's training script, unmodified, in one process and in several."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers.repository import CLS, OLD, Repository, shipped


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    return Repository(tmp_path)


def test_a_script_of_somebody_carries_rows_by_name(repository: Repository) -> None:
    ran = repository.run(more=("SOLVER.MAX_ITER", "1"))
    seen = repository.seen()
    assert seen["checkpointer"] == "HeadAdaptCheckpointer" and seen["rows"] == 81
    assert repository.carried() == [True, False, True, True]
    assert seen["argv"] == ["--config-file", "c.yaml", "SOLVER.MAX_ITER", "1"], "its arguments are untouched"
    assert seen["count"] == 80, "its config is its own"
    said = ran.out + ran.err
    assert "mine has 3 thing classes and the script's model 80, which stays: rows 3 to 79 have no name" in said
    dumped = (repository.folder / "out" / "config.yaml").read_text()
    assert "HEAD_ADAPT" not in dumped and "REGISTER" not in dumped, "its config is read without this package too"
    assert seen["own"] == "MyCheckpointer" and "MyCheckpointer is a checkpointer of the script's own and keeps" in said
    assert "2 of 3 thing classes carried" in said
    assert "fitted" not in said, "new rows are solved only when asked"


def test_the_same_script_without_run_is_as_before(repository: Repository) -> None:
    ran = repository.start("their_train.py")
    assert ran.code == 0, ran.err[-2000:]
    seen = repository.seen()
    assert seen["checkpointer"] == "DetectionCheckpointer" and seen["rows"] == 81


def test_every_process_of_a_launch_is_reached(repository: Repository) -> None:
    named = ("--set", "MODEL.HEAD_ADAPT.TARGET_CLASSES", "mine")
    ran = repository.run(*named, more=("--num-gpus", "2"))
    seen = [repository.seen(rank) for rank in (0, 1)]
    assert [one["rows"] for one in seen] == [4, 4], "a model of the classes that are named, whatever its config counts"
    assert "MODEL.ROI_HEADS.NUM_CLASSES was 80, is 3, the classes of mine" in ran.out + ran.err
    assert [one["checkpointer"] for one in seen] == ["HeadAdaptCheckpointer"] * 2
    assert repository.carried(0) == repository.carried(1) == [True, False, True, True]
    assert seen[0]["hash"] == seen[1]["hash"]


def test_a_module_runs_as_with_python_m(repository: Repository) -> None:
    repository.run(script=("-m", "their_train"))
    assert repository.seen()["checkpointer"] == "HeadAdaptCheckpointer"
    assert repository.carried() == [True, False, True, True]


def test_new_rows_are_solved_when_asked(repository: Repository) -> None:
    asked = repository.run("--fit", "--heads")
    assert "fitted 1 of 1 new classes" in asked.out + asked.err


@pytest.mark.parametrize("name", ["train_net.py", "plain_train_net.py"])
def test_detectron2_s_own_scripts(name: str, repository: Repository) -> None:
    script = shipped(name)
    paths = {"json": str(repository.folder / "data.json"), "images": str(repository.folder / "data")}
    entry = json.dumps([{"name": "mine", **paths}])
    ran = repository.run("--fit", "--set", "DATASETS.REGISTER", entry, script=(str(script),))
    plan = json.loads((repository.folder / "out" / "head_adapt_plan.json").read_text())
    carried = {t["name"]: t["carried"] for t in plan["tensors"]}
    assert carried[CLS] == [[0, 3], [2, 0]]
    assert (repository.folder / "out" / "model_final.pth").is_file()
    said = ran.out + ran.err
    assert ("fitted 1 of 1 new classes" in said) == (name == "train_net.py"), "plain_train_net.py has a loop of its own"
    assert ("--fit: no new row was solved" in said) == (name == "plain_train_net.py")


def test_without_a_change_of_classes_nothing_changes(tmp_path: Path) -> None:
    """Bit for bit: the weights after training, and every loss of it."""
    ended: list[tuple[str, list[float]]] = []
    for words in (["their_train.py"], [], ["--heads"]):
        folder = tmp_path / str(len(ended))
        folder.mkdir()
        repository = Repository(folder, OLD, num_classes=len(OLD))
        more = ("SEED", "7", "SOLVER.MAX_ITER", "3")
        ran = repository.start(*words, more=more) if words == ["their_train.py"] else repository.run(*words, more=more)
        assert ran.code == 0, ran.err[-2000:]
        seen = repository.seen()
        assert seen["checkpointer"] == (
            "DetectionCheckpointer" if "their_train.py" in words else "HeadAdaptCheckpointer"
        )
        lines = [json.loads(line) for line in (folder / "out" / "metrics.json").read_text().splitlines()]
        ended.append((seen["hash"], [value for line in lines for key, value in line.items() if "loss" in key]))
    assert len(ended[0][1]) > 3
    assert ended[0] == ended[1] == ended[2]
