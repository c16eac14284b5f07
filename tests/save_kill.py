"""A run that saves without pause is killed at random moments, and must find a whole checkpoint every time.

The suite kills ten times and ``tools/soak.py`` two hundred times. As a program it prints one JSON line:
``python tests/save_kill.py KILLS SEED FOLDER [files|checkpointer|in_place]``.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from d2_headadapt.files import read_checkpoint, write_checkpoint, write_text

Saver = Callable[[str, int], None]
"""``save(folder, iteration)``: a checkpoint whose values all equal ``iteration``, named by ``last_checkpoint``."""

TENSORS, VALUES = 24, 20_000


def save_with_files(folder: str, iteration: int) -> None:
    """Save under a new name, name it, and overwrite another file as ``model_best.pth`` is overwritten."""
    model = {f"layer{index}.weight": torch.full((VALUES,), float(iteration)) for index in range(TENSORS)}
    checkpoint = {"model": model, "iteration": iteration}
    write_checkpoint(os.path.join(folder, f"model_{iteration:07d}.pth"), checkpoint)
    write_text(os.path.join(folder, "last_checkpoint"), f"model_{iteration:07d}.pth")
    write_checkpoint(os.path.join(folder, "model_best.pth"), checkpoint)


def save_with_checkpointer(folder: str, iteration: int) -> None:
    """The same through ``HeadAdaptCheckpointer.save``."""
    from d2_headadapt.checkpoint.checkpointer import HeadAdaptCheckpointer

    model = torch.nn.Module()
    for index in range(TENSORS):
        model.register_buffer(f"weight{index}", torch.full((VALUES,), float(iteration)))
    HeadAdaptCheckpointer(model, folder).save(f"model_{iteration:07d}", iteration=iteration)


def save_in_place(folder: str, iteration: int) -> None:
    """The mutation, and what stock detectron2 does: the file grows under the name that readers look for."""
    model = {f"layer{index}.weight": torch.full((VALUES,), float(iteration)) for index in range(TENSORS)}
    with open(os.path.join(folder, f"model_{iteration:07d}.pth"), "wb") as file:
        torch.save({"model": model, "iteration": iteration}, file)
    with open(os.path.join(folder, "last_checkpoint"), "w", encoding="utf-8") as text:
        text.write(f"model_{iteration:07d}.pth")


SAVERS: dict[str, Saver] = {
    "files": save_with_files,
    "checkpointer": save_with_checkpointer,
    "in_place": save_in_place,
}


def whole(path: Path) -> int:
    """The iteration of a checkpoint all of whose values belong to it.

    Raises:
        ValueError: it mixes two.
        CheckpointFileError: it is not whole.
    """
    checkpoint = read_checkpoint(str(path))
    iteration = int(checkpoint["iteration"])
    for name, tensor in checkpoint["model"].items():
        if not bool((tensor == iteration).all()):
            raise ValueError(f"{path.name}: {name} is not of iteration {iteration}")
    return iteration


def newest(folder: Path) -> int:
    """The iteration that a resumed run starts from, after a look at every checkpoint of the folder; -1 without one."""
    for path in folder.glob("*.pth"):
        whole(path)
    tag = folder / "last_checkpoint"
    if not tag.exists():
        return -1
    return whole(folder / tag.read_text(encoding="utf-8"))


def kill_while_saving(folder: Path, kills: int, seed: int, save: Saver) -> dict[str, int]:
    """Start, kill and resume a saving process ``kills`` times.

    Returns:
        ``kills``; ``while_writing``, how many struck while a file was half written; ``saves`` that survived.

    Raises:
        ValueError: a run found something that is not whole, or older than what an earlier run had found.
    """
    rng = random.Random(seed)
    struck = 0
    last = newest(folder)
    first = last
    for _ in range(kills):
        child, started = _start(folder, last + 1, save)
        os.read(started, 1)
        os.close(started)
        time.sleep(rng.uniform(0, 0.08))
        os.kill(child, signal.SIGSTOP)
        os.waitpid(child, os.WUNTRACED)
        struck += any(folder.glob(".*.tmp")) or writes_unnamed(child, folder)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        found = newest(folder)
        if found < last:
            raise ValueError(f"iteration {last} was saved, and a resumed run finds {found}")
        last = found
        for path in folder.glob("model_0*.pth"):
            if path.name != f"model_{last:07d}.pth":
                path.unlink()
    save(str(folder), last + 1)
    left = [path.name for path in folder.glob(".*.tmp")]
    if left:
        raise ValueError(f"the next save left {', '.join(left)}")
    return {"kills": kills, "while_writing": struck, "saves": last - first}


def writes_unnamed(process: int, folder: Path) -> bool:
    """Whether a stopped process has a file of ``folder`` open that has no name."""
    opened = Path(f"/proc/{process}/fd")
    links = [os.readlink(link) for link in opened.iterdir()] if opened.is_dir() else []
    return any(link.startswith(f"{folder.resolve()}/#") for link in links)


def _start(folder: Path, iteration: int, save: Saver) -> tuple[int, int]:
    """A forked process that saves until it is killed, and the pipe by which it says that it began."""
    receive, send = os.pipe()
    child = os.fork()
    if child:
        os.close(send)
        return child, receive
    try:
        os.write(send, b"x")
        while True:
            save(str(folder), iteration)
            iteration += 1
    finally:
        os._exit(1)  # never back into the parent's code


def main() -> None:
    """Kill and print the counts, or what went wrong."""
    torch.set_num_threads(1)  # a forked process does not have the threads of its parent
    kills, seed, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    save = SAVERS[sys.argv[4] if len(sys.argv) > 4 else "files"]
    save(str(folder), 0)  # whatever is loaded on first use is loaded once, before the forks
    print(json.dumps(kill_while_saving(folder, kills, seed, save)))


if __name__ == "__main__":
    main()
