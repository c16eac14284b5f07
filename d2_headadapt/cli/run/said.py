"""Route this package's log to detectron2's handlers: the same screen and the same log.txt."""

from __future__ import annotations

import logging

from detectron2.utils import comm
from detectron2.utils.logger import setup_logger


class BesideDetectron2(logging.Handler):
    """A handler that hands records to those of detectron2's logger, which a script sets up with folder and rank.

    Args:
        own: speak in the first process where the script set up none.
    """

    def __init__(self, own: list[logging.Handler]) -> None:
        super().__init__()
        self.own = own

    def emit(self, record: logging.LogRecord) -> None:
        """Pass a record on; not at all where the script set up this package's logger itself."""
        if logging.getLogger("d2_headadapt").handlers != [self]:
            return
        theirs = logging.getLogger("detectron2")
        if theirs.handlers:
            theirs.handle(record)
        elif comm.get_rank() == 0:
            for handler in self.own:
                handler.handle(record)


def adopt_logger() -> None:
    """Replace the handlers of this package's logger."""
    logger = setup_logger(name="d2_headadapt")
    logger.handlers = [BesideDetectron2(logger.handlers)]
