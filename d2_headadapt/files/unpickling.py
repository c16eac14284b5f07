"""Reading a pickle of plain values, and of what a table of known names allows, without running anything.

Why not :class:`pickle.Unpickler` with ``find_class`` overridden: it can still be made to take all memory (one
``LONG_BINPUT`` of index 2**32 - 1 zero-fills a 64 GB memo) and to crash the interpreter (a tuple nested 200,000 deep,
used as a key, overflows the C stack in ``hash``), and it calls whatever lies on its stack. Here the memo is a dict,
keys are scalars, lengths are compared with the bytes that are left, steps and copies are counted, and only a
:class:`Builder` is ever called.
"""

from __future__ import annotations

import codecs
import io
import pickle
import struct
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from ..errors import CheckpointFileError
from . import arrays
from .pickle_machine import BAD_VALUES, DAMAGED, Builder, Machine, Source, check_key

MAX_STEPS = 10_000_000
"""Opcodes of one pickle. A detectron2 checkpoint has ten to fifty thousand."""

_TRUSTED_ERRORS = (*BAD_VALUES, ImportError, EOFError, OSError, AssertionError, pickle.UnpicklingError)


def _ordered_dict(pairs: Any = ()) -> OrderedDict[Any, Any]:
    return OrderedDict((check_key(key), value) for key, value in pairs)


def _counter(counts: Any = ()) -> Counter[Any]:
    if not isinstance(counts, dict):
        raise TypeError("a Counter that is not made of a dict")
    return Counter(counts)


def _encode(text: str, encoding: str = "latin1") -> bytes:
    # How Python 3 writes bytes at protocol 2.
    if not isinstance(text, str) or not isinstance(encoding, str) or encoding not in ("latin1", "utf-8"):
        raise ValueError("bytes in an encoding that pickle never writes")
    return text.encode(encoding)


def _bytearray(value: Any = b"") -> bytearray:
    # bytearray(10**12) is a valid call and takes a terabyte.
    if not isinstance(value, bytes):
        raise TypeError("a bytearray that is not made of bytes")
    return bytearray(value)


def _complex(real: Any, imag: Any) -> complex:
    if not isinstance(real, float) or not isinstance(imag, float):
        raise TypeError("a complex number that is not made of two numbers")
    return complex(real, imag)


def _set(items: Any = ()) -> set[Any]:
    return {check_key(item) for item in items}


PLAIN: dict[str, Any] = {
    "collections.OrderedDict": Builder(_ordered_dict),
    "collections.Counter": Builder(_counter),
    "_codecs.encode": Builder(_encode),
    "builtins.bytearray": Builder(_bytearray),
    "builtins.bytes": Builder(lambda: b""),  # how Python 3 writes empty bytes at protocol 2
    "builtins.complex": Builder(_complex),
    "builtins.dict": Builder(_ordered_dict),
    "builtins.set": Builder(_set),
    "builtins.frozenset": Builder(lambda items=(): frozenset(_set(items))),
    "numpy.dtype": Builder(arrays.make_dtype),
    "numpy.ndarray": np.ndarray,
}
"""What every checkpoint may ask for, by name: plain containers and numpy arrays."""

for _core in ("numpy.core", "numpy._core"):  # numpy 2 renamed it, and each reads the files of the other
    PLAIN[f"{_core}.multiarray._reconstruct"] = Builder(arrays.make_empty)
    PLAIN[f"{_core}.multiarray.scalar"] = Builder(arrays.make_scalar)
    PLAIN[f"{_core}.numeric._frombuffer"] = Builder(arrays.make_from_buffer)


