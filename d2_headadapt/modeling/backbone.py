"""A plain stack of convolutions as a detectron2 backbone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from fvcore.nn.weight_init import c2_msra_fill
from torch import nn


class ConvNet(Backbone):
    """A backbone of 3x3 convolutions, each followed by ReLU and 2x2 max pooling.

    Its one feature is named after the last convolution: ``conv3`` of stride 8 for three of them.

    Args:
        in_channels: of the images.
        channels: of each convolution.
    """

    def __init__(self, in_channels: int, channels: Sequence[int]) -> None:
        super().__init__()
        widths = [in_channels, *channels]
        self.convolutions = nn.ModuleList(
            nn.Conv2d(before, after, 3, padding=1) for before, after in zip(widths, channels, strict=False)
        )
        for layer in self.convolutions:
            c2_msra_fill(layer)
        name = f"conv{len(channels)}"
        self._out_features = [name]
        self._out_feature_channels = {name: channels[-1]}
        self._out_feature_strides = {name: 2 ** len(channels)}

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """Compute the last map by name, (N, C, H, W) -> (N, channels, H / stride, W / stride) rounded down."""
        for layer in self.convolutions:
            x = nn.functional.max_pool2d(layer(x).relu(), 2)
        return {self._out_features[0]: x}


@BACKBONE_REGISTRY.register()
def build_conv_net_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> ConvNet:
    """Build the network whose channels ``MODEL.CONV_NET.CHANNELS`` lists.

    Example:
        >>> from detectron2.config import get_cfg
        >>> from detectron2.modeling import build_backbone
        >>> from d2_headadapt import add_headadapt_config
        >>> cfg = get_cfg()
        >>> add_headadapt_config(cfg)
        >>> cfg.MODEL.BACKBONE.NAME, cfg.MODEL.CONV_NET.CHANNELS = "build_conv_net_backbone", [16, 32]
        >>> build_backbone(cfg).output_shape()
        {'conv2': ShapeSpec(channels=32, height=None, width=None, stride=4)}
    """
    return ConvNet(input_shape.channels, list(cfg.MODEL.CONV_NET.CHANNELS))
