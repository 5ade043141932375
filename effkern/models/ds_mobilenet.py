"""The supernet of DS-Net: MobileNetV1-like, with attention, whose last two stages have fourteen widths."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from effkern.models._gated import (
    Front,
    GatedNet,
    Made,
    Stages,
    Statistics,
    configurations,
    gated_stages,
    spaces,
)
from effkern.models._registry import register_model
from effkern.nn._pool import pooled
from effkern.nn.gate import ChannelAttention, DoubleHeadedGate
from effkern.nn.sliced import SlicedLinear
from effkern.nn.sliced_block import Norm, SlicedConvBNAct
from effkern.nn.sliced_chain import Mean, Part, RunsAsChain

__all__ = ["ChannelAttention", "DSMobileNet", "SeparableBlock", "ds_mobilenet"]

# Narrow and wide form of the stages in front, their blocks and strides; then those of many widths (arXiv 2103.13258).
STEM = (16, 24)
FRONT: Front = (((32, 88), 1, 1), ((48, 168), 2, 2), ((96, 264), 2, 2))
STAGES: Stages = ((range(224, 641, 32), 6, 2), (range(736, 1153, 32), 2, 2))


class SeparableBlock(nn.Module):
    """Depthwise 3x3, attention, pointwise; each convolution with batch norm and swish.

    With a width a sample nobody reads past it between the layers, so nothing is written there (``zero_tail`` of
    `effkern.ops.sliced_conv2d_ragged`); the result has zeros unless it is asked for without.

    Args:
        c_in: Input channels of every configuration.
        c_out: Output channels of every configuration.
        stride: Of the depthwise convolution.
        space: Width indices that a gate in the place of the attention chooses from; default: there is no gate.
        norm: See `effkern.nn.SlicedConvBNAct`.
    """

    def __init__(
        self,
        c_in: Sequence[int],
        c_out: Sequence[int],
        stride: int,
        space: Sequence[int] | None = None,
        norm: Norm = "batch",
    ) -> None:
        super().__init__()
        self.depthwise = SlicedConvBNAct(c_in, c_in, 3, stride, groups=c_in[-1], act="silu", norm=norm)
        self.attention = ChannelAttention(c_in) if space is None else DoubleHeadedGate(c_in, space)
        self.pointwise = SlicedConvBNAct(c_in, c_out, 1, act="silu", norm=norm)

    def forward(self, x: Tensor, width: int | Tensor, zero_tail: bool = True) -> Tensor:
        x = self.attention(self.depthwise(x, width, zero_tail=False), width)
        return self.pointwise(x, width, zero_tail=zero_tail)


class DSMobileNet(GatedNet, RunsAsChain):
    """The DS-Net supernet: index ``i`` of 0 to 13 is ``uniform(i)``, the last one is ``largest``.

    All but ``largest`` run the narrow form of the stem and the first three stages, so ``uniform(13)`` is not the
    largest network although its last stages are as wide. A gate stands in the first block of the fourth stage, between
    its depthwise and its pointwise convolution: what is in front always runs narrow, what follows at the gate's choice.

    Args:
        num_classes: Of the classifier.
        in_channels: Of the images.
        dropout: Before the classifier, in training at the largest width only.
        space: Width indices the gate chooses from, or a list of them for each gate.
        gated: Which of ``stages`` begin with a gate.
        stem: Channels of the stem, one number or (narrow, wide).
        front: Stages that all images share: channels (as of the stem), blocks, stride.
        stages: Stages of many widths: a list of them, blocks, stride. Without a pair in front there is no ``largest``.
        norm: ``"batch"``, or ``"group"`` norm everywhere; see `effkern.nn.SlicedGroupNorm`.
        statistics: Of batch norm behind a second gate: ``"width"``, or ``"way"`` for own ones of every way there.

    Shape:
        ``[N, in_channels, H, W]`` to ``[N, num_classes]``, with a width index or an index tensor ``[N]`` (eval mode).
    """

    def __init__(
        self,
        num_classes: int = 1000,
        in_channels: int = 3,
        dropout: float = 0.2,
        space: Sequence[int] | Sequence[Sequence[int]] = (0, 1, 2, 3),
        gated: Sequence[int] = (0,),
        stem: int | Sequence[int] = STEM,
        front: Front = FRONT,
        stages: Stages = STAGES,
        norm: Norm = "batch",
        statistics: Statistics = "width",
    ) -> None:
        super().__init__()
        every, self.num_widths = configurations([(stem, 1, 2), *front], stages)
        routed = dict(zip(gated_stages(gated, len(front), len(stages)), spaces(space, len(gated)), strict=True))
        (previous, _, _), *rest = every
        self.stem = SlicedConvBNAct(in_channels, previous, 3, 2, act="silu", norm=norm)

        def block(c_in: Sequence[int], channels: Sequence[int], stride: int, space: Sequence[int] | None) -> Made:
            return SeparableBlock(c_in, channels, stride, space, norm), channels

        last = self._add_blocks(previous, rest, routed, statistics, block)
        self.dropout = nn.Dropout(dropout)
        self.classifier = SlicedLinear(last, num_classes)

    def forward(self, x: Tensor, width: int | Tensor = -1) -> Tensor:
        scores = self._as_chain(x, width)
        return super().forward(x, width) if scores is None else scores

    def _parts(self) -> list[Part]:
        parts: list[Part] = [self.stem]
        for i in range(len(self.blocks)):
            block = self._block(i)
            parts += (block.depthwise, block.attention, block.pointwise)
        return [*parts, Mean(), self.classifier]

    def _block(self, i: int) -> SeparableBlock:
        return cast(SeparableBlock, self.blocks[i])

    def segment(self, k: int, x: Tensor, width: int | Tensor, in_width: int | Tensor | None = None) -> Tensor:
        begin, end = self._ends(k)
        if k == 0:
            x = self.stem(x.contiguous(memory_format=torch.channels_last), width)
        else:
            x = self._block(begin).pointwise(x, width, in_width, zero_tail=False)
        for block in self.blocks[begin + 1 : end]:
            x = block(x, width, zero_tail=False)
        if end < len(self.blocks):
            return self._block(end).depthwise(x, width)
        x = pooled(x)
        if not isinstance(width, Tensor) and width in (-1, self._configurations[k] - 1):
            x = self.dropout(x)
        return self.classifier(x, width)


ds_mobilenet = register_model(DSMobileNet, "ds_mobilenet")
