"""Parts of kernels."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def activate(z, ACT: tl.constexpr):
    """As torch: NaN stays NaN, which a comparison keeps and a maximum would not."""
    if ACT == "relu":
        z = tl.where(z <= 0, 0.0, z)
    if ACT == "relu6":
        z = tl.where(z <= 0, 0.0, tl.where(z >= 6, 6.0, z))
    if ACT == "hardswish":
        gate = z + 3.0
        z = z * tl.where(gate <= 0, 0.0, tl.where(gate >= 6, 6.0, gate)) / 6.0
    if ACT == "silu":
        z = z / (1.0 + tl.exp(-z))
    return z


@triton.jit
def decode(
    codes, book, row, column, mask, code_row, code_column, code_stage, entries,
    D: tl.constexpr, STAGES: tl.constexpr, BOOKS: tl.constexpr,
):  # fmt: skip
    """Elements of coded weight rows in fp32, the sum of their stages in order; zero where not in ``mask``.

    ``row`` is int64. Codes are held to the book, so that a corrupt one reads no foreign memory. ``BOOKS``: 0 one book,
    1 one for each stage, 2 one for each position.
    """
    position = column // D
    inside = column % D
    total = tl.zeros(mask.shape, tl.float32)
    for stage in tl.static_range(STAGES):
        at = codes + row * code_row + position * code_column + stage * code_stage
        code = tl.load(at, mask=mask, other=0).to(tl.int64)
        code = tl.minimum(tl.maximum(code, 0), entries - 1)
        if BOOKS == 1:
            code += stage * entries
        if BOOKS == 2:
            code += position.to(tl.int64) * entries
        value = tl.load(book + code * D + inside, mask=mask, other=0.0, eviction_policy="evict_last")
        total += value.to(tl.float32)
    return total
