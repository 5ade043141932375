"""Rows (samples) of a batch taken out and put back, in the batch's own memory layout, both ways of the gradient.

PyTorch's index ops on maps give contiguous results whatever the layout of the input, and the gradient of a selection
adds element by element, as rows might repeat. Here rows are distinct and are copied whole.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["add_rows", "fork_rows", "layout_of", "set_rows", "take_rows"]


def take_rows(x: Tensor, rows: Tensor) -> Tensor:
    """``x[rows]`` in x's layout; ``rows`` int64, distinct."""
    return _Take.apply(x, rows)  # type: ignore[no-any-return]


def fork_rows(x: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """``x`` and ``take_rows(x, rows)``, for a branch that some rows take beside x itself.

    The gradients of both are joined by adding rows; taken apart, those of the rows would be spread over zeros first.
    """
    return _Fork.apply(x, rows)  # type: ignore[no-any-return]


def add_rows(x: Tensor, rows: Tensor, part: Tensor) -> Tensor:
    """A copy of ``x`` with ``part`` added to its ``rows``, which are distinct."""
    return _Add.apply(x, rows, part)  # type: ignore[no-any-return]


def set_rows(x: Tensor, rows: Tensor, part: Tensor) -> Tensor:
    """A copy of ``x`` with ``part`` in place of its ``rows``, which are distinct."""
    return _Set.apply(x, rows, part)  # type: ignore[no-any-return]


def layout_of(x: Tensor) -> torch.memory_format:
    """Of maps channels last or contiguous; contiguous where a tensor fits both, or is something else."""
    last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format


def _flat(x: Tensor, layout: torch.memory_format) -> Tensor:
    """``[N, everything]``: a view where ``x`` has the layout."""
    x = x.contiguous(memory_format=layout)
    x = x.permute(0, 2, 3, 1) if layout == torch.channels_last else x
    return x.reshape(len(x), -1)


def _changed(out: Tensor, rows: Tensor, part: Tensor, add: bool = False) -> Tensor:
    """``out``, a fresh tensor, with ``part`` put into its ``rows`` or added to them."""
    if part.numel():
        layout = layout_of(out)
        flat = _flat(out, layout)
        (flat.index_add_ if add else flat.index_copy_)(0, rows, _flat(part, layout))
    return out


def _taken(x: Tensor, rows: Tensor) -> Tensor:
    layout = layout_of(x)
    out = torch.empty((len(rows), *x.shape[1:]), dtype=x.dtype, device=x.device, memory_format=layout)
    if out.numel():
        torch.index_select(_flat(x, layout), 0, rows, out=_flat(out, layout))
    return out


class _Take(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.samples = len(x)
        return _taken(x, rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (rows,) = ctx.saved_tensors
        return _Put.apply(grad, rows, ctx.samples), None


class _Fork(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(rows)
        return x.view_as(x), _taken(x, rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, part: Tensor) -> Any:
        (rows,) = ctx.saved_tensors
        return _Add.apply(grad, rows, part), None


class _Put(torch.autograd.Function):
    """Zeros but for ``rows``."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, rows: Tensor, samples: int) -> Tensor:
        ctx.save_for_backward(rows)
        shape = (samples, *part.shape[1:])
        out = torch.empty(shape, dtype=part.dtype, device=part.device, memory_format=layout_of(part)).zero_()
        return _changed(out, rows, part)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (rows,) = ctx.saved_tensors
        return _Take.apply(grad, rows), None, None


class _Add(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor, part: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        return _changed(x.clone(memory_format=layout_of(x)), rows, part, add=True)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (rows,) = ctx.saved_tensors
        return grad, None, _Take.apply(grad, rows) if ctx.needs_input_grad[2] else None


class _Set(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor, part: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        return _changed(x.clone(memory_format=layout_of(x)), rows, part)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (rows,) = ctx.saved_tensors
        rest = grad.index_fill(0, rows, 0) if ctx.needs_input_grad[0] else None
        return rest, None, _Take.apply(grad, rows) if ctx.needs_input_grad[2] else None
