"""Lookahead after a fit, and the momentum of rows that are solved again: they keep fine-tuning from undoing the fit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from detectron2.config import CfgNode
from torch import nn

from ..errors import ConfigError
from ..key import HEAD_ADAPT

EVERY, SHARE = 5, 0.5
"""Steps forward and the share of them that is kept: the defaults of Lookahead's paper."""


@dataclass(frozen=True)
class LookaheadSettings:
    """The settings of lookahead, and of solving rows again, in the first iterations after a fit.

    Args:
        calm_iters: so long the steps are averaged; 0 for not at all.
        refits: iterations after which the rows of new classes are solved again, on the features that have moved.
    """

    calm_iters: int = 600
    refits: tuple[int, ...] = (50, 100, 200)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> LookaheadSettings:
        """Read the keys under ``MODEL.HEAD_ADAPT.FIT``; they are named as the fields, in capitals."""
        node = cfg.MODEL.HEAD_ADAPT.FIT
        values = {f.name: node[f.name.upper()] for f in fields(cls)}
        return cls(**{**values, "refits": tuple(values["refits"])})

    def __post_init__(self) -> None:
        """Refuse what cannot work.

        Raises:
            ConfigError: names the key.
        """
        whole = all(isinstance(mark, int) and mark > 0 for mark in self.refits)
        checks: tuple[tuple[str, bool, str, object], ...] = (
            ("CALM_ITERS", self.calm_iters >= 0, "a number of iterations", self.calm_iters),
            ("REFITS", whole, "iterations, each at least 1", self.refits),
        )
        for key, good, expected, found in checks:
            if not good:
                raise ConfigError(HEAD_ADAPT.FIT[key], expected=expected, found=repr(found), fix="Correct the key.")


class Lookahead:
    """Lookahead (k=5, alpha=0.5): every fifth step goes back half of the way, as the averaged point is better.

    Zhang et al. 2019, "Lookahead Optimizer: k steps forward, 1 step back". Fitted rows are several times as large as
    rows that training has just begun with, and so is the noise that they send into the features: on bccd/val, 100
    iterations after a fit, the weights gave AP 37.9 and the mean of the last fifty iterations' weights 43.2.
    Every process does the same arithmetic on the same weights, so ranks stay equal.

    Args:
        model: whose trainable parameters are averaged.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._slow: dict[str, torch.Tensor] = {}
        self.restart()

    def restart(self) -> None:
        """Begin anew from the weights as they are."""
        self._slow = {name: p.detach().clone() for name, p in self._model.named_parameters() if p.requires_grad}

    @torch.no_grad()
    def step(self) -> None:
        """Go back half of the way; called after every ``EVERY``-th step of the optimizer."""
        for name, parameter in self._model.named_parameters():
            slow = self._slow.get(name)
            if slow is not None:
                slow.lerp_(parameter, SHARE)
                parameter.copy_(slow)


def forget_momentum(optimizer: torch.optim.Optimizer, model: nn.Module, before: Mapping[str, torch.Tensor]) -> None:
    """Zero the momentum of every row that was written: it leads away from where the row now is.

    Second moments (Adam's) stay: they hold the scale of a row's gradients, which has not changed.

    Args:
        optimizer: that trains the model.
        model: after the rows were written.
        before: the parameters as they were, by name.
    """
    for name, parameter in model.named_parameters():
        state: dict[str, Any] = optimizer.state.get(parameter, {})
        if name not in before or not state:
            continue
        rows = (
            (parameter.detach() != before[name]).flatten(1).any(1) if parameter.dim() > 1 else parameter != before[name]
        )
        for key in ("momentum_buffer", "exp_avg"):
            if isinstance(state.get(key), torch.Tensor):
                state[key][rows] = 0
