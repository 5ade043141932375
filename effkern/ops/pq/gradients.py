"""Gradients of the product-quantized ops, a chunk of output rows at a time: the dense weight never exists.

A chunk's weight gradient ``dW`` is all that is needed: ``gcodebook`` sums it over the codes, and because the output is
linear in the weight, ``gscale[o] = <dW[o], W[o]>``. Chunks are fixed ranges of output rows, taken in order; each sums
in float32 and they are combined in float64, so results depend neither on threads nor on luck.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from effkern.ops._registry import empty_like_layout
from effkern.ops.pq import reference

CHUNK_FLOATS = 1 << 18  # 1 MiB of decoded float32 weight at a time, at least 16 rows: one panel of the engine
EMBEDDING_CHUNK = 1 << 18  # floats of decoded embedding rows at a time


def chunk_rows(columns: int) -> int:
    """Rows of ``columns`` numbers decoded at a time."""
    return max(16, CHUNK_FLOATS // max(columns, 1))


def _chunks(total: int, size: int) -> Iterator[slice]:
    for start in range(0, total, size):
        yield slice(start, min(start + size, total))


class CodebookGradient:
    """Sums row gradients into the codebook entries their codes name."""

    def __init__(self, codebook: Tensor, dtype: torch.dtype) -> None:
        self.codebook, self.dtype = codebook, dtype
        books, entries, self.d = codebook.shape
        self.total = torch.zeros(books * entries, self.d, dtype=torch.float64, device=codebook.device)

    def add(self, codes: Tensor, rows: Tensor) -> None:
        """Add ``rows`` ``[n, J * d]``, the gradient of the decoded rows behind ``codes`` ``[n, J(, m)]``."""
        index = reference.entry_index(codes, self.codebook)
        parts = rows.reshape(-1, self.d)
        for stage in index.unbind(2) if index.dim() == 3 else (index,):
            table = torch.zeros(self.total.shape, dtype=self.dtype, device=rows.device)
            self.total += table.index_add_(0, stage.reshape(-1), parts)

    def result(self) -> Tensor:
        """The gradient in the shape and dtype of the codebook; an entry no code names is exactly 0."""
        return self.total.reshape(self.codebook.shape).to(self.codebook.dtype)


def conv2d_backward(
    grad: Tensor,
    x: Tensor,
    codes: Tensor,
    codebook: Tensor,
    scale: Tensor | None,
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``conv2d(x, W(codes)) * scale`` by ``x``, ``codebook`` and ``scale``.

    Args:
        grad: ``[N, Co, Ho, Wo]``, any strides, expanded ones too.
        needs: which of the three are wanted; the others return empty.
    """
    dtype = reference.compute_dtype(grad, x, codebook)
    rows, group_rows, channels = codes.shape[0], codes.shape[0] // groups, x.shape[1] // groups
    columns = channels * kernel_size[0] * kernel_size[1]
    grad, wide = grad.to(dtype), x.to(dtype)
    grad_x = empty_like_layout(x, x.shape).to(dtype).zero_() if needs[0] else wide.new_empty(0)
    grad_scale = torch.zeros(rows if needs[2] else 0, dtype=dtype, device=x.device)
    book = CodebookGradient(codebook, dtype) if needs[1] else None
    spans = [
        (group, slice(group * group_rows + span.start, group * group_rows + span.stop))
        for group in range(groups)
        for span in _chunks(group_rows, chunk_rows(columns))
    ]
    for group, span in spans if grad.numel() else ():
        own = slice(group * channels, (group + 1) * channels)
        weight = reference.decode_rows(codes[span], codebook, dtype)
        factor = None if scale is None else scale[span].to(dtype).unsqueeze(1)
        scaled = weight if factor is None else weight * factor
        dx, dw, _ = torch.ops.aten.convolution_backward(
            grad[:, span],
            wide[:, own],
            scaled[:, :columns].reshape(-1, channels, *kernel_size),
            None,
            stride,
            padding,
            dilation,
            False,
            [0, 0],
            1,
            [needs[0], needs[1] or needs[2], False],
        )
        if needs[0]:
            grad_x[:, own] += dx
        if dw is None:
            continue
        # The weight passed above only enters dx: dw is the gradient of the unscaled convolution.
        rows_grad = torch.nn.functional.pad(dw.flatten(1), (0, weight.shape[1] - columns))
        if needs[2]:
            grad_scale[span] = (rows_grad.double() * weight.double()).sum(1).to(dtype)
        if book is not None:
            book.add(codes[span], rows_grad if factor is None else rows_grad * factor)
    grad_codebook = codebook.new_empty(0) if book is None else book.result()
    return grad_x.to(x.dtype), grad_codebook, grad_scale if scale is None else grad_scale.to(scale.dtype)


def embedding_backward(
    grad: Tensor,
    idx: Tensor,
    bags: Tensor | None,
    weights: Tensor | None,
    codes: Tensor,
    codebook: Tensor,
    scale: Tensor | None,
    padding_idx: int | None,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``y[bags[i]] += weights[i] * scale[idx[i]] * W[idx[i]]`` by ``codebook``, ``scale`` and ``weights``.

    Args:
        grad: ``[rows, J * d]``.
        idx: ``[n]`` rows of the table.
        bags: ``[n]`` rows of ``grad``; None: row ``i`` for index ``i``.
        needs: which of the three are wanted; the others return empty.
    """
    dtype = reference.compute_dtype(grad, codebook)
    width, device = grad.shape[1], grad.device
    grad_scale = torch.zeros(codes.shape[0] if needs[1] else 0, dtype=torch.float64, device=device)
    grad_weights = torch.zeros(idx.numel() if needs[2] else 0, dtype=dtype, device=device)
    book = CodebookGradient(codebook, dtype)
    for span in _chunks(idx.numel(), max(1, EMBEDDING_CHUNK // max(width, 1))):
        picked = idx[span].long()
        part = grad[span] if bags is None else grad[bags[span]]
        part = part.to(dtype)
        if padding_idx is not None:
            part = part.masked_fill((picked == padding_idx).unsqueeze(1), 0)
        factor = torch.ones(picked.numel(), dtype=dtype, device=device)
        if scale is not None:
            factor = scale[picked].to(dtype)
        weight = torch.ones_like(factor) if weights is None else weights[span].to(dtype)
        if needs[0]:
            book.add(codes[picked], part * (factor * weight).unsqueeze(1))
        if needs[1] or needs[2]:
            dots = (part.double() * reference.decode_rows(codes[picked], codebook, dtype).double()).sum(1)
            if needs[1]:
                grad_scale.index_add_(0, picked, dots * weight)
            if needs[2]:
                grad_weights[span] = (dots * factor).to(dtype)
    grad_codebook = book.result() if needs[0] else codebook.new_empty(0)
    return (
        grad_codebook,
        grad_scale.to(dtype if scale is None else scale.dtype),
        grad_weights.to(dtype if weights is None else weights.dtype),
    )
