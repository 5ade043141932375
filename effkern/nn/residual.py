"""The residual block in plain PyTorch, with a keep mask: what block skipping trains on and is checked against."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from effkern.nn._rows import fork_rows, set_rows, take_rows
from effkern.ops.block_skip.reference import blend

Kind = Literal["basic", "bottleneck"]
BnOver = Literal["all", "kept"]
PARTS = ("conv1", "bn1", "conv2", "bn2", "conv3", "bn3", "downsample")
EXPANSION = {"basic": 1, "bottleneck": 4}
SHORTCUTS = ("identity", "subsample", "pool", "conv")
MIN_KEPT = 2  # fewer rows than this give no batch statistics worth having


class SubsampleShortcut(nn.Module):
    """Every ``stride``-th pixel, zero channels on both sides: option A of the CIFAR ResNets (arXiv 1512.03385, 4.2)."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        extra = out_channels - in_channels
        self.stride, self.before, self.after = stride, extra // 2, extra - extra // 2

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.before, self.after))

    def extra_repr(self) -> str:
        return f"stride={self.stride}, before={self.before}, after={self.after}"


class PoolShortcut(nn.Module):
    """Average pool by ``stride``, zero channels appended: the shortcut of BlockDrop and of stochastic depth.

    The zeros are real zeros, not a product with 0, so Inf and NaN stay in their channels.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.stride, self.extra = stride, out_channels - in_channels

    def forward(self, x: Tensor) -> Tensor:
        if self.stride > 1:
            x = F.avg_pool2d(x, self.stride, ceil_mode=True)  # an odd map keeps its last row, as the strided conv does
        return F.pad(x, (0, 0, 0, 0, 0, self.extra))

    def extra_repr(self) -> str:
        return f"stride={self.stride}, extra={self.extra}"


def make_shortcut(kind: str, in_channels: int, out_channels: int, stride: int) -> nn.Module | None:
    """The shortcut of a block; None where the identity fits.

    Raises:
        ValueError: for an unknown ``kind``, or a parameter-free one that would have to drop channels.
    """
    if kind not in SHORTCUTS:
        raise ValueError(f"shortcut must be one of {', '.join(SHORTCUTS)}, got {kind!r}")
    if stride == 1 and in_channels == out_channels:
        return None
    if kind == "conv":
        conv = nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False)
        return nn.Sequential(conv, nn.BatchNorm2d(out_channels))
    if kind == "identity":
        raise ValueError(
            f"shortcut 'identity' cannot go from {in_channels} to {out_channels} channels at stride {stride}"
        )
    if out_channels < in_channels:
        raise ValueError(f"shortcut {kind!r} cannot go from {in_channels} down to {out_channels} channels")
    return (SubsampleShortcut if kind == "subsample" else PoolShortcut)(in_channels, out_channels, stride)


def fold_bn(conv: nn.Conv2d, bn: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """One weight and bias for a convolution and the batch norm after it, in float64.

    ``bn(conv(x)) = conv(x, w * g / s) + (beta - (mean - b) * g / s)`` with ``s = sqrt(var + eps)``. Folding in float64
    and rounding once keeps the folded block within the rounding error of the unfolded one.
    """
    if bn.running_mean is None or bn.running_var is None:
        raise ValueError("fold_bn: the batch norm keeps no running statistics (track_running_stats=False)")
    scale = (bn.running_var.double() + bn.eps).rsqrt()
    shift = -bn.running_mean.double()
    if conv.bias is not None:
        shift = shift + conv.bias.double()
    if bn.affine:
        scale = scale * bn.weight.double()
    shift = shift * scale
    if bn.affine:
        shift = shift + bn.bias.double()
    return conv.weight.double() * scale.view(-1, 1, 1, 1), shift


class ResidualBlock(nn.Module):
    """``relu(shortcut(x) + f(x))`` where a sample keeps the block, ``shortcut(x)`` where it does not.

    ``f`` is conv-BN-ReLU-conv-BN (basic) or 1x1-3x3-1x1 with the stride on the 3x3 (bottleneck). A dropped sample gets
    the shortcut without ReLU (BlockDrop, arXiv 1711.08393). Nothing is saved here: this is the plain form for training
    and comparison; :class:`effkern.nn.SkipBlock` has the same parameters and does only the kept work.

    Args:
        in_channels: channels of ``x``.
        channels: channels inside the block; the output has ``channels`` (basic) or ``4 * channels`` (bottleneck).
        stride: of the 3x3 convolution that carries it.
        kind: ``"basic"`` or ``"bottleneck"``.
        shortcut: ``"identity"``, ``"subsample"``, ``"pool"`` or ``"conv"``; the identity is taken wherever it fits.

    Attributes:
        bn_over: which rows batch norm sees in training when a keep mask is given. ``"all"``: the whole batch is
            computed and masked, as published. ``"kept"``: only the kept rows are computed, so a dropped row changes no
            statistic, which is what test time sees; fewer than two kept rows use and leave the running statistics.
    """

    def __init__(
        self,
        in_channels: int,
        channels: int,
        stride: int = 1,
        kind: str = "basic",
        shortcut: str = "conv",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if kind not in EXPANSION:
            raise ValueError(f"kind must be 'basic' or 'bottleneck', got {kind!r}")
        if stride < 1:
            raise ValueError(f"stride must be at least 1, got {stride}")
        self.kind, self.stride = cast(Kind, kind), stride
        self.in_channels, self.out_channels = in_channels, channels * EXPANSION[kind]
        self.bn_over: BnOver = "all"
        if kind == "basic":
            self.conv1 = nn.Conv2d(in_channels, channels, 3, stride=stride, padding=1, bias=False)
            self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        else:
            self.conv1 = nn.Conv2d(in_channels, channels, 1, bias=False)
            self.conv2 = nn.Conv2d(channels, channels, 3, stride=stride, padding=1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(channels), nn.BatchNorm2d(channels)
        if kind == "bottleneck":
            self.conv3 = nn.Conv2d(channels, self.out_channels, 1, bias=False)
            self.bn3 = nn.BatchNorm2d(self.out_channels)
        self.downsample = make_shortcut(shortcut, in_channels, self.out_channels, stride)
        self.to(device=device, dtype=dtype)

    def layers(self) -> Sequence[tuple[nn.Conv2d, nn.BatchNorm2d]]:
        """The convolutions of ``f`` in order, each with its batch norm."""
        pairs = [(self.conv1, self.bn1), (self.conv2, self.bn2)]
        return pairs if self.kind == "basic" else [*pairs, (self.conv3, self.bn3)]

    def shortcut(self, x: Tensor) -> Tensor:
        """What a dropped sample becomes."""
        return x if self.downsample is None else self.downsample(x)

    def residual(self, x: Tensor, bn_stats: bool | None = None) -> Tensor:
        """``f(x)``. ``bn_stats``: batch statistics or running ones; default, what each batch norm's mode says."""
        *first, (conv, bn) = self.layers()
        for inner_conv, inner_bn in first:
            x = F.relu(_batch_norm(inner_bn, inner_conv(x), bn_stats))
        return _batch_norm(bn, conv(x), bn_stats)

    def forward(self, x: Tensor, keep: Tensor | None = None) -> Tensor:
        """Run the block.

        Args:
            x: ``[N, in_channels, H, W]``.
            keep: ``[N]``, bool, uint8 or float in [0, 1]: 1 runs the block, 0 takes the shortcut, between blends the
                two. It may lie on the host whatever the device of ``x``.
                Default: every sample runs it.

        Returns:
            ``[N, out_channels, ceil(H / stride), ceil(W / stride)]``.
        """
        shortcut = self.shortcut(x)
        if keep is None:
            return F.relu(self.residual(x) + shortcut)
        if self.bn_over == "kept":
            return self._forward_kept(x, shortcut, keep)
        return blend(keep.to(x.device), F.relu(self.residual(x) + shortcut), shortcut)

    def _forward_kept(self, x: Tensor, shortcut: Tensor, keep: Tensor) -> Tensor:
        # How many rows there are decides what is launched: a mask on the host spares waiting for a device here.
        rows = keep.nonzero().flatten().to(x.device, non_blocking=True)
        keep = keep.to(x.device, non_blocking=True)
        if rows.numel() == 0:
            return shortcut.clone() if shortcut is x else shortcut
        bn_stats = False if rows.numel() < MIN_KEPT else None
        if rows.numel() == len(x):
            new = F.relu(self.residual(x, bn_stats) + shortcut)
            return blend(keep, new, shortcut) if keep.is_floating_point() else new
        alone = shortcut is not x
        shortcut, old = fork_rows(shortcut, rows)
        new = F.relu(self.residual(take_rows(x, rows) if alone else old, bn_stats) + old)
        # What 0 or 1 keep is kept whole: nothing to blend.
        new = blend(keep.index_select(0, rows), new, old) if keep.is_floating_point() else new
        return set_rows(shortcut, rows, new)

    def block_macs(self, height: int, width: int) -> tuple[int, int]:
        """Multiply-adds of one sample of ``height x width``: of the residual branch, and of the shortcut."""
        branch = shortcut = 0
        if isinstance(self.downsample, nn.Sequential):
            conv = cast(nn.Conv2d, self.downsample[0])
            shortcut = conv.weight.numel() * -(-height // self.stride) * -(-width // self.stride)
        for conv, _ in self.layers():
            height, width = -(-height // conv.stride[0]), -(-width // conv.stride[1])
            branch += conv.weight.numel() * height * width
        return branch, shortcut

    def extra_repr(self) -> str:
        return f"kind={self.kind!r}, stride={self.stride}, bn_over={self.bn_over!r}"


Block = TypeVar("Block", bound=ResidualBlock)


def share_parts(cls: type[Block], block: ResidualBlock) -> Block:
    """``block`` as another class of residual block, with the same parts, which it shares, in the same mode."""
    with torch.device("meta"):
        new = cls(block.in_channels, block.conv1.out_channels, block.stride, block.kind, "conv")
    for name in PARTS:
        if hasattr(block, name):
            setattr(new, name, getattr(block, name))
    new.bn_over = block.bn_over
    # The flag alone: the parts have modes of their own.
    new.training = block.training
    return new


def span(start: int, stop: int | None, count: int) -> tuple[int, int]:
    """Where a slice of ``count`` items begins and ends; ``slice.indices``, into which torch 2.11 compiles no graph."""
    first, last = (min(max(i + count if i < 0 else i, 0), count) for i in (start, count if stop is None else stop))
    return first, last


class ResidualStage(nn.Sequential):
    """Residual blocks one after the other, each with its own column of the keep mask.

    State dict names are those of the plain sequence: ``0.conv1.weight``, ...
    """

    def forward(  # type: ignore[override]
        self, x: Tensor, keep: Tensor | None = None, start: int = 0, stop: int | None = None
    ) -> Tensor:
        """Run blocks ``start`` to ``stop``.

        Args:
            x: ``[N, C, H, W]``.
            keep: ``[N, B]`` over all B blocks of the stage; columns outside the range are ignored. Default: all run.
            start, stop: as of a slice.
        """
        for k in range(*span(start, stop, len(self))):
            x = self[k](x, None if keep is None else keep[:, k])
        return x


def _batch_norm(bn: nn.BatchNorm2d, x: Tensor, bn_stats: bool | None) -> Tensor:
    if bn_stats is not False or not bn.training:
        return bn(x)
    return F.batch_norm(x, bn.running_mean, bn.running_var, bn.weight, bn.bias, False, 0.0, bn.eps)


def set_bn_over(net: nn.Module, bn_over: BnOver) -> None:
    """Set :attr:`ResidualBlock.bn_over` on every residual block of ``net``."""
    if bn_over not in ("all", "kept"):
        raise ValueError(f"bn_over must be 'all' or 'kept', got {bn_over!r}")
    for module in net.modules():
        if isinstance(module, ResidualBlock):
            module.bn_over = bn_over
