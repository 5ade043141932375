"""Named inputs of the fused batch norms for tests and benchmarks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from effkern.ops.multi_branch_bn import _op, reference
from effkern.testing import Sample


def magnitude(
    xs: list[Tensor], weight: list[Tensor], bias: list[Tensor], running_mean: list[Tensor], running_var: list[Tensor],
    training: bool, momentum: float, eps: float, relu: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The size of what is added up, in fp64: A of the error bounds of all outputs.

    Its derivative bounds the terms of the gradient. ``dx = a * (g - sum(g) / m - xhat * sum(g * xhat) / m)`` has three,
    so ``y`` gets, besides ``|x| + |mean|``, a term whose derivative is the third.
    """
    z: Any = 0
    means, invstds = [], []
    for i, x in enumerate(xs):
        size = x.double().abs()
        if training and x.numel():
            variance, mean = torch.var_mean(x.detach().double(), (0, 2, 3), correction=0)
            average = size.mean((0, 2, 3)).view(1, -1, 1, 1)
        elif training:
            mean, variance = torch.zeros(2, x.size(1), dtype=torch.float64)
            average = size.sum((0, 2, 3)).view(1, -1, 1, 1)
        else:
            mean, variance = running_mean[i].double(), running_var[i].double()
            average = mean.abs().view(1, -1, 1, 1)
        invstd = torch.rsqrt(variance + eps)
        scale = invstd.view(1, -1, 1, 1)
        hat = scale * (size + average)
        if training and x.numel():
            known = hat.detach()
            hat = hat + known * (known * scale * size).mean((0, 2, 3), keepdim=True)
        z = z + weight[i].double().abs().view(1, -1, 1, 1) * hat + bias[i].double().abs().view(1, -1, 1, 1)
        means.append(mean.abs())
        invstds.append(invstd)
    tracked = training and len(running_mean) > 0
    old = [
        torch.stack([v.double().abs() for v in r]) if tracked else z.new_empty(0, 0)
        for r in (running_mean, running_var)
    ]
    mean, spread = torch.stack(means), torch.stack(invstds)
    new = [old[0] + mean + 1 / spread, old[1] + 2 / spread**2] if tracked else [mean[:0], mean[:0]]
    deviation = (1 / spread).nan_to_num(0.0)  # a mean stays a number where a running variance is negative
    return (z, mean + deviation, spread, *(n.detach() for n in new))


def samples(dtype: torch.dtype = torch.float32) -> Iterator[Sample]:
    """Small inputs that reach every path: branches, modes, layouts, tails of tiles and vectors, single values."""
    for name, args in _calls(dtype):
        yield Sample(
            name, _op, reference.multi_branch_bn_add_relu, args, magnitude, requires_grad=("xs", "weight", "bias")
        )


def _calls(dtype: torch.dtype) -> Iterator[tuple[str, tuple[Any, ...]]]:
    random = torch.Generator().manual_seed(0)

    def call(
        shape: tuple[int, int, int, int], branches: int, training: bool = True, relu: bool = True, layout: str = "n",
        tracked: bool = True, momentum: float = 0.1,
    ) -> tuple[Any, ...]:  # fmt: skip
        xs = []
        for i in range(branches):
            x = torch.randn(shape, generator=random) * (i + 1) + 0.5 * i
            last = layout[i % len(layout)] == "c"
            xs.append(x.to(dtype).contiguous(memory_format=torch.channels_last if last else torch.contiguous_format))

        def vectors(least: float) -> list[Tensor]:
            return [torch.rand(shape[1], generator=random) + least for _ in range(branches)]

        weight, bias, mean, var = vectors(0.5), vectors(-0.5), vectors(-0.5), vectors(0.5)
        if not tracked:
            mean, var = [], []
        return xs, weight, bias, mean, var, training, momentum, 1e-5, relu

    yield "repvgg", call((3, 20, 7, 5), 3)
    yield "repvgg_channels_last", call((3, 20, 7, 5), 3, layout="c")
    yield "repvgg_eval", call((3, 20, 7, 5), 3, training=False)
    yield "eval_channels_last", call((2, 33, 6, 6), 2, training=False, layout="c")
    yield "one_branch", call((2, 5, 9, 11), 1, relu=False)
    yield "two_branches", call((4, 17, 4, 4), 2, layout="c", momentum=0.0)
    yield "four_branches", call((2, 6, 8, 8), 4, relu=False, momentum=1.0)
    yield "mixed_layouts", call((2, 19, 5, 6), 3, layout="cn")
    yield "mixed_layouts_planar", call((2, 19, 5, 6), 3, layout="nc", training=False, relu=False)
    yield "untracked", call((2, 16, 6, 6), 2, tracked=False)
    yield "long_plane", call((2, 2, 66, 67), 2)
    yield "plane_of_most_of_a_tile", call((3, 2, 50, 53), 3)
    yield "many_tiles", call((5, 3, 13, 17), 3, layout="c")
    yield "many_channels", call((2, 145, 3, 3), 2, layout="c")
    yield "one_channel", call((2, 1, 5, 5), 2)
    yield "one_pixel", call((6, 30, 1, 1), 2)
    yield "two_values", call((2, 4, 1, 1), 1)
    yield "empty_batch", call((0, 4, 6, 6), 2)
    yield "empty_batch_eval", call((0, 4, 6, 6), 2, training=False)
