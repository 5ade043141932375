"""The supernet of DS-Net: MobileNetV1-like, with attention, whose last two stages have fourteen widths."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from effkern.models._by_width import by_width
from effkern.models._registry import register_model
from effkern.nn.sliced import SlicedLinear
from effkern.nn.sliced_block import SlicedConvBNAct

# Narrow and wide form of the stages in front, their blocks and strides; then those of many widths (arXiv 2103.13258).
_STEM = (16, 24)
_FIXED = (((32, 88), 1, 1), ((48, 168), 2, 2), ((96, 264), 2, 2))
_MANY = ((range(224, 641, 32), 6, 2), (range(736, 1153, 32), 2, 2))
_REDUCTION = 4


class ChannelAttention(nn.Module):
    """Squeeze and excitation over the running channels: ``x * sigmoid(W2 relu(W1 mean(x)))``.

    Args:
        widths: Channels of every configuration.

    Shape:
        ``[N, C, H, W]`` to the same.
    """

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__()
        hidden = widths[-1] // _REDUCTION
        self.reduce = SlicedLinear(widths, hidden)
        self.expand = SlicedLinear(hidden, widths)

    def forward(self, x: Tensor, width: int | Tensor) -> Tensor:
        gate = self.expand(self.reduce(x.mean((2, 3)), width, act="relu"), width).sigmoid()
        return x * gate[:, :, None, None]


class SeparableBlock(nn.Module):
    """Depthwise 3x3, attention, pointwise; each convolution with batch norm and swish.

    Args:
        c_in: Input channels of every configuration.
        c_out: Output channels of every configuration.
        stride: Of the depthwise convolution.
    """

    def __init__(self, c_in: Sequence[int], c_out: Sequence[int], stride: int) -> None:
        super().__init__()
        self.depthwise = SlicedConvBNAct(c_in, c_in, 3, stride, groups=c_in[-1], act="silu")
        self.attention = ChannelAttention(c_in)
        self.pointwise = SlicedConvBNAct(c_in, c_out, 1, act="silu")

    def forward(self, x: Tensor, width: int | Tensor) -> Tensor:
        return self.pointwise(self.attention(self.depthwise(x, width), width), width)


class DSMobileNet(nn.Module):
    """The DS-Net supernet with static widths: index ``i`` of 0 to 13 is ``uniform(i)``, the last one is ``largest``.

    All but ``largest`` run the narrow form of the stem and the first three stages, so ``uniform(13)`` is not the
    largest network although its last stages are as wide.

    Args:
        num_classes: Of the classifier.
        in_channels: Of the images.
        dropout: Before the classifier, in training at the largest width only.

    Shape:
        ``[N, in_channels, H, W]`` to ``[N, num_classes]``, with a width index or an index tensor ``[N]`` (eval mode).
    """

    def __init__(self, num_classes: int = 1000, in_channels: int = 3, dropout: float = 0.2) -> None:
        super().__init__()
        choices = len(_MANY[0][0])

        def fixed(pair: tuple[int, int]) -> list[int]:
            return [pair[0]] * choices + [pair[1]]

        previous = fixed(_STEM)
        self.stem = SlicedConvBNAct(in_channels, previous, 3, 2, act="silu")
        stages = [(fixed(pair), blocks, stride) for pair, blocks, stride in _FIXED]
        stages += [([*many, many[-1]], blocks, stride) for many, blocks, stride in _MANY]
        blocks = []
        for channels, count, stride in stages:
            for block in range(count):
                blocks.append(SeparableBlock(previous, channels, stride if block == 0 else 1))
                previous = channels
        self.blocks = nn.ModuleList(blocks)
        self.num_widths = choices + 1
        self.dropout = nn.Dropout(dropout)
        self.classifier = SlicedLinear(previous, num_classes)

    def forward(self, x: Tensor, width: int | Tensor = -1) -> Tensor:
        """Scores at ``width``: 0 to 13, 14 or -1 for the largest, or one a sample."""
        return by_width(self, self._scores, x, width)

    def _scores(self, x: Tensor, width: int | Tensor) -> Tensor:
        x = self.stem(x.contiguous(memory_format=torch.channels_last), width)
        for block in self.blocks:
            x = block(x, width)
        x = x.mean((2, 3))
        if not isinstance(width, Tensor) and width in (-1, self.num_widths - 1):
            x = self.dropout(x)
        return self.classifier(x, width)


@register_model
def ds_mobilenet(num_classes: int = 1000, in_channels: int = 3, dropout: float = 0.2) -> DSMobileNet:
    """DS-Net's supernet of fifteen configurations; see `DSMobileNet`."""
    return DSMobileNet(num_classes, in_channels, dropout)
