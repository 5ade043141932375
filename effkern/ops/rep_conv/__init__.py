"""Re-parameterized convolution: what all branches of a folded block became, with its epilogue in the same pass.

``y = act(conv2d(x, weight) + bias + residual)``, one store per output element.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from effkern.ops import _checks as check
from effkern.ops import _direct
from effkern.ops._autograd import activation_backward
from effkern.ops._conv_backward import conv2d_backward
from effkern.ops._handle import check_bytes
from effkern.ops._memo import memo
from effkern.ops._pack import CACHE_BYTES, pack_conv_weight, with_transforms
from effkern.ops._registry import Op, empty_like_layout
from effkern.ops.rep_conv import composed, reference

__all__ = ["pack_conv_weight", "rep_conv2d", "rep_conv2d_packed"]

Ints = Sequence[int]


def _checked_output(
    x: Tensor, out_channels: int, in_channels: int, kernel: Ints, geometry: tuple[Ints, Ints, Ints], act: str,
    residual: Tensor | None, algo: str, op: str,
) -> Tensor:  # fmt: skip
    """The output as the kernels lay it out, after the checks both ops share."""
    if x.size(1) != in_channels:
        raise ValueError(f"{op}: x must have the weight's {in_channels} channels, got {x.size(1)}")
    check.check_geometry(*geometry, op)
    check.check_act(act, op)
    check.check_algo(algo, op)
    rows, columns = check.output_map(x, kernel, *geometry, op)
    shape = [x.size(0), out_channels, rows, columns]
    if residual is not None:
        check.check_map(residual, op, "residual")
        check.check_dtype(residual, op, "residual", x.dtype)
        check.check_device(residual, x, op, "residual")
        if list(residual.shape) != shape:
            raise ValueError(f"{op}: residual must have the output's shape {shape}, got {list(residual.shape)}")
    return empty_like_layout(x, shape)


def _gradient(
    grad: Tensor, x: Tensor, weight: Tensor, y: Tensor, bias: Tensor | None, residual: Tensor | None,
    geometry: tuple[Ints, Ints, Ints], groups: int, act: str, algo: str,
    needs: tuple[bool, bool, bool, bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients at x, the weight, the bias and the activation's input, all differentiable again."""

    def pre() -> Tensor:
        # In fp32 also for 16-bit storage: the slope of a rounded pre-activation would be another function's.
        wide = None if residual is None else residual.float()
        offset = None if bias is None else bias.float()
        return _op(x.float(), weight.float(), offset, *geometry, groups, "none", wide, algo)

    if act in ("hardswish", "silu"):  # slopes that do not show in y
        grad, act = activation_backward(grad.float(), y, pre, act), "none"
    masked = act != "none"
    wanted = (*needs[:3], needs[3] and masked)
    grads = conv2d_backward(
        grad, y if masked else None, x, weight, *geometry, groups, "within_group", act, algo, wanted
    )
    return grads if masked else (*grads[:3], grad)


def _fake(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: Ints, padding: Ints, dilation: Ints, groups: int, act: str,
    residual: Tensor | None, algo: str,
) -> Tensor:  # fmt: skip
    op = "rep_conv2d"
    check.check_map(x, op)
    check.check_weight(weight, groups, x, op)
    check.check_vector(bias, weight.size(0), x, op, "bias", exact=True)
    geometry = (stride, padding, dilation)
    in_channels = weight.size(1) * groups
    return _checked_output(x, weight.size(0), in_channels, weight.shape[2:], geometry, act, residual, algo, op)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, stride, padding, dilation, groups, act, residual, algo = inputs
    ctx.save_for_backward(x, weight, bias, residual, output)
    ctx.geometry, ctx.groups, ctx.act, ctx.algo = (stride, padding, dilation), groups, act, algo


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, bias, residual, y = ctx.saved_tensors
    needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
    needs = (needs_x, needs_weight, needs_bias, ctx.needs_input_grad[8])
    gx, gw, gb, gz = _gradient(grad, x, weight, y, bias, residual, ctx.geometry, ctx.groups, ctx.act, ctx.algo, needs)
    return (
        gx if needs_x else None,
        gw if needs_weight else None,
        gb.to(bias.dtype) if needs_bias else None,
        *[None] * 5,
        gz.to(residual.dtype) if needs[3] else None,
        None,
    )


