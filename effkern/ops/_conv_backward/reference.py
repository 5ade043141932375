"""Gradients of a convolution in plain PyTorch: any dtype, any device. The oracle of the tests; read it first."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from effkern.ops._autograd import activation_backward, channel_sum, compute_dtype
from effkern.ops._slices import slice_weight, unslice_weight


def conv2d_backward(
    gy: Tensor,
    y: Tensor | None,
    x: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    group_mode: str,
    act: str,
    algo: str,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of ``y = act(conv2d(x, part of weight) + bias + residual)``.

    Args:
        gy: ``[N, c_out, Ho, Wo]``, gradient at ``y``.
        y: the output; ``None`` for ``act="none"``.
        x: ``[N, c_in, H, W]``. Together with ``gy``'s channels it tells which part of the weight ran, as in
            ``sliced_conv2d``.
        weight: ``[Co, Ci / groups, kh, kw]``, the whole weight.
        group_mode: ``"prefix_groups"`` or ``"within_group"``.
        act: ``"none"``, ``"relu"`` or ``"relu6"``, whose slopes show in ``y``.
        algo: ``"auto"`` or ``"direct"``, for the gradient in ``x``; that in the weight is always direct.
        needs: which of the four results are wanted; the others are empty.

    Returns:
        Gradients in ``x``; in ``weight``, full size and zero outside the running part; in the bias of the running
        outputs, ``[c_out]``; and at the activation's input, which is that of a residual.
    """
    dtype = compute_dtype(x)
    gz = gy.to(dtype) if y is None else activation_backward(gy.to(dtype), y, lambda: y, act)
    nothing = x.new_empty(0)
    gx = gw = nothing
    if needs[0] or needs[1]:
        part, running = slice_weight(weight.to(dtype), x.shape[1], gy.shape[1], groups, group_mode)
        if part.numel() == 0 or gy.numel() == 0:
            gx, gw = torch.zeros_like(x), torch.zeros_like(weight)
        else:
            gx, gw, _ = torch.ops.aten.convolution_backward(
                gz, x.to(dtype), part, None, stride, padding, dilation, False, [0, 0], running, [*needs[:2], False]
            )
            if needs[1]:
                gw = unslice_weight(gw, weight, x.shape[1], gy.shape[1], groups, group_mode).to(weight.dtype)
    return (
        gx.to(x.dtype) if needs[0] else nothing,
        gw if needs[1] else nothing,
        channel_sum(gz) if needs[2] else nothing.to(dtype),
        gz.to(x.dtype) if needs[3] else nothing,
    )
