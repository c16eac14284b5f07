"""What conftest.py does for worker processes: it counts their real tests, and has them begin with the longest files."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import LONGEST, REAL, RealTally, pytest_collection_modifyitems


def reports() -> list[pytest.TestReport]:
    """Of two real tests, one that ran and one that was skipped, and of one that is not real."""
    made = []
    for name, real, skipped in (("ran", True, ""), ("skipped", True, "no such model"), ("drawn", False, "")):
        for when in ("setup", "call", "teardown"):
            one = pytest.TestReport(
                f"tests/test_x.py::test_{name}", ("tests/test_x.py", 1, name), {}, "passed", None, when
            )
            if real:
                one.d2ha_real = True
            if skipped and when == "setup":
                one.d2ha_skipped = skipped
                one.outcome = "skipped"
            if not skipped or when != "call":
                made.append(one)
    return made


def test_reports_of_a_worker_process_count_as_those_of_this_one(pytestconfig: pytest.Config) -> None:
    lines: list[str] = []
    reporter = SimpleNamespace(write_line=lines.append)
    config: Any = SimpleNamespace(pluginmanager=SimpleNamespace(get_plugin=lambda name: reporter))
    for sent in (False, True):
        tally = RealTally(config)
        for report in reports():
            if sent:  # As pytest-xdist does it: what a worker's report holds comes here as plain data.
                data = pytestconfig.hook.pytest_report_to_serializable(config=pytestconfig, report=report)
                report = pytestconfig.hook.pytest_report_from_serializable(config=pytestconfig, data=data)
            tally.pytest_runtest_logreport(report)
        tally.pytest_unconfigure()
    assert lines[0] == lines[1]
    assert lines[0].startswith("real material: 1 ran, 1 skipped")
    assert ("no such model" in lines[0]) == REAL.is_dir(), "without the folder, that is the reason of all"


def test_worker_processes_begin_with_the_longest_files() -> None:
    there = {path.stem for path in Path(__file__).parent.rglob("test_*.py")}
    assert set(LONGEST) <= there and len(set(LONGEST)) == len(LONGEST), "a name of a file that moved away"

    def order(config: Any) -> list[str]:
        stems = ["test_aliases", LONGEST[1], "test_zoo", LONGEST[0]]
        items: list[Any] = [
            SimpleNamespace(path=Path(f"{stem}.py"), get_closest_marker=lambda name: None) for stem in stems
        ]
        pytest_collection_modifyitems(config, items)
        return [item.path.stem for item in items]

    assert order(SimpleNamespace(workerinput={})) == [LONGEST[0], LONGEST[1], "test_aliases", "test_zoo"]
    assert order(SimpleNamespace()) == ["test_aliases", LONGEST[1], "test_zoo", LONGEST[0]], "one process need not"
