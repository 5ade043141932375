"""One implicit GEMM for every family: rows are output pixels of the listed samples, columns output channels.

The twin of ``csrc/conv/conv.cuh``. Options that a call does not use are ``None`` and leave no trace in the code. K runs
over chunks of channels with the taps inside, first the whole chunks, then the tail with both operands zero past the
prefix (a NaN behind it must not come back as 0 * NaN); it is never split, and the tile is chosen from channels and
dtypes alone, so that a sample's bits depend on nothing but the sample.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from effkern.ops._triton.pieces import activate, decode
from effkern.ops._triton.tensors import check_pixels, taps


@triton.jit
def _weights(
    weight, book, row, c, tap, mask, w_row, w_tap, w_c, w_stage, entries,
    TAPS: tl.constexpr, D: tl.constexpr, STAGES: tl.constexpr, BOOKS: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """A tile of weights: read, or made of codes where there is a book (a row is in channel, tap order)."""
    if book is None:
        tile = tl.load(weight + row * w_row + tap * w_tap + c * w_c, mask=mask, other=0.0).to(DOT)
    else:
        tile = decode(weight, book, row, c * TAPS + tap, mask, w_row, w_c, w_stage, entries, D, STAGES, BOOKS).to(DOT)
    return tile


@triton.jit
def conv_kernel(
    x, weight, y, bias, scale, shift, residual, book,
    x_rows, y_rows, count, gate,
    order, first, c_ins, c_outs, table_row,
    samples, height, width, out_height, out_width, c_in, c_out, columns, y_c, bias_group,
    x_n, x_h, x_w, w_row, w_tap, w_c, w_stage, residual_n, residual_h, residual_w, table_n, table_rows, entries,
    stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w,
    KH: tl.constexpr, KW: tl.constexpr, ACT: tl.constexpr,
    ZERO: tl.constexpr, COPY: tl.constexpr,
    D: tl.constexpr, STAGES: tl.constexpr, BOOKS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """
    x_rows, y_rows: samples that are read and written, by place in the list; None: the place itself.
    count: places of the list that are computed. With COPY the others get their residual, else nothing.
    gate: by sample, blends the result with the residual.
    first: with it widths differ by sample; see `effkern.ops._triton.ragged`.
    columns: of a group, from c_out on zero (unwritten without ZERO). bias_group: rows of the weight in a group.
    """
    TAPS: tl.constexpr = KH * KW
    tiles = tl.cdiv(columns, BN)
    tile = tl.program_id(0) // tiles
    group = tl.program_id(1)
    pixels = out_height * out_width
    n = tl.program_id(0) % tiles * BN + tl.arange(0, BN)

    x_group = group.to(tl.int64) * c_in  # of the argument, whose divisors the compiler knows
    start = 0  # place of the first sample of the tile's class
    if first is None:
        listed = samples * pixels
        computed = listed
        if count is not None:
            computed = tl.load(count) * pixels
            if not COPY:
                listed = computed
    else:
        # The tiles of a class that starts at place f begin at f * pixels // BM + f: room for all those before.
        start = -1
        for at in range(0, samples, 128):
            place = at + tl.arange(0, 128)
            begin = tl.load(first + place, mask=place < samples, other=0)
            reached = (begin.to(tl.int64) * pixels // BM + begin <= tile) & (place < samples)
            start = tl.maximum(start, tl.max(tl.where(reached, begin, -1), 0))
        members = 0
        for at in range(0, samples, 128):
            place = at + tl.arange(0, 128)
            begin = tl.load(first + place, mask=place < samples, other=-1)
            members += tl.sum((begin == start).to(tl.int32), 0)
        tile -= (tl.cast(start, tl.int64) * pixels // BM + start).to(tl.int32)
        listed = members * pixels
        computed = listed
        sample = tl.load(order + start).to(tl.int64)
        c_in = tl.minimum(tl.maximum(tl.load(c_ins + sample), 0), c_in).to(tl.int32)
        c_out = tl.minimum(tl.maximum(tl.load(c_outs + sample), 0), c_out).to(tl.int32)

    if tile.to(tl.int64) * BM >= listed:
        return
    m = tile * BM + tl.arange(0, BM)
    exists = m < listed
    runs = m < computed
    place = start + m // pixels
    pixel = m % pixels
    row, column = pixel // out_width, pixel % out_width
    source = place
    target = place
    if x_rows is not None:
        source = tl.load(x_rows + place, mask=runs, other=0)
    if y_rows is not None:
        target = tl.load(y_rows + place, mask=exists, other=0)
    if first is not None:
        target = tl.load(order + place, mask=exists, other=0)
        source = target
    top = row * stride_h - pad_h
    left = column * stride_w - pad_w

    k = tl.arange(0, BK)
    x_at = x + source.to(tl.int64) * x_n + top.to(tl.int64) * x_h + left.to(tl.int64) * x_w
    x_at = tl.expand_dims(x_at, 1) + x_group + tl.expand_dims(k, 0)
    w_at = tl.expand_dims((group * bias_group + n).to(tl.int64), 0)
    w_exists = tl.expand_dims(n < c_out, 0)
    acc = tl.zeros((BM, BN), tl.float32)
    # Without a row or column that runs there is nothing to compute, only to copy or to fill with zeros.
    active = tl.where((tile.to(tl.int64) * BM >= computed) | (tl.program_id(0) % tiles * BN >= c_out), 0, c_in)
    whole, tail = active // BK, active % BK
    zero = tl.zeros((), tl.int64)  # makes 64-bit numbers of steps
    for step in range(0, whole * TAPS):
        c, tap = step // TAPS * BK, step % TAPS
        dh, dw = tap // KW * dilation_h, tap % KW * dilation_w
        inside = runs & (top + dh >= 0) & (top + dh < height) & (left + dw >= 0) & (left + dw < width)
        a = tl.load(x_at + ((zero + dh) * x_h + (zero + dw) * x_w + c), mask=inside[:, None], other=0.0)
        b = _weights(
            weight, book, w_at, c + tl.expand_dims(k, 1), tap, w_exists & (tl.expand_dims(k, 1) < BK),
            w_row, w_tap, w_c, w_stage, entries, TAPS, D, STAGES, BOOKS, DOT,
        )  # fmt: skip
        acc = tl.dot(a.to(DOT), b, acc, input_precision=PRECISION)
    for tap in range(0, tl.where(tail > 0, TAPS, 0)):
        c = whole * BK
        dh, dw = tap // KW * dilation_h, tap % KW * dilation_w
        inside = runs & (top + dh >= 0) & (top + dh < height) & (left + dw >= 0) & (left + dw < width)
        channel = tl.expand_dims(k, 0) < tail
        a = tl.load(x_at + ((zero + dh) * x_h + (zero + dw) * x_w + c), mask=inside[:, None] & channel, other=0.0)
        b = _weights(
            weight, book, w_at, c + tl.expand_dims(k, 1), tap, w_exists & (tl.expand_dims(k, 1) < tail),
            w_row, w_tap, w_c, w_stage, entries, TAPS, D, STAGES, BOOKS, DOT,
        )  # fmt: skip
        acc = tl.dot(a.to(DOT), b, acc, input_precision=PRECISION)

    # The epilogue in its fixed order: bias, scale, shift, residual, activation, gate.
    running = n < c_out
    channel = group * columns + n
    if bias is not None:
        acc += tl.load(bias + group * bias_group + n, mask=running, other=0.0).to(tl.float32)[None, :]
    table = tl.zeros((), tl.int64)
    if table_row is not None:  # the same for the whole class
        table = tl.load(table_row + sample).to(tl.int64)
        table = tl.minimum(tl.maximum(table, 0), table_rows - 1) * table_n
    if scale is not None:
        acc *= tl.load(scale + table + channel, mask=running, other=0.0).to(tl.float32)[None, :]
    if shift is not None:
        acc += tl.load(shift + table + channel, mask=running, other=0.0).to(tl.float32)[None, :]
    stored = exists[:, None] & (n < (columns if ZERO else c_out))[None, :]
    if residual is not None:
        at = target.to(tl.int64) * residual_n + row.to(tl.int64) * residual_h + column.to(tl.int64) * residual_w
        kept = tl.load(residual + tl.expand_dims(at, 1) + tl.expand_dims(channel, 0), mask=stored, other=0.0)
        wide = kept.to(tl.float32)
        acc = activate(acc + wide, ACT)
        if gate is not None:
            share = tl.load(gate + target, mask=exists, other=1.0).to(tl.float32)[:, None]
            acc = tl.where(share == 1.0, acc, share * acc + (1.0 - share) * wide)
    else:
        acc = activate(acc, ACT)
    if first is not None:
        acc = tl.where(running[None, :], acc, 0.0)
    result = acc.to(y.dtype.element_ty)
    if COPY:
        result = tl.where(runs[:, None], result, kept)
    y_at = y + tl.expand_dims((target.to(tl.int64) * pixels + pixel) * y_c, 1) + tl.expand_dims(channel, 0)
    tl.store(y_at, result, mask=stored)


#: Tiles by size of an operand and outputs of a group: (outputs up to, rows, columns, warps). 16-bit products run on
#: tensor cores; fp32 ones do not, and are bound by registers.
_TILES = {
    2: ((16, 128, 16, 4), (32, 128, 32, 4), (64, 128, 64, 8), (None, 128, 128, 8)),
    4: ((16, 64, 16, 4), (32, 64, 32, 4), (None, 64, 64, 4)),
}


@dataclass(frozen=True)
class Tile:
    """Constants of the kernel that make its code."""

    rows: int
    columns: int
    channels: int
    warps: int
    stages: int


def tile_of(dtype: torch.dtype, channels: int, columns: int) -> Tile:
    """The tile for products of ``dtype`` with as many channels and outputs in a group.

    From the weight's size and dtype alone. Three stages of the largest hold 96 KiB of shared memory, which the smallest
    of the supported parts (sm_86: 99 KiB) has.
    """
    size = dtype.itemsize
    _, rows, wide, warps = next(t for t in _TILES[size] if t[0] is None or columns <= t[0])
    chunk = next(c for c in ((64, 32, 16) if size == 2 else (16,)) if channels >= c or c == 16)
    return Tile(rows, wide, chunk, warps, 3)


def precision() -> str:
    """Of fp32 products: as they are, or in tf32 on tensor cores where ``EFFKERN_TF32=1`` asks for it."""
    return "tf32" if os.environ.get("EFFKERN_TF32") == "1" else "ieee"


_DOT = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


@dataclass
class Coded:
    """A weight as codes ``[rows, positions(, stages)]`` of books ``[B, entries, d]``."""

    codes: Tensor
    book: Tensor  # contiguous

    @property
    def strides(self) -> tuple[int, int, int]:
        """Of the codes: by row, by position, by stage."""
        return self.codes.stride(0), self.codes.stride(1), self.codes.stride(2) if self.codes.dim() == 3 else 0

    @property
    def stages(self) -> int:
        return self.codes.size(2) if self.codes.dim() == 3 else 1

    @property
    def books(self) -> int:
        """0 one for all, 1 one for each stage, 2 one for each position."""
        return 0 if self.book.size(0) == 1 else 4 - self.codes.dim()


def convolve(
    x: Tensor,
    weight: Tensor | Coded,
    y: Tensor,
    kernel: tuple[int, int],
    geometry: tuple[list[int], list[int], list[int]],
    *,
    c_in: int,
    c_out: int,
    groups: int = 1,
    group_rows: int | None = None,
    columns: int | None = None,
    act: str = "none",
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
    x_rows: Tensor | None = None,
    y_rows: Tensor | None = None,
    count: Tensor | None = None,
    gate: Tensor | None = None,
    copy: bool = False,
    zero: bool = True,
    ragged: tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None] | None = None,
) -> None:
    """Launch `conv_kernel`.

    Args:
        x: ``[n, groups * c_in or more, h, w]``, channels side by side.
        weight: ``[rows, channels or more, kh, kw]``, any strides, or coded.
        y: written, ``[n, groups * columns, ho, wo]``, dense with channels inside; at least one element.
        kernel: rows and columns of the taps.
        geometry: stride, padding, dilation.
        c_in, c_out: channels of a group that run.
        group_rows: rows of the weight and the bias in a group, by default ``c_out``.
        columns: outputs of a group, by default ``c_out``; zeros from ``c_out`` on.
        bias: indexed by row of the weight. scale, shift: by output, or tables ``[W, outputs]``.
        residual: as ``y``, any strides but for channels side by side.
        x_rows, y_rows, count, gate, copy: lists of samples, see the kernel.
        zero: whether outputs from ``c_out`` on are written.
        ragged: order, first, c_in, c_out, table row; see `effkern.ops._triton.ragged`.
    """
    coded = weight if isinstance(weight, Coded) else None
    columns = c_out if columns is None else columns
    n, _, height, width = y.shape
    check_pixels(y)
    if coded is None:
        assert isinstance(weight, Tensor)
        weight = taps(weight)
        tap = weight.stride(3) if kernel[1] > 1 else weight.stride(2)
        operand, book, strides = weight, None, (weight.stride(0), tap, weight.stride(1), 0)
        dot = x.dtype
    else:
        operand, book = coded.codes, coded.book
        row, position, stage = coded.strides
        strides = (row, 0, position, stage)
        # A sum of stages, or a book wider than x, would lose bits in 16-bit products.
        dot = x.dtype if book.dtype == x.dtype and coded.stages == 1 else torch.float32
    tile = tile_of(dot, c_in, columns)
    order, first, c_ins, c_outs, table_row = ragged or (None,) * 5
    table = scale if scale is not None else shift
    tables = table is not None and table.dim() == 2
    rows = -(-n * height * width // tile.rows) if first is None else n * height * width // tile.rows + n
    launch_residual = (0, 0, 0) if residual is None else (residual.stride(0), residual.stride(2), residual.stride(3))
    conv_kernel[(rows * -(-columns // tile.columns), groups)](
        x, operand, y, bias, scale, shift, residual, book, x_rows, y_rows, count, gate, order, first, c_ins, c_outs,
        table_row, n, x.size(2), x.size(3), height, width, c_in, c_out, columns, y.size(1),
        c_out if group_rows is None else group_rows, x.stride(0), x.stride(2), x.stride(3), *strides, *launch_residual,
        table.stride(0) if table is not None and tables else 0, table.size(0) if table is not None and tables else 0,
        0 if book is None else book.size(1), *geometry[0], *geometry[1], *geometry[2],
        KH=kernel[0], KW=kernel[1], ACT=act, COPY=copy,
        ZERO=zero, D=1 if book is None else book.size(2),
        STAGES=1 if coded is None else coded.stages, BOOKS=0 if coded is None else coded.books, BM=tile.rows,
        BN=tile.columns, BK=tile.channels, DOT=_DOT[dot], PRECISION=precision(), num_warps=tile.warps,
        num_stages=tile.stages, enable_fp_fusion=True,
    )  # fmt: skip
