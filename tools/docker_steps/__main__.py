"""Executes docker/Dockerfile's own instructions without a Docker engine.

    python3 tools/docker_steps [--build-arg NAME=VALUE ...]

In a clean root made with debootstrap, as the user that USER says, with an empty environment; then docker/smoke.sh in
the finished root, without network. Needs Linux, root and debootstrap (apt brings it); nothing but Python's own library.
Where that is not to be had it says so and executes what needs no root in a fresh folder.

Exit status: 0 executed, 1 a step or the smoke test failed, 2 the command line or the Dockerfile is not understood,
3 nothing was executed.
"""

from __future__ import annotations

import argparse
import ctypes
import fcntl
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType

from build import Build, Place, StepError
from cleanroot import CleanRoot, NoCleanRoot
from context import Context
from dockerfile import DockerfileError, Instruction, parse
from host import registry_environment
from weaker import Folder

ROOT = Path(__file__).resolve().parents[2]
FAILED, NOT_UNDERSTOOD, NOT_EXECUTED, NO_CLEAN_ROOT = 1, 2, 3, 4
# tools/setup_env.sh asks for 12,000 MB itself; the system under it takes the rest.
NEED_MB = 13_000
PR_SET_PDEATHSIG = 1
NAMESPACES = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--propagation", "private", "--"]


def say(text: str) -> None:
    print(f"docker-steps: {text}", flush=True)


