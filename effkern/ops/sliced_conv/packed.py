"""Sliced convolution from a packed weight: one handle serves every width."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from effkern.ops import _checks as check
from effkern.ops import _direct
from effkern.ops._memo import memo
from effkern.ops._pack import pack_conv_weight
from effkern.ops._registry import Op, empty_like_layout
from effkern.ops._slices import check_group_mode
from effkern.ops.sliced_conv import composed, reference
from effkern.ops.sliced_conv._checks import check_tables, check_widths

Ints = Sequence[int]


def remembered(
    x: Tensor, weight: Tensor, bias: Tensor | None, groups: int, algo: str, inputs: Sequence[Tensor | None]
) -> Tensor | None:
    """The handle of weight and bias from the memo, where this eager call may use one; see :mod:`effkern.ops._memo`.

    Args:
        x: of the call.
        weight: of a convolution, or 2-d as x of a linear layer, which is packed as the 1x1 convolution it is.
        bias, groups, algo: as `pack_conv_weight` takes them.
        inputs: further tensors of the call.
    """
    if torch.compiler.is_compiling() or not x.is_cpu or weight.dim() not in (4, x.dim()) or weight.dtype != x.dtype:
        return None
    if bias is not None and bias.shape != weight.shape[:1]:
        return None  # a bias of the running outputs only is legal for the op, not for a pack

    def pack() -> Tensor:
        kernel = weight if weight.dim() == 4 else weight.unsqueeze(2).unsqueeze(3)
        return pack_conv_weight(kernel, bias, groups, algo)

    return memo().packed((weight, bias), ("conv", groups, algo), pack, (x, *inputs))


def by_the_short_way(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    c_out: int,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: int,
    *options: Any,
) -> Tensor | None:
    """The call with the memo's handle past the dispatcher, see :mod:`effkern.ops._direct`; None: not this one.

    Args:
        x, weight, bias: of a convolution, or of a linear layer, whose result has two dimensions of 1 behind it.
        c_out, stride, padding, dilation, groups: of the call.
        options: from ``group_mode`` to ``algo``.
    """
    if torch.compiler.is_compiling():
        return None
    known = memo().quick.get((id(weight), id(bias), "conv", groups, options[-1]))
    if known is None:
        return None
    y = _direct.sliced_conv2d(x, weight, bias, *known, c_out, stride, padding, dilation, groups, *options)
    if y is not None:
        memo().hits += 1
    return y


def _check_handle(
    x: Tensor, handle: Tensor, out_channels: int, kernel_size: Ints, groups: int, group_mode: str, op: str
) -> None:
    check.check_map(x, op)
    if handle.dim() != 1 or handle.dtype != torch.uint8:
        got = f"{handle.dtype} of shape {list(handle.shape)}"
        raise TypeError(f"{op}: handle must be a 1-d uint8 tensor made by pack_conv_weight, got {got}")
    check.check_device(handle, x, op, "handle")
    check_group_mode(group_mode, op)
    if groups < 1 or out_channels < 0 or out_channels % groups:
        raise ValueError(f"{op}: groups must divide out_channels, got {groups} and {out_channels}")
    if len(kernel_size) != 2 or min(kernel_size) < 1:
        raise ValueError(f"{op}: kernel_size must be 2 ints of at least 1, got {tuple(kernel_size)}")


def _fake(
    x: Tensor,
    handle: Tensor,
    out_channels: int,
    kernel_size: Ints,
    c_out: int,
    stride: Ints,
    padding: Ints,
    dilation: Ints,
    groups: int,
    group_mode: str,
    scale: Tensor | None,
    shift: Tensor | None,
    act: str,
    algo: str,
) -> Tensor:
    op = "sliced_conv2d_packed"
    _check_handle(x, handle, out_channels, kernel_size, groups, group_mode, op)
    if c_out < 0 or c_out > out_channels:
        raise ValueError(f"{op}: c_out must be in [0, {out_channels}], got {c_out}")
    check.check_geometry(stride, padding, dilation, op)
    for vector, name in ((scale, "scale"), (shift, "shift")):
        check.check_vector(vector, c_out, x, op, name)
    check.check_act(act, op)
    check.check_algo(algo, op)
    h, w = check.output_map(x, kernel_size, stride, padding, dilation, op)
    return empty_like_layout(x, [x.size(0), c_out, h, w])


def _ragged_fake(
    x: Tensor,
    handle: Tensor,
    out_channels: int,
    kernel_size: Ints,
    c_in: Tensor,
    c_out: Tensor,
    c_out_max: int,
    stride: Ints,
    padding: Ints,
    dilation: Ints,
    groups: int,
    group_mode: str,
    scale_table: Tensor | None,
    shift_table: Tensor | None,
    width_idx: Tensor | None,
    act: str,
    algo: str,
    zero_tail: bool,
) -> Tensor:
    op = "sliced_conv2d_ragged_packed"
    _check_handle(x, handle, out_channels, kernel_size, groups, group_mode, op)
    check_widths(x, out_channels, c_in, c_out, c_out_max, op)
    check.check_geometry(stride, padding, dilation, op)
    check_tables(x, c_out_max, scale_table, shift_table, width_idx, op)
    check.check_act(act, op)
    check.check_algo(algo, op)
    h, w = check.output_map(x, kernel_size, stride, padding, dilation, op)
    return empty_like_layout(x, [x.size(0), c_out_max, h, w])


def _save_nothing(ctx: Any, inputs: tuple, output: Tensor) -> None:
    pass


def _refuse(ctx: Any, grad: Tensor) -> tuple:
    raise RuntimeError("the packed sliced convolutions have no gradient: train with sliced_conv2d or its ragged form")


_packed = Op(
    "sliced_conv2d_packed",
    "(Tensor x, Tensor handle, SymInt out_channels, SymInt[2] kernel_size, SymInt c_out, SymInt[2] stride, "
    "SymInt[2] padding, SymInt[2] dilation, SymInt groups, str group_mode, Tensor? scale, Tensor? shift, str act, "
    "str algo) -> Tensor",
    fake=_fake,
    reference=reference.sliced_conv2d_packed,
    composed=composed.sliced_conv2d_packed,
    setup_context=_save_nothing,
    backward=_refuse,
    autocast=("x",),
)

_ragged_packed = Op(
    "sliced_conv2d_ragged_packed",
    "(Tensor x, Tensor handle, SymInt out_channels, SymInt[2] kernel_size, Tensor c_in, Tensor c_out, "
    "SymInt c_out_max, SymInt[2] stride, SymInt[2] padding, SymInt[2] dilation, SymInt groups, str group_mode, "
    "Tensor? scale_table, Tensor? shift_table, Tensor? width_idx, str act, str algo, bool zero_tail) -> Tensor",
    fake=_ragged_fake,
    reference=reference.sliced_conv2d_ragged_packed,
    composed=composed.sliced_conv2d_ragged_packed,
    setup_context=_save_nothing,
    backward=_refuse,
    autocast=("x",),
)


def sliced_conv2d_packed(
    x: Tensor,
    handle: Tensor,
    out_channels: int,
    kernel_size: int | Ints,
    c_out: int | None = None,
    stride: int | Ints = 1,
    padding: int | Ints = 0,
    dilation: int | Ints = 1,
    groups: int = 1,
    group_mode: str = "prefix_groups",
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    act: str = "none",
    algo: str = "auto",
) -> Tensor:
    """`sliced_conv2d` with weight and bias packed before: nothing is packed per call, whatever the width.

    Args:
        x: ``[N, c_in, H, W]``, float32, bfloat16 or float16, any strides.
        handle: made by `pack_conv_weight` from the whole weight and bias.
        out_channels: outputs of the whole weight.
        kernel_size: of the packed weight.
        c_out: output channels to compute, by default all.
        stride, padding, dilation: an int or one for rows and one for columns.
        groups: as packed.
        group_mode, scale, shift, act, algo: as in `sliced_conv2d`.

    Returns:
        ``[N, c_out, Ho, Wo]`` in x's dtype and layout.

    Raises:
        ValueError: a corrupt handle, one packed for other dimensions, or arguments that do not fit.
        TypeError: a dtype that is not supported.

    Not differentiable; a backward pass through it raises ``RuntimeError``.
    """
    c_out = out_channels if c_out is None else c_out
    if not torch.compiler.is_compiling():
        y = _direct.sliced_conv2d_packed(
            x, -1, handle, out_channels, kernel_size, c_out, stride, padding, dilation, groups, group_mode,
            scale, shift, act, algo,
        )  # fmt: skip
        if y is not None:
            return y
    return _packed(
        x, handle, out_channels, check.pair(kernel_size, "kernel_size"), c_out,
        check.pair(stride, "stride"), check.pair(padding, "padding"), check.pair(dilation, "dilation"), groups,
        group_mode, scale, shift, act, algo,
    )  # fmt: skip


def sliced_conv2d_ragged_packed(
    x: Tensor,
    handle: Tensor,
    out_channels: int,
    kernel_size: int | Ints,
    c_in: Tensor,
    c_out: Tensor,
    c_out_max: int | None = None,
    stride: int | Ints = 1,
    padding: int | Ints = 0,
    dilation: int | Ints = 1,
    groups: int = 1,
    group_mode: str = "prefix_groups",
    scale_table: Tensor | None = None,
    shift_table: Tensor | None = None,
    width_idx: Tensor | None = None,
    act: str = "none",
    algo: str = "auto",
    zero_tail: bool = True,
) -> Tensor:
    """`sliced_conv2d_ragged` with weight and bias packed before: one pack serves all widths of the batch.

    Args:
        x: ``[N, C, H, W]``, float32, bfloat16 or float16, any strides.
        handle: made by `pack_conv_weight` from the whole weight and bias.
        out_channels: outputs of the whole weight.
        kernel_size: of the packed weight.
        c_in, c_out: ``[N]``, int32 or int64, on x's device.
        c_out_max: channels of the result, by default ``out_channels``.
        stride, padding, dilation: an int or one for rows and one for columns.
        groups: as packed.
        group_mode, scale_table, shift_table, width_idx, act, algo, zero_tail: as in `sliced_conv2d_ragged`.

    Returns:
        ``[N, c_out_max, Ho, Wo]`` in x's dtype and layout.

    Raises:
        ValueError: a corrupt handle, one packed for other dimensions, or arguments that do not fit.
        TypeError: a dtype that is not supported.

    Not differentiable; a backward pass through it raises ``RuntimeError``.
    """
    return _ragged_packed(
        x, handle, out_channels, check.pair(kernel_size, "kernel_size"), c_in, c_out,
        out_channels if c_out_max is None else c_out_max, check.pair(stride, "stride"),
        check.pair(padding, "padding"), check.pair(dilation, "dilation"), groups, group_mode, scale_table,
        shift_table, width_idx, act, algo, zero_tail,
    )  # fmt: skip
