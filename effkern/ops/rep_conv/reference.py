"""Re-parameterized convolution in plain PyTorch: the op's definition, the tests' oracle, the fallback without C++."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from effkern.ops._autograd import activate, compute_dtype
from effkern.ops._handle import check_handle, handle_bytes, pack_conv_weight, unpack_conv_weight

__all__ = [
    "check_handle",
    "handle_bytes",
    "output_map",
    "pack_conv_weight",
    "rep_conv2d",
    "rep_conv2d_packed",
    "unpack_conv_weight",
]


def rep_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
    act: str = "relu",
    residual: Tensor | None = None,
    algo: str = "auto",
) -> Tensor:
    """``act(conv2d(x, weight) + bias + residual)``, computed in fp32 (fp64 for fp64 inputs) and rounded once."""
    math = compute_dtype(x)
    if weight.shape[0] == 0:  # aten has no convolution without outputs
        rows, columns = output_map(x.shape[2:], weight.shape[2:], stride, padding, dilation)
        return x.new_empty(x.shape[0], 0, rows, columns)
    z = F.conv2d(x.to(math), weight.to(math), None, tuple(stride), tuple(padding), tuple(dilation), groups)
    if bias is not None:
        z = z + bias.to(math).view(1, -1, 1, 1)
    if residual is not None:
        z = z + residual.to(math)
    return activate(z, act).to(x.dtype)


def output_map(
    size: Sequence[int], kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> tuple[int, int]:
    """Height and width of a convolution's output."""
    rows, columns = ((size[i] + 2 * padding[i] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1 for i in (0, 1))
    return rows, columns


def rep_conv2d_packed(
    x: Tensor,
    handle: Tensor,
    out_channels: int,
    kernel_size: Sequence[int],
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
    act: str = "relu",
    residual: Tensor | None = None,
    algo: str = "auto",
) -> Tensor:
    """:func:`rep_conv2d` with the weight and bias of a handle."""
    in_per_group = check_handle(handle, out_channels, kernel_size, groups)
    if x.shape[1] != in_per_group * groups:
        raise ValueError(
            f"rep_conv2d_packed: x must have {in_per_group * groups} channels (the weight's {in_per_group} x groups = "
            f"{groups}), got {x.shape[1]}"
        )
    weight, bias = unpack_conv_weight(handle, out_channels, in_per_group, kernel_size, groups)
    math = compute_dtype(x)
    wide = None if residual is None else residual.to(math)
    y = rep_conv2d(x.to(math), weight.to(math), bias, stride, padding, dilation, groups, act, wide)
    return y.to(x.dtype)
