"""docker/Dockerfile is pinned, ends as no root and installs through one script; tools/docker_steps executes it truly.

The tool's own tests run it on small Dockerfiles in a root that holds a shell and little else.
"""

from __future__ import annotations

import fcntl
import importlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers.commands import ROOT

TOOL = ROOT / "tools" / "docker_steps"
DOCKERFILE = (ROOT / "docker" / "Dockerfile").read_text(encoding="utf-8")
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="a tool for Linux")
MODULES = ("dockerfile", "context", "build", "host", "cleanroot", "weaker")


@pytest.fixture(scope="module")
def tool() -> Iterator[Any]:
    """The tool's modules by name. It is no package: it must start with any Python, before there is an environment."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(TOOL))
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in MODULES})
        for name in MODULES:
            sys.modules.pop(name, None)


# ----------------------------------------------------------------------------------------------- the Dockerfile itself


def complaints(tool: Any, text: str) -> list[str]:
    """What is wrong with a Dockerfile of this project, one word each."""
    steps = tool.dockerfile.parse(text)
    of = {name: [step for step in steps if step.name == name] for name in tool.dockerfile.KNOWN}
    found = []
    if not of["USER"] or of["USER"][-1].text.partition(":")[0] in ("root", "0"):
        found.append("root")
    defaults = {name: value or "" for step in of["ARG"] for name, value in step.pairs()}
    image = tool.dockerfile.expand(of["FROM"][0].text, defaults)
    if not re.search(r":\d+\.\d+\.\d+[\w.-]*$|@sha256:[0-9a-f]{64}$", image):
        found.append("unpinned")
    if any(re.search(r"\b(pip3?|conda|uv)\s+install|curl|wget|git clone", step.text) for step in of["RUN"]):
        found.append("installs")
    scripts = [step for step in of["RUN"] if "tools/setup_env.sh" in step.text]
    if len(scripts) != 1 or not of["USER"] or scripts[0].line < of["USER"][-1].line:
        found.append("script")
    context = tool.context.Context(ROOT)
    for step in of["COPY"]:
        for source in step.split_flags("chown")[1].split()[:-1]:
            try:
                found += [] if any(context.files(source)) else ["copy"]
            except tool.context.NotInContext:
                found.append("copy")
    words = of["CMD"][-1].exec_form() if of["CMD"] else None
    if (
        not words
        or words[0] != "make"
        or not re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
    ):
        found.append("cmd")
    return found


def test_the_dockerfile_is_pinned_and_not_root(tool: Any) -> None:
    assert complaints(tool, DOCKERFILE) == []


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ("USER user\n", "", ["root", "script"]),
        ("USER user\n", "USER root\n", ["root"]),
        ("CMD ", "USER 0:0\nCMD ", ["root", "script"]),
        (":3.11.14-slim-bookworm", ":latest", ["unpinned"]),
        (":3.11.14-slim-bookworm", "", ["unpinned"]),
        (":3.11.14-slim-bookworm", ":3.11-slim", ["unpinned"]),
        ("bash tools/setup_env.sh", ".venv/bin/pip install torch", ["installs", "script"]),
        ("COPY --chown=user:user . .", "COPY --chown=user:user sources .", ["copy"]),
        ("COPY --chown=user:user . .", "COPY --chown=user:user .git .", ["copy"]),
        ('"make", "test"', '"make", "tests"', ["cmd"]),
    ],
)
def test_a_worse_dockerfile_is_noticed(tool: Any, old: str, new: str, complaint: list[str]) -> None:
    assert old in DOCKERFILE
    assert complaints(tool, DOCKERFILE.replace(old, new)) == complaint


def test_every_build_argument_is_in_the_readme(tool: Any) -> None:
    names = {name for step in tool.dockerfile.parse(DOCKERFILE) if step.name == "ARG" for name, _ in step.pairs()}
    assert {"BASE", "DETECTRON2"} <= names
    readme = (ROOT / "docker" / "README.md").read_text(encoding="utf-8")
    assert {name for name in names if f"`{name}`" not in readme} == set()
    assert set(re.findall(r"--build-arg (\w+)=", readme)) <= names


def test_the_context_is_what_git_has(tool: Any) -> None:
    """Nothing that a clone has is missing, and nothing that a machine gathers comes along."""
    ignore = tool.context.Context(ROOT).ignore
    for path in (".git", ".git/HEAD", ".venv/bin/python", ".venv.lock", "output/demo/a.pth", "shared/real/x"):
        assert ignore.excludes(path), path
    for path in ("d2_headadapt/__pycache__/a.pyc", "__pycache__/a.pyc", "d2_headadapt.egg-info/PKG-INFO"):
        assert ignore.excludes(path), path
    if (ROOT / ".git").exists():
        listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
        assert [path for path in listed.splitlines() if ignore.excludes(path)] == []


# ---------------------------------------------------------------------------------------------------------- the parser


def test_lines_are_joined_as_docker_joins_them(tool: Any) -> None:
    steps = tool.dockerfile.parse("# a\nFROM x\nrun a \\\n# between\n\n  && b \\  \n  c\n\nENV A=1")
    assert [(step.line, step.name, step.text) for step in steps] == [
        (2, "FROM", "x"),
        (3, "RUN", "a   && b   c"),
        (9, "ENV", "A=1"),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("FROM x\nADD a b", "line 2: the instruction ADD is not known"),
        ("FROM x\nHEALTHCHECK NONE", "line 2: the instruction HEALTHCHECK is not known"),
        ("# escape=`\nFROM x", "line 1: parser directives"),
        ("FROM x\nRUN cat <<EOF\nEOF", "line 2: RUN: heredocs"),
        ("FROM x\nRUN a \\", "line 2: the file ends"),
        ("FROM x\nUSER", "line 2: USER: says nothing"),
        ("RUN a", "expected exactly one FROM"),
        ("RUN a\nFROM x", "expected exactly one FROM"),
        ("FROM x\nFROM y", "expected exactly one FROM"),
    ],
)
def test_what_is_not_known_is_an_error(tool: Any, text: str, message: str) -> None:
    with pytest.raises(tool.dockerfile.DockerfileError, match=re.escape(message)):
        tool.dockerfile.parse(text)


@pytest.mark.parametrize(
    ("text", "expanded"),
    [
        ("$A/${A}b", "1/1b"),
        ("${B:-two}${A:-two}", "two1"),
        ("${A:+x}${B:+x}", "x"),
        ("$B${EMPTY:-y}", "y"),
        (r"\$A", "$A"),
        ("a$", "a$"),
    ],
)
def test_variables(tool: Any, text: str, expanded: str) -> None:
    assert tool.dockerfile.expand(text, {"A": "1", "EMPTY": ""}) == expanded


@pytest.mark.parametrize("text", ["${A#x}", "${A", "${A-b}"])
def test_other_forms_of_variables_are_an_error(tool: Any, text: str) -> None:
    with pytest.raises(ValueError, match="is not known"):
        tool.dockerfile.expand(text, {"A": "1"})


@pytest.mark.parametrize(
    ("rules", "path", "excluded"),
    [
        ("a", "a", True),
        ("a", "a/b/c", True),
        ("a", "b/a", False),  # anchored, unlike .gitignore
        ("/a/", "a/x", True),
        ("**/a", "b/c/a/d", True),
        ("**/a", "a", True),
        ("a/**", "a/b/c", True),
        ("*.md", "x.md", True),
        ("*.md", "docs/x.md", False),
        ("docs/*.md", "docs/x.md", True),
        ("?.md", "xy.md", False),
        ("a.b", "axb", False),
        ("*\n!keep", "keep/x", False),
        ("!keep\n*", "keep", True),
        ("# a\n\n", "a", False),
    ],
)
def test_dockerignore(tool: Any, rules: str, path: str, excluded: bool) -> None:
    assert tool.context.Ignore(rules).excludes(path) is excluded


# ------------------------------------------------------------------------------------------- what a step leaves behind


class Recorder:
    """A place where nothing happens."""

    def __init__(self) -> None:
        self.images: list[str] = []
        self.ran: list[tuple[str, dict[str, str], dict[str, str], str, str]] = []
        self.folders: list[str] = []
        self.copied: dict[str, tuple[list[str], str]] = {}

    def base(self, image: str) -> str:
        self.images.append(image)
        return "nothing"

    def unable(self, state: Any) -> None:
        return None

    def run(self, words: list[str], state: Any, *, network: bool = True) -> int:
        self.ran.append((words[-1], dict(state.args), dict(state.env), state.user, state.folder))
        return 0

    def make_folder(self, folder: str) -> None:
        self.folders.append(folder)

    def copy(self, entries: Iterator[tuple[Path, str]], folder: str, owner: str) -> int:
        names = [name for _, name in entries]
        self.copied[folder] = (names, owner)
        return len(names)

    def megabytes(self) -> int:
        return 0


Execute = Callable[..., tuple[Recorder, Any]]


@pytest.fixture
def execute(tool: Any, tmp_path: Path) -> Execute:
    def run(text: str, **arguments: str) -> tuple[Recorder, Any]:
        place = Recorder()
        build = tool.build.Build(
            tool.dockerfile.parse(text), arguments, place, tool.context.Context(tmp_path), say=lambda line: None
        )
        return place, build.execute()

    return run


def test_arguments_before_from_end_there(execute: Execute) -> None:
    text = "ARG BASE=a:1\nARG SHOWN=s\nFROM ${BASE}\nARG SHOWN\nARG X=x\nARG Y\nRUN one"
    place, _ = execute(text)
    assert place.images == ["a:1"]
    assert place.ran[0][:2] == ("one", {"SHOWN": "s", "X": "x"})
    place, _ = execute(text, BASE="b:2", X="", Y="y")
    assert place.images == ["b:2"]
    assert place.ran[0][1] == {"SHOWN": "s", "X": "", "Y": "y"}


def test_an_unknown_build_argument_is_an_error(tool: Any, execute: Execute) -> None:
    with pytest.raises(tool.dockerfile.DockerfileError, match="no ARG of that name: DETECTRON; there are BASE"):
        execute("ARG BASE=a\nFROM $BASE", DETECTRON="git")


def test_env_user_and_workdir_hold_for_what_follows(execute: Execute) -> None:
    place, state = execute(
        'FROM x\nRUN one\nENV A=1 B="two words"\nENV PATH=/venv:${PATH} C=$A\nUSER me\nWORKDIR /w\nWORKDIR in/../deep\n'
        'RUN ["a", "b c"]\nCMD ["make", "test"]'
    )
    (_, _, first, user, folder), (last, _, env, new_user, new_folder) = place.ran
    assert (list(first), user, folder) == (["PATH"], "root", "/")
    assert (last, new_user, new_folder) == ("b c", "me", "/w/deep")
    assert env == {"PATH": f"/venv:{first['PATH']}", "A": "1", "B": "two words", "C": "1"}
    assert place.folders == ["/w", "/w/deep"]
    assert state.cmd == ["make", "test"]


def test_copy_takes_what_the_context_has(tool: Any, execute: Execute, tmp_path: Path) -> None:
    for name in ("a/b.txt", "a/secret/c.txt", "top.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / ".dockerignore").write_text("**/secret\n")
    place, _ = execute("FROM x\nWORKDIR /w\nCOPY --chown=me . .\nCOPY a top.txt sub/")
    assert place.copied["/w"] == ([".dockerignore", "a", "top.txt", "a/b.txt"], "me")
    assert place.copied["/w/sub"] == (["top.txt"], "root:root")  # the second source's; the first came before it
    for source in ("nothing", "a/secret", "../x"):
        with pytest.raises(tool.build.StepError, match=rf"Dockerfile:2: COPY finds no {re.escape(source)}"):
            execute(f"FROM x\nCOPY {source} .")
    with pytest.raises(tool.dockerfile.DockerfileError, match="flag --from is not known"):
        execute("FROM x\nCOPY --from=other a .")
    with pytest.raises(tool.dockerfile.DockerfileError, match="must be a folder"):
        execute("FROM x\nCOPY top.txt new.txt")


def test_registry_settings_are_lent_without_folders_of_this_machine(tool: Any, tmp_path: Path) -> None:
    certificate = tmp_path / "ca.pem"
    certificate.touch()
    (tmp_path / "pip.conf").write_text(
        f"[global]\ncert = {certificate}\nextra-index-url = file:///packages\n  https://mirror.invalid/simple\n"
        "find-links = /wheels\n[install]\ntrusted-host = mirror.invalid\n"
    )
    lent = tool.host.registry_environment(
        {
            "HOME": str(tmp_path / "nobody"),
            "PIP_CONFIG_FILE": str(tmp_path / "pip.conf"),
            "PIP_FIND_LINKS": "/wheels",
            "https_proxy": "http://proxy.invalid",
            "SSL_CERT_FILE": str(tmp_path / "missing.pem"),
            "A_SECRET": "x",
        }
    )
    for name in ("PIP_INDEX_URL", "PIP_DEFAULT_TIMEOUT", "PIP_TIMEOUT", "PIP_RETRIES"):
        lent.pop(name, None)  # what this machine's own /etc/pip.conf may say
    assert lent == {
        "PIP_CERT": str(certificate),
        "PIP_EXTRA_INDEX_URL": "https://mirror.invalid/simple",
        "PIP_TRUSTED_HOST": "mirror.invalid",
        "https_proxy": "http://proxy.invalid",
    }


# ---------------------------------------------------------------------------------------------------- in a root, truly


def can_make_namespaces() -> bool:
    if sys.platform != "linux" or os.geteuid() != 0 or not shutil.which("unshare"):
        return False
    return subprocess.run(["unshare", "--mount", "--pid", "--fork", "true"], capture_output=True).returncode == 0


needs_root = pytest.mark.skipif(not can_make_namespaces(), reason="needs root and namespaces on Linux")

SMALL = """\
ARG BASE=tiny:1
FROM $BASE
ARG COLOUR=red
RUN echo "me:x:1234:1234::/home/me:/bin/sh" >> /etc/passwd && echo "me:x:1234:" >> /etc/group \\
    && mkdir -p /home/me/w && chown 1234:1234 /home/me/w && echo $COLOUR > /colour
