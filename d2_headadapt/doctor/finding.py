"""Checks and their findings as types, and the register of checks.

A check is a small function with a code. It names the parts of the context that it needs. Where a part cannot be had,
the check that reports it says why (:meth:`d2_headadapt.doctor.context.DoctorContext.failure`), and every check that
needs it is listed as not run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import ConfigError, HeadAdaptError
from ..errors import Finding as Finding
from ..errors import Severity as Severity
from ..key import Words
from .context import DoctorContext as DoctorContext
from .context import Part
from .context import PartMissing as PartMissing


def finding_of(code: str, error: BaseException, severity: Severity = "error", where: Words = "") -> Finding:
    """Make a finding of an exception; ``where`` serves exceptions that are not this package's."""
    if not isinstance(error, HeadAdaptError):
        text = " ".join(f"{type(error).__name__}: {error}".split())
        error = ConfigError(where, expected="no exception", found=text, fix="Mend what the message names.")
    return Finding(code, severity, error)


CheckFunction = Callable[[DoctorContext], Iterable[Finding]]


@dataclass(frozen=True)
class Check:
    """A registered check.

    Args:
        code: such as ``HA101``.
        title: what holds when the check is silent, in a few words.
        needs: parts that must be there.
        quick: the trainer runs it too, before it builds; its errors stop the training.
        severity: the worst that it finds.
        function: yields its findings.
        yaml_only: why it is not run on a LazyConfig; empty where it is.
    """

    code: str
    title: str
    needs: tuple[str, ...]
    quick: bool
    severity: Severity
    function: CheckFunction
    yaml_only: str = ""


CHECKS: dict[str, Check] = {}
"""Every check by its code."""


def check(
    code: str,
    title: str,
    *,
    needs: Sequence[Part] = ("config",),
    quick: bool = False,
    severity: Severity = "error",
    yaml_only: str = "",
) -> Callable[[CheckFunction], CheckFunction]:
    """Register a function ``(context) -> findings`` under a code; see :class:`Check`.

    The function may also let :class:`PartMissing` out: it is then listed as not run, after what it has found.
    """

    def register(function: CheckFunction) -> CheckFunction:
        if code in CHECKS:
            raise ValueError(f"two checks with the code {code}")
        CHECKS[code] = Check(code, title, tuple(needs), quick, severity, function, yaml_only)
        return function

    return register


def is_stock(registry: Any, name: str) -> bool:
    """Tell whether a registered component is detectron2's own, so that this package knows what it reads."""
    return name in registry and str(registry.get(name).__module__).startswith("detectron2.")
