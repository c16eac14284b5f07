"""What a check is, and what it finds.

A check is a small function with a code. It names the parts of the context that it needs. Where a part cannot be had,
the check that reports it says why (:meth:`d2_headadapt.doctor.context.DoctorContext.failure`), and every check that
needs it is listed as not run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from detectron2.config import CfgNode

from ..errors import HeadAdaptError
from .context import DoctorContext as DoctorContext
from .context import Part
from .context import PartMissing as PartMissing

Severity = Literal["error", "warning", "note"]


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong, or worth knowing.

    Args:
        code: of the check, such as ``HA101``.
        severity: ``error`` is certain to fail or to train something wrong, ``warning`` very likely is a mistake,
            ``note`` is worth knowing and needs no mending.
        where: the key, file or image.
        found, expected: as in :class:`d2_headadapt.errors.HeadAdaptError`.
        fix: what to type; a complete sentence.
    """

    code: str
    severity: Severity
    where: str
    found: str
    expected: str
    fix: str

    @classmethod
    def of(cls, code: str, error: BaseException, severity: Severity = "error", where: str = "") -> Finding:
        """The finding that an exception amounts to; ``where`` serves exceptions that are not this package's."""
        if isinstance(error, HeadAdaptError):
            return cls(code, severity, error.where, error.found, error.expected, error.fix)
        text = " ".join(f"{type(error).__name__}: {error}".split())
        return cls(code, severity, where, text, "no exception", "Mend what the message names.")


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
    """Whether a registered component is detectron2's own, so that this package knows what it reads."""
    return name in registry and str(registry.get(name).__module__).startswith("detectron2.")


def value_of(cfg: CfgNode, key: str) -> Any:
    """The value under ``A.B.C``, or ``None`` where there is no such key."""
    node: Any = cfg
    for name in key.split("."):
        node = node.get(name) if isinstance(node, CfgNode) else None
    return node
