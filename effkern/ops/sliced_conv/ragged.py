"""Sliced convolution with per-sample widths: every sample of a batch uses its own leading channels."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from torch import Tensor

from effkern.ops import _checks as check
from effkern.ops._registry import Op, empty_like_layout
from effkern.ops._slices import check_group_mode
from effkern.ops.sliced_conv import reference
from effkern.ops.sliced_conv._checks import check_tables, check_widths
from effkern.ops.sliced_conv.packed import _ragged_packed, remembered
from effkern.ops.sliced_conv.ragged_backward import ragged_backward


def _fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    c_in: Tensor,
    c_out: Tensor,
    c_out_max: int,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    group_mode: str,
    scale_table: Tensor | None,
    shift_table: Tensor | None,
    width_idx: Tensor | None,
    act: str,
    algo: str,
    zero_tail: bool,
) -> Tensor:
    op = "sliced_conv2d_ragged"
    check.check_map(x, op)
    check.check_weight(weight, groups, x, op)
    check_group_mode(group_mode, op)
    check.check_geometry(stride, padding, dilation, op)
    check.check_vector(bias, weight.size(0), x, op, "bias", exact=True)
    check_widths(x, weight.size(0), c_in, c_out, c_out_max, op)
    check_tables(x, c_out_max, scale_table, shift_table, width_idx, op)
    check.check_act(act, op)
    check.check_algo(algo, op)
    h, w = check.output_map(x, weight.shape[2:], stride, padding, dilation, op)
    return empty_like_layout(x, [x.size(0), c_out_max, h, w])


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, weight, bias, c_in, c_out, _, *geometry, scale_table, shift_table, width_idx, act, algo, _ = inputs
    ctx.save_for_backward(x, weight, bias, c_in, c_out, scale_table, shift_table, width_idx, output)
    ctx.options = (geometry, act, algo)


def _backward(ctx: Any, grad: Tensor) -> tuple:
    x, weight, bias, c_in, c_out, scale_table, shift_table, width_idx, y = ctx.saved_tensors
    geometry, act, algo = ctx.options
    inputs = ("x", "weight", "bias", "scale_table", "shift_table")
    needs = [ctx.needs_input_grad[_ragged.arguments.index(name)] for name in inputs]
    grads = ragged_backward(
        grad, y, x, weight, bias, c_in, c_out, *geometry, scale_table, shift_table, width_idx, act, algo, needs
    )
    given = dict(zip(inputs, (g if n else None for g, n in zip(grads, needs, strict=True)), strict=True))
    return tuple(given.get(name) for name in _ragged.arguments)


_ragged = Op(
    "sliced_conv2d_ragged",
    "(Tensor x, Tensor weight, Tensor? bias, Tensor c_in, Tensor c_out, SymInt c_out_max, int[] stride, int[] padding, "
    "int[] dilation, int groups, str group_mode, Tensor? scale_table, Tensor? shift_table, Tensor? width_idx, "
    "str act, str algo, bool zero_tail) -> Tensor",
    fake=_fake,
    reference=reference.sliced_conv2d_ragged,
    setup_context=_setup_context,
    backward=_backward,
    autocast=("x", "weight"),
)


def sliced_conv2d_ragged(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    c_in: Tensor,
    c_out: Tensor,
    c_out_max: int | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    group_mode: str = "prefix_groups",
    scale_table: Tensor | None = None,
    shift_table: Tensor | None = None,
    width_idx: Tensor | None = None,
    act: str = "none",
    algo: str = "auto",
    zero_tail: bool = True,
) -> Tensor:
    """Convolve every sample with its own leading ``c_in[n] x c_out[n]`` channels of ``weight``.

    ``y[n, :c_out[n]] = sliced_conv2d(x[n, :c_in[n]], weight, bias, c_out[n], scale=scale_table[width_idx[n]], ...)``,
    and exact zeros in the channels after (but see ``zero_tail``). Samples of equal widths run together; the widths must
    not be many for this to be fast, four to sixteen different ones are usual. Nothing is gathered or copied.

    Args:
        x: ``[N, C, H, W]``, float32, bfloat16 or float16, any strides. Channels from ``c_in[n]`` on are not read.
        weight: ``[Co, Ci / groups, kh, kw]``, x's dtype: the whole weight.
        bias: ``[Co]``, float32 or x's dtype.
        c_in, c_out: ``[N]``, int32 or int64, on x's device. 0 is a legal width. With ``groups > 1`` the pairs must fit
            ``group_mode`` as in `sliced_conv2d`.
        c_out_max: channels of the result, by default ``Co``.
        groups: groups of the whole weight.
        group_mode: ``"prefix_groups"`` or ``"within_group"``, see `sliced_conv2d`.
        scale_table, shift_table: ``[W, >= c_out_max]``, float32 or x's dtype; the batch norms of ``W`` widths. Every
            ``scale_table`` entry must be finite.
        width_idx: ``[N]``, int32 or int64: the row of the tables that a sample uses. With tables, and only then.
        act: ``"none"``, ``"relu"``, ``"relu6"``, ``"hardswish"`` or ``"silu"``.
        algo: ``"auto"`` or ``"direct"``.
        zero_tail: False: nothing is written to the channels from ``c_out[n]`` on, which hold whatever the memory held,
            NaN too. For consumers that take the widths (every ragged op reads ``c_in[n]`` channels only): it saves
            writing ``c_out_max - c_out[n]`` maps. Gradients ignore these channels.

    Returns:
        ``[N, c_out_max, Ho, Wo]`` in x's dtype and layout. A sample's result does not depend on the other samples, on
        their widths or on the number of threads, bit for bit.

    Raises:
        ValueError: a shape, width or option that does not fit; names the sample of a wrong width.
        TypeError: a dtype that is not supported.

    Differentiable, once, in ``x``, ``weight``, ``bias`` and the tables; gradients have full size and are zero outside
    the prefixes that ran. Widths in a group are summed in ascending order, samples of a width in index order.

    Where no gradient is wanted the packed weight of the last call is used again, as in `sliced_conv2d`.

    Source: DS-Net (Li et al., CVPR 2021), which runs per-sample widths one image at a time.

    >>> import torch
    >>> x, weight = torch.ones(2, 2, 1, 1), torch.arange(6.0).reshape(3, 2, 1, 1)
    >>> sliced_conv2d_ragged(x, weight, None, torch.tensor([1, 2]), torch.tensor([3, 2])).flatten(1)
    tensor([[0., 2., 4.],
            [1., 5., 0.]])
    """
    geometry = (check.pair(stride, "stride"), check.pair(padding, "padding"), check.pair(dilation, "dilation"))
    widths = (c_in, c_out, weight.size(0) if c_out_max is None else c_out_max)
    options = (*widths, *geometry, groups, group_mode, scale_table, shift_table, width_idx, act, algo, zero_tail)
    handle = remembered(x, weight, bias, groups, algo, (scale_table, shift_table))
    if handle is not None:
        with suppress(ValueError, TypeError, IndexError):  # below they are raised in this op's name
            return _ragged_packed(x, handle, weight.size(0), list(weight.shape[2:]), *options)
    return _ragged(x, weight, bias, *options)
