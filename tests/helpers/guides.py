"""Markdown pages whose blocks can be run: files are written, commands executed, and what they print compared.

A comment on the line before a fence says what the block is::

    <!-- file: my.yaml -->   its text is written to that file
    <!-- run -->             commands, one a line, or Python statements; each page has one namespace
    <!-- shows -->           what the block run before it printed holds these lines; ``...`` stands for anything

A block without one of these is only read.
"""

from __future__ import annotations

import io
import re
import runpy
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from .commands import Ran, cli, fresh_loggers

FENCE = re.compile(r"^( *)(```+)(\w*)[^\n]*\n(.*?)^\1\2 *$", re.MULTILINE | re.DOTALL)
MARK = re.compile(r"<!-- (file: (?P<file>\S+)|run|shows) -->\n *$")
STAMP = re.compile(r"^(\[\d\d/\d\d [\d:]+ [\w.]+\]: |\x1b\[[\d;]*m)", re.MULTILINE)

WAIT = re.compile(r"^reading .* \.\.\.\n", re.MULTILINE)
"""A command's first sign of life, which no guide shows."""


@dataclass(frozen=True)
class Block:
    """One fenced block.

    Args:
        page: its file.
        line: of the fence, from 1.
        language: after the fence, or empty.
        text: between the fences, without their indentation.
        mark: ``run``, ``shows``, ``file`` or empty.
        file: what to write it to.
    """

    page: Path
    line: int
    language: str
    text: str
    mark: str = ""
    file: str = ""

    @property
    def where(self) -> str:
        return f"{self.page.name}:{self.line}"

    def commands(self) -> list[list[str]]:
        """Its shell commands as words; comments and continued lines are understood, assignments in front left out."""
        lines = self.text.replace("\\\n", " ").splitlines()
        words = [shlex.split(line, comments=True) for line in lines]
        return [list(_without_assignments(line)) for line in words if line]


def _without_assignments(words: Sequence[str]) -> Iterator[str]:
    command = False
    for word in words:
        command = command or not re.match(r"[A-Z_]+=", word)
        if command:
            yield word


def blocks(page: Path) -> list[Block]:
    """Every fenced block of a page, in order."""
    text = page.read_text(encoding="utf-8")
    found = []
    for match in FENCE.finditer(text):
        mark = MARK.search(text[: match.start()])
        indent = match[1]
        body = "".join(line.removeprefix(indent) for line in match[4].splitlines(keepends=True))
        kind = "" if mark is None else "file" if mark["file"] else mark[1]
        line = text[: match.start()].count("\n") + 1
        found.append(Block(page, line, match[3], body, kind, (mark["file"] or "") if mark else ""))
    return found


@dataclass
class Shell:
    """Runs the blocks of a page in the working directory.

    Args:
        more: words that are added to a command, told by its words; how long to train, for instance.
        instead: does in place of a command, where it returns an output.
    """

    more: Callable[[Sequence[str]], Sequence[str]] = lambda words: ()
    instead: Callable[[Sequence[str]], str | None] = lambda words: None

    def run(self, page: Path) -> list[str]:
        """Run a page; returns the commands that were executed.

        Fails where a command's exit code is not 0 (``!`` in front: is 0), or the page shows something else.
        """
        namespace: dict[str, Any] = {"__name__": "__page__"}
        executed: list[str] = []
        printed = ""
        for block in blocks(page):
            if block.mark == "file":
                path = Path(block.file)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(block.text, encoding="utf-8")
            elif block.mark == "run" and block.language == "python":
                printed = self._python(block, namespace)
                executed.append(block.where)
            elif block.mark == "run":
                printed = ""
                for words in block.commands():
                    refused = words[0] == "!"
                    words = words[1:] if refused else words
                    ran = self._command(words)
                    said = f"{last_lines(ran.out)}\n{ran.err}"
                    assert (ran.code != 0) == refused, f"{block.where}: {shlex.join(words)}\n{said}"
                    printed += ran.out + WAIT.sub("", ran.err)
                    executed.append(shlex.join(words))
            elif block.mark == "shows":
                said = f"{block.text}\nbut it was\n{last_lines(printed)}"
                assert shows(printed, block.text), f"{block.where} shows\n{said}"
        return executed

    def _python(self, block: Block, namespace: dict[str, Any]) -> str:
        out = io.StringIO()
        # Lines numbered as in the page, so that a traceback points into it.
        code = compile("\n" * block.line + block.text, str(block.page), "exec")
        with fresh_loggers(), redirect_stdout(out):
            exec(code, namespace)
        return out.getvalue()

    def _command(self, words: Sequence[str]) -> Ran:
        done = self.instead(words)
        if done is not None:
            return Ran(0, done, "")
        words = [*words, *self.more(words)]
        if words[0] == "d2-headadapt":
            return cli(*words[1:])
        assert words[0] == "python" and words[1].endswith(".py"), f"no way to run {shlex.join(words)}"
        return script(words[1:])


def script(words: Sequence[str]) -> Ran:
    """``python FILE ARGUMENTS`` in this process."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch, fresh_loggers(), redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", list(words))
        patch.setattr(sys, "path", [str(Path(words[0]).resolve().parent), *sys.path])
        try:
            runpy.run_path(words[0], run_name="__main__")
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else int(error.code is not None)
    return Ran(code, out.getvalue(), err.getvalue())


def plain(printed: str) -> str:
    """Without colours, and without time and logger in front of a line."""
    return STAMP.sub("", STAMP.sub("", printed))


def shows(printed: str, expected: str) -> bool:
    """Whether the words of ``expected`` stand in what was printed, in order; only at ``...`` may others be between."""
    text, start = " ".join(plain(printed).split()), 0
    for part in " ".join(expected.split()).split("..."):
        start = text.find(part.strip(), start)
        if start < 0:
            return False
        start += len(part.strip())
    return True


def last_lines(printed: str) -> str:
    """What fits into a failure's message; detectron2 prints its whole config."""
    return "\n".join(plain(printed).splitlines()[-25:])
