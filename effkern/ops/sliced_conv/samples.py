"""Named inputs of the sliced ops, for tests and benchmarks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from effkern.ops._pack import pack_conv_weight
from effkern.ops._registry import Op
from effkern.ops._slices import slice_weight
from effkern.ops.sliced_conv import _sliced_conv2d, reference
from effkern.ops.sliced_conv.chain import _chain, _reference, follow
from effkern.ops.sliced_conv.dw_pw import _dw_pw, _dw_pw_packed
from effkern.ops.sliced_conv.linear import _linear, _linear_ragged
from effkern.ops.sliced_conv.packed import _packed, _ragged_packed
from effkern.ops.sliced_conv.ragged import _ragged
from effkern.ops.sliced_conv.steps import AttentionStep, MeanStep, SlicedStep, Step, read_steps, write_steps
from effkern.testing import UNIT, Sample, map_tensors, winograd_excess


def magnitude_of(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A reference over absolute values without its activation, in fp64: A of the error bound."""

    def magnitude(*args: Any) -> Tensor:
        positive = list(map_tensors(lambda t: t.double().abs() if t.is_floating_point() else t, args))
        strings = [i for i, value in enumerate(positive) if isinstance(value, str)]
        positive[strings[-2]] = "none"  # act stands before algo in every op of the family
        return function(*positive)

    return magnitude


def _excess(x: Tensor, weight: Tensor, c_out: int, options: Sequence[Any], scale: Tensor | None) -> Tensor | float:
    """What Winograd adds to A of one call; ``options`` are stride, padding, dilation, groups, group_mode and algo."""
    stride, padding, dilation, groups, mode, algo = options
    part, running = slice_weight(weight, x.size(1), c_out, groups, mode)
    if part.numel() == 0 or x.size(0) == 0:
        return 0.0
    factor = 1.0 if scale is None else scale[:c_out].detach().double().abs().view(1, -1, 1, 1)
    return winograd_excess(x, part, stride, padding, dilation, running, algo) * factor


def conv_magnitude(*args: Any) -> Tensor:
    """A of the error bound of the uniform convolution."""
    x, weight, _, c_out, *options, scale, _, _, algo = args
    return magnitude_of(reference.sliced_conv2d)(*args) + _excess(x, weight, c_out, [*options, algo], scale)


def ragged_magnitude(*args: Any) -> Tensor:
    """A of the error bound of the ragged convolution, sample by sample."""
    x, weight, _, c_in, c_out, _most, *options, scales, _, width_idx, _, algo, _tail = args
    size = magnitude_of(reference.sliced_conv2d_ragged)(*args)
    excess = torch.zeros_like(size)
    for n, (ci, co) in enumerate(zip(c_in.tolist(), c_out.tolist(), strict=True)):
        scale = None if scales is None else scales[0 if width_idx is None else int(width_idx[n])]
        excess[n : n + 1, :co] += _excess(x[n : n + 1, :ci], weight, co, [*options, algo], scale)
    return size + excess


def samples(dtype: torch.dtype = torch.float32) -> Iterator[Sample]:
    """Small inputs that reach every path of every op of the family."""
    uniform, ragged = list(_uniform(dtype)), list(_ragged_samples(dtype))
    yield from uniform
    yield from ragged
    yield from _linear_samples(dtype)
    yield from _dw_pw_samples(dtype)
    yield from _chain_samples(dtype)
    # The packed ops differ in where the weight comes from, so one sample a form of the weight is enough.
    for sample in uniform:
        if sample.name in ("3x3_slice_epilogue", "depthwise", "prefix_groups", "within_group"):
            yield _packed_sample(sample, _packed, reference.sliced_conv2d_packed)
    for sample in ragged:
        if sample.name in ("ragged_tables", "ragged_depthwise", "ragged_within_group", "ragged_no_tail"):
            yield _packed_sample(sample, _ragged_packed, reference.sliced_conv2d_ragged_packed)


