"""Two network namespaces are two hosts: nothing of one is reached from the other but through the wire between them.

Each has folders of its own, as two machines without a shared disk have.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers.commands import ROOT
from helpers.datasets import write_coco
from helpers.files import HEAD, save_stock
from helpers.models import names, stock_model, tiny_cfg

from d2_headadapt.checkpoint.provenance import KEY

FIRST = ["class 3", "zebra", "class 0"]
THEN = ["zebra", "emu", "class 3", "class 0"]
PORT = 29511  # Nobody else is in a namespace that was made for one run.
LIMIT = 150.0
"""Seconds after which a run of two processes is ended; it took 25 on a busy machine of two cores."""
TOOL = (ROOT / "tools" / "train_net.py", "--import", Path(__file__).parents[1] / "workers" / "two_hosts_probe.py")


def ip(*arguments: str) -> str:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, timeout=10)
    if done.returncode:
        raise OSError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout


def end(spaces: Sequence[str]) -> None:
    """End whatever runs in a namespace: torchrun's workers are in sessions of their own."""
    for space in spaces:
        with suppress(OSError):
            for pid in ip("netns", "pids", space).split():
                with suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)


@pytest.fixture(scope="module")
def hosts() -> Iterator[list[str]]:
    """The names of two namespaces, 10.77.0.1 and 10.77.0.2, joined by a wire that is called ``wire`` in both."""
    if not sys.platform.startswith("linux") or os.geteuid() != 0:
        pytest.skip("two hosts need Linux and root, for network namespaces")
    if shutil.which("ip") is None:
        pytest.skip("two hosts need the command ip (package iproute2)")
    run = uuid.uuid4().hex[:8]
    spaces = [f"d2ha-{run}-{i}" for i in range(2)]
    try:
        try:
            for space in spaces:
                ip("netns", "add", space)
            ip(*("link", "add", "wire", "netns", spaces[0], "type", "veth"), *("peer", "wire", "netns", spaces[1]))
            for i, space in enumerate(spaces):
                ip("-n", space, "addr", "add", f"10.77.0.{i + 1}/24", "dev", "wire")
                ip("-n", space, "link", "set", "wire", "up")
                ip("-n", space, "link", "set", "lo", "up")
                ip("netns", "exec", space, "true")
        except OSError as error:
            pytest.skip(f"network namespaces cannot be made here: {error}")
        yield spaces
    finally:
        end(spaces)
        for space in spaces:
            with suppress(OSError):
                ip("netns", "del", space)


Start = Callable[[int], tuple[list[Any], list[Any]]]


def through_launch(rank: int) -> tuple[list[Any], list[Any]]:
    """What comes before and after the config: ``--num-machines``."""
    rest = ["--num-gpus", 1, "--num-machines", 2, "--machine-rank", rank, "--dist-url", f"tcp://10.77.0.1:{PORT}"]
    return [*TOOL], rest


def through_torchrun(rank: int) -> tuple[list[Any], list[Any]]:
    """The same with ``torchrun``."""
    start = ["-m", "torch.distributed.run", "--nnodes", 2, "--node-rank", rank, "--nproc-per-node", 1]
    return [*start, "--master-addr", "10.77.0.1", "--master-port", PORT, *TOOL], []


def both(hosts: Sequence[str], folder: Path, start: Start, *options: Any) -> list[dict[str, Any]]:
    """Run the tool on both hosts at once, ``host0`` and ``host1`` of ``folder``, and read what each ended with."""
    started: list[subprocess.Popen[bytes]] = []
    logs = [folder / f"host{rank}" / "said.txt" for rank in range(2)]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")])),
        "PYTHONWARNINGS": "ignore",
        "GLOO_SOCKET_IFNAME": "wire",
        "CUDA_VISIBLE_DEVICES": "",
    }
    deadline = time.monotonic() + LIMIT
    try:
        for rank, host in enumerate(hosts):
            before, after = start(rank)
            config = ["--config-file", folder / f"host{rank}" / "c.yaml"]
            command = ["ip", "netns", "exec", host, sys.executable, *before, *config, *after, *options]
            with logs[rank].open("w") as log:
                started.append(
                    subprocess.Popen(
                        list(map(str, command)),
                        cwd=folder / f"host{rank}",
                        env=environment,
                        stdin=subprocess.DEVNULL,
                        stdout=log,
                        stderr=subprocess.STDOUT,
                    )
                )
        codes = [process.wait(max(deadline - time.monotonic(), 0.1)) for process in started]
    except subprocess.TimeoutExpired:
        codes = [124]
    finally:
        end(hosts)
        for process in started:
            process.kill()
            process.wait(10)
    said = [log.read_text(errors="replace") for log in logs]
    # As in test_ranks.py: torch's own threads, now and then, abort a process that has already finished.
    fine = [
        code == 0 or "terminate called without an active exception" in text
        for code, text in zip(codes, said, strict=False)
    ]
    assert fine == [True, True], f"exit codes {codes}\n" + "\n--- host 1\n".join(text[-2500:] for text in said)
    return [json.loads((folder / f"host{rank}" / "out" / "ended.json").read_text()) for rank in range(2)]


