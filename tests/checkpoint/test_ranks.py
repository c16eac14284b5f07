"""After a load every rank holds the same tensors, whatever its seed; real processes, gloo."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from d2_headadapt.adapt.registry import unregister_head_layout
from d2_headadapt.checkpoint.ranks import agree, digest
from d2_headadapt.errors import HeadAdaptError, RankError

WORKER = Path(__file__).parents[1] / "workers" / "rank_worker.py"
ROOT = Path(__file__).parents[2]


Job = Callable[[str], list[str]]


@pytest.fixture(scope="module", params=[(2, "launch"), (4, "forked"), (2, "torchrun")], ids=lambda p: f"{p[0]} {p[1]}")
def job(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Job:
    """What each rank wrote in a scenario; one job runs them all, because starting processes is what takes long."""
    processes, through = request.param
    folder = tmp_path_factory.mktemp("ranks")
    # The worker's own network makes the files; running it as a module here does not start the job.
    worker = runpy.run_path(str(WORKER), run_name="worker")
    try:
        for name, seed in (("shared", 1), ("rank0", 1), ("rank1", 2)):
            worker["write_file"](str(folder / f"{name}.pth"), seed)
    finally:
        unregister_head_layout("cls.*")
    (folder / "broken.pth").write_bytes(b"not a checkpoint")
    start = [sys.executable]
    if through == "torchrun":
        start += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    command = [*start, str(WORKER), through, str(processes), str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    # Once in some thirty runs on a loaded machine, torch's own threads aborted a process that had already finished.
    aborted_at_exit = "terminate called without an active exception" in done.stderr
    assert done.returncode == 0 or aborted_at_exit, done.stderr[-3000:]
    return lambda scenario: [(folder / f"{scenario} {rank}.txt").read_text() for rank in range(processes)]


def test_all_ranks_hold_the_same_tensors_whatever_their_seeds(job: Job) -> None:
    texts = job("same file")
    assert len(texts[0].split()) > 2 and texts[0].startswith("loaded ") and len(set(texts)) == 1


def test_without_the_broadcast_of_new_rows_the_comparison_names_rank_and_tensor(job: Job) -> None:
    """A mutation of the law above."""
    for text in job("mutation"):
        assert text.startswith("RankError added.weight on rank 1: expected the tensor of rank 0")
        assert text.endswith("model unchanged")


def test_a_file_that_only_rank_zero_has_reaches_the_others(job: Job) -> None:
    texts = job("only on rank 0")
    assert texts == job("same file")


def test_carried_rows_that_differ_are_an_error_on_every_rank(job: Job) -> None:
    for text in job("different files"):
        assert text.startswith("RankError body.weight on rank 1") and "The ranks read different files" in text
        assert text.endswith("model unchanged")


def test_a_file_that_one_rank_cannot_read_changes_no_rank(job: Job) -> None:
    texts = job("broken on rank 1")
    assert texts[1].startswith("CheckpointFileError") and "broken.pth" in texts[1]
    for text in texts[:1] + texts[2:]:
        assert text.startswith("RankError") and "an error on rank 1" in text and "Nothing was loaded" in text
    assert all(text.endswith("model unchanged") for text in texts)


def test_a_file_that_nobody_has_is_said_on_every_rank(job: Job) -> None:
    for text in job("nowhere"):
        assert "nowhere.pth" in text and "none on any rank" in text and text.endswith("model unchanged")


def test_one_process_just_raises_its_own_error() -> None:
    agree(None, "f.pth")
    error = HeadAdaptError("f.pth", expected="a", found="b", fix="c")
    with pytest.raises(HeadAdaptError) as caught:
        agree(error, "f.pth")
    assert caught.value is error and not isinstance(error, RankError)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_digests_tell_values_shapes_and_types_apart(dtype: torch.dtype) -> None:
    value = torch.ones(2, 3, dtype=dtype)
    other = value.clone()
    other[1, 2] = 0
    seen = {digest(value), digest(other), digest(value.reshape(3, 2)), digest(value.to(torch.float64))}
    assert len(seen) == 4 and digest(value.t().contiguous().t()) == digest(value)