def _packed_sample(sample: Sample, op: Op, function: Callable[..., Tensor]) -> Sample:
    """The same call from a handle; its A is that of the same call with the handle's weight and bias."""
    x, weight, bias, *options = sample.args
    handle = pack_conv_weight(weight, bias, sample.named_args()["groups"])

    def magnitude(x: Tensor, handle: Tensor, out_channels: int, kernel_size: list[int], *options: Any) -> Tensor:
        assert sample.magnitude is not None
        return sample.magnitude(x, weight, bias, *options)

    args = (x, handle, weight.size(0), list(weight.shape[2:]), *options)
    return Sample(f"packed_{sample.name}", op, function, args, magnitude)


def _normal(dtype: torch.dtype) -> tuple[torch.Generator, Callable[..., Tensor]]:
    random = torch.Generator().manual_seed(0)
    return random, lambda *shape: torch.randn(shape, generator=random).to(dtype)


def _uniform(dtype: torch.dtype) -> Iterator[Sample]:
    """Prefixes, both group modes, strides, tails of every block size."""
    random, normal = _normal(dtype)

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
        return Sample(name, _sliced_conv2d, reference.sliced_conv2d, args, conv_magnitude, grads)

    yield sample("pointwise", normal(3, 20, 7, 5), normal(40, 32, 1, 1), 33)
    yield sample("3x3", normal(2, 16, 9, 9), normal(32, 16, 3, 3), 32, pad=1, act="relu")
    yield sample("3x3_slice_epilogue", normal(2, 5, 9, 11), normal(21, 8, 3, 3), 17, pad=1, epilogue=True, act="silu")
    yield sample("stride_2", normal(2, 3, 12, 11), normal(10, 3, 3, 3), 10, stride=2, pad=1, act="relu6")
    yield sample("dilation_2", normal(2, 6, 11, 10), normal(8, 6, 3, 3), 7, pad=2, dil=2, act="hardswish")
    yield sample("5x5", normal(1, 4, 8, 8), normal(6, 4, 5, 5), 5, pad=2)
    yield sample("depthwise", normal(2, 19, 8, 9), normal(24, 1, 3, 3), 19, pad=1, groups=24, epilogue=True)
    yield sample("prefix_groups", normal(2, 12, 6, 6), normal(24, 4, 3, 3), 18, pad=1, groups=4)
    # Filters of one channel that do not lie one behind the other.
    yield sample(
        "within_group_of_one", normal(2, 3, 6, 6), normal(24, 4, 3, 3), 3, pad=1, groups=3, mode="within_group"
    )
    yield sample("within_group", normal(2, 6, 6, 6), normal(24, 4, 3, 3), 9, pad=1, groups=3, mode="within_group")
    yield sample("one_channel", normal(2, 1, 5, 5), normal(1, 1, 3, 3), 1, pad=1)
    yield sample("one_pixel", normal(5, 30, 1, 1), normal(20, 30, 1, 1), 20)
    yield sample("empty_batch", normal(0, 4, 6, 6), normal(8, 4, 3, 3), 8, pad=1)
    yield sample("no_outputs", normal(2, 4, 6, 6), normal(8, 4, 3, 3), 0, pad=1)


