"""Image files that are not where the labels say: the one change of their names that finds them all."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from urllib.parse import quote, unquote

from ..key import DATASETS

Change = Callable[[str], str]
FOLDERS = 200
"""Folders beyond this number below the images' own are not tried."""


@dataclass(frozen=True)
class Rewrite:
    """A change of file names.

    Args:
        what: in a few words.
        example: of the first name, from what it is to what it would be.
        fix: what to correct; a complete sentence.
    """

    what: str
    example: str
    fix: str


def rewrite_that_finds(root: str, files: Sequence[str]) -> Rewrite | None:
    """Return the smallest change with which every one of some missing files is there; ``None`` where none is found.

    Args:
        root: the folder of the images, empty where the names are whole paths.
        files: the names as the labels have them, none of which is there.
    """
    found: list[tuple[int, int, Rewrite]] = []
    spellings = list(itertools.product(_SLASHES, _PERCENTS, _ENDINGS))
    folders = [*_FOLDERS_OF_NAMES, *_folders_below(root)]
    for place, (folder, spelling) in enumerate(itertools.product(folders, spellings)):
        changes = [*spelling, folder]
        if not any(what for what, _ in changes) or len([what for what, _ in changes if what]) > 3:
            continue

        def path(name: str, changes: Sequence[tuple[str, Change]] = changes) -> str:
            for _, change in changes:
                name = change(name)
            return os.path.normpath(os.path.join(root, name))

        if all(os.path.isfile(path(name)) for name in files[:3]) and all(os.path.isfile(path(n)) for n in files):
            words = [what for what, _ in changes if what]
            found.append((len(words), place, _described(words, files[0], path(files[0]), root)))
    return min(found, key=lambda one: one[:2])[2] if found else None


def _described(words: Sequence[str], name: str, path: str, root: str) -> Rewrite:
    relative = os.path.relpath(path, root) if root else path
    fix = "Write file_name in the json so, or rename the files."
    if len(words) == 1 and relative.endswith(name):
        folder = path.removesuffix(name).rstrip("/\\")
        fix = f"Write images: {folder} in its entry of {DATASETS.REGISTER}."
    return Rewrite(" and ".join(words), f"{name} as {relative}", fix)


def _ending(case: Callable[[str], str]) -> Change:
    def change(name: str) -> str:
        stem, ending = os.path.splitext(name)
        return stem + case(ending)

    return change


def _same(name: str) -> str:
    return name


_SLASHES: tuple[tuple[str, Change], ...] = (
    ("", _same),
    ("slashes in place of backslashes", lambda name: name.replace("\\", "/")),
)
_PERCENTS: tuple[tuple[str, Change], ...] = (
    ("", _same),
    ("percent-escapes undone", unquote),
    ("percent-escapes", quote),
)
_ENDINGS: tuple[tuple[str, Change], ...] = (
    ("", _same),
    ("the ending in small letters", _ending(str.lower)),
    ("the ending in capitals", _ending(str.upper)),
)
_FOLDERS_OF_NAMES: tuple[tuple[str, Change], ...] = (
    ("", _same),
    ("the first folder left out", lambda name: name.replace("\\", "/").lstrip("/").partition("/")[2] or name),
    ("the folders left out", lambda name: name.replace("\\", "/").rpartition("/")[2]),
)


def _folders_below(root: str) -> list[tuple[str, Change]]:
    """List names below a folder inside the images' own, beside it, or above it."""
    if not os.path.isdir(root):
        # The folder itself is missing or repeated: a/train/train for a/train.
        above = os.path.dirname(root.rstrip("/"))
        return [(f"the folder {above}", lambda name: os.path.join("..", name))] if os.path.isdir(above) else []
    inside = sorted(entry.name for entry in os.scandir(root) if entry.is_dir())[:FOLDERS]
    beside = sorted(entry.name for entry in os.scandir(os.path.join(root, "..")) if entry.is_dir())[:FOLDERS]

    def below(folder: str) -> Change:
        return lambda name: os.path.join(folder, name)

    found = [(f"the folder {folder} in front", below(folder)) for folder in inside]
    found.append(("the folder above", below("..")))
    return found + [(f"the folder {folder} beside", below(os.path.join("..", folder))) for folder in beside]
