"""Checks HA231 to HA238: the files of images, on disk and inside.

Every file is looked for; a sample of them, or all with ``--all-images``, is read as detectron2's mapper reads it.
"""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
from detectron2.data import MetadataCatalog
from PIL import Image
from tqdm import tqdm

from ..errors import ConfigError, DatasetError
from ..key import DATASETS
from .coco_json import Labels
from .finding import DoctorContext, Finding, check
from .missing_files import rewrite_that_finds
from .reading import place, readable

SAMPLE = 64
"""Images of each dataset that are read, unless all are asked for."""
SEED = 0
ORIENTATION = 0x0112
"""The EXIF tag of PIL that says how a camera was held; 5 to 8 exchange width and height."""
UPRIGHT = (0, 1)
_WIDE = ("I", "F", "I;16", "I;16L", "I;16B", "I;16N")
"""Modes of Pillow with more than eight bits a pixel, which it cuts off rather than scales."""


@dataclass(frozen=True)
class Seen:
    """One image file as it is: ``error``, or its width and height in pixels as stored and its EXIF orientation.

    ``lost`` says what becomes of its pixels where reading them in ``INPUT.FORMAT`` loses the picture, and ``too_big``
    that Pillow refuses its size.
    """

    index: int
    error: str = ""
    size: tuple[int, int] = (0, 0)
    orientation: int = 1
    lost: str = ""
    too_big: bool = False

    @property
    def turned(self) -> tuple[int, int]:
        """Width and height after detectron2 has turned the image as the EXIF tag says."""
        return self.size[::-1] if self.orientation in (5, 6, 7, 8) else self.size


_looked: WeakKeyDictionary[DoctorContext, dict[Any, Any]] = WeakKeyDictionary()


def _datasets(context: DoctorContext) -> Iterator[tuple[str, Labels, list[str]]]:
    """Yield each dataset on local disk with the paths of its images."""
    for name, labels in readable(context):
        paths = _paths(context, name, labels)
        if paths and not _remote(paths):
            yield name, labels, paths


def _remote(paths: Sequence[str]) -> bool:
    return any("://" in path for path in (paths[0], paths[-1]))


def _paths(context: DoctorContext, name: str, labels: Labels) -> list[str]:
    kept = _looked.setdefault(context, {})
    if ("paths", name) not in kept:
        root = os.fspath(MetadataCatalog.get(name).get("image_root") or "") if labels.from_json else ""
        kept["paths", name] = [os.path.join(root, file) for file in labels.files]
    found: list[str] = kept["paths", name]
    return found


def _bytes(context: DoctorContext, name: str, paths: Sequence[str]) -> list[int]:
    """Look up the size in bytes of every file, -1 where none is."""
    kept = _looked.setdefault(context, {})
    if ("bytes", name) not in kept:
        kept["bytes", name] = [_size_of(path) for path in paths]
    found: list[int] = kept["bytes", name]
    return found


def _size_of(path: str) -> int:
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return -1
    return status.st_size if os.path.isfile(path) else -1


def _seen(context: DoctorContext, name: str, paths: Sequence[str]) -> list[Seen]:
    """Open a sample of the files that are there; the same files whenever the same dataset is asked for."""
    kept = _looked.setdefault(context, {})
    if ("seen", name) not in kept:
        there = [i for i, size in enumerate(_bytes(context, name, paths)) if size >= 0]
        if not context.all_images:
            there = sorted(random.Random(SEED).sample(there, min(SAMPLE, len(there))))
        hidden = None if context.all_images else True  # None: shown where standard error is a terminal.
        bar = tqdm(there, desc=f"images of {name}", unit="image", disable=hidden, leave=False)
        kept["seen", name] = [_look(i, paths[i]) for i in bar]
    found: list[Seen] = kept["seen", name]
    return found


def _look(index: int, path: str) -> Seen:
    try:
        with Image.open(path) as image:
            orientation = image.getexif().get(ORIENTATION, 1)
            # Decoded, because a file that was cut off has a good header; a sample of photographs takes a second.
            lost = _lost(image)
            return Seen(index, "", image.size, orientation if isinstance(orientation, int) else 1, lost)
    except Exception as error:  # PIL raises nearly anything on damaged files.
        too_big = isinstance(error, Image.DecompressionBombError)
        return Seen(index, " ".join(f"{type(error).__name__}: {error}".split()), too_big=too_big)


def _lost(image: Image.Image) -> str:
    """Say how the picture is lost in eight bits of red, green and blue; empty where it is not."""
    seen = image.convert("RGB")
    if image.mode in _WIDE:
        pixels = np.asarray(image, np.float64)
        low, high = float(np.nanmin(pixels)), float(np.nanmax(pixels))
        if low < high and (high > 255 or (image.mode == "F" and high <= 1) or high <= 0):
            white = float((pixels >= 255).mean())
            becomes = f"{white:.0%} of its pixels become white" if high > 255 else "all of it becomes black"
            return f"mode {image.mode}, values {low:g} to {high:g}: {becomes}"
        return ""
    bands = image.convert("RGBA").split() if "A" in image.getbands() or "transparency" in image.info else image.split()
    if _is_one_colour(seen) and not all(map(_is_one_colour, bands)):
        return f"mode {image.mode}: all of it becomes one colour, because the picture is in its transparency"
    return ""


