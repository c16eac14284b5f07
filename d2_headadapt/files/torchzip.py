"""The zip archive of ``torch.save``: where each record lies, and whether its bytes are the ones that were saved.

torch does not compare the checksums of its own archives when it reads them, so a flipped bit in a weight is loaded in
silence. Here the pickle is compared when the file is opened, and the records of tensors when
:func:`d2_headadapt.files.verify_tensors` asks.
"""

from __future__ import annotations

import mmap
import os
import struct
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import FileIO
from typing import NoReturn

from ..errors import CheckpointFileError
from .pickle_machine import DAMAGED

SIGNATURE = b"PK\x03\x04"

_LOCAL = struct.Struct("<4s5H3L2H")
_DESCRIPTOR = b"PK\x07\x08"
_HAS_DESCRIPTOR = 8
_ENCRYPTED = 1
_INDEX_ERRORS = (zipfile.BadZipFile, NotImplementedError, ValueError, OverflowError, struct.error, OSError, EOFError)


@dataclass(frozen=True)
class Record:
    """One stored record: ``size`` bytes from ``offset`` on; ``crc`` is None where the writer left it out."""

    name: str
    offset: int
    size: int
    crc: int | None


class MappedFile(mmap.mmap):
    """A private memory map, and which record begins at which address.

    Private: what a caller writes to a tensor stays in this process.
    """

    records: dict[int, Record]


class LoadedFile(bytearray):
    """The same, read into memory."""

    records: dict[int, Record]


Buffer = MappedFile | LoadedFile


@dataclass(frozen=True)
class Index:
    """Name -> record, names without the archive's own folder, and the bytes of the records that hold no values."""

    records: dict[str, Record]
    pickle: bytes
    byteorder: bytes


def read_index(path: str) -> Index:
    """Where everything lies in the torch archive at ``path``.

    Reads the index at the end of the file, each record's header, and the pickle; no values.

    Raises:
        CheckpointFileError: no zip, a zip that torch did not write, or a damaged one.
    """
    with open(path, "rb", buffering=0) as file:
        # Headers lie between gigabytes of values: reading ahead, here or in the system, would fetch the values.
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        try:
            with zipfile.ZipFile(file) as archive:
                entries = sorted(archive.infolist(), key=lambda entry: entry.header_offset)
        except _INDEX_ERRORS as error:
            raise CheckpointFileError(
                path,
                expected="a whole torch file",
                found=f"{os.path.getsize(path):,} bytes that begin as one, with no readable index at the end ({error})",
                fix="The file was cut short or damaged; copy or download it again.",
            ) from error
        root = _root(path, [entry.filename for entry in entries])
        # torch.serialization.set_crc32_options(False) writes 0 for every record.
        unchecked = all(entry.CRC == 0 for entry in entries)
        ends = [entry.header_offset for entry in entries[1:]] + [os.path.getsize(path)]
        records: dict[str, Record] = {}
        for entry, end in zip(entries, ends, strict=True):
            name = entry.filename.removeprefix(root)
            if name in records:
                _damaged(path, f"two records named {name!r}")
            offset = _data_offset(path, file, entry, end)
            records[name] = Record(name, offset, entry.file_size, None if unchecked else entry.CRC)
        # Not through a memory map: one page of it may make the system read megabytes ahead.
        byteorder = records.get("byteorder")
        return Index(
            records,
            _read_whole(path, file, records["data.pkl"]),
            _read_whole(path, file, byteorder) if byteorder else b"little",
        )


def open_buffer(path: str, *, mapped: bool) -> Buffer:
    """The bytes of ``path``, mapped into memory, or read where ``mapped`` is false or mapping is impossible."""
    with open(path, "rb") as file:
        buffer: Buffer | None = None
        if mapped:
            try:
                buffer = MappedFile(file.fileno(), 0, access=mmap.ACCESS_COPY)
            except (OSError, ValueError, OverflowError):
                buffer = None  # a file system without mapping, or no address space left
        if buffer is None:
            buffer = LoadedFile(os.path.getsize(path))
            if file.readinto(buffer) != len(buffer):
                _damaged(path, "a file that shrank while it was read")
    return buffer


def intact(buffer: Buffer, record: Record) -> bool:
    """Whether the bytes of ``record`` have its checksum; True where it has none."""
    if record.crc is None:
        return True
    with memoryview(buffer) as view:
        return zlib.crc32(view[record.offset : record.offset + record.size]) == record.crc


def damaged_records(wanted: list[tuple[Buffer, Record]]) -> list[bool]:
    """Whether each record's bytes differ from what was saved, the records shared among threads."""
    # zlib lets other threads run while it computes.
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return list(pool.map(lambda pair: not intact(*pair), wanted))


def _root(path: str, names: list[str]) -> str:
    pickles = [name for name in names if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise CheckpointFileError(
            path,
            expected="a checkpoint",
            found=f"a zip archive that torch.save did not write ({', '.join(names[:3]) or 'empty'})",
            fix="Unpack it if a checkpoint is inside, and name that file.",
        )
    root = pickles[0].removesuffix("data.pkl")
    if f"{root}constants.pkl" in names:
        raise CheckpointFileError(
            path,
            expected="a checkpoint",
            found="a TorchScript program",
            fix="Save the weights instead: torch.save({'model': torch.jit.load(FILE).state_dict()}, 'weights.pth').",
        )
    return root


def _data_offset(path: str, file: FileIO, entry: zipfile.ZipInfo, end: int) -> int:
    """Where the bytes of ``entry`` begin, after a comparison of its header with the index."""
    name = entry.orig_filename.encode("utf-8", "surrogateescape")
    if entry.header_offset < 0:  # what zipfile makes of an index that lies earlier than it says
        _damaged(path, "an index that is not where it says")
    file.seek(entry.header_offset)
    header = file.read(_LOCAL.size + len(name))
    if len(header) < _LOCAL.size + len(name):
        _damaged(path, f"no header for record {entry.filename!r}")
    signature, _, flags, method, *_, name_length, extra_length = _LOCAL.unpack_from(header)
    if signature != SIGNATURE or name_length != len(name) or header[_LOCAL.size :] != name:
        _damaged(path, f"a header that is not the one of record {entry.filename!r}")
    if method or entry.compress_type or entry.compress_size != entry.file_size or entry.flag_bits & _ENCRYPTED:
        _damaged(path, f"a compressed or encrypted record {entry.filename!r}, which torch.save never writes")
    offset = entry.header_offset + len(header) + int(extra_length)
    if offset + entry.file_size > end:
        _damaged(path, f"a record {entry.filename!r} that reaches into the next one")
    if flags & _HAS_DESCRIPTOR:
        # Without checksums this is what tells a shifted record: the mark that follows its last byte.
        file.seek(offset + entry.file_size)
        if file.read(len(_DESCRIPTOR)) != _DESCRIPTOR:
            _damaged(path, f"a record {entry.filename!r} that does not end where the index says")
    return offset


def _read_whole(path: str, file: FileIO, record: Record) -> bytes:
    file.seek(record.offset)
    data = file.read(record.size)
    if len(data) != record.size or (record.crc is not None and zlib.crc32(data) != record.crc):
        _damaged(path, f"a damaged record {record.name!r}: its checksum is not the one in the index")
    return data


def _damaged(path: str, found: str) -> NoReturn:
    raise CheckpointFileError(path, expected="a whole torch file", found=found, fix=DAMAGED)
