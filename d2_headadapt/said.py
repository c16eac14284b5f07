"""What this package logs is heard: beside what detectron2 says, and on the screen where a script set up no logging."""

from __future__ import annotations

import logging

from detectron2.utils import comm
from detectron2.utils.logger import setup_logger

NAME = "d2_headadapt"


class BesideDetectron2(logging.Handler):
    """Hands each record to the handlers of detectron2's logger, or to the screen where it has none.

    Which it is is asked anew for each record, because scripts set up their logging late. Where the script
    set up this package's logger itself, nothing is handed on.

    Args:
        own: speak in the first process where nobody else would.
    """

    def __init__(self, own: list[logging.Handler]) -> None:
        super().__init__()
        self.own = own

    def emit(self, record: logging.LogRecord) -> None:
        """Pass a record on, once."""
        if logging.getLogger(NAME).handlers != [self]:
            return
        theirs = logging.getLogger("detectron2")
        if theirs.handlers:
            theirs.handle(record)
        elif comm.get_rank() == 0:
            for handler in self.own:
                handler.handle(record)


def adopt_logger() -> None:
    """Replace the handlers of this package's logger."""
    # Past detectron2's cache: a script that calls the same later shall get its handlers.
    logger = setup_logger.__wrapped__(name=NAME)
    logger.handlers = [BesideDetectron2(logger.handlers[-1:])]


def be_heard() -> None:
    """Adopt the logger where no handler would show what this package logs, or only detectron2's would.

    A script that gave handlers to the root logger and none to detectron2's has chosen a level, which holds.
    """
    logger = logging.getLogger(NAME)
    level = logger.level
    if not logger.handlers and (logging.getLogger("detectron2").handlers or not logging.getLogger().handlers):
        adopt_logger()
        logger.setLevel(level or logging.INFO)


def log_to(folder: str, rank: int) -> None:
    """Log to the screen and into a run's folder, which is made; no line comes twice on a stream.

    Raises:
        OSError: the folder cannot be made or written to.
    """
    logger = setup_logger(folder, distributed_rank=rank, name=NAME)
    seen: list[object] = []
    for handler in logger.handlers[:]:
        stream = getattr(handler, "stream", handler)
        if any(stream is other for other in seen):
            logger.removeHandler(handler)
        seen.append(stream)
