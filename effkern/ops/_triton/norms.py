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


@triton.jit
def _tile(positions, channels, y_n, y_c, y_p, BP: tl.constexpr, BC: tl.constexpr):
    """Where the elements of a program lie, whether they are there, its channels, and whether those are there."""
    strips = tl.cdiv(positions, BP)
    base = (tl.program_id(0) // strips).to(tl.int64) * y_n
    p = tl.program_id(0) % strips * BP + tl.arange(0, BP)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    runs = c < channels
    mask = (p < positions)[:, None] & runs[None, :]
    return base + p[:, None].to(tl.int64) * y_p + c[None, :].to(tl.int64) * y_c, mask, c, runs


@triton.jit
def _branches(
    x0, x1, x2, x3, w0, w1, w2, w3, b0, b1, b2, b3, mean, invstd, at, c, mask, runs, channels,
    BP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Their normalized values, those of the first for branches that are None, and the sum of all before ReLU."""
    h0 = _hat(x0, at, mean, invstd, c, mask, runs)
    z = _affine(tl.zeros((BP, BC), tl.float32), h0, w0, b0, c, runs)
    h1, h2, h3 = h0, h0, h0
    if x1 is not None:
        h1 = _hat(x1, at, mean + channels, invstd + channels, c, mask, runs)
        z = _affine(z, h1, w1, b1, c, runs)
    if x2 is not None:
        h2 = _hat(x2, at, mean + 2 * channels, invstd + 2 * channels, c, mask, runs)
        z = _affine(z, h2, w2, b2, c, runs)
    if x3 is not None:
        h3 = _hat(x3, at, mean + 3 * channels, invstd + 3 * channels, c, mask, runs)
        z = _affine(z, h3, w3, b3, c, runs)
    return h0, h1, h2, h3, z


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