def main() -> int:
    options = arguments().parse_args()
    try:
        steps = parse(options.dockerfile.read_text(encoding="utf-8"))
        if options.inside:
            return inside(options, steps)
        Build(steps, dict(options.build_arg), Folder(Path(), {}), Context(options.context))  # looks at --build-arg
    except (OSError, DockerfileError) as error:
        say(f"{options.dockerfile}: {error}")
        return NOT_UNDERSTOOD
    if sys.platform != "linux":
        say("NOT EXECUTED: this needs Linux")
        return NOT_EXECUTED
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, stop)
    options.work.mkdir(parents=True, exist_ok=True)
    with open(options.work / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"NOT EXECUTED: another run works in {options.work}")
            return NOT_EXECUTED
        return outside(options, steps)


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="docker_steps", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dockerfile", type=Path, default=ROOT / "docker" / "Dockerfile", metavar="FILE")
    parser.add_argument("--context", type=Path, default=ROOT, metavar="FOLDER")
    parser.add_argument("--build-arg", type=pair, action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--base", type=Path, metavar="FOLDER", help="copy this root instead of making a fresh Debian")
    parser.add_argument(
        "--smoke",
        default="bash docker/smoke.sh",
        metavar="COMMAND",
        help="run in the finished root with CMD's words after it (default: %(default)s)",
    )
    parser.add_argument("--work", type=Path, default=ROOT / "output" / "docker_steps", metavar="FOLDER")
    parser.add_argument("--need-mb", type=int, default=NEED_MB, metavar="MB", help="free disk to ask for (%(default)s)")
    parser.add_argument("--keep", action="store_true", help="leave the finished root in the work folder")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    return parser


def pair(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError("expected NAME=VALUE")
    return name, value


def stop(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


def outside(options: argparse.Namespace, steps: list[Instruction]) -> int:
    """Makes room, starts the part that runs in namespaces of its own, and cleans up after it."""
    root = options.work / "root"
    remove(root)  # what a killed run left
    if (free := shutil.disk_usage(options.work).free // 10**6) < options.need_mb:
        say(f"NOT EXECUTED: {options.need_mb} MB of disk are needed under {options.work}, {free} MB are free")
        return NOT_EXECUTED
    started = time.monotonic()
    try:
        why = missing(options)
        if not why:
            status = in_namespaces()
            if status != NO_CLEAN_ROOT:
                return status
            why = "it could not be made, see above"
            remove(root)
        say(f"NOT EXECUTED IN A CLEAN ROOT: {why}")
        say("the weaker form: what needs no root, in a fresh folder with an empty environment")
        return execute(options, steps, Folder(root, registry_environment(os.environ)))
    except KeyboardInterrupt:
        say("interrupted")
        return 128 + signal.SIGINT
    finally:
        if options.keep:
            say(f"{root} is left; nothing is mounted there")
        else:
            deleting = time.monotonic()
            remove(root)
            say(f"deleted {root} in {time.monotonic() - deleting:.0f} s")
        say(f"{time.monotonic() - started:.0f} s in all")


def missing(options: argparse.Namespace) -> str | None:
    """What this machine lacks for a clean root, after trying to install debootstrap."""
    if os.geteuid() != 0:
        return "that needs root"
    if not shutil.which("unshare"):
        return "unshare (util-linux) is missing"
    tried = subprocess.run([*NAMESPACES, "true"], capture_output=True, text=True)
    if tried.returncode:
        return f"this machine does not let root make namespaces ({tried.stderr.strip()})"
    if not options.base and not shutil.which("debootstrap"):
        say("installing debootstrap with apt-get")
        install = "apt-get update -q && apt-get install -qy --no-install-recommends debootstrap debian-archive-keyring"
        tried = subprocess.run(["sh", "-c", install], capture_output=True, text=True, stdin=subprocess.DEVNULL)
        if not shutil.which("debootstrap"):
            return f"debootstrap is missing, and apt-get did not install it: {tried.stderr.strip()[-300:]}"
    return None


def in_namespaces() -> int:
    """This program again, with mounts and processes that all end with it; its exit status."""
    prctl = ctypes.CDLL(None).prctl  # looked up before the fork

    def die_with_parent() -> None:
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)

    words = [*NAMESPACES, sys.executable, str(Path(__file__).parent), "--inside", *sys.argv[1:]]
    # A session of its own, so that Ctrl-C reaches this process alone, which then ends all the others at once.
    with subprocess.Popen(words, start_new_session=True, preexec_fn=die_with_parent) as child:
        try:
            return child.wait()
        finally:
            child.kill()


def inside(options: argparse.Namespace, steps: list[Instruction]) -> int:
    lent = registry_environment(os.environ)
    say(f"lent for the time of the run: {', '.join(sorted(lent)) or 'nothing'}")
    try:
        return execute(options, steps, CleanRoot(options.work / "root", lent, options.base))
    except NoCleanRoot as error:
        say(f"no clean root: {error}")
        return NO_CLEAN_ROOT


def execute(options: argparse.Namespace, steps: list[Instruction], place: Place) -> int:
    name = os.path.relpath(options.dockerfile)
    build = Build(steps, dict(options.build_arg), place, Context(options.context), name=name, say=say)
    try:
        state = build.execute()
        words = [*shlex.split(options.smoke), *state.cmd]
        say(f"as {state.user} in {state.folder}, without network: {shlex.join(words)}")
        started = time.monotonic()
        state.args.clear()  # they end with the build
        if status := place.run(words, state, network=False):
            raise StepError(f"{shlex.join(words)}: ended with exit status {status}")
    except StepError as error:
        say(f"FAILED: {error}")
        return FAILED
    except DockerfileError as error:
        say(str(error))
        return NOT_UNDERSTOOD
    say(f"  done; {time.monotonic() - started:.0f} s")
    for line in build.left_out:
        say(f"NOT EXECUTED: {line}")
    say(f"executed {len(steps) - len(build.left_out)} of {len(steps)} instructions, and the smoke test")
    return 0


def remove(root: Path) -> None:
    """Deletes the folder, unless something is mounted in it.

    Raises:
        SystemExit: then, or when it is still there after some seconds.
    """
    mounted = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    if inner := [place for place in mounted if Path(place).is_relative_to(root.resolve())]:
        raise SystemExit(f"docker-steps: {inner[0]} is mounted; it is not deleted. Run: umount -R {root}")
    for _ in range(20):
        if not os.path.lexists(root):
            return
        shutil.rmtree(root, ignore_errors=True)  # a process that is being killed may still write
        time.sleep(0 if not os.path.lexists(root) else 0.5)
    raise SystemExit(f"docker-steps: {root} could not be deleted")


if __name__ == "__main__":
    raise SystemExit(main())
