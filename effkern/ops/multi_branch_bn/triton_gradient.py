"""The gradient of `multi_branch_bn_add_relu` in Triton: one pass for the sums, one for the branches' gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from effkern.ops import multi_branch_bn as op
from effkern.ops._registry import empty_like_layout
from effkern.ops._triton.norms import SPLITS, Plan, _branches, _tile, alike, four

Tensors = Sequence[Tensor]


@triton.jit
def _activated(grad, z, at, mask, RELU: tl.constexpr):
    """The gradient at the sum of branches. As torch: NaN lets it through, a clipped value gives 0."""
    g = tl.load(grad + at, mask=mask, other=0.0).to(tl.float32)
    if RELU:
        g = tl.where(z <= 0, 0.0, g)
    return g


@triton.jit
def sums_kernel(
    grad, x0, x1, x2, x3, w0, w1, w2, w3, b0, b1, b2, b3, mean, invstd, partial, images, positions, channels,
    y_n, y_c, y_p, BRANCHES: tl.constexpr, RELU: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """partial [splits, 1 + branches, C], fp64: sums of the gradient, and of it times each normalized branch."""
    split, splits = tl.program_id(0), tl.num_programs(0)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    p = tl.arange(0, BP)
    runs = c < channels
    strips = tl.cdiv(positions, BP)
    total = tl.zeros((BC,), tl.float64)
    t0 = tl.zeros((BC,), tl.float64)
    t1 = tl.zeros((BC,), tl.float64)
    t2 = tl.zeros((BC,), tl.float64)
    t3 = tl.zeros((BC,), tl.float64)
    for chunk in range(split, images * strips, splits):
        position = chunk % strips * BP + p
        mask = (position < positions)[:, None] & runs[None, :]
        base = tl.zeros((), tl.int64) + chunk // strips
        at = base * y_n + position[:, None].to(tl.int64) * y_p + c[None, :].to(tl.int64) * y_c
        h0, h1, h2, h3, z = _branches(
            x0, x1, x2, x3, w0, w1, w2, w3, b0, b1, b2, b3, mean, invstd, at, c, mask, runs, channels, BP, BC
        )
        g = _activated(grad, z, at, mask, RELU)
        total += tl.sum(g, 0).to(tl.float64)
        t0 += tl.sum(tl.where(mask, g * h0, 0.0), 0).to(tl.float64)
        if BRANCHES > 1:
            t1 += tl.sum(tl.where(mask, g * h1, 0.0), 0).to(tl.float64)
        if BRANCHES > 2:
            t2 += tl.sum(tl.where(mask, g * h2, 0.0), 0).to(tl.float64)
        if BRANCHES > 3:
            t3 += tl.sum(tl.where(mask, g * h3, 0.0), 0).to(tl.float64)
    at = partial + tl.cast(split, tl.int64) * (1 + BRANCHES) * channels + c
    tl.store(at, total, mask=runs)
    tl.store(at + channels, t0, mask=runs)
    if BRANCHES > 1:
        tl.store(at + 2 * channels, t1, mask=runs)
    if BRANCHES > 2:
        tl.store(at + 3 * channels, t2, mask=runs)
    if BRANCHES > 3:
        tl.store(at + 4 * channels, t3, mask=runs)


@triton.jit
def _store_dx(dx, g, hat, weight, sums, i, at, invstd, share, c, mask, runs, channels):
    """``a * (g - (sum(g) + hat * sum(g * hat)) / m)``; share is 1 / m in training, else 0."""
    scale = tl.load(weight + c, mask=runs, other=0.0).to(tl.float32)
    scale *= tl.load(invstd + i * channels + c, mask=runs, other=0.0).to(tl.float32)
    plain = (tl.load(sums + c, mask=runs, other=0.0) * share).to(tl.float32)
    slope = (tl.load(sums + (1 + i) * channels + c, mask=runs, other=0.0) * share).to(tl.float32)
    value = scale[None, :] * (g - plain[None, :] - hat * slope[None, :])
    tl.store(dx + at, value.to(dx.dtype.element_ty), mask=mask)


@triton.jit
def dx_kernel(
    grad, x0, x1, x2, x3, w0, w1, w2, w3, b0, b1, b2, b3, mean, invstd, sums, share, d0, d1, d2, d3,
    positions, channels, y_n, y_c, y_p, RELU: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """d0 to d3: None where a branch wants no gradient."""
    at, mask, c, runs = _tile(positions, channels, y_n, y_c, y_p, BP, BC)
    h0, h1, h2, h3, z = _branches(
        x0, x1, x2, x3, w0, w1, w2, w3, b0, b1, b2, b3, mean, invstd, at, c, mask, runs, channels, BP, BC
    )
    g = _activated(grad, z, at, mask, RELU)
    if d0 is not None:
        _store_dx(d0, g, h0, w0, sums, 0, at, invstd, share, c, mask, runs, channels)
    if d1 is not None:
        _store_dx(d1, g, h1, w1, sums, 1, at, invstd, share, c, mask, runs, channels)
    if d2 is not None:
        _store_dx(d2, g, h2, w2, sums, 2, at, invstd, share, c, mask, runs, channels)
    if d3 is not None:
        _store_dx(d3, g, h3, w3, sums, 3, at, invstd, share, c, mask, runs, channels)


def multi_branch_bn_add_relu_backward(
    grad: Tensor, xs: Tensors, weight: Tensors, bias: Tensors, mean: Tensor, invstd: Tensor, training: bool,
    relu: bool, needs: Sequence[bool],
) -> tuple[list[Tensor], Tensor, Tensor]:  # fmt: skip
    """Gradients at the branches that ``needs`` names, at the weights and at a bias."""
    dxs, dweight, dbias = op._fake_backward(grad, xs, weight, bias, mean, invstd, training, relu, needs)
    y = empty_like_layout(xs[0], xs[0].shape)  # how every dx lies; not written
    if y.numel() == 0:
        return [d.zero_() for d in dxs], dweight.zero_(), dbias.zero_()
    plan, b = Plan.of(y), len(xs)
    (grad,), xs = alike([grad], y), alike(xs, y)
    mean, invstd = mean.contiguous(), invstd.contiguous()
    splits = min(SPLITS, plan.strips())
    partial = torch.empty(splits, 1 + b, plan.channels, dtype=torch.float64, device=y.device)
    branches = (grad, *four(xs), *four(weight), *four(bias), mean, invstd)
    constants = {"RELU": relu, "BP": plan.tile[0], "BC": plan.tile[1], "num_warps": 4}
    sums_kernel[(splits, plan.blocks())](
        *branches, partial, plan.images, plan.positions, plan.channels, *plan.strides, BRANCHES=b, **constants,
        enable_fp_fusion=True,
    )  # fmt: skip
    sums = partial.sum(0)
    dbias.copy_(sums[0])
    dweight.copy_(sums[1:])
    if any(needs):
        share = 1 / (plan.images * plan.positions) if training else 0.0
        wanted = [d if need else None for d, need in zip(dxs, needs, strict=True)]
        dx_kernel[(plan.strips(), plan.blocks())](
            *branches, sums, share, *wanted, *[None] * (4 - b), plan.positions, plan.channels, *plan.strides,
            **constants, enable_fp_fusion=True,
        )  # fmt: skip
    return dxs, dweight, dbias
