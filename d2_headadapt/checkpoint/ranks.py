"""Make all processes of a job agree: on whether a file loads, on new rows, and on every tensor afterwards."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import IO

import torch
import torch.distributed as dist
from detectron2.utils import comm

from ..adapt.plan import AdaptPlan, new_rows_mask
from ..errors import HeadAdaptError, RankError

PIECE = 64 * 2**20
"""Bytes of a file that are sent at a time."""


def agree(error: HeadAdaptError | None, where: str) -> None:
    """Raise in every process where one of them found an error, before anything was changed.

    Args:
        error: what this process found.
        where: the file, for messages.

    Raises:
        HeadAdaptError: this process's own error, else a :class:`RankError` that repeats the first other one.
    """
    if comm.get_world_size() == 1:
        if error is not None:
            raise error
        return
    texts: list[str | None] = comm.all_gather(None if error is None else str(error))
    if error is not None:
        raise error
    for rank, text in enumerate(texts):
        if text is not None:
            raise RankError(
                where,
                expected="a file that every process can load",
                found=f"an error on rank {rank}: {text}",
                fix="Nothing was loaded on any rank.",
            )


def everywhere(value: bool) -> list[bool]:
    """Gather ``value`` of every rank, in order."""
    return list(comm.all_gather(value)) if comm.get_world_size() > 1 else [value]


@contextmanager
def readable_everywhere(path: str, is_file: bool) -> Iterator[str]:
    """Give a path that this process can read, where at least rank 0 has the file.

    A rank without the file gets rank 0's bytes in a temporary file, which is removed on leaving.

    Args:
        path: the local path that the user gave.
        is_file: whether this rank sees a file there.

    Raises:
        RankError: rank 0 does not see the file.
    """
    have = everywhere(is_file)
    if all(have):
        yield path
        return
    if not have[0]:
        raise RankError(
            path,
            expected="a file on rank 0",
            found=f"one on rank {have.index(True)} only" if any(have) else "none on any rank",
            fix="Put it where rank 0 can read it.",
        )
    with tempfile.TemporaryDirectory(prefix="d2_headadapt_") as folder:
        copy = os.path.join(folder, os.path.basename(path))
        with open(path if is_file else copy, "rb" if is_file else "wb") as file:
            _send(file, comm.get_rank() == 0, receives=not is_file)
        yield path if is_file else copy


def _send(file: IO[bytes], sends: bool, *, receives: bool) -> None:
    """Broadcast a file's bytes from rank 0, piece by piece, so that memory stays bounded."""
    while True:
        box = [file.read(PIECE) if sends else None]
        dist.broadcast_object_list(box, src=0)
        if not box[0]:
            return
        if receives:
            file.write(box[0])


def share_new_rows(plan: AdaptPlan, state: Mapping[str, torch.Tensor]) -> None:
    """Give every process rank 0's values wherever the file gave none: new rows, and tensors that it does not have.

    Args:
        plan: the same on every rank.
        state: ``model.state_dict()``, whose tensors are the model's own.
    """
    if comm.get_world_size() == 1:
        return
    for t in plan.tensors:
        if t.name not in state or t.action not in ("carried", "initialised", "kept") or not state[t.name].numel():
            continue
        value = state[t.name].detach()
        first = value.clone(memory_format=torch.contiguous_format)
        dist.broadcast(first, src=0)
        layout = plan.layout(t.name)
        if t.action == "carried" and layout is not None:
            mask = new_rows_mask(layout, plan.maps[layout.space], tuple(value.shape)).to(value.device)
            value.copy_(torch.where(mask, first, value))
        else:
            value.copy_(first)


def compare(state: Mapping[str, torch.Tensor], where: str) -> None:
    """Raise where a tensor is not the same in all processes.

    Raises:
        RankError: names the first tensor and the first rank that differs from rank 0.
    """
    if comm.get_world_size() == 1:
        return
    digests: list[dict[str, str]] = comm.all_gather(
        {name: digest(value) for name, value in state.items() if torch.is_tensor(value)}
    )
    for rank, other in enumerate(digests):
        for name, value in digests[0].items():
            if other.get(name) != value:
                raise RankError(
                    f"{name} on rank {rank}",
                    expected="the tensor of rank 0",
                    found=f"other values after loading {where}",
                    fix="The ranks read different files: give all of them the same one.",
                )


def digest(value: torch.Tensor) -> str:
    """Hash a tensor's bytes, dtype and shape."""
    data = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    header = f"{value.dtype}{tuple(value.shape)}".encode()
    return hashlib.blake2b(data.tobytes(), digest_size=16, key=header[:64]).hexdigest()
