"""Carries out the instructions, one after the other, in a place that somebody else provides."""

from __future__ import annotations

import posixpath
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from context import Context, NotInContext
from dockerfile import DockerfileError, Instruction, expand

# What an engine gives to a container whose image says nothing of it.
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


class StepError(Exception):
    """A step did not do what it says."""


@dataclass
class State:
    """What the instructions so far leave to the next one, and in the end to the image."""

    env: dict[str, str] = field(default_factory=lambda: {"PATH": PATH})
    args: dict[str, str] = field(default_factory=dict)
    user: str = "root"
    folder: str = "/"
    cmd: list[str] = field(default_factory=list)


class Place(Protocol):
    """Where steps are carried out. Folders are those that the Dockerfile knows."""

    def base(self, image: str) -> str:
        """Makes what stands in for ``image``, and says what that is."""

    def unable(self, state: State) -> str | None:
        """Why a RUN of this state is not carried out here, or None."""

    def run(self, words: list[str], state: State, *, network: bool = True) -> int:
        """The exit status of a command; a missing program is 127."""

    def make_folder(self, folder: str) -> None: ...

    def copy(self, entries: Iterator[tuple[Path, str]], folder: str, owner: str) -> int:
        """Puts entries under ``folder``; how many files."""

    def megabytes(self) -> int: ...


class Build:
    """The run of one Dockerfile.

    Args:
        steps: what :func:`dockerfile.parse` found.
        arguments: those of ``--build-arg``.
        place: where to.
        context: where COPY reads.
        name: the file's name, shown before line numbers.
        say: takes the lines of the report.

    Raises:
        DockerfileError: an argument that no ARG declares.
    """

    def __init__(
        self,
        steps: list[Instruction],
        arguments: Mapping[str, str],
        place: Place,
        context: Context,
        *,
        name: str = "Dockerfile",
        say: Callable[[str], None] = print,
    ) -> None:
        declared = {word for step in steps if step.name == "ARG" for word, _ in step.pairs()}
        if unknown := sorted(set(arguments) - declared):
            raise DockerfileError(f"no ARG of that name: {', '.join(unknown)}; there are {', '.join(sorted(declared))}")
        self.steps, self.arguments, self.place, self.context = steps, arguments, place, context
        self.name, self.say = name, say
        self.state = State()
        self.before_from: dict[str, str] = {}
        self.left_out: list[str] = []  # "Dockerfile:3 RUN: why"

    def execute(self) -> State:
        """Carries out every step.

        Raises:
            StepError: with the line and, of a RUN, the exit status.
            DockerfileError: what this tool does not read.
        """
        for number, step in enumerate(self.steps, 1):
            where = f"{self.name}:{step.line}"
            self.say(f"[{number}/{len(self.steps)}] {where} {step.name} {' '.join(step.text.split())}")
            started = time.monotonic()
            try:
                done = getattr(self, "_" + step.name.lower())(step)
            except StepError as error:
                raise StepError(f"{where}: {step.name} {error}") from None
            except (ValueError, DockerfileError) as error:
                raise DockerfileError(f"{where}: {error}") from None
            if done:
                self.say(f"  {done}; {time.monotonic() - started:.0f} s, {self.place.megabytes()} MB by now")
        return self.state

    def _expanded(self, text: str) -> str:
        return expand(text, {**self.state.args, **self.state.env})

    def _from(self, step: Instruction) -> str:
        _, image = step.split_flags()
        if " " in image:
            raise step.refuse("a name for the stage is not known")
        self.before_from, self.state.args = self.state.args, {}
        return self.place.base(expand(image, self.before_from))

    def _arg(self, step: Instruction) -> None:
        for name, default in step.pairs():
            fallback = self.before_from.get(name) if default is None else self._expanded(default)
            value = self.arguments.get(name, fallback)
            if value is not None:
                self.state.args[name] = value

    def _env(self, step: Instruction) -> None:
        pairs = step.pairs()
        if any(value is None for _, value in pairs):
            raise step.refuse("expected NAME=value")
        # All values of one instruction see what was before it.
        self.state.env |= {name: self._expanded(value or "") for name, value in pairs}

    def _user(self, step: Instruction) -> None:
        self.state.user = self._expanded(step.text)

    def _workdir(self, step: Instruction) -> None:
        self.state.folder = posixpath.normpath(posixpath.join(self.state.folder, self._expanded(step.text)))
        self.place.make_folder(self.state.folder)

    def _copy(self, step: Instruction) -> str:
        flags, rest = step.split_flags("chown")
        *sources, target = [self._expanded(word) for word in step.exec_form() or rest.split()]
        if not sources:
            raise step.refuse("expected a source and a destination")
        folder = posixpath.join(self.state.folder, target)
        # Docker renames a single file when the destination has no slash; this project does not use that.
        if not target.endswith("/") and posixpath.basename(target) != "." and folder != self.state.folder:
            raise step.refuse("the destination must be a folder, written with a slash or a dot at its end")
        copied = 0
        for source in sources:
            try:
                entries = self.context.files(source)
                copied += self.place.copy(entries, posixpath.normpath(folder), flags.get("chown", "root:root"))
            except NotInContext:
                raise StepError(f"finds no {source} in the context (or .dockerignore excludes it)") from None
        return f"{copied} files"

    def _run(self, step: Instruction) -> str | None:
        step.split_flags()
        if why := self.place.unable(self.state):
            self.left_out.append(f"{self.name}:{step.line} RUN: {why}")
            return f"NOT EXECUTED: {why}"
        status = self.place.run(step.exec_form() or ["/bin/sh", "-c", step.text], self.state)
        if status:
            raise StepError(f"ended with exit status {status}")
        return "done"

    def _cmd(self, step: Instruction) -> None:
        self.state.cmd = step.exec_form() or ["/bin/sh", "-c", step.text]
