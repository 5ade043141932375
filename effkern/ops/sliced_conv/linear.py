"""Sliced linear layers: the leading features of one weight, per call or per sample."""

from __future__ import annotations

import math
from contextlib import suppress
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from effkern.ops import _checks as check
from effkern.ops._autograd import activation_backward, compute_dtype
from effkern.ops._registry import Op
from effkern.ops._slices import check_slice
from effkern.ops.sliced_conv import reference
from effkern.ops.sliced_conv._checks import check_tables, check_widths
from effkern.ops.sliced_conv.packed import _packed, _ragged_packed, by_the_short_way, remembered
from effkern.ops.sliced_conv.ragged_backward import ragged_backward

_GEOMETRY = ([1, 1], [0, 0], [1, 1], 1, "prefix_groups")  # of the 1x1 convolution that a linear layer is


def _check_matrices(x: Tensor, weight: Tensor, op: str) -> None:
    if x.dim() != 2:
        raise ValueError(f"{op}: x must be 2-d [N, C], got shape {list(x.shape)}")
    if weight.dim() != 2:
        raise ValueError(f"{op}: weight must be 2-d [out, in], got shape {list(weight.shape)}")
    check.check_dtype(x, op, "x")
    check.check_dtype(weight, op, "weight", x.dtype)
    check.check_device(weight, x, op, "weight")


def _map(x: Tensor) -> Tensor:
    return x.unsqueeze(2).unsqueeze(3)  # an index of two None costs several times as much


def _remembered(x: Tensor, weight: Tensor, bias: Tensor | None, options: tuple) -> Tensor | None:
    """The handle of the 1x1 convolution that the layer is, where the memo may give one; ``options`` from scale on."""
    if weight.dim() != 2 or x.dim() != 2:
        return None
    return remembered(x, weight, bias, 1, options[-1], options[:2])


def _fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    out_features: int,
    scale: Tensor | None,
    shift: Tensor | None,
    act: str,
    algo: str,
) -> Tensor:
    op = "sliced_linear"
    _check_matrices(x, weight, op)
    names = ("x's features", "out_features")
    check_slice(op, weight, x.size(1), out_features, 1, "prefix_groups", names)
    for vector, name in ((bias, "bias"), (scale, "scale"), (shift, "shift")):
        check.check_vector(vector, out_features, x, op, name)
    check.check_act(act, op)
    check.check_algo(algo, op)
    return x.new_empty([x.size(0), out_features])


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, weight, bias, out_features, scale, shift, act, algo = inputs
    ctx.save_for_backward(x, weight, bias, scale, shift, output)
    ctx.options = (out_features, act, algo)


def _backward(ctx: Any, grad: Tensor) -> tuple:
    x, weight, bias, scale, shift, y = ctx.saved_tensors
    outs, act, algo = ctx.options
    dtype = compute_dtype(x)
    part = weight[:outs, : x.size(1)].to(dtype)
    needs = dict(zip(_linear.arguments, ctx.needs_input_grad, strict=True))

    def forward(scale: Tensor | None, shift: Tensor | None) -> Tensor:
        return _linear(x.to(dtype), weight.to(dtype), bias, outs, scale, shift, "none", algo)

    def whole(vector: Tensor, part: Tensor) -> Tensor:
        return F.pad(part, (0, vector.size(0) - outs)).to(vector.dtype)

    g = activation_backward(grad.to(dtype), y, lambda: forward(scale, shift), act)
    g_shift = whole(shift, g.sum(0)) if needs["shift"] else None
    g_scale = whole(scale, (g * forward(None, None)).sum(0)) if needs["scale"] else None
    if scale is not None:
        g = g * scale[:outs].to(dtype)
    g_bias = whole(bias, g.sum(0)) if needs["bias"] else None
    g_x = (g @ part).to(x.dtype) if needs["x"] else None
    g_weight = None
    if needs["weight"]:
        pad = (0, weight.size(1) - x.size(1), 0, weight.size(0) - outs)
        g_weight = F.pad(g.t() @ x.to(dtype), pad).to(weight.dtype)
    return g_x, g_weight, g_bias, None, g_scale, g_shift, None, None


