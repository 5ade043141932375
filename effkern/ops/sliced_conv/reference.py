"""Sliced convolution in plain PyTorch: any dtype, any device. The oracle of the tests; read it first."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from effkern.ops._autograd import activate, compute_dtype
from effkern.ops._checks import check_finite


def slice_weight(weight: Tensor, c_in: int, c_out: int, groups: int, group_mode: str) -> tuple[Tensor, int]:
    """The running part of a weight and the number of groups it runs with.

    Without groups the first ``c_out x c_in`` part. ``prefix_groups``: channels per group are fixed and the first
    ``c_in / in_per_group`` groups run. ``within_group``: every group runs, with a prefix inside.
    """
    if groups == 1:
        return weight[:c_out, :c_in], 1
    if group_mode == "prefix_groups":
        return weight[:c_out], c_in // weight.size(1)
    per_group = weight.unflatten(0, (groups, weight.size(0) // groups))
    return per_group[:, : c_out // groups, : c_in // groups].flatten(0, 1), groups


def unslice_weight(part: Tensor, weight: Tensor, c_in: int, c_out: int, groups: int, group_mode: str) -> Tensor:
    """Puts a gradient of the running part into zeros of the whole weight's shape: the transpose of ``slice_weight``."""
    outs, ins = weight.size(0), weight.size(1)
    if groups == 1:
        return F.pad(part, (0, 0, 0, 0, 0, ins - c_in, 0, outs - c_out))
    if group_mode == "prefix_groups":
        return F.pad(part, (0, 0, 0, 0, 0, 0, 0, outs - c_out))
    part = part.unflatten(0, (groups, c_out // groups))
    return F.pad(part, (0, 0, 0, 0, 0, ins - c_in // groups, 0, (outs - c_out) // groups)).flatten(0, 1)


def sliced_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    c_out: int,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    group_mode: str,
    scale: Tensor | None,
    shift: Tensor | None,
    act: str,
    algo: str,
) -> Tensor:
    """``act((conv2d(x, the first x.size(1) x c_out channels of weight) + bias) * scale + shift)``."""
    check_finite(scale, "sliced_conv2d", "scale")
    dtype = compute_dtype(x)
    part, running = slice_weight(weight, x.size(1), c_out, groups, group_mode)
    if part.numel() == 0 or x.size(0) == 0:
        size = [(x.size(2 + i) + 2 * padding[i] - dilation[i] * (weight.size(2 + i) - 1) - 1) // stride[i] + 1
                for i in range(2)]  # fmt: skip
        z = x.new_zeros([x.size(0), c_out, *size], dtype=dtype)
    else:
        z = F.conv2d(x.to(dtype), part.to(dtype), None, tuple(stride), tuple(padding), tuple(dilation), running)
    for vector, combine in ((bias, torch.add), (scale, torch.mul), (shift, torch.add)):
        if vector is not None:
            z = combine(z, vector[:c_out].to(dtype).view(1, -1, 1, 1))
    return activate(z, act).to(x.dtype)