class SafeUnpickler(Machine):
    """Reads one pickle at a time from ``source``; :attr:`position` is where the next one begins."""

    def __init__(
        self,
        source: Source,
        *,
        where: str,
        known: Mapping[str, Any] = PLAIN,
        persistent: Callable[[Any], Any] | None = None,
        encoding: str = "utf-8",
        start: int = 0,
    ) -> None:
        super().__init__(source, where=where, known=known, persistent=persistent, encoding=encoding, start=start)

    def load(self) -> Any:
        """Return the next value.

        Raises:
            CheckpointFileError: it is damaged, or asks for more than plain values.
        """
        self.reset()
        try:
            for _ in range(MAX_STEPS):
                step = _STEPS.get(self.take(1)[0])
                if step is None:
                    self.broken("an opcode that no plain value needs")
                if step is _stop:
                    return self.stack.pop()
                step(self)
        except CheckpointFileError:
            raise
        except BAD_VALUES as error:
            self.broken(f"{type(error).__name__}: {str(error)[:160]}", error)
        self.broken(f"more than {MAX_STEPS:,} steps")


def trusted(
    path: str,
    stream: io.BytesIO,
    *,
    known: dict[str, Any] | None = None,
    persistent: Callable[[Any], Any] | None = None,
    encoding: str = "utf-8",
) -> Any:
    """Load a pickle that may run anything; its torch tensors are made here all the same."""
    try:
        return _Trusting(stream, known or {}, persistent, encoding).load()
    except CheckpointFileError:
        raise
    except _TRUSTED_ERRORS as error:
        fix = DAMAGED
        if isinstance(error, ImportError):
            fix = "The file needs code that is not installed here; install it, or save the weights alone where it is."
        raise CheckpointFileError(
            path,
            expected="a pickle that loads with everything allowed",
            found=f"{type(error).__name__}: {str(error)[:200]}",
            fix=fix,
        ) from error


class _Trusting(pickle.Unpickler):
    def __init__(
        self, stream: io.BytesIO, known: dict[str, Any], persistent: Callable[[Any], Any] | None, encoding: str
    ) -> None:
        super().__init__(stream, encoding=encoding)
        self._known = known
        self._persistent = persistent

    def find_class(self, module: str, name: str, /) -> Any:
        full = f"{module}.{name}"
        if module.startswith("torch") and full in self._known:
            found = self._known[full]
            return found.make if isinstance(found, Builder) else found
        return super().find_class(module, name)

    def persistent_load(self, pid: Any) -> Any:
        if self._persistent is None:
            raise pickle.UnpicklingError("a reference to an object outside the pickle")
        return self._persistent(pid)


_Step = Callable[[Machine], None]


def _stop(machine: Machine) -> None:
    """Only recognised by :meth:`SafeUnpickler.load`, never called."""


def _constant(value: Any) -> _Step:
    return lambda machine: machine.push(value)


def _fresh(kind: Callable[[], Any]) -> _Step:
    return lambda machine: machine.push(kind())


def _packed(layout: str) -> Callable[[Machine], Any]:
    form = struct.Struct(layout)
    return lambda machine: form.unpack(machine.take(form.size))[0]


def _push(read: Callable[[Machine], Any]) -> _Step:
    return lambda machine: machine.push(read(machine))


def _sized(layout: str, make: Callable[[Machine, bytes], Any]) -> _Step:
    length = _packed(layout)
    return lambda machine: machine.push(make(machine, machine.take(length(machine))))


def _text(machine: Machine, data: bytes) -> str:
    return data.decode("utf-8", "surrogatepass")


def _old_text(machine: Machine, data: bytes) -> str:
    return data.decode(machine.encoding)


def _raw(machine: Machine, data: bytes) -> bytes:
    return data


def _long(machine: Machine, data: bytes) -> int:
    return int.from_bytes(data, "little", signed=True)


def _int_line(machine: Machine) -> int | bool:
    text = machine.line()
    return text == b"01" if text in (b"00", b"01") else int(text)


def _quoted_line(machine: Machine) -> str:
    text = machine.line()
    if len(text) < 2 or text[:1] != text[-1:] or text[:1] not in (b"'", b'"'):
        machine.broken("a string without quotes")
    return _old_text(machine, codecs.escape_decode(text[1:-1])[0])


def _tuple(count: int) -> _Step:
    def step(machine: Machine) -> None:
        if len(machine.stack) < count:
            machine.broken("a tuple of values that are not there")
        items = tuple(machine.stack[-count:])
        machine.stack[-count:] = [items]

    return step


