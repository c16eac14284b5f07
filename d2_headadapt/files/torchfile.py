"""Read tensors from torch files: the zip format and the one before it.

The zip format has a CRC-32 for each tensor, which torch does not compare: a flipped bit in a weight is loaded in
silence. Here a tensor is a view of the mapped file, and its record is found by the address of its storage. The pickle
inside is compared when the file is opened, the tensors when :func:`verify` asks.
"""

from __future__ import annotations

import contextlib
import io
import math
import mmap
import os
import struct
import weakref
import zipfile
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import IO, Any, NoReturn

import torch

from ..errors import CheckpointFileError
from .unpickling import DAMAGED, PLAIN, Builder, SafeUnpickler, Source, Unpickler, is_size

ZIP_MAGIC = b"PK\x03\x04"
LEGACY_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
"""How a file of torch before 1.6, or of ``_use_new_zipfile_serialization=False``, begins."""

_HEADER = struct.Struct("<4s5H3L2H")
_INDEX_ERRORS = (zipfile.BadZipFile, NotImplementedError, ValueError, OverflowError, struct.error, OSError, EOFError)
_SMALL = 2**24
"""Bytes that a tensor may take whatever the file's size: a small file may hold a small expanded tensor."""


@dataclass(frozen=True)
class Record:
    """One stored record: ``size`` bytes from ``offset`` on; ``crc`` is None where the writer left it out."""

    name: str
    offset: int
    size: int
    crc: int | None


class Buffer(mmap.mmap):
    """A private memory map (what a caller writes to a tensor stays in this process) whose tensors can be verified."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.records: dict[int, Record] = {}  # by the address where each begins
        _open_buffers.add(self)


# Every buffer that a living tensor is a view of. A buffer lives as long as its last tensor, so no address is stale.
_open_buffers: weakref.WeakSet[Buffer] = weakref.WeakSet()


# --- the zip archive


def load_zip(path: str, *, trust: bool, mapped: bool) -> Any:
    """Return the object in a zip file of ``torch.save``; its tensors are views of the file's buffer."""
    # Unbuffered: headers lie between gigabytes of values, and reading ahead would fetch the values.
    with open(path, "rb", buffering=0) as file:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        records = _read_index(path, file)
        data = _read_whole(path, file, records["data.pkl"])
        if "byteorder" in records and _read_whole(path, file, records["byteorder"]) != b"little":
            _refuse(path, "values in big-endian order", "Save it again on a little-endian machine.")
    buffer = _open_buffer(path, mapped)

    def read(key: str, dtype: torch.dtype, count: int) -> torch.UntypedStorage:
        record = records.get(f"data/{key}")
        if record is None or record.size != count * dtype.itemsize:
            size = "no record" if record is None else f"{record.size:,} bytes"
            _refuse(path, f"{size} for the {count:,} values of storage {key[:40]!r}", DAMAGED)
        return _view(buffer, record, dtype)

    return _unpickle(path, io.BytesIO(data), len(data), _Storages(read), trust=trust)


