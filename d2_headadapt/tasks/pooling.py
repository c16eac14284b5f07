"""From a backbone's map to features of a whole image: a registry, so that a step of the user's own has a name too."""

from __future__ import annotations

import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from fvcore.common.registry import Registry
from torch import nn

from ..classes import did_you_mean
from ..errors import ConfigError

POOLING_REGISTRY = Registry("POOLING")
POOLING_REGISTRY.__doc__ = """
Steps from a map (N, C, H, W) to features (N, F), called as ``step(cfg, shape)`` with the map's channels and stride,
returning a module. The config key ``MODEL.CLASSIFIER.POOLING`` names the one to use.
"""


class MeanPooling(nn.Module):
    """(N, C, H, W) -> (N, C), the mean over all cells."""

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        return maps.mean(dim=(2, 3))


@POOLING_REGISTRY.register()
def avg(cfg: CfgNode, shape: ShapeSpec) -> nn.Module:
    """Features that do not depend on an image's size."""
    return MeanPooling()


@POOLING_REGISTRY.register()
def flatten(cfg: CfgNode, shape: ShapeSpec) -> nn.Module:
    """All cells side by side: images of ``MODEL.CLASSIFIER.INPUT_SIZE`` only."""
    return nn.Flatten(1)


def build_pooling(cfg: CfgNode, shape: ShapeSpec) -> nn.Module:
    """The step that ``MODEL.CLASSIFIER.POOLING`` names.

    Args:
        cfg: with that key.
        shape: channels and stride of the map.

    Raises:
        ConfigError: no step of that name.
    """
    name = cfg.MODEL.CLASSIFIER.POOLING
    if name not in POOLING_REGISTRY:
        known = [entry for entry, _ in POOLING_REGISTRY]
        raise ConfigError(
            "MODEL.CLASSIFIER.POOLING",
            expected=f"one of {', '.join(known)}",
            found=repr(name),
            fix=f"Correct the key, or register your own step.{did_you_mean(name, known)}",
        )
    step: nn.Module = POOLING_REGISTRY.get(name)(cfg, shape)
    return step