_STEPS: dict[int, _Step] = {
    opcode[0]: step
    for opcode, step in {
        pickle.STOP: _stop,
        pickle.PROTO: lambda m: m.take(1) and None,
        pickle.FRAME: lambda m: m.take(8) and None,
        pickle.MARK: Machine.mark,
        pickle.POP: Machine.pop,
        pickle.POP_MARK: lambda m: m.since_mark() and None,
        pickle.DUP: lambda m: m.push(m.stack[-1]),
        pickle.NONE: _constant(None),
        pickle.NEWTRUE: _constant(True),
        pickle.NEWFALSE: _constant(False),
        pickle.EMPTY_TUPLE: _constant(()),
        pickle.EMPTY_LIST: _fresh(list),
        pickle.EMPTY_DICT: _fresh(dict),
        pickle.EMPTY_SET: _fresh(set),
        pickle.BININT: _push(_packed("<i")),
        pickle.BININT1: _push(_packed("<B")),
        pickle.BININT2: _push(_packed("<H")),
        pickle.BINFLOAT: _push(_packed(">d")),
        pickle.LONG1: _sized("<B", _long),
        pickle.LONG4: _sized("<i", _long),
        pickle.INT: _push(_int_line),
        pickle.LONG: _push(lambda m: int(m.line().rstrip(b"L"))),
        pickle.FLOAT: _push(lambda m: float(m.line())),
        pickle.STRING: _push(_quoted_line),
        pickle.UNICODE: _push(lambda m: m.line().decode("raw-unicode-escape")),
        pickle.SHORT_BINSTRING: _sized("<B", _old_text),
        pickle.BINSTRING: _sized("<i", _old_text),
        pickle.SHORT_BINBYTES: _sized("<B", _raw),
        pickle.BINBYTES: _sized("<I", _raw),
        pickle.BINBYTES8: _sized("<Q", _raw),
        pickle.BYTEARRAY8: _sized("<Q", lambda m, data: bytearray(data)),
        pickle.SHORT_BINUNICODE: _sized("<B", _text),
        pickle.BINUNICODE: _sized("<I", _text),
        pickle.BINUNICODE8: _sized("<Q", _text),
        pickle.TUPLE: lambda m: m.push(tuple(m.since_mark())),
        pickle.TUPLE1: _tuple(1),
        pickle.TUPLE2: _tuple(2),
        pickle.TUPLE3: _tuple(3),
        pickle.LIST: lambda m: m.push(m.since_mark()),
        pickle.DICT: Machine.new_dict,
        pickle.FROZENSET: lambda m: m.push(frozenset(_set(m.since_mark()))),
        pickle.APPEND: lambda m: m.append([m.stack.pop()]),
        pickle.APPENDS: lambda m: m.append(m.since_mark()),
        pickle.SETITEM: lambda m: m.set_items([m.stack.pop(-2), m.stack.pop()]),
        pickle.SETITEMS: lambda m: m.set_items(m.since_mark()),
        pickle.ADDITEMS: Machine.add_items,
        pickle.GET: _push(lambda m: m.get(int(m.line()))),
        pickle.BINGET: _push(lambda m: m.get(m.take(1)[0])),
        pickle.LONG_BINGET: _push(lambda m: m.get(_packed("<I")(m))),
        pickle.PUT: lambda m: m.put(int(m.line())),
        pickle.BINPUT: lambda m: m.put(m.take(1)[0]),
        pickle.LONG_BINPUT: lambda m: m.put(_packed("<I")(m)),
        pickle.MEMOIZE: Machine.memoize,
        pickle.GLOBAL: _push(lambda m: m.find(m.line().decode(), m.line().decode())),
        pickle.STACK_GLOBAL: Machine.find_on_stack,
        pickle.REDUCE: Machine.reduce,
        pickle.NEWOBJ: Machine.reduce,
        pickle.INST: Machine.reduce_named,
        pickle.OBJ: Machine.reduce_marked,
        pickle.BUILD: Machine.build,
        pickle.BINPERSID: _push(lambda m: m.persistent(m.stack.pop())),
    }.items()
}
