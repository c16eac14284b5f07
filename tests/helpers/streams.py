"""The global random streams, to see whether something drew from them."""

from __future__ import annotations

import random

import numpy as np
import torch


def random_streams() -> list[object]:
    """Python's, numpy's and torch's state, equal only where nothing was drawn.

    Numpy's numbers alone stay the same for 624 draws: what moves with each is the position in them.
    """
    _, numbers, position, *normal = np.random.get_state()
    return [random.getstate(), (numbers.tolist(), position, *normal), torch.get_rng_state().tolist()]
