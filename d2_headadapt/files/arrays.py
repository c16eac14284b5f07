"""numpy arrays out of pickles, built from their parts after every part was checked.

numpy's own unpickling functions trust their arguments, and an object array unpickles whatever it holds. Here a dtype is
numbers or text, and the bytes of an array are exactly as many as its shape needs.
"""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np

MAX_DIMENSIONS = 32
"""What every numpy since 1.0 can hold."""

_CODE = re.compile(r"[?biufcSU]\d{0,9}")
_ORDERS = ("<", ">", "=", "|")


def make_dtype(code: Any, align: Any = False, copy: Any = False) -> np.dtype[Any]:
    """``numpy.dtype(code)`` for numbers, booleans and text; object, record and date types are refused."""
    text = _text(code)
    if not _CODE.fullmatch(text):
        raise ValueError(f"the numpy dtype {text[:40]!r}")
    # Always a copy: the state that follows in the pickle is set in place, and numpy's own dtypes are shared.
    made: np.dtype[Any] = np.dtype(text, False, True)
    return made


def set_dtype_state(dtype: np.dtype[Any], state: Any) -> None:
    """Apply the byte order, the only part of a pickled dtype's state that plain numbers have."""
    if not isinstance(state, tuple) or len(state) < 5 or any(part is not None for part in state[2:5]):
        raise ValueError("a numpy dtype with fields or metadata")
    order = _text(state[1])
    if order not in _ORDERS:
        raise ValueError(f"the byte order {order[:10]!r}")
    if dtype.kind in "SU":
        set_state(dtype, (3, order, None, None, None, dtype.itemsize, dtype.alignment, 0))
    else:
        set_state(dtype, (3, order, None, None, None, -1, -1, 0))


def make_empty(kind: Any, shape: Any, code: Any) -> np.ndarray[Any, Any]:
    """``numpy.core.multiarray._reconstruct``: an empty array whose state follows in the pickle."""
    return np.empty((0,), np.uint8)


def set_array_state(array: np.ndarray[Any, Any], state: Any) -> None:
    """Give ``array`` the shape, dtype and bytes of ``(version, shape, dtype, is_fortran, bytes)``."""
    if not isinstance(state, tuple) or len(state) not in (4, 5):
        raise ValueError("a numpy array whose state is not (shape, dtype, order, bytes)")
    shape, dtype, fortran, raw = state[-4:]
    if not isinstance(fortran, int):
        raise TypeError("a numpy array whose order is no truth value")
    data = _bytes(raw)
    _check_fit(shape, dtype, data)
    set_state(array, (1, shape, dtype, bool(fortran), data))


def make_from_buffer(buffer: Any, dtype: Any, shape: Any, order: Any) -> np.ndarray[Any, Any]:
    """``numpy.core.numeric._frombuffer``: what pickle protocol 5 writes."""
    data = _bytes(buffer)
    _check_fit(shape, dtype, data)
    if not isinstance(order, str) or order not in ("C", "F"):
        raise ValueError("a numpy array that is neither C nor Fortran ordered")
    array: np.ndarray[Any, Any] = np.frombuffer(data, dtype)
    return array.reshape(shape, order="F" if order == "F" else "C").copy(order="K")


def make_scalar(dtype: Any, raw: Any = b"") -> Any:
    """``numpy.core.multiarray.scalar``: one number of a dtype."""
    data = _bytes(raw)
    _check_fit((), dtype, data)
    return np.frombuffer(data, dtype)[0]


def set_state(target: Any, state: tuple[Any, ...]) -> None:
    """Call ``__setstate__``, which numpy's type stubs do not declare for dtypes."""
    target.__setstate__(state)


def _check_fit(shape: Any, dtype: Any, data: bytes) -> None:
    if not isinstance(dtype, np.dtype):
        raise TypeError("a numpy array without a dtype")
    if not isinstance(shape, tuple) or len(shape) > MAX_DIMENSIONS:
        raise ValueError("a numpy array whose shape is no tuple of sizes")
    if any(type(size) is not int or not 0 <= size < 2**48 for size in shape):
        raise ValueError("a numpy array whose shape is no tuple of sizes")
    if dtype.itemsize == 0 or math.prod(shape) * dtype.itemsize != len(data):
        raise ValueError(f"a numpy array of shape {shape} and {dtype} with {len(data)} bytes")


def _text(value: Any) -> str:
    if isinstance(value, bytes):
        return value.decode("latin1")
    if not isinstance(value, str):
        raise TypeError(f"{type(value).__name__} where text belongs")
    return value


def _bytes(value: Any) -> bytes:
    # Python 2 pickled bytes as text, which the latin1 reading turns into one character for each byte.
    if isinstance(value, str):
        return value.encode("latin1")
    if not isinstance(value, (bytes, bytearray)):
        raise TypeError(f"{type(value).__name__} where the bytes of an array belong")
    return bytes(value)
