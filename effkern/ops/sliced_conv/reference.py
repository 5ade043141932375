"""Sliced convolution in plain PyTorch: any dtype, any device. The oracle of the tests; read it first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from effkern.ops._autograd import activate, compute_dtype
from effkern.ops._checks import check_finite
from effkern.ops._handle import check_handle, unpack_conv_weight
from effkern.ops._slices import check_slice, slice_bias, slice_weight
from effkern.ops.sliced_conv._checks import check_range


def sliced_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    c_out: int,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    group_mode: str,
    scale: Tensor | None,
    shift: Tensor | None,
    act: str,
    algo: str,
) -> Tensor:
    """``act((conv2d(x, the first x.size(1) x c_out channels of weight) + bias) * scale + shift)``."""
    check_finite(None if scale is None else scale[:c_out], "sliced_conv2d", "scale")
    dtype = compute_dtype(x)
    part, running = slice_weight(weight, x.size(1), c_out, groups, group_mode)
    if part.numel() == 0 or x.size(0) == 0:
        size = [(x.size(2 + i) + 2 * padding[i] - dilation[i] * (weight.size(2 + i) - 1) - 1) // stride[i] + 1
                for i in range(2)]  # fmt: skip
        z = x.new_zeros([x.size(0), c_out, *size], dtype=dtype)
    else:
        z = F.conv2d(x.to(dtype), part.to(dtype), None, tuple(stride), tuple(padding), tuple(dilation), running)
    if bias is not None:
        bias = slice_bias(bias, c_out, groups, group_mode)
    for vector, combine in ((bias, torch.add), (scale, torch.mul), (shift, torch.add)):
        if vector is not None:
            z = combine(z, vector[:c_out].to(dtype).view(1, -1, 1, 1))
    return activate(z, act).to(x.dtype)


def sliced_conv2d_ragged(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    c_in: Tensor,
    c_out: Tensor,
    c_out_max: int,
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
    zero_tail: bool,
    *,
    op: str = "sliced_conv2d_ragged",
) -> Tensor:
    """``sliced_conv2d`` of every sample at its own widths and row of the tables, zeros after ``c_out[n]`` always."""
    check_finite(None if scale_table is None else scale_table[:, :c_out_max], op, "scale_table")
    ins = check_range(c_in, min(x.size(1), weight.size(1) * groups), op, "c_in")
    outs = check_range(c_out, c_out_max, op, "c_out")
    tables = [t for t in (scale_table, shift_table) if t is not None]
    rows = [0] * x.size(0) if width_idx is None else check_range(width_idx, tables[0].size(0) - 1, op, "width_idx")
    h, w = ((x.size(2 + i) + 2 * padding[i] - dilation[i] * (weight.size(2 + i) - 1) - 1) // stride[i] + 1
            for i in range(2))  # fmt: skip
    samples = [x.new_zeros(0, c_out_max, h, w)]
    for n, (ci, co, row) in enumerate(zip(ins, outs, rows, strict=True)):
        check_slice(op, weight, ci, co, groups, group_mode, (f"c_in[{n}]", f"c_out[{n}]"))
        scale, shift = (None if t is None else t[row, :co] for t in (scale_table, shift_table))
        options = (stride, padding, dilation, groups, group_mode, scale, shift, act, algo)
        y = sliced_conv2d(x[n : n + 1, :ci], weight, bias, co, *options)
        samples.append(F.pad(y, (0, 0, 0, 0, 0, c_out_max - co)))
    return torch.cat(samples)


def sliced_conv2d_packed(
    x: Tensor, handle: Tensor, out_channels: int, kernel_size: Sequence[int], c_out: int, *options: Any
) -> Tensor:
    """``sliced_conv2d`` with the weight and bias of a handle; ``options`` from its ``stride`` on."""
    op, groups, group_mode = "sliced_conv2d_packed", options[3], options[4]
    in_per_group = check_handle(handle, out_channels, kernel_size, groups, op)
    weight, bias = unpack_conv_weight(handle, out_channels, in_per_group, kernel_size, groups)
    check_slice(op, weight, x.size(1), c_out, groups, group_mode)
    return sliced_conv2d(x, weight, bias, c_out, *options)


def sliced_conv2d_ragged_packed(
    x: Tensor, handle: Tensor, out_channels: int, kernel_size: Sequence[int], *options: Any
) -> Tensor:
    """``sliced_conv2d_ragged`` with the weight and bias of a handle; ``options`` from its ``c_in`` on."""
    op, groups = "sliced_conv2d_ragged_packed", options[6]
    in_per_group = check_handle(handle, out_channels, kernel_size, groups, op)
    weight, bias = unpack_conv_weight(handle, out_channels, in_per_group, kernel_size, groups)
    return sliced_conv2d_ragged(x, weight, bias, *options, op=op)


def sliced_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    out_features: int,
    scale: Tensor | None,
    shift: Tensor | None,
    act: str,
    algo: str,
) -> Tensor:
    """``act((x @ first out_features x x.size(1) part of weight, transposed + bias) * scale + shift)``."""
    check_finite(None if scale is None else scale[:out_features], "sliced_linear", "scale")
    dtype = compute_dtype(x)
    y = x.to(dtype) @ weight[:out_features, : x.size(1)].to(dtype).t()
    for vector, combine in ((bias, torch.add), (scale, torch.mul), (shift, torch.add)):
        if vector is not None:
            y = combine(y, vector[:out_features].to(dtype))
    return activate(y, act).to(x.dtype)


def sliced_linear_ragged(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    c_in: Tensor,
    c_out: Tensor,
    c_out_max: int,
    scale_table: Tensor | None,
    shift_table: Tensor | None,
    width_idx: Tensor | None,
    act: str,
    algo: str,
    zero_tail: bool,
) -> Tensor:
    """``sliced_conv2d_ragged`` with a 1x1 kernel on maps of one pixel."""
    x, weight = x[:, :, None, None], weight[:, :, None, None]
    geometry = ([1, 1], [0, 0], [1, 1], 1, "prefix_groups")
    tables = (scale_table, shift_table, width_idx)
    y = sliced_conv2d_ragged(
        x, weight, bias, c_in, c_out, c_out_max, *geometry, *tables, act, algo, zero_tail, op="sliced_linear_ragged"
    )
    return y[:, :, 0, 0]


def sliced_dw_pw(
    x: Tensor,
    dw_weight: Tensor,
    dw_bias: Tensor | None,
    pw_weight: Tensor,
    pw_bias: Tensor | None,
    c_out: int,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    dw_scale: Tensor | None,
    dw_shift: Tensor | None,
    dw_act: str,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    act: str,
    algo: str,
) -> Tensor:
    """``sliced_conv2d`` of the depthwise and of the pointwise weight; the residual is added before the last ``act``."""
    groups, dtype = dw_weight.size(0), compute_dtype(x)
    maps = sliced_conv2d(
        x, dw_weight, dw_bias, x.size(1), stride, padding, dilation, groups, "prefix_groups", dw_scale, dw_shift,
        dw_act, algo,
    )  # fmt: skip
    point = ([1, 1], [0, 0], [1, 1], 1, "prefix_groups")
    z = sliced_conv2d(maps.to(dtype), pw_weight.to(dtype), pw_bias, c_out, *point, scale, shift, "none", algo)
    if residual is not None:
        z = z + residual.to(dtype)
    return activate(z, act).to(x.dtype)


def sliced_dw_pw_packed(
    x: Tensor,
    dw_handle: Tensor,
    pw_handle: Tensor,
    channels: int,
    kernel_size: Sequence[int],
    out_channels: int,
    *options: Any,
) -> Tensor:
    """``sliced_dw_pw`` with the weights and biases of two handles; ``options`` from its ``c_out`` on."""
    op = "sliced_dw_pw_packed"
    check_handle(dw_handle, channels, kernel_size, channels, op)
    inputs = check_handle(pw_handle, out_channels, [1, 1], 1, op)
    dw_weight, dw_bias = unpack_conv_weight(dw_handle, channels, 1, kernel_size, channels)
    pw_weight, pw_bias = unpack_conv_weight(pw_handle, out_channels, inputs, [1, 1], 1)
    check_slice(op, pw_weight, x.size(1), options[0], 1, "prefix_groups")
    return sliced_dw_pw(x, dw_weight, dw_bias, pw_weight, pw_bias, *options)
