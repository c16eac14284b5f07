"""The set-up script stops early, in one line, and never marks half an environment as complete."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "tools" / "setup_env.sh"
BASE_PYTHON = getattr(sys, "_base_executable", sys.executable)
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="a bash script")


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A copy of what the script reads, without an environment."""
    (tmp_path / "tools").mkdir()
    (tmp_path / "d2_headadapt").mkdir()
    for name in ("tools/setup_env.sh", "setup.py", "pyproject.toml", "Makefile"):
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def interpreter(folder: Path, prelude: str) -> Path:
    """A stand-in for ``PYTHON``: the real interpreter, except that ``prelude`` runs before each ``-c`` program.

    Its own packages stay invisible (``-S``), so that it is a plain Python whatever the tests run on.
    """
    shim = folder / "python-shim"
    shim.write_text(
        "#!/usr/bin/env bash\n"
        "args=()\n"
        'while [ $# -gt 0 ] && [ "$1" != -c ]; do args+=("$1"); shift; done\n'
        f'if [ $# -gt 0 ]; then program=$2; shift 2; args+=(-S -c "{prelude}\n$program" "$@"); fi\n'
        f'exec {BASE_PYTHON} "${{args[@]}}"\n'
    )
    shim.chmod(0o755)
    return shim


def as_version(*version: int) -> str:
    return f"import sys; sys.version_info = ({', '.join(map(str, version))}, 0, 'final', 0)"


SUPPORTED = as_version(3, 11)


def setup_env(project: Path, *args: str, **env: str) -> subprocess.CompletedProcess[str]:
    clean = {
        k: v for k, v in os.environ.items() if k not in ("PYTHON", "VENV", "DETECTRON2", "PYTHONPATH", "D2HA_NEED_MB")
    }
    return subprocess.run(
        ["bash", str(project / "tools" / "setup_env.sh"), *args],
        env=clean | env,
        capture_output=True,
        text=True,
        timeout=120,
        stdin=subprocess.DEVNULL,
    )


def assert_refused(result: subprocess.CompletedProcess[str], message: str) -> None:
    assert result.returncode != 0
    lines = (result.stdout + result.stderr).splitlines()
    assert len(lines) == 1, lines
    assert re.search(message, lines[0]), lines[0]


@pytest.mark.parametrize("version", [(3, 9), (3, 10), (3, 13)])
def test_another_python_version_stops_in_one_line(project: Path, version: tuple[int, int]) -> None:
    shim = interpreter(project, as_version(*version))
    assert_refused(setup_env(project, PYTHON=str(shim)), rf"is Python 3\.{version[1]}; .* for 3\.11 and 3\.12")
    assert not (project / ".venv").exists()


def test_python_without_ensurepip_stops_in_one_line(project: Path) -> None:
    shim = interpreter(project, SUPPORTED + "; sys.modules['ensurepip'] = None")
    assert_refused(setup_env(project, PYTHON=str(shim)), r"lacks venv or ensurepip \(on Debian: .*python3\.11-venv\)")


def test_no_such_interpreter_stops_in_one_line(project: Path) -> None:
    assert_refused(setup_env(project, PYTHON="no-such-python"), "no interpreter 'no-such-python'")


def test_what_is_no_python_stops_in_one_line(project: Path) -> None:
    assert_refused(setup_env(project, PYTHON="false"), "'false' does not run as a Python 3")


def test_too_little_disk_stops_in_one_line(project: Path) -> None:
    shim = interpreter(project, SUPPORTED)
    assert_refused(
        setup_env(project, PYTHON=str(shim), D2HA_NEED_MB="999999999"),
        r"too little disk for .*: 999999999 MB needed .*, \d+ MB free",
    )
    assert not (project / ".venv").exists()


def test_disk_is_what_df_says_of_the_target(project: Path) -> None:
    fake = project / "bin"
    fake.mkdir()
    (fake / "df").write_text("#!/bin/sh\necho Filesystem Size Used Available\necho none 9 9 2048000\n")
    (fake / "df").chmod(0o755)
    shim = interpreter(project, SUPPORTED)
    result = setup_env(project, PYTHON=str(shim), PATH=f"{fake}{os.pathsep}{os.environ['PATH']}")
    assert_refused(result, r"too little disk .*, 2000 MB free")


def test_a_wrong_setting_stops_in_one_line(project: Path) -> None:
    assert_refused(setup_env(project, DETECTRON2="conda"), "DETECTRON2 is 'conda'; expected wheel or git")


def test_a_wrong_argument_stops_in_one_line(project: Path) -> None:
    assert_refused(setup_env(project, "--now"), "unknown argument '--now'")


