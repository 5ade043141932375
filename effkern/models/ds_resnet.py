"""A residual supernet with gates: DS-ResNet (arXiv 2103.13258), of which no code was released."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
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
from effkern.nn.gate import DoubleHeadedGate
from effkern.nn.residual import EXPANSION
from effkern.nn.sliced import SlicedLinear
from effkern.nn.sliced_block import Norm, SlicedConvBNAct

__all__ = ["DSResNet", "SlicedBlock", "ds_resnet", "ds_resnet50"]


class SlicedBlock(nn.Module):
    """``relu(shortcut(x) + f(x))`` at the width of the call: basic or bottleneck.

    The shortcut is a projection where stride or channels change, or where a gate stands in front, as the width does.

    Args:
        c_in: Input channels of every configuration.
        channels: Channels inside, of every configuration; the output has four times as many in a bottleneck.
        stride: Of the first 3x3 convolution.
        kind: ``"basic"`` or ``"bottleneck"``.
        space: Width indices that a gate at the input chooses from; default: there is no gate.
        norm: See `effkern.nn.SlicedConvBNAct`.
    """

    def __init__(
        self,
        c_in: Sequence[int],
        channels: Sequence[int],
        stride: int,
        kind: str = "basic",
        space: Sequence[int] | None = None,
        norm: Norm = "batch",
    ) -> None:
        super().__init__()
        if kind not in EXPANSION:
            raise ValueError(f"kind must be 'basic' or 'bottleneck', got {kind!r}")
        c_out = [width * EXPANSION[kind] for width in channels]
        if kind == "basic":
            shapes = [(c_in, channels, 3, stride), (channels, c_out, 3, 1)]
        else:
            shapes = [(c_in, channels, 1, 1), (channels, channels, 3, stride), (channels, c_out, 1, 1)]
        acts = ["relu"] * (len(shapes) - 1) + ["none"]
        self.layers = nn.ModuleList(
            SlicedConvBNAct(*shape, act=act, norm=norm) for shape, act in zip(shapes, acts, strict=True)
        )
        projects = stride != 1 or list(c_in) != c_out or space is not None
        self.downsample = SlicedConvBNAct(c_in, c_out, 1, stride, act="none", norm=norm) if projects else None
        # 1 + tanh, zero at first: the residual path begins as if there were no attention.
        self.attention = None if space is None else DoubleHeadedGate(c_in, space, form="tanh")
        self.c_out = c_out

    def forward(self, x: Tensor, width: int | Tensor, zero_tail: bool = True) -> Tensor:
        x = x if self.attention is None else self.attention(x, width)
        return self.run(x, width, zero_tail=zero_tail)

    def run(
        self, x: Tensor, width: int | Tensor, in_width: int | Tensor | None = None, zero_tail: bool = True
    ) -> Tensor:
        """The block behind its gate.

        Args:
            x: Its input.
            width: That of the block.
            in_width: That of ``x``, if it is another one.
            zero_tail: False, for a block behind which reads no further than a sample's width: nothing is written past
                it. ``x`` must have zeros there unless its block was asked so too.
        """
        shortcut = x if self.downsample is None else self.downsample(x, width, in_width, zero_tail=zero_tail)
        *layers, last = self.layers
        y, before = x, in_width
        for layer in layers:
            y, before = layer(y, width, before, zero_tail=False), None
        return F.relu(last(y, width, before, zero_tail=zero_tail) + shortcut)


class DSResNet(GatedNet):
    """A residual network with stages of many widths and a gate in front of some of them.

    As in DS-Net the stages in front have one width for all images, so that every width goes on from the same maps. A
    gate stands at the input of a stage's first block, whose shortcut is a projection; its attention begins as identity.

    Args:
        num_classes: Of the classifier.
        in_channels: Of the images.
        kind: ``"basic"`` or ``"bottleneck"`` blocks.
        stem: Channels of the stem, one number or (narrow, wide).
        large: Whether the stem is that of ImageNet, 7x7 with stride 2 and a max pool, and not 3x3.
        stem_stride: Of the 3x3 stem.
        front: Stages that all images share: channels (as of the stem), blocks, stride.
        stages: Stages of many widths: a list of them, blocks, stride.
        space: Width indices a gate chooses from, or a list of them for each gate.
        gated: Which of ``stages`` begin with a gate.
        dropout: Before the classifier.
        norm: ``"batch"``, or ``"group"`` norm everywhere; see `effkern.nn.SlicedGroupNorm`.
        statistics: Of batch norm behind a second gate: ``"width"``, or ``"way"`` for own ones of every way there.

    Shape:
        ``[N, in_channels, H, W]`` to ``[N, num_classes]``, with a width index or an index tensor ``[N]`` (eval mode).
    """

    def __init__(
        self,
        num_classes: int = 10,
        in_channels: int = 3,
        kind: str = "basic",
        stem: int | Sequence[int] = 16,
        large: bool = False,
        stem_stride: int = 1,
        front: Front = ((16, 2, 1), (32, 2, 2)),
        stages: Stages = (((16, 32, 48, 64), 3, 2),),
        space: Sequence[int] | Sequence[Sequence[int]] = (0, 1, 2, 3),
        gated: Sequence[int] = (0,),
        dropout: float = 0.0,
        norm: Norm = "batch",
        statistics: Statistics = "width",
    ) -> None:
        super().__init__()
        every, self.num_widths = configurations([(stem, 1, 1), *front], stages)
        routed = dict(zip(gated_stages(gated, len(front), len(stages)), spaces(space, len(gated)), strict=True))
        (previous, _, _), *rest = every
        kernel, stride = (7, 2) if large else (3, stem_stride)
        self.large = large
        self.stem = SlicedConvBNAct(in_channels, previous, kernel, stride, norm=norm)

        def block(c_in: Sequence[int], channels: Sequence[int], stride: int, space: Sequence[int] | None) -> Made:
            made = SlicedBlock(c_in, channels, stride, kind, space, norm)
            return made, made.c_out

        last = self._add_blocks(previous, rest, routed, statistics, block)
        self.dropout = nn.Dropout(dropout)
        self.classifier = SlicedLinear(last, num_classes)

    def _block(self, i: int) -> SlicedBlock:
        return cast(SlicedBlock, self.blocks[i])

    def segment(self, k: int, x: Tensor, width: int | Tensor, in_width: int | Tensor | None = None) -> Tensor:
        begin, end = self._ends(k)
        last = end == len(self.blocks)  # the classifier reads no further than a sample's width
        if k == 0:
            x = self.stem(x.contiguous(memory_format=torch.channels_last), width)
            x = F.max_pool2d(x, 3, stride=2, padding=1) if self.large else x
        else:
            x = self._block(begin).run(x, width, in_width, zero_tail=not last)
        for block in self.blocks[begin + 1 : end]:
            x = block(x, width, zero_tail=not last)
        return x if not last else self.classifier(self.dropout(pooled(x)), width)


ds_resnet = register_model(DSResNet, "ds_resnet")


@register_model
def ds_resnet50(
    num_classes: int = 1000,
    in_channels: int = 3,
    space: Sequence[int] | Sequence[Sequence[int]] = (0, 1, 2, 3),
    gated: Sequence[int] = (0,),
) -> DSResNet:
    """ResNet-50 with its last two stages at half to whole width in steps of an eighth, and a gate in front of them."""
    stages = (([128 + 32 * i for i in range(5)], 6, 2), ([256 + 64 * i for i in range(5)], 3, 2))
    front = ((64, 3, 1), (128, 4, 2))
    return DSResNet(
        num_classes, in_channels, "bottleneck", 64, True, front=front, stages=stages, space=space, gated=gated
    )
