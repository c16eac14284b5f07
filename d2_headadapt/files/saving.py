"""Writing files so that a reader finds the old one or the new one, and never half of either.

A file is written under ``.NAME.HOST.PID-N.tmp`` beside its target, flushed to the disk, and renamed. What a killed
process leaves under such a name is never taken for a checkpoint, and the next write to that folder removes it.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import pickle
import platform
import re
import shlex
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import numpy as np
import torch

from ..errors import CheckpointFileError
from . import safetensor_files

EXTENSIONS = (".pth", ".safetensors")

_HOST = re.sub(r"[^A-Za-z0-9-]", "-", platform.node())[:32] or "host"
_LEFTOVER = re.compile(r"\..+\.(?P<host>[A-Za-z0-9-]+)\.(?P<pid>\d+)-\d+\.tmp")
_FOREIGN_AGE = 24 * 3600.0
"""Seconds after which a leftover of another machine, whose processes cannot be asked, counts as stale."""

_SAVE_ERRORS = (OSError, RuntimeError, ValueError, TypeError, AttributeError, pickle.PicklingError)
_in_progress: set[str] = set()
_numbers = itertools.count()  # two threads may save to one name


def write_checkpoint(path: str, checkpoint: Mapping[str, Any]) -> list[str]:
    """Write ``checkpoint`` to ``path`` as its extension says, whole or not at all.

    Args:
        path: a local path that ends in ``.pth`` or ``.safetensors``.
        checkpoint: stock detectron2's form; ``model`` may hold numpy arrays.

    Returns:
        The top-level keys that were left out: a ``.safetensors`` file holds ``model`` and ``d2_headadapt`` only.

    Raises:
        CheckpointFileError: it cannot be written; the file that was there before is unchanged.
    """
    model = checkpoint.get("model")
    if not isinstance(model, Mapping):
        _refuse(path, "a checkpoint with 'model'", type(model).__name__, "Save {'model': model.state_dict()}.")
    if any(isinstance(value, np.ndarray) for value in model.values()):
        model = {name: _as_tensor(value) for name, value in model.items()}
    if path.endswith(".safetensors"):
        for name, value in model.items():
            if not isinstance(name, str) or not isinstance(value, torch.Tensor):
                found = f"{type(value).__name__} under {str(name)[:80]!r}"
                _refuse(path, "names and tensors in 'model'", found, "Save it as .pth.")
        provenance = checkpoint.get("d2_headadapt")
        replace_file(path, lambda temporary: safetensor_files.write(temporary, model, provenance))
        return [key for key in checkpoint if key not in ("model", "d2_headadapt")]
    content = {**checkpoint, "model": model}

    def write(temporary: str) -> None:
        # An open file, not a path: torch names the archive's root after the path.
        with open(temporary, "wb") as file:
            torch.save(content, file)

    replace_file(path, write)
    return []


def write_text(path: str, text: str) -> None:
    """Write ``text`` to ``path``, whole or not at all."""

    def write(temporary: str) -> None:
        with open(temporary, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)

    replace_file(path, write)


def existing_output(path: str, *, force: bool, inputs: Sequence[str], endings: Sequence[str] = EXTENSIONS) -> None:
    """Refuse an output that would overwrite something, or that nothing could read.

    Args:
        path: what would be written.
        force: an existing file may be replaced.
        inputs: files that are being read; the output may be none of them, whatever ``force`` says.
        endings: that its name may have; those of a checkpoint by default.

    Raises:
        CheckpointFileError: with what to type instead.
    """
    folder = os.path.dirname(path) or "."
    if not path.endswith(tuple(endings)):
        _refuse(path, f"a file name that ends in {' or '.join(endings)}", "another ending", "Rename the output.")
    if not os.path.isdir(folder):
        _refuse(
            path, "an existing output folder", f"no folder {folder!r}", f"Make it first: mkdir -p {shlex.quote(folder)}"
        )
    if os.path.isdir(path):
        _refuse(path, "a file name", "a folder", "Name a file inside it.")
    for name in inputs:
        if os.path.realpath(name) == os.path.realpath(path) or _same_file(name, path):
            _refuse(path, "an output that is not the input", f"the same file as {name}", "Name another output.")
    if os.path.lexists(path) and not force:
        _refuse(path, "an output that does not exist yet", "a file", "Name another output, or add --force.")


def _same_file(one: str, other: str) -> bool:
    # Two hard links have different paths and are still one file.
    return os.path.exists(one) and os.path.exists(other) and os.path.samefile(one, other)


def _refuse(where: str, expected: str, found: str, fix: str) -> NoReturn:
    raise CheckpointFileError(where, expected=expected, found=found, fix=fix)


def _as_tensor(value: Any) -> Any:
    if isinstance(value, np.ndarray) and value.dtype.kind in "biufc":
        return torch.from_numpy(np.array(value, value.dtype.newbyteorder("=")))
    return value


def replace_file(path: str, write: Callable[[str], None]) -> None:
    """Put what ``write`` writes in the place of ``path``, whole or not at all.

    Args:
        path: a local path; a file that is there keeps its mode.
        write: called with the name of a temporary file in the same folder.

    Raises:
        CheckpointFileError: it cannot be written; the file that was there before is unchanged.
    """
    # Through a link: the file it points to is what the user means to replace.
    target = os.path.realpath(path)
    folder, name = os.path.split(target)
    temporary = os.path.join(folder, f".{name}.{_HOST}.{os.getpid()}-{next(_numbers)}.tmp")
    try:
        _remove_leftovers(folder)
        _in_progress.add(temporary)
        write(temporary)
        if os.path.exists(target):
            shutil.copymode(target, temporary)
        _sync(temporary)
        os.replace(temporary, target)
        with contextlib.suppress(OSError):  # some network file systems cannot sync a folder
            _sync(folder)
    except CheckpointFileError:
        raise
    except _SAVE_ERRORS as error:
        raise unwritable(path, error) from error
    finally:
        _in_progress.discard(temporary)
        with contextlib.suppress(OSError):  # gone after a success
            os.unlink(temporary)


def is_full(error: BaseException) -> bool:
    """Whether an error says that the disk, or the user's share of it, is full."""
    full = (errno.ENOSPC, errno.EDQUOT)
    return isinstance(error, OSError) and (error.errno in full or os.strerror(errno.ENOSPC) in str(error))