USER me
WORKDIR /home/me/w
COPY --chown=me:me . .
RUN echo made > made && id -u > uid && id -G > groups && env > env
ENV GREETING=hello
CMD ["the", "command"]
"""


class Box:
    """A folder with a Dockerfile, a context and a root that holds a shell."""

    def __init__(self, folder: Path, text: str = SMALL) -> None:
        self.folder, self.work, self.root = folder, folder / "work", folder / "work" / "root"
        self.context, self.base, self.file = folder / "context", folder / "tiny", folder / "Dockerfile"
        self.file.write_text(text)
        (self.context / "kept").mkdir(parents=True)
        (self.context / "kept" / "file.txt").write_text("x")
        (self.context / "kept" / "run.sh").write_text("true")
        (self.context / "kept" / "run.sh").chmod(0o750)
        (self.context / "kept").chmod(0o711)
        (self.context / ".git").mkdir()
        (self.context / ".dockerignore").write_text(".git\n")

    def make_base(self) -> None:
        (self.base / "etc").mkdir(parents=True)
        (self.base / "etc" / "passwd").write_text("root:x:0:0::/root:/bin/sh\n")
        (self.base / "etc" / "group").write_text("root:x:0:\n")
        for name in ("sh", "id", "env", "mkdir", "chown", "cat", "sleep", "ls"):
            program = shutil.which(name)
            assert program is not None
            self._put(Path(program), f"bin/{name}")
            libraries = subprocess.run(["ldd", program], capture_output=True, text=True, check=True).stdout
            for library in re.findall(r"(/\S+) \(0x", libraries):
                self._put(Path(library), library.lstrip("/"))

    def _put(self, source: Path, name: str) -> None:
        target = self.base / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, target)

    def words(self, *more: str, smoke: str = "sh -c true") -> list[str]:
        named = {"dockerfile": self.file, "context": self.context, "base": self.base, "work": self.work, "smoke": smoke}
        options = [word for name, value in named.items() for word in (f"--{name}", str(value))]
        return [sys.executable, str(TOOL), *options, *(more if "--need-mb" in more else ("--need-mb", "1", *more))]

    def run(self, *more: str, smoke: str = "sh -c true", **env: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.words(*more, smoke=smoke),
            env={**os.environ, **env},
            capture_output=True,
            text=True,
            timeout=300,
            extra_groups=[4] if os.geteuid() == 0 else None,  # which no step may keep
            check=False,
        )


@pytest.fixture
def box(tmp_path: Path) -> Box:
    made = Box(tmp_path)
    if can_make_namespaces():
        made.make_base()
    return made


def mounts_under(folder: Path) -> list[str]:
    return [line for line in Path("/proc/self/mountinfo").read_text().splitlines() if f" {folder}/" in line]


@needs_root
def test_steps_run_as_their_user_with_an_empty_environment(box: Box) -> None:
    result = box.run("--keep", "--build-arg", "COLOUR=blue", A_SECRET="x")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "executed 10 of 10 instructions" in result.stdout
    home = box.root / "home" / "me" / "w"
    assert (box.root / "colour").read_text() == "blue\n"
    assert [(home / name).read_text() for name in ("uid", "groups")] == ["1234\n", "1234\n"]
    env = dict(line.split("=", 1) for line in (home / "env").read_text().splitlines())
    assert {name: env[name] for name in ("HOME", "COLOUR")} == {"HOME": "/home/me", "COLOUR": "blue"}
    assert "GREETING" not in env and "A_SECRET" not in env
    assert sorted(path.name for path in home.iterdir()) == [".dockerignore", "env", "groups", "kept", "made", "uid"]
    for name, mode in (("kept", 0o711), ("kept/run.sh", 0o750)):
        copied = (home / name).stat()
        assert (copied.st_uid, copied.st_gid, copied.st_mode & 0o777) == (1234, 1234, mode)
    # What was mounted or lent is no part of what was built.
    assert [list((box.root / name).iterdir()) for name in ("proc", "sys", "dev", "run")] == [[], [], [], []]
    assert (box.root / "etc" / "resolv.conf").read_text() == ""


@needs_root
def test_the_smoke_test_gets_the_image_as_it_is_run(box: Box) -> None:
    script = 'echo "got $* $GREETING colour:$COLOUR uid:$(id -u)"; cat /proc/net/dev; ls /proc'
    (box.context / "smoke.sh").write_text(script)
    result = box.run(smoke="sh smoke.sh")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "got the command hello colour: uid:1234" in result.stdout  # an ARG ends with the build
    assert re.findall(r"^\s*(\w+):", result.stdout[result.stdout.index("got the") :], re.MULTILINE) == ["lo"]
    assert len(re.findall(r"^\d+$", result.stdout, re.MULTILINE)) < 5  # no process of this machine is in sight
    assert not box.root.exists()

    result = box.run(smoke="sh -c 'exit 9'")
    assert result.returncode == 1
    assert "FAILED: sh -c 'exit 9' the command: ended with exit status 9" in result.stdout


@needs_root
@pytest.mark.parametrize(
    ("step", "message"),
    [
        ("RUN exit 7", "Dockerfile:8: RUN ended with exit status 7"),
        ('RUN ["nothing"]', "Dockerfile:8: RUN ended with exit status 127"),
        ("RUN echo x > /etc/passwd", "Dockerfile:8: RUN ended with exit status"),  # not root any more
        ("COPY --chown=you . .", "Dockerfile:8: COPY names a user you that /etc/passwd does not have"),
        ("COPY .git .", "Dockerfile:8: COPY finds no .git in the context"),
        ("COPY . /proxy/", "Dockerfile:8: COPY goes through the link proxy"),
    ],
)
def test_a_failing_step_gives_its_line(box: Box, step: str, message: str) -> None:
    (box.base / "proxy").symlink_to("/nowhere")
    box.file.write_text(SMALL.replace("COPY --chown=me:me . .", step))
    result = box.run()
    assert result.returncode == 1, result.stdout + result.stderr
    assert f"FAILED: {os.path.relpath(box.folder)}/{message}" in result.stdout
    assert "made" not in result.stdout.splitlines()
    assert not box.root.exists()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("USER me", "ADD me", "line 6: the instruction ADD is not known"),
        ("ARG COLOUR=red", "ARG COLOR=red", "no ARG of that name: COLOUR; there are BASE, COLOR"),
    ],
)
def test_a_dockerfile_not_understood_starts_nothing(box: Box, old: str, new: str, message: str) -> None:
    box.file.write_text(SMALL.replace(old, new))
    result = box.run("--build-arg", "COLOUR=blue")
    assert (result.returncode, result.stderr) == (2, "")
    assert message in result.stdout
    assert not box.work.exists()


def test_too_little_disk_is_said(box: Box) -> None:
    result = box.run("--need-mb", "999999999")
    assert result.returncode == 3
    assert re.search(r"NOT EXECUTED: 999999999 MB of disk are needed .*, \d+ MB are free", result.stdout)


@needs_root
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_an_interrupted_run_leaves_no_process_and_no_mount(box: Box, sent: signal.Signals) -> None:
    box.file.write_text(SMALL.replace("RUN echo made", f"RUN sleep {MARKER}; echo made"))
    assert interrupted(box, sent) in (128 + sent, -sent)
    assert mounts_under(box.root) == []
    assert box.root.exists() is (sent == signal.SIGKILL)
    if sent == signal.SIGKILL:  # nobody could clean up; the next run does
        (box.root / "stale").touch()
        box.file.write_text(SMALL)
        assert box.run("--keep").returncode == 0
        assert not (box.root / "stale").exists()


MARKER = str(100_000 + os.getpid())  # seconds nobody else sleeps


def interrupted(box: Box, sent: signal.Signals, **env: str) -> int:
    """The exit status of a run that gets a signal while MARKER's sleep lasts; none of its processes is left."""
    with subprocess.Popen(
        box.words(),
        stdout=subprocess.DEVNULL,
        env={**os.environ, **env},
        # Whoever runs the tests in the background of a shell has them ignore it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as running:
        try:
            assert waited_for(sleepers)
            running.send_signal(sent)
            running.wait(timeout=60)
        finally:
            running.kill()
    assert waited_for(lambda: not sleepers())
    return running.returncode


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


@needs_root
def test_a_folder_with_a_mount_is_never_deleted(box: Box) -> None:
    inner = box.root / "dev"
    inner.mkdir(parents=True)
    script = 'mount -t tmpfs tmpfs "$0" && touch "$0/precious" && "$@"; echo "status $?"; ls "$0"'
    words = ["unshare", "--mount", "--propagation", "private", "sh", "-c", script, str(inner), *box.words()]
    result = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
    assert "status 1\nprecious\n" in result.stdout
    assert f"{inner} is mounted; it is not deleted" in result.stderr


@needs_root
def test_mounts_do_not_reach_a_machine_that_shares_them(box: Box) -> None:
    """systemd makes every mount shared, so that those of a new namespace appear outside unless it says no."""
    words = ["unshare", "--mount", "--propagation", "shared", *box.words()]
    result = subprocess.run(words, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert not box.root.exists()


def test_two_runs_at_once_do_not_share_a_folder(box: Box) -> None:
    box.work.mkdir()
    with open(box.work / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        result = box.run()
    assert result.returncode == 3
    assert "another run works in" in result.stdout


def test_without_a_clean_root_it_says_so_and_does_the_rest(box: Box, tmp_path: Path) -> None:
    """No ``unshare`` on PATH, as on a machine that does not let us in."""
    programs = tmp_path / "programs"
    programs.mkdir()
    for name in ("du", "sh"):
        program = shutil.which(name)
        assert program is not None
        (programs / name).symlink_to(program)
    (box.context / "smoke.sh").write_text(
        'echo "got $* $GREETING"; [ -f kept/file.txt ] && [ ! -e .git ] && [ -f made ]'
    )
    result = box.run(smoke="sh smoke.sh", PATH=str(programs), A_SECRET="x")
    assert result.returncode == 0, result.stdout + result.stderr
    assert re.search("NOT EXECUTED IN A CLEAN ROOT: (that needs root|unshare .* is missing)", result.stdout)
    assert "Dockerfile:4 RUN: it is root's, and there is no clean root" in result.stdout
    assert "got the command hello" in result.stdout
    assert "executed 9 of 10 instructions" in result.stdout
    assert not box.root.exists()
    assert "A_SECRET" not in result.stdout

    box.file.write_text(SMALL.replace("RUN echo made", "RUN exit 5; echo made"))
    result = box.run(PATH=str(programs))
    assert result.returncode == 1
    assert "Dockerfile:9: RUN ended with exit status 5" in result.stdout

    box.file.write_text(SMALL.replace("RUN echo made", f"RUN sleep {MARKER} & wait; echo made"))
    assert interrupted(box, signal.SIGTERM, PATH=str(programs)) == 128 + signal.SIGTERM
    assert not box.root.exists()
