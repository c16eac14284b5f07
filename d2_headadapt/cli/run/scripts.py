"""Run a script as ``python`` would."""

from __future__ import annotations

import importlib.util
import os
import re
import runpy
import sys
from collections.abc import Sequence

from torch.multiprocessing.spawn import ProcessRaisedException

from ... import errors
from ...errors import HeadAdaptError, UsageError
from .adoption import Adoption


def run_script(command: Sequence[str], adoption: Adoption) -> None:
    """Run a script, or ``-m`` and a module, as ``python`` would, with this package in place.

    A :class:`HeadAdaptError` of a process that the script started ends this one with its one line and its exit code.

    Args:
        command: the script, which is there, or ``-m module``, and its arguments.
        adoption: how.

    Raises:
        UsageError: there is no such module.
        HeadAdaptError: what was met in this process.
    """
    is_module = command[0] == "-m"
    _put_in_front(os.getcwd() if is_module else os.path.dirname(os.path.abspath(command[0])))
    if is_module:
        _check_module(command[1])
    # Last, so that --import finds what lies beside the script.
    adoption.install()
    sys.argv = list(command[1:] if is_module else command)
    try:
        if is_module:
            runpy.run_module(command[1], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(command[0], run_name="__main__")
    except ProcessRaisedException as exc:
        _end_with_line_of(exc)
        raise
    except SystemExit as exc:
        if not exc.code:
            adoption.finish()
        raise
    adoption.finish()


def _put_in_front(folder: str) -> None:
    """Put a folder first on the import path, as ``python`` does; the entry that found us stays, last."""
    if not getattr(sys.flags, "safe_path", False):
        sys.path.append(sys.path.pop(0))
    sys.path.insert(0, folder)


def _check_module(name: str) -> None:
    try:
        found = importlib.util.find_spec(name)
        if found is not None and found.submodule_search_locations is not None:
            found = importlib.util.find_spec(f"{name}.__main__")
    except ModuleNotFoundError as exc:
        # A module that exists and cannot import another one is the script's own mistake.
        if exc.name is None or not f"{name}.".startswith(f"{exc.name}."):
            raise
        found = None
    except ValueError:  # Of a module without a spec.
        found = None
    if found is None:
        raise UsageError(
            "d2-headadapt run -m",
            expected="a module that python -m can run",
            found=f"no module {name!r}",
            fix="Correct the name, or run where the module's folder is.",
        )


def _end_with_line_of(exc: ProcessRaisedException) -> None:
    """End as this process would have ended with the error: torch hands it over as the text of a traceback."""
    last = re.search(rf"^{re.escape(errors.__name__)}\.(\w+): ((?:(?!^Traceback ).*\n?)*)\Z", str(exc), re.MULTILINE)
    kind = getattr(errors, last[1], None) if last else None
    if last is None or not (isinstance(kind, type) and issubclass(kind, HeadAdaptError)):
        return
    print(f"error: {last[2].strip()}", file=sys.stderr)
    sys.exit(kind.exit_code)
