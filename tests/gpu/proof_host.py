"""The CUDA ops from their arguments to their results, on the harness in place of a GPU: dispatch, checks, layouts,
temporary tensors, launches and kernels, against the samples every op is tested with on the CPU."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from effkern.ops._registry import OPS, checked_error
from effkern.testing import DIRECT_LIMIT, UNIT, Sample, assert_within, layouts, map_tensors, to_double
from tests.gpu.counts import COUNTS
from tests.gpu.host_library import NAMESPACE, load
from tests.ops.catalog import (
    as_tuple,
    batched,
    check_values,
    differentiable_ops,
    every_sample,
    same_bits,
    with_rows,
)
from tests.ops.test_every_op import gradients

#: What must be there; an op that is lost would otherwise be skipped.
OPS_ON_CUDA = {
    "compact", "conv2d_backward", "multi_branch_bn_add_relu", "multi_branch_bn_add_relu_backward", "pq_conv2d",
    "pq_conv2d_backward", "pq_decode", "pq_embedding", "pq_embedding_backward", "pq_embedding_bag", "pq_linear",
    "rep_conv2d", "skip_basic_block", "skip_block_backward", "skip_bottleneck", "skip_stage", "skip_stage_backward",
    "sliced_conv2d", "sliced_conv2d_ragged", "sliced_conv2d_ragged_backward", "sliced_dw_pw", "sliced_linear",
    "sliced_linear_ragged",
}  # fmt: skip
#: Backward ops that the package's formulas call, and the ops whose formulas do.
GRADIENTS = {
    "pq_conv2d_backward", "pq_embedding_backward", "skip_block_backward", "skip_stage_backward",
    "sliced_conv2d_ragged_backward",
}  # fmt: skip
DIFFERENTIATED = {
    "pq_conv2d", "pq_decode", "pq_embedding", "pq_embedding_bag", "pq_linear", "skip_basic_block", "skip_bottleneck",
    "skip_stage", "sliced_conv2d_ragged", "sliced_linear_ragged",
}  # fmt: skip
#: Where the GPU differs, and docs/gpu.md says so: refused with a message that names the argument.
REFUSED = {"handle": "must be a 4-d weight on the GPU", "groups": "groups must be 1 on the GPU"}


def as_rounded(sample: Sample, dtype: torch.dtype) -> Sample:
    """With the bound for what the GPU rounds to 16 bits and the CPU does not: what lies between the convolutions of a
    block (twice at most, each error passing through the sums and activations behind it), and the entries of a codebook
    and their sum over stages."""
    if dtype == torch.float32 or not sample.op.name.startswith(("skip_", "pq_conv2d", "pq_linear")):
        return sample
    times = 1 + 3 * UNIT[dtype] / (DIRECT_LIMIT * UNIT[torch.float32])
    magnitude = sample.magnitude
    assert magnitude is not None
    return dataclasses.replace(sample, magnitude=lambda *args: magnitude(*args) * times)


#: Calls of each operator.
CALLS: Counter[str] = Counter()


@pytest.fixture(scope="module", autouse=True)
def ops(tmp_path_factory) -> Iterator[frozenset[str]]:
    yield load(tmp_path_factory.mktemp("host"))
    COUNTS["operators"] = f"{CALLS.total()} calls of {len(CALLS)} operators"


def on_harness(name: str) -> Callable[..., Any]:
    """An operator of the library, counted."""
    op = getattr(getattr(torch.ops, NAMESPACE), name)

    def counted(*args: Any) -> Any:
        CALLS[name] += 1
        return op(*args)

    return counted


def call(sample: Sample, args: tuple) -> Any:
    try:
        return on_harness(sample.op.name)(*args)
    except RuntimeError as error:
        raise checked_error(error) from None


def results(op: Callable[..., Any], args: tuple) -> tuple[Tensor, ...] | None:
    """The results, or None for a call that the GPU refuses by design: the message is one that docs/gpu.md knows."""
    try:
        return as_tuple(op(*args))
    except ValueError as error:
        if any(text in str(error) for text in REFUSED.values()):
            return None
        raise


def run(sample: Sample, args: tuple) -> tuple[Tensor, ...] | None:
    return results(lambda *given: call(sample, given), args)


def keys() -> list[str]:
    return [key for key, sample in every_sample().items() if sample.op.name in OPS_ON_CUDA]


#: Every layout of every tensor takes its time: for one sample of each op.
WITH_LAYOUTS = frozenset({key.split("/")[0]: key for key in reversed(keys())}.values())


def test_the_ops_are_there(ops):
    assert ops == OPS_ON_CUDA


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("key", keys())
def test_values_layouts_and_strides(key, dtype):
    sample = every_sample(dtype)[key]
    outputs = run(sample, sample.args)
    if outputs is None:
        return  # refused, with the right message
    sample = as_rounded(sample, dtype)
    check_values(sample, sample.args, outputs if len(outputs) > 1 else outputs[0], key)
    if dtype != torch.float32 or key not in WITH_LAYOUTS:
        return
    for name, value in sample.named_args().items():
        if not isinstance(value, Tensor) or value.dim() != 4 or name not in (*batched(sample), "weight"):
            continue
        at = sample.op.arguments.index(name)
        for layout, other in layouts(value).items():
            args = (*sample.args[:at], other, *sample.args[at + 1 :])
            for y, fake, first in zip(
                as_tuple(call(sample, args)), as_tuple(sample.op.fake(*args)), outputs, strict=True
            ):
                assert y.stride() == fake.stride(), f"{key}: {name} {layout}"
                assert same_bits(y, first), f"{key}: {name} {layout} changes the values"


@pytest.mark.parametrize("key", [key for key in keys() if "x" in batched(every_sample()[key])])
def test_a_sample_does_not_depend_on_the_others(key):
    sample = every_sample()[key]
    outputs = run(sample, sample.args)
    if outputs is None:
        return  # refused, with the right message
    rows = torch.arange(sample.named_args()["x"].size(0)).flip(0)[:1]
    for y, alone in zip(outputs, as_tuple(call(sample, with_rows(sample, rows))), strict=True):
        assert same_bits(y.index_select(0, rows), alone)


@pytest.mark.parametrize("key", [key for key in keys() if key.startswith("multi_branch_bn")])
def test_gradients_of_batch_norms(key):
    sample = every_sample()[key]
    op = on_harness("multi_branch_bn_add_relu_backward")
    xs, weight, bias, *_, training, _, _, relu = sample.args
    y, mean, invstd, *_ = call(sample, sample.args)
    incoming = torch.randn(y.shape, generator=torch.Generator().manual_seed(5))
    needs = [True] * len(xs)
    dxs, dweight, dbias = op(incoming, xs, weight, bias, mean, invstd, training, relu, needs)
    got = [*dxs, *dweight.unbind(), *[dbias] * len(xs)]
    want = gradients(sample.reference, sample, to_double(sample.args), (incoming,))
    positive = map_tensors(lambda t: t.abs(), to_double(sample.args))
    sizes = gradients(sample.magnitude, sample, positive, (incoming.abs(),))
    for g, g64, size in zip(got, want, sizes, strict=True):
        assert_within(g, g64, 4 * DIRECT_LIMIT * UNIT[torch.float32] * size, key)
    assert all(dx.stride() == y.stride() for dx in dxs)
    needs[-1] = False
    fewer, *same = op(incoming, xs, weight, bias, mean, invstd, training, relu, needs)
    assert fewer[-1].numel() == 0 and all(same_bits(a, b) for a, b in zip(fewer[:-1], dxs[:-1], strict=True))
    assert all(same_bits(a, b) for a, b in zip(same, (dweight, dbias), strict=True))


def check_gradients(sample: Sample, got: Sequence[Tensor], incoming: tuple[Tensor, ...], what: str) -> None:
    """Against fp64 autograd of the reference, by the bounds of tests/ops/test_every_op.py."""
    dtype = incoming[0].dtype
    want = gradients(sample.reference, sample, to_double(sample.args), incoming)
    positive = map_tensors(lambda t: t.abs() if t.is_floating_point() else t, to_double(sample.args))
    sizes = gradients(sample.magnitude, sample, positive, tuple(g.abs() for g in incoming))
    for g, g64, size in zip(got, want, sizes, strict=True):
        if dtype == torch.float32:
            assert_within(g, g64, 1.5 * 4 * DIRECT_LIMIT * UNIT[dtype] * size, what)
            continue
        # A sum near 0 may take the activation's other side where its terms were rounded: most elements must be right.
        wrong = (g.double() - g64).norm()
        assert bool(wrong <= 4 * UNIT[dtype] * size.norm()), f"{what}: {float(wrong / size.norm())}"


@pytest.fixture
def on_device(monkeypatch) -> None:
    """Lets the package's own formulas call the backward ops of the library."""
    for name in GRADIENTS:
        monkeypatch.setattr(OPS[name], "_op", on_harness(name))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("key", [key for key in differentiable_ops() if key.split("/")[0] in DIFFERENTIATED])
