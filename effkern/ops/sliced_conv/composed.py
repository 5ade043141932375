"""The forms for handles and the chain as calls of the sliced convolutions: what runs on CUDA, where no kernel reads a
handle. Every call lays the weights out anew, in x's dtype.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from effkern.ops._handle import check_handle, weight_of
from effkern.ops._slices import check_slice
from effkern.ops.sliced_conv.steps import AttentionStep, SlicedStep, read_steps

Ints = Sequence[int]
_POINT = ([1, 1], [0, 0], [1, 1], 1, "prefix_groups")


def sliced_conv2d_packed(
    x: Tensor, handle: Tensor, out_channels: int, kernel_size: Ints, c_out: int, *options: Any
) -> Tensor:
    """``options`` from ``stride`` on."""
    op, groups, group_mode = "sliced_conv2d_packed", options[3], options[4]
    depth = check_handle(handle, out_channels, kernel_size, groups, op)
    weight, bias = weight_of(handle, (out_channels, depth, *kernel_size), groups, x.dtype)
    check_slice(op, weight, x.size(1), c_out, groups, group_mode)
    return torch.ops.effkern.sliced_conv2d(x, weight, bias, c_out, *options)


def sliced_conv2d_ragged_packed(
    x: Tensor, handle: Tensor, out_channels: int, kernel_size: Ints, *options: Any
) -> Tensor:
    """``options`` from ``c_in`` on."""
    depth = check_handle(handle, out_channels, kernel_size, options[6], "sliced_conv2d_ragged_packed")
    weight, bias = weight_of(handle, (out_channels, depth, *kernel_size), options[6], x.dtype)
    return torch.ops.effkern.sliced_conv2d_ragged(x, weight, bias, *options)


def sliced_dw_pw_packed(
    x: Tensor, dw_handle: Tensor, pw_handle: Tensor, channels: int, kernel_size: Ints, out_channels: int, *options: Any
) -> Tensor:
    """``options`` from ``c_out`` on."""
    op = "sliced_dw_pw_packed"
    check_handle(dw_handle, channels, kernel_size, channels, op)
    inputs = check_handle(pw_handle, out_channels, [1, 1], 1, op)
    dw_weight, dw_bias = weight_of(dw_handle, (channels, 1, *kernel_size), channels, x.dtype)
    pw_weight, pw_bias = weight_of(pw_handle, (out_channels, inputs, 1, 1), 1, x.dtype)
    check_slice(op, pw_weight, x.size(1), options[0], 1, "prefix_groups")
    return torch.ops.effkern.sliced_dw_pw(x, dw_weight, dw_bias, pw_weight, pw_bias, *options)


def _chosen(index: Tensor, values: Ints) -> Tensor:
    """``values[index]``. The list is one of the host's, and to copy it to the device would wait."""
    result = torch.full_like(index, values[0])
    for i, value in enumerate(values[1:], 1):
        result.masked_fill_(index == i, value)
    return result


def sliced_chain(
    x: Tensor, handles: Sequence[Tensor], tables: Sequence[Tensor], width_idx: Tensor, steps: Ints
) -> Tensor:
    """Step by step for the whole batch, in x's dtype."""
    configurations, chain = read_steps(steps)
    index = width_idx.clamp(0, configurations - 1)
    first = torch.zeros_like(index)

    def convolve(
        v: Tensor, handle: int, shape: Ints, groups: int, c_in: Tensor, widths: Ints, geometry: Sequence[Ints],
        pair: Sequence[Tensor], act: str,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        check_handle(handles[handle], shape[0], shape[2:], groups, "sliced_chain")
        weight, bias = weight_of(handles[handle], shape, groups, x.dtype)
        c_out, most = _chosen(index, widths), max(widths)
        scale, shift = pair or (None, None)
        row = None if scale is None else index if scale.size(0) > 1 else first
        y = torch.ops.effkern.sliced_conv2d_ragged(
            v, weight, bias, c_in, c_out, most, *geometry, groups, "prefix_groups", scale, shift, row, act, "auto", True
        )
        return y, c_out

    v, running = x, torch.full_like(index, x.size(1))
    widths: Ints = [x.size(1)] * configurations
    for step in chain:
        if isinstance(step, SlicedStep):
            pair = tables[2 * step.table : 2 * step.table + 2] if step.table >= 0 else ()
            geometry = (step.stride, step.padding, step.dilation)
            v, running = convolve(
                v, step.handle, step.weight_shape, step.groups, running, step.widths, geometry, pair, step.act
            )
            widths = step.widths
        elif isinstance(step, AttentionStep):
            one, hidden = _POINT[:3], [step.hidden] * configurations
            means = v.mean((2, 3), keepdim=True)
            h, inner = convolve(
                means, step.reduce, (step.hidden, step.channels, 1, 1), 1, running, hidden, one, (), "relu"
            )
            gate, _ = convolve(h, step.expand, (step.channels, step.hidden, 1, 1), 1, inner, widths, one, (), "none")
            v = v * gate.sigmoid()
        else:
            v = v.mean((2, 3), keepdim=True)
    return v
