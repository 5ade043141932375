"""A depthwise convolution and the pointwise one behind it in one pass, at leading widths."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from effkern.ops import _checks as check
from effkern.ops._autograd import activate, compute_dtype
from effkern.ops._registry import Op, empty_like_layout
from effkern.ops._slices import check_slice
from effkern.ops.sliced_conv import composed, reference
from effkern.ops.sliced_conv._checks import check_bias
from effkern.ops.sliced_conv.packed import _check_handle, remembered

Ints = Sequence[int]


def _check_call(
    op: str,
    x: Tensor,
    kernel: Ints,
    c_out: int,
    stride: Ints,
    padding: Ints,
    dilation: Ints,
    vectors: Sequence[tuple[Tensor | None, str, int]],
    acts: Sequence[tuple[str, str]],
    residual: Tensor | None,
    algo: str,
) -> Tensor:
    """What both forms check beyond their weights; returns the empty output."""
    check.check_geometry(stride, padding, dilation, op)
    for vector, name, least in vectors:
        check.check_vector(vector, least, x, op, name)
    for act, name in acts:
        check.check_choice(act, check.ACTIVATIONS, op, name)
    check.check_algo(algo, op)
    h, w = check.output_map(x, kernel, stride, padding, dilation, op)
    shape = [x.size(0), c_out, h, w]
    if residual is not None:
        check.check_map(residual, op, "residual")
        check.check_dtype(residual, op, "residual", x.dtype)
        check.check_device(residual, x, op, "residual")
        if list(residual.shape) != shape:
            raise ValueError(f"{op}: residual must have the output's shape {shape}, got {list(residual.shape)}")
    return empty_like_layout(x, shape)


def _fake(
    x: Tensor,
    dw_weight: Tensor,
    dw_bias: Tensor | None,
    pw_weight: Tensor,
    pw_bias: Tensor | None,
    c_out: int,
    stride: Ints,
    padding: Ints,
    dilation: Ints,
    dw_scale: Tensor | None,
    dw_shift: Tensor | None,
    dw_act: str,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    act: str,
    algo: str,
) -> Tensor:
    op = "sliced_dw_pw"
    check.check_map(x, op)
    if dw_weight.dim() != 4 or dw_weight.size(0) < 1 or dw_weight.size(1) != 1:
        raise ValueError(f"{op}: dw_weight must be depthwise, [C, 1, kh, kw], got shape {list(dw_weight.shape)}")
    check.check_weight(dw_weight, dw_weight.size(0), x, op, "dw_weight")
    check.check_weight(pw_weight, 1, x, op, "pw_weight")
    if list(pw_weight.shape[2:]) != [1, 1]:
        raise ValueError(f"{op}: pw_weight must have a 1x1 kernel, got shape {list(pw_weight.shape)}")
    c_mid = x.size(1)
    names = ("x's channels", "x's channels")
    check_slice(op, dw_weight, c_mid, c_mid, dw_weight.size(0), "prefix_groups", names)
    check_slice(op, pw_weight, c_mid, c_out, 1, "prefix_groups")
    check.check_vector(dw_bias, c_mid, x, op, "dw_bias")
    check_bias(pw_bias, pw_weight, c_out, 1, "prefix_groups", x, op)
    vectors = ((dw_scale, "dw_scale", c_mid), (dw_shift, "dw_shift", c_mid), (scale, "scale", c_out),
               (shift, "shift", c_out))  # fmt: skip
    return _check_call(
        op, x, dw_weight.shape[2:], c_out, stride, padding, dilation, vectors, ((dw_act, "dw_act"), (act, "act")),
        residual, algo,
    )  # fmt: skip


def _packed_fake(
    x: Tensor,
    dw_handle: Tensor,
    pw_handle: Tensor,
    channels: int,
    kernel_size: Ints,
    out_channels: int,
    c_out: int,
    stride: Ints,
    padding: Ints,
    dilation: Ints,
    dw_scale: Tensor | None,
    dw_shift: Tensor | None,
    dw_act: str,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    act: str,
    algo: str,
) -> Tensor:
    op = "sliced_dw_pw_packed"
    _check_handle(x, dw_handle, channels, kernel_size, channels, "prefix_groups", op)
    _check_handle(x, pw_handle, out_channels, [1, 1], 1, "prefix_groups", op)
    c_mid = x.size(1)
    for value, most, name in ((c_mid, channels, "x's channels"), (c_out, out_channels, "c_out")):
        if value < 0 or value > most:
            raise ValueError(f"{op}: {name} must be in [0, {most}], got {value}")
    vectors = ((dw_scale, "dw_scale", c_mid), (dw_shift, "dw_shift", c_mid), (scale, "scale", c_out),
               (shift, "shift", c_out))  # fmt: skip
    return _check_call(
        op, x, kernel_size, c_out, stride, padding, dilation, vectors, ((dw_act, "dw_act"), (act, "act")), residual,
        algo,
    )  # fmt: skip


def _save_nothing(ctx: Any, inputs: tuple, output: Tensor) -> None:
    pass


def _refuse(ctx: Any, grad: Tensor) -> tuple:
    raise RuntimeError(
        "the fused operators sliced_dw_pw and sliced_dw_pw_packed have no gradient: train with "
        "effkern.ops.sliced_dw_pw, which runs two sliced convolutions where a gradient is wanted"
    )


_dw_pw = Op(
    "sliced_dw_pw",
    "(Tensor x, Tensor dw_weight, Tensor? dw_bias, Tensor pw_weight, Tensor? pw_bias, SymInt c_out, int[] stride, "
    "int[] padding, int[] dilation, Tensor? dw_scale, Tensor? dw_shift, str dw_act, Tensor? scale, Tensor? shift, "
    "Tensor? residual, str act, str algo) -> Tensor",
    fake=_fake,
    reference=reference.sliced_dw_pw,
    setup_context=_save_nothing,
    backward=_refuse,
    autocast=("x", "dw_weight", "pw_weight", "residual"),
)

_dw_pw_packed = Op(
    "sliced_dw_pw_packed",
    "(Tensor x, Tensor dw_handle, Tensor pw_handle, SymInt channels, SymInt[2] kernel_size, SymInt out_channels, "
    "SymInt c_out, SymInt[2] stride, SymInt[2] padding, SymInt[2] dilation, Tensor? dw_scale, Tensor? dw_shift, "
    "str dw_act, Tensor? scale, Tensor? shift, Tensor? residual, str act, str algo) -> Tensor",
    fake=_packed_fake,
    reference=reference.sliced_dw_pw_packed,
    composed=composed.sliced_dw_pw_packed,
    setup_context=_save_nothing,
    backward=_refuse,
    autocast=("x", "residual"),
)


def sliced_dw_pw(
    x: Tensor,
    dw_weight: Tensor,
    dw_bias: Tensor | None,
    pw_weight: Tensor,
    pw_bias: Tensor | None = None,
    c_out: int | None = None,
    stride: int | Ints = 1,
    padding: int | Ints = 0,
    dilation: int | Ints = 1,
    dw_scale: Tensor | None = None,
    dw_shift: Tensor | None = None,
    dw_act: str = "none",
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
    act: str = "none",
    algo: str = "auto",
) -> Tensor:
    """A depthwise convolution and the pointwise one behind it, each with its own batch norm and activation.

    ``m = dw_act((depthwise(x) + dw_bias) * dw_scale + dw_shift)``, then
    ``y = act((pointwise(m) + pw_bias) * scale + shift + residual)``. For channels_last float32 a few rows of ``m`` at a
    time are computed into the cache and consumed there; the result is that of `sliced_conv2d` twice, bit for bit.

    Args:
        x: ``[N, c_mid, H, W]``, float32, bfloat16 or float16, any strides. ``c_mid`` may be less than the weights have.
        dw_weight: ``[C, 1, kh, kw]``, x's dtype, of which the first ``c_mid`` filters run.
        dw_bias: 1-d with at least ``c_mid`` elements, float32 or x's dtype.
        pw_weight: ``[Co, C, 1, 1]``, x's dtype.
        pw_bias: 1-d with at least ``c_out`` elements.
        c_out: output channels to compute, by default all.
        stride, padding, dilation: of the depthwise convolution, an int or one for rows and one for columns.
        dw_scale, dw_shift: 1-d with at least ``c_mid`` elements; the scale must be finite.
        dw_act: activation between the two.
        scale, shift: 1-d with at least ``c_out`` elements; the scale must be finite.
        residual: ``[N, c_out, Ho, Wo]`` of x's dtype, added before ``act``.
        act: ``"none"``, ``"relu"``, ``"relu6"``, ``"hardswish"`` or ``"silu"``, as ``dw_act``.
        algo: ``"auto"`` or ``"direct"``.

    Returns:
        ``[N, c_out, Ho, Wo]`` in x's dtype and layout; ``m`` is rounded to x's dtype.

    Raises:
        ValueError: a shape, width or option that does not fit; a non-finite scale.
        TypeError: a dtype that is not supported or differs from x's.

    Differentiable twice in all floating-point arguments: where a gradient is wanted the two convolutions run one after
    the other.

    Source: the separable block of MobileNets (Howard et al., arXiv 1704.04861).

    >>> import torch
    >>> x, filters, mix = torch.ones(1, 2, 3, 3), torch.ones(2, 1, 3, 3), torch.ones(1, 2, 1, 1)
    >>> sliced_dw_pw(x, filters, None, mix).item()
    18.0
    """
    geometry = (check.pair(stride, "stride"), check.pair(padding, "padding"), check.pair(dilation, "dilation"))
    outs = pw_weight.size(0) if c_out is None else c_out
    epilogues = (dw_scale, dw_shift, dw_act, scale, shift, residual, act, algo)
    vectors = (dw_bias, pw_bias, dw_scale, dw_shift, scale, shift, residual)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, dw_weight, pw_weight, *vectors)):
        args = (x, dw_weight, dw_bias, pw_weight, pw_bias, outs, *geometry, *epilogues)
        _fake(*args)  # checks in this op's name
        return _one_after_the_other(*args)
    handles = None
    if dw_weight.dim() == 4 and dw_weight.size(1) == 1 and pw_weight.dim() == 4 and pw_weight.size(2) == 1:
        dw_handle = remembered(x, dw_weight, dw_bias, dw_weight.size(0), algo, (dw_scale, dw_shift))
        if dw_handle is not None:
            pw_handle = remembered(x, pw_weight, pw_bias, 1, algo, (scale, shift, residual))
            handles = None if pw_handle is None else (dw_handle, pw_handle)
    if handles is None:
        return _dw_pw(x, dw_weight, dw_bias, pw_weight, pw_bias, outs, *geometry, *epilogues)
    try:
        kernel = list(dw_weight.shape[2:])
        return _dw_pw_packed(x, *handles, dw_weight.size(0), kernel, pw_weight.size(0), outs, *geometry, *epilogues)
    except (ValueError, TypeError, IndexError):  # raised again in this op's name
        return _dw_pw(x, dw_weight, dw_bias, pw_weight, pw_bias, outs, *geometry, *epilogues)


def _one_after_the_other(
    x: Tensor,
    dw_weight: Tensor,
    dw_bias: Tensor | None,
    pw_weight: Tensor,
    pw_bias: Tensor | None,
    c_out: int,
    stride: Ints,
    padding: Ints,
    dilation: Ints,
    dw_scale: Tensor | None,
    dw_shift: Tensor | None,
    dw_act: str,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    act: str,
    algo: str,
) -> Tensor:
    from effkern.ops.sliced_conv import _sliced_conv2d  # defined after this module

    c_mid, ones, zeros = x.size(1), [1, 1], [0, 0]
    between = _sliced_conv2d(
        x, dw_weight, dw_bias, c_mid, stride, padding, dilation, dw_weight.size(0), "prefix_groups", dw_scale, dw_shift,
        dw_act, algo,
    )  # fmt: skip
    options = (c_out, ones, zeros, ones, 1, "prefix_groups", scale, shift)
    if residual is None:
        return _sliced_conv2d(between, pw_weight, pw_bias, *options, act, algo)
    dtype = compute_dtype(x)  # the sum with the residual is rounded once
    wide = _sliced_conv2d(between.to(dtype), pw_weight.to(dtype), pw_bias, *options, "none", algo)
    return activate(wide + residual.to(dtype), act).to(x.dtype)


def sliced_dw_pw_packed(
    x: Tensor,
    dw_handle: Tensor,
    pw_handle: Tensor,
    channels: int,
    kernel_size: int | Ints,
    out_channels: int,
    c_out: int | None = None,
    stride: int | Ints = 1,
    padding: int | Ints = 0,
    dilation: int | Ints = 1,
    dw_scale: Tensor | None = None,
    dw_shift: Tensor | None = None,
    dw_act: str = "none",
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
    act: str = "none",
    algo: str = "auto",
) -> Tensor:
    """`sliced_dw_pw` with both weights and biases packed before.

    Args:
        x: ``[N, c_mid, H, W]``, float32, bfloat16 or float16, any strides.
        dw_handle: made by `pack_conv_weight` from the whole depthwise weight and bias with ``groups=channels``.
        pw_handle: made by `pack_conv_weight` from the whole pointwise weight and bias.
        channels: of the whole depthwise weight.
        kernel_size: of the depthwise weight.
        out_channels: of the whole pointwise weight.
        c_out: output channels to compute, by default all.
        stride, padding, dilation, dw_scale, dw_shift, dw_act, scale, shift, residual, act, algo: as in `sliced_dw_pw`.

    Returns:
        ``[N, c_out, Ho, Wo]`` in x's dtype and layout.

    Raises:
        ValueError: a corrupt handle, one packed for other dimensions, or arguments that do not fit.
        TypeError: a dtype that is not supported.

    Not differentiable; a backward pass through it raises ``RuntimeError``.
    """
    return _dw_pw_packed(
        x, dw_handle, pw_handle, channels, check.pair(kernel_size, "kernel_size"), out_channels,
        out_channels if c_out is None else c_out, check.pair(stride, "stride"), check.pair(padding, "padding"),
        check.pair(dilation, "dilation"), dw_scale, dw_shift, dw_act, scale, shift, residual, act, algo,
    )  # fmt: skip