def test_gradients_through_ops_of_their_own(key, dtype, on_device):
    sample = every_sample(dtype)[key]
    random = torch.Generator().manual_seed(6)
    incoming = tuple(torch.randn(y.shape, generator=random).to(dtype) for y in as_tuple(sample.op(*sample.args)))
    got = results(lambda *given: tuple(gradients(sample.op, sample, given, incoming)), sample.args)
    if got is None:
        return  # refused, with the right message
    check_gradients(sample, got, incoming, key)


@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
def test_dropped_samples_leave_no_trace_in_gradients(soft):
    op = on_harness("skip_block_backward")
    random = torch.Generator().manual_seed(7)
    x, grad, y = (torch.randn(6, 8, 5, 4, generator=random) for _ in range(3))
    weights = [torch.randn(8, 8, 3, 3, generator=random) / 8 for _ in range(2)]
    biases = [torch.randn(8, generator=random) for _ in range(2)]
    keep = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0, 0.0])
    needs = [True, False, *[True] * 4, False]

    def call_with(keep: Tensor, *maps: Tensor) -> list[Tensor]:
        x, grad, y = maps
        return op(grad, x, keep if soft else keep.bool(), weights, biases, 1, None, y, "relu", needs)

    clean = call_with(keep, x, grad, y)
    assert same_bits(clean[0][keep == 0], grad[keep == 0])
    for map in (x, grad, y):
        map[keep == 0] = float("nan")
    for g, other in zip(clean[2:6], call_with(keep, x, grad, y)[2:6], strict=True):
        assert same_bits(g, other)
    rows = torch.tensor([3])
    assert same_bits(clean[0][rows], call_with(keep[rows], x[rows], grad[rows], y[rows])[0])
    nothing = call_with(torch.zeros(6), x, grad, y)
    assert not any(bool(g.any()) for g in nothing[2:6]) and same_bits(nothing[0], grad)


