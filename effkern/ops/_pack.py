"""Packing a convolution's weight once, for every op that convolves: see :mod:`effkern.ops._handle` for the format."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from effkern.ops import _checks as check
from effkern.ops import _handle
from effkern.ops._registry import Op


def _fake_pack(weight: Tensor, bias: Tensor | None, groups: int, algo: str) -> Tensor:
    op = "pack_conv_weight"
    check.check_weight(weight, groups, weight, op)
    check.check_vector(bias, weight.size(0), weight, op, "bias", exact=True)
    check.check_algo(algo, op)
    outs, depth, rows, columns = weight.shape
    size = _handle.handle_bytes(outs, depth, rows, columns, groups, bias is not None)
    return torch.empty(size, dtype=torch.uint8, device=weight.device)


def _save_nothing(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.mark_non_differentiable(output)


def _no_gradient(ctx: Any, grad: Tensor) -> tuple[None, ...]:
    return (None,) * 4


_pack_op = Op(
    "pack_conv_weight",
    "(Tensor weight, Tensor? bias, SymInt groups, str algo) -> Tensor",
    fake=_fake_pack,
    reference=_handle.pack_conv_weight,
    setup_context=_save_nothing,
    backward=_no_gradient,
)


def pack_conv_weight(weight: Tensor, bias: Tensor | None = None, groups: int = 1, algo: str = "auto") -> Tensor:
    """Pack a convolution's weight, and bias, for the ``*_packed`` ops and for block skipping.

    The handle describes itself: 64 bytes with magic, format version, dimensions and checksum come first, so a handle
    that was truncated, corrupted or made for another convolution is refused, never misread. It holds fp32 and does not
    depend on the processor. It does not follow later changes of ``weight``.

    Not differentiable: the handle never carries a gradient, also if ``weight`` requires one. Train with
    the ops that take the weight itself.

    Args:
        weight: ``[co, ci / groups, kh, kw]``, float32, bfloat16 or float16, any strides.
        bias: ``[co]``, float32 or weight's dtype.
        groups: divides ``co``.
        algo: ``"auto"`` or ``"direct"``, as the packed op will be called.

    Returns:
        A 1-d uint8 tensor on the weight's device.

    Raises:
        ValueError: for shapes or groups that do not fit.
        TypeError: for other dtypes.

    >>> pack_conv_weight(torch.zeros(16, 1, 1, 1)).numel()
    128
    """
    return _pack_op(weight, bias, groups, algo)
