"""Read and write checkpoints safely: ``.pth``, ``.pyth``, ``.pkl`` and ``.safetensors``.

What a file holds is decided by its content, and by its name only where two formats look alike. Whatever is wrong with
it becomes one :class:`CheckpointFileError`; nothing in it is run.

Checksums: the zip format of torch has a CRC-32 for each tensor, which :func:`verify_tensors` compares. ``.pkl``,
``.safetensors`` and torch's format before zip have none: damage inside a number cannot be seen there.
"""

from __future__ import annotations

import difflib
import functools
import mmap as memory_map
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

import numpy as np
import torch

from ..errors import CheckpointFileError
from . import safetensor_files, torchfile
from .saving import existing_output as existing_output
from .saving import is_full as is_full
from .saving import is_same_file as is_same_file
from .saving import replace_file as replace_file
from .saving import unwritable as unwritable
from .saving import write_checkpoint as write_checkpoint
from .saving import write_text as write_text
from .unpickling import DAMAGED, SafeUnpickler, Unpickler

MAX_NESTING = 100
"""Levels of dicts and lists in a file. Checkpoints have under ten; copying or saving a thousand ends in an error."""

_HEAD = 512
_OTHER_CONTENT = {
    b"\x89PNG": "a PNG image",
    b"\xff\xd8\xff": "a JPEG image",
    b"GIF8": "a GIF image",
    b"\x1f\x8b": "a gzip archive",
    b"\xfd7zXZ": "an xz archive",
    b"BZh": "a bzip2 archive",
    b"\x7fELF": "a program",
    b"%PDF": "a PDF document",
    b"\x89HDF": "an HDF5 file",
    b"version https://git-lfs": "a git-lfs pointer: the file itself was never fetched (git lfs pull)",
    b"<!DOCTYPE": "a web page: the download gave an error page",
    b"<!doctype": "a web page: the download gave an error page",
    b"<html": "a web page: the download gave an error page",
}


def read_checkpoint(path: str, *, trust: bool = False, verify: bool = True, mmap: bool = True) -> dict[str, Any]:
    """Return the checkpoint at ``path`` in stock detectron2's form, ``{"model": {name: values}, ...}``.

    A torch file without ``model`` whose values are all tensors is taken as the model. ``__author__`` and
    ``matching_heuristics`` are set for Caffe2 and pycls files, as stock detectron2 does.

    Args:
        path: a local file.
        trust: allow a file that needs full pickle, which may run any code.
        verify: compare the checksums of all tensors, which reads the whole file. Without it only the index, the
            headers and the pickle are read and compared; :func:`verify_tensors` does the rest for the tensors that
            are used.
        mmap: tensors of a zip or ``.safetensors`` file are views of the file, private to this process; they must not
            outlive a truncation of that file in place (copy what is kept, as ``load_state_dict`` does).

    Raises:
        CheckpointFileError: it cannot be read.

    Example:
        >>> import tempfile, torch
        >>> from d2_headadapt import read_checkpoint
        >>> folder = tempfile.TemporaryDirectory()
        >>> torch.save({"fc.bias": torch.ones(2)}, f"{folder.name}/bare.pth")
        >>> read_checkpoint(f"{folder.name}/bare.pth", mmap=False)
        {'model': {'fc.bias': tensor([1., 1.])}}
        >>> folder.cleanup()
    """
    kind, loaded = _read(path, trust=trust, mapped=mmap)
    checkpoint = _stock_form(path, kind, loaded)
    _check_model(path, checkpoint["model"])
    if verify:
        rest = {key: value for key, value in checkpoint.items() if key != "model"}
        verify_tensors(path, {**rest, **checkpoint["model"]})
    return checkpoint


def read_values(path: str, *, trust: bool = False) -> Any:
    """Read what a torch, pickle or ``.safetensors`` file holds, as it was saved: a tensor, or anything around some.

    Tensors may be views of the file, as those of :func:`read_checkpoint`.

    Args:
        path: a local file.
        trust: allow a file that needs full pickle, which may run any code.

    Raises:
        CheckpointFileError: it cannot be read, or its values were damaged.
    """
    _, loaded = _read(path, trust=trust, mapped=True)
    verify_tensors(path, {"": loaded})
    return loaded


def verify_tensors(path: str, tensors: Mapping[str, Any]) -> list[str]:
    """Compare the checksums of the records that ``tensors`` are views of.

    Call it before anything writes to the tensors: it looks at their memory, which is what will be used.

    Args:
        path: where :func:`read_checkpoint` took them from, for the message.
        tensors: name -> tensor; a nested dict, list or tuple (an optimizer's state) counts with all that is inside.

    Returns:
        The names whose values have no checksum: another format, a file written without checksums, or a copy.

    Raises:
        CheckpointFileError: values were damaged; names the tensors.
    """
    return torchfile.verify(path, named_tensors(tensors))