def test_unreachable_upstream_stops_in_one_line(project: Path) -> None:
    shim = interpreter(project, SUPPORTED)
    result = setup_env(
        project, PYTHON=str(shim), DETECTRON2="git", DETECTRON2_REPO=f"file://{project}/nothing", CXX="true"
    )
    assert_refused(result, r"nothing cannot be reached from here; DETECTRON2=wheel needs PyPI only")


def test_a_foreign_environment_is_left_alone(project: Path) -> None:
    (project / ".venv").mkdir()
    (project / ".venv" / "mine").touch()
    shim = interpreter(project, SUPPORTED)
    assert_refused(setup_env(project, PYTHON=str(shim)), "was not made by this script")
    assert (project / ".venv" / "mine").exists()


def test_dry_run_says_download_and_disk_and_changes_nothing(project: Path) -> None:
    shim = interpreter(project, SUPPORTED)
    before = sorted(project.rglob("*"))
    result = setup_env(project, "--dry-run", PYTHON=str(shim), D2HA_NEED_MB="1")
    assert result.returncode == 0, result.stderr
    assert re.search(r"download at most \d+ MB, disk at most \d+ MB", result.stdout)
    assert sorted(project.rglob("*")) == before


def test_a_wheel_with_another_sum_stops_and_leaves_no_stamp(project: Path) -> None:
    wheels = project / "wheels"
    wheels.mkdir()
    info = "sal_detectron2-0.7.2.dist-info"
    with zipfile.ZipFile(wheels / "sal_detectron2-0.7.2-cp310-none-any.whl", "w") as wheel:
        wheel.writestr("detectron2/__init__.py", "raise SystemExit('not the checked file')\n")
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: sal-detectron2\nVersion: 0.7.2\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: cp310-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    shim = interpreter(project, SUPPORTED)
    result = setup_env(
        project,
        PYTHON=str(shim),
        D2HA_NEED_MB="1",
        PIP_CONFIG_FILE=os.devnull,
        PIP_NO_INDEX="1",
        PIP_FIND_LINKS=str(wheels),
        PIP_NO_CACHE_DIR="1",
    )
    assert result.returncode != 0
    assert "DO NOT MATCH THE HASHES" in result.stderr
    assert "failed at: installing detectron2 from sal-detectron2==0.7.2" in result.stderr
    assert not (project / ".venv" / ".d2ha-complete").exists()
    assert not list((project / ".venv").rglob("detectron2"))


def stamp_environment(project: Path, *lines: str) -> Path:
    """A folder that looks like a complete environment, with the last lines of its stamp."""
    venv = project / ".venv"
    venv.mkdir(exist_ok=True)
    (venv / ".d2ha").touch()

    def digest(*names: str) -> str:
        data = b"".join((project / name).read_bytes() for name in names)
        return subprocess.run(["cksum"], input=data, capture_output=True).stdout.decode().strip().replace(" ", "-")

    (venv / ".d2ha-complete").write_text(
        f"script {digest('tools/setup_env.sh')} at {project}\n"
        f"package {digest('setup.py', 'pyproject.toml')}\n" + "".join(f"{line}\n" for line in lines)
    )
    return venv


def test_a_complete_environment_is_used_as_it_is(project: Path) -> None:
    """The stamp speaks for this script, this folder and this setup.py; a change of either is noticed."""
    venv = stamp_environment(project, "detectron2 wheel")
    result = setup_env(project, PYTHON="no-such-python")
    assert (result.returncode, result.stdout) == (0, f"setup_env: {venv} is ready\n")

    with SCRIPT.open() as script:
        (project / "tools" / "setup_env.sh").write_text(script.read() + "# changed\n")
    assert_refused(setup_env(project, PYTHON="no-such-python"), "no interpreter")


def git_source(folder: Path) -> tuple[Path, str]:
    """A bare git directory with a ``setup.py``, and its commit."""
    tree = folder / "tree"
    (tree / "detectron2").mkdir(parents=True)
    for name in ("setup.py", "detectron2/__init__.py"):
        (tree / name).touch()
    git = ["git", "-c", "user.name=x", "-c", "user.email=x", "-C", str(tree)]
    for words in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "x"]):
        subprocess.run([*git, *words], check=True)
    subprocess.run(["git", "clone", "-q", "--bare", str(tree), str(folder / "bare")], check=True)
    commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    return folder / "bare", commit


