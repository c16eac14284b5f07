"""Real material, GPU tests, and the state that every test gets back as it was.

``D2HA_REAL`` names the folder of real material; without it ``../shared/real`` beside the project is looked at. Tests
that need it are marked ``real`` or take the fixture ``real``. They are skipped when the default folder is missing.
Whoever sets ``D2HA_REAL`` asks for them to run: a missing folder or a skipped real test is then a failure.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path

# One thread here and in every process that a test starts, before torch reads it. The sum of a matrix product depends on
# how it is split, and threads of several test processes on few cores wait for each other: thirty times as long.
os.environ["OMP_NUM_THREADS"] = "1"

import hypothesis
import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog

ROOT = Path(__file__).resolve().parents[1]
REAL_ASKED = "D2HA_REAL" in os.environ
REAL = Path(os.environ.get("D2HA_REAL") or ROOT.parent / "shared" / "real").resolve()
NO_REAL = f"no folder {REAL}; D2HA_REAL names another place"
LONGEST = [
    *("test_run", "test_fit_text", "test_run_scripts", "test_fit", "test_run_detectron2", "test_two_hosts"),
    *("test_export", "test_train_lazy", "test_run_configs", "test_ranks", "test_task_boxes", "test_doctor_model"),
]
"""Files that take half of the suite's time. Where several processes share it, who takes one last is waited for."""

torch.set_num_threads(1)

hypothesis.settings.register_profile("local", deadline=None)
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "local")


@pytest.fixture(scope="session")
def real() -> Path:
    """The folder of real material. A test that takes it is marked ``real``."""
    return REAL


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if hasattr(config, "workerinput"):
        place = {name: i for i, name in enumerate(LONGEST)}
        items.sort(key=lambda item: place.get(item.path.stem, len(place)))
    for item in items:
        if "real" in getattr(item, "fixturenames", ()):
            item.add_marker("real")
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
        if item.get_closest_marker("real") and not REAL_ASKED and not REAL.is_dir():
            item.add_marker(pytest.mark.skip(reason=NO_REAL))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("real") and REAL_ASKED and not REAL.is_dir():
        pytest.fail(f"D2HA_REAL is set, but there is {NO_REAL}", pytrace=False)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item):
    report = yield
    if item.get_closest_marker("real"):
        report.d2ha_real = True
        if report.skipped and not hasattr(report, "wasxfail"):
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
            report.d2ha_skipped = reason.removeprefix("Skipped: ")
            # A missing GPU is no missing material: such a test stays skipped.
            if REAL_ASKED and not (item.get_closest_marker("gpu") and not torch.cuda.is_available()):
                report.outcome = "failed"
                report.longrepr = f"D2HA_REAL is set, so no real test may be skipped: {report.d2ha_skipped}"
    return report


class RealTally:
    """Counts real tests and says the last line."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.ran: set[str] = set()
        self.skipped: dict[str, str] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if not getattr(report, "d2ha_real", False):
            return
        if hasattr(report, "d2ha_skipped"):
            self.skipped[report.nodeid] = report.d2ha_skipped
            self.ran.discard(report.nodeid)
        elif report.when == "call":
            self.ran.add(report.nodeid)

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if REAL_ASKED and not REAL.is_dir() and session.exitstatus in (0, pytest.ExitCode.NO_TESTS_COLLECTED):
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_unconfigure(self) -> None:
        # Later than pytest_terminal_summary, so that nothing comes after this line.
        reporter = self.config.pluginmanager.get_plugin("terminalreporter")
        if reporter is None:
            return
        reasons = sorted(set(self.skipped.values()))
        if not REAL.is_dir():
            reasons = [f"D2HA_REAL is set, but there is {NO_REAL}" if REAL_ASKED else NO_REAL]
        why = f" ({'; '.join(reasons)})" if reasons else ""
        reporter.write_line(f"real material: {len(self.ran)} ran, {len(self.skipped)} skipped{why}")


def pytest_configure(config: pytest.Config) -> None:
    if not config.option.collectonly:
        config.pluginmanager.register(RealTally(config), "real-tally")


@pytest.fixture(autouse=True)
def _state_as_before() -> Iterator[None]:
    """Give back random states, threads and torch defaults, and forget what a test registered with detectron2."""
    datasets = set(DatasetCatalog.list())
    metadata = {name: dict(vars(MetadataCatalog.get(name))) for name in MetadataCatalog.list()}
    torch_state, numpy_state, python_state = torch.get_rng_state(), np.random.get_state(), random.getstate()
    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    deterministic = torch.are_deterministic_algorithms_enabled()
    yield
    torch.set_rng_state(torch_state)
    np.random.set_state(numpy_state)
    random.setstate(python_state)
    torch.set_num_threads(threads)
    torch.set_default_dtype(dtype)
    torch.use_deterministic_algorithms(deterministic)
    for name in set(DatasetCatalog.list()) - datasets:
        DatasetCatalog.remove(name)
    for name in MetadataCatalog.list():
        if name not in metadata:
            MetadataCatalog.remove(name)
        elif vars(MetadataCatalog.get(name)) != metadata[name]:
            values = vars(MetadataCatalog.get(name))
            values.clear()
            values.update(metadata[name])
