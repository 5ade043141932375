"""MobileNetV1 with several widths in one set of weights, and MobileNetV2."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from effkern.models._by_width import by_width
from effkern.models._registry import register_model
from effkern.nn._pool import pooled
from effkern.nn.sliced import SlicedLinear
from effkern.nn.sliced_block import SlicedConvBNAct, separable
from effkern.nn.sliced_chain import Mean, Part, RunsAsChain
from effkern.nn.switchable_bn import Affine

# Output channels and stride of the 13 separable blocks (arXiv 1704.04861, table 1), at width 1.
_V1_BLOCKS = ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *[(512, 1)] * 5, (1024, 2), (1024, 1))

# Expansion, output channels, blocks, stride of the first one (arXiv 1801.04381, table 2), at width 1.
_V2_STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


def make_divisible(channels: float, divisor: int = 8) -> int:
    """Round to a multiple of ``divisor``, at least one of it, and never more than 10 % down.

    >>> make_divisible(32 * 0.35), make_divisible(24 * 0.75), make_divisible(3)
    (16, 24, 8)
    """
    rounded = max(divisor, int(channels + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * channels else rounded


class SlimmableMobileNetV1(RunsAsChain):
    """MobileNetV1 whose every layer runs at one of several widths, per call or per sample (arXiv 1812.08928).

    Args:
        width_mults: Multipliers of the channels, ascending; one configuration each.
        num_classes: Of the classifier.
        in_channels: Of the images.
        affine: Batch-norm parameters: a set a width as published, or ``"shared"`` as in DS-Net.
        dropout: Before the classifier.

    Shape:
        ``[N, in_channels, H, W]`` to ``[N, num_classes]``, with a width index or an index tensor ``[N]`` (eval mode).
    """

    def __init__(
        self,
        width_mults: Sequence[float] = (0.25, 0.5, 0.75, 1.0),
        num_classes: int = 1000,
        in_channels: int = 3,
        affine: Affine = "per_width",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if not width_mults or min(width_mults) <= 0 or list(width_mults) != sorted(width_mults):
            raise ValueError(f"width_mults must be positive and ascending, got {list(width_mults)}")
        self.width_mults, self.num_widths = tuple(width_mults), len(width_mults)

        def widths(channels: int) -> list[int]:
            return [make_divisible(channels * mult) for mult in self.width_mults]

        previous = widths(32)
        layers = [SlicedConvBNAct(in_channels, previous, 3, 2, affine=affine)]
        for channels, stride in _V1_BLOCKS:
            layers.append(SlicedConvBNAct(previous, previous, 3, stride, groups=previous[-1], affine=affine))
            layers.append(SlicedConvBNAct(previous, widths(channels), 1, affine=affine))
            previous = widths(channels)
        self.features = nn.ModuleList(layers)
        self.dropout = nn.Dropout(dropout)
        self.classifier = SlicedLinear(previous, num_classes)

    def forward(self, x: Tensor, width: int | Tensor = -1) -> Tensor:
        """Scores at ``width``: an index into ``width_mults``, or one a sample."""
        scores = self._as_chain(x, width)
        return by_width(self, self._scores, x, width) if scores is None else scores

    def _parts(self) -> list[Part]:
        layers = [layer for layer in self.features if isinstance(layer, SlicedConvBNAct)]
        return [*layers, Mean(), self.classifier]

    def _scores(self, x: Tensor, width: int | Tensor) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        stem, *layers = self.features
        x = stem(x, width, zero_tail=False)
        for depthwise, pointwise in zip(layers[::2], layers[1::2], strict=True):
            x = separable(depthwise, pointwise, x, width, zero_tail=False)
        return self.classifier(self.dropout(pooled(x)), width)


class InvertedResidual(nn.Module):
    """Expand by a pointwise convolution, filter by a depthwise one, project without activation, add the input.

    Parameter names are torchvision's.

    Args:
        in_channels: Of the input.
        out_channels: Of the output.
        stride: Of the depthwise convolution; the input is added only if shapes allow.
        expansion: Factor of the channels inside; with 1 there is no first convolution.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = in_channels * expansion
        layers: list[nn.Module] = [] if expansion == 1 else [_conv_bn_relu6(in_channels, hidden, 1)]
        layers += [
            _conv_bn_relu6(hidden, hidden, 3, stride, groups=hidden),
            nn.Conv2d(hidden, out_channels, 1, bias=False),
            nn.BatchNorm2d(out_channels),
        ]
        self.conv = nn.Sequential(*layers)
        self.adds_input = stride == 1 and in_channels == out_channels

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return x + y if self.adds_input else y


class MobileNetV2(nn.Module):
    """MobileNetV2 (arXiv 1801.04381). Parameter names are torchvision's, so its weights load unchanged.

    Args:
        width_mult: Multiplier of all channels; the last convolution never goes below 1280.
        num_classes: Of the classifier.
        in_channels: Of the images.
        dropout: Before the classifier.
    """

    def __init__(
        self, width_mult: float = 1.0, num_classes: int = 1000, in_channels: int = 3, dropout: float = 0.2
    ) -> None:
        super().__init__()
        previous = make_divisible(32 * width_mult)
        last = make_divisible(1280 * max(1.0, width_mult))
        layers: list[nn.Module] = [_conv_bn_relu6(in_channels, previous, 3, 2)]
        for expansion, base, blocks, stride in _V2_STAGES:
            channels = make_divisible(base * width_mult)
            for block in range(blocks):
                layers.append(InvertedResidual(previous, channels, stride if block == 0 else 1, expansion))
                previous = channels
        layers.append(_conv_bn_relu6(previous, last, 1))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(nn.Dropout(dropout), nn.Linear(last, num_classes))
        _initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(F.adaptive_avg_pool2d(self.features(x), 1).flatten(1))


def _conv_bn_relu6(c_in: int, c_out: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(c_out), nn.ReLU6(inplace=True))


def _initialise(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out")
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, 0, 0.01)
            nn.init.zeros_(module.bias)


mobilenet_v1_slimmable = register_model(SlimmableMobileNetV1, "mobilenet_v1_slimmable")
mobilenet_v2 = register_model(MobileNetV2, "mobilenet_v2")