def _extent(context: DoctorContext, name: str, paths: Sequence[str]) -> str:
    looked, there = len(_seen(context, name, paths)), sum(size >= 0 for size in _bytes(context, name, paths))
    return f"{looked} images that were looked at{' (a sample; --all-images looks at all)' if looked < there else ''}"


def _is_one_colour(image: Image.Image) -> bool:
    pixels = np.asarray(image)
    return bool((pixels == pixels[:1, :1]).all())


@check("HA231", "every image is on disk", needs=("registered",), quick=True)
def images_are_there(context: DoctorContext) -> Iterable[Finding]:
    for name, labels, paths in _datasets(context):
        gone = [i for i, size in enumerate(_bytes(context, name, paths)) if size < 0 and labels.files[i]]
        if gone:
            first = ", ".join(paths[i] for i in gone[:3])
            root = os.fspath(MetadataCatalog.get(name).get("image_root") or "") if labels.from_json else ""
            rewrite = rewrite_that_finds(root, [labels.files[i] for i in gone])
            if rewrite is not None:
                yield Finding(
                    "HA231",
                    "error",
                    DatasetError(
                        place(name, labels),
                        found=f"{len(gone)} of {len(paths)} images are not there, such as {first}",
                        expected="a file for every image",
                        fix=f"All of them are found with {rewrite.what}: {rewrite.example}. {rewrite.fix}",
                    ),
                )
                continue
            yield Finding(
                "HA231",
                "error",
                DatasetError(
                    place(name, labels),
                    found=f"{len(gone)} of {len(paths)} images are not there, such as {first}",
                    expected="a file for every image",
                    fix=f"Correct images of this dataset in {DATASETS.REGISTER}, or file_name in the json."
                    if len(gone) == len(paths)
                    else "Copy the missing files, or remove these images from the json.",
                ),
            )


@check("HA232", "images can be read", needs=("registered",))
def images_are_readable(context: DoctorContext) -> Iterable[Finding]:
    for name, labels, paths in _datasets(context):
        seen = _seen(context, name, paths)
        big = [one for one in seen if one.too_big]
        if big:
            yield Finding(
                "HA232",
                "error",
                DatasetError(
                    place(name, labels),
                    found=f"{len(big)} of {_extent(context, name, paths)}, such as {paths[big[0].index]}: "
                    f"{big[0].error}",
                    expected="images that Pillow does not refuse for their size",
                    fix="Cut them into tiles or scale them down, with their labels; or set "
                    "PIL.Image.MAX_IMAGE_PIXELS = None in a module given with --import, if you trust the files.",
                ),
            )
        damaged = [one for one in seen if one.error and not one.too_big]
        if damaged:
            yield Finding(
                "HA232",
                "error",
                DatasetError(
                    place(name, labels),
                    found=f"{len(damaged)} of {_extent(context, name, paths)}, such as {paths[damaged[0].index]}: "
                    f"{damaged[0].error}",
                    expected="images that PIL decodes to their end",
                    fix="Fetch these files anew, or remove them from the json.",
                ),
            )


@check("HA238", "reading an image keeps the picture", needs=("registered",))
def images_keep_their_picture(context: DoctorContext) -> Iterable[Finding]:
    """Pillow cuts values off where a file has more than eight bits; stock detectron2 trains on white images then."""
    for name, labels, paths in _datasets(context):
        lost = [one for one in _seen(context, name, paths) if one.lost]
        if lost:
            yield Finding(
                "HA238",
                "error",
                DatasetError(
                    place(name, labels),
                    found=f"{len(lost)} of {_extent(context, name, paths)}, such as {paths[lost[0].index]}: "
                    f"{lost[0].lost}",
                    expected="eight bits a channel, or a picture outside the transparency",
                    fix="Write them as 8-bit PNG, scaled from their own range; in numpy: "
                    "((a - a.min()) * (255 / (a.max() - a.min()))).astype('uint8').",
                ),
            )


@check("HA233", "images have the size that the labels say", needs=("registered",))
def image_sizes(context: DoctorContext) -> Iterable[Finding]:
    """Find images of another size than declared: detectron2's mapper stops at the first (``SizeMismatchError``)."""
    for name, labels, paths in _datasets(context):
        seen = [one for one in _seen(context, name, paths) if not one.error]
        wrong = [one for one in seen if (labels.sizes[one.index] > 0).all() and one.turned != _said(labels, one)]
        for turned, ones in (
            (True, [one for one in wrong if one.turned[::-1] == _said(labels, one) and one.turned != one.size]),
            (False, [one for one in wrong if one.turned[::-1] != _said(labels, one) or one.turned == one.size]),
        ):
            if not ones:
                continue
            first = ones[0]
            said, is_ = _said(labels, first), first.turned
            because = f", because its EXIF orientation is {first.orientation}" if turned else ""
            smaller = ", smaller than its labels say" if is_[0] < said[0] or is_[1] < said[1] else ""
            yield Finding(
                "HA233",
                "error",
                DatasetError(
                    place(name, labels),
                    found=f"{len(ones)} of {_extent(context, name, paths)}, such as {paths[first.index]}: "
                    f"{is_[0]} x {is_[1]}{because or smaller}",
                    expected=f"{said[0]} x {said[1]}, the width and height in the labels",
                    fix="Turn the pixels of these files upright and remove the EXIF tag, or label the turned images, "
                    "which is what detectron2 reads."
                    if turned
                    else "Put the files there that were labelled, or correct width, height and boxes.",
                ),
            )