_linear = Op(
    "sliced_linear",
    "(Tensor x, Tensor weight, Tensor? bias, SymInt out_features, Tensor? scale, Tensor? shift, str act, str algo) "
    "-> Tensor",
    fake=_fake,
    reference=reference.sliced_linear,
    setup_context=_setup_context,
    backward=_backward,
    autocast=("x", "weight"),
)


def sliced_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    out_features: int | None = None,
    act: str = "none",
    *,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    algo: str = "auto",
) -> Tensor:
    """Linear layer over the leading ``x.size(-1)`` inputs and ``out_features`` outputs of ``weight``.

    ``y = act((x @ weight[:out_features, :x.size(-1)].T + bias) * scale + shift)``; see `sliced_conv2d`, whose 1x1 case
    this is.

    Args:
        x: ``[..., c_in]``, float32, bfloat16 or float16.
        weight: ``[out, in]``, x's dtype: the whole weight.
        bias, scale, shift: 1-d with at least ``out_features`` elements, float32 or x's dtype. ``scale`` must be finite.
        out_features: outputs to compute, by default all.
        act: ``"none"``, ``"relu"``, ``"relu6"``, ``"hardswish"`` or ``"silu"``.
        algo: ``"auto"`` or ``"direct"``.

    Returns:
        ``[..., out_features]``, contiguous, in x's dtype.

    Raises:
        ValueError: a shape, width or option that does not fit; a non-finite ``scale``.
        TypeError: a dtype that is not supported or differs from x's.

    Differentiable, twice.

    >>> import torch
    >>> sliced_linear(torch.ones(1, 2), torch.arange(6.0).reshape(2, 3), out_features=2)
    tensor([[1., 7.]])
    """
    if x.dim() == 0:
        raise ValueError("sliced_linear: x must have at least one dimension, got a scalar")
    out_features = weight.size(0) if out_features is None else out_features
    flat = x if x.dim() == 2 else x.reshape(math.prod(x.shape[:-1]), x.size(-1))
    y = _run(flat, weight, bias, out_features, scale, shift, act, algo)
    return y if x.dim() == 2 else y.view(*x.shape[:-1], out_features)


def _run(x: Tensor, weight: Tensor, bias: Tensor | None, outs: int, *options: Any) -> Tensor:
    y = by_the_short_way(x, weight, bias, outs, *_GEOMETRY, *options)
    if y is not None:
        return y.flatten(1)
    handle = _remembered(x, weight, bias, options)
    if handle is not None:
        with suppress(ValueError, TypeError, IndexError):  # below they are raised in this op's name
            return _packed(_map(x), handle, weight.size(0), [1, 1], outs, *_GEOMETRY, *options).flatten(1)
    return _linear(x, weight, bias, outs, *options)


def _ragged_fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    c_in: Tensor,
    c_out: Tensor,
    c_out_max: int,
    scale_table: Tensor | None,
    shift_table: Tensor | None,
    width_idx: Tensor | None,
    act: str,
    algo: str,
    zero_tail: bool,
) -> Tensor:
    op = "sliced_linear_ragged"
    _check_matrices(x, weight, op)
    check.check_vector(bias, weight.size(0), x, op, "bias", exact=True)
    check_widths(x, weight.size(0), c_in, c_out, c_out_max, op)
    check_tables(x, c_out_max, scale_table, shift_table, width_idx, op)
    check.check_act(act, op)
    check.check_algo(algo, op)
    return x.new_empty([x.size(0), c_out_max])


def _ragged_setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, weight, bias, c_in, c_out, _, scale_table, shift_table, width_idx, act, algo, _ = inputs
    ctx.save_for_backward(x, weight, bias, c_in, c_out, scale_table, shift_table, width_idx, output)
    ctx.act, ctx.algo = act, algo


