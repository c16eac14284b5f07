"""Compute output shapes by running a module on nothing: on the meta device, or on zeros where it must be."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from detectron2.structures import ImageList
from torch import nn
from torch.func import functional_call


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Switch to evaluation mode, module by module, and back."""
    before = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in before:
            module.training = training


@torch.no_grad()
def dry_run(module: nn.Module, shape: Sequence[int]) -> Any:
    """Compute the module's output for an input of ``shape``; shapes are right, values mean nothing.

    Nothing of the module changes, and no global random stream moves.

    Args:
        module: in any mode and on any device.
        shape: of its one input.

    Raises:
        NotImplementedError: the module is on the meta device and does something that is unknown there.
        RuntimeError: the module fails on such an input.
    """
    own = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    with evaluating(module), torch.random.fork_rng(devices=[]):
        try:
            shadows = {name: torch.empty_like(value, device="meta") for name, value in own.items()}
            return functional_call(module, shadows, (torch.empty(*shape, device="meta"),))
        except RuntimeError:
            # An operation that meta lacks, or a tensor that is no parameter; what is wrong by itself fails here too.
            device = next((value.device for value in own.values()), torch.device("cpu"))
            if device.type == "meta":
                raise
            return module(torch.zeros(*shape, device=device))


def padded_size(backbone: Any, size: Sequence[int]) -> tuple[int, int]:
    """Compute (height, width) of images of one size after detectron2's padding for a backbone."""
    # It computes with tensors of its own, which a model that is built on the meta device must not catch.
    with torch.device("cpu"):
        padded = ImageList.from_tensors(
            [torch.empty(1, *size)], backbone.size_divisibility, padding_constraints=backbone.padding_constraints
        )
    return int(padded.tensor.shape[-2]), int(padded.tensor.shape[-1])