def _read_index(path: str, file: IO[bytes]) -> dict[str, Record]:
    """Map names, without the archive's own folder, to the records of a torch archive."""
    size = os.path.getsize(path)
    try:
        with zipfile.ZipFile(file) as archive:
            entries = sorted(archive.infolist(), key=lambda entry: entry.header_offset)
    except _INDEX_ERRORS as error:
        found = f"{size:,} bytes that begin as one, with no readable index at the end ({error})"
        raise CheckpointFileError(path, expected="a whole torch file", found=found, fix=DAMAGED) from error
    names = [entry.filename for entry in entries]
    pickles = [name for name in names if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(pickles) != 1:
        found = f"a zip archive that torch.save did not write ({', '.join(names[:3]) or 'empty'})"
        _refuse(path, found, "Unpack it if a checkpoint is inside, and name that file.")
    root = pickles[0].removesuffix("data.pkl")
    if f"{root}constants.pkl" in names:
        fix = "Save the weights instead: torch.save({'model': torch.jit.load(FILE).state_dict()}, 'weights.pth')."
        _refuse(path, "a TorchScript program", fix)
    # torch.serialization.set_crc32_options(False) writes 0 for every record.
    unchecked = all(entry.CRC == 0 for entry in entries)
    ends = [entry.header_offset for entry in entries[1:]] + [size]
    records: dict[str, Record] = {}
    for entry, end in zip(entries, ends, strict=True):
        offset = _data_offset(path, file, entry)
        if offset + entry.file_size > end or entry.filename.removeprefix(root) in records:
            _refuse(path, f"a record {entry.filename!r} that is there twice or reaches into the next one", DAMAGED)
        name = entry.filename.removeprefix(root)
        records[name] = Record(name, offset, entry.file_size, None if unchecked else entry.CRC)
    return records


def _data_offset(path: str, file: IO[bytes], entry: zipfile.ZipInfo) -> int:
    """Find where the bytes of ``entry`` begin, after a comparison of its header with the index."""
    name = entry.orig_filename.encode("utf-8", "surrogateescape")
    file.seek(max(entry.header_offset, 0))  # zipfile makes it negative of an index that lies earlier than it says
    header = file.read(_HEADER.size + len(name))
    if header[:4] != ZIP_MAGIC or len(header) < _HEADER.size or header[_HEADER.size :] != name:
        _refuse(path, f"no header of record {entry.filename!r} where it belongs", DAMAGED)
    _, _, _, method, *_, name_length, extra_length = _HEADER.unpack_from(header)
    if method or entry.compress_type or entry.compress_size != entry.file_size or entry.flag_bits & 1:
        _refuse(path, f"a compressed or encrypted record {entry.filename!r}, which torch.save never writes", DAMAGED)
    return entry.header_offset + _HEADER.size + int(name_length) + int(extra_length)


def _read_whole(path: str, file: IO[bytes], record: Record) -> bytes:
    file.seek(record.offset)
    data = file.read(record.size)
    if len(data) != record.size or (record.crc is not None and zlib.crc32(data) != record.crc):
        _refuse(path, f"a damaged record {record.name!r}: its checksum is not the one in the index", DAMAGED)
    return data


def _open_buffer(path: str, mapped: bool) -> Buffer:
    """Map the bytes of ``path``, or read them into memory where ``mapped`` is false or mapping is impossible."""
    with open(path, "rb") as file:
        if mapped:
            # A file system may lack mapping, and a process address space.
            with contextlib.suppress(OSError, ValueError, OverflowError):
                return Buffer(file.fileno(), 0, access=mmap.ACCESS_COPY)
        buffer = Buffer(-1, os.path.getsize(path))
        if file.readinto(buffer) != len(buffer):
            _refuse(path, "a file that shrank while it was read", DAMAGED)
        return buffer


def _view(buffer: Buffer, record: Record, dtype: torch.dtype) -> torch.UntypedStorage:
    if not record.size:
        return _empty(0)
    offset = record.offset
    if offset % dtype.itemsize:
        # torch.save aligns records; where another program did not, a view would hold misaligned numbers.
        data, offset = buffer[offset : offset + record.size], 0
        buffer = Buffer(-1, record.size)
        buffer[:] = data
    storage = torch.frombuffer(buffer, dtype=torch.uint8, offset=offset, count=record.size).untyped_storage()
    buffer.records[storage.data_ptr()] = Record(record.name, offset, record.size, record.crc)
    return storage


def _empty(size: int) -> torch.UntypedStorage:
    return torch.empty(size, dtype=torch.uint8, device="cpu").untyped_storage()


# --- the format before zip


def load_legacy(path: str, *, trust: bool) -> Any:
    """Return the object in a torch file of the format before zip; it has no checksums, and memory of its own."""
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        data.seek(len(LEGACY_MAGIC))
        room = len(data)

        def make(key: str, dtype: torch.dtype, count: int) -> torch.UntypedStorage:
            nonlocal room
            room -= count * dtype.itemsize
            if room < 0:
                _refuse(path, f"more bytes of values promised than the {len(data):,} of the file", DAMAGED)
            return _empty(count * dtype.itemsize)

        storages = _Storages(make)

        def load(trust: bool) -> Any:
            return _unpickle(path, data, len(data), storages, trust=trust)

        load(False)  # the protocol's version
        system = load(False)
        if not isinstance(system, dict) or system.get("little_endian") is not True:
            _refuse(path, "values in big-endian order", "Save it again on a little-endian machine.")
        value, keys = load(trust), load(False)
        texts = isinstance(keys, list) and all(isinstance(key, str) for key in keys)
        if not texts or sorted(keys) != sorted(storages.made):
            _refuse(path, "a list of storages that is not the one its tensors name", DAMAGED)
        for key in keys:
            dtype, memory = storages.made[key]
            size = memory.nbytes()
            if data.read(8) != struct.pack("<q", size // dtype.itemsize) or len(data) - data.tell() < size:
                _refuse(path, f"not the {size:,} bytes that belong to storage {key[:40]!r}", DAMAGED)
            if size:
                raw = torch.frombuffer(bytearray(data.read(size)), dtype=torch.uint8)
                torch.empty(0, dtype=torch.uint8, device="cpu").set_(memory).copy_(raw)
        return value


# --- what the pickle of both formats names


@dataclass(frozen=True)
class _StorageType:
    """A type that a pickle names ``torch.FloatStorage`` and so on."""

    dtype: torch.dtype


@dataclass(frozen=True)
class _StorageView:
    """``count`` values of a storage, from value ``first`` on."""

    storage: torch.UntypedStorage
    dtype: torch.dtype
    first: int
    count: int


class _Storages:
    """The storages of one file, each made once by ``make(key, dtype, count)``."""

    def __init__(self, make: Callable[[str, torch.dtype, int], torch.UntypedStorage]) -> None:
        self._make = make
        self.made: dict[str, tuple[torch.dtype, torch.UntypedStorage]] = {}

    def find(self, pid: Any) -> _StorageView:
        """Return the storage of a persistent id ``("storage", type, key, location, count[, view])``."""
        word, kind, key, _, count, *view = pid
        if word not in ("storage", b"storage") or not isinstance(kind, _StorageType) or not isinstance(key, str):
            raise ValueError("a reference that is no storage")
        if not is_size(count):
            raise ValueError("a storage whose size is none")
        if key not in self.made:
            self.made[key] = kind.dtype, self._make(key, kind.dtype, count)
        dtype, storage = self.made[key]
        if dtype != kind.dtype or storage.nbytes() != count * dtype.itemsize:
            raise ValueError("one storage under two types")
        _, first, size = view[0] if view and view[0] else (None, 0, count)
        if not is_size(first) or not is_size(size) or first + size > count:
            raise ValueError("a view that reaches beyond its storage")
        return _StorageView(storage, dtype, first, size)


_STORAGES = {
    "BFloat16Storage": torch.bfloat16,
    "BoolStorage": torch.bool,
    "ByteStorage": torch.uint8,
    "CharStorage": torch.int8,
    "ComplexDoubleStorage": torch.complex128,
    "ComplexFloatStorage": torch.complex64,
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "IntStorage": torch.int32,
    "LongStorage": torch.int64,
    "ShortStorage": torch.int16,
    "UntypedStorage": torch.uint8,
}


def _unpickle(path: str, source: Source, size: int, storages: _Storages, *, trust: bool) -> Any:
    kind = Unpickler if trust else SafeUnpickler
    known = _known(max(os.path.getsize(path), _SMALL))
    return kind(source, where=path, size=size, known=known, persistent=storages.find).load()


def _known(limit: int) -> dict[str, Any]:
    """List the names that torch's own weights need; no tensor of the file may be larger than ``limit`` bytes."""

    def rebuild(
        view: Any,
        offset: Any,
        size: Any,
        stride: Any,
        requires_grad: Any = False,
        hooks: Any = None,
        metadata: Any = None,
    ) -> torch.Tensor:
        return _tensor(view, view.dtype, offset, size, stride, metadata, limit)

    def rebuild_as(
        view: Any, offset: Any, size: Any, stride: Any, requires_grad: Any, hooks: Any, dtype: Any, metadata: Any = None
    ) -> torch.Tensor:
        return _tensor(view, dtype, offset, size, stride, metadata, limit)

    known: dict[str, Any] = dict(PLAIN)
    for name, dtype in _STORAGES.items():
        known[f"torch.{name}"] = known[f"torch.storage.{name}"] = _StorageType(dtype)
    known.update({str(value): value for value in vars(torch).values() if isinstance(value, torch.dtype)})
    known["torch.Size"] = Builder(torch.Size)
    known["torch.device"] = Builder(torch.device)
    known["torch.Tensor"] = known["torch._tensor.Tensor"] = torch.Tensor
    known["torch.nn.parameter.Parameter"] = torch.nn.Parameter
    known["torch._utils._rebuild_tensor"] = known["torch._utils._rebuild_tensor_v2"] = Builder(rebuild)
    known["torch._utils._rebuild_tensor_v3"] = Builder(rebuild_as)
    known["torch._utils._rebuild_parameter"] = Builder(_parameter)
    known["torch._utils._rebuild_parameter_with_state"] = Builder(_parameter)
    known["torch._tensor._rebuild_from_type_v2"] = Builder(_of_class)
    return known


def _parameter(data: Any, requires_grad: Any = True, hooks: Any = None, state: Any = None) -> torch.Tensor:
    if not isinstance(data, torch.Tensor):
        raise TypeError("a parameter that is no tensor")
    return data


def _of_class(function: Any, kind: Any, args: Any, state: Any) -> torch.Tensor:
    made = function.make(*args) if isinstance(function, Builder) else function(*args)
    if kind not in (torch.Tensor, torch.nn.Parameter) or not isinstance(made, torch.Tensor):
        raise TypeError("a tensor of a class of its own")
    return made


def _tensor(view: Any, dtype: Any, offset: Any, size: Any, stride: Any, metadata: Any, limit: int) -> torch.Tensor:
    """Make a view of a storage, after a check that every element lies inside it."""
    if not isinstance(view, _StorageView) or not isinstance(dtype, torch.dtype):
        raise TypeError("a tensor without a storage or dtype")
    if metadata:
        raise ValueError("a lazily conjugated or negated tensor")
    if not isinstance(size, tuple) or not isinstance(stride, tuple) or len(size) != len(stride) or len(size) > 32:
        raise ValueError("a tensor whose shape and strides do not agree")
    if not all(map(is_size, (offset, *size, *stride))):
        raise ValueError("a tensor whose shape or strides are no sizes")
    count = math.prod(size)
    last = offset + sum((extent - 1) * step for extent, step in zip(size, stride, strict=True)) if count else 0
    room = view.count * view.dtype.itemsize // dtype.itemsize
    if count and last >= room:
        raise ValueError(f"a tensor of shape {size} that reaches beyond the {room:,} values of its storage")
    if count * dtype.itemsize > limit:
        # An expanded tensor: one stored value that claims to be terabytes, which the first copy would allocate.
        raise ValueError(f"a tensor of shape {size}, more than the file could hold")
    first = offset + view.first * view.dtype.itemsize // dtype.itemsize
    return torch.empty(0, dtype=dtype, device="cpu").set_(view.storage, first, size, stride)


# --- checksums


def verify(path: str, tensors: dict[str, torch.Tensor]) -> list[str]:
    """Compare the checksums behind ``tensors``; return the names of those that have none.

    Raises:
        CheckpointFileError: values differ from what was saved; names the tensors.
    """
    unverifiable: list[str] = []
    wanted: dict[tuple[int, int], tuple[Buffer, Record, list[str]]] = {}
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.device.type != "cpu":
            unverifiable.append(name)
        elif tensor.untyped_storage().nbytes():
            buffer, record = _record_of(tensor)
            if buffer is None or record is None or record.crc is None:
                unverifiable.append(name)
            else:
                wanted.setdefault((id(buffer), record.offset), (buffer, record, []))[2].append(name)
    # zlib lets other threads run while it computes.
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        whole = pool.map(lambda found: is_intact(found[0], found[1]), wanted.values())
        broken = [name for found, intact in zip(wanted.values(), whole, strict=True) if not intact for name in found[2]]
    if broken:
        more = f" and {len(broken) - 5} more" if len(broken) > 5 else ""
        raise CheckpointFileError(
            path,
            expected="the values that were saved",
            found=f"damaged values in {', '.join(broken[:5])}{more} (the checksum in the file is another)",
            fix="Copy or download the file again; on a disk that does this twice, check the disk.",
        )
    return unverifiable


def _record_of(tensor: torch.Tensor) -> tuple[Buffer, Record] | tuple[None, None]:
    """Find the record that ``tensor`` is a view of, or None where it has memory of its own."""
    address = tensor.untyped_storage().data_ptr()
    for buffer in list(_open_buffers):
        if address in buffer.records:
            return buffer, buffer.records[address]
    return None, None


def is_intact(buffer: Buffer, record: Record) -> bool:
    """Tell whether the bytes of ``record`` have its checksum."""
    with memoryview(buffer) as view:
        return zlib.crc32(view[record.offset : record.offset + record.size]) == record.crc


def _refuse(path: str, found: str, fix: str) -> NoReturn:
    raise CheckpointFileError(path, expected="a whole torch file", found=found, fix=fix)