_op = Op(
    "rep_conv2d",
    "(Tensor x, Tensor weight, Tensor? bias, SymInt[2] stride, SymInt[2] padding, SymInt[2] dilation, SymInt groups, "
    "str act, Tensor? residual, str algo) -> Tensor",
    fake=_fake,
    reference=reference.rep_conv2d,
    setup_context=_save,
    backward=_backward,
    autocast=("x", "weight", "residual"),
)


def _fake_packed(
    x: Tensor, handle: Tensor, out_channels: int, kernel_size: Ints, stride: Ints, padding: Ints, dilation: Ints,
    groups: int, act: str, residual: Tensor | None, algo: str,
) -> Tensor:  # fmt: skip
    op = "rep_conv2d_packed"
    check.check_map(x, op)
    if handle.dim() != 1 or handle.dtype != torch.uint8:
        raise TypeError(
            f"{op}: handle must be a 1-d uint8 tensor made by pack_conv_weight, got {handle.dtype} of shape "
            f"{list(handle.shape)}"
        )
    check.check_device(handle, x, op, "handle")
    if groups < 1 or out_channels < 0 or out_channels % groups or x.size(1) % groups:
        raise ValueError(
            f"{op}: groups must divide out_channels and x's channels, got {groups} for {out_channels} and {x.size(1)}"
        )
    if len(kernel_size) != 2 or kernel_size[0] < 1 or kernel_size[1] < 1:
        raise ValueError(f"{op}: kernel_size must be 2 ints of at least 1, got {tuple(kernel_size)}")
    dims = (out_channels, x.size(1) // groups, kernel_size[0], kernel_size[1], groups)
    check_bytes(handle, dims, op)
    geometry = (stride, padding, dilation)
    return _checked_output(x, out_channels, x.size(1), kernel_size, geometry, act, residual, algo, op)


def _save_packed(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, handle, out_channels, kernel_size, stride, padding, dilation, groups, act, residual, algo = inputs
    ctx.save_for_backward(x, handle, residual, output)
    ctx.dims = (out_channels, kernel_size, groups)
    ctx.geometry, ctx.act, ctx.algo = (stride, padding, dilation), act, algo


def _backward_packed(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, handle, residual, y = ctx.saved_tensors
    out_channels, kernel_size, groups = ctx.dims
    needs_x, needs_residual = ctx.needs_input_grad[0], ctx.needs_input_grad[9]
    weight, bias = reference.unpack_conv_weight(handle, out_channels, x.size(1) // groups, kernel_size, groups)
    needs = (needs_x, False, False, needs_residual)
    gx, _, _, gz = _gradient(grad, x, weight, y, bias, residual, ctx.geometry, groups, ctx.act, ctx.algo, needs)
    return (
        gx if needs_x else None,
        *[None] * 8,
        gz.to(residual.dtype) if needs_residual else None,
        None,
    )


_packed_op = Op(
    "rep_conv2d_packed",
    "(Tensor x, Tensor handle, SymInt out_channels, SymInt[2] kernel_size, SymInt[2] stride, SymInt[2] padding, "
    "SymInt[2] dilation, SymInt groups, str act, Tensor? residual, str algo) -> Tensor",
    fake=_fake_packed,
    reference=reference.rep_conv2d_packed,
    composed=composed.rep_conv2d_packed,
    setup_context=_save_packed,
    backward=_backward_packed,
    autocast=("x", "residual"),
)


def rep_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Ints = 1,
    padding: int | Ints = 0,
    dilation: int | Ints = 1,
    groups: int = 1,
    act: str = "relu",
    residual: Tensor | None = None,
    algo: str = "auto",
) -> Tensor:
    """Convolve, add bias and residual, apply the activation: ``act(conv2d(x, weight) + bias + residual)``.

    The inference form of RepVGG-like blocks (Ding et al., CVPR 2021; :mod:`effkern.reparam` folds them). Sums are kept
    in fp32 for every storage type and rounded once. A sample's result depends on nothing but the sample: not on the
    rest of the batch, not on the number of threads.

    Args:
        x: ``[n, ci, h, w]``, float32, bfloat16 or float16, any strides; channels_last is the fast layout.
        weight: ``[co, ci / groups, kh, kw]`` of x's dtype, any strides.
        bias: ``[co]``, float32 or x's dtype.
        stride, padding, dilation: an int or one for rows and one for columns.
        groups: divides ``ci`` and ``co``.
        act: ``"none"``, ``"relu"``, ``"relu6"``, ``"hardswish"`` or ``"silu"``.
        residual: ``[n, co, ho, wo]`` of x's dtype, any strides; added before the activation.
        algo: ``"auto"`` or ``"direct"``. With ``"direct"`` a NaN or Inf in ``x`` reaches only the outputs whose
            receptive field holds it.

    Returns:
        ``[n, co, ho, wo]`` in x's dtype; channels_last if ``x`` is, else contiguous.

    Raises:
        ValueError: for shapes, groups, geometry or names that do not fit.
        TypeError: for other dtypes, or dtypes that differ.

    Differentiable (twice) in x, weight, bias and residual; under autocast x, weight and residual are cast. Where no
    gradient is wanted the packed weight of the last call is used again as long as the weight is unchanged; see
    :func:`effkern.invalidate` for the edits that go unnoticed. It holds Winograd's transforms too as long as all such
    packs together are below 12 MiB.

    >>> rep_conv2d(torch.ones(1, 1, 3, 3), torch.full((1, 1, 3, 3), -1.0), torch.tensor([5.0])).item()
    0.0
    """
    compiling = torch.compiler.is_compiling()
    if not compiling:
        known = memo().quick.get((id(weight), id(bias), "conv", groups, algo))
        if known is not None:
            y = _direct.rep_conv2d(x, weight, bias, *known, stride, padding, dilation, groups, act, residual, algo)
            if y is not None:
                memo().hits += 1
                return y
    geometry = (check.pair(stride, "stride"), check.pair(padding, "padding"), check.pair(dilation, "dilation"))
    if not compiling and weight.dim() == 4 and weight.dtype == x.dtype and x.is_cpu:

        def pack() -> Tensor:
            size = with_transforms(weight, groups, geometry[0], geometry[2]) if algo == "auto" else 0
            fits = 0 < size <= min(CACHE_BYTES, memo().limit) - memo().bytes
            return pack_conv_weight(weight, bias, groups, "winograd" if fits else algo)

        handle = memo().packed((weight, bias), ("conv", groups, algo), pack, (x, residual))
        if handle is not None:
            return _packed_op(x, handle, weight.size(0), weight.shape[2:], *geometry, groups, act, residual, algo)
    return _op(x, weight, bias, *geometry, groups, act, residual, algo)


def rep_conv2d_packed(
    x: Tensor,
    handle: Tensor,
    out_channels: int,
    kernel_size: int | Ints,
    stride: int | Ints = 1,
    padding: int | Ints = 0,
    dilation: int | Ints = 1,
    groups: int = 1,
    act: str = "relu",
    residual: Tensor | None = None,
    algo: str = "auto",
) -> Tensor:
    """:func:`rep_conv2d` with a weight and bias packed before: nothing is packed or looked up per call.

    Args:
        x: ``[n, ci, h, w]``, float32, bfloat16 or float16, any strides.
        handle: made by :func:`pack_conv_weight`, contiguous.
        out_channels: ``co`` of the packed weight.
        kernel_size: kernel of the packed weight.
        stride, padding, dilation: an int or one for rows and one for columns.
        groups: as packed.
        act: ``"none"``, ``"relu"``, ``"relu6"``, ``"hardswish"`` or ``"silu"``.
        residual: ``[n, co, ho, wo]`` of x's dtype, any strides; added before the activation.
        algo: ``"auto"`` or ``"direct"``.

    Returns:
        ``[n, co, ho, wo]`` in x's dtype; channels_last if ``x`` is, else contiguous.

    Raises:
        ValueError: if the handle is truncated or corrupt or was packed for other dimensions, or if shapes do not fit.
        TypeError: for other dtypes.

    Differentiable (twice) in x and residual.
    """
    if not torch.compiler.is_compiling():
        y = _direct.rep_conv2d_packed(
            x, handle, out_channels, kernel_size, stride, padding, dilation, groups, act, residual, algo
        )
        if y is not None:
            return y
    geometry = (check.pair(stride, "stride"), check.pair(padding, "padding"), check.pair(dilation, "dilation"))
    kernel = check.pair(kernel_size, "kernel_size")
    return _packed_op(x, handle, out_channels, kernel, *geometry, groups, act, residual, algo)