@pytest.mark.parametrize("name", sorted(GRADIENTS))
def test_gradients_lie_as_their_fakes_promise(name):
    random = torch.Generator().manual_seed(8)
    x, grad = (torch.randn(3, 8, 5, 4, generator=random) for _ in range(2))
    weights, biases = [torch.randn(8, 8, 3, 3, generator=random)] * 2, [torch.randn(8, generator=random)] * 2
    keep, widths = torch.tensor([1.0, 0.5, 0.0]), torch.tensor([8, 3, 5])
    codes, book = torch.randint(0, 5, (8, 9), generator=random).byte(), torch.randn(1, 5, 8, generator=random)

    def arguments(x: Tensor, grad: Tensor, weight: Tensor) -> tuple:
        if name == "skip_block_backward":
            return grad, x, keep, [weight] * 2, biases, 1, grad, x, "relu", [True] * 7
        if name == "skip_stage_backward":
            return grad, x, keep.view(3, 1), [weight] * 2, biases, "basic", "relu", [True] * 6
        if name == "pq_conv2d_backward":
            return grad, x, codes, book, biases[0], [3, 3], [1, 1], [1, 1], [1, 1], 1, [True] * 3
        if name == "pq_embedding_backward":
            rows = grad.flatten()[:360].view(5, 72)
            return rows, torch.tensor([1, 0, 7, 1, 3]), None, biases[0][:5], codes, book, biases[0], 3, [True] * 3
        geometry = [[1, 1], [1, 1], [1, 1], 1, "prefix_groups"]
        table = torch.ones(2, 8)
        return (grad, grad, x, weight, biases[0], widths, widths, *geometry, table, table,
                torch.tensor([0, 1, 0]), "relu", "auto", [True] * 5)  # fmt: skip

    first = None
    for layout in layouts(x):
        args = arguments(*(layouts(t)[layout] for t in (x, grad, weights[0])))
        got = on_harness(name)(*args)
        assert [g.stride() for g in got] == [g.stride() for g in OPS[name].fake(*args)], layout
        first = first or got
        assert all(same_bits(a, b) for a, b in zip(got, first, strict=True)), layout


