"""A file that is no COCO json: which encoding or which tool's own form it has, and how to make the json."""

from __future__ import annotations

import codecs
import json
import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from detectron2.utils.file_io import PathManager

from ..errors import DatasetError

_BEGIN = 1 << 20
"""Bytes that are looked at where the file is no JSON."""
_BIG = 64 << 20
"""A JSON beyond this size is of no tool that writes one file for each image or project."""


@dataclass(frozen=True)
class Recognised:
    """What a file is.

    Args:
        found: in a few words.
        fix: what to type, or how to export; a complete sentence.
    """

    found: str
    fix: str


def as_recognised(path: str, error: DatasetError) -> DatasetError:
    """Return the same error, with what the file is where that is known."""
    known = recognise(path)
    if known is None:
        return error
    return DatasetError(error.where, expected=error.expected, found=known.found, fix=known.fix)


def recognise(path: str) -> Recognised | None:
    """Return what a file is that is no COCO json; ``None`` where it is not known, or one.

    Args:
        path: path or URI; what cannot be read is not known.
    """
    try:
        with PathManager.open(path, "rb") as file:
            begin = file.read(_BEGIN)
            rest = file.read(_BIG) if begin.lstrip(codecs.BOM_UTF8 + b" \t\r\n")[:1] in (b"{", b"[") else b""
    except OSError:
        return None
    name = shlex.quote(path)
    if begin.startswith(codecs.BOM_UTF8):
        fix = f"Remove its first three bytes: sed -i '1s/^\\xef\\xbb\\xbf//' {name}"
        return Recognised("a byte-order mark in front of the JSON", fix)
    if begin.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) and "{" in begin.decode("utf-16", "ignore"):
        return Recognised("text in UTF-16", f"Write it as UTF-8: iconv -f UTF-16 -t UTF-8 {name} > utf8.json")
    whole = begin + rest
    try:
        text = whole.decode("utf-8")
    except UnicodeDecodeError as error:
        cut = error.start > len(whole) - 4
        if not cut and begin.lstrip()[:1] in (b"{", b"["):
            found = f"text that is not in UTF-8 (byte {whole[error.start]:#x} at {error.start})"
            return Recognised(found, f"Write it as UTF-8: iconv -f LATIN1 -t UTF-8 {name} > utf8.json")
        text = whole.decode("utf-8", "replace")
    return _of_tool(text)


def _of_tool(text: str) -> Recognised | None:
    head = text[:4096].lstrip()
    if head.startswith("<"):
        # The first element behind the declaration.
        element = re.search(r"<(?![?!])([\w-]+)", head)
        tools = {"annotation": "Pascal VOC, one XML for each image", "annotations": "CVAT's own XML"}
        found = tools.get(element[1]) if element else None
        return _export(found) if found else None
    lines = head.splitlines()[:5]
    if lines and all(re.fullmatch(r"\s*\d+(\s+[\d.]+){4,}\s*", line) for line in lines):
        return _export("YOLO, one text file of classes and boxes for each image")
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return next((_export(tool) for tool, fits in _JSON_TOOLS if fits(content)), None)


def _export(tool: str) -> Recognised:
    fix = "Export it as COCO, with one json for each of train and test, or convert it to one."
    return Recognised(f"an annotation file of another form: {tool}", fix)


def _first(content: Any) -> dict[str, Any]:
    values = list(content.values()) if isinstance(content, dict) else content if isinstance(content, list) else []
    return values[0] if values and isinstance(values[0], dict) else {}


_JSON_TOOLS: tuple[tuple[str, Callable[[Any], bool]], ...] = (
    ("LabelMe, one json for each image", lambda c: isinstance(c, dict) and {"shapes", "imagePath"} <= c.keys()),
    (
        "VGG Image Annotator (VIA)",
        lambda c: isinstance(c, dict) and ("_via_img_metadata" in c or {"regions", "filename"} <= _first(c).keys()),
    ),
    ("Label Studio", lambda c: isinstance(c, list) and "data" in _first(c) and "annotations" in _first(c)),
    ("CreateML", lambda c: isinstance(c, list) and {"image", "annotations"} <= _first(c).keys()),
    ("Datumaro", lambda c: isinstance(c, dict) and {"items", "categories"} <= c.keys()),
)
