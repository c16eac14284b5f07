"""detectron2's own unit tests of modeling, checkpoint and engine: on stock, and under ``d2-headadapt run --heads``.

    D2HA_DETECTRON2_SRC=/path/to/detectron2 python tools/detectron2_tests.py [--all] [--json FILE]

The source is a tree of files or a git directory (bare or not), of which HEAD counts. Its tests are run against the
detectron2 of this environment, whatever version that is. Exit codes: 0 what passes on stock passes under run (or
D2HA_DETECTRON2_SRC is not set, which is said), 1 something does not, 2 the source cannot be used.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tabulate import tabulate

VARIABLE = "D2HA_DETECTRON2_SRC"
TESTS = ("tests/modeling", "tests/checkpoint/test_checkpointer.py", "tests/engine/test_train.py")
WITNESS = "D2HA_WITNESS"
ROOT = Path(__file__).resolve().parents[1]
OUTCOMES = ("passed", "failed", "skipped")


@dataclass(frozen=True)
class Outcome:
    """What came of one test: one of :data:`OUTCOMES`, or ``missing``, and the first line of why."""

    kind: str
    why: str = ""


MISSING = Outcome("missing", "it was not run")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true", help="list every test, not only those that do not pass")
    parser.add_argument("--json", metavar="FILE", help="also write outcomes as JSON")
    args = parser.parse_args(argv)
    source = os.environ.get(VARIABLE, "")
    if not source:
        print(f"detectron2's own tests: not run, because {VARIABLE} names no source of detectron2")
        return 0
    with tempfile.TemporaryDirectory(prefix="detectron2_tests") as name:
        folder = Path(name)
        try:
            take_tests(Path(source), folder)
        except OSError as error:
            print(f"error: {VARIABLE}: {error}", file=sys.stderr)
            return 2
        stock, ours, used = run_both(folder)
    print(report(stock, ours, every=args.all))
    print(
        f"Under run the tests made {used['heads']} ROI heads and {used['checkpointers']} checkpointers of this package."
    )
    if args.json:
        told = {test: [stock.get(test, MISSING).kind, ours.get(test, MISSING).kind] for test in sorted({*stock, *ours})}
        Path(args.json).write_text(json.dumps({"used": used, "tests": told}, indent=1) + "\n", encoding="utf-8")
    worse = broken(stock, ours)
    for test in worse:
        print(f"error: passes on stock, not under run: {test}", file=sys.stderr)
    unused = [f"{what} of this package" for what, count in used.items() if not count]
    if unused:
        print(f"error: the tests made no {' and no '.join(unused)}, so they say nothing", file=sys.stderr)
    return 1 if worse or unused else 0


def take_tests(source: Path, folder: Path) -> None:
    """Copy ``tests`` alone: beside detectron2's own files, the tests would import those.

    Raises:
        OSError: the source has none.
    """
    if (source / "tests" / "modeling").is_dir():
        shutil.copytree(source / "tests", folder / "tests")
        return
    archive = subprocess.run(["git", "-C", str(source), "archive", "HEAD", "tests"], capture_output=True, check=False)
    if not archive.returncode:
        subprocess.run(["tar", "x", "-C", str(folder)], input=archive.stdout, check=True)
    if not (folder / "tests" / "modeling").is_dir():
        raise OSError(f"{source} is neither a source tree nor a git directory of detectron2")


def run_both(folder: Path) -> tuple[dict[str, Outcome], dict[str, Outcome], dict[str, int]]:
    """Outcomes on stock and under run, side by side in two processes, and what was made of ours."""
    tests = [test for test in TESTS if (folder / test).exists()]
    pytest = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "ignore", *tests]
    under_run = ["-m", "d2_headadapt", "run", "--heads", *pytest, "-p", Path(__file__).stem]
    witness = folder / "witness.json"
    processes = []
    for name, words in (("stock", pytest), ("run", under_run)):
        path = [str(ROOT), str(ROOT / "tools"), os.environ.get("PYTHONPATH", "")] if name == "run" else []
        env = {**os.environ, "OMP_NUM_THREADS": "1", WITNESS: str(witness)}
        if path:
            env["PYTHONPATH"] = os.pathsep.join(filter(None, path))
        command = [sys.executable, *words, f"--junitxml={folder / name}.xml"]
        with open(folder / f"{name}.log", "w", encoding="utf-8") as log:
            processes.append(subprocess.Popen(command, cwd=folder, env=env, stdout=log, stderr=subprocess.STDOUT))
    for process in processes:
        process.wait()
    found = []
    for name in ("stock", "run"):
        xml = folder / f"{name}.xml"
        if not xml.is_file():
            raise SystemExit(f"pytest did not start:\n{(folder / f'{name}.log').read_text()[-3000:]}")
        found.append(read_outcomes(xml))
    used = json.loads(witness.read_text()) if witness.is_file() else {"heads": 0, "checkpointers": 0}
    return found[0], found[1], used


def read_outcomes(xml: Path) -> dict[str, Outcome]:
    """``module::class::test`` -> its outcome, from what pytest wrote."""
    found: dict[str, Outcome] = {}
    for case in ET.parse(xml).iter("testcase"):
        outcome = Outcome("passed")
        for child in case:
            if child.tag in ("failure", "error", "skipped"):
                lines = (child.get("message") or "").splitlines() or [""]
                outcome = Outcome("skipped" if child.tag == "skipped" else "failed", lines[0][:100])
        found[f"{case.get('classname')}::{case.get('name')}"] = outcome
    return found


def broken(stock: Mapping[str, Outcome], ours: Mapping[str, Outcome]) -> list[str]:
    """Tests that pass on stock and not under run."""
    return [test for test, seen in stock.items() if seen.kind == "passed" != ours.get(test, MISSING).kind]


def report(stock: Mapping[str, Outcome], ours: Mapping[str, Outcome], *, every: bool = False) -> str:
    """Counts by file, then test by test those that do not pass, or all."""
    tests = sorted({*stock, *ours})
    files: dict[str, tuple[Counter[str], Counter[str]]] = {}
    for test in tests:
        columns = files.setdefault(test.partition("::")[0].rpartition(".")[0], (Counter(), Counter()))
        for column, seen in zip(columns, (stock, ours), strict=True):
            column[seen.get(test, MISSING).kind] += 1
    files["all"] = (sum((a for a, _ in files.values()), Counter()), sum((b for _, b in files.values()), Counter()))
    heads = ["", *(f"{where}: {kind}" for where in ("stock", "run") for kind in OUTCOMES)]
    rows = [[file, *(column[kind] for column in columns for kind in OUTCOMES)] for file, columns in files.items()]
    listed = []
    for test in tests:
        pair = stock.get(test, MISSING), ours.get(test, MISSING)
        if every or "failed" in (pair[0].kind, pair[1].kind) or pair[0].kind != pair[1].kind:
            listed.append([test, pair[0].kind, pair[1].kind, pair[1].why or pair[0].why])
    return f"{tabulate(rows, heads)}\n\n{tabulate(listed, ['test', 'stock', 'run', 'why'])}\n"


# pytest loads this file as a plugin too, in the run with our package, to count what was made of it.

_used = {"heads": 0, "checkpointers": 0}


def pytest_configure() -> None:
    from d2_headadapt import (
        HeadAdaptCascadeROIHeads,
        HeadAdaptCheckpointer,
        HeadAdaptRes5ROIHeads,
        HeadAdaptROIHeads,
    )

    def counted(what: str, init: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(init)
        def count(self: Any, *args: Any, **kwargs: Any) -> None:
            _used[what] += 1
            init(self, *args, **kwargs)

        return count

    for heads in (HeadAdaptROIHeads, HeadAdaptCascadeROIHeads, HeadAdaptRes5ROIHeads):
        heads.__init__ = counted("heads", heads.__init__)  # type: ignore[method-assign]
    HeadAdaptCheckpointer.__init__ = counted("checkpointers", HeadAdaptCheckpointer.__init__)  # type: ignore[method-assign]


def pytest_sessionfinish() -> None:
    Path(os.environ[WITNESS]).write_text(json.dumps(_used), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