def unwritable(path: str, error: BaseException) -> CheckpointFileError:
    """The error for a file that was not written.

    Args:
        path: the file, or where only that is known its folder.
        error: what was raised.
    """
    folder = path if os.path.isdir(path) else os.path.dirname(os.path.realpath(path))
    text = f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else 'no reason given'}"
    # torch's writer says that it failed, and not why.
    of_writer = "failed writing" in str(error) or "fail at" in str(error)
    if not os.path.isdir(folder):
        fix = f"Make the folder first: mkdir -p {shlex.quote(folder)}"
    elif is_full(error) or (of_writer and shutil.disk_usage(folder).free < 2**20):
        free = shutil.disk_usage(folder).free
        found = f"No space left on device, the disk of {folder}: it was not written"
        fix = f"Nothing was changed. Free some space there ({free / 2**20:,.0f} MiB free), or name another folder."
        return CheckpointFileError(path, expected="space for the file", found=found, fix=fix)
    elif isinstance(error, OSError) or of_writer:
        free = shutil.disk_usage(folder).free
        fix = f"Nothing was changed. Look at the folder's rights and space ({free / 2**20:,.0f} MiB free)."
    else:
        fix = "Nothing was changed. Save tensors, numbers, text, lists and dicts only."
    return CheckpointFileError(path, expected="a file that can be written", found=text, fix=fix)


def _sync(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove_leftovers(folder: str) -> None:
    for name in os.listdir(folder):
        match = _LEFTOVER.fullmatch(name)
        path = os.path.join(folder, name)
        if match and path not in _in_progress and _is_stale(path, match["host"], int(match["pid"])):
            with contextlib.suppress(OSError):  # another process may have been quicker
                os.unlink(path)


def _is_stale(path: str, host: str, pid: int) -> bool:
    if host != _HOST:
        with contextlib.suppress(OSError):
            return time.time() - os.path.getmtime(path) > _FOREIGN_AGE
        return False
    # Our own number without a write in progress: in a container every training has the same one.
    if pid == os.getpid():
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except (PermissionError, OverflowError):
        return False
    return False