def _ragged_samples(dtype: torch.dtype) -> Iterator[Sample]:
    """One class, many classes, widths of 0, all group modes, tables."""
    random, normal = _normal(dtype)

    def sample(
        name: str, x: Tensor, weight: Tensor, c_in: list[int], c_out: list[int], c_out_max: int, stride: int = 1,
        pad: int = 0, groups: int = 1, mode: str = "prefix_groups", rows: list[int] | None = None, act: str = "none",
        index: torch.dtype = torch.int64, zero_tail: bool = True,
    ) -> Sample:  # fmt: skip
        outs = weight.size(0)
        bias = torch.randn(outs, generator=random)
        scale = torch.rand(3, outs, generator=random) + 0.5 if rows is not None else None
        shift = torch.randn(3, outs, generator=random) if rows is not None else None
        width_idx = None if rows is None else torch.tensor(rows, dtype=index)
        args = (
            x, weight, bias, torch.tensor(c_in, dtype=index), torch.tensor(c_out, dtype=index), c_out_max, [stride] * 2,
            [pad] * 2, [1, 1], groups, mode, scale, shift, width_idx, act, "auto", zero_tail,
        )  # fmt: skip
        grads = ("x", "weight", "bias", *(() if rows is None else ("scale_table", "shift_table")))
        if x.size(0) == 0:
            grads = ()  # autograd of the reference has no path through no samples
        return Sample(name, _ragged, reference.sliced_conv2d_ragged, args, ragged_magnitude, grads)

    widths = ([5, 16, 5, 9], [12, 32, 12, 17])
    yield sample("ragged_3x3", normal(4, 16, 7, 8), normal(32, 16, 3, 3), *widths, 32, pad=1, act="relu")
    yield sample("ragged_tables", normal(4, 16, 6, 5), normal(40, 20, 1, 1), *widths, 33, rows=[0, 2, 0, 1], act="silu")
    yield sample("ragged_one_class", normal(3, 8, 6, 6), normal(9, 8, 3, 3), [7] * 3, [9] * 3, 9, stride=2, pad=1)
    yield sample("ragged_zeros", normal(4, 6, 5, 5), normal(8, 6, 3, 3), [6, 0, 3, 0], [0, 4, 8, 0], 8, pad=1)
    yield sample(
        "ragged_depthwise", normal(3, 24, 6, 7), normal(24, 1, 3, 3), [24, 8, 19], [24, 8, 19], 24, pad=1, groups=24,
        rows=[1, 0, 2], act="relu6", index=torch.int32,
    )  # fmt: skip
    yield sample(
        "ragged_within_group", normal(3, 9, 6, 6), normal(24, 4, 3, 3), [9, 3, 6], [9, 24, 12], 24, pad=1, groups=3,
        mode="within_group", rows=[0, 1, 2], act="hardswish",
    )  # fmt: skip
    # Without a tail, as what it holds is nobody's business.
    yield sample(
        "ragged_no_tail", normal(3, 16, 7, 6), normal(24, 16, 1, 1), [16, 5, 9], [24] * 3, 24, act="relu",
        rows=[2, 0, 1], zero_tail=False,
    )  # fmt: skip
    yield sample("ragged_wide_input", normal(2, 30, 4, 4), normal(10, 8, 1, 1), [8, 3], [5, 10], 10)
    yield sample("ragged_empty_batch", normal(0, 4, 6, 6), normal(8, 4, 3, 3), [], [], 8, pad=1, rows=[])


def _linear_samples(dtype: torch.dtype) -> Iterator[Sample]:
    random, normal = _normal(dtype)
    for name, rows, ins, outs, act in (("linear", 7, 20, 33, "none"), ("linear_no_outputs", 3, 8, 0, "relu")):
        vectors = [torch.randn(40, generator=random) for _ in range(3)]
        args = (normal(rows, ins), normal(40, 32), vectors[0], outs, *vectors[1:], act, "auto")
        grads = ("x", "weight", "bias", "scale", "shift")
        magnitude = magnitude_of(reference.sliced_linear)
        yield Sample(name, _linear, reference.sliced_linear, args, magnitude, grads)
    bias, tables = torch.randn(40, generator=random), torch.rand(2, 2, 40, generator=random)
    widths = (torch.tensor([20, 8, 0, 20]), torch.tensor([33, 40, 4, 0]))
    args = (
        normal(4, 20), normal(40, 32), bias, *widths, 40, tables[0], tables[1], torch.tensor([1, 0, 1, 1]), "silu",
        "auto", True,
    )  # fmt: skip
    grads = ("x", "weight", "bias", "scale_table", "shift_table")
    magnitude = magnitude_of(reference.sliced_linear_ragged)
    yield Sample("linear_ragged", _linear_ragged, reference.sliced_linear_ragged, args, magnitude, grads)


