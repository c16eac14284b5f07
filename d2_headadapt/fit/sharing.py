"""Share a fit between processes: all collect, rank 0 solves, all write the same."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import TypeVar

import torch
from detectron2.utils import comm

from ..errors import RankError
from .reservoir import Reservoir

T = TypeVar("T")


def gathered(reservoir: Reservoir) -> dict[str, torch.Tensor]:
    """Gather the sample of all processes on rank 0; an empty dict on the others."""
    if comm.get_world_size() == 1:
        return reservoir.result()
    collected: list[Reservoir] = comm.gather(reservoir)
    if comm.get_rank() != 0:
        return {}
    whole = reservoir.like()
    for other in collected:
        whole.absorb(other)
    return whole.result()


def placed(sample: dict[str, torch.Tensor], held_out: Collection[int], device: torch.device) -> dict[str, torch.Tensor]:
    """Put a sample on a device, with ``held`` (n,): whether a row is of a held-out image.

    Args:
        sample: of :func:`gathered`; its ``view`` is twice the number of the image, one more where it is mirrored.
        held_out: numbers of images.
        device: of the layers that are solved.
    """
    held = torch.isin(sample["view"] // 2, torch.tensor(sorted(held_out), dtype=torch.int64))
    return {key: value.to(device) for key, value in {**sample, "held": held}.items()}


def summed(values: torch.Tensor) -> torch.Tensor:
    """Sum over all processes, in rank order, in every process."""
    parts: list[torch.Tensor] = comm.all_gather(values.cpu()) if comm.get_world_size() > 1 else [values.cpu()]
    return torch.stack(parts).sum(0)


def on_rank_zero(work: Callable[[], T], where: str) -> T:
    """Do ``work`` on rank 0 and give its result to everybody.

    Raises:
        RankError: it failed there; without this the other processes would wait for ever.
    """
    if comm.get_world_size() == 1:
        return work()
    result: T | None = None
    problem: str | None = None
    if comm.get_rank() == 0:
        try:
            result = work()
        except (RuntimeError, ValueError) as exc:
            problem = f"{type(exc).__name__}: {exc}"
    result, problem = comm.all_gather((result, problem))[0]
    if problem is not None or result is None:
        raise RankError(where, expected="a solution", found=problem or "none", fix="Nothing was changed on any rank.")
    return result
