"""Rows of a coded table: looked up, decoded, or summed by bags. Bound by memory, so a tile is only wide loads."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from effkern.ops._triton.conv import Coded
from effkern.ops._triton.pieces import decode


@triton.jit
def lookup_kernel(
    idx, codes, book, scale, y, count, table_rows, columns, padding, code_row, code_column, code_stage, entries,
    D: tl.constexpr, STAGES: tl.constexpr, BOOKS: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """y[i] = the row idx[i], or the row i without idx. padding: a row that is zero, -1 for none."""
    tiles = tl.cdiv(columns, BC)
    i = tl.program_id(0) // tiles * BM + tl.arange(0, BM)
    c = tl.program_id(0) % tiles * BC + tl.arange(0, BC)
    exists = i < count
    row = i.to(tl.int64)
    read = exists
    if idx is not None:
        row = tl.load(idx + i, mask=exists, other=0).to(tl.int64)
        read = exists & (row != padding)
        row = tl.minimum(tl.maximum(row, 0), table_rows - 1)
    mask = read[:, None] & (c < columns)[None, :]
    at = tl.expand_dims(row, 1)
    value = decode(
        codes, book, at, tl.expand_dims(c, 0), mask, code_row, code_column, code_stage, entries, D, STAGES, BOOKS
    )
    if scale is not None:
        value *= tl.load(scale + row, mask=read, other=0.0).to(tl.float32)[:, None]
    y_at = y + tl.expand_dims(i.to(tl.int64) * columns, 1) + tl.expand_dims(c, 0)
    tl.store(y_at, value.to(y.dtype.element_ty), mask=exists[:, None] & (c < columns)[None, :])


@triton.jit
def bag_kernel(
    idx, offsets, codes, book, scale, weights, y, bags, count, table_rows, columns, padding,
    code_row, code_column, code_stage, entries,
    MEAN: tl.constexpr, D: tl.constexpr, STAGES: tl.constexpr, BOOKS: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """A program a bag and tile of columns; a bag's rows are summed in order in fp32."""
    tiles = tl.cdiv(columns, BC)
    bag = tl.program_id(0) // tiles
    c = tl.program_id(0) % tiles * BC + tl.arange(0, BC)
    mask = c < columns
    begin = tl.load(offsets + bag).to(tl.int64)
    end = tl.load(offsets + bag + 1, mask=bag + 1 < bags, other=0).to(tl.int64)
    end = tl.where(bag + 1 < bags, end, count)
    begin, end = tl.maximum(begin, 0), tl.minimum(end, count)
    total = tl.zeros((BC,), tl.float32)
    kept = 0
    for i in range(begin, end):
        named = tl.load(idx + i).to(tl.int64)
        counts = tl.zeros((BC,), tl.int64) + named != padding  # the same for all columns
        row = tl.minimum(tl.maximum(named, 0), table_rows - 1)
        value = decode(codes, book, row, c, mask & counts, code_row, code_column, code_stage, entries, D, STAGES, BOOKS)
        if scale is not None:
            value *= tl.load(scale + row).to(tl.float32)
        if weights is not None:
            value *= tl.load(weights + i).to(tl.float32)
        total += tl.where(counts, value, 0.0)  # a padding row's factors may be anything
        kept += tl.where(named != padding, 1, 0)
    if MEAN:
        total = total / tl.maximum(kept, 1).to(tl.float32)
    tl.store(y + bag.to(tl.int64) * columns + c, total.to(y.dtype.element_ty), mask=mask)


def lookup(
    table: Coded, y: Tensor, idx: Tensor | None = None, scale: Tensor | None = None, padding_idx: int | None = None
) -> None:
    """Write the rows ``idx`` ``[n]``, or all, of a table to ``y`` ``[n, J * d]``, contiguous, not empty."""
    count, columns = y.shape
    wide = min(triton.next_power_of_2(columns), 128)
    rows = 1024 // wide
    lookup_kernel[(-(-count // rows) * -(-columns // wide),)](
        idx, table.codes, table.book, scale, y, count, table.codes.size(0), columns,
        -1 if padding_idx is None else padding_idx, *table.strides, table.book.size(1), D=table.book.size(2),
        STAGES=table.stages, BOOKS=table.books, BM=rows, BC=wide, num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip


def bag(
    table: Coded, y: Tensor, idx: Tensor, offsets: Tensor, scale: Tensor | None, mean: bool, weights: Tensor | None,
    padding_idx: int | None,
) -> None:  # fmt: skip
    """Write sums or means of bags to ``y`` ``[bags, J * d]``, contiguous, not empty."""
    bags, columns = y.shape
    wide = min(triton.next_power_of_2(columns), 512)
    bag_kernel[(bags * -(-columns // wide),)](
        idx, offsets, table.codes, table.book, scale, weights, y, bags, idx.size(0), table.codes.size(0), columns,
        -1 if padding_idx is None else padding_idx, *table.strides, table.book.size(1), MEAN=mean,
        D=table.book.size(2), STAGES=table.stages, BOOKS=table.books, BC=wide, num_warps=max(wide // 128, 1),
        enable_fp_fusion=True,
    )  # fmt: skip
