"""Gradients of a convolution with its epilogue: the one op behind the gradient formulas of all families. Internal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from effkern.ops import _checks as check
from effkern.ops._autograd import activation_backward
from effkern.ops._conv_backward import reference
from effkern.ops._registry import Op, empty_like_layout
from effkern.ops._slices import check_slice, slice_weight

__all__ = ["conv2d_backward", "conv_gradients"]

Ints = Sequence[int]
_NAME = "conv2d_backward"


def _fake(
    gy: Tensor, y: Tensor | None, x: Tensor, weight: Tensor, stride: Ints, padding: Ints, dilation: Ints, groups: int,
    group_mode: str, act: str, algo: str, needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    check.check_map(x, _NAME)
    check.check_map(gy, _NAME, "gy")
    check.check_device(gy, x, _NAME, "gy")
    check.check_weight(weight, groups, x, _NAME, own_dtype=True)
    check_slice(_NAME, weight, x.size(1), gy.size(1), groups, group_mode, ("x's channels", "gy's channels"))
    check.check_geometry(stride, padding, dilation, _NAME)
    shape = [x.size(0), gy.size(1), *check.output_map(x, weight.shape[2:], stride, padding, dilation, _NAME)]
    check.check_choice(act, ("none", "relu", "relu6"), _NAME, "act")
    check.check_algo(algo, _NAME)
    if len(needs) != 4:
        raise ValueError(f"{_NAME}: needs must have 4 values, got {len(needs)}")
    if needs[3] and act == "none":
        raise ValueError(f"{_NAME}: needs must leave gz out for act = 'none', where it is gy")
    if y is None and act != "none":
        raise ValueError(f"{_NAME}: y must be given for act = {act!r}")
    for tensor, name in ((gy, "gy"), (y, "y")):
        if tensor is None:
            continue
        check.check_map(tensor, _NAME, name)
        check.check_device(tensor, x, _NAME, name)
        if list(tensor.shape) != shape:
            raise ValueError(f"{_NAME}: {name} must have the output's shape {shape}, got {list(tensor.shape)}")
    return (
        empty_like_layout(x, x.shape) if needs[0] else x.new_empty(0),
        empty_like_layout(weight, weight.shape) if needs[1] else x.new_empty(0),
        x.new_empty(gy.size(1) if needs[2] else 0, dtype=torch.float32),
        empty_like_layout(x, shape) if needs[3] else x.new_empty(0),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    gy, y, x, weight, *geometry, groups, group_mode, act, algo, needs = inputs
    ctx.save_for_backward(gy, y, x, weight)
    ctx.geometry, ctx.slicing, ctx.act, ctx.algo, ctx.needs = geometry, (groups, group_mode), act, algo, needs


def _backward(ctx: Any, ggx: Tensor, ggw: Tensor, ggb: Tensor, ggz: Tensor) -> tuple[Tensor | None, ...]:
    """The op is linear in gy and bilinear in it and x, and in it and weight; the mask of y has no gradient."""
    gy, y, x, weight = ctx.saved_tensors
    needs_gy, _, needs_x, needs_weight = ctx.needs_input_grad[:4]
    has_gx, has_gw, has_gb, has_gz = ctx.needs

    def conv(x: Tensor, weight: Tensor) -> Tensor:
        part, running = slice_weight(weight, x.size(1), gy.size(1), *ctx.slicing)
        if part.numel() == 0 or gy.numel() == 0:
            return torch.zeros_like(gy)
        return F.conv2d(x.to(gy.dtype), part.to(gy.dtype), None, *ctx.geometry, running)

    g_gy = None
    if needs_gy:
        g_gy = torch.zeros_like(gy)
        if has_gx:
            g_gy = g_gy + conv(ggx, weight)
        if has_gw:
            g_gy = g_gy + conv(x, ggw)
        if has_gb:
            g_gy = g_gy + ggb.to(gy.dtype).view(1, -1, 1, 1)
        if has_gz:
            g_gy = g_gy + ggz
        if y is not None:
            g_gy = activation_backward(g_gy, y, lambda: y, ctx.act).to(gy.dtype)
    wanted = (needs_x and has_gw, needs_weight and has_gx, False, False)
    g_x = g_weight = None
    if any(wanted):
        g_x, g_weight, _, _ = conv2d_backward(
            gy,
            y,
            ggx if has_gx else x,
            ggw if has_gw else weight,
            *ctx.geometry,
            *ctx.slicing,
            ctx.act,
            ctx.algo,
            wanted,
        )
    return g_gy, None, g_x if wanted[0] else None, g_weight if wanted[1] else None, *[None] * 8


#: Arguments and results as in `reference.conv2d_backward`.
conv2d_backward = Op(
    _NAME,
    "(Tensor gy, Tensor? y, Tensor x, Tensor weight, SymInt[2] stride, SymInt[2] padding, SymInt[2] dilation, "
    "SymInt groups, str group_mode, str act, str algo, bool[] needs) -> (Tensor, Tensor, Tensor, Tensor)",
    fake=_fake,
    reference=reference.conv2d_backward,
    setup_context=_save,
    backward=_backward,
)


def conv_gradients(
    grad: Tensor, x: Tensor, weight: Tensor, stride: Ints, padding: Ints, dilation: Ints, groups: int,
    needs: tuple[bool, bool], group_mode: str = "within_group",
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """Gradients of ``conv2d(x, part of weight)`` in x and weight inside other kernels, which may run in float64."""
    run = reference.conv2d_backward if grad.dtype == torch.float64 else conv2d_backward
    wanted = (*needs, False, False)
    gx, gw, _, _ = run(grad, None, x, weight, stride, padding, dilation, groups, group_mode, "none", "auto", wanted)
    return (gx if needs[0] else None), (gw if needs[1] else None)
