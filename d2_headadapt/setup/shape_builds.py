"""Build a model for its shapes: no initialiser runs, and nothing outside the model changes.

Skipping initialisers makes a build about twenty times as fast (0.02 s for a Mask R-CNN R50 instead of 0.4 s) and works
where the meta device does not, because a constructor may still read values. They are what the memory held before, so
such a model is good for names, shapes and classes of modules, and for nothing else.
"""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout
from contextvars import ContextVar
from typing import Any

import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils import logger as detectron2_logger
from torch import nn
from torch.overrides import TorchFunctionMode

from ..adapt.class_axes import TensorFacts, observe
from ..data.random_states import random_states_kept

_RANDOM = ("normal_", "uniform_", "random_", "bernoulli_", "exponential_", "cauchy_", "log_normal_", "geometric_")
_SKIPPED = frozenset(
    # What torch.nn.init.trunc_normal_ makes of uniform numbers is as slow as drawing them.
    [getattr(torch.Tensor, name) for name in (*_RANDOM, "erfinv_")]
    + [value for name, value in vars(torch.nn.init).items() if name.endswith("_") and callable(value)]
)


_LARGE = 1 << 16
"""Elements from which on a copy keeps its shape only; ``copy.deepcopy`` of decoder layers copies gigabytes."""


class SkipInitialisers(TorchFunctionMode):
    """A mode in which, in this thread, ``torch.nn.init`` and random in-place methods change nothing."""

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _SKIPPED:
            return args[0] if args else kwargs["tensor"]
        if func is torch.Tensor.clone and args[0].numel() > _LARGE:
            return torch.empty_like(args[0])
        return func(*args, **kwargs)


@contextmanager
def nothing_changed() -> Iterator[None]:
    """Give back every random state, detectron2's catalogs and torch's defaults as they were; log nothing meanwhile.

    A constructor may draw numbers (all of them do), print, log a line that is said once in a process, or make an entry
    of ``MetadataCatalog`` by asking for it; none of that is to be noticed by whoever trains afterwards.
    """
    dtype, grad, level = torch.get_default_dtype(), torch.is_grad_enabled(), logging.root.manager.disable
    datasets, metadata = set(DatasetCatalog.list()), set(MetadataCatalog.list())
    said = getattr(detectron2_logger, "_LOG_COUNTER", {})
    said_before = dict(said)
    logging.disable(logging.CRITICAL)
    try:
        with random_states_kept(), warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
        said.clear()
        said.update(said_before)
        for name in set(DatasetCatalog.list()) - datasets:
            DatasetCatalog.remove(name)
        for name in set(MetadataCatalog.list()) - metadata:
            MetadataCatalog.remove(name)
        torch.set_grad_enabled(grad)
        torch.set_default_dtype(dtype)


def observe_build(build: Callable[[], nn.Module], *, initialise: bool = False) -> dict[str, TensorFacts]:
    """Build a model for its shapes and let it go.

    Args:
        build: makes the model, on the CPU.
        initialise: let initialisers run; for a constructor that cannot do without.

    Raises:
        Exception: whatever the constructor raises.
    """
    token = _OBSERVING.set(True)
    try:
        with nothing_changed(), nullcontext() if initialise else SkipInitialisers():
            return observe(build())
    finally:
        _OBSERVING.reset(token)


_OBSERVING: ContextVar[bool] = ContextVar("observing", default=False)


def observing() -> bool:
    """Tell whether a model is being built for its shapes at this moment, in this thread."""
    return _OBSERVING.get()
