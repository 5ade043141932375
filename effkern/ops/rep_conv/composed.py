"""`rep_conv2d_packed` as a call of `rep_conv2d`: what runs on CUDA, where no kernel reads a handle.

Every call lays the weight out anew, in x's dtype: two or three passes over it that a call with the weight itself does
not need.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from effkern.ops._handle import check_handle, weight_of

Ints = Sequence[int]


def rep_conv2d_packed(
    x: Tensor, handle: Tensor, out_channels: int, kernel_size: Ints, stride: Ints, padding: Ints, dilation: Ints,
    groups: int, act: str, residual: Tensor | None, algo: str,
) -> Tensor:  # fmt: skip
    depth = check_handle(handle, out_channels, kernel_size, groups)
    weight, bias = weight_of(handle, (out_channels, depth, *kernel_size), groups, x.dtype)
    return torch.ops.effkern.rep_conv2d(x, weight, bias, stride, padding, dilation, groups, act, residual, algo)
