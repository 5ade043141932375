"""RepVGG (Ding et al., CVPR 2021): three branches a layer in training, a plain stack of 3x3 convolutions after it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from effkern.models._registry import register_model
from effkern.nn.rep_conv import RepConv2d
from effkern.nn.repvgg_block import RepVGGBlock

_DEPTHS_A = (2, 4, 14, 1)
_DEPTHS_B = (4, 6, 16, 1)


class RepVGG(nn.Module):
    """Stem, stages of 3x3 blocks, global average pool, one linear layer.

    Args:
        depths: blocks of each stage.
        widths: output channels of each stage.
        stem: output channels of the stem, which has stride 2.
        num_classes: outputs.
        in_channels: channels of the image.
        groups: groups of every second block (blocks 2, 4, 6, .. counted from the stem as 0), else 1.
        strides: of the first block of each stage.
        deploy: build the folded form, one :class:`effkern.nn.RepConv2d` per block under the same names as
            :func:`effkern.reparam.fold_model` gives: for loading what was saved after folding.

    Attributes:
        stem: the first block.
        stages: a ``Sequential`` of blocks per stage.
        head: the linear layer.
        memory_format: if set, the stem's output is brought into it. An image of one channel fits both layouts and so
            cannot ask for channels_last, the fast one.
    """

    memory_format: torch.memory_format | None = None

    def __init__(
        self,
        depths: Sequence[int],
        widths: Sequence[int],
        stem: int,
        num_classes: int = 1000,
        in_channels: int = 3,
        groups: int = 1,
        strides: Sequence[int] | None = None,
        deploy: bool = False,
    ) -> None:
        super().__init__()
        strides = [2] * len(depths) if strides is None else list(strides)
        if not len(depths) == len(widths) == len(strides):
            raise ValueError(
                f"depths, widths and strides: must be of equal length, got {len(depths)}, {len(widths)}, {len(strides)}"
            )
        channels = stem
        self.stem = _block(in_channels, stem, 2, 1, deploy)
        index = 0
        stages = []
        for depth, width, stride in zip(depths, widths, strides, strict=True):
            blocks = []
            for i in range(depth):
                index += 1
                grouped = groups if index % 2 == 0 else 1
                blocks.append(_block(channels, width, stride if i == 0 else 1, grouped, deploy))
                channels = width
            stages.append(nn.Sequential(*blocks))
        self.stages = nn.Sequential(*stages)
        self.head = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """``[n, in_channels, h, w]`` to ``[n, num_classes]``."""
        features = self.stem(x)
        if self.memory_format is not None:
            features = features.contiguous(memory_format=self.memory_format)
        return self.head(torch.mean(self.stages(features), (2, 3)))


def _block(in_channels: int, out_channels: int, stride: int, groups: int, deploy: bool) -> nn.Module:
    if deploy:
        return RepConv2d(in_channels, out_channels, 3, stride, padding=1, groups=groups, act="relu")
    return RepVGGBlock(in_channels, out_channels, stride, groups=groups)


def _repvgg(
    depths: Sequence[int], a: float, b: float, groups: int, num_classes: int, in_channels: int, deploy: bool
) -> RepVGG:
    """The published family: widths 64a, 128a, 256a, 512b behind a stem of at most 64."""
    widths = [int(64 * a), int(128 * a), int(256 * a), int(512 * b)]
    return RepVGG(depths, widths, min(64, int(64 * a)), num_classes, in_channels, groups, deploy=deploy)


@register_model
def repvgg_a0(num_classes: int = 1000, in_channels: int = 3, deploy: bool = False) -> RepVGG:
    """RepVGG-A0: 8.31 M parameters deployed, 1.36 G multiply-adds at 224x224."""
    return _repvgg(_DEPTHS_A, 0.75, 2.5, 1, num_classes, in_channels, deploy)


@register_model
def repvgg_a1(num_classes: int = 1000, in_channels: int = 3, deploy: bool = False) -> RepVGG:
    """RepVGG-A1: 12.79 M parameters deployed, 2.36 G multiply-adds at 224x224."""
    return _repvgg(_DEPTHS_A, 1, 2.5, 1, num_classes, in_channels, deploy)


@register_model
def repvgg_a2(num_classes: int = 1000, in_channels: int = 3, deploy: bool = False) -> RepVGG:
    """RepVGG-A2: 25.50 M parameters deployed, 5.12 G multiply-adds at 224x224."""
    return _repvgg(_DEPTHS_A, 1.5, 2.75, 1, num_classes, in_channels, deploy)


@register_model
def repvgg_b0(num_classes: int = 1000, in_channels: int = 3, deploy: bool = False) -> RepVGG:
    """RepVGG-B0: 14.34 M parameters deployed, 3.06 G multiply-adds at 224x224."""
    return _repvgg(_DEPTHS_B, 1, 2.5, 1, num_classes, in_channels, deploy)


@register_model
def repvgg_b1(num_classes: int = 1000, in_channels: int = 3, groups: int = 1, deploy: bool = False) -> RepVGG:
    """RepVGG-B1: 51.83 M parameters deployed, 11.82 G multiply-adds at 224x224; ``groups`` 2 and 4 are B1g2, B1g4."""
    return _repvgg(_DEPTHS_B, 2, 4, groups, num_classes, in_channels, deploy)


@register_model
def repvgg_small(num_classes: int = 10, in_channels: int = 1, width: int = 24, deploy: bool = False) -> RepVGG:
    """A RepVGG for 28x28 or 32x32 images: stem of stride 2, then ``width``, ``2 width``, ``4 width`` channels."""
    return RepVGG(
        (2, 3, 2), (width, 2 * width, 4 * width), width, num_classes, in_channels, strides=(1, 2, 2), deploy=deploy
    )