def write_host(folder: Path, classes: Sequence[str], iterations: int) -> None:
    """A yaml and a dataset in ``folder``; the same on each host, but at another place."""
    write_coco(folder, classes, name="data")
    config = yaml.safe_load(tiny_cfg(masks=False).dump())
    entry = {"name": "d2ha_two_hosts", "json": "data.json", "images": "data"}
    config["DATASETS"].update(TRAIN=["d2ha_two_hosts"], TEST=[], REGISTER=[entry])
    config["INPUT"].update(MIN_SIZE_TRAIN=[64], MAX_SIZE_TRAIN=64)
    config["DATALOADER"].update(NUM_WORKERS=0)
    config["SOLVER"].update(IMS_PER_BATCH=2, BASE_LR=1e-4, MAX_ITER=iterations, STEPS=[], WARMUP_ITERS=0)
    config["SOLVER"]["CLIP_GRADIENTS"].update(ENABLED=True, CLIP_TYPE="norm", CLIP_VALUE=0.1)
    config["MODEL"]["WEIGHTS"] = str(folder / "old.pth")
    config["MODEL"]["HEAD_ADAPT"]["SOURCE_CLASSES"] = names(5)
    config["OUTPUT_DIR"] = str(folder / "out")
    (folder / "c.yaml").write_text(yaml.safe_dump(config))


def agree(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert one["network"] != other["network"], "one host only"
    assert [one["rank"], other["rank"]] == [0, 1]
    assert [one["processes"], other["processes"]] == [2, 2]
    assert len(one["weights"]) > 50
    assert one["weights"] == other["weights"]


def test_two_hosts_train_save_resume_with_other_classes_and_end_with_equal_weights(
    hosts: list[str], tmp_path: Path
) -> None:
    """Trained through torchrun, resumed through ``--num-machines``. The weights to start from are on the first host
    alone, which sends them; a resume reads OUTPUT_DIR on each.
    """
    outputs = [tmp_path / f"host{rank}" / "out" for rank in range(2)]
    for rank in range(2):
        write_host(tmp_path / f"host{rank}", FIRST, iterations=2)
    save_stock(stock_model(5, seed=21), tmp_path / "host0" / "old.pth")

    one, other = both(hosts, tmp_path, through_torchrun)
    agree(one, other)
    assert [one["classes"], one["from"]] == [other["classes"], other["from"]] == [3, 0]
    assert torch.load(outputs[0] / "model_final.pth")[KEY]["tables"] == {"thing": FIRST}
    assert not (outputs[1] / "model_final.pth").exists(), "only the first host saves"
    before = one["weights"]

    for rank in range(2):
        write_host(tmp_path / f"host{rank}", THEN, iterations=4)
        (outputs[rank] / "ended.json").unlink()
    for name in ("model_final.pth", "last_checkpoint"):
        shutil.copy(outputs[0] / name, outputs[1] / name)
    one, other = both(hosts, tmp_path, through_launch, "--resume", "MODEL.HEAD_ADAPT.RESUME", "adapt")
    agree(one, other)
    assert [one["classes"], one["from"]] == [other["classes"], other["from"]] == [4, 2]
    assert one["weights"].keys() == before.keys()
    assert one["weights"] != before
    assert "went through the same plan as the weights" in (outputs[0] / "log.txt").read_text()
    stored = torch.load(outputs[0] / "model_final.pth")
    assert stored["iteration"] == 3
    assert stored[KEY]["tables"] == {"thing": THEN}
    assert stored["model"][f"{HEAD}.cls_score.weight"].shape[0] == len(THEN) + 1
