"""Read a pickle of plain values, numpy arrays and tensors without running anything that it asks for.

The steps are those of Python's own unpickler in its Python form, ``pickle._Unpickler``, but for the ones by which a
file could do harm: only a :class:`Builder` of a fixed table is ever called, keys are scalars, states are set on arrays.

Why not the shorter ways (seen with Python 3.11 and torch 2.15): ``torch.load(weights_only=True)`` crashes the process
for 300 kB of nested tuple as a dict key, calls ``bytearray(10**12)``, reads past the end of a record
whose size is not the tensor's, and knows numpy's numbers from torch 2.5 on only; a ``find_class`` on the C unpickler
does the first two as well, zero-fills a memo of 64 GB for one ``LONG_BINPUT``, and sets any state that numpy lets it.
"""

from __future__ import annotations

import math
import pickle
import re
import struct
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NoReturn, Protocol

import numpy as np

from ..errors import CheckpointFileError
from ..key import HEAD_ADAPT

DAMAGED = "The file is damaged or was cut short; copy or download it again."

_BAD_VALUES = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    ImportError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
    Warning,  # numpy's, where warnings are errors
    pickle.UnpicklingError,
    struct.error,
)
"""What a step raises on bytes that make no sense (UnicodeError is a ValueError, RecursionError a RuntimeError)."""

_CODE = re.compile(r"[?biufcSU]\d{0,9}")
_MAX_DIMENSIONS = 32
"""Dimensions of an array that every numpy since 1.0 can hold."""
_MAX_KEY_DEPTH = 4
_SCALARS = (str, bytes, int, float, complex, bool, type(None))


class Source(Protocol):
    """The bytes of one or more pickles: a memory map or :class:`io.BytesIO`."""

    def read(self, size: int, /) -> bytes: ...

    def readline(self) -> bytes: ...

    def tell(self) -> int: ...


@dataclass(frozen=True)
class Builder:
    """A function that a pickle may call by the name under which the table of known names holds it."""

    make: Callable[..., Any]


def _check_key(key: Any, depth: int = _MAX_KEY_DEPTH) -> Any:
    """Return ``key`` if it is a scalar or a shallow tuple of scalars: the hash of a deep one overflows the C stack."""
    if isinstance(key, tuple) and depth:
        for part in key:
            _check_key(part, depth - 1)
    elif not isinstance(key, _SCALARS):
        raise TypeError(f"a dict key or set item of type {type(key).__name__}")
    return key


def _ordered_dict(pairs: Any = ()) -> OrderedDict[Any, Any]:
    return OrderedDict((_check_key(key), value) for key, value in pairs)


def _counter(counts: Any = ()) -> Counter[Any]:
    if not isinstance(counts, dict):
        raise TypeError("a Counter that is not made of a dict")
    return Counter(counts)


def _encode(text: str, encoding: str = "latin1") -> bytes:
    # How Python 3 writes bytes at protocol 2.
    if not isinstance(text, str) or encoding not in ("latin1", "utf-8"):
        raise ValueError("bytes in an encoding that pickle never writes")
    return text.encode(encoding)


def _bytearray(value: Any = b"") -> bytearray:
    # bytearray(10**12) is a valid call and takes a terabyte.
    if not isinstance(value, bytes):
        raise TypeError("a bytearray that is not made of bytes")
    return bytearray(value)


def _set(items: Any = ()) -> set[Any]:
    return {_check_key(item) for item in items}


def _dtype(code: Any, align: Any = False, copy: Any = False) -> np.dtype[Any]:
    """Make ``numpy.dtype(code)`` for numbers, booleans and text: no object, record or date."""
    text = code.decode("latin1") if isinstance(code, bytes) else code
    if not isinstance(text, str) or not _CODE.fullmatch(text):
        raise ValueError(f"the numpy dtype {str(text)[:40]!r}")
    # Always a copy: the state that follows in the pickle is set in place, and numpy's own dtypes are shared.
    made: np.dtype[Any] = np.dtype(text, False, True)
    return made


def _set_dtype_state(dtype: Any, state: Any) -> None:
    """Apply the byte order, the only part of a dtype's state that plain numbers have; numpy trusts all others."""
    order = state[1].decode() if isinstance(state[1], bytes) else state[1]
    if any(part is not None for part in state[2:5]) or order not in ("<", ">", "=", "|"):
        raise ValueError("a numpy dtype with fields, metadata or an unknown byte order")
    size = (dtype.itemsize, dtype.alignment) if dtype.kind in "SU" else (-1, -1)
    dtype.__setstate__((3, order, None, None, None, *size, 0))


def _set_array_state(array: Any, state: Any) -> None:
    """Give ``array`` the shape, dtype, order and bytes of ``(version, shape, dtype, is_fortran, bytes)``."""
    shape, dtype, fortran, raw = state[-4:]
    array.__setstate__((1, shape, dtype, bool(fortran), _fitting(raw, dtype, shape)))


