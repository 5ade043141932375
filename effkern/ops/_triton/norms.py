"""What batch norms and their gradient share: how maps are walked, and a branch's normalized values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from effkern.ops._triton.tensors import channels_inside

Tensors = Sequence[Tensor]
#: Programs that share the chunks of a block of channels.
SPLITS = 64


@triton.jit
def _hat(x, at, mean, invstd, c, mask, runs):
    """The normalized values of a branch. Means are fp64: their fp32 rounding is taken off as well."""
    average = tl.load(mean + c, mask=runs, other=0.0)
    high = average.to(tl.float32)
    low = (average - high.to(tl.float64)).to(tl.float32)
    scale = tl.load(invstd + c, mask=runs, other=0.0).to(tl.float32)
    values = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    return (values - high[None, :] - low[None, :]) * scale[None, :]


@triton.jit
def _affine(z, hat, weight, bias, c, runs):
    factor = tl.load(weight + c, mask=runs, other=0.0).to(tl.float32)
    offset = tl.load(bias + c, mask=runs, other=0.0).to(tl.float32)
    return z + hat * factor[None, :] + offset[None, :]


@dataclass(frozen=True)
class Plan:
    """How maps of one shape are walked: ``images`` planes of ``positions``, and strides of both and of channels."""

    images: int
    positions: int
    channels: int
    strides: tuple[int, int, int]  # of an image, a channel, a position
    tile: tuple[int, int]  # positions and channels

    @staticmethod
    def of(y: Tensor) -> Plan:
        n, c, h, w = y.shape
        if channels_inside(y):  # one plane of all positions
            wide = min(triton.next_power_of_2(c), 64)
            return Plan(1, n * h * w, c, (0, 1, c), (2048 // wide, wide))
        return Plan(n, h * w, c, (c * h * w, h * w, 1), (512, 4))

    def strips(self) -> int:
        return self.images * -(-self.positions // self.tile[0])

    def blocks(self) -> int:
        return -(-self.channels // self.tile[1])


def alike(xs: Tensors, y: Tensor) -> list[Tensor]:
    """The branches as y lies, copied only where they do not."""
    same = (x.stride() == y.stride() for x in xs)
    return [x if s else torch.empty_strided(y.shape, y.stride(), dtype=x.dtype, device=x.device).copy_(x)
            for x, s in zip(xs, same, strict=True)]  # fmt: skip


def four(tensors: Tensors) -> list[Tensor | None]:
    vectors = [t.contiguous() if t.dim() == 1 else t for t in tensors]
    return [*vectors, *[None] * (4 - len(vectors))]
