"""Pieces of gradient formulas, made of differentiable ATen calls so that double backward follows."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def activate(z: Tensor, act: str) -> Tensor:
    """The epilogue's activation in plain PyTorch."""
    if act == "relu":
        return F.relu(z)
    if act == "relu6":
        return F.relu6(z)
    if act == "hardswish":
        return F.hardswish(z)
    if act == "silu":
        return F.silu(z)
    return z


def compute_dtype(x: Tensor) -> torch.dtype:
    """Math is fp32 for 16-bit storage; fp32 and (in references) fp64 stay."""
    return torch.float32 if x.dtype in (torch.bfloat16, torch.float16) else x.dtype


def activation_backward(grad: Tensor, y: Tensor, pre: Callable[[], Tensor], act: str) -> Tensor:
    """Gradient at the activation's input.

    Args:
        grad: gradient at the output, fp32.
        y: output. Decides the clipped regions of relu and relu6.
        pre: recomputes the activation's input, for hardswish and silu; not called otherwise.
        act: name of the activation.
    """
    # As torch does it: a NaN output lets the gradient through, a clipped one gives 0 whatever the gradient is.
    if act == "relu":
        return torch.where(y <= 0, 0.0, grad)
    if act == "relu6":
        return torch.where((y <= 0) | (y >= 6), 0.0, grad)
    if act == "hardswish":
        z = pre()
        slope = torch.where(z < -3, torch.zeros_like(z), torch.where(z <= 3, z / 3 + 0.5, torch.ones_like(z)))
        return grad * slope
    if act == "silu":
        z = pre()
        gate = torch.sigmoid(z)
        return grad * (gate * (1 + z * (1 - gate)))
    return grad


def channel_sum(grad: Tensor) -> Tensor:
    """Sum over everything but the channel, ``[N, C, H, W] -> [C]``."""
    return grad.sum((0, 2, 3))
