"""`rep_conv2d` in Triton: one launch for channels_last tensors, other layouts are copied first."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from effkern.ops._triton.conv import convolve
from effkern.ops._triton.depthwise import depthwise
from effkern.ops._triton.tensors import dense_like, pixels, vector
from effkern.ops.rep_conv import _fake

Ints = Sequence[int]


def rep_conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: Ints, padding: Ints, dilation: Ints, groups: int, act: str,
    residual: Tensor | None, algo: str,
) -> Tensor:  # fmt: skip
    """``act(conv2d(x, weight) + bias + residual)``."""
    y = _fake(x, weight, bias, stride, padding, dilation, groups, act, residual, algo)  # all checks
    if y.numel() == 0:
        return y
    out = dense_like(y)
    geometry = (list(stride), list(padding), list(dilation))
    residual = None if residual is None else pixels(residual)
    outs, ins, kh, kw = weight.shape
    if ins == 1 and outs == groups > 1:
        depthwise(pixels(x), weight, out, geometry, channels=outs, act=act, bias=vector(bias), residual=residual)
    else:
        convolve(
            pixels(x), weight, out, (kh, kw), geometry, c_in=ins, c_out=outs // groups, groups=groups, act=act,
            bias=vector(bias), residual=residual,
        )  # fmt: skip
    return y if out is y else y.copy_(out)
