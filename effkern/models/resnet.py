"""Residual networks whose blocks each sample may skip: ResNet-20/32/56/110 for CIFAR, ResNet-18/50/101 for ImageNet."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import torch.nn.functional as F
from torch import Tensor, fx, nn

from effkern.models._registry import register_model
from effkern.nn.residual import EXPANSION, ResidualBlock, ResidualStage, span


@fx.wrap  # one call in a traced network: while it is traced there are no shapes to compare
def _checked_keep(keep: Tensor | None, samples: int, blocks: int) -> Tensor:
    if keep is None or keep.shape != (samples, blocks):
        got = None if keep is None else list(keep.shape)
        raise ValueError(f"keep must be [{samples}, {blocks}], got {got}")
    return keep


class ResNet(nn.Module):
    """A residual network with a keep mask over its blocks.

    Subclasses give :meth:`stem`, :meth:`head` and the stages ``layer1``, ``layer2``, ...

    Attributes:
        num_blocks: K, the number of residual blocks, in forward order over all stages.
    """

    def __init__(
        self, in_channels: int, widths: Sequence[int], blocks: Sequence[int], kind: str, shortcut: str
    ) -> None:
        super().__init__()
        if len(widths) != len(blocks) or not widths or min(blocks) < 1 or min(widths) < 1:
            raise ValueError(
                "widths and blocks must be equally long, with entries of at least 1, "
                f"got {tuple(widths)} and {tuple(blocks)}"
            )
        self.num_blocks = sum(blocks)
        self.num_stages = len(blocks)
        channels = in_channels
        for i, (width, count) in enumerate(zip(widths, blocks, strict=True)):
            stage = []
            for j in range(count):
                stride = 2 if i > 0 and j == 0 else 1
                stage.append(ResidualBlock(channels, width, stride, kind, shortcut))
                channels = width * EXPANSION[kind]
            self.add_module(f"layer{i + 1}", ResidualStage(*stage))
        self.out_channels = channels

    def stem(self, x: Tensor) -> Tensor:
        """What comes before the first block."""
        raise NotImplementedError

    def head(self, x: Tensor) -> Tensor:
        """What comes after the last block: pooled features to logits."""
        raise NotImplementedError

    def stages(self) -> list[ResidualStage]:
        """The stages in order."""
        return [cast(ResidualStage, self.get_submodule(f"layer{i + 1}")) for i in range(self.num_stages)]

    def blocks(self) -> list[ResidualBlock]:
        """The K blocks in forward order."""
        return [cast(ResidualBlock, block) for stage in self.stages() for block in stage]

    def body(self, x: Tensor, keep: Tensor | None = None, start: int = 0, stop: int | None = None) -> Tensor:
        """Blocks ``start`` to ``stop`` of the K. ``keep`` is the whole ``[N, K]`` mask; columns outside are ignored."""
        start, stop = span(start, stop, self.num_blocks)
        first = 0
        for stage in self.stages():
            last = first + len(stage)
            if start < last and stop > first:
                part = None if keep is None else keep[:, first:last]
                x = stage(x, part, max(start - first, 0), min(stop, last) - first)
            first = last
        return x

    def forward(self, x: Tensor, keep: Tensor | None = None) -> Tensor:
        """Logits.

        Args:
            x: ``[N, C, H, W]``.
            keep: ``[N, K]``, bool, uint8 or float in [0, 1]: which blocks each sample runs; a dropped block passes its
                shortcut on, without ReLU. Any of the K blocks may be dropped, also all. Default: all are run.

        Returns:
            ``[N, num_classes]``.

        Raises:
            ValueError: if ``keep`` is not ``[N, K]``. One row of K is not silently applied to the whole batch.
        """
        if keep is not None:
            keep = _checked_keep(keep, x.shape[0], self.num_blocks)
        return self.head(self.body(self.stem(x), keep))

    def stem_size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of the map the first block gets."""
        raise NotImplementedError

    def block_macs(self, size: Sequence[int]) -> tuple[int, list[int]]:
        """Multiply-adds of one image of ``size`` (C, H, W): what every image pays, and what each of the K blocks adds.

        Every image pays the stem, the shortcuts and the classifier. Batch norm, activations and pooling are not
        counted.
        """
        total = sum(m.weight.numel() for m in self.children() if isinstance(m, nn.Linear))
        stem = cast(nn.Conv2d, self.conv1)
        total += stem.weight.numel() * math.prod(-(-side // stem.stride[0]) for side in size[1:])
        height, width = self.stem_size(size[1], size[2])
        blocks = []
        for block in self.blocks():
            branch, shortcut = block.block_macs(height, width)
            blocks.append(branch)
            total += shortcut
            height, width = -(-height // block.stride), -(-width // block.stride)
        return total, blocks

    def _init_weights(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


class CifarResNet(ResNet):
    """The residual network for small images: 3x3 stem, basic blocks, parameter-free shortcuts (arXiv 1512.03385, 4.2).

    Parameter names: ``conv1, bn1, layer{1,2,3}.{i}.{conv1,bn1,conv2,bn2}, linear``.

    Args:
        blocks: number of blocks of each stage, three or any other number of stages.
        in_channels: channels of the image.
        num_classes: number of classes.
        widths: channels of each stage.
        stem_stride: 2 halves the image at once, for 28x28 images on small machines.
        shortcut: ``"subsample"`` (option A), ``"pool"`` (as BlockDrop trains it) or ``"conv"`` (option B).
    """

    def __init__(
        self,
        blocks: Sequence[int],
        in_channels: int = 3,
        num_classes: int = 10,
        widths: Sequence[int] = (16, 32, 64),
        stem_stride: int = 1,
        shortcut: str = "subsample",
    ) -> None:
        super().__init__(widths[0], widths, blocks, "basic", shortcut)
        if stem_stride < 1:
            raise ValueError(f"stem_stride must be at least 1, got {stem_stride}")
        self.conv1 = nn.Conv2d(in_channels, widths[0], 3, stride=stem_stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.linear = nn.Linear(self.out_channels, num_classes)
        self._init_weights()

    def stem(self, x: Tensor) -> Tensor:
        return F.relu(self.bn1(self.conv1(x)))

    def stem_size(self, height: int, width: int) -> tuple[int, int]:
        stride = self.conv1.stride[0]
        return -(-height // stride), -(-width // stride)

    def head(self, x: Tensor) -> Tensor:
        return self.linear(x.mean((2, 3)))


class ImageNetResNet(ResNet):
    """The residual network for large images: 7x7 stem and max pool, four stages, projection shortcuts.

    Parameter names are torchvision's: ``conv1, bn1, layer{1..4}.{i}.{conv1,bn1,...,downsample.0,downsample.1}, fc``.
    The stride sits on the 3x3 convolution.

    Args:
        blocks: number of blocks of each stage.
        kind: ``"basic"`` or ``"bottleneck"``.
        in_channels: channels of the image.
        num_classes: number of classes.
        widths: channels inside the blocks of each stage.
    """

    def __init__(
        self,
        blocks: Sequence[int],
        kind: str,
        in_channels: int = 3,
        num_classes: int = 1000,
        widths: Sequence[int] = (64, 128, 256, 512),
    ) -> None:
        super().__init__(widths[0], widths, blocks, kind, "conv")
        self.conv1 = nn.Conv2d(in_channels, widths[0], 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.fc = nn.Linear(self.out_channels, num_classes)
        self._init_weights()

    def stem(self, x: Tensor) -> Tensor:
        return F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 3, stride=2, padding=1)

    def stem_size(self, height: int, width: int) -> tuple[int, int]:
        return -(-height // 4), -(-width // 4)

    def head(self, x: Tensor) -> Tensor:
        return self.fc(x.mean((2, 3)))


def _cifar(
    depth: int,
    in_channels: int,
    num_classes: int,
    widths: Sequence[int],
    stem_stride: int,
    blocks: Sequence[int] | None,
    shortcut: str,
) -> CifarResNet:
    # depth = 6n + 2: a stem, 3 stages of n blocks of 2 convolutions, a classifier.
    blocks = ((depth - 2) // 6,) * 3 if blocks is None else blocks
    return CifarResNet(blocks, in_channels, num_classes, widths, stem_stride, shortcut)


@register_model
def resnet20(
    in_channels: int = 3,
    num_classes: int = 10,
    widths: Sequence[int] = (16, 32, 64),
    stem_stride: int = 1,
    blocks: Sequence[int] | None = None,
    shortcut: str = "subsample",
) -> CifarResNet:
    """ResNet-20 for CIFAR: 9 blocks, 0.27 M parameters, 40.6 M multiply-adds at 32x32."""
    return _cifar(20, in_channels, num_classes, widths, stem_stride, blocks, shortcut)


@register_model
def resnet32(
    in_channels: int = 3,
    num_classes: int = 10,
    widths: Sequence[int] = (16, 32, 64),
    stem_stride: int = 1,
    blocks: Sequence[int] | None = None,
    shortcut: str = "subsample",
) -> CifarResNet:
    """ResNet-32 for CIFAR: 15 blocks, 0.46 M parameters, 68.9 M multiply-adds at 32x32."""
    return _cifar(32, in_channels, num_classes, widths, stem_stride, blocks, shortcut)


@register_model
def resnet56(
    in_channels: int = 3,
    num_classes: int = 10,
    widths: Sequence[int] = (16, 32, 64),
    stem_stride: int = 1,
    blocks: Sequence[int] | None = None,
    shortcut: str = "subsample",
) -> CifarResNet:
    """ResNet-56 for CIFAR: 27 blocks, 0.85 M parameters, 125.5 M multiply-adds at 32x32."""
    return _cifar(56, in_channels, num_classes, widths, stem_stride, blocks, shortcut)


@register_model
def resnet110(
    in_channels: int = 3,
    num_classes: int = 10,
    widths: Sequence[int] = (16, 32, 64),
    stem_stride: int = 1,
    blocks: Sequence[int] | None = None,
    shortcut: str = "subsample",
) -> CifarResNet:
    """ResNet-110 for CIFAR: 54 blocks, 1.7 M parameters, 252.9 M multiply-adds at 32x32."""
    return _cifar(110, in_channels, num_classes, widths, stem_stride, blocks, shortcut)


@register_model
def resnet18(
    in_channels: int = 3,
    num_classes: int = 1000,
    widths: Sequence[int] = (64, 128, 256, 512),
    blocks: Sequence[int] = (2, 2, 2, 2),
) -> ImageNetResNet:
    """ResNet-18 for ImageNet: 8 basic blocks, 11.7 M parameters, 1.81 G multiply-adds at 224x224."""
    return ImageNetResNet(blocks, "basic", in_channels, num_classes, widths)


@register_model
def resnet50(
    in_channels: int = 3,
    num_classes: int = 1000,
    widths: Sequence[int] = (64, 128, 256, 512),
    blocks: Sequence[int] = (3, 4, 6, 3),
) -> ImageNetResNet:
    """ResNet-50 for ImageNet: 16 bottlenecks, 25.6 M parameters, 4.09 G multiply-adds at 224x224."""
    return ImageNetResNet(blocks, "bottleneck", in_channels, num_classes, widths)


@register_model
def resnet101(
    in_channels: int = 3,
    num_classes: int = 1000,
    widths: Sequence[int] = (64, 128, 256, 512),
    blocks: Sequence[int] = (3, 4, 23, 3),
) -> ImageNetResNet:
    """ResNet-101 for ImageNet: 33 bottlenecks, 44.5 M parameters, 7.80 G multiply-adds at 224x224."""
    return ImageNetResNet(blocks, "bottleneck", in_channels, num_classes, widths)
