"""Sorts the samples of a ragged batch by width (and row of the tables) on the device, so that a tile has one of each.

The list is the same in every run: equal widths stay in ascending order of samples, the widest come first because their
tiles take longest. Classes start at places f of the list; the tiles of a class of s samples with P pixels each begin at
number ``f * P // BM + f``. That leaves room for all that come before, as each class wastes less than one tile, so that
a kernel finds its class by itself and nothing has to be summed up or brought to the host.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def schedule_kernel(
    c_ins, c_outs, table_row, order, first, samples, most_in, most_out, table_rows, BLOCK: tl.constexpr
):  # fmt: skip
    """order: samples by place. first: the place where a place's class starts. Work: samples squared, in blocks."""
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    exists = n < samples
    key = _key(c_ins, c_outs, table_row, n, exists, most_in, most_out, table_rows)
    wider = tl.zeros((BLOCK,), tl.int32)
    before = tl.zeros((BLOCK,), tl.int32)
    for at in range(0, samples, BLOCK):
        other = at + tl.arange(0, BLOCK)
        others = _key(c_ins, c_outs, table_row, other, other < samples, most_in, most_out, table_rows)
        wider += tl.sum((others[None, :] > key[:, None]).to(tl.int32), 1)
        equal = (others[None, :] == key[:, None]) & (other[None, :] < n[:, None])
        before += tl.sum(equal.to(tl.int32), 1)
    place = wider + before
    tl.store(order + place, n, mask=exists)
    tl.store(first + place, wider, mask=exists)


@triton.jit
def _key(c_ins, c_outs, table_row, n, mask, most_in, most_out, table_rows):
    """One number for both widths and the row of the tables, held to their ranges; -1 for no sample."""
    c_in = tl.minimum(tl.maximum(tl.load(c_ins + n, mask=mask, other=0).to(tl.int64), 0), most_in)
    c_out = tl.minimum(tl.maximum(tl.load(c_outs + n, mask=mask, other=0).to(tl.int64), 0), most_out)
    key = c_in * (most_out + 1) + c_out
    if table_row is not None:
        row = tl.load(table_row + n, mask=mask, other=0).to(tl.int64)
        key = key * table_rows + tl.minimum(tl.maximum(row, 0), table_rows - 1)
    return tl.where(mask, key, -1)


Ragged = tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]


def schedule(
    c_in: Tensor, c_out: Tensor, table_row: Tensor | None, most_in: int, most_out: int, table_rows: int
) -> Ragged:
    """What `convolve` takes as ``ragged``, from widths of at least one sample, and rows of tables if there are any."""
    c_in, c_out = c_in.contiguous(), c_out.contiguous()
    table_row = None if table_row is None else table_row.contiguous()
    n = c_in.size(0)
    order, first = (torch.empty(n, dtype=torch.int32, device=c_in.device) for _ in range(2))
    schedule_kernel[(-(-n // 64),)](
        c_in, c_out, table_row, order, first, n, most_in, most_out, table_rows, BLOCK=64, enable_fp_fusion=True
    )
    return order, first, c_in, c_out, table_row
