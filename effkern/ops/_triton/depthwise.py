"""Depthwise convolution: a tile of pixels of one sample times a tile of channels, no products of matrices."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from effkern.ops._triton.pieces import activate
from effkern.ops._triton.tensors import check_pixels


@triton.jit
def depthwise_kernel(
    x, weight, y, bias, scale, shift, residual, c_ins, c_outs, table_row,
    height, width, out_height, out_width, channels, columns, x_n, x_h, x_w, w_row, w_h, w_w,
    residual_n, residual_h, residual_w, table_n, table_rows, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w,
    KH: tl.constexpr, KW: tl.constexpr, ACT: tl.constexpr,
    ZERO: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """
    channels: that run. c_ins, c_outs: with them each sample runs the smaller of its two widths.
    columns: channels of the output, zero (unwritten without ZERO) from those that run on.
    """
    pixels = out_height * out_width
    tiles = tl.cdiv(columns, BC)
    strips = tl.cdiv(pixels, BM)
    sample = tl.program_id(0) // tiles // strips
    m = tl.program_id(0) // tiles % strips * BM + tl.arange(0, BM)
    c = tl.program_id(0) % tiles * BC + tl.arange(0, BC)
    exists = m < pixels
    row, column = m // out_width, m % out_width
    base = sample.to(tl.int64)
    runs = c < channels
    active, there = runs, exists
    if c_ins is not None:
        # Loads leave out whole tiles only: a mask inside of a line would cut it into single elements.
        held = tl.minimum(tl.load(c_ins + base), tl.load(c_outs + base))
        active = runs & (c < held)
        there = exists & (tl.zeros((BM,), tl.int32) + tl.program_id(0) % tiles * BC < held)
    top, left = row * stride_h - pad_h, column * stride_w - pad_w
    x_at = x + tl.expand_dims(base * x_n + top.to(tl.int64) * x_h + left.to(tl.int64) * x_w, 1) + tl.expand_dims(c, 0)
    w_at = weight + c.to(tl.int64) * w_row
    acc = tl.zeros((BM, BC), tl.float32)
    zero = tl.zeros((), tl.int64)
    for i in range(KH):
        for j in range(KW):
            dh, dw = i * dilation_h, j * dilation_w
            inside = there & (top + dh >= 0) & (top + dh < height) & (left + dw >= 0) & (left + dw < width)
            mask = inside[:, None] & runs[None, :]
            a = tl.load(x_at + ((zero + dh) * x_h + (zero + dw) * x_w), mask=mask, other=0.0).to(tl.float32)
            b = tl.load(w_at + ((zero + i) * w_h + (zero + j) * w_w), mask=runs, other=0.0).to(tl.float32)
            # A tap outside adds nothing, also where the weight is not finite: padding is no zero that is multiplied.
            acc += tl.where(mask, a * b[None, :], 0.0)
    if bias is not None:
        acc += tl.load(bias + c, mask=runs, other=0.0).to(tl.float32)[None, :]
    table_at = c
    if table_row is not None:
        table = tl.load(table_row + base)
        table_at = tl.minimum(tl.maximum(table, 0), table_rows - 1).to(tl.int64) * table_n + c
    if scale is not None:
        acc *= tl.load(scale + table_at, mask=runs, other=0.0).to(tl.float32)[None, :]
    if shift is not None:
        acc += tl.load(shift + table_at, mask=runs, other=0.0).to(tl.float32)[None, :]
    stored = exists[:, None] & ((c < columns) if ZERO else active)[None, :]
    if residual is not None:
        at = base * residual_n + row.to(tl.int64) * residual_h + column.to(tl.int64) * residual_w
        acc += tl.load(residual + tl.expand_dims(at, 1) + tl.expand_dims(c, 0), mask=stored, other=0.0).to(tl.float32)
    acc = tl.where(active[None, :], activate(acc, ACT), 0.0)
    y_at = y + tl.expand_dims((base * pixels + m) * columns, 1) + tl.expand_dims(c, 0)
    tl.store(y_at, acc.to(y.dtype.element_ty), mask=stored)


def depthwise(
    x: Tensor,
    weight: Tensor,
    y: Tensor,
    geometry: tuple[list[int], list[int], list[int]],
    *,
    channels: int,
    act: str = "none",
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
    widths: tuple[Tensor, Tensor, Tensor | None] | None = None,
    zero: bool = True,
) -> None:
    """Launch `depthwise_kernel`.

    Args:
        x: ``[n, channels or more, h, w]``, channels side by side.
        weight: ``[channels or more, 1, kh, kw]``, any strides.
        y: written, ``[n, columns, ho, wo]``, dense with channels inside; at least one element.
        geometry: stride, padding, dilation.
        channels: that run; zeros follow.
        bias, scale, shift, residual: as for `effkern.ops._triton.conv.convolve`.
        widths: channels that run by sample, in and out, and the row of the tables; int32 or int64.
        zero: whether channels that do not run are written.
    """
    n, columns, height, width = y.shape
    rows, wide = tile_of(x.dtype, columns)
    check_pixels(y)
    c_ins, c_outs, table_row = widths or (None, None, None)
    table = scale if scale is not None else shift
    tables = table is not None and table.dim() == 2
    depthwise_kernel[(n * -(-height * width // rows) * -(-columns // wide),)](
        x, weight, y, bias, scale, shift, residual, c_ins, c_outs, table_row, x.size(2), x.size(3), height, width,
        channels, columns, x.stride(0), x.stride(2), x.stride(3), weight.stride(0), weight.stride(2), weight.stride(3),
        *((0, 0, 0) if residual is None else (residual.stride(0), residual.stride(2), residual.stride(3))),
        table.stride(0) if table is not None and tables else 0, table.size(0) if table is not None and tables else 0,
        *geometry[0], *geometry[1], *geometry[2], KH=weight.size(2), KW=weight.size(3), ACT=act,
        ZERO=zero, BM=rows, BC=wide,
        num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip


def tile_of(dtype: torch.dtype, columns: int) -> tuple[int, int]:
    """Pixels and channels of a tile: 128 bytes of channels, a whole line, as far as there are so many."""
    wide = min(128 // dtype.itemsize, max(triton.next_power_of_2(columns), 8))
    return 1024 // wide, wide
