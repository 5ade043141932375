"""Block skipping in Triton: the mask becomes a list of rows on the device; the first convolution gathers through it,
the last one adds the shortcut, scatters, and copies the shortcut of the dropped samples. Nothing waits for the device.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from effkern.ops import block_skip
from effkern.ops._triton.conv import convolve
from effkern.ops._triton.tensors import dense_like, pixels, vector
from effkern.ops.block_skip.reference import strides_of


@triton.jit
def compact_kernel(keep, idx, count, n, row_stride, column_stride, REST: tl.constexpr, BLOCK: tl.constexpr):
    """A program a column of the mask. REST: the dropped rows follow the kept ones; else -1 does."""
    b = tl.program_id(0).to(tl.int64)
    keep += b * column_stride
    idx += b * n
    total = 0
    for at in range(0, n, BLOCK):
        row = at + tl.arange(0, BLOCK)
        value = tl.load(keep + row.to(tl.int64) * row_stride, mask=row < n, other=0)
        total += tl.sum((value.to(tl.float32) != 0).to(tl.int32), 0)
    kept = 0
    for at in range(0, n, BLOCK):
        row = at + tl.arange(0, BLOCK)
        value = tl.load(keep + row.to(tl.int64) * row_stride, mask=row < n, other=0)
        flag = (value.to(tl.float32) != 0).to(tl.int32)
        before = kept + tl.cumsum(flag, 0) - flag
        place = tl.where(flag != 0, before, total + row - before)
        tl.store(idx + place, tl.where((flag != 0) | REST, row, -1), mask=row < n)
        kept += tl.sum(flag, 0)
    tl.store(count + b, total)


def compact(keep: Tensor) -> tuple[Tensor, Tensor]:
    """Row numbers of what is kept, padded with -1, and how many; entries are not checked to lie in [0, 1]."""
    idx, count = block_skip._fake_compact(keep)
    _compact(keep, idx, count, rest=False)
    return idx, count


def _compact(keep: Tensor, idx: Tensor, count: Tensor, rest: bool) -> None:
    keep = keep.view(torch.uint8) if keep.dtype == torch.bool else keep
    n, columns = keep.size(0), 1 if keep.dim() == 1 else keep.size(1)
    if columns == 0:
        return
    strides = (keep.stride(0), 0 if keep.dim() == 1 else keep.stride(1))
    compact_kernel[(columns,)](keep, idx, count, n, *strides, REST=rest, BLOCK=1024, num_warps=4, enable_fp_fusion=True)


def skip_basic_block(
    x: Tensor, keep: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor,
    stride: int, res: Tensor | None, act: str, algo: str,
) -> Tensor:  # fmt: skip
    """Two 3x3 convolutions with a residual sum, for the kept samples."""
    y = block_skip._fake_basic(x, keep, w1, b1, w2, b2, stride, res, act, algo)  # all checks
    return _skip_block("skip_basic_block", x, keep, [w1, w2], [b1, b2], stride, res, act, y)


def skip_bottleneck(
    x: Tensor, keep: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, w3: Tensor, b3: Tensor,
    stride: int, res: Tensor | None, act: str, algo: str,
) -> Tensor:  # fmt: skip
    """1x1, 3x3 and 1x1 convolutions with a residual sum, for the kept samples."""
    y = block_skip._fake_bottleneck(x, keep, w1, b1, w2, b2, w3, b3, stride, res, act, algo)
    return _skip_block("skip_bottleneck", x, keep, [w1, w2, w3], [b1, b2, b3], stride, res, act, y)


def _skip_block(
    op: str, x: Tensor, keep: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], stride: int,
    res: Tensor | None, act: str, y: Tensor,
) -> Tensor:  # fmt: skip
    for i, weight in enumerate(weights):
        if block_skip._is_handle(weight):
            name = f"w{i + 1} must be a 4-d weight on the GPU"
            raise ValueError(f"{op}: {name}, handles are the CPU engine's layout")
    if y.numel() == 0:
        return y
    n, out, soft = x.size(0), dense_like(y), keep.is_floating_point()
    rows, count = (torch.empty(s, dtype=torch.int32, device=x.device) for s in ((n,), ()))
    _compact(keep, rows, count, rest=True)
    shortcut = pixels(x if res is None else res)
    source = shortcut if res is None else pixels(x)
    for i, (weight, bias, step) in enumerate(zip(weights, biases, strides_of(len(weights), stride), strict=True)):
        last, (co, ci, kh, kw) = i + 1 == len(weights), weight.shape
        height, width = ((s - 1) // step + 1 for s in source.shape[2:])
        target = out
        if not last:  # by place in the list, in x's dtype
            target = x.new_empty(n, height, width, co).permute(0, 3, 1, 2)
        if target.numel() == 0 and not last:
            source = target
            continue
        convolve(
            source, weight, target, (kh, kw), ([step, step], [kh // 2, kw // 2], [1, 1]), c_in=ci, c_out=co, act=act,
            bias=vector(bias), count=count, x_rows=None if i else rows, y_rows=rows if last else None,
            residual=shortcut if last else None, gate=keep.float().contiguous() if last and soft else None, copy=last,
        )  # fmt: skip
        source = target
    return y if out is y else y.copy_(out)
