"""Named inputs of the re-parameterized convolution, plain and packed, for tests and benchmarks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from effkern.ops._pack import _pack_op
from effkern.ops.rep_conv import _op, _packed_op, chain, reference
from effkern.ops.rep_conv.chain import AverageStep, ConvStep
from effkern.testing import Sample, map_tensors, winograd_excess

_PACKED_DIFFERENTLY = ("pointwise", "3x3", "two_groups", "depthwise", "depthwise_times_2", "no_outputs")


def magnitude(*args: Any) -> Tensor:
    """The reference over absolute values without its activation, in fp64: A of the error bound."""
    positive = list(map_tensors(lambda t: t.double().abs(), args))
    positive[7] = "none"
    x, weight, _, stride, padding, dilation, groups = args[:7]
    algo = args[9] if len(args) > 9 else "auto"
    excess = winograd_excess(x, weight, stride, padding, dilation, groups, algo) if weight.size(0) else 0.0
    return reference.rep_conv2d(*positive) + excess


def packed_magnitude(*args: Any) -> Tensor:
    """The same for the packed op, whose weight and bias come out of the handle."""
    x, handle, out_channels, kernel, *rest = args
    groups = rest[3]
    weight, bias = reference.unpack_conv_weight(handle, out_channels, x.size(1) // groups, kernel, groups)
    return magnitude(x, weight, bias, *rest)


def samples(dtype: torch.dtype = torch.float32) -> Iterator[Sample]:
    """Small inputs that reach every path: kernels, groups, epilogues, tails of every block size, empty sides."""
    for name, args in _calls(dtype):
        x, weight, bias, *_, groups, _, residual, algo = args
        grads = tuple(n for n, t in (("bias", bias), ("residual", residual)) if t is not None)
        yield Sample(name, _op, reference.rep_conv2d, args, magnitude, ("x", "weight", *grads))
        handle = reference.pack_conv_weight(weight, bias, groups)
        packed = (x, handle, weight.size(0), list(weight.shape[2:]), *args[3:])
        packed_grads = ("x",) if residual is None else ("x", "residual")
        yield Sample(f"packed_{name}", _packed_op, reference.rep_conv2d_packed, packed, packed_magnitude, packed_grads)
        if name in _PACKED_DIFFERENTLY:
            yield Sample(f"pack_{name}", _pack_op, reference.pack_conv_weight, (weight, bias, groups, algo))
    yield from _chains(dtype)


def chain_magnitude(
    x: Tensor, others: list[Tensor], handles: list[Tensor], steps: str, outputs: list[int]
) -> tuple[Tensor, ...]:
    """A of the error bound of each result of a chain: the chain over absolute values, once a convolution in it."""
    values = [value.double().abs() for value in (x, *others)]
    given = len(values)
    for s in chain.read_steps(steps):
        if isinstance(s, chain.AverageStep):
            values.append(chain._mean(values[s.x], s))
            continue
        depth = values[s.x].size(1) // s.groups
        weight, bias = reference.unpack_conv_weight(handles[s.handle], s.out_channels, depth, s.kernel_size, s.groups)
        geometry = (s.stride, s.padding, s.dilation, s.groups, "none")
        residual = None if s.residual < 0 else values[s.residual]
        offset = None if bias is None else bias.double().abs()
        excess = winograd_excess(values[s.x], weight, *geometry[:4], "auto")
        values.append(reference.rep_conv2d(values[s.x], weight.double().abs(), offset, *geometry, residual) + excess)
    return tuple(values[given + output] * len(values) for output in outputs)


def _chains(dtype: torch.dtype) -> Iterator[Sample]:
    random = torch.Generator().manual_seed(1)

    def handle(*shape: int, groups: int = 1, bias: bool = True) -> Tensor:
        offset = torch.randn(shape[0], generator=random) if bias else None
        return reference.pack_conv_weight(torch.randn(shape, generator=random) / 3, offset, groups)

    def chained(name: str, x: tuple[int, ...], handles: list[Tensor], steps: Sequence[chain.Step], out: int) -> Sample:
        values = torch.randn(x, generator=random).to(dtype)
        args: tuple[Any, ...] = (values, [], handles, chain.write_steps(steps), [out])
        return Sample(f"chain_{name}", chain._chain_op, chain._reference, args, chain_magnitude, ("x",))

    same: dict[str, Any] = {"kernel_size": (3, 3), "padding": (1, 1)}
    block = [handle(8, 8, 3, 3), handle(8, 8, 3, 3, bias=False)]
    steps = [ConvStep(0, 0, 8, **same), ConvStep(1, 1, 8, residual=0, **same)]
    yield chained("residual", (3, 8, 7, 5), block, steps, 1)
    inverted = [handle(18, 6, 1, 1), handle(18, 1, 3, 3, groups=18), handle(6, 18, 1, 1)]
    yield chained("inverted", (2, 6, 8, 9), inverted, [
        ConvStep(0, 0, 18, (1, 1), act="relu6"), ConvStep(1, 1, 18, groups=18, act="relu6", **same),
        ConvStep(2, 2, 6, (1, 1), act="none", residual=0),
    ], 2)  # fmt: skip
    many = [handle(5, 5, 1, 1)]
    yield chained("shared_weight", (2, 5, 4, 4), many, [ConvStep(0, 0, 5, (1, 1), act="silu")] + [
        ConvStep(i, 0, 5, (1, 1), act="hardswish", residual=i - 1) for i in (1, 2, 3)
    ], 3)  # fmt: skip
    strided = [handle(20, 3, 3, 3), handle(4, 20, 2, 2)]
    yield chained("strided", (2, 3, 9, 9), strided, [
        ConvStep(0, 0, 20, (3, 3), (2, 2), (1, 1)), ConvStep(0, 0, 20, (3, 3)),
        ConvStep(1, 1, 4, (2, 2), dilation=(2, 2), act="none"),
    ], 2)  # fmt: skip
    shortcut = [handle(8, 3, 3, 3), handle(20, 8, 3, 3), handle(5, 20, 1, 1)]
    yield chained("means", (2, 3, 9, 7), shortcut, [
        ConvStep(0, 0, 8, **same), AverageStep(1, 20, (2, 2), (2, 2), ceil_mode=True),
        ConvStep(1, 1, 20, (3, 3), (2, 2), (1, 1), residual=2), AverageStep(3, 20),
        ConvStep(4, 2, 5, (1, 1), act="none"),
    ], 4)  # fmt: skip
    yield chained("mean_alone", (2, 70, 9, 7), [], [AverageStep(0, 75, (4, 3), (3, 2))], 0)
    yield chained("empty_batch", (0, 8, 5, 5), block, [ConvStep(0, 0, 8, **same), ConvStep(1, 1, 8, **same)], 1)


def _calls(dtype: torch.dtype) -> Iterator[tuple[str, tuple[Any, ...]]]:
    random = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random).to(dtype)

    def call(
        x: Tensor, weight: Tensor, stride: int = 1, pad: int = 0, dil: int = 1, groups: int = 1, act: str = "relu",
        residual: tuple[int, int] | None = None, bias: bool = True,
    ) -> tuple[Any, ...]:  # fmt: skip
        offset = torch.randn(weight.size(0), generator=random) if bias else None
        addend = None if residual is None else normal(x.size(0), weight.size(0), *residual)
        return (x, weight, offset, [stride] * 2, [pad] * 2, [dil] * 2, groups, act, addend, "auto")

    yield "pointwise", call(normal(3, 20, 7, 5), normal(40, 20, 1, 1))
    yield "3x3", call(normal(2, 16, 9, 9), normal(32, 16, 3, 3), pad=1, bias=False)
    yield "3x3_residual", call(normal(2, 5, 9, 11), normal(17, 5, 3, 3), pad=1, act="silu", residual=(9, 11))
    yield "linear_bottleneck", call(normal(2, 33, 4, 6), normal(12, 33, 1, 1), act="none", residual=(4, 6))
    yield "stride_2", call(normal(2, 3, 12, 11), normal(10, 3, 3, 3), stride=2, pad=1, act="relu6", residual=(6, 6))
    yield "dilation_2", call(normal(2, 6, 11, 10), normal(8, 6, 3, 3), pad=2, dil=2, act="hardswish", residual=(11, 10))
    yield "1x3", call(normal(1, 7, 8, 9), normal(6, 7, 1, 3))
    yield "two_groups", call(normal(2, 12, 6, 6), normal(36, 6, 3, 3), pad=1, groups=2, act="silu")
    yield "depthwise", call(normal(2, 19, 8, 9), normal(19, 1, 3, 3), pad=1, groups=19, residual=(8, 9))
    yield "depthwise_times_2", call(normal(2, 5, 6, 6), normal(10, 1, 3, 3), pad=1, groups=5)
    yield "one_channel", call(normal(2, 1, 5, 5), normal(1, 1, 3, 3), pad=1)
    yield "one_pixel", call(normal(5, 30, 1, 1), normal(20, 30, 1, 1), residual=(1, 1))
    yield "empty_batch", call(normal(0, 4, 6, 6), normal(8, 4, 3, 3), pad=1, residual=(6, 6))
    yield "no_outputs", call(normal(2, 4, 6, 6), normal(0, 4, 3, 3), pad=1)
