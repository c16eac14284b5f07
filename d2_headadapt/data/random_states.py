"""The global random streams, given back as they were to whoever trains afterwards."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def random_states_kept() -> Iterator[None]:
    """Give Python's, numpy's and torch's global random streams back as they were.

    detectron2's resize draws from numpy's even where there is nothing to choose, and constructors draw from torch's.
    """
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    # Asking for the states of GPUs would start CUDA in a process that does not use it.
    gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        if gpus:
            torch.cuda.set_rng_state_all(gpus)