def named_tensors(tree: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """List every tensor in nested dicts, lists and tuples, under its keys joined with ``/``."""
    return {name: value for name, value, _ in _walk(tree) if isinstance(value, torch.Tensor)}


def _walk(tree: Any) -> Iterator[tuple[str, Any, int]]:
    """Yield every value in nested dicts, lists and tuples: its keys joined with ``/``, itself, how deep it lies."""
    seen: set[int] = set()  # a pickle may hold a list inside itself
    waiting: list[tuple[str, Any, int]] = [("", tree, 0)]
    while waiting:
        name, value, depth = waiting.pop()
        yield name, value, depth
        if isinstance(value, (Mapping, list, tuple)) and id(value) not in seen:
            seen.add(id(value))
            items = value.items() if isinstance(value, Mapping) else enumerate(value)
            children = [(f"{name}/{_text(key)}" if name else _text(key), part, depth + 1) for key, part in items]
            waiting.extend(reversed(children))


def shapes_of(state: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Map names to shapes, without touching a value; what is no tensor (``_extra_state``) has none."""
    return {name: tuple(value.shape) for name, value in state.items() if hasattr(value, "shape")}


def _read(path: str, *, trust: bool, mapped: bool) -> tuple[str, Any]:
    kind = _kind(path, _head(path))
    try:
        loaded = _load(path, kind, trust=trust, mapped=mapped)
    except (OSError, MemoryError) as error:
        # A failing disk, or no room for a file that is sound.
        found = f"{type(error).__name__}: {error}" if str(error) else "not enough memory"
        _refuse(path, found, "Copy it to another disk, or free some memory.", error)
    for name, _, depth in _walk(loaded):
        if depth > MAX_NESTING:
            found = f"values nested more than {MAX_NESTING} deep, under {name.partition('/')[0][:80]!r}"
            _refuse(path, found, "Save tensors, and plain values in a few levels of dicts and lists.")
    return kind, loaded


def _head(path: str) -> bytes:
    """Read the first bytes of a regular, readable, non-empty file."""
    if not os.path.lexists(path):
        folder = os.path.dirname(path) or "."
        names = sorted(os.listdir(folder)) if os.path.isdir(folder) else []
        near = difflib.get_close_matches(os.path.basename(path), names, n=3)
        fix = f"The folder has {', '.join(near)}." if near else "Look at the path."
        if names == []:
            fix = f"The folder {folder!r} is empty or not there; look at the path."
        _refuse(path, "nothing there", fix)
    if os.path.isdir(path):
        _refuse(path, "a folder", "Name the file inside it, such as model_final.pth.")
    if not os.path.isfile(path):
        _refuse(path, "a broken link or a device", "Name the file itself.")
    try:
        with open(path, "rb") as file:
            head = file.read(_HEAD)
    except OSError as error:
        _refuse(path, f"a file that cannot be opened ({error.strerror})", "Look at its access rights.", error)
    if not head:
        _refuse(path, "an empty file", "Saving or downloading it failed; get it again.")
    return head


def _kind(path: str, head: bytes) -> str:
    """Tell the kind of a file by its first bytes: ``safetensors``, ``zip``, ``legacy`` or ``pickle``."""
    for start, content in _OTHER_CONTENT.items():
        if head.startswith(start):
            _refuse(path, content, "Name a .pth, .pkl or .safetensors file of weights.")
    if head.startswith(torchfile.ZIP_MAGIC):
        return "zip"
    if head.startswith(torchfile.LEGACY_MAGIC):
        return "legacy"
    header = int.from_bytes(head[:8], "little")
    if path.endswith(".safetensors") or (head[8:9] == b"{" and header < os.path.getsize(path)):
        return "safetensors"
    # Protocol 2 and later begin with 0x80; the older ones look like text, and only the name tells.
    if head[0] == 0x80 or (path.endswith(".pkl") and head[:1] in (b"(", b"c", b"}", b"]")):
        return "pickle"
    if re.fullmatch(rb"[\t\r\n -~\x80-\xff]+", head) and b"\x00" not in head:
        _refuse(path, f"text that begins {head[:40].decode('utf-8', 'replace')!r}", "Name a file of weights.")
    _refuse(path, f"bytes of no known format ({head[:8].hex(' ')})", DAMAGED)


def _load(path: str, kind: str, *, trust: bool, mapped: bool) -> Any:
    if kind == "safetensors":
        return safetensor_files.read(path, mapped=mapped)
    if kind == "zip":
        return torchfile.load_zip(path, trust=trust, mapped=mapped)
    if kind == "legacy":
        return torchfile.load_legacy(path, trust=trust)
    reader = Unpickler if trust else SafeUnpickler
    with open(path, "rb") as file, memory_map.mmap(file.fileno(), 0, access=memory_map.ACCESS_READ) as data:
        return reader(data, where=path, size=len(data), encoding="latin1").load()


def _stock_form(path: str, kind: str, loaded: Any) -> dict[str, Any]:
    if not isinstance(loaded, dict):
        found = f"one tensor of shape {tuple(loaded.shape)}" if isinstance(loaded, torch.Tensor) else _name_of(loaded)
        _refuse(path, found, "Save a dict: torch.save({'model': model.state_dict()}, FILE).")
    for key in loaded:
        if not isinstance(key, str):
            _refuse(path, f"the key {_short(key)} where text belongs", "Save names as keys.")
    if kind == "zip" or kind == "legacy":
        return _torch_form(path, loaded)
    if "model" in loaded:
        return dict(loaded)
    # What Detectron 1 wrote: the weights under "blobs", or nothing but weights.
    blobs = loaded.get("blobs", loaded)
    if not isinstance(blobs, dict):
        _refuse(path, f"{_name_of(blobs)} under 'blobs'", "Name a file of weights.")
    model = {name: value for name, value in blobs.items() if not str(name).endswith("_momentum")}
    return {"model": model, "__author__": "Caffe2", "matching_heuristics": True}


def _torch_form(path: str, loaded: dict[str, Any]) -> dict[str, Any]:
    if path.endswith(".pyth"):
        state = loaded.get("model_state")
        if not isinstance(state, dict):
            _refuse(path, f"keys {_listed(loaded)} without 'model_state'", "A .pyth file is one that pycls wrote.")
        model = {name: value for name, value in state.items() if not str(name).endswith("num_batches_tracked")}
        return {"model": model, "__author__": "pycls", "matching_heuristics": True}
    if "model" in loaded:
        return dict(loaded)
    if loaded and all(isinstance(value, torch.Tensor) for value in loaded.values()):
        return {"model": loaded}
    inner = [key for key, value in loaded.items() if isinstance(value, dict) and "." in "".join(map(str, value))]
    fix = "Save a dict: torch.save({'model': model.state_dict()}, FILE)."
    if inner:
        fix = f"If the weights are under {inner[0]!r}, save them as detectron2 does: {{'model': loaded[{inner[0]!r}]}}."
    _refuse(path, f"keys {_listed(loaded)} without 'model'", fix)


def _check_model(path: str, model: Any) -> None:
    """Check names and values; numpy numbers and foreign byte orders become plain arrays in place."""
    if not isinstance(model, dict):
        fix = "Save model.state_dict() under 'model', not the model itself."
        _refuse(path, f"{_name_of(model)} under 'model'", fix)
    if not model:
        _refuse(path, "a model without one tensor", "Save model.state_dict() under 'model'.")
    for name, value in model.items():
        if not isinstance(name, str):
            _refuse(path, f"the key {_short(name)} in 'model' where text belongs", "Save names as keys.")
        if isinstance(value, torch.Tensor):
            if not is_dense(value):
                _refuse(path, f"a sparse, quantised or empty-handed tensor {_short(name)}", "Save dense tensors.")
            if not _is_converted(value.dtype):
                _refuse(
                    path, f"{value.dtype} in {_short(name)}, which torch converts to nothing", "Save it as float32."
                )
        elif name.endswith("_extra_state"):
            continue
        elif isinstance(value, (np.ndarray, np.generic)) and value.dtype.kind in "biufc":
            model[name] = np.asarray(value, value.dtype.newbyteorder("="))
            if not _is_tensor_type(value.dtype):
                _refuse(path, f"an array of {value.dtype} under {_short(name)} in 'model'", "Save it as float32.")
        else:
            _refuse(path, f"{_name_of(value)} under {_short(name)} in 'model'", "Save tensors only under 'model'.")


@functools.cache
def _is_converted(dtype: torch.dtype) -> bool:
    try:
        torch.empty(1, dtype=dtype, device="cpu").to(torch.complex64 if dtype.is_complex else torch.float32)
    except NotImplementedError:  # numbers of fewer than 8 bits
        return False
    return True


def _is_tensor_type(dtype: np.dtype[Any]) -> bool:
    try:
        torch.from_numpy(np.empty(0, dtype.newbyteorder("=")))
    except TypeError:  # longdouble; unsigned integers before torch 2.3
        return False
    return True


def is_dense(value: Any) -> bool:
    """Tell whether a tensor's numbers can be taken row by row: neither sparse, quantised nor without any."""
    return isinstance(value, torch.Tensor) and not (
        value.layout != torch.strided or value.is_meta or value.is_quantized
    )


def _name_of(value: Any) -> str:
    kind = type(value).__name__
    return f"{'an' if kind[0] in 'aeiouAEIOU' else 'a'} {kind}"


def _text(key: Any) -> str:
    try:
        return str(key)
    except ValueError:  # Python prints no integer of more than 4,300 digits
        return type(key).__name__


def _short(value: Any) -> str:
    if not isinstance(value, (str, int, float, bytes)):
        return _name_of(value)
    text = repr(value) if isinstance(value, (str, bytes)) else _text(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _listed(values: dict[str, Any]) -> str:
    names = ", ".join(_short(key) for key in list(values)[:6])
    return f"{names}, ..." if len(values) > 6 else names or "(none)"


def _refuse(path: str, found: str, fix: str, cause: BaseException | None = None) -> NoReturn:
    raise CheckpointFileError(path, expected="a checkpoint", found=found, fix=fix) from cause
