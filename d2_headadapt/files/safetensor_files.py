"""Read and write ``.safetensors`` files; what the tensors mean is in the metadata, as one JSON string.

The format has no checksums and no two names for one tensor. Names that share all their memory are written once; the
others are restored on reading from the key ``aliases`` of that JSON.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from typing import IO, Any, NoReturn

import torch

from ..errors import CheckpointFileError

METADATA_KEY = "d2_headadapt"
_ALIASES = "aliases"
_NAMES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}
TYPES: dict[torch.dtype, str] = {getattr(torch, name): code for code, name in _NAMES.items()}
"""What the format calls the types of numbers that every version of it has."""


def read(path: str, *, mapped: bool) -> dict[str, Any]:
    """Return ``{"model": ..., "d2_headadapt": provenance if there is one}``."""
    library = _library(path)
    try:
        with library.safe_open(path, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            model = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it cannot be iterated)
    except (library.SafetensorError, OSError, RuntimeError, ValueError, TypeError, LookupError, MemoryError) as error:
        _damaged(path, f"{type(error).__name__}: {str(error)[:200]}", error)
    if not mapped:
        model = {name: tensor.clone() for name, tensor in model.items()}
    checkpoint: dict[str, Any] = {"model": model}
    notes = _notes(path, metadata.get(METADATA_KEY))
    for alias, name in notes.pop(_ALIASES, {}).items():
        if not isinstance(name, str) or name not in model or alias in model:
            _damaged(path, f"a second name {alias!r} for {name!r}, which is not there or not second")
        model[alias] = model[name]
    if notes:
        checkpoint[METADATA_KEY] = notes
    return checkpoint


def write(file: IO[bytes], model: Mapping[str, torch.Tensor], provenance: Mapping[str, Any] | None) -> None:
    """Write ``model`` to ``file``, each tensor once and contiguous.

    Not by the library: it writes to a temporary file of its own beside the target, which only the owner may read
    afterwards, and which stays where the process is killed.

    Raises:
        ValueError: a tensor of a type that the format does not have.
    """
    tensors: dict[str, torch.Tensor] = {}
    aliases: dict[str, str] = {}
    first: dict[tuple[Any, ...], str] = {}
    for name, tensor in model.items():
        value = tensor.detach()
        view = (value.untyped_storage().data_ptr(), value.storage_offset(), value.shape, value.stride(), value.dtype)
        if value.numel() and view in first:
            aliases[name] = first[view]
        else:
            first[view], tensors[name] = name, value
    notes = {**(provenance or {}), **({_ALIASES: aliases} if aliases else {})}
    metadata = {"format": "pt", **({METADATA_KEY: json.dumps(notes, ensure_ascii=False)} if notes else {})}
    header: dict[str, Any] = {"__metadata__": metadata}
    # The widest numbers first: each tensor begins where its type may begin.
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    end = 0
    for name in names:
        value = tensors[name]
        if value.dtype not in TYPES or name in header:
            raise ValueError(f"{name!r} of {value.dtype}, which a .safetensors file cannot hold")
        begin, end = end, end + value.numel() * value.element_size()
        header[name] = {"dtype": TYPES[value.dtype], "shape": list(value.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    file.write(struct.pack("<Q", len(text)) + text)
    for name in names:
        # One at a time: what is on a GPU, or no contiguous view, is copied for as long as it is written.
        file.write(tensors[name].cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)


def _library(path: str) -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise CheckpointFileError(
            path,
            expected="the safetensors library",
            found="an environment without it",
            fix="Type: pip install 'd2_headadapt[files]'",
        ) from error
    return safetensors


def _notes(path: str, text: str | None) -> dict[str, Any]:
    if text is None:
        return {}
    try:
        notes = json.loads(text)
    except (ValueError, RecursionError) as error:
        _damaged(path, f"metadata {METADATA_KEY!r} that is no JSON: {str(error)[:100]}", error)
    if not isinstance(notes, dict) or not isinstance(notes.get(_ALIASES, {}), dict):
        _damaged(path, f"metadata {METADATA_KEY!r} that is no JSON object")
    return notes


def _damaged(path: str, found: str, cause: BaseException | None = None) -> NoReturn:
    raise CheckpointFileError(
        path,
        expected="a whole safetensors file",
        found=found,
        fix="The file is damaged or was cut short; copy or download it again.",
    ) from cause
