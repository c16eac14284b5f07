"""A training that ends before its time, by Ctrl-C or on a full disk, in one line and without a traceback."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ..checkpoint.checkpointer import HeadAdaptCheckpointer
from ..errors import HeadAdaptError
from ..files import is_full, unwritable
from ..key import SOLVER, shown


class Stopped(KeyboardInterrupt):
    """Ctrl-C, with what was reached and how to go on as its text."""


@contextmanager
def in_one_line(trainer: Any, checkpointer: HeadAdaptCheckpointer) -> Iterator[None]:
    """Around a training: what ends it early is one line; detectron2's log shows no traceback of it.

    Args:
        trainer: of the kind of ``TrainerBase``.
        checkpointer: of its run.

    Raises:
        Stopped: in place of a ``KeyboardInterrupt``.
        CheckpointFileError: in place of the ``OSError`` of a full disk.
    """
    of_loop, quiet = logging.getLogger("detectron2.engine.train_loop"), _NoTraceback()
    of_loop.addFilter(quiet)
    try:
        yield
    except BaseException as exc:
        # Hooks that tidy up after the first exception may raise others, on the same disk or for want of a first step.
        causes = _chain(exc)
        if any(isinstance(cause, KeyboardInterrupt) for cause in causes):
            raise Stopped(stopped_line(trainer, checkpointer)) from exc
        for cause in causes:
            if isinstance(cause, HeadAdaptError):
                raise cause from cause.__cause__
        for cause in causes:
            if isinstance(cause, OSError) and is_full(cause):
                raise unwritable(str(cause.filename or checkpointer.save_dir), cause) from exc
        raise
    finally:
        of_loop.removeFilter(quiet)


def stopped_line(trainer: Any, checkpointer: HeadAdaptCheckpointer) -> str:
    """Return what was reached, the last checkpoint, and how to go on."""
    done: int = trainer.iter - trainer.start_iter
    if not done and not checkpointer.last_file:
        return "stopped before the end of iteration 1: no checkpoint was written; start again"
    if not checkpointer.last_file:
        where = f"no checkpoint was written yet; start again, with a smaller {SOLVER.CHECKPOINT_PERIOD}"
        return shown(f"stopped at iteration {trainer.iter}: {where}")
    last = checkpointer.last_file
    return f"stopped at iteration {trainer.iter}; last checkpoint {last}; go on with the same command and --resume"


def _chain(error: BaseException) -> list[BaseException]:
    """Return an exception and those during whose handling it was raised, the first raised first."""
    found: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in found:
        found.append(link)
        link = link.__context__
    return found[::-1]


class _NoTraceback(logging.Filter):
    """Leaves out what is said in one line elsewhere."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Tell whether the record is not about such an exception."""
        error = record.exc_info[1] if record.exc_info else None
        return not (isinstance(error, HeadAdaptError) or (error is not None and is_full(error)))
