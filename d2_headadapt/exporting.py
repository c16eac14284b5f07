"""A TorchScript file that knows its classes: the names travel in the archive, beside the code.

The entry :data:`ENTRY` of the file's ``_extra_files`` is JSON in the form of :meth:`Provenance.to_plain`. A C++ program
finds it in the ``ExtraFilesMap`` that it hands to ``torch::jit::load``.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping

import torch
from detectron2.utils.file_io import PathManager

from .classes import ClassTable
from .errors import CheckpointFileError
from .files.saving import _replace
from .provenance import Provenance

ENTRY = "d2_headadapt.json"


def embed_tables(module: torch.jit.ScriptModule, path: str, tables: Mapping[str, ClassTable]) -> None:
    """Save a traced or scripted module together with its class names, whole or not at all.

    Args:
        module: of ``torch.jit.trace`` or ``torch.jit.script``.
        path: a local path; a file that is there is replaced.
        tables: by label space (``thing``) and by task, as ``Predictor.tables`` and checkpoints have them.

    Raises:
        CheckpointFileError: no TorchScript module, no table, or the file cannot be written.
    """
    if not isinstance(module, torch.jit.ScriptModule):
        raise CheckpointFileError(
            path,
            expected="a TorchScript module",
            found=type(module).__name__,
            fix="Trace it first: torch.jit.trace(adapter, adapter.flattened_inputs).",
        )
    if not tables:
        raise CheckpointFileError(
            path, expected="at least one class table", found="none", fix="Pass {'thing': ClassTable([...])}."
        )
    text = json.dumps(Provenance(tables).to_plain(), ensure_ascii=False)
    content = module.save_to_buffer(_extra_files={ENTRY: text})

    def write(temporary: str) -> None:
        with open(temporary, "wb") as file:
            file.write(content)

    _replace(path, write)


def read_tables(path: str) -> dict[str, ClassTable]:
    """Class tables by label space and task of a file that :func:`embed_tables` wrote.

    Only the entry is read: no code of the file runs, and neither its operators nor a device have to be there.

    Args:
        path: whatever detectron2's ``PathManager`` understands.

    Raises:
        CheckpointFileError: no TorchScript file, one without the entry, or a damaged one.
    """
    try:
        with zipfile.ZipFile(PathManager.get_local_path(path)) as archive:
            # torch puts all entries under one folder, whose name is that of the file or "archive".
            found = [name for name in archive.namelist() if name.split("/")[1:] == ["extra", ENTRY]]
            data = json.loads(archive.read(found[0])) if found else None
    except (OSError, ValueError, zipfile.BadZipFile) as exc:
        raise CheckpointFileError(
            path,
            expected="a TorchScript file",
            found=f"{type(exc).__name__}: {exc}",
            fix="Correct the path, or export the model again.",
        ) from exc
    if not found:
        raise CheckpointFileError(
            path,
            expected=f"an entry {ENTRY} among its extra files",
            found="none",
            fix="Save the module with d2_headadapt.exporting.embed_tables.",
        )
    return dict(Provenance.from_plain(data, path).tables)
