"""The machine that a pickle drives: a stack, marks, a memo, and calls of known builders only.

Which opcode does what is in :mod:`d2_headadapt.files.unpickling`.
"""

from __future__ import annotations

import struct
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn, Protocol

import numpy as np

from ..errors import CheckpointFileError
from ..key import HEAD_ADAPT
from . import arrays

BAD_VALUES = (
    ArithmeticError,
    AttributeError,
    LookupError,
    MemoryError,
    RecursionError,
    RuntimeError,
    TypeError,
    ValueError,
    struct.error,
)
"""What a builder or an opcode raises on arguments that make no sense (UnicodeError is a ValueError)."""

DAMAGED = "The file is damaged or was cut short; copy or download it again."

_MAX_KEY_DEPTH = 4
_SCALARS = (str, bytes, int, float, complex, bool, type(None))
_OLD_MODULES = {"__builtin__": "builtins"}


class Source(Protocol):
    """The bytes of a pickle: ``bytes`` or a memory map."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: slice, /) -> bytes: ...

    def find(self, sub: bytes, start: int, /) -> int: ...


@dataclass(frozen=True)
class Builder:
    """A function that a pickle may call under the name that the table of known names gives it."""

    make: Callable[..., Any]


def check_key(key: Any, depth: int = _MAX_KEY_DEPTH) -> Any:
    """Return ``key`` if it is a scalar or a shallow tuple of scalars."""
    if isinstance(key, tuple) and depth:
        for part in key:
            check_key(part, depth - 1)
    elif not isinstance(key, _SCALARS):
        raise TypeError(f"a dict key or set item of type {type(key).__name__}")
    return key


def refuse_global(where: str, name: str) -> NoReturn:
    """Raise the message for a pickle that asks for ``name``, which is more than weights need."""
    raise CheckpointFileError(
        where,
        expected="a file of weights and plain values, which runs nothing",
        found=f"a pickle that asks for {name[:120]!r}",
        fix="Loading that may run any code. For a file that you made yourself, or trust as much as a program, set "
        f"{HEAD_ADAPT.TRUST_FILE.set(True)}.",
    )


class Machine:
    """The state of one pickle that is being read; :attr:`position` is the next byte.

    Args:
        source: the bytes.
        where: the file's name, for messages.
        known: name -> :class:`Builder` or constant; a name that is not here is refused.
        persistent: makes an object of a persistent id (torch's storages).
        encoding: how the byte strings of Python 2 are read.
        start: where the pickle begins.
    """

    def __init__(
        self,
        source: Source,
        *,
        where: str,
        known: Mapping[str, Any],
        persistent: Callable[[Any], Any] | None = None,
        encoding: str = "utf-8",
        start: int = 0,
    ) -> None:
        self.position = start
        self.encoding = encoding
        self._source = source
        self._end = len(source)
        self._where = where
        self._known = known
        self._persistent = persistent
        # One call may copy what an earlier opcode made; a thousand calls on one long string must not.
        self._budget = 16 * self._end + 2**28
        self.reset()

    def reset(self) -> None:
        """Forget everything but the position."""
        self.stack: list[Any] = []
        self._outer: list[list[Any]] = []
        self._memo: dict[int, Any] = {}

    def broken(self, reason: str, cause: BaseException | None = None) -> NoReturn:
        """Raise the message for a pickle that makes no sense at the present position."""
        raise CheckpointFileError(
            self._where,
            expected="a whole pickle of weights and plain values",
            found=f"at byte {self.position:,} of {self._end:,}: {reason}",
            fix=DAMAGED,
        ) from cause

    def take(self, count: int) -> bytes:
        """The next ``count`` bytes."""
        if count < 0 or count > self._end - self.position:
            self.broken(f"a value of {count:,} bytes where {self._end - self.position:,} are left")
        self.position += count
        return self._source[self.position - count : self.position]

    def line(self) -> bytes:
        """The bytes up to the next line feed, which is skipped."""
        end = self._source.find(b"\n", self.position)
        if end < 0:
            self.broken("a line without an end")
        text = self._source[self.position : end]
        self.position = end + 1
        return text

    def since_mark(self) -> list[Any]:
        """Everything pushed since the last mark, which goes too."""
        items = self.stack
        self.stack = self._outer.pop()
        return items

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def mark(self) -> None:
        self._outer.append(self.stack)
        self.stack = []

    def pop(self) -> None:
        if self.stack:
            self.stack.pop()
        else:
            self.since_mark()

    def put(self, index: int) -> None:
        self._memo[index] = self.stack[-1]

    def memoize(self) -> None:
        self.put(len(self._memo))

    def get(self, index: int) -> Any:
        if index not in self._memo:
            self.broken(f"a reference to value {index}, which was never stored")
        return self._memo[index]

    def find(self, module: str, name: str) -> Any:
        """The known object of this name."""
        full = f"{_OLD_MODULES.get(module, module)}.{name}"
        if full not in self._known:
            refuse_global(self._where, full)
        return self._known[full]

    def find_on_stack(self) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        if not isinstance(name, str) or not isinstance(module, str):
            self.broken("a global whose name is no text")
        self.push(self.find(module, name))

    def call(self, builder: Any, args: Any) -> Any:
        """Call ``builder``; nothing that is not a :class:`Builder` is called."""
        if not isinstance(builder, Builder) or not isinstance(args, tuple):
            self.broken(f"a call of {type(builder).__name__}")
        self._spend(args)
        return builder.make(*args)

    def reduce(self) -> None:
        args = self.stack.pop()
        self.push(self.call(self.stack.pop(), args))

    def reduce_marked(self) -> None:
        builder, *args = self.since_mark()
        self.push(self.call(builder, tuple(args)))

    def reduce_named(self) -> None:
        builder = self.find(self.line().decode(), self.line().decode())
        self.push(self.call(builder, tuple(self.since_mark())))

    def build(self) -> None:
        """Set the state of the value on top of the stack."""
        state, target = self.stack.pop(), self.stack[-1]
        if isinstance(target, np.ndarray):
            self._spend(state)
            arrays.set_array_state(target, state)
        elif isinstance(target, np.dtype):
            arrays.set_dtype_state(target, state)
        elif isinstance(target, OrderedDict) and isinstance(state, dict):
            # A state dict carries the versions of its modules, by which load_state_dict upgrades old files.
            if isinstance(state.get("_metadata"), dict):
                vars(target)["_metadata"] = state["_metadata"]
        else:
            self.broken(f"a state for a {type(target).__name__}")

    def append(self, items: list[Any]) -> None:
        if type(self.stack[-1]) is not list:
            self.broken(f"items for a {type(self.stack[-1]).__name__} where a list belongs")
        self.stack[-1].extend(items)

    def set_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, dict) or len(items) % 2:
            self.broken(f"keys for a {type(target).__name__} where a dict belongs")
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[check_key(key)] = value

    def new_dict(self) -> None:
        items = self.since_mark()
        self.push({})
        self.set_items(items)

    def add_items(self) -> None:
        items = self.since_mark()
        if not isinstance(self.stack[-1], set):
            self.broken(f"items for a {type(self.stack[-1]).__name__} where a set belongs")
        self.stack[-1].update(check_key(item) for item in items)

    def persistent(self, key: Any) -> Any:
        if self._persistent is None:
            self.broken("a reference to an object outside the pickle")
        return self._persistent(key)

    def _spend(self, values: Any) -> None:
        for value in values if isinstance(values, tuple) else ():
            if isinstance(value, (str, bytes, bytearray)):
                self._budget -= len(value)
            elif isinstance(value, (list, tuple, dict, set, frozenset)):
                self._budget -= 64 * len(value)
        if self._budget < 0:
            self.broken("copies that would take many times the size of the file")
