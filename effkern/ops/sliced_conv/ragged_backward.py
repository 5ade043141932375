"""Gradients of the ragged ops, a width class after another (C++ twin: ``csrc/sliced_conv/ragged_backward_cpu.cpp``)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from effkern.ops._autograd import activation_backward, channel_sum, compute_dtype
from effkern.ops._conv_backward import conv_gradients
from effkern.ops._registry import Op, empty_like_layout
from effkern.ops._slices import unslice_bias
from effkern.ops.sliced_conv import reference


def reference_backward(
    grad: Tensor,
    y: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    c_in: Tensor,
    c_out: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    group_mode: str,
    scale_table: Tensor | None,
    shift_table: Tensor | None,
    width_idx: Tensor | None,
    act: str,
    algo: str,
    needs: Sequence[bool],
) -> tuple[Tensor, ...]:
    """Gradients in x, weight, bias, scale_table and shift_table: full size, zero outside the prefixes that ran.

    Classes come in ascending (c_out, c_in), samples of a class in index order: the sums have one order. The native
    kernel sums a class's weight gradient by blocks of pixels as the uniform one does, and tables over samples in order.
    """
    dtype = compute_dtype(x)
    inputs = (x, weight, bias, scale_table, shift_table)
    total = [
        torch.zeros(t.shape if t is not None and need else (0,), dtype=dtype, device=x.device)
        for t, need in zip(inputs, needs, strict=True)
    ]
    g_x, g_weight, g_bias, g_scale, g_shift = total

    for (ci, co), samples in _classes(c_in, c_out).items():
        rows = torch.tensor(samples, device=x.device)
        xs, g = x[rows, :ci].to(dtype), grad[rows, :co].to(dtype)

        def table_rows(table: Tensor | None, rows: Tensor = rows, co: int = co) -> Tensor | None:
            return None if table is None or width_idx is None else table[width_idx[rows], :co, None, None].to(dtype)

        scale, shift = table_rows(scale_table), table_rows(shift_table)
        z = None
        if needs[3] or act in ("hardswish", "silu"):  # all else can be told from y
            options = (co, stride, padding, dilation, groups, group_mode, None, None, "none", algo)
            z = reference.sliced_conv2d(xs, weight.to(dtype), bias, *options)

        def pre(z: Tensor | None = z, scale: Tensor | None = scale, shift: Tensor | None = shift) -> Tensor:
            assert z is not None
            z = z if scale is None else z * scale
            return z if shift is None else z + shift

        g = activation_backward(g, y[rows, :co], pre, act)
        if needs[4] and width_idx is not None:
            g_shift[:, :co].index_add_(0, width_idx[rows], g.sum((2, 3)))
        if needs[3] and width_idx is not None and z is not None:
            g_scale[:, :co].index_add_(0, width_idx[rows], (g * z).sum((2, 3)))
        if scale is not None:
            g = g * scale
        if needs[2]:
            g_bias += unslice_bias(channel_sum(g), g_bias.size(0), groups, group_mode)
        gx, gw = conv_gradients(
            g, xs, weight.to(dtype), stride, padding, dilation, groups, (needs[0], needs[1]), group_mode
        )
        if gx is not None:
            g_x[rows, :ci] = gx
        if gw is not None:
            g_weight += gw
    return tuple(g if t is None else g.to(t.dtype) for g, t in zip(total, inputs, strict=True))


def _classes(c_in: Tensor, c_out: Tensor) -> dict[tuple[int, int], list[int]]:
    """Samples of every (c_in, c_out) pair, by ascending (c_out, c_in). Pairs that computed nothing are left out."""
    classes: dict[tuple[int, int], list[int]] = {}
    for n, pair in enumerate(zip(c_in.tolist(), c_out.tolist(), strict=True)):
        if pair[1] > 0:
            classes.setdefault(pair, []).append(n)
    return dict(sorted(classes.items(), key=lambda item: item[0][::-1]))


def _fake(grad: Tensor, y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, *options: Any) -> tuple[Tensor, ...]:
    *_, scale_table, shift_table, _, _, _, needs = options
    dtype = compute_dtype(x)
    grads = []
    for t, need in zip((x, weight, bias, scale_table, shift_table), needs, strict=True):
        shape = t.shape if t is not None and need else (0,)
        grads.append(torch.empty(shape, dtype=dtype if t is None else t.dtype, device=x.device))
    return (empty_like_layout(x, x.shape) if needs[0] else grads[0], *grads[1:])


def _refuse(ctx: Any, *grads: Tensor) -> tuple:
    raise RuntimeError("double backward of sliced_conv2d_ragged is not supported")


ragged_backward = Op(
    "sliced_conv2d_ragged_backward",
    "(Tensor grad, Tensor y, Tensor x, Tensor weight, Tensor? bias, Tensor c_in, Tensor c_out, int[] stride, "
    "int[] padding, int[] dilation, int groups, str group_mode, Tensor? scale_table, Tensor? shift_table, "
    "Tensor? width_idx, str act, str algo, bool[] needs) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    fake=_fake,
    reference=reference_backward,
    setup_context=lambda ctx, inputs, output: None,
    backward=_refuse,
)
