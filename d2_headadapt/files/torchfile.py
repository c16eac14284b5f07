"""Tensors out of torch files, the zip format and the one before it, as views of the file or in memory of their own.

The pickle inside is read by :class:`d2_headadapt.files.unpickling.SafeUnpickler`. ``torch.load(weights_only=True)``
would be the obvious choice. It does not tell which record a tensor came from, which the checksums need; a small file
with a tuple nested a million deep as a key ends the process (measured with torch 2.15); and it refuses the numpy
numbers that many training loops leave in their checkpoints.
"""

from __future__ import annotations

import io
import mmap
import os
import struct
import weakref
from collections.abc import Callable
from typing import Any, NoReturn

import torch

from ..errors import CheckpointFileError
from .pickle_machine import DAMAGED, Source
from .torch_tensors import StorageView, persistent_loader, torch_globals
from .torchzip import Buffer, LoadedFile, Record, damaged_records, open_buffer, read_index
from .unpickling import PLAIN, SafeUnpickler, trusted

LEGACY_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
"""How a file of torch before 1.6, or of ``_use_new_zipfile_serialization=False``, begins."""

_SMALL = 2**24
"""Bytes that a tensor may take whatever the file's size: a small file may hold a small expanded tensor."""

# Every buffer that a living tensor is a view of. A buffer lives as long as its last tensor, so no address is stale.
_open_buffers: weakref.WeakValueDictionary[int, Buffer] = weakref.WeakValueDictionary()


def load_zip(path: str, *, trust: bool, mapped: bool) -> Any:
    """The object in a zip file of ``torch.save``; its tensors are views of the file's buffer."""
    index = read_index(path)
    if index.byteorder != b"little":
        _refuse(path, "values in big-endian order", "Save it again on a little-endian machine.")
    buffer = _register(open_buffer(path, mapped=mapped))
    storages: dict[str, StorageView] = {}

    def storage(key: str, dtype: torch.dtype, count: int) -> StorageView:
        if key not in storages:
            record = index.records.get(f"data/{key}")
            if record is None or record.size != count * dtype.itemsize:
                size = "no record" if record is None else f"{record.size:,} bytes"
                _refuse(path, f"{size} for the {count:,} values of storage {key[:40]!r}", DAMAGED)
            storages[key] = StorageView(_view(buffer, record, dtype), dtype, 0, count)
        return storages[key]

    value, _ = _unpickle(path, index.pickle, 0, persistent_loader(storage), trust=trust)
    return value


def load_legacy(path: str, *, trust: bool) -> Any:
    """The object in a torch file of the format before zip, which has no checksums; always in memory of its own."""
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return _load_legacy(path, data, trust)


def _load_legacy(path: str, data: mmap.mmap, trust: bool) -> Any:
    storages: dict[str, StorageView] = {}
    taken = 0

    def storage(key: str, dtype: torch.dtype, count: int) -> StorageView:
        nonlocal taken
        if key not in storages:
            taken += count * dtype.itemsize
            if taken > len(data):
                _refuse(path, f"{taken:,} bytes of values promised in {len(data):,} bytes of file", DAMAGED)
            memory = torch.empty(count * dtype.itemsize, dtype=torch.uint8, device="cpu").untyped_storage()
            storages[key] = StorageView(memory, dtype, 0, count)
        return storages[key]

    persistent = persistent_loader(storage)
    position = len(LEGACY_MAGIC)
    for _ in ("protocol version", "system"):
        system, position = _unpickle(path, data, position, persistent, trust=False)
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        _refuse(path, "values in big-endian order", "Save it again on a little-endian machine.")
    value, position = _unpickle(path, data, position, persistent, trust=trust)
    keys, position = _unpickle(path, data, position, persistent, trust=False)
    texts = isinstance(keys, list) and all(isinstance(key, str) for key in keys)
    if not texts or sorted(keys) != sorted(storages):
        _refuse(path, "a list of storages that is not the one its tensors name", DAMAGED)
    for key in keys:
        view = storages[key]
        size = view.count * view.dtype.itemsize
        if len(data) - position < 8 + size or struct.unpack_from("<q", data, position)[0] != view.count:
            _refuse(path, f"{len(data) - position:,} bytes where {8 + size:,} of storage {key[:40]!r} belong", DAMAGED)
        position += 8
        if size:
            raw = bytearray(data[position : position + size])
            _bytes_of(view.storage).copy_(torch.frombuffer(raw, dtype=torch.uint8))
        position += size
    return value


