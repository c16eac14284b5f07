"""Tensors out of the names, sizes and strides that a torch pickle holds, each part checked before it is used."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from .pickle_machine import Builder


@dataclass(frozen=True)
class StorageType:
    """What a pickle names ``torch.FloatStorage`` and so on."""

    dtype: torch.dtype


@dataclass(frozen=True)
class StorageView:
    """``count`` values of a storage, from value ``first`` on."""

    storage: torch.UntypedStorage
    dtype: torch.dtype
    first: int
    count: int


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
}


def torch_globals(limit: int) -> dict[str, Any]:
    """What torch's own weights need, for a file in which no tensor may be larger than ``limit`` bytes."""

    def rebuild(
        view: Any,
        offset: Any,
        size: Any,
        stride: Any,
        requires_grad: Any = False,
        hooks: Any = None,
        metadata: Any = None,
    ) -> torch.Tensor:
        if not isinstance(view, StorageView):
            raise TypeError("a tensor without a storage")
        return _tensor(view, view.dtype, offset, size, stride, metadata, limit)

    def rebuild_as(
        view: Any, offset: Any, size: Any, stride: Any, requires_grad: Any, hooks: Any, dtype: Any, metadata: Any = None
    ) -> torch.Tensor:
        if not isinstance(view, StorageView) or not isinstance(dtype, torch.dtype):
            raise TypeError("a tensor without a storage or dtype")
        return _tensor(view, dtype, offset, size, stride, metadata, limit)

    def parameter(data: Any, requires_grad: Any = True, hooks: Any = None, state: Any = None) -> torch.Tensor:
        if not isinstance(data, torch.Tensor):
            raise TypeError("a parameter that is no tensor")
        return data

    def subclass(function: Any, kind: Any, args: Any, state: Any) -> torch.Tensor:
        made = function.make(*args) if isinstance(function, Builder) else function(*args)
        if kind not in (torch.Tensor, torch.nn.Parameter) or not isinstance(made, torch.Tensor):
            raise TypeError("a tensor of a class of its own")
        return made

    known: dict[str, Any] = {f"torch.{name}": StorageType(dtype) for name, dtype in _STORAGES.items()}
    known["torch.storage.UntypedStorage"] = known["torch.UntypedStorage"] = StorageType(torch.uint8)
    known.update({str(value): value for value in vars(torch).values() if isinstance(value, torch.dtype)})
    known.update({f"torch.storage.{name}": StorageType(dtype) for name, dtype in _STORAGES.items()})
    known["torch.Size"] = Builder(_size)
    known["torch.device"] = Builder(_device)
    known["torch.Tensor"] = known["torch._tensor.Tensor"] = torch.Tensor
    known["torch.nn.parameter.Parameter"] = torch.nn.Parameter
    known["torch._utils._rebuild_tensor"] = known["torch._utils._rebuild_tensor_v2"] = Builder(rebuild)
    known["torch._utils._rebuild_tensor_v3"] = Builder(rebuild_as)
    known["torch._utils._rebuild_parameter"] = Builder(parameter)
    known["torch._utils._rebuild_parameter_with_state"] = Builder(parameter)
    known["torch._tensor._rebuild_from_type_v2"] = Builder(subclass)
    return known


def _size(sizes: Any = ()) -> torch.Size:
    if not isinstance(sizes, (tuple, list)) or not all(map(_is_size, sizes)):
        raise ValueError("a torch.Size of no sizes")
    return torch.Size(sizes)


def _device(kind: Any, index: Any = None) -> torch.device:
    if not isinstance(kind, str) or not (index is None or _is_size(index)):
        raise ValueError("a torch.device without a name")
    return torch.device(kind) if index is None else torch.device(kind, index)


def _tensor(
    view: StorageView, dtype: torch.dtype, offset: Any, size: Any, stride: Any, metadata: Any, limit: int
) -> torch.Tensor:
    """A view of a storage, after a check that every element lies inside it."""
    if metadata is not None and not (isinstance(metadata, dict) and not metadata):
        raise ValueError("a lazily conjugated or negated tensor")
    if not isinstance(size, tuple) or not isinstance(stride, tuple) or len(size) != len(stride) or len(size) > 32:
        raise ValueError("a tensor whose shape and strides do not agree")
    if not all(map(_is_size, (offset, *size, *stride))):
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
    empty = torch.empty(0, dtype=dtype, device="cpu")
    return empty.set_(view.storage, first, size, stride)


def persistent_loader(storage: Callable[[str, torch.dtype, int], StorageView]) -> Callable[[Any], Any]:
    def load(key: Any) -> StorageView:
        if not isinstance(key, tuple) or len(key) not in (5, 6):
            raise ValueError("a reference that is no storage")
        word, kind, name, _, count, *view = key
        if not isinstance(word, (str, bytes)) or word not in ("storage", b"storage"):
            raise ValueError("a reference that is no storage")
        if isinstance(kind, StorageType) and isinstance(name, str) and _is_size(count):
            whole = storage(name, kind.dtype, count)
            if whole.dtype != kind.dtype or whole.count != count:
                raise ValueError("one storage under two types")
            if not view or view[0] is None:
                return whole
            if isinstance(view[0], tuple) and len(view[0]) == 3:
                _, first, size = view[0]
                if _is_size(first) and _is_size(size) and first + size <= whole.count:
                    return StorageView(whole.storage, whole.dtype, first, size)
        raise ValueError("a storage whose type, name or size makes no sense")

    return load


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**48
