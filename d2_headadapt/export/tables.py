"""Store class names in exported files, as JSON of :meth:`Provenance.to_plain`.

In a TorchScript file they are the entry :data:`ENTRY` of its ``_extra_files``, which a C++ program finds in the
``ExtraFilesMap`` that it hands to ``torch::jit::load``; in an ONNX file they are under the same key of its
``metadata_props``.
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Mapping
from typing import Any

import torch
from detectron2.utils.file_io import PathManager

from ..adapt.classes import ClassTable
from ..checkpoint.provenance import Provenance
from ..errors import CheckpointFileError, ExportError
from ..files import replace_file

ENTRY = "d2_headadapt.json"
"""Name of what an exported file says of itself: an extra file of TorchScript, a property of ONNX."""


def embed_tables(module: Any, path: str, tables: Mapping[str, ClassTable]) -> None:
    """Save a traced or scripted module, or an ONNX model, together with its class names, whole or not at all.

    Args:
        module: of ``torch.jit.trace`` or ``torch.jit.script``, or an ``onnx.ModelProto``.
        path: a local path; a file that is there is replaced.
        tables: by label space (``thing``) and by task, as ``Predictor.tables`` and checkpoints have them.

    Raises:
        CheckpointFileError: no such module, no table, or the file cannot be written.
    """
    is_onnx = hasattr(module, "metadata_props")
    if not is_onnx and not isinstance(module, torch.jit.ScriptModule):
        raise CheckpointFileError(
            path,
            expected="a TorchScript module or an ONNX model",
            found=type(module).__name__,
            fix="Trace it first: torch.jit.trace(adapter, adapter.flattened_inputs).",
        )
    if not tables:
        raise CheckpointFileError(
            path, expected="at least one class table", found="none", fix="Pass {'thing': ClassTable([...])}."
        )
    known = Provenance(tables)
    write_bytes(path, onnx_bytes(module, known) if is_onnx else torchscript_bytes(module, known))


def write_bytes(path: str, content: bytes, *, exclusive: bool = False) -> None:
    """Write an exported file, whole or not at all.

    Args:
        path: a local file.
        content: its bytes.
        exclusive: not over one that is there.
    """
    replace_file(path, lambda file: file.write(content), exclusive=exclusive)


def torchscript_bytes(module: torch.jit.ScriptModule, known: Provenance) -> bytes:
    """Serialize a TorchScript module together with what ``known`` says of it."""
    content: bytes = module.save_to_buffer(_extra_files={ENTRY: _json(known)})
    return content


def onnx_bytes(model: Any, known: Provenance) -> bytes:
    """Serialize an ``onnx.ModelProto`` together with what ``known`` says of it; other metadata of it stays."""
    made = type(model)()
    made.CopyFrom(model)
    kept = [prop for prop in model.metadata_props if prop.key != ENTRY]
    del made.metadata_props[:]
    made.metadata_props.extend(kept)
    made.metadata_props.add(key=ENTRY, value=_json(known))
    content: bytes = made.SerializeToString()
    return content


def _json(known: Provenance) -> str:
    return json.dumps(known.to_plain(), ensure_ascii=False)


def read_tables(path: str) -> dict[str, ClassTable]:
    """Read the class tables, by label space and task, of a TorchScript or ONNX file.

    Only the entry is read: no code of the file runs, and neither its operators nor a device have to be there.

    Args:
        path: whatever detectron2's ``PathManager`` understands.

    Raises:
        CheckpointFileError: no exported file, one without the entry, or a damaged one.
        ExportError: an ONNX file, and the package ``onnx`` is not installed.
    """
    return dict(read_facts(path).tables)


def read_facts(path: str) -> Provenance:
    """Read everything that an exported file says of itself: ``tables``, and ``extra["export"]`` of our command.

    Args:
        path: as :func:`read_tables`, which raises the same.
    """
    try:
        with open(PathManager.get_local_path(path), "rb") as file:
            return facts_of(file.read(), path)
    except OSError as exc:
        raise _no_file(path, exc) from exc


def facts_of(content: bytes, path: str) -> Provenance:
    """Read, like :func:`read_facts`, what the content of a file says; ``path`` is for messages."""
    try:
        text = _torchscript_entry(content) if is_torchscript(content) else _onnx_entry(content)
        data = json.loads(text) if text is not None else None
    except (ValueError, RecursionError, zipfile.BadZipFile) as exc:
        raise _no_file(path, exc) from exc
    if text is None:
        raise CheckpointFileError(
            path,
            expected=f"an entry {ENTRY} among its extra files or metadata",
            found="none",
            fix="Write the file with d2-headadapt export, or with d2_headadapt.export.embed_tables.",
        )
    return Provenance.from_plain(data, path)


def is_torchscript(content: bytes) -> bool:
    """Tell whether a file is TorchScript, which is a zip archive, and not ONNX."""
    return content[:2] == b"PK"


def _torchscript_entry(content: bytes) -> bytes | None:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        # torch puts all entries under one folder, whose name is that of the file or "archive".
        found = [name for name in archive.namelist() if name.split("/")[1:] == ["extra", ENTRY]]
        return archive.read(found[0]) if found else None


def _onnx_entry(content: bytes) -> str | None:
    onnx = import_onnx()
    from google.protobuf.message import DecodeError

    try:
        model = onnx.load_model_from_string(content)
    except DecodeError as exc:
        raise ValueError("neither a zip archive nor an ONNX graph") from exc
    # Many bytes are a message of some kind; only a model has a graph.
    if not model.HasField("graph"):
        raise ValueError("neither a zip archive nor an ONNX graph")
    return next((prop.value for prop in model.metadata_props if prop.key == ENTRY), None)


def import_onnx() -> Any:
    """Import the package ``onnx``, which only ONNX files need.

    Raises:
        ExportError: it is not installed.
    """
    try:
        import onnx
    except ImportError as exc:
        raise ExportError(
            "format onnx", expected="the package onnx", found=str(exc), fix="Type: pip install onnx onnxruntime"
        ) from exc
    return onnx


def _no_file(path: str, exc: Exception) -> CheckpointFileError:
    return CheckpointFileError(
        path,
        expected="a TorchScript or ONNX file",
        found=f"{type(exc).__name__}: {exc}",
        fix="Correct the path, or export the model again.",
    )
