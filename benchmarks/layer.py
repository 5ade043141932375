"""One convolution with bias, residual and activation, as PyTorch users write it: what all contenders compute."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn


class ConvLayer(nn.Module):
    """``act(conv(x) + bias [+ residual])`` as an ordinary module, so that every peer can take it."""

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        act: str = "none",
    ) -> None:
        """Hold copies of ``weight`` [Co, Ci/groups, kh, kw] and ``bias`` [Co]; ``act`` as in the ops."""
        super().__init__()
        self.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False)
        self.stride, self.padding, self.dilation = (_pair(v) for v in (stride, padding, dilation))
        self.groups, self.act = groups, act

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """One conv, one sum, one activation, as three calls."""
        y = F.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)
        if residual is not None:
            y = y + residual
        return y if self.act == "none" else ACTIVATIONS[self.act](y)


# In place where eager PyTorch can save the memory traffic of a second map.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu_,
    "relu6": partial(F.relu6, inplace=True),
    "hardswish": partial(F.hardswish, inplace=True),
    "silu": partial(F.silu, inplace=True),
}


def _pair(value: int | tuple[int, int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[1])
