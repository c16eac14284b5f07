"""Keep the terminal quiet: warnings of other projects, and everything but JSON on standard output."""

from __future__ import annotations

import os
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from contextvars import ContextVar
from typing import TextIO

THIRD_PARTY = (
    ("`torch.jit.script` is deprecated", "torch.jit._script"),
    ("`torch.jit.script_method` is deprecated", "torch.jit._script"),
    ("`torch.jit.trace` is deprecated", "torch.jit._trace"),
    ("torch.meshgrid", "torch.functional"),
    ("pkg_resources is deprecated as an API", "detectron2.model_zoo.model_zoo"),
)
"""How the message begins, and the module that is blamed: what detectron2 does, and no user can mend."""

_JSON_STREAM: ContextVar[TextIO | None] = ContextVar("json_stream", default=None)


@contextmanager
def without_warnings() -> Iterator[None]:
    """Silence :data:`THIRD_PARTY` in this process and in those that it starts."""
    variable = "PYTHONWARNINGS"
    before = os.environ.get(variable)
    # Of two filters that fit, Python takes the last.
    entries = [f"ignore:{message}::{module}" for message, module in THIRD_PARTY]
    os.environ[variable] = ",".join([*([before] if before else []), *entries])
    try:
        with warnings.catch_warnings():
            for message, module in THIRD_PARTY:
                warnings.filterwarnings("ignore", re.escape(message), module=rf"{re.escape(module)}\Z")
            yield
    finally:
        if before is None:
            del os.environ[variable]
        else:
            os.environ[variable] = before


@contextmanager
def json_alone(wanted: bool) -> Iterator[None]:
    """Leave standard output to :func:`print_json` where ``wanted``: the rest and the log go to standard error."""
    if not wanted:
        yield
        return
    token = _JSON_STREAM.set(sys.stdout)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        _JSON_STREAM.reset(token)


def print_json(text: str) -> None:
    """Print on the standard output that :func:`json_alone` keeps free."""
    print(text, end="", file=_JSON_STREAM.get())
