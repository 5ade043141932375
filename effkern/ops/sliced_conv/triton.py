"""Sliced convolutions and linear layers in Triton. The weight's running part is read in place; ragged batches are
sorted by width on the device first, depthwise ones excepted, whose samples share no weights."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from effkern.ops import sliced_conv as uniform
from effkern.ops._triton.conv import convolve
from effkern.ops._triton.depthwise import depthwise
from effkern.ops._triton.ragged import schedule
from effkern.ops._triton.tensors import dense_like, pixels, vector
from effkern.ops.sliced_conv import linear, ragged

Ints = Sequence[int]
_POINT = ([1, 1], [0, 0], [1, 1])


def sliced_conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None, c_out: int, stride: Ints, padding: Ints, dilation: Ints,
    groups: int, group_mode: str, scale: Tensor | None, shift: Tensor | None, act: str, algo: str,
) -> Tensor:  # fmt: skip
    """``act((conv2d(x, the first x.size(1) x c_out channels of weight) + bias) * scale + shift)``."""
    y = uniform._fake(
        x, weight, bias, c_out, stride, padding, dilation, groups, group_mode, scale, shift, act, algo
    )  # all checks
    if y.numel() == 0:
        return y
    outs, ins, kh, kw = weight.shape
    geometry = (list(stride), list(padding), list(dilation))
    out, x = dense_like(y), pixels(x)
    bias, scale, shift = vector(bias), vector(scale), vector(shift)
    if ins == 1 and outs == groups > 1:
        depthwise(x, weight, out, geometry, channels=c_out, act=act, bias=bias, scale=scale, shift=shift)
        return y if out is y else y.copy_(out)
    if group_mode == "within_group":  # every group runs, with a prefix inside
        running, c_in = groups, x.size(1) // groups
    else:  # whole groups run; a single one with a prefix inside
        running, c_in = (1, x.size(1)) if groups == 1 else (x.size(1) // ins, ins)
    convolve(
        x, weight, out, (kh, kw), geometry, c_in=c_in, c_out=c_out // running, groups=running,
        group_rows=outs // groups, act=act, bias=bias, scale=scale, shift=shift,
    )  # fmt: skip
    return y if out is y else y.copy_(out)


def sliced_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, out_features: int, scale: Tensor | None, shift: Tensor | None,
    act: str, algo: str,
) -> Tensor:  # fmt: skip
    """The 1x1 convolution of maps of one pixel."""
    y = linear._fake(x, weight, bias, out_features, scale, shift, act, algo)
    if y.numel() > 0:
        convolve(
            pixels(_map(x)), _map(weight), _map(y), (1, 1), _POINT, c_in=x.size(1), c_out=out_features, act=act,
            bias=vector(bias), scale=vector(scale), shift=vector(shift),
        )  # fmt: skip
    return y


def sliced_conv2d_ragged(
    x: Tensor, weight: Tensor, bias: Tensor | None, c_in: Tensor, c_out: Tensor, c_out_max: int, stride: Ints,
    padding: Ints, dilation: Ints, groups: int, group_mode: str, scale_table: Tensor | None,
    shift_table: Tensor | None, width_idx: Tensor | None, act: str, algo: str,
    zero_tail: bool,
) -> Tensor:  # fmt: skip
    """`sliced_conv2d` of every sample at its own widths, zeros after its outputs."""
    y = ragged._fake(
        x, weight, bias, c_in, c_out, c_out_max, stride, padding, dilation, groups, group_mode, scale_table,
        shift_table, width_idx, act, algo, zero_tail,
    )  # fmt: skip
    by_channel = group_mode == "prefix_groups" and weight.size(1) == 1 and weight.size(0) == groups > 1
    if groups != 1 and not by_channel:
        raise ValueError(
            "sliced_conv2d_ragged: groups must be 1 on the GPU where widths differ by sample, or as many as channels, "
            f"got {groups}"
        )
    if y.numel() == 0:
        return y
    out = dense_like(y)
    geometry = (list(stride), list(padding), list(dilation))
    _ragged(
        x, weight, bias, c_in, c_out, out, geometry, by_channel, scale_table, shift_table, width_idx, act, zero_tail
    )
    return y if out is y else y.copy_(out)


def sliced_linear_ragged(
    x: Tensor, weight: Tensor, bias: Tensor | None, c_in: Tensor, c_out: Tensor, c_out_max: int,
    scale_table: Tensor | None, shift_table: Tensor | None, width_idx: Tensor | None, act: str, algo: str,
    zero_tail: bool,
) -> Tensor:  # fmt: skip
    """The ragged 1x1 convolution of maps of one pixel."""
    tables = (scale_table, shift_table, width_idx)
    y = linear._ragged_fake(x, weight, bias, c_in, c_out, c_out_max, *tables, act, algo, zero_tail)
    if y.numel() > 0:
        _ragged(_map(x), _map(weight), bias, c_in, c_out, _map(y), _POINT, False, *tables, act, zero_tail)
    return y


def _map(x: Tensor) -> Tensor:
    return x[:, :, None, None]


def _ragged(
    x: Tensor, weight: Tensor, bias: Tensor | None, c_in: Tensor, c_out: Tensor, y: Tensor,
    geometry: tuple[list[int], list[int], list[int]], by_channel: bool, scale: Tensor | None, shift: Tensor | None,
    width_idx: Tensor | None, act: str, zero: bool,
) -> None:  # fmt: skip
    table = scale if scale is not None else shift
    if table is not None and table.size(0) == 0:
        raise ValueError("scale_table and shift_table must have at least one row")
    scale, shift = (None if t is None else t[:, : y.size(1)].contiguous() for t in (scale, shift))
    width_idx = None if width_idx is None else width_idx.contiguous()
    if by_channel:
        depthwise(
            pixels(x), weight, y, geometry, channels=min(x.size(1), y.size(1)), act=act, bias=vector(bias),
            scale=scale, shift=shift, widths=(c_in.contiguous(), c_out.contiguous(), width_idx), zero=zero,
        )  # fmt: skip
        return
    most_in, most_out = min(x.size(1), weight.size(1)), y.size(1)
    convolve(
        pixels(x), weight, y, (weight.size(2), weight.size(3)), geometry, c_in=most_in, c_out=most_out, act=act,
        bias=vector(bias), scale=scale, shift=shift, zero=zero,
        ragged=schedule(c_in, c_out, width_idx, most_in, most_out, 1 if table is None else table.size(0)),
    )  # fmt: skip
