"""The algebra of re-parameterization: batch norm into conv, branches into one conv. fp64 inside, rounded once outside.

A convolution is held as numbers (:class:`Conv`) while it is folded. Each rule is one function; what has no exact fold
raises :class:`ReparamError`. Rules: ACNet (Ding et al., ICCV 2019), RepVGG (Ding et al., CVPR 2021).
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize

Pair = tuple[int, int]


class ReparamError(ValueError):
    """A module that cannot be folded exactly.

    Attributes:
        module: name of the module in its model, empty for the model itself or when unknown.
        reason: why there is no exact fold.
        remedy: what to do about it.
    """

    def __init__(self, reason: str, remedy: str, module: str = "") -> None:
        super().__init__(reason, remedy, module)
        self.module, self.reason, self.remedy = module, reason, remedy

    def __str__(self) -> str:
        return f"{self.module + ': ' if self.module else ''}{self.reason}; {self.remedy}"

    def at(self, module: str) -> ReparamError:
        """The same error, naming the module it happened in."""
        return ReparamError(self.reason, self.remedy, module)


@dataclass(frozen=True)
class Conv:
    """A convolution with bias as fp64 numbers.

    Attributes:
        weight: ``[out_channels, in_channels / groups, kh, kw]``, float64 on the CPU.
        bias: ``[out_channels]``, float64.
        stride: rows and columns.
        padding: ``((top, bottom), (left, right))``.
        dilation: rows and columns.
        groups: number of groups.
        padding_mode: as in :class:`torch.nn.Conv2d`.
    """

    weight: Tensor
    bias: Tensor
    stride: Pair = (1, 1)
    padding: tuple[Pair, Pair] = ((0, 0), (0, 0))
    dilation: Pair = (1, 1)
    groups: int = 1
    padding_mode: str = "zeros"

    @property
    def kernel_size(self) -> Pair:
        """Rows and columns of the kernel."""
        return int(self.weight.shape[2]), int(self.weight.shape[3])

    @property
    def in_channels(self) -> int:
        """Channels of the input, over all groups."""
        return int(self.weight.shape[1]) * self.groups


def _exact(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", torch.float64)


def read_conv(conv: nn.Conv2d) -> Conv:
    """Read an ``nn.Conv2d`` as numbers, its bias included."""
    if parametrize.is_parametrized(conv) or hasattr(conv, "weight_g") or hasattr(conv, "weight_orig"):
        raise ReparamError(
            "the convolution's weight is computed by a parametrization (weight_norm, spectral_norm, pruning mask)",
            "bake it first, e.g. torch.nn.utils.parametrize.remove_parametrizations(conv, 'weight')",
        )
    weight = _exact(conv.weight)
    bias = torch.zeros(weight.shape[0], dtype=torch.float64) if conv.bias is None else _exact(conv.bias)
    dilation = (conv.dilation[0], conv.dilation[1])
    if conv.padding == "same":  # torch puts the odd pixel at the end
        totals = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True)]
        sides = [(total // 2, total - total // 2) for total in totals]
    elif conv.padding == "valid":
        sides = [(0, 0), (0, 0)]
    else:
        sides = [(int(p), int(p)) for p in conv.padding]
    stride = (conv.stride[0], conv.stride[1])
    return Conv(weight, bias, stride, (sides[0], sides[1]), dilation, conv.groups, conv.padding_mode)


def identity(channels: int) -> Conv:
    """The convolution that changes nothing: one 1x1 kernel of weight 1 for every channel by itself."""
    ones = torch.ones(channels, 1, 1, 1, dtype=torch.float64)
    return Conv(ones, torch.zeros(channels, dtype=torch.float64), groups=channels)


def fold_batch_norm(conv: Conv, norm: nn.Module) -> Conv:
    """Fold the batch norm behind a convolution into it.

    ``W' = S * W`` and ``b' = beta + S * (b - mean)`` with ``S = gamma / sqrt(var + eps)``.

    Args:
        conv: the convolution in front.
        norm: ``BatchNorm2d``, ``SyncBatchNorm`` or a frozen batch norm with the same attributes, in eval mode.

    Raises:
        ReparamError: for another kind of norm, in training mode, or without running statistics.
    """
    if not (isinstance(norm, _BatchNorm) or type(norm).__name__ == "FrozenBatchNorm2d"):
        raise ReparamError(
            f"{type(norm).__name__} is not a batch norm, its output is no fixed linear function of its input",
            "use BatchNorm2d in blocks that will be folded",
        )
    if norm.training and isinstance(norm, _BatchNorm):
        raise ReparamError("a batch norm is in training mode", "call model.eval() before folding")
    mean, var = norm.running_mean, norm.running_var
    if not isinstance(mean, Tensor) or not isinstance(var, Tensor):
        raise ReparamError(
            "a batch norm has no running statistics (track_running_stats=False)",
            "train with track_running_stats=True, or set running_mean and running_var from data",
        )
    if isinstance(norm.num_batches_tracked if isinstance(norm, _BatchNorm) else None, Tensor) and not bool(
        norm.num_batches_tracked
    ):
        warnings.warn(
            "folding a batch norm that has seen no batch (num_batches_tracked == 0): its running statistics are "
            "initial values unless you set them",
            stacklevel=2,
        )
    if mean.shape[0] != conv.weight.shape[0]:
        raise ReparamError(
            f"a batch norm of {mean.shape[0]} channels follows a convolution of {conv.weight.shape[0]}",
            "match the channel counts",
        )
    scale = (_exact(var) + float(norm.eps)).rsqrt()  # type: ignore[arg-type]
    if isinstance(norm.weight, Tensor):
        scale = scale * _exact(norm.weight)
    shift = -_exact(mean) * scale
    if isinstance(norm.bias, Tensor):
        shift = shift + _exact(norm.bias)
    return replace(conv, weight=conv.weight * scale[:, None, None, None], bias=shift + scale * conv.bias)


def regroup(conv: Conv, groups: int) -> Conv:
    """Write a convolution with fewer groups, its kernels block-diagonal in the wider ones.

    Raises:
        ReparamError: if ``groups`` does not divide the groups of ``conv``.
    """
    if groups == conv.groups:
        return conv
    if groups < 1 or conv.groups % groups:
        raise ReparamError(
            f"a branch with {conv.groups} groups cannot join a convolution with {groups}",
            "the branches' groups must be multiples of those of the largest kernel",
        )
    merged = conv.groups // groups  # branch groups that share a target group
    out_channels, depth = int(conv.weight.shape[0]), int(conv.weight.shape[1])
    per_group = out_channels // conv.groups
    source = conv.weight.reshape(groups, merged, per_group, depth, *conv.kernel_size)
    target = source.new_zeros(groups, merged, per_group, merged, depth, *conv.kernel_size)
    for i in range(merged):
        target[:, i, :, i] = source[:, i]
    return replace(conv, weight=target.reshape(out_channels, merged * depth, *conv.kernel_size), groups=groups)


def embed(conv: Conv, like: Conv) -> Conv:
    """Place a kernel inside the larger kernel of ``like``, where the pads say it belongs.

    Along each axis the branch's first tap lands on tap ``a = (P - p) / D`` of the target (``P``, ``p`` the left pads,
    ``D`` the target's dilation) and the right pads must agree with that. Equal output sizes are not enough: they can
    agree by luck for one input size.

    Raises:
        ReparamError: if strides, padding modes, dilations or pads have no such place.
    """
    if conv.stride != like.stride:
        raise ReparamError(
            f"branch strides {conv.stride} and {like.stride} differ", "give every branch the same stride"
        )
    padded = any(side for axis in conv.padding for side in axis)
    if padded and conv.padding_mode != like.padding_mode:
        raise ReparamError(
            f"branch padding modes {conv.padding_mode!r} and {like.padding_mode!r} differ",
            "give every branch the same padding_mode",
        )
    starts, steps = zip(*(_place(conv, like, axis) for axis in (0, 1)), strict=True)
    (rows, columns), (big_rows, big_columns) = conv.kernel_size, like.kernel_size
    weight = conv.weight.new_zeros(*conv.weight.shape[:2], big_rows, big_columns)
    row_taps = starts[0] + steps[0] * torch.arange(rows)
    column_taps = starts[1] + steps[1] * torch.arange(columns)
    weight[:, :, row_taps[:, None], column_taps[None, :]] = conv.weight
    return replace(conv, weight=weight, padding=like.padding, dilation=like.dilation, padding_mode=like.padding_mode)


def _place(conv: Conv, like: Conv, axis: int) -> Pair:
    """First tap of the target that a branch covers along one axis, and how many taps lie between two of its own."""
    kernel, target = conv.kernel_size[axis], like.kernel_size[axis]
    dilation = like.dilation[axis]
    step = 1
    if kernel > 1:
        step, rest = divmod(conv.dilation[axis], dilation)
        if step < 1 or rest:
            raise ReparamError(
                f"a branch of dilation {conv.dilation[axis]} has no place in a kernel of dilation {dilation}",
                "the branch's dilation must be a multiple of the largest kernel's",
            )
    (left, right), (big_left, big_right) = conv.padding[axis], like.padding[axis]
    start, rest = divmod(big_left - left, dilation)
    end = start + step * (kernel - 1)
    if rest or start < 0 or end > target - 1 or right != big_right - (target - 1 - end) * dilation:
        raise ReparamError(
            f"a branch of kernel {kernel}, dilation {conv.dilation[axis]}, padding {(left, right)} does not line up "
            f"with kernel {target}, dilation {dilation}, padding {(big_left, big_right)}",
            f"a centred branch needs padding = {big_left} - ({dilation} * {target - 1} - its dilation * "
            f"{kernel - 1}) / 2",
        )
    return start, step


def add(branches: Sequence[Conv]) -> Conv:
    """Sum parallel convolutions into one with the largest kernel among them.

    Raises:
        ReparamError: if no kernel holds all the others, or channels, strides, pads or groups do not fit.
    """
    largest = max(branches, key=lambda b: (b.kernel_size[0] * b.kernel_size[1], -b.groups))
    total_weight, total_bias = torch.zeros_like(largest.weight), torch.zeros_like(largest.bias)
    for branch in branches:
        channels = (branch.in_channels, branch.weight.shape[0])
        if channels != (largest.in_channels, largest.weight.shape[0]):
            raise ReparamError(
                f"a branch maps {channels[0]} to {channels[1]} channels, another {largest.in_channels} to "
                f"{largest.weight.shape[0]}",
                "only branches of equal channels can be summed; drop the identity branch where channels change",
            )
        if any(k > target for k, target in zip(branch.kernel_size, largest.kernel_size, strict=True)):
            raise ReparamError(
                f"a kernel {branch.kernel_size} does not fit into {largest.kernel_size}",
                "one branch must be at least as high and as wide as all others",
            )
        placed = regroup(embed(branch, largest), largest.groups)
        total_weight, total_bias = total_weight + placed.weight, total_bias + placed.bias
    return replace(largest, weight=total_weight, bias=total_bias)
