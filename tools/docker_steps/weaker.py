"""Where no clean root can be made: the steps that need no root, in a fresh folder with an empty environment.

This shows that the context is complete and that the set-up script makes the environment from it. It does not show that
the base image has what the steps need: this machine's own programs stand in for it.
"""

from __future__ import annotations

import os
import posixpath
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path

from build import State
from cleanroot import copy_entries, megabytes


class Folder:
    """A :class:`build.Place` whose ``/`` is a folder only by name: paths in ENV are rewritten, nothing is confined."""

    def __init__(self, top: Path, lent: Mapping[str, str]) -> None:
        self.top, self.lent = top, lent
        self.folders: list[str] = []

    def base(self, image: str) -> str:
        self.top.mkdir(parents=True)
        return f"{image} cannot be pulled without an engine; this machine's own system stands in for it"

    def unable(self, state: State) -> str | None:
        return "it is root's, and there is no clean root" if state.user.partition(":")[0] in ("root", "0") else None

    def run(self, words: list[str], state: State, *, network: bool = True) -> int:
        home = self._here("/home")
        home.mkdir(exist_ok=True)
        environment = {
            **(self.lent if network else {}),
            **state.args,
            "HOME": str(home),
            **({"ANY_USER": "1"} if os.geteuid() == 0 else {}),
            # The Dockerfile's python3 would be the base image's; this one is known to be there.
            "PYTHON": getattr(sys, "_base_executable", sys.executable),
            **{name: self._rewritten(value) for name, value in state.env.items()},
        }
        try:
            child = subprocess.Popen(
                words, env=environment, cwd=self._here(state.folder), stdin=subprocess.DEVNULL, start_new_session=True
            )
        except FileNotFoundError:
            return 127
        try:
            return child.wait()
        finally:  # interrupted, too: what it started ends with it
            with suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()

    def make_folder(self, folder: str) -> None:
        self._here(folder).mkdir(parents=True, exist_ok=True)
        self.folders.append(folder)

    def copy(self, entries: Iterator[tuple[Path, str]], folder: str, owner: str) -> int:
        return copy_entries(entries, self._here(folder), None)

    def _here(self, folder: str) -> Path:
        return self.top / posixpath.normpath(folder).strip("/")

    def _rewritten(self, value: str) -> str:
        for folder in sorted(self.folders, key=len, reverse=True):
            if folder != "/":
                value = os.pathsep.join(
                    str(self._here(part)) if (part + "/").startswith(folder + "/") else part
                    for part in value.split(os.pathsep)
                )
        return value

    def megabytes(self) -> int:
        return megabytes(self.top)
