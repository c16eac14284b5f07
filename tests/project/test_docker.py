"""The Dockerfile is pinned, ends as no root and installs through one script; build.sh builds it or says why not.

The tests of the script give it programs of their own by PATH. The true build is `make docker` and the end of .ci/run.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path

import pytest
from helpers.commands import ROOT

DOCKERFILE = (ROOT / "docker" / "Dockerfile").read_text(encoding="utf-8")
IGNORED = (ROOT / ".dockerignore").read_text(encoding="utf-8").split()
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="a script for Linux")


# ----------------------------------------------------------------------------------------------- the Dockerfile itself


def instructions(text: str) -> list[tuple[str, str]]:
    """Name and text of every instruction, comments taken out and continued lines joined."""
    lines = re.sub(r"^\s*(#.*)?\n", "", text, flags=re.MULTILINE).replace("\\\n", "").splitlines()
    return [(name, rest.strip()) for name, _, rest in (line.partition(" ") for line in lines)]


def texts(text: str, name: str) -> list[str]:
    return [rest for found, rest in instructions(text) if found == name]


def ignored(path: str) -> bool:
    """Whether .dockerignore keeps ``path`` out of the context, by the two forms of lines that it uses."""
    parts = path.split("/")
    return any(
        any(fnmatch(part, rule[3:]) for part in parts) if rule.startswith("**/") else parts[0] == rule
        for rule in IGNORED
    )


def complaints(text: str) -> list[str]:
    """What is wrong with a Dockerfile of this project, one word each."""
    found = []
    names = [name for name, _ in instructions(text)]
    users = [at for at, name in enumerate(names) if name == "USER"]
    if not users or instructions(text)[users[-1]][1].partition(":")[0] in ("root", "0"):
        found.append("root")
    if texts(text, "FROM") != ["${BASE}"]:
        found.append("base")
    base = next((rest for rest in texts(text, "ARG") if rest.startswith("BASE=")), "")
    if not re.search(r":\d+\.\d+\.\d+[\w.-]*$|@sha256:[0-9a-f]{64}$", base):
        found.append("unpinned")
    if any(re.search(r"\b(pip3?|conda|uv)\s+install|curl|wget|git clone", rest) for rest in texts(text, "RUN")):
        found.append("installs")
    scripts = [at for at, (name, rest) in enumerate(instructions(text)) if name == "RUN" and "setup_env.sh" in rest]
    if len(scripts) != 1 or not users or scripts[0] < users[-1]:
        found.append("script")
    for rest in texts(text, "COPY"):
        sources = [word for word in rest.split() if not word.startswith("--")][:-1]
        if not all((ROOT / source).exists() and not ignored(source) for source in sources):
            found.append("copy")
    command = re.fullmatch(r'\["make", "(\w+)"\]', (texts(text, "CMD") or [""])[-1])
    if not command or not re.search(rf"^{command[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE):
        found.append("cmd")
    return found


def test_the_dockerfile_is_pinned_and_not_root() -> None:
    assert complaints(DOCKERFILE) == []


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ("USER user\n", "", ["root", "script"]),
        ("USER user\n", "USER root\n", ["root"]),
        ("CMD ", "USER 0:0\nCMD ", ["root", "script"]),
        ("${BASE}", "debian", ["base"]),
        (":3.11.14-slim-bookworm", ":latest", ["unpinned"]),
        (":3.11.14-slim-bookworm", "", ["unpinned"]),
        (":3.11.14-slim-bookworm", ":3.11-slim", ["unpinned"]),
        ("bash tools/setup_env.sh", ".venv/bin/pip install torch", ["installs", "script"]),
        ("COPY --chown=user:user . .", "COPY --chown=user:user sources .", ["copy"]),
        ("COPY --chown=user:user . .", "COPY --chown=user:user .git .", ["copy"]),
        ('"make", "test"', '"make", "tests"', ["cmd"]),
    ],
)
def test_a_worse_dockerfile_is_noticed(old: str, new: str, complaint: list[str]) -> None:
    assert old in DOCKERFILE
    assert complaints(DOCKERFILE.replace(old, new)) == complaint


def test_every_build_argument_is_in_the_readme() -> None:
    names = {rest.partition("=")[0] for rest in texts(DOCKERFILE, "ARG")}
    assert {"BASE", "DETECTRON2", "TORCH_CUDA_ARCH_LIST"} <= names
    readme = (ROOT / "docker" / "README.md").read_text(encoding="utf-8")
    assert {name for name in names if f"`{name}`" not in readme} == set()
    assert set(re.findall(r"--build-arg (\w+)=", readme)) <= names


def test_the_context_is_what_git_has() -> None:
    """Nothing that a clone has is missing, and nothing that a machine gathers comes along."""
    for path in (".git", ".git/HEAD", ".venv/bin/python", ".venv.lock", "output/demo/a.pth", "shared/real/x"):
        assert ignored(path), path
    for path in ("d2_headadapt/__pycache__/a.pyc", "__pycache__/a.pyc", "d2_headadapt.egg-info/PKG-INFO"):
        assert ignored(path), path
    if (ROOT / ".git").exists():
        listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
        assert [path for path in listed.splitlines() if ignored(path)] == []


def test_dockerignore_says_what_ignored_reads() -> None:
    """A rule in another form would be read otherwise by an engine than by the test above."""
    assert [rule for rule in IGNORED if not re.fullmatch(r"\*\*/[\w.*-]+|[\w.-]+", rule)] == []


# ------------------------------------------------------------------------------------------------------------ build.sh

BUILDAH = """\
printf '%s\\n' "buildah $*" >>"$RECORD"
case "$1" in
  pull) exit "${PULL:-1}" ;;
  from) echo container ;;
  mount) mkdir -p "$TMPDIR/root" && echo "$TMPDIR/root" ;;
  bud)
    [ ! -d "$(dirname "$TMPDIR")/lent" ] || cp "$(dirname "$TMPDIR")"/lent/* "$LENT"
    eval "${BUD:-}"
    ;;
  run) exit "${RUN:-0}" ;;
  inspect) echo make test ;;
esac
"""
DEBOOTSTRAP = 'printf "%s\\n" "debootstrap $*" >>"$RECORD"; exit "${DEBOOTSTRAP:-0}"'
ENGINE = """\
printf '%s\\n' "$(basename "$0") $*" >>"$RECORD"
case "$1" in
  build) exit "${BUILD:-0}" ;;
  run) exit "${RUN:-0}" ;;
  image) echo make test ;;
esac
"""
# Without namespaces: the program is started as it is.
UNSHARE = """\
printf '%s\\n' "unshare $*" >>"$RECORD"
while [ "${1#-}" != "$1" ] || [ "$1" = private ]; do shift; done
exec "$@"
"""
NEEDED = ("awk", "basename", "bash", "cat", "cp", "df", "dirname", "flock", "grep", "mkdir", "rm", "sed", "setpriv")
NEEDED += ("sleep", "sort", "tail", "timeout", "true", "unshare", "cut", "du")


class Box:
    """A project of three files, and a PATH that holds what a test puts there."""

    def __init__(self, folder: Path) -> None:
        self.project, self.programs = folder / "project", folder / "programs"
        self.record, self.lent = folder / "record", folder / "lent"
        for path in (self.project / "docker", self.programs, self.lent):
            path.mkdir(parents=True)
        for name in ("build.sh", "Dockerfile"):
            shutil.copy(ROOT / "docker" / name, self.project / "docker" / name)
        for name in NEEDED:
            program = shutil.which(name)
            assert program is not None, name
            (self.programs / name).symlink_to(program)
        for name, script in (
            ("id", "echo 0"),
            ("unshare", UNSHARE),
            ("buildah", BUILDAH),
            ("debootstrap", DEBOOTSTRAP),
        ):
            self.put(name, script)

    def put(self, name: str, script: str | None) -> None:
        """Makes a program of that name, or, with None, removes it."""
        path = self.programs / name
        path.unlink(missing_ok=True)
        if script is not None:
            path.write_text(f"#!{shutil.which('bash')}\n{script}\n")
            path.chmod(0o755)

    @property
    def work(self) -> Path:
        return self.project / "output" / "docker"

    def words(self, *arguments: str) -> list[str]:
        return [str(self.programs / "bash"), str(self.project / "docker" / "build.sh"), *arguments]

    def env(self, **more: str) -> dict[str, str]:
        said = {"PATH": str(self.programs), "RECORD": str(self.record), "LENT": str(self.lent), "D2HA_NEED_MB": "1"}
        return {**said, "HOME": str(self.project), **more}

    def run(self, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.words(*arguments),
            env=self.env(**env),
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    def called(self) -> list[str]:
        return self.record.read_text().splitlines() if self.record.exists() else []


@pytest.fixture
def box(tmp_path: Path) -> Box:
    return Box(tmp_path)


@pytest.mark.parametrize(
    ("program", "script", "message"),
    [
        ("id", "echo 1000", "neither docker nor podman answers, and buildah needs root"),
        (
            "buildah",
            None,
            "buildah or debootstrap is missing (on Debian, as root: apt-get install buildah debootstrap)",
        ),
        (
            "debootstrap",
            None,
            "buildah or debootstrap is missing (on Debian, as root: apt-get install buildah debootstrap)",
        ),
        ("unshare", "exit 1", "this machine does not let root make namespaces"),
        ("docker", "exit 1", "buildah needs root"),  # its daemon does not answer
    ],
)
def test_a_machine_that_cannot_build_says_so_in_one_line(
    box: Box, program: str, script: str | None, message: str
) -> None:
    if program == "docker":
        box.put("id", "echo 1000")
    box.put(program, script)
    result = box.run()
    assert (result.returncode, result.stdout) == (3, ""), result.stderr
    assert re.fullmatch(rf"docker: NOT BUILT: .*{re.escape(message)}.*\n", result.stderr)
    assert box.called() == [] and not box.work.exists()


def test_too_little_disk_is_said(box: Box) -> None:
    result = box.run(D2HA_NEED_MB="999999999")
    assert (result.returncode, result.stdout) == (3, "")
    assert re.fullmatch(
        r"docker: NOT BUILT: 999999999 MB of disk are needed under .*, \d+ MB are free\n", result.stderr
    )
    assert not box.work.exists()


def test_two_builds_at_once_do_not_share_a_folder(box: Box) -> None:
    box.work.mkdir(parents=True)
    (box.work / "others").touch()
    with open(f"{box.work}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        result = box.run()
    assert result.returncode == 3
    assert "another build works in" in result.stderr
    assert (box.work / "others").exists()


def test_nothing_is_installed_unless_asked_for(box: Box) -> None:
    box.put("buildah", None)
    apt = 'printf "%s\\n" "apt-get $*" >>"$RECORD"; '
    box.put("apt-get", apt)
    assert box.run().returncode == 3
    assert box.called() == []
    assert box.run("--install").returncode == 3  # it brings nothing
    assert [line.split()[1] for line in box.called()] == ["update", "install"]
    assert "buildah debootstrap" in box.called()[1]

    (box.lent / "buildah").write_text(f"#!{shutil.which('bash')}\n{BUILDAH}")
    (box.lent / "buildah").chmod(0o755)
    box.put("apt-get", apt + f'[ "$1" = update ] || cp {box.lent}/buildah {box.programs}/buildah')
    result = box.run("--install")
    assert result.returncode == 0, result.stderr


def test_buildah_builds_on_a_debian_where_no_registry_gives_the_base(box: Box) -> None:
    box.put(
        "apt-get", "printf '%s\\n' 'Packages bookworm main http://mirror.invalid/' 'Packages trixie main http://x/'"
    )
    result = box.run("--build-arg", "DETECTRON2=git")
    assert result.returncode == 0, result.stderr
    assert "python:3.11.14-slim-bookworm" in result.stdout and "stands in for it" in result.stdout
    called = box.called()
    (made,) = (line for line in called if line.startswith("debootstrap"))
    assert " bookworm " in made and made.endswith(" http://mirror.invalid/")
    (built,) = (line for line in called if line.startswith("buildah bud"))
    assert built == (
        "buildah bud -f docker/Dockerfile -t localhost/d2_headadapt"
        " --build-arg DETECTRON2=git --build-arg BASE=localhost/base ."
    )
    assert "unshare --net -- buildah run container -- bash docker/smoke.sh make test" in called
    assert not box.work.exists()


@pytest.mark.parametrize(
    ("arguments", "pull", "pulled"), [((), "0", True), (("--build-arg", "BASE=mine:1.2.3"), "1", False)]
)
def test_a_base_that_can_be_had_is_taken(box: Box, arguments: tuple[str, ...], pull: str, pulled: bool) -> None:
    assert box.run(*arguments, PULL=pull).returncode == 0
    called = box.called()
    assert any(line.startswith("buildah pull") for line in called) is pulled
    assert not any(line.startswith("debootstrap") or "BASE=localhost/base" in line for line in called)


@pytest.mark.parametrize(
    ("env", "status", "message"),
    [
        ({"BUD": "exit 3"}, 1, "FAILED: buildah bud ended with exit status 3"),  # a RUN's own status
        ({"RUN": "3"}, 1, "FAILED: the smoke test"),
        ({"DEBOOTSTRAP": "1"}, 3, "NOT BUILT: debootstrap made no Debian bookworm"),
    ],
)
def test_a_failure_is_not_taken_for_a_machine_that_cannot_build(
    box: Box, env: dict[str, str], status: int, message: str
) -> None:
    result = box.run(**env)
    assert result.returncode == status, result.stderr
    assert message in result.stderr
    assert not box.work.exists()


@pytest.mark.parametrize("engine", ["docker", "podman"])
def test_an_engine_that_answers_is_taken(box: Box, engine: str) -> None:
    box.put(engine, ENGINE)
    assert box.run("--install", "--build-arg", "DETECTRON2=git", PULL="0").returncode == 0
    assert box.called()[1:] == [
        f"{engine} build -f docker/Dockerfile -t d2_headadapt --build-arg DETECTRON2=git .",
        f"{engine} image inspect -f {{{{range .Config.Cmd}}}}{{{{.}}}} {{{{end}}}} d2_headadapt",
        f"{engine} run --rm --network none d2_headadapt bash docker/smoke.sh make test",
    ]
    for step in ("BUILD", "RUN"):
        result = box.run(**{step: "3"})
        assert (result.returncode, "FAILED" in result.stderr) == (1, True)


def test_registry_settings_are_lent_and_nothing_else(box: Box, tmp_path: Path) -> None:
    certificate = tmp_path / "ca.pem"
    index = tmp_path / "packages" / "simple"
    certificate.touch()
    index.mkdir(parents=True)
    listed = f"""\
:env:.cert='{certificate}'
:env:.target='/somewhere'
global.cert='/missing.pem'
global.extra-index-url='https://global.invalid/simple'
global.timeout='7'
install.extra-index-url='\\nfile://{index}\\nhttps://mirror.invalid/simple'
list.format='json'
"""
    (tmp_path / "listed").write_text(listed)
    box.put("python3", f"cat {tmp_path}/listed")
    box.put("apt-config", """printf '%s\n' 'Acquire::http::Proxy "http://proxy.invalid";' 'APT::Install "x";'""")
    assert box.run(A_SECRET="x").returncode == 0
    assert sorted((box.lent / "pip.conf").read_text().splitlines()) == [
        "[global]",
        "cert = /run/lent/cert",
        f"extra-index-url = file://{index} https://mirror.invalid/simple",
        "timeout = 7",
    ]
    assert (box.lent / "apt.conf").read_text() == 'Acquire::http::Proxy "http://proxy.invalid";\n'
    (built,) = (line for line in box.called() if line.startswith("buildah bud"))
    mounted = re.findall(r"-v (\S+):(\S+):ro", built)
    assert built.count(" -v ") == len(mounted)  # nothing can be written
    assert {inside for _, inside in mounted} == {
        "/etc/pip.conf",
        "/etc/apt/apt.conf.d/99lent",
        "/run/lent/cert",
        str(index.parent),
    }


# --------------------------------------------------------------------------------------------------------- interrupted

MARKER = str(100_000 + os.getpid())  # seconds nobody else sleeps


def can_make_namespaces() -> bool:
    if sys.platform != "linux" or os.geteuid() != 0 or not shutil.which("unshare"):
        return False
    return subprocess.run(["unshare", "--mount", "--pid", "--fork", "true"], capture_output=True).returncode == 0


@pytest.mark.skipif(not can_make_namespaces(), reason="needs root and namespaces on Linux")
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_an_interrupted_build_leaves_no_process_and_no_mount(box: Box, sent: signal.Signals) -> None:
    for name in ("unshare", "mount"):
        program = shutil.which(name)
        assert program is not None
        box.put(name, f'exec {program} "$@"')
    # It writes on, so that what is deleted while it lives comes back.
    build = 'while :; do mkdir -p "$TMPDIR/$RANDOM"; done & '
    build += f'mkdir -p "$TMPDIR/m" && mount -t tmpfs tmpfs "$TMPDIR/m" && : >"$TMPDIR/m/x" && sleep {MARKER} & wait'
    with subprocess.Popen(
        box.words(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=box.env(BUD=build),
        # Whoever runs the tests in the background of a shell has them ignore it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as running:
        try:
            assert waited_for(sleepers)
            running.send_signal(sent)
            _, said = running.communicate(timeout=60)
        finally:
            running.kill()
    assert "Killed" not in said
    assert running.returncode == (-sent if sent == signal.SIGKILL else 128 + sent)
    assert waited_for(lambda: not sleepers())
    assert [line for line in Path("/proc/self/mountinfo").read_text().splitlines() if f" {box.work}/" in line] == []
    assert box.work.exists() is (sent == signal.SIGKILL)
    if sent == signal.SIGKILL:  # nobody could clean up; the next build does
        (box.work / "stale").touch()
        assert box.run(BUD='[ ! -e "$TMPDIR/../stale" ]').returncode == 0
        assert not box.work.exists()


def waited_for(condition: Callable[[], object], seconds: float = 30) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    return bool(condition())


def sleepers() -> list[str]:
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = entry.read_bytes().split(b"\0")
        except OSError:
            continue
        if words[:1] == [b"sleep"] and MARKER.encode() in words:
            found.append(str(entry))
    return found


# ----------------------------------------------------------------------------------------------------- who calls it


def test_make_docker_builds() -> None:
    words = ["make", "--no-print-directory", "-n", "docker", "ARGS=--build-arg DETECTRON2=git"]
    told = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    shown = subprocess.run(words, cwd=ROOT, env=told, capture_output=True, text=True, check=True).stdout
    assert shown == "bash docker/build.sh --build-arg DETECTRON2=git\n"


@pytest.mark.parametrize(("build", "status"), [(0, 0), (3, 0), (1, 1), (2, 2)])
def test_ci_fails_with_the_build_and_not_where_it_cannot_be_had(tmp_path: Path, build: int, status: int) -> None:
    for name, script in ((".ci/run", None), ("docker/build.sh", f'echo "called $*"; exit {build}'), ("bin/make", "")):
        path = tmp_path / name
        path.parent.mkdir()
        path.write_text((ROOT / name).read_text() if script is None else f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
    env = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    result = subprocess.run([tmp_path / ".ci" / "run"], env=env, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (status, "called --install\n")
