"""Batch norms of parallel branches, their sum and a ReLU in Triton, and the gradient.

Forward: a branch's statistics in chunks that are split over programs and combined in order (Chan's formula, fp64), then
one pass that reads every branch and writes the output. No floating-point atomics: the same bits in every run. The
gradient is in `triton_gradient.py`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from effkern.ops import multi_branch_bn as op
from effkern.ops._triton.norms import SPLITS, Plan, _branches, _tile, alike, four
from effkern.ops.multi_branch_bn.triton_gradient import multi_branch_bn_add_relu_backward

__all__ = ["multi_branch_bn_add_relu", "multi_branch_bn_add_relu_backward"]

Tensors = Sequence[Tensor]


@triton.jit
def stats_kernel(
    x, partial, images, positions, channels, x_n, x_c, x_p, BP: tl.constexpr, BC: tl.constexpr
):  # fmt: skip
    """partial [splits, 3, C], fp64: number, mean and sum of squared deviations of a split's positions."""
    split, splits = tl.program_id(0), tl.num_programs(0)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    p = tl.arange(0, BP)
    strips = tl.cdiv(positions, BP)
    number = tl.zeros((BC,), tl.float64)
    mean = tl.zeros((BC,), tl.float64)
    squares = tl.zeros((BC,), tl.float64)
    for chunk in range(split, images * strips, splits):
        at = chunk % strips * BP + p
        mask = (at < positions)[:, None] & (c < channels)[None, :]
        base = tl.zeros((), tl.int64) + chunk // strips
        values = tl.load(x + base * x_n + at[:, None].to(tl.int64) * x_p + c[None, :].to(tl.int64) * x_c, mask=mask,
                         other=0.0).to(tl.float32)  # fmt: skip
        count = tl.minimum(positions - chunk % strips * BP, BP).to(tl.float32)
        average = tl.sum(values, 0) / count
        deviation = tl.where(mask, values - average[None, :], 0.0)
        # Of a rounded average: the sum of deviations says by how much it was off.
        off = tl.sum(deviation, 0).to(tl.float64) / count
        spread = tl.sum(deviation * deviation, 0).to(tl.float64) - off * off * count
        new = count.to(tl.float64)
        total = number + new
        step = average.to(tl.float64) + off - mean
        mean += step * (new / total)
        squares += spread + step * step * (number * new / total)
        number = total
    at = partial + split.to(tl.int64) * 3 * channels + c
    tl.store(at, number, mask=c < channels)
    tl.store(at + channels, mean, mask=c < channels)
    tl.store(at + 2 * channels, squares, mask=c < channels)


@triton.jit
def finish_kernel(
    partial, splits, running_mean, running_var, mean, invstd, new_mean, new_var, channels, momentum, eps,
    BC: tl.constexpr,
):  # fmt: skip
    """Statistics of a branch, from the partial ones (training) or the running ones, and the new running ones."""
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    mask = c < channels
    if partial is None:
        average = tl.load(running_mean + c, mask=mask, other=0.0).to(tl.float64)
        variance = tl.load(running_var + c, mask=mask, other=1.0).to(tl.float64)
    else:
        number = tl.zeros((BC,), tl.float64)
        average = tl.zeros((BC,), tl.float64)
        squares = tl.zeros((BC,), tl.float64)
        for split in range(0, splits):
            at = partial + split * 3 * channels + c
            new = tl.load(at, mask=mask, other=0.0)
            step = tl.load(at + channels, mask=mask, other=0.0) - average
            total = number + new
            share = tl.where(total > 0, new / tl.maximum(total, 1.0), 0.0)
            average += step * share
            squares += tl.load(at + 2 * channels, mask=mask, other=0.0) + step * step * number * share
            number = total
        variance = squares / tl.maximum(number, 1.0)
        if new_mean is not None:
            step = tl.where(number > 0, momentum, 0.0).to(tl.float64)  # an empty batch changes nothing
            unbiased = squares / tl.maximum(number - 1.0, 1.0)
            old = tl.load(running_mean + c, mask=mask, other=0.0).to(tl.float64)
            tl.store(new_mean + c, ((1.0 - step) * old + step * average).to(tl.float32), mask=mask)
            old = tl.load(running_var + c, mask=mask, other=0.0).to(tl.float64)
            tl.store(new_var + c, ((1.0 - step) * old + step * unbiased).to(tl.float32), mask=mask)
    tl.store(mean + c, average, mask=mask)
    tl.store(invstd + c, 1.0 / tl.sqrt(variance + eps), mask=mask)


@triton.jit
def apply_kernel(
    x0, x1, x2, x3, w0, w1, w2, w3, b0, b1, b2, b3, mean, invstd, y, positions, channels, y_n, y_c, y_p,
    RELU: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """All branches lie like y."""
    at, mask, c, runs = _tile(positions, channels, y_n, y_c, y_p, BP, BC)
    _, _, _, _, z = _branches(
        x0, x1, x2, x3, w0, w1, w2, w3, b0, b1, b2, b3, mean, invstd, at, c, mask, runs, channels, BP, BC
    )
    if RELU:
        z = tl.where(z <= 0, 0.0, z)  # NaN stays
    tl.store(y + at, z.to(y.dtype.element_ty), mask=mask)


def multi_branch_bn_add_relu(
    xs: Tensors, weight: Tensors, bias: Tensors, running_mean: Tensors, running_var: Tensors, training: bool,
    momentum: float, eps: float, relu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """``relu(sum of batch_norm(x, weight, bias))``, the statistics used and the new running ones."""
    outputs = op._fake(xs, weight, bias, running_mean, running_var, training, momentum, eps, relu)  # all checks
    y, mean, invstd, new_mean, new_var = outputs
    if y.size(1) == 0:
        return outputs
    plan, xs = Plan.of(y), alike(xs, y)
    tracked = new_mean.size(0) > 0
    splits = max(min(SPLITS, plan.strips()), 1)
    for i, x in enumerate(xs):
        partial = None
        if training:
            partial = torch.empty(splits, 3, plan.channels, dtype=torch.float64, device=y.device)
            stats_kernel[(splits, plan.blocks())](
                x, partial, plan.images, plan.positions, plan.channels, *plan.strides, BP=plan.tile[0],
                BC=plan.tile[1], num_warps=4, enable_fp_fusion=True,
            )  # fmt: skip
        old = (running_mean[i].contiguous(), running_var[i].contiguous()) if tracked or not training else (None, None)
        new = (new_mean[i], new_var[i]) if tracked else (None, None)
        finish_kernel[(-(-plan.channels // 64),)](
            partial, splits, *old, mean[i], invstd[i], *new, plan.channels, momentum, eps, BC=64, num_warps=2,
            enable_fp_fusion=True,
        )  # fmt: skip
    if y.numel() > 0:
        apply_kernel[(plan.strips(), plan.blocks())](
            *four(xs), *four(weight), *four(bias), mean, invstd, y, plan.positions, plan.channels, *plan.strides,
            RELU=relu, BP=plan.tile[0], BC=plan.tile[1], num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
    return outputs