def dw_pw_magnitude(*args: Any) -> Tensor:
    """A of the bound for both sums: an error of the first passes the second, and activations of slope up to 1.1."""
    positive = list(map_tensors(lambda t: t.double().abs() if t.is_floating_point() else t, args))
    positive[11] = positive[-2] = "none"
    size = reference.sliced_dw_pw(*positive)
    dtype = args[0].dtype
    rounding = 0.0 if dtype == torch.float32 else UNIT[dtype] / (16 * UNIT[torch.float32])  # of the maps between
    return (2.5 + rounding) * size


def _dw_pw_samples(dtype: torch.dtype) -> Iterator[Sample]:
    """Prefixes, strides, a residual, epilogues of both; bands of one row and of several."""
    random, normal = _normal(dtype)

    def sample(
        name: str, x: Tensor, filters: Tensor, mix: Tensor, c_out: int, stride: int = 1, epilogue: bool = False,
        residual: bool = False, acts: tuple[str, str] = ("relu6", "none"), dil: int = 1,
    ) -> Sample:  # fmt: skip
        mid, outs, pad = filters.size(0), mix.size(0), dil * (filters.size(2) // 2)
        biases = (torch.randn(mid, generator=random), torch.randn(outs, generator=random))
        tables = [torch.rand(n, generator=random) + 0.5 if epilogue else None for n in (mid, mid, outs, outs)]
        map_size = [(n - 1) // stride + 1 for n in x.shape[2:]]
        added = normal(x.size(0), c_out, *map_size) if residual else None
        args = (
            x, filters, biases[0], mix, biases[1], c_out, [stride] * 2, [pad] * 2, [dil] * 2, *tables[:2], acts[0],
            *tables[2:], added, acts[1], "auto",
        )  # fmt: skip
        return Sample(name, _dw_pw, reference.sliced_dw_pw, args, dw_pw_magnitude)

    shapes = (normal(3, 19, 9, 10), normal(24, 1, 3, 3), normal(40, 24, 1, 1))
    every = [
        sample("dw_pw", *shapes, 33, acts=("relu", "relu"), epilogue=True),
        sample("dw_pw_residual", *shapes, 40, residual=True, acts=("relu6", "hardswish")),
        sample("dw_pw_stride_2", *shapes, 17, stride=2, acts=("silu", "silu"), epilogue=True),
        sample("dw_pw_5x5", normal(2, 16, 11, 7), normal(16, 1, 5, 5), normal(8, 16, 1, 1), 8, residual=True),
        sample("dw_pw_dilation", normal(1, 7, 9, 9), normal(7, 1, 3, 3), normal(5, 9, 1, 1), 5, dil=2),
        sample("dw_pw_one_channel", normal(2, 1, 5, 5), normal(1, 1, 3, 3), normal(3, 1, 1, 1), 3),
        sample("dw_pw_empty_batch", normal(0, 4, 6, 6), normal(4, 1, 3, 3), normal(8, 4, 1, 1), 8),
        sample("dw_pw_no_outputs", normal(2, 4, 6, 6), normal(4, 1, 3, 3), normal(8, 4, 1, 1), 0),
    ]
    yield from every
    for whole in every[:2]:
        yield _dw_pw_packed_sample(whole)


def _dw_pw_packed_sample(sample: Sample) -> Sample:
    """The same call from two handles."""
    x, *weights, c_out = sample.args[:6]
    filters, filter_bias, mix, mix_bias = weights
    mid, outs = filters.size(0), mix.size(0)
    handles = (pack_conv_weight(filters, filter_bias, mid), pack_conv_weight(mix, mix_bias))

    def magnitude(x: Tensor, *args: Any) -> Tensor:
        return dw_pw_magnitude(x, *weights, *args[5:])

    args = (x, *handles, mid, list(filters.shape[2:]), outs, c_out, *sample.args[6:])
    return Sample(f"packed_{sample.name}", _dw_pw_packed, reference.sliced_dw_pw_packed, args, magnitude)


def chain_magnitude(
    x: Tensor, handles: Sequence[Tensor], tables: Sequence[Tensor], index: Tensor, steps: Any
) -> Tensor:
    """A of the bound for sums behind sums: an error of one passes all others, and activations of slope up to 1.1."""

    def convolve(v: Tensor, weight: Tensor, bias: Tensor | None, step: SlicedStep, c_out: int, *rows: Any) -> Tensor:
        vectors = [None if t is None else t.double().abs() for t in (bias, *rows)]
        geometry = (step.stride, step.padding, step.dilation, step.groups)
        options: tuple[Any, ...] = (*geometry, "prefix_groups", *vectors[1:], "none", "auto")
        return reference.sliced_conv2d(v, weight.double().abs(), vectors[0], c_out, *options)

    def attend(v: Tensor, reduce: tuple[Tensor, Tensor | None], expand: tuple[Tensor, Tensor | None]) -> Tensor:
        logits = v.mean((2, 3), keepdim=True)
        for weight, bias in (reduce, expand):
            step = SlicedStep(0, (0, 0, 1, 1), ())
            outs = weight.size(0) if weight is reduce[0] else v.size(1)
            logits = convolve(logits, weight, bias, step, outs, None, None)
        return v * (1 + logits)  # an error of a gate is at most a quarter of its logit's

    size = follow(x.double().abs(), handles, tables, index, steps, convolve, attend)
    return 1.2 * len(read_steps(steps)[1]) * size


def _chain_samples(dtype: torch.dtype) -> Iterator[Sample]:
    """Every kind of step; equal and different last widths."""
    random, normal = _normal(dtype)

    def handle(*shape: int, groups: int = 1, bias: bool = False) -> Tensor:
        weight = torch.randn(shape, generator=random) / (shape[1] * shape[2]) ** 0.5
        return pack_conv_weight(weight, torch.randn(shape[0], generator=random) if bias else None, groups)

    def tables(rows: int, *channels: int) -> list[Tensor]:
        pairs = [
            (torch.rand(rows, c, generator=random) + 0.5, torch.randn(rows, c, generator=random)) for c in channels
        ]
        return [t for pair in pairs for t in pair]

    def sample(
        name: str, x: Tensor, handles: list[Tensor], rows: list[Tensor], index: Any, steps: list[Step]
    ) -> Sample:
        args = (x, handles, rows, torch.tensor(index), write_steps(steps))
        return Sample(name, _chain, _reference, args, chain_magnitude)

    stem, wide, last = (8, 12, 20), (9, 17, 40), (16, 24, 24)
    handles = [
        handle(20, 3, 3, 3), handle(20, 1, 3, 3, groups=20, bias=True), handle(6, 20, 1, 1, bias=True),
        handle(20, 6, 1, 1, bias=True), handle(40, 20, 1, 1), handle(40, 1, 5, 5, groups=40),
        handle(24, 40, 1, 1, bias=True), handle(11, 24, 1, 1, bias=True),
    ]  # fmt: skip
    steps: list[Step] = [
        SlicedStep(0, (20, 3, 3, 3), stem, 0, (2, 2), (1, 1), act="silu"),
        SlicedStep(1, (20, 1, 3, 3), stem, 1, (1, 1), (1, 1), groups=20, act="relu"),
        AttentionStep(2, 3, 6, 20),
        SlicedStep(4, (40, 20, 1, 1), wide, 2, act="hardswish"),
        SlicedStep(5, (40, 1, 5, 5), wide, -1, (2, 2), (2, 2), groups=40, act="relu6"),
        SlicedStep(6, (24, 40, 1, 1), last),
        MeanStep(),
        SlicedStep(7, (11, 24, 1, 1), (11, 11, 11)),
    ]
    rows = [*tables(3, 20), *tables(1, 20), *tables(3, 40)]
    x = normal(5, 3, 13, 12)
    yield sample("chain", x, handles, rows, [2, 0, 1, 0, 2], steps)
    yield sample("chain_of_maps", x, handles[:7], rows, [1, 0, 1, 2, 0], steps[:6])
    yield sample("chain_of_one", x, handles[:1], [], [0] * 5, [SlicedStep(0, (20, 3, 3, 3), (7,), act="relu")])