def test_a_folder_is_built_as_it_is(project: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    bare, commit = git_source(tmp_path_factory.mktemp("source"))
    shim = interpreter(project, SUPPORTED)
    settings = {"PYTHON": str(shim), "DETECTRON2": "git", "CXX": "true", "D2HA_NEED_MB": "1"}
    said = setup_env(project, "--dry-run", DETECTRON2_REPO=str(bare), **settings)
    assert said.returncode == 0, said.stderr
    assert f"detectron2 built from commit {commit} of {bare}" in said.stdout
    tree = tmp_path_factory.mktemp("tree")
    refused = setup_env(project, "--dry-run", DETECTRON2_REPO=str(tree), **settings)
    assert_refused(refused, "is neither a source tree nor a git directory of detectron2")
    (tree / "setup.py").touch()
    said = setup_env(project, "--dry-run", DETECTRON2_REPO=str(tree), **settings)
    assert f"detectron2 built from folder {tree}" in said.stdout


def test_another_commit_is_another_environment(project: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    bare, commit = git_source(tmp_path_factory.mktemp("source"))
    stamp_environment(project, "detectron2 git", f"built from commit {commit} of {bare}")
    settings = {"PYTHON": "no-such-python", "DETECTRON2": "git", "DETECTRON2_REPO": str(bare)}
    assert setup_env(project, **settings).stdout.endswith("is ready\n")
    stamp_environment(project, "detectron2 git", f"built from commit {commit[::-1]} of {bare}")
    assert_refused(setup_env(project, **settings), "no interpreter")


@pytest.mark.parametrize(("mode", "numpy"), [("wheel", 1), ("git", 2)])
def test_what_is_built_here_takes_a_newer_numpy(mode: str, numpy: int) -> None:
    script = SCRIPT.read_text()
    pins = script[script.index("NUMPY_OF_GIT=") : script.index("\nPINS\n}\n")] + "\nPINS\n}\n"
    shown = subprocess.run(
        ["bash", "-c", f"mode={mode}\n{pins[: pins.index(chr(10))]}\n{pins[pins.index('pins() {') :]}pins"],
        capture_output=True, text=True, check=True,
    ).stdout.splitlines()  # fmt: skip
    found = [line for line in shown if line.startswith("numpy==")]
    assert len(found) == 1 and found[0].startswith(f"numpy=={numpy}.")


def make(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run make as a person does, also where these tests were started by make, which tells its children so."""
    env = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL")}
    return subprocess.run(["make", *words], cwd=folder, capture_output=True, text=True, env=env)


@pytest.mark.parametrize("source", ["", "/somewhere/detectron2"])
def test_detectron2_s_main_branch_has_an_environment_of_its_own(project: Path, source: str) -> None:
    shown = make(project, "-n", "test-main", f"D2HA_DETECTRON2_SRC={source}")
    assert shown.returncode == 0, shown.stderr
    if not source:
        ran = make(project, "test-main", "D2HA_DETECTRON2_SRC=")
        said = "test-main: not run, because D2HA_DETECTRON2_SRC names no source of detectron2\n"
        assert (ran.returncode, ran.stdout) == (0, said)
        return
    order = ["tools/setup_env.sh", ".venv-main/bin/python tools/detectron2_tests.py", ".venv-main/bin/python -m pytest"]
    places = [shown.stdout.index(words) for words in order]
    assert places == sorted(places)
    assert f"DETECTRON2=git DETECTRON2_REPO='{source}'" in shown.stdout


@pytest.mark.parametrize(
    ("target", "command"),
    [
        ("detectron2-tests", "python tools/detectron2_tests.py"),
        ("test", "python -m pytest"),
        ("check", "mypy"),
        ("demo", "python -W ignore::FutureWarning tools/demo.py"),
        ("demo-real", "python -W ignore::FutureWarning tools/demo_real.py"),
        ("bench", "python tools/bench.py"),
        ("soak", "python tools/soak.py"),
    ],
)
def test_every_command_makes_the_environment_first(project: Path, target: str, command: str) -> None:
    ran = make(project, "-n", target)
    assert ran.returncode == 0, ran.stderr
    shown = ran.stdout
    assert shown.index("tools/setup_env.sh") < shown.index(f".venv/bin/{command}")


def test_every_requirement_of_setup_py_is_pinned() -> None:
    script = SCRIPT.read_text()
    pins = script[script.index("<<'PINS'") : script.index("\nPINS\n")]
    pinned = {line.partition("==")[0] for line in pins.splitlines()[1:]}
    wanted = re.search(r'^PACKAGES="([^"]*)"', script, re.MULTILINE)
    assert wanted is not None
    named = set(wanted[1].split())
    arguments = (ROOT / "setup.py").read_text()
    lists = arguments[arguments.index("install_requires=") : arguments.index("entry_points=")]
    # Keys of extras_require end in a colon, so they do not match; a lower bound is no part of the name.
    required = {name.lower() for name in re.findall(r'"([\w.-]+)(?:>=[\d.]+)?"(?!:)', lists)}
    assert {"torch", "pycocotools", "scikit-learn", "safetensors", "pytest"} <= required <= named <= pinned
    # Such a bound must let the pinned version in.
    exact = dict(line.split("==") for line in pins.splitlines()[1:])
    for name, bound in re.findall(r'"([\w.-]+)>=([\d.]+)"', lists):
        assert version_of(exact[name.lower()]) >= version_of(bound)


def version_of(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split("."))
