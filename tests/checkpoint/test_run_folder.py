"""Whose OUTPUT_DIR it is, which checkpoint is its last, and that no run overwrites another's."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.files import logged, texts
from helpers.models import model_of, state_of
from helpers.resume import OLD, cfg_for, train

from d2_headadapt import HeadAdaptCheckpointer
from d2_headadapt.checkpoint.run_folder import checkpoints, claim, release, set_aside, unnoted
from d2_headadapt.engine.train import Trainer
from d2_headadapt.errors import ConfigError

HOLDS = """
import fcntl, os, sys, time
d = os.open(sys.argv[1], os.O_RDONLY)
fcntl.flock(d, fcntl.LOCK_EX)
print("held", flush=True)
time.sleep(600)
"""


def holder(folder: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", HOLDS, str(folder)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


def test_a_second_run_in_the_same_folder_is_refused_until_the_first_has_ended(tmp_path: Path) -> None:
    cfg = cfg_for(tmp_path, OLD, 1)
    folder = Path(cfg.OUTPUT_DIR)
    folder.mkdir()
    first = holder(folder)
    try:
        with pytest.raises(ConfigError) as caught:
            train(Trainer, cfg, resume=False)
        assert str(caught.value) == (
            f"OUTPUT_DIR {folder}: expected a folder in which nobody else trains, found another process that trains "
            "there. Set OUTPUT_DIR to another folder, or wait until that run has ended."
        )
        assert checkpoints(str(folder)) == []
    finally:
        first.send_signal(signal.SIGKILL)
        first.wait()
    train(Trainer, cfg, resume=False)
    assert checkpoints(str(folder)) == ["model_final.pth"]
    # The run has ended, and its process has not.
    holder(folder).kill()


def test_one_process_claims_a_folder_as_often_as_it_likes(tmp_path: Path) -> None:
    for _ in range(2):
        claim(str(tmp_path / "a"))
    release(str(tmp_path / "a"))
    release(str(tmp_path / "a"))
    holder(tmp_path / "a").kill()
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="OUTPUT_DIR: expected a folder, or a place for one"):
        claim(str(tmp_path / "file"))
    claim("s3://bucket/run")


def files(folder: Path, *names: str) -> None:
    """Files of these names, each a second younger than the one before."""
    folder.mkdir(exist_ok=True)
    for i, name in enumerate(names):
        (folder / name).write_bytes(name.encode())
        os.utime(folder / name, (1000 + i, 1000 + i))


@pytest.mark.parametrize(
    ("there", "last", "expected"),
    [
        (["model_0000009.pth", "model_0000019.pth"], "model_0000019.pth", []),
        (["model_0000009.pth", "model_0000019.pth"], "model_0000009.pth", ["model_0000019.pth"]),
        (["model_0000009.pth"], "", ["model_0000009.pth"]),
        # Copied in another order: numbers count.
        (["model_0000019.pth", "model_0000009.pth"], "model_0000019.pth", []),
        (["model_0000019.pth", "model_0000009.pth"], "model_0000009.pth", ["model_0000019.pth"]),
        (["model_0000019.pth", "model_final.pth"], "model_0000019.pth", ["model_final.pth"]),
        (["model_0000019.pth", "model_final.pth"], "model_final.pth", []),
        # A finished run that went on.
        (["model_final.pth", "model_0000029.pth"], "model_0000029.pth", []),
        (["model_final.pth", "model_0000029.pth"], "model_final.pth", ["model_0000029.pth"]),
        (["model_best.pth", "other.pth", "model_0000009.safetensors"], "", []),
        (["model_0000009.pth"], "gone.pth", []),
    ],
)
def test_what_is_newer_than_the_note(tmp_path: Path, there: list[str], last: str, expected: list[str]) -> None:
    files(tmp_path / "run", *there)
    assert unnoted(str(tmp_path / "run"), str(tmp_path / "run" / last) if last else "") == expected


def test_what_is_set_aside_is_whole_and_never_in_the_way_of_another(tmp_path: Path) -> None:
    for number in (1, 2, 3):
        files(tmp_path, "model_final.pth", "last_checkpoint")
        assert set_aside(str(tmp_path), ["model_final.pth"], note=True) == str(tmp_path / f"earlier_{number}")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["earlier_1", "earlier_2", "earlier_3"]
    assert all((p / "model_final.pth").read_text() == "model_final.pth" for p in tmp_path.iterdir())


def test_a_new_run_keeps_the_checkpoints_of_the_one_before(tmp_path: Path) -> None:
    first = train(Trainer, cfg_for(tmp_path, OLD, 1), resume=False)
    kept = (tmp_path / "out" / "model_final.pth").read_bytes()
    cfg = cfg_for(tmp_path, OLD, 2).clone()
    cfg.defrost()
    cfg.MODEL.WEIGHTS = str(tmp_path / "out" / "model_final.pth")
    cfg.freeze()
    with logged("d2_headadapt") as said:
        train(Trainer, cfg, resume=False)
    place = tmp_path / "out" / "earlier_1"
    assert f"model_final.pth of an earlier run would be overwritten: now in {place}." in texts(said)
    assert (place / "model_final.pth").read_bytes() == kept
    assert (place / "last_checkpoint").read_text() == "model_final.pth"
    with logged("d2_headadapt") as said:
        train(Trainer, cfg_for(tmp_path, OLD, 3), resume=True)
    assert "earlier run" not in texts(said), "a run that goes on is no other run"
    assert first.iter == 1


def saved(folder: Path) -> HeadAdaptCheckpointer:
    folder.mkdir(exist_ok=True)
    checkpointer = HeadAdaptCheckpointer(model_of(OLD, seed=1), str(folder), save_to_disk=True)
    checkpointer.save("model_0000009")
    return checkpointer


def test_a_run_that_was_stopped_before_the_note_was_written_is_said(tmp_path: Path) -> None:
    note = tmp_path / "last_checkpoint"
    checkpointer = saved(tmp_path)
    note.unlink()
    with logged("d2_headadapt") as said:
        checkpointer.resume_or_load("", resume=True)
    line = (
        f"{note} {{found}}, but {{name}} lies beside it: that run was stopped before it was noted. Starting from "
        f"{{start}}; to go on from it instead, type: printf {{name}} > {note}"
    )
    start = "the model's initial values"
    assert line.format(found="is not there", name="model_0000009.pth", start=start) in texts(said)
    # As typed.
    subprocess.run(texts(said).partition("type: ")[2].splitlines()[0], shell=True, check=True)
    checkpointer.save("model_0000019")
    note.write_text("model_0000009.pth")
    with logged("d2_headadapt") as said:
        checkpointer.resume_or_load("", resume=True)
    start = str(tmp_path / "model_0000009.pth")
    assert line.format(found="names model_0000009.pth", name="model_0000019.pth", start=start) in texts(said)
    with logged("d2_headadapt") as said:
        checkpointer.resume_or_load("", resume=False)
    assert "stopped" not in texts(said)


def test_a_folder_that_was_moved_goes_on(tmp_path: Path) -> None:
    old = saved(tmp_path / "before")
    note = tmp_path / "before" / "last_checkpoint"
    note.write_text(str(tmp_path / "before" / "model_0000009.pth"))
    (tmp_path / "before").rename(tmp_path / "after")
    new = HeadAdaptCheckpointer(model_of(OLD, seed=2), str(tmp_path / "after"))
    with logged("d2_headadapt") as said:
        new.resume_or_load("", resume=True)
    assert (
        f"{tmp_path / 'before' / 'model_0000009.pth'}, which last_checkpoint names, is not there: taking "
        f"{tmp_path / 'after' / 'model_0000009.pth'}."
    ) in texts(said)
    for name, value in state_of(old.model).items():
        assert torch.equal(new.model.state_dict()[name], value)