def _ragged_backward(ctx: Any, grad: Tensor) -> tuple:
    x, weight, bias, c_in, c_out, scale_table, shift_table, width_idx, y = ctx.saved_tensors
    inputs = ("x", "weight", "bias", "scale_table", "shift_table")
    needs = [ctx.needs_input_grad[_linear_ragged.arguments.index(name)] for name in inputs]
    grad, y, x, weight = (t[:, :, None, None] for t in (grad, y, x, weight))
    grads = ragged_backward(
        grad, y, x, weight, bias, c_in, c_out, *_GEOMETRY, scale_table, shift_table, width_idx, ctx.act, ctx.algo, needs
    )  # fmt: skip
    given = {name: g for name, g, need in zip(inputs, grads, needs, strict=True) if need}
    for name in given.keys() & {"x", "weight"}:
        given[name] = given[name][:, :, 0, 0]
    return tuple(given.get(name) for name in _linear_ragged.arguments)


_linear_ragged = Op(
    "sliced_linear_ragged",
    "(Tensor x, Tensor weight, Tensor? bias, Tensor c_in, Tensor c_out, SymInt c_out_max, Tensor? scale_table, "
    "Tensor? shift_table, Tensor? width_idx, str act, str algo, bool zero_tail) -> Tensor",
    fake=_ragged_fake,
    reference=reference.sliced_linear_ragged,
    setup_context=_ragged_setup_context,
    backward=_ragged_backward,
    autocast=("x", "weight"),
)


def sliced_linear_ragged(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    c_in: Tensor,
    c_out: Tensor,
    c_out_max: int | None = None,
    act: str = "none",
    *,
    scale_table: Tensor | None = None,
    shift_table: Tensor | None = None,
    width_idx: Tensor | None = None,
    algo: str = "auto",
    zero_tail: bool = True,
) -> Tensor:
    """Linear layer of which every sample uses its own leading features; `sliced_conv2d_ragged` for ``x [N, C]``.

    Args:
        x: ``[N, C]``, float32, bfloat16 or float16. Features from ``c_in[n]`` on are not read.
        weight: ``[out, in]``, x's dtype: the whole weight.
        bias: ``[out]``, float32 or x's dtype.
        c_in, c_out: ``[N]``, int32 or int64, on x's device.
        c_out_max: features of the result, by default ``out``.
        act: ``"none"``, ``"relu"``, ``"relu6"``, ``"hardswish"`` or ``"silu"``.
        scale_table, shift_table: ``[W, >= c_out_max]``, float32 or x's dtype.
        width_idx: ``[N]``, int32 or int64: the row of the tables that a sample uses.
        algo: ``"auto"`` or ``"direct"``.
        zero_tail: False: nothing is written from ``c_out[n]`` on, see `sliced_conv2d_ragged`.

    Returns:
        ``[N, c_out_max]``, contiguous, in x's dtype, with exact zeros from ``c_out[n]`` on (but see ``zero_tail``).

    Raises:
        ValueError: a shape, width or option that does not fit; names the sample of a wrong width.
        TypeError: a dtype that is not supported.

    Differentiable, once.

    >>> import torch
    >>> x, weight = torch.ones(2, 2), torch.arange(6.0).reshape(3, 2)
    >>> sliced_linear_ragged(x, weight, None, torch.tensor([1, 2]), torch.tensor([3, 2]))
    tensor([[0., 2., 4.],
            [1., 5., 0.]])
    """
    widths = (c_in, c_out, weight.size(0) if c_out_max is None else c_out_max)
    options = (scale_table, shift_table, width_idx, act, algo)
    handle = _remembered(x, weight, bias, options)
    if handle is not None:
        with suppress(ValueError, TypeError, IndexError):  # below they are raised in this op's name
            y = _ragged_packed(_map(x), handle, weight.size(0), [1, 1], *widths, *_GEOMETRY, *options, zero_tail)
            return y.flatten(1)
    return _linear_ragged(x, weight, bias, *widths, *options, zero_tail)
