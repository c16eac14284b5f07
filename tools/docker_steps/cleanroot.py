"""A clean root: a fresh system in a folder, entered with chroot.

Everything here runs inside mount and process namespaces of its own (``__main__`` sees to that). What is mounted under
the folder therefore exists for this process and its children only and ends with them: whoever deletes the folder
afterwards cannot reach the host's /dev or /proc through it.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import posixpath
import re
import shutil
import socket
import struct
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from build import State, StepError
from host import CERTIFICATES, apt_configuration, debian_mirror

SCRIPTS = Path("/usr/share/debootstrap/scripts")
# How tags name Ubuntu's releases. Debian's go by their code names.
UBUNTU = {"ubuntu20.04": "focal", "ubuntu22.04": "jammy", "ubuntu24.04": "noble"}
LENT = "/run/docker_steps"
CLONE_NEWNET = 0x40000000


class NoCleanRoot(Exception):
    """This machine cannot make one; the text says why."""


@dataclass(frozen=True)
class User:
    """What a USER stands for in the clean root's own /etc/passwd and /etc/group."""

    uid: int
    gid: int
    groups: tuple[int, ...]
    home: str


class CleanRoot:
    """A :class:`build.Place`.

    Args:
        root: the folder to make.
        lent: the environment of :func:`host.registry_environment`.
        given: a folder to copy in place of a fresh Debian, such as an unpacked base image.
    """

    def __init__(self, root: Path, lent: Mapping[str, str], given: Path | None = None) -> None:
        self.root, self.given = root, given
        self.lent = dict(lent)

    def base(self, image: str) -> str:
        """Raises NoCleanRoot."""
        if self.given:
            called(["cp", "-a", "--", str(self.given), str(self.root)])
            what = f"a copy of {self.given}"
        else:
            suite = suite_of(image)
            mirror = debian_mirror(suite)
            wanted = ["debootstrap", "--force-check-gpg", "--variant=minbase", suite, str(self.root)]
            called(wanted + ([mirror] if mirror else []))
            what = f"{suite} made by debootstrap (minbase)"
        self._mount()
        self._lend()
        return f"{image} cannot be pulled without an engine; {what} stands in for it"

    def _mount(self) -> None:
        """/proc, /sys, /dev and /run as an engine gives them, and the host's name resolution."""

        def mount(*words: str) -> None:
            called(["mount", *words])

        for name in ("proc", "sys", "dev", "run", "etc"):
            (self.root / name).mkdir(exist_ok=True)
        mount("-t", "proc", "proc", f"{self.root}/proc")
        mount("-t", "sysfs", "-o", "ro", "sysfs", f"{self.root}/sys")
        mount("-t", "tmpfs", "-o", "mode=755", "tmpfs", f"{self.root}/run")
        dev = self.root / "dev"
        mount("-t", "tmpfs", "-o", "mode=755", "tmpfs", str(dev))
        for name in ("null", "zero", "full", "random", "urandom", "tty"):
            (dev / name).touch()
            mount("--bind", f"/dev/{name}", str(dev / name))
        for name, target in (("fd", ""), ("stdin", "/0"), ("stdout", "/1"), ("stderr", "/2")):
            (dev / name).symlink_to(f"/proc/self/fd{target}")
        (dev / "pts").mkdir()
        mount("-t", "devpts", "-o", "newinstance,ptmxmode=0666", "devpts", str(dev / "pts"))
        (dev / "ptmx").symlink_to("pts/ptmx")
        (dev / "shm").mkdir()
        mount("-t", "tmpfs", "-o", "mode=1777,size=64m", "tmpfs", str(dev / "shm"))  # Docker's size
        for name in ("resolv.conf", "hosts"):
            inside = self.root / "etc" / name
            inside.unlink(missing_ok=True)
            inside.touch()
            if os.path.exists(f"/etc/{name}"):
                mount("--bind", "-o", "ro", os.path.realpath(f"/etc/{name}"), str(inside))

    def _lend(self) -> None:
        """Puts certificates and apt's settings under /run, which is no part of what is built."""
        place = Path(f"{self.root}{LENT}")
        place.mkdir(mode=0o755)
        for name in CERTIFICATES:
            if name in self.lent:
                shutil.copyfile(self.lent[name], place / f"{name}.pem")
                self.lent[name] = f"{LENT}/{name}.pem"
        if settings := apt_configuration():
            (place / "apt.conf").write_text(settings)
            self.lent["APT_CONFIG"] = f"{LENT}/apt.conf"

    def unable(self, state: State) -> str | None:
        return None

    def run(self, words: list[str], state: State, *, network: bool = True) -> int:
        """Raises StepError when the user or the folder does not exist."""
        user = self.user(state.user)

        def enter() -> None:
            if not network:
                only_loopback()
            os.chroot(self.root)
            os.setgroups(user.groups)
            os.setgid(user.gid)
            os.setuid(user.uid)
            os.chdir(state.folder)

        environment = {**(self.lent if network else {}), **state.args, "HOME": user.home, **state.env}
        try:
            return subprocess.run(
                words, env=environment, preexec_fn=enter, stdin=subprocess.DEVNULL, umask=0o022
            ).returncode
        except FileNotFoundError:
            return 127
        except PermissionError:
            return 126
        except subprocess.SubprocessError:
            raise StepError(f"cannot start in {state.folder} as {state.user}") from None

    def user(self, text: str) -> User:
        """``name``, ``uid``, ``name:group`` or ``uid:gid``, read as Docker does.

        Raises:
            StepError: a name that /etc/passwd or /etc/group does not have.
        """
        name, _, group = text.partition(":")
        row = next((row for row in self._table("passwd") if name in (row[0], row[2])), None)
        if row is None and not name.isdigit():
            raise StepError(f"names a user {name} that /etc/passwd does not have")
        uid, gid, home = (int(row[2]), int(row[3]), row[5]) if row else (int(name), 0, "/")
        groups = [int(entry[2]) for entry in self._table("group") if row and row[0] in entry[3].split(",")]
        if group:
            entry = next((entry for entry in self._table("group") if group in (entry[0], entry[2])), None)
            if entry is None and not group.isdigit():
                raise StepError(f"names a group {group} that /etc/group does not have")
            gid, groups = int(entry[2]) if entry else int(group), []
        return User(uid, gid, tuple(dict.fromkeys([gid, *groups])), home)

    def _table(self, name: str) -> list[list[str]]:
        file = self.root / "etc" / name
        return [line.split(":") for line in file.read_text().splitlines()] if file.is_file() else [["root"] + ["0"] * 6]

    def make_folder(self, folder: str) -> None:
        self._inside(folder).mkdir(parents=True, exist_ok=True)

    def copy(self, entries: Iterator[tuple[Path, str]], folder: str, owner: str) -> int:
        user = self.user(owner)
        return copy_entries(entries, self._inside(folder), (user.uid, user.gid))

    def _inside(self, folder: str) -> Path:
        path = self.root
        for part in posixpath.normpath(folder).strip("/").split("/"):
            path = path / part
            if path.is_symlink():  # an absolute one would lead out of the root
                raise StepError(f"goes through the link {path.relative_to(self.root)}")
        return path

    def megabytes(self) -> int:
        return megabytes(self.root)