def test_arguments_that_do_not_fit_are_refused_by_name():
    x, w = torch.zeros(2, 4, 5, 5), torch.zeros(6, 4, 3, 3)
    good = {"x": x, "weight": w, "bias": None, "stride": [1, 1], "padding": [1, 1], "dilation": [1, 1], "groups": 1,
            "act": "none", "residual": None, "algo": "auto"}  # fmt: skip
    bad = [
        ("x", x[0], ValueError), ("x", x.double(), TypeError), ("x", x[:, :3], ValueError),
        ("weight", w.half(), TypeError),
        ("weight", w[0], ValueError), ("bias", torch.zeros(5), ValueError), ("bias", torch.zeros(6).long(), TypeError),
        ("stride", [0, 1], ValueError), ("stride", [1], ValueError), ("padding", [-1, 0], ValueError),
        ("dilation", [9, 9], ValueError), ("groups", 0, ValueError), ("groups", 5, ValueError),
        ("act", "tanh", ValueError),
        ("residual", x, ValueError), ("algo", "fast", ValueError),
    ]  # fmt: skip
    op = OPS["rep_conv2d"]
    sample = Sample("bad", op, op.reference, tuple(good[name] for name in op.arguments))
    assert call(sample, sample.args).shape == (2, 6, 5, 5)
    for name, value, kind in bad:
        with pytest.raises(kind, match="rep_conv2d: "):
            call(sample, tuple((good | {name: value})[n] for n in op.arguments))


def test_large_kernels_are_refused():
    x, w = torch.zeros(1, 1, 40, 40), torch.zeros(1, 1, 33, 1)
    op = OPS["rep_conv2d"]
    sample = Sample("large", op, op.reference, (x, w, None, [1, 1], [0, 0], [1, 1], 1, "none", None, "auto"))
    with pytest.raises(ValueError, match="at most 32"):
        call(sample, sample.args)


def test_widths_that_do_not_fit_are_held_to_what_does():
    op = OPS["sliced_conv2d_ragged"]
    x, w = torch.randn(3, 8, 4, 4), torch.randn(12, 8, 3, 3)

    def args(c_in: list[int], c_out: list[int]) -> tuple:
        return (x, w, None, torch.tensor(c_in), torch.tensor(c_out, dtype=torch.int32), 10, [1, 1], [1, 1], [1, 1], 1,
                "prefix_groups", None, None, None, "none", "auto", True)  # fmt: skip

    sample = Sample("widths", op, op.reference, args([8, 0, 8], [10, 10, 0]))
    want = call(sample, sample.args)
    assert same_bits(call(sample, args([99, -1, 2**40], [2**30, 11, -7])), want)


# More blocks than one launch takes; a map of five rows, of which a warp takes three; the form of 32 and 64 channels.
@pytest.mark.parametrize("shape, blocks", [((16, 3, 4), 34), ((16, 5, 60), 2), ((32, 5, 7), 2), ((64, 4, 5), 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_stage_in_one_launch_has_the_bits_of_its_blocks(dtype, shape, blocks):
    c = shape[0]
    x = torch.randn(2, *shape).to(dtype)
    keep = torch.rand(2, blocks).round() * torch.rand(2, blocks)
    keep[0] = 1
    weights = [(torch.randn(c, c, 3, 3) / (3 * c**0.5)).to(dtype) for _ in range(2 * blocks)]
    biases = [torch.randn(c) for _ in range(2 * blocks)]
    skip_stage, skip_basic_block = on_harness("skip_stage"), on_harness("skip_basic_block")
    want = x
    for b in range(blocks):
        pairs = [t for pair in zip(weights, biases, strict=True) for t in pair][4 * b : 4 * b + 4]
        want = skip_basic_block(want, keep[:, b], *pairs, 1, None, "relu", "auto")
    assert same_bits(skip_stage(x, keep, weights, biases, "basic", "relu", "auto"), want)