def _from_buffer(buffer: Any, dtype: Any, shape: Any, order: Any) -> np.ndarray[Any, Any]:
    """Do what ``numpy.core.numeric._frombuffer`` does, which pickle protocol 5 writes."""
    flat: np.ndarray[Any, Any] = np.frombuffer(_fitting(buffer, dtype, shape), dtype)
    return flat.reshape(shape, order="F" if order == "F" else "C").copy(order="K")


def _fitting(raw: Any, dtype: Any, shape: Any) -> bytes:
    """Return the bytes of an array, which must be as many as its shape needs."""
    # Python 2 pickled bytes as text, which the latin1 reading turns into one character for each byte.
    data = raw.encode("latin1") if isinstance(raw, str) else raw
    if not isinstance(dtype, np.dtype) or not isinstance(data, (bytes, bytearray)):
        raise TypeError("a numpy array without a dtype or bytes")
    if not isinstance(shape, tuple) or len(shape) > _MAX_DIMENSIONS or not all(map(is_size, shape)):
        raise ValueError("a numpy array whose shape is no tuple of sizes")
    if dtype.itemsize == 0 or math.prod(shape) * dtype.itemsize != len(data):
        raise ValueError(f"a numpy array of shape {shape} and {dtype} with {len(data)} bytes")
    return bytes(data)


def is_size(value: Any) -> bool:
    """Tell whether a value of a pickle can be a size, stride or offset."""
    return type(value) is int and 0 <= value < 2**48


PLAIN: dict[str, Any] = {
    "collections.OrderedDict": Builder(_ordered_dict),
    "collections.Counter": Builder(_counter),
    "_codecs.encode": Builder(_encode),
    "builtins.bytearray": Builder(_bytearray),
    "builtins.bytes": Builder(lambda: b""),  # how Python 3 writes empty bytes at protocol 2
    "builtins.complex": Builder(complex),
    "builtins.dict": Builder(_ordered_dict),
    "builtins.set": Builder(_set),
    "builtins.frozenset": Builder(lambda items=(): frozenset(_set(items))),
    "numpy.dtype": Builder(_dtype),
    "numpy.ndarray": np.ndarray,
}
"""What every checkpoint may ask for, by name: plain containers and numpy arrays."""

for _core in ("numpy.core", "numpy._core"):  # numpy 2 renamed it, and each reads the files of the other
    PLAIN[f"{_core}.multiarray._reconstruct"] = Builder(lambda kind, shape, code: np.empty((0,), np.uint8))
    PLAIN[f"{_core}.multiarray.scalar"] = Builder(lambda kind, raw=b"": np.frombuffer(_fitting(raw, kind, ()), kind)[0])
    PLAIN[f"{_core}.numeric._frombuffer"] = Builder(_from_buffer)

_INHERITED = """
    PROTO FRAME STOP MARK POP POP_MARK DUP NONE NEWTRUE NEWFALSE INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT
    BINFLOAT STRING BINSTRING SHORT_BINSTRING UNICODE BINUNICODE SHORT_BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES
    BINBYTES8 EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST LIST EMPTY_DICT EMPTY_SET PUT BINPUT LONG_BINPUT
    MEMOIZE GET BINGET LONG_BINGET GLOBAL STACK_GLOBAL BINPERSID
"""
"""The opcodes whose steps are Python's; an opcode that is neither here nor below is refused."""


class Unpickler(pickle._Unpickler):
    """An unpickler that may run anything; its torch tensors are made here all the same, as views of the file.

    Args:
        source: the bytes, at the position where the pickle begins.
        where: the file's name, for messages.
        size: of ``source`` in bytes.
        known: name -> :class:`Builder` or constant.
        persistent: makes an object of a persistent id (torch's storages).
        encoding: how the byte strings of Python 2 are read.
    """

    def __init__(
        self,
        source: Source,
        *,
        where: str,
        size: int,
        known: Mapping[str, Any] = PLAIN,
        persistent: Callable[[Any], Any] | None = None,
        encoding: str = "utf-8",
    ) -> None:
        super().__init__(source, encoding=encoding)
        self._source = source
        self._where = where
        self._size = size
        self._known = known
        self._persistent = persistent
        # One call may copy what an earlier opcode made; a thousand calls on one long string must not.
        self._budget = 16 * size + 2**28

    def load(self) -> Any:
        """Return the next value.

        Raises:
            CheckpointFileError: it is damaged, asks for more than is allowed, or for code that is not installed.
        """
        try:
            return super().load()
        except CheckpointFileError:
            raise
        except _BAD_VALUES as error:
            reason = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
            if isinstance(error, KeyError):
                reason = f"no opcode of plain values ({error})"
            fix = DAMAGED
            if isinstance(error, ImportError):
                fix = "The file needs code that is not installed here; install it, or save the weights alone there."
            raise CheckpointFileError(
                self._where,
                expected="a whole pickle of weights and plain values",
                found=f"before byte {self._source.tell():,} of {self._size:,}: {' '.join(reason.split())[:200]}",
                fix=fix,
            ) from error

    def find_class(self, module: str, name: str, /) -> Any:
        """Return the object of this name, of whatever module."""
        found = self._known.get(f"{module}.{name}") if module.startswith("torch") else None
        if found is None:
            return super().find_class(module, name)
        return found.make if isinstance(found, Builder) else found

    def persistent_load(self, pid: Any) -> Any:
        """Return the object of a persistent id."""
        if self._persistent is None:
            raise ValueError("a reference to an object outside the pickle")
        return self._persistent(pid)


