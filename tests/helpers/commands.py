"""Running our commands, in this process and in one of their own."""

from __future__ import annotations

import io
import logging
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

from detectron2.utils.logger import setup_logger

from d2_headadapt.cli.parser import main
from d2_headadapt.key import shown

ROOT = Path(__file__).resolve().parents[2]
LOGGERS = ("d2_headadapt", "detectron2", "fvcore")


@dataclass(frozen=True)
class Ran:
    """Exit code and texts of a command."""

    code: int
    out: str
    err: str

    @property
    def complaint(self) -> str:
        """Standard error without the first word of a command that takes long to import."""
        return re.sub(r"\Areading .* \.\.\.\n", "", self.err)


def cli(*arguments: object) -> Ran:
    """``d2-headadapt ARGUMENTS`` in this process; an exception other than argparse's exit passes through."""
    out, err = io.StringIO(), io.StringIO()
    with fresh_loggers(), redirect_stdout(out), redirect_stderr(err):
        try:
            code = main([str(a) for a in arguments])
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else 1
    ran = Ran(code, out.getvalue(), err.getvalue())
    # Nothing that people see has both readings of a key in it.
    assert shown(ran.out + ran.err) == ran.out + ran.err
    return ran


@contextmanager
def fresh_loggers() -> Iterator[None]:
    """Loggers without handlers before and after: ``setup_logger`` keeps the stream it met first."""
    before = {
        name: (logging.getLogger(name).handlers[:], logging.getLogger(name).level, logging.getLogger(name).propagate)
        for name in LOGGERS
    }
    for name in LOGGERS:
        logging.getLogger(name).handlers = []
    setup_logger.cache_clear()
    try:
        yield
    finally:
        setup_logger.cache_clear()
        for name, (handlers, level, propagate) in before.items():
            logger = logging.getLogger(name)
            logger.handlers, logger.propagate = handlers, propagate
            logger.setLevel(level)


def python(*arguments: object, cwd: Path | None = None, timeout: float = 240, env: dict[str, str] | None = None) -> Ran:
    """``python ARGUMENTS`` with this project on the path."""
    variables = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")])),
        "PYTHONWARNINGS": "ignore",
        **(env or {}),
    }
    done = subprocess.run(
        [sys.executable, *(str(a) for a in arguments)],
        cwd=cwd,
        env=variables,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    return Ran(done.returncode, done.stdout, done.stderr)
