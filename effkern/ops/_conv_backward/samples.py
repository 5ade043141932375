"""Named inputs of the convolution's gradient, for tests."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from effkern.ops._conv_backward import conv2d_backward, reference
from effkern.testing import Sample


def magnitude(gy: Tensor, y: Tensor | None, x: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    """The reference over absolute values, in fp64: A of the error bound of every result."""
    wide = None if y is None else y.double()
    return reference.conv2d_backward(gy.double().abs(), wide, x.double().abs(), weight.double().abs(), *rest)


def samples(dtype: torch.dtype = torch.float32) -> Iterator[Sample]:
    """Small inputs that reach every path: strides with and without taps, slices, groups, tails, empty sides."""
    random = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random).to(dtype)

    def sample(
        name: str, x: Tensor, weight: Tensor, stride: int = 1, pad: int = 0, dil: int = 1, groups: int = 1,
        act: str = "none", c_out: int | None = None, mode: str = "prefix_groups",
    ) -> Sample:  # fmt: skip
        span = [n + 2 * pad - dil * (k - 1) - 1 for n, k in zip(x.shape[2:], weight.shape[2:], strict=True)]
        gy = normal(x.size(0), weight.size(0) if c_out is None else c_out, *(s // stride + 1 for s in span))
        y = None if act == "none" else 4 * normal(*gy.shape)
        args = (gy, y, x, weight, [stride] * 2, [pad] * 2, [dil] * 2, groups, mode, act, "direct",
                [True, True, True, act != "none"])  # fmt: skip
        leaves = ("gy", "x", "weight") if gy.numel() else ()
        tags = frozenset({"sums_over_batch", "nan_meets_padding"})
        return Sample(name, conv2d_backward, reference.conv2d_backward, args, magnitude, leaves, tags)

    yield sample("3x3", normal(2, 16, 9, 9), normal(32, 16, 3, 3), pad=1, act="relu")
    yield sample("pointwise", normal(3, 40, 7, 5), normal(20, 40, 1, 1))
    yield sample("pointwise_stride_2", normal(2, 25, 7, 8), normal(33, 25, 1, 1), stride=2)
    yield sample("stride_2", normal(2, 5, 12, 11), normal(10, 5, 3, 3), stride=2, pad=1, act="relu6")
    yield sample("stride_3_dilation_2", normal(2, 26, 13, 12), normal(8, 26, 3, 3), stride=3, pad=2, dil=2)
    yield sample("wide_padding", normal(1, 4, 3, 4), normal(6, 4, 3, 3), pad=4)
    yield sample("1x3", normal(1, 7, 8, 9), normal(6, 7, 1, 3))
    yield sample("two_groups", normal(2, 12, 6, 6), normal(36, 6, 3, 3), pad=1, groups=2)
    yield sample("depthwise", normal(2, 70, 8, 9), normal(70, 1, 3, 3), pad=1, groups=70, act="relu")
    yield sample("depthwise_stride_2", normal(2, 19, 8, 9), normal(19, 1, 5, 5), stride=2, pad=2, groups=19)
    yield sample("slice", normal(2, 9, 7, 7), normal(20, 16, 3, 3), pad=1, c_out=11)
    yield sample("slice_depthwise", normal(2, 6, 7, 7), normal(9, 1, 3, 3), pad=1, groups=9, c_out=6)
    yield sample(
        "slice_in_groups", normal(2, 6, 7, 7), normal(12, 5, 3, 3), groups=2, c_out=8, mode="within_group", act="relu"
    )
    yield sample(
        "slice_of_one_in_groups", normal(2, 3, 6, 7), normal(12, 4, 3, 3), pad=1, groups=3, c_out=3, mode="within_group"
    )
    yield sample("patches", normal(2, 3, 9, 8), normal(8, 3, 4, 4), stride=4)
    yield sample("stride_2_shorter_than_its_taps", normal(1, 20, 9, 11), normal(70, 20, 5, 5), stride=2, pad=1, dil=2)
    yield sample("empty_batch", normal(0, 4, 6, 6), normal(8, 4, 3, 3), pad=1)
    yield sample("no_outputs", normal(2, 4, 6, 6), normal(0, 4, 3, 3), pad=1)
