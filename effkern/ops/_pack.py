"""Packing a convolution's weight once, for every op that convolves: see :mod:`effkern.ops._handle` for the format."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from effkern.ops import _checks as check
from effkern.ops import _handle
from effkern.ops._registry import Op

#: Bytes of handles that are counted on to stay in the processor's last cache from one call to the next. Measured on
#: Zen 4 with 32 MiB: reading 8 MiB again and again comes at 100 GB/s, 16 MiB at 60, 24 MiB at 40.
CACHE_BYTES = 12 << 20


def with_transforms(weight: Tensor, groups: int, stride: Sequence[int], dilation: Sequence[int]) -> int:
    """Bytes of a handle with Winograd's transforms, 0 where the convolution has no use for them."""
    outs, depth, *kernel = weight.shape
    fits = tuple(kernel) == (3, 3) and tuple(stride) == tuple(dilation) == (1, 1)
    if not fits or depth < 8 or outs // groups < 8:
        return 0
    return _handle.handle_bytes(outs, depth, 3, 3, groups, True, True)


def _fake_pack(weight: Tensor, bias: Tensor | None, groups: int, algo: str) -> Tensor:
    op = "pack_conv_weight"
    check.check_weight(weight, groups, weight, op)
    check.check_vector(bias, weight.size(0), weight, op, "bias", exact=True)
    check.check_choice(algo, ("auto", "direct", "winograd"), op, "algo")
    outs, depth, rows, columns = weight.shape
    transformed = algo == "winograd" and (rows, columns) == (3, 3) and not _handle.is_depthwise(outs, depth, groups)
    size = _handle.handle_bytes(outs, depth, rows, columns, groups, bias is not None, transformed)
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
    that was truncated, corrupted or made for another convolution is refused, never misread. It holds fp32 and may move
    between processors. It does not follow later changes of ``weight``.

    Not differentiable: the handle never carries a gradient, also if ``weight`` requires one. Train with
    the ops that take the weight itself.

    Args:
        weight: ``[co, ci / groups, kh, kw]``, float32, bfloat16 or float16, any strides.
        bias: ``[co]``, float32 or weight's dtype.
        groups: divides ``co``.
        algo: ``"auto"`` or ``"direct"``, as the packed op will be called. ``"winograd"``: a 3x3 kernel is followed by
            its Winograd transforms, five times the memory in all, which every later call is then spared. Results keep
            their bits. It pays where the handles of a network stay in the processor's cache (measured: 1.8 times as
            fast for 64 channels on 8x8, 1.27 for 192 on 14x14, 1.09 for 96 on 28x28); from main memory it is slower
            (0.6 times for 512 on 14x14, 38 MB).

    Returns:
        A 1-d uint8 tensor on the weight's device.

    Raises:
        ValueError: for shapes or groups that do not fit.
        TypeError: for other dtypes.

    >>> pack_conv_weight(torch.zeros(16, 1, 1, 1)).numel()
    128
    """
    return _pack_op(weight, bias, groups, algo)
