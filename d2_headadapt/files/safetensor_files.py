"""``.safetensors`` files: tensors, and what the tensors mean in the metadata, as one JSON string.

The format has no checksums and no two names for one tensor. Names that share all their memory are written once; the
others are restored on reading from the key ``aliases`` of that JSON.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NoReturn

import torch

from ..errors import CheckpointFileError

METADATA_KEY = "d2_headadapt"
_ALIASES = "aliases"


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


def write(path: str, model: Mapping[str, torch.Tensor], provenance: Mapping[str, Any] | None) -> None:
    """Write ``model`` to ``path``, each tensor once and contiguous."""
    library = _library(path)
    tensors: dict[str, torch.Tensor] = {}
    aliases: dict[str, str] = {}
    first: dict[tuple[Any, ...], str] = {}
    owners: dict[int, str] = {}
    for name, tensor in model.items():
        value = tensor.detach()
        memory = value.untyped_storage().data_ptr()
        view = (memory, value.storage_offset(), value.shape, value.stride(), value.dtype)
        if value.numel() and view in first:
            aliases[name] = first[view]
            continue
        first[view] = name
        shared = owners.setdefault(memory, name) != name
        # The library refuses tensors that share memory: a part of another one is written as a tensor of its own.
        tensors[name] = value.cpu().contiguous().clone() if shared else value.cpu().contiguous()
    notes = dict(provenance or {})
    if aliases:
        notes[_ALIASES] = aliases
    metadata = {"format": "pt"}
    if notes:
        metadata[METADATA_KEY] = json.dumps(notes, ensure_ascii=False)
    try:
        library.torch.save_file(tensors, path, metadata=metadata)
    except library.SafetensorError as error:
        raise OSError(str(error)) from error


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
