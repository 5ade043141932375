"""Named inputs of the sliced ops, for tests and benchmarks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from effkern.ops.sliced_conv import _sliced_conv2d, reference
from effkern.testing import Sample, map_tensors


def magnitude(*args: Any) -> Tensor:
    """The reference over absolute values without its activation, in fp64: A of the error bound."""
    positive = list(map_tensors(lambda t: t.double().abs(), args))
    positive[-2] = "none"
    return reference.sliced_conv2d(*positive)


def samples(dtype: torch.dtype = torch.float32) -> Iterator[Sample]:
    """Small inputs that reach every path: prefixes, both group modes, strides, tails of every block size."""
    random = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random).to(dtype)

    def sample(
        name: str, x: Tensor, weight: Tensor, c_out: int, stride: int = 1, pad: int = 0, dil: int = 1, groups: int = 1,
        mode: str = "prefix_groups", epilogue: bool = False, act: str = "none",
    ) -> Sample:  # fmt: skip
        outs = weight.size(0)
        bias = torch.randn(outs, generator=random)
        scale = torch.rand(outs, generator=random) + 0.5 if epilogue else None
        shift = torch.randn(outs, generator=random) if epilogue else None
        args = (x, weight, bias, c_out, [stride] * 2, [pad] * 2, [dil] * 2, groups, mode, scale, shift, act, "auto")
        grads = ("x", "weight", "bias", *(("scale", "shift") if epilogue else ()))
        return Sample(name, _sliced_conv2d, reference.sliced_conv2d, args, magnitude, grads)

    yield sample("pointwise", normal(3, 20, 7, 5), normal(40, 32, 1, 1), 33)
    yield sample("3x3", normal(2, 16, 9, 9), normal(32, 16, 3, 3), 32, pad=1, act="relu")
    yield sample("3x3_slice_epilogue", normal(2, 5, 9, 11), normal(21, 8, 3, 3), 17, pad=1, epilogue=True, act="silu")
    yield sample("stride_2", normal(2, 3, 12, 11), normal(10, 3, 3, 3), 10, stride=2, pad=1, act="relu6")
    yield sample("dilation_2", normal(2, 6, 11, 10), normal(8, 6, 3, 3), 7, pad=2, dil=2, act="hardswish")
    yield sample("5x5", normal(1, 4, 8, 8), normal(6, 4, 5, 5), 5, pad=2)
    yield sample("depthwise", normal(2, 19, 8, 9), normal(24, 1, 3, 3), 19, pad=1, groups=24, epilogue=True)
    yield sample("prefix_groups", normal(2, 12, 6, 6), normal(24, 4, 3, 3), 18, pad=1, groups=4)
    yield sample("within_group", normal(2, 6, 6, 6), normal(24, 4, 3, 3), 9, pad=1, groups=3, mode="within_group")
    yield sample("one_channel", normal(2, 1, 5, 5), normal(1, 1, 3, 3), 1, pad=1)
    yield sample("one_pixel", normal(5, 30, 1, 1), normal(20, 30, 1, 1), 20)
    yield sample("empty_batch", normal(0, 4, 6, 6), normal(8, 4, 3, 3), 8, pad=1)
    yield sample("no_outputs", normal(2, 4, 6, 6), normal(8, 4, 3, 3), 0, pad=1)
