"""Tensors as the kernels take them: channels innermost."""

from __future__ import annotations

import torch
from torch import Tensor


def pixels(x: Tensor) -> Tensor:
    """The map itself if its channels lie side by side, else a channels_last copy."""
    return x if x.size(1) <= 1 or x.stride(1) == 1 else pixels_copy(x)


def taps(weight: Tensor) -> Tensor:
    """The weight itself if its channels lie side by side and its taps in a row, else a channels_last copy."""
    kh, kw = weight.shape[2:]
    in_row = kh == 1 or kw == 1 or weight.stride(2) == kw * weight.stride(3)
    return weight if in_row and (weight.size(1) <= 1 or weight.stride(1) == 1) else pixels_copy(weight)


def pixels_copy(x: Tensor) -> Tensor:
    """As channels_last, in new memory."""
    return torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last).copy_(x)


def check_pixels(y: Tensor) -> None:
    """Rows of a kernel are numbered in 32 bits, and the last tile may reach past the last pixel."""
    n, _, height, width = y.shape
    if n * height * width >= 2**31 - 2**16:
        raise ValueError(f"the output must have fewer than 2**31 - 2**16 pixels on the GPU, got {list(y.shape)}")


def channels_inside(y: Tensor) -> bool:
    """Whether memory holds ``[n, h, w, c]`` without gaps."""
    return y.permute(0, 2, 3, 1).is_contiguous()


def dense_like(y: Tensor) -> Tensor:
    """What a kernel writes for an output: the output itself, or a map ``[n, h, w, c]`` to be copied to it."""
    return y if channels_inside(y) else y.new_empty(y.shape[0], *y.shape[2:], y.shape[1]).permute(0, 3, 1, 2)


def vector(v: Tensor | None) -> Tensor | None:
    """A short vector or table whose rows have no gaps between elements."""
    return None if v is None else v.contiguous()
