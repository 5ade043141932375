"""Sliced convolution: one weight, of which a call (or each sample of a batch) uses the leading channels."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from effkern.ops import _checks as check
from effkern.ops._autograd import activation_backward, channel_sum, compute_dtype
from effkern.ops._conv_backward import conv2d_backward
from effkern.ops._registry import Op, empty_like_layout
from effkern.ops._slices import check_slice, unslice_bias
from effkern.ops.sliced_conv import reference
from effkern.ops.sliced_conv._checks import check_bias
from effkern.ops.sliced_conv.chain import sliced_chain
from effkern.ops.sliced_conv.dw_pw import sliced_dw_pw, sliced_dw_pw_packed
from effkern.ops.sliced_conv.linear import sliced_linear, sliced_linear_ragged
from effkern.ops.sliced_conv.packed import (
    _packed,
    by_the_short_way,
    remembered,
    sliced_conv2d_packed,
    sliced_conv2d_ragged_packed,
)
from effkern.ops.sliced_conv.ragged import sliced_conv2d_ragged
from effkern.ops.sliced_conv.steps import AttentionStep, MeanStep, SlicedStep

__all__ = [
    "AttentionStep",
    "MeanStep",
    "SlicedStep",
    "sliced_chain",
    "sliced_conv2d",
    "sliced_conv2d_packed",
    "sliced_conv2d_ragged",
    "sliced_conv2d_ragged_packed",
    "sliced_dw_pw",
    "sliced_dw_pw_packed",
    "sliced_linear",
    "sliced_linear_ragged",
]


def _fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    c_out: int,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    group_mode: str,
    scale: Tensor | None,
    shift: Tensor | None,
    act: str,
    algo: str,
) -> Tensor:
    op = "sliced_conv2d"
    check.check_map(x, op)
    check.check_weight(weight, groups, x, op)
    check_slice(op, weight, x.size(1), c_out, groups, group_mode)
    check.check_geometry(stride, padding, dilation, op)
    check_bias(bias, weight, c_out, groups, group_mode, x, op)
    for vector, name in ((scale, "scale"), (shift, "shift")):
        check.check_vector(vector, c_out, x, op, name)
    check.check_act(act, op)
    check.check_algo(algo, op)
    h, w = check.output_map(x, weight.shape[2:], stride, padding, dilation, op)
    return empty_like_layout(x, [x.size(0), c_out, h, w])


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, weight, bias, c_out, stride, padding, dilation, groups, group_mode, scale, shift, act, algo = inputs
    ctx.save_for_backward(x, weight, bias, scale, shift, output)
    ctx.options = (c_out, stride, padding, dilation, groups, group_mode, act, algo)


def _backward(ctx: Any, grad: Tensor) -> tuple:
    x, weight, bias, scale, shift, y = ctx.saved_tensors
    c_out, stride, padding, dilation, groups, group_mode, act, algo = ctx.options
    dtype = compute_dtype(x)

    def forward(scale: Tensor | None, shift: Tensor | None) -> Tensor:
        """The op without its activation, in fp32, where a gradient needs a value from inside the epilogue."""
        options = (c_out, stride, padding, dilation, groups, group_mode, scale, shift, "none", algo)
        return _sliced_conv2d(x.to(dtype), weight.to(dtype), bias, *options)

    def column(vector: Tensor) -> Tensor:
        return vector[:c_out].to(dtype).view(1, -1, 1, 1)

    def whole(vector: Tensor | None, part: Tensor) -> Tensor | None:
        """A gradient of the first c_out elements as one of the whole vector."""
        return None if vector is None else torch.nn.functional.pad(part, (0, vector.size(0) - c_out)).to(vector.dtype)

    needs = dict(zip(_sliced_conv2d.arguments, ctx.needs_input_grad, strict=True))
    g = grad
    if act in ("hardswish", "silu") or scale is not None or shift is not None:
        g, act = activation_backward(grad.to(dtype), y, lambda: forward(scale, shift), act), "none"
    g_shift = whole(shift, channel_sum(g)) if needs["shift"] else None
    g_scale = whole(scale, channel_sum(g * forward(None, None))) if needs["scale"] else None
    if scale is not None:
        g = g * column(scale)
    gx, gw, gb, _ = conv2d_backward(
        g, None if act == "none" else y, x, weight, stride, padding, dilation, groups, group_mode, act, algo,
        (needs["x"], needs["weight"], needs["bias"], False),
    )  # fmt: skip
    g_bias = None
    if needs["bias"]:
        g_bias = unslice_bias(gb, bias.size(0), groups, group_mode).to(bias.dtype)
    gx, gw = gx if needs["x"] else None, gw if needs["weight"] else None
    return gx, gw, g_bias, None, None, None, None, None, None, g_scale, g_shift, None, None


_sliced_conv2d = Op(
    "sliced_conv2d",
    "(Tensor x, Tensor weight, Tensor? bias, SymInt c_out, int[] stride, int[] padding, int[] dilation, int groups, "
    "str group_mode, Tensor? scale, Tensor? shift, str act, str algo) -> Tensor",
    fake=_fake,
    reference=reference.sliced_conv2d,
    setup_context=_setup_context,
    backward=_backward,
    autocast=("x", "weight"),
)


def sliced_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    c_out: int | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    group_mode: str = "prefix_groups",
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    act: str = "none",
    algo: str = "auto",
) -> Tensor:
    """Convolve with the leading ``x.size(1)`` x ``c_out`` channels of ``weight``; the rest is neither read nor copied.

    ``y = act((conv2d(x, part of weight) + bias) * scale + shift)``, one store per output element.

    Args:
        x: ``[N, c_in, H, W]``, float32, bfloat16 or float16, any strides. A channel slice of a wider channels_last
            tensor is read in place.
        weight: ``[Co, Ci / groups, kh, kw]``, x's dtype: the whole weight.
        bias: 1-d, float32 or x's dtype. The bias of the whole layer, of which the running outputs' elements are taken;
            where those are the leading ones, ``c_out`` elements are enough.
        scale, shift: 1-d with at least ``c_out`` elements, float32 or x's dtype: the batch norm of the width that runs
            (switchable batch norm), one element a computed channel. ``scale`` must be finite.
        c_out: output channels to compute, at most ``Co``. Default: all of them (with ``prefix_groups``: those of the
            groups that run).
        groups: groups of the whole weight.
        group_mode: ``"prefix_groups"``: channels per group are fixed and the first ``c_in / (Ci / groups)`` groups run
            (depthwise, slimmable ResNeXt). ``"within_group"``: all groups run, each with a prefix of its channels.
            No difference for ``groups=1``.
        act: ``"none"``, ``"relu"``, ``"relu6"``, ``"hardswish"`` or ``"silu"``.
        algo: ``"auto"`` or ``"direct"``.

    Returns:
        ``[N, c_out, Ho, Wo]`` in x's dtype and layout; sums are kept in float32. A sample's result does not depend on
        the other samples or on the number of threads, bit for bit.

    Raises:
        ValueError: a shape, width, group count or option that does not fit; a non-finite ``scale``.
        TypeError: a dtype that is not supported or differs from x's.

    Differentiable, twice, in ``x``, ``weight``, ``bias``, ``scale`` and ``shift``; gradients have full size and are
    zero outside the running part.

    Where no gradient is wanted the packed weight of the last call is used again as long as the weight is unchanged; see
    :func:`effkern.invalidate` for the edits that go unnoticed.

    Source: slimmable networks (Yu et al., ICLR 2019) and DS-Net (Li et al., CVPR 2021) define the slicing.

    >>> import torch
    >>> x, weight = torch.ones(1, 2, 1, 1), torch.arange(12.0).reshape(3, 4, 1, 1)
    >>> sliced_conv2d(x, weight, c_out=2).flatten()
    tensor([1., 9.])
    """
    if c_out is None:
        c_out = weight.size(0)
        if groups > 1 and group_mode == "prefix_groups" and weight.size(1) > 0:
            c_out = x.size(1) // weight.size(1) * (c_out // groups)
    behind = (groups, group_mode, scale, shift, act, algo)
    y = by_the_short_way(x, weight, bias, c_out, stride, padding, dilation, *behind)
    if y is not None:
        return y
    geometry = (check.pair(stride, "stride"), check.pair(padding, "padding"), check.pair(dilation, "dilation"))
    options = (*geometry, *behind)
    handle = remembered(x, weight, bias, groups, algo, (scale, shift))
    if handle is not None:
        with suppress(ValueError, TypeError, IndexError):  # below they are raised in this op's name
            return _packed(x, handle, weight.size(0), list(weight.shape[2:]), c_out, *options)
    return _sliced_conv2d(x, weight, bias, c_out, *options)