def record_of(tensor: torch.Tensor) -> tuple[Buffer, Record] | None:
    """The record that ``tensor`` is a view of, or None where it has memory of its own."""
    address = tensor.untyped_storage().data_ptr()
    for buffer in list(_open_buffers.values()):
        if address in buffer.records:
            return buffer, buffer.records[address]
    return None


def verify(path: str, tensors: dict[str, torch.Tensor]) -> list[str]:
    """Compare the checksums behind ``tensors``; return the names of those that have none.

    Raises:
        CheckpointFileError: values differ from what was saved; names the tensors.
    """
    unverifiable: list[str] = []
    names: dict[tuple[int, int], list[str]] = {}
    wanted: dict[tuple[int, int], tuple[Buffer, Record]] = {}
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.device.type != "cpu":
            unverifiable.append(name)
        elif tensor.untyped_storage().nbytes():
            found = record_of(tensor)
            if found is None or found[1].crc is None:
                unverifiable.append(name)
            else:
                key = (id(found[0]), found[1].offset)
                wanted[key] = found
                names.setdefault(key, []).append(name)
    broken = [key for key, damaged in zip(wanted, damaged_records(list(wanted.values())), strict=True) if damaged]
    if broken:
        listed = [name for key in broken for name in names[key]]
        raise CheckpointFileError(
            path,
            expected="the values that were saved",
            found=f"damaged values in {', '.join(listed[:5])}"
            + (f" and {len(listed) - 5} more" if len(listed) > 5 else "")
            + " (the checksum in the file is another)",
            fix="Copy or download the file again; on a disk that does this twice, check the disk.",
        )
    return unverifiable


def _register(buffer: Buffer) -> Buffer:
    buffer.records = {}
    _open_buffers[id(buffer)] = buffer
    return buffer


def _view(buffer: Buffer, record: Record, dtype: torch.dtype) -> torch.UntypedStorage:
    if not record.size:
        return torch.empty(0, dtype=torch.uint8, device="cpu").untyped_storage()
    if record.offset % dtype.itemsize:
        # torch.save aligns records; where another program did not, a view would hold misaligned numbers.
        buffer = LoadedFile(buffer[record.offset : record.offset + record.size])
        record = Record(record.name, 0, record.size, record.crc)
        _register(buffer)
    values = torch.frombuffer(buffer, dtype=torch.uint8, offset=record.offset, count=record.size)
    storage = values.untyped_storage()
    buffer.records[storage.data_ptr()] = record
    return storage


def _bytes_of(storage: torch.UntypedStorage) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8, device="cpu").set_(storage)


def _unpickle(
    path: str, source: Source, start: int, persistent: Callable[[Any], Any], *, trust: bool
) -> tuple[Any, int]:
    """One value, and where it ends."""
    limit = max(os.path.getsize(path), _SMALL)
    known = {**PLAIN, **torch_globals(limit)}
    if not trust:
        reader = SafeUnpickler(source, where=path, known=known, persistent=persistent, start=start)
        return reader.load(), reader.position
    stream = io.BytesIO(source[start:])
    return trusted(path, stream, known=known, persistent=persistent), start + stream.tell()


def _refuse(path: str, found: str, fix: str) -> NoReturn:
    raise CheckpointFileError(path, expected="a whole torch file", found=found, fix=fix)
