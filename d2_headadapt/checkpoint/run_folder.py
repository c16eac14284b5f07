"""The folder of a run (``OUTPUT_DIR``): which checkpoint is its last, whose it is, and what must not be overwritten."""

from __future__ import annotations

import os
import re

from ..errors import ConfigError
from ..key import OUTPUT_DIR

try:
    import fcntl
except ImportError:  # Not on Windows.
    fcntl = None  # type: ignore[assignment]

EARLIER = "earlier_{}"
NAME = re.compile(r"model_(\d+|final)\.pth")

_claimed: dict[str, int] = {}
"""Folder -> its descriptor, which is locked; the system lets go of it however the process ends."""


def claim(folder: str) -> None:
    """Make a folder that of this process's run, until :func:`release` or the process's end.

    Args:
        folder: ``OUTPUT_DIR``; an address is not claimed.

    Raises:
        ConfigError: another process trains there, or it is no folder.
    """
    place = os.path.realpath(folder)
    if "://" in folder or place in _claimed or fcntl is None:
        return
    try:
        os.makedirs(place, exist_ok=True)
        descriptor = os.open(place, os.O_RDONLY)
    except OSError as exc:
        raise ConfigError(
            OUTPUT_DIR, expected="a folder, or a place for one", found=str(exc), fix="Name another folder."
        ) from exc
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as exc:
        os.close(descriptor)
        raise ConfigError(
            f"{OUTPUT_DIR} {folder}",
            expected="a folder in which nobody else trains",
            found="another process that trains there",
            fix=f"Set {OUTPUT_DIR} to another folder, or wait until that run has ended.",
        ) from exc
    except OSError:
        # Some network file systems have no locks: there it is as with stock detectron2.
        os.close(descriptor)
        return
    _claimed[place] = descriptor


def release(folder: str) -> None:
    """Let go of a folder that this process claimed."""
    descriptor = _claimed.pop(os.path.realpath(folder), None)
    if descriptor is not None:
        os.close(descriptor)


def checkpoints(folder: str) -> list[str]:
    """List the checkpoints that a run has written into a local folder, in the order of their iterations."""
    if "://" in folder or not os.path.isdir(folder):
        return []
    return sorted((name for name in os.listdir(folder) if NAME.fullmatch(name)), key=_iteration)


def _iteration(name: str) -> float:
    found = NAME.fullmatch(name)
    return int(found[1]) if found is not None and found[1].isdigit() else float("inf")


def unnoted(folder: str, last: str) -> list[str]:
    """List the checkpoints that are newer than the one that ``last_checkpoint`` names, or all where it names none.

    A run that is stopped between the writing of a checkpoint and of ``last_checkpoint`` leaves one.

    Args:
        folder: of the run.
        last: the path that ``last_checkpoint`` names; empty where there is no such note.
    """
    names = checkpoints(folder)
    if not last or not os.path.isfile(last):
        return names if not last else []
    written = os.stat(last).st_mtime_ns
    mine = _iteration(os.path.basename(last))
    return [
        name
        for name in names
        if name != os.path.basename(last)
        and (mine < _iteration(name) < float("inf") or os.stat(os.path.join(folder, name)).st_mtime_ns > written)
        and not _iteration(name) < mine < float("inf")
    ]


def set_aside(folder: str, names: list[str], *, note: bool) -> str:
    """Move checkpoints that a new run would overwrite into a folder beside them.

    Args:
        folder: of the run.
        names: of the checkpoints.
        note: also ``last_checkpoint``, which names one of them.

    Returns:
        The folder that they are in now.
    """
    number = next(n for n in range(1, 10**6) if not os.path.exists(os.path.join(folder, EARLIER.format(n))))
    place = os.path.join(folder, EARLIER.format(number))
    os.mkdir(place)
    for name in [*names, *(["last_checkpoint"] if note else [])]:
        if os.path.exists(os.path.join(folder, name)):
            os.rename(os.path.join(folder, name), os.path.join(place, name))
    return place