def _said(labels: Labels, one: Seen) -> tuple[int, int]:
    width, height = labels.sizes[one.index]
    return int(width), int(height)


@check("HA234", "no image is mirrored or upside down by its EXIF tag", needs=("registered",), severity="note")
def image_orientations(context: DoctorContext) -> Iterable[Finding]:
    for name, labels, paths in _datasets(context):
        seen = [one for one in _seen(context, name, paths) if not one.error]
        # An exchange of width and height shows as a wrong size, see HA233; these do not show.
        turned = [one for one in seen if one.orientation not in UPRIGHT and one.turned == one.size]
        if turned:
            yield Finding(
                "HA234",
                "note",
                DatasetError(
                    place(name, labels),
                    found=f"{len(turned)} of {_extent(context, name, paths)} have an EXIF orientation that turns or "
                    f"mirrors them, such as {paths[turned[0].index]} ({turned[0].orientation})",
                    expected="boxes drawn on the turned image, as detectron2 reads it",
                    fix="Draw a few of them with their boxes; where these are off, remove the EXIF tag.",
                ),
            )


@check("HA235", "no image is in train and test", needs=("registered",), quick=True, severity="warning")
def shared_files(context: DoctorContext) -> Iterable[Finding]:
    trained: dict[str, str] = {}
    tested: list[tuple[str, Labels, list[str]]] = []
    for name, labels, paths in _datasets(context):
        if name in context.train_names:
            trained.update(dict.fromkeys(_in_real_folders(paths), name))
        if name in context.test_names:
            tested.append((name, labels, paths))
    for name, labels, paths in tested:
        shared = [path for path in _in_real_folders(paths) if path in trained]
        if shared:
            found = f"{len(shared)} of {len(paths)} images are in {trained[shared[0]]!r} too"
            yield _shared("HA235", place(name, labels), found, shared[0])


def _in_real_folders(paths: Sequence[str]) -> list[str]:
    """Follow the links among the folders of ``paths``; once for each folder, because that asks the disk."""
    folders = {folder: os.path.realpath(folder) for folder in {os.path.dirname(path) for path in paths}}
    return [os.path.join(folders[os.path.dirname(path)], os.path.basename(path)) for path in paths]


@check("HA236", "no image of the test sample is in train under another name", needs=("registered",), severity="warning")
def shared_content(context: DoctorContext) -> Iterable[Finding]:
    """Compare files of a sampled test image's size in bytes: few are, so all of train can be read."""
    datasets = list(_datasets(context))
    train = [one for one in datasets if one[0] in context.train_names]
    for name, labels, paths in datasets:
        if name not in context.test_names or name in context.train_names:
            continue
        size = _bytes(context, name, paths)
        seen = _seen(context, name, paths)
        wanted = {size[one.index] for one in seen}
        same_size: dict[str, str] = {}
        for other, _, files in train:
            for file, count in zip(files, _bytes(context, other, files), strict=True):
                if count > 0 and count in wanted:
                    same_size[os.path.realpath(file)] = other  # Few.
        hashes = {_digest(file): file for file in same_size}
        found = []
        for one in seen:
            path = paths[one.index]
            # The same file is HA235's.
            if size[one.index] > 0 and os.path.realpath(path) not in same_size and _digest(path) in hashes:
                found.append((path, hashes[_digest(path)]))
        if found:
            yield _shared(
                "HA236",
                place(name, labels),
                f"{len(found)} of {_extent(context, name, paths)} are in {same_size[found[0][1]]!r} too",
                f"{found[0][0]}, byte for byte {found[0][1]}",
            )


@check("HA237", "every image is on a local disk, where the other checks look", needs=("registered",), severity="note")
def images_are_local(context: DoctorContext) -> Iterable[Finding]:
    for name, labels in readable(context):
        paths = _paths(context, name, labels)
        if paths and _remote(paths):
            yield Finding(
                "HA237",
                "note",
                DatasetError(
                    place(name, labels),
                    found=f"images at addresses, such as {paths[0]}: none of them was looked at",
                    expected="nothing else; detectron2 reads them through its PathManager",
                    fix="Nothing. To have the files checked, copy them and run the doctor on the copy.",
                ),
            )


def _digest(path: str) -> str:
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return path


def _shared(code: str, where: str, found: str, example: str) -> Finding:
    return Finding(
        code,
        "warning",
        ConfigError(
            where,
            found=f"{found}, such as {example}",
            expected="images that training has not seen",
            fix=f"Remove them from {DATASETS.TRAIN}'s files, or read the results as those on the training set.",
        ),
    )