def suite_of(image: str) -> str:
    """The release that a tag such as ``3.11-slim-bookworm`` ends in.

    Raises:
        NoCleanRoot: it names none that debootstrap knows.
    """
    words = re.split(r"[:-]", image)
    for word in reversed(words):
        suite = UBUNTU.get(word, word)
        if suite.isalpha() and (SCRIPTS / suite).exists():
            return suite
    raise NoCleanRoot(f"{image} names no release that debootstrap knows")


def copy_entries(entries: Iterator[tuple[Path, str]], folder: Path, owner: tuple[int, int] | None) -> int:
    """Copies files, folders and links with their permissions; how many files."""
    count = 0
    made = [folder] if not folder.exists() else []
    folder.mkdir(parents=True, exist_ok=True)
    for source, name in entries:
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir() and not source.is_symlink():
            if target.exists():
                continue
            target.mkdir()
            shutil.copymode(source, target)
        elif source.is_file() or source.is_symlink():
            shutil.copy2(source, target, follow_symlinks=False)
            count += 1
        else:
            continue  # sockets and the like are not sent to an engine
        made.append(target)
    for path in made:
        if owner:
            os.chown(path, owner[0], owner[1], follow_symlinks=False)
    return count


def megabytes(folder: Path) -> int:
    shown = subprocess.run(["du", "-sxm", "--", str(folder)], capture_output=True, text=True).stdout
    return int(shown.split()[0])


def only_loopback() -> None:
    """Leaves this process a network of its own with the loopback alone, as ``docker run --network none``."""
    if ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "unshare")
    flags, up = 0x8914, 0x1  # SIOCSIFFLAGS, IFF_UP
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        fcntl.ioctl(any_socket, flags, struct.pack("16sh14x", b"lo", up))


def called(words: list[str]) -> None:
    """Runs a command of the host whose output matters only when it fails.

    Raises:
        NoCleanRoot: with its last lines.
    """
    done = subprocess.run(words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if done.returncode:
        last = done.stdout.decode(errors="replace").strip().splitlines()[-3:]
        raise NoCleanRoot(f"{words[0]} ended with exit status {done.returncode}: {' / '.join(last)}")
