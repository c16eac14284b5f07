"""What COPY can see: the project's folder less what .dockerignore names."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path


class NotInContext(Exception):
    """An engine would not find what COPY names."""


class Ignore:
    """The rules of a .dockerignore: anchored at the top, the last match counts, ``!`` takes back."""

    def __init__(self, text: str) -> None:
        self.rules: list[tuple[re.Pattern[str], bool]] = []
        for line in text.splitlines():
            pattern = line.strip()
            if not pattern or pattern.startswith("#"):
                continue
            keep = pattern.startswith("!")
            self.rules.append((re.compile(as_regex(os.path.normpath(pattern.lstrip("!/")))), keep))

    def excludes(self, path: str) -> bool:
        """``path`` is relative to the top, with ``/``; a file in an excluded folder is excluded."""
        parts = path.split("/")
        names = ["/".join(parts[:end]) for end in range(1, len(parts) + 1)]
        excluded = False
        for rule, keep in self.rules:
            if any(map(rule.fullmatch, names)):
                excluded = not keep
        return excluded


def as_regex(pattern: str) -> str:
    parts = {"**/": r"(?:.*/)?", "**": r".*", "*": r"[^/]*", "?": r"[^/]"}
    return re.sub(r"\*\*/|\*\*|\*|\?|[^*?]+", lambda found: parts.get(found[0]) or re.escape(found[0]), pattern)


class Context:
    """The files of ``folder`` that an engine would be sent."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        rules = folder / ".dockerignore"
        self.ignore = Ignore(rules.read_text(encoding="utf-8") if rules.is_file() else "")

    def files(self, source: str) -> Iterator[tuple[Path, str]]:
        """Every entry of ``source``: its place here, and its path under the destination.

        A folder's contents are meant, as in Docker, not the folder itself. Folders come before what they hold.

        Raises:
            NotInContext: nothing of that name is in the context, or .dockerignore excludes it.
        """
        top = self.folder / source.lstrip("/")
        relative = top.relative_to(self.folder).as_posix()
        if ".." in top.parts or not os.path.lexists(top) or (relative != "." and self.ignore.excludes(relative)):
            raise NotInContext(source)
        if not top.is_dir():
            yield top, top.name
            return
        takes_back = any(keep for _, keep in self.ignore.rules)
        for folder, names, files in os.walk(top, onerror=partial(_raise)):
            here = Path(folder)
            excluded = {name for name in (*names, *files) if self.ignore.excludes(self.inside(here / name))}
            names[:] = sorted(name for name in names if name not in excluded or takes_back)
            for name in sorted({*names, *files} - excluded):
                yield here / name, (here / name).relative_to(top).as_posix()

    def inside(self, path: Path) -> str:
        return path.relative_to(self.folder).as_posix()


def _raise(error: OSError) -> None:
    raise error
