"""Run the checks and report their findings."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from detectron2.config import CfgNode
from detectron2.utils import comm
from omegaconf import DictConfig
from tabulate import tabulate
from termcolor import colored

from ..errors import HeadAdaptError, visible
from ..key import Form, form_in_use, shown, speaking

# Each module of checks enters its own when it is imported.
from . import box_checks as box_checks
from . import component_checks as component_checks
from . import config_checks as config_checks
from . import data_checks as data_checks
from . import evaluation_checks as evaluation_checks
from . import field_checks as field_checks
from . import image_checks as image_checks
from . import model_checks as model_checks
from . import resume_checks as resume_checks
from . import text_checks as text_checks
from . import training_checks as training_checks
from . import weights_checks as weights_checks
from .finding import CHECKS, Check, DoctorContext, Finding, PartMissing, finding_of

logger = logging.getLogger(__name__)

RANK = {"error": 0, "warning": 1, "note": 2}
COLOURS = {"error": "red", "warning": "yellow", "note": "cyan"}
REPORT_VERSION = 1
"""Of the report as JSON; higher where a reader of an older one would misread it."""

UNFINISHED = "HA100"
"""The code under which a check that raised is filed: the others still run."""


@dataclass(frozen=True)
class Report:
    """The findings of an examination.

    Args:
        findings: the worst first, then by code.
        not_run: code of a check -> why it could not be run.
        checks: how many checks ran to their end.
        seconds: wall clock time of the whole.
    """

    findings: tuple[Finding, ...] = ()
    not_run: dict[str, str] = field(default_factory=dict)
    checks: int = 0
    seconds: float = 0.0

    def of(self, severity: str) -> list[Finding]:
        """Pick the findings of one severity."""
        return [finding for finding in self.findings if finding.severity == severity]

    @property
    def exit_code(self) -> int:
        """Exit code: 1 where an error stands, else 0."""
        return 1 if self.of("error") else 0


def examine(
    config_file: str = "",
    opts: Sequence[str] = (),
    imports: Sequence[str] = (),
    weights: str | None = None,
    all_images: bool = False,
) -> Report:
    """Run every check on what the command line names; never raises for what is wrong with it.

    Args:
        config_file, opts, imports: see :func:`d2_headadapt.setup.yaml.load_config`.
        weights: a checkpoint in place of ``MODEL.WEIGHTS``.
        all_images: look at every image rather than at a sample.
    """
    return run_checks(DoctorContext(config_file, opts, imports, weights, all_images=all_images), CHECKS.values())


def run_checks(context: DoctorContext, checks: Iterable[Check]) -> Report:
    """Run some checks on a context, in the order of their codes."""
    started = time.perf_counter()
    findings: list[Finding] = []
    not_run: dict[str, str] = {}
    count = 0
    with speaking(Form.LAZY if context.is_lazy else form_in_use()):
        for one in sorted(checks, key=lambda check: check.code):
            if context.is_lazy and one.yaml_only:
                not_run[one.code] = one.yaml_only
                continue
            try:
                for part in one.needs:
                    context.part(part)
                findings += one.function(context)
                count += 1
            except PartMissing as missing:
                not_run[one.code] = f"{missing.part}: {missing.reason}"
            except Exception as error:
                logger.debug("check %s raised", one.code, exc_info=True)
                findings.append(finding_of(UNFINISHED, error, "warning", f"check {one.code} ({one.title})"))
    findings.sort(key=lambda finding: (RANK[finding.severity], finding.code))
    return Report(tuple(findings), not_run, count, time.perf_counter() - started)


def report_text(report: Report) -> str:
    """Render the report for a terminal: coloured where standard output is one."""
    blocks = []
    for finding in report.findings:
        head = colored(f"{finding.severity} {finding.code}", COLOURS[finding.severity], attrs=["bold"])
        where, *parts = map(visible, (finding.where, finding.found, finding.expected, finding.fix))
        lines = list(zip(("found", "expected", "do"), parts, strict=True))
        blocks.append(
            f"{head}  {where}\n" + tabulate(lines, tablefmt="plain", maxcolwidths=[None, 100], stralign="left")
        )
    if report.not_run:
        rows = [(code, shown(CHECKS[code].title), reason) for code, reason in sorted(report.not_run.items())]
        blocks.append(
            "not run:\n" + tabulate(rows, tablefmt="plain", maxcolwidths=[None, 50, 60], disable_numparse=True)
        )
    return "\n\n".join([*blocks, verdict(report)]) + "\n"


def verdict(report: Report) -> str:
    """Sum up in one line: how many checks ran, and how many findings of each severity."""
    counts = ", ".join(
        f"{len(found)} {severity}{'' if len(found) == 1 else 's'}"
        for severity in RANK
        if (found := report.of(severity))
    )
    not_run = f", {len(report.not_run)} not run" if report.not_run else ""
    return f"doctor: {report.checks} checks in {report.seconds:.1f} s{not_run}: {counts or 'all is well'}"


def report_json(report: Report) -> str:
    """Write the report as JSON: ``{"version": 1, "findings": [...], "not_run": {code: reason}, "checks": n, ...}``."""
    content = {
        "version": REPORT_VERSION,
        "findings": [finding.to_json() for finding in report.findings],
        "not_run": report.not_run,
        "checks": report.checks,
        "seconds": round(report.seconds, 3),
        "exit_code": report.exit_code,
    }
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def checks_markdown() -> str:
    """List every check as a table: code, what holds when it is silent, worst severity, whether the trainer runs it."""
    rows = [
        (one.code, shown(one.title), one.severity, "yes" if one.quick else "", ", ".join(one.needs))
        for one in sorted(CHECKS.values(), key=lambda check: check.code)
    ]
    headers = ("code", "silent when", "worst", "before training", "needs")
    return tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True) + "\n"


def examine_before_training(cfg: CfgNode, lazy: DictConfig | None = None) -> Report:
    """Run the quick checks before a training: no image and no large annotation file is read.

    The main process logs one line when all is well, else each finding.

    Args:
        cfg: resolved.
        lazy: the LazyConfig that it is the mirror of.

    Raises:
        HeadAdaptError: the first error.
    """
    report = run_checks(DoctorContext(ready=cfg, lazy=lazy, quick=True), [one for one in CHECKS.values() if one.quick])
    if comm.is_main_process():
        for finding in report.findings:
            level = {"error": logging.ERROR, "warning": logging.WARNING, "note": logging.INFO}[finding.severity]
            logger.log(
                level, "%s %s: %s; expected %s. %s", finding.code, finding.where, finding.found, finding.expected,
                finding.fix,
            )  # fmt: skip
        logger.info("%s", verdict(report))
    for finding in report.of("error"):
        raise as_error(finding)
    return report


def as_error(finding: Finding) -> HeadAdaptError:
    """Make the exception of a finding."""
    where = f"{finding.code}, {finding.where}"
    return type(finding.error)(where, expected=finding.expected, found=finding.found, fix=finding.fix)