class SafeUnpickler(Unpickler):
    """An unpickler of plain values, one with each :meth:`load`; a name that is not ``known`` is refused."""

    # What Python's unpickler has, and its type stubs do not declare.
    stack: list[Any]
    append: Callable[[Any], None]
    read: Callable[[int], bytes]
    pop_mark: Callable[[], list[Any]]

    def find_class(self, module: str, name: str, /) -> Any:
        """Return the known object of this name; nothing is imported."""
        full = f"{'builtins' if module == '__builtin__' else module}.{name}"
        if full not in self._known:
            refuse_global(self._where, full)
        return self._known[full]

    def _spend(self, values: Any) -> None:
        for value in values if isinstance(values, tuple) else ():
            if isinstance(value, (str, bytes, bytearray)):
                self._budget -= len(value)
            elif isinstance(value, (list, tuple, dict, set, frozenset)):
                self._budget -= 64 * len(value)
        if self._budget < 0:
            raise MemoryError("copies that would take many times the size of the file")

    def _reduce(self) -> None:
        args, builder = self.stack.pop(), self.stack.pop()
        if not isinstance(builder, Builder) or not isinstance(args, tuple):
            raise TypeError(f"a call of {type(builder).__name__}")
        self._spend(args)
        self.append(builder.make(*args))

    def _build(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if isinstance(target, np.ndarray):
            self._spend(state)
            _set_array_state(target, state)
        elif isinstance(target, np.dtype):
            _set_dtype_state(target, state)
        elif isinstance(target, OrderedDict) and isinstance(state, dict):
            # A state dict carries the versions of its modules, by which load_state_dict upgrades old files.
            if isinstance(state.get("_metadata"), dict):
                vars(target)["_metadata"] = state["_metadata"]
        else:
            raise TypeError(f"a state for a {type(target).__name__}")

    def _top(self, kind: type) -> Any:
        if not isinstance(self.stack[-1], kind):
            raise TypeError(f"items for a {type(self.stack[-1]).__name__} where a {kind.__name__} belongs")
        return self.stack[-1]

    def _append_all(self, items: list[Any]) -> None:
        self._top(list).extend(items)

    def _set_all(self, items: list[Any]) -> None:
        target = self._top(dict)
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[_check_key(key)] = value

    def _dict(self) -> None:
        items = self.pop_mark()
        self.append({})
        self._set_all(items)

    def _add_all(self) -> None:
        items = self.pop_mark()
        self._top(set).update(_set(items))

    def _bytes_8(self) -> None:
        # Python's own makes a bytearray of the promised length first.
        self.append(bytearray(self.read(struct.unpack("<Q", self.read(8))[0])))

    dispatch: ClassVar[dict[int, Callable[[Any], Any]]] = {
        **{
            getattr(pickle, name)[0]: pickle._Unpickler.dispatch[getattr(pickle, name)[0]]
            for name in _INHERITED.split()
        },
        pickle.REDUCE[0]: _reduce,
        pickle.NEWOBJ[0]: _reduce,
        pickle.BUILD[0]: _build,
        pickle.APPEND[0]: lambda self: self._append_all([self.stack.pop()]),
        pickle.APPENDS[0]: lambda self: self._append_all(self.pop_mark()),
        pickle.SETITEM[0]: lambda self: self._set_all([self.stack.pop(-2), self.stack.pop()]),
        pickle.SETITEMS[0]: lambda self: self._set_all(self.pop_mark()),
        pickle.DICT[0]: _dict,
        pickle.ADDITEMS[0]: _add_all,
        pickle.FROZENSET[0]: lambda self: self.append(frozenset(_set(self.pop_mark()))),
        pickle.BYTEARRAY8[0]: _bytes_8,
    }


def refuse_global(where: str, name: str) -> NoReturn:
    """Raise the message for a pickle that asks for ``name``, which is more than weights need."""
    raise CheckpointFileError(
        where,
        expected="a file of weights and plain values, which runs nothing",
        found=f"a pickle that asks for {name[:120]!r}",
        fix="Loading that may run any code. For a file that you made yourself, or trust as much as a program, set "
        f"{HEAD_ADAPT.TRUST_FILE.set(True)}.",
    )
