"""Write files so that a reader finds the old one or the new one, and never half of either.

A file is written without a name, flushed to the disk, named ``.NAME.HOST.PID-N.tmp`` beside its target, and renamed.
A killed process leaves nothing; where the file system has no files without names, what it leaves under such a name is
never taken for a checkpoint, and the next write to that folder removes it.
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
from typing import IO, Any, NoReturn

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


def write_checkpoint(path: str, checkpoint: Mapping[str, Any], *, exclusive: bool = False) -> list[str]:
    """Write ``checkpoint`` to ``path`` as its extension says, whole or not at all.

    Args:
        path: a local path that ends in ``.pth`` or ``.safetensors``.
        checkpoint: stock detectron2's form; ``model`` may hold numpy arrays.
        exclusive: as in :func:`replace_file`.

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
            if value.dtype not in safetensor_files.TYPES:
                _refuse(path, "numbers that the format has", f"{value.dtype} under {name[:80]!r}", "Save it as .pth.")
        provenance = checkpoint.get("d2_headadapt")
        replace_file(path, lambda file: safetensor_files.write(file, model, provenance), exclusive=exclusive)
        return [key for key in checkpoint if key not in ("model", "d2_headadapt")]
    content = {**checkpoint, "model": model}
    replace_file(path, lambda file: torch.save(content, file), exclusive=exclusive)
    return []


def write_text(path: str, text: str, *, exclusive: bool = False) -> None:
    """Write ``text`` to ``path``, whole or not at all; ``exclusive`` as in :func:`replace_file`."""
    replace_file(path, lambda file: file.write(text.encode()), exclusive=exclusive)


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
        if os.path.realpath(name) == os.path.realpath(path) or is_same_file(name, path):
            _refuse(path, "an output that is not the input", f"the same file as {name}", "Name another output.")
    if os.path.lexists(path) and not force:
        _refuse(path, "an output that does not exist yet", "a file", "Name another output, or add --force.")


def is_same_file(one: str, other: str) -> bool:
    """Tell whether two paths lead to one existing file; two hard links have different paths and are one file."""
    return os.path.exists(one) and os.path.exists(other) and os.path.samefile(one, other)


def _refuse(where: str, expected: str, found: str, fix: str) -> NoReturn:
    raise CheckpointFileError(where, expected=expected, found=found, fix=fix)


def _as_tensor(value: Any) -> Any:
    if isinstance(value, np.ndarray) and value.dtype.kind in "biufc":
        return torch.from_numpy(np.array(value, value.dtype.newbyteorder("=")))
    return value


def replace_file(path: str, write: Callable[[IO[bytes]], object], *, exclusive: bool = False) -> None:
    """Put what ``write`` writes in the place of ``path``, whole or not at all.

    Args:
        path: a local path; a file that is there keeps its mode.
        write: called with an open temporary file in the same folder.
        exclusive: ``path`` must not be there yet, not even once the writing is done.

    Raises:
        CheckpointFileError: it cannot be written; the file that was there before is unchanged.
    """
    # Through a link: the file it points to is what the user means to replace.
    target = os.path.realpath(path)
    folder, name = os.path.split(target)
    if os.path.exists(target) and not os.path.isfile(target):
        found = "a folder" if os.path.isdir(target) else "a device or a pipe"
        _refuse(path, "a file that can be written", found, "Name another file.")
    temporary = os.path.join(folder, f".{name}.{_HOST}.{os.getpid()}-{next(_numbers)}.tmp")
    try:
        _remove_leftovers(folder)
        _in_progress.add(temporary)
        with _new_file(folder, temporary) as file:
            write(file)
            file.flush()
            if os.path.exists(target):
                os.chmod(file.fileno(), os.stat(target).st_mode & 0o7777)
            os.fsync(file.fileno())
            if not os.path.exists(temporary):
                _name(file, temporary)
        if exclusive:
            _claim(temporary, target)
        os.replace(temporary, target)
        with contextlib.suppress(OSError):  # some network file systems cannot sync a folder
            _sync(folder)
    except CheckpointFileError:
        raise
    except FileExistsError:
        found = "a file, written since this command began"
        _refuse(path, "an output that does not exist yet", found, "Name another output, or add --force.")
    except _SAVE_ERRORS as error:
        raise unwritable(path, error) from error
    finally:
        _in_progress.discard(temporary)
        with contextlib.suppress(OSError):  # gone after a success
            os.unlink(temporary)


def _new_file(folder: str, temporary: str) -> IO[bytes]:
    """Open a new file without a name, which is gone with its process, or ``temporary`` where there is no such thing."""
    if hasattr(os, "O_TMPFILE") and os.path.isdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # a file system without
            return os.fdopen(os.open(folder, os.O_TMPFILE | os.O_RDWR, 0o666), "wb")
    return open(temporary, "wb")


def _name(file: IO[bytes], temporary: str) -> None:
    """Give a whole file without a name the name ``temporary``."""
    unnamed = f"/proc/self/fd/{file.fileno()}"
    try:
        # With a descriptor for relative paths, of which there is none, Python calls linkat, which follows the path.
        os.link(unnamed, temporary, src_dir_fd=file.fileno(), follow_symlinks=True)
    except OSError:  # a sandbox may forbid it
        shutil.copyfile(unnamed, temporary)
        shutil.copymode(unnamed, temporary)
        _sync(temporary)


def _claim(temporary: str, target: str) -> None:
    """Make ``target`` whole in one step.

    Raises:
        FileExistsError: it is there.
    """
    try:
        os.link(temporary, target)
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links: an empty file keeps the name for the whole one
        os.close(os.open(target, os.O_CREAT | os.O_EXCL | os.O_WRONLY))


def is_full(error: BaseException) -> bool:
    """Tell whether an error says that the disk, or the user's share of it, is full."""
    full = (errno.ENOSPC, errno.EDQUOT)
    return isinstance(error, OSError) and (error.errno in full or os.strerror(errno.ENOSPC) in str(error))


def unwritable(path: str, error: BaseException) -> CheckpointFileError:
    """Return the error for a file that was not written.

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
