"""Layers of real networks on a GPU, against fp64 on the same GPU; tensors of more than 2^31 elements."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from effkern import ops
from effkern.ops._registry import OPS
from effkern.testing import DIRECT_LIMIT, UNIT, Sample, assert_within, direct_bound, map_tensors, to_double
from tests.gpu.device import DEVICE, needs_device
from tests.gpu.layers import BATCHES, LAYERS, a_map, coded, normal, sample_of, weight, widths
from tests.gpu.on_device import DTYPES, allowed, on_one_side
from tests.gpu.proof_host import check_gradients
from tests.ops.catalog import as_tuple, batched, check_values, same_bits, with_rows
from tests.ops.test_every_op import gradients

pytestmark = [needs_device, pytest.mark.usefixtures("in_full")]
F16 = torch.float16
#: All batches in the dtype that networks run in, the others once.
CALLS = [(n, F16) for n in BATCHES] + [(BATCHES[1], torch.float32), (BATCHES[1], torch.bfloat16)]
#: Elements of the tensors that are too large for 32 bits; the CPU only checks the tests.
MANY = 2**31 + 2**20 if DEVICE == "cuda" else 2**16


def check_layer(key: str, n: int, dtype: torch.dtype) -> None:
    """Values, the same bits in another call and for a part of the batch."""
    sample = sample_of(key, n, dtype)
    outputs = sample.op(*sample.args)
    check_values(allowed(sample, dtype), sample.args, outputs, key)
    outputs = as_tuple(outputs)
    for y, again in zip(outputs, as_tuple(sample.op(*sample.args)), strict=True):
        assert same_bits(y, again), "another call gives other bits"
    if n == 1 or "x" not in batched(sample) or (sample.op.name == "pq_linear" and n > 8):
        return
    for rows in ([n - 1], [n // 2, 0, 0]):
        chosen = torch.tensor(rows, device=DEVICE)
        for y, part in zip(outputs, as_tuple(sample.op(*with_rows(sample, chosen))), strict=True):
            assert same_bits(y.index_select(0, chosen), part), f"rows {rows} depend on their batch"


@pytest.mark.parametrize("n, dtype", CALLS, ids=lambda value: str(value))
@pytest.mark.parametrize("key", LAYERS)
def test_layers(key, n, dtype):
    check_layer(key, n, dtype)


def smooth(sample: Sample) -> Sample:
    """Without an activation whose slope jumps: there a rounding error of the sum is no small one of the gradient."""
    kinks = ("relu", "relu6", "hardswish")
    args = tuple("none" if isinstance(a, str) and a in kinks else a for a in sample.args)
    if sample.op.name.startswith("multi_branch"):
        args = (*args[:-1], False)
    return dataclasses.replace(sample, args=args)


@pytest.mark.parametrize("dtype", [torch.float32, F16], ids=str)
@pytest.mark.parametrize("key", LAYERS)
def test_gradients_of_layers(key, dtype):
    n = BATCHES[1]
    sample = sample_of(key, n, dtype)
    if not sample.requires_grad:
        return
    norms = key.startswith("multi_branch")
    if dtype == torch.float32 or norms:
        sample = smooth(sample)
    outputs = as_tuple(sample.op(*sample.args))[: 1 if norms else None]
    incoming = tuple(torch.randn_like(y) for y in outputs)
    if not norms:
        incoming = on_one_side(sample, outputs, incoming)
    got = gradients(sample.op, sample, sample.args, incoming)
    for g, again in zip(got, gradients(sample.op, sample, sample.args, incoming), strict=True):
        assert same_bits(g, again), "another call gives other bits"
    if norms and dtype == torch.float32:
        want = gradients(sample.reference, sample, to_double(sample.args), incoming)
        positive = map_tensors(lambda t: t.abs(), to_double(sample.args))
        sizes = gradients(sample.magnitude, sample, positive, (incoming[0].abs(),))
        for g, g64, size in zip(got, want, sizes, strict=True):
            assert_within(g, g64, 4 * DIRECT_LIMIT * UNIT[dtype] * size, key)
    elif not norms:
        check_gradients(sample, got, incoming, key)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kept", ["none", "all", "half", "soft"])
@pytest.mark.parametrize("n", BATCHES)
@pytest.mark.parametrize("c, side", [(16, 32), (32, 16), (64, 8)])
def test_stages_of_resnet110(c, side, n, kept, dtype):
    blocks = 17 if DEVICE == "cuda" else 3
    x = a_map(n, c, side, dtype)
    weights = [weight(c, c, 3, dtype, gain=0.5) for _ in range(2 * blocks)]
    biases = [0.1 * normal(c) for _ in range(2 * blocks)]
    drawn = torch.rand(n, blocks, device=DEVICE)
    keep = {"none": drawn > 1, "all": drawn >= 0, "half": drawn < 0.5, "soft": drawn * (drawn < 0.6)}[kept]
    op = OPS["skip_stage"]
    y = op(x, keep, weights, biases, "basic", "relu", "auto")
    exact = op.reference(*to_double((x, keep, weights, biases)), "basic", "relu", "auto")
    wrong = float((y.double() - exact).norm() / exact.norm())
    assert wrong <= 8 * blocks * UNIT[dtype], wrong
    alone = op(x[n - 1 :], keep[n - 1 :], weights, biases, "basic", "relu", "auto")
    assert same_bits(alone, y[n - 1 :]), "a sample depends on its batch"
    if kept == "none":
        assert same_bits(y, x)
    if DEVICE == "cpu":
        return  # its stages round once, after the last block
    z = x
    for b in range(blocks):
        w, v = weights[2 * b : 2 * b + 2], biases[2 * b : 2 * b + 2]
        z = ops.skip_basic_block(z, keep[:, b], w[0], v[0], w[1], v[1])
    assert same_bits(y, z), "a stage is not its blocks"


def large_map(c: int, side: int) -> Tensor:
    """Of more than 2^31 numbers, made where it stays."""
    n = MANY // (c * side * side) + 1
    return torch.empty((n, c, side, side), dtype=F16, device=DEVICE, memory_format=torch.channels_last).normal_()


def parts(n: int, count: int = 7) -> Iterator[slice]:
    step = -(-n // count)
    return (slice(i, min(i + step, n)) for i in range(0, n, step))


def check_parts(function: Callable[..., Tensor], *batch: Tensor) -> Tensor:
    """A call for all samples has the bits of calls for parts of them, none of which has that many numbers."""
    y = function(*batch)
    assert y.numel() >= MANY or batch[0].numel() >= MANY
    for part in parts(batch[0].size(0)):
        assert torch.equal(y[part], function(*(t[part] for t in batch))), f"samples {part}"
    return y


@pytest.mark.parametrize("kernel, groups", [(1, 1), (3, 1), (3, 64)])
def test_convolutions_over_2_31(kernel, groups):
    w, b = weight(64, 64 // groups, kernel, F16), normal(64)
    x = large_map(64, 112 if DEVICE == "cuda" else 8)
    y = check_parts(lambda x: ops.rep_conv2d(x, w, b, padding=kernel // 2, groups=groups), x)
    for row in (slice(0, 1), slice(-1, None)):
        args = (x[row].double(), w.double(), b.double(), [1, 1], [kernel // 2] * 2, [1, 1], groups)
        exact = OPS["rep_conv2d"].reference(*args)
        size = OPS["rep_conv2d"].reference(*(a.abs() if isinstance(a, Tensor) else a for a in args))
        assert_within(y[row], exact, direct_bound(size, exact, F16) * (1 if DEVICE == "cuda" else 4))


def test_gradients_of_convolutions_over_2_31():
    w = weight(64, 64, 1, F16).requires_grad_()
    x = large_map(64, 112 if DEVICE == "cuda" else 8).requires_grad_()
    gy = torch.empty_like(x).normal_()
    gx, gw = torch.autograd.grad(ops.rep_conv2d(x, w, act="none"), (x, w), gy)
    total = torch.zeros_like(gw, dtype=torch.float64)
    for part in parts(x.size(0)):
        leaf = x.detach()[part].requires_grad_()
        some, more = torch.autograd.grad(ops.rep_conv2d(leaf, w, act="none"), (leaf, w), gy[part])
        assert torch.equal(gx[part], some), f"samples {part}"
        total += more.double()
    assert float((gw.double() - total).norm() / total.norm()) < 4 * UNIT[F16]


def test_ragged_convolutions_over_2_31():
    w, x = weight(64, 64, 1, F16), large_map(64, 112 if DEVICE == "cuda" else 8)
    width = widths(x.size(0), (24, 40, 64))
    check_parts(lambda x, width: ops.sliced_conv2d_ragged(x, w, None, width, width, 64), x, width)


def test_skipped_blocks_over_2_31():
    x = large_map(64, 56 if DEVICE == "cuda" else 8)
    weights = [t for _ in range(2) for t in (weight(64, 64, 3, F16), normal(64))]
    keep = torch.arange(x.size(0), device=DEVICE) % 2 == 0
    y = check_parts(lambda x, keep: ops.skip_basic_block(x, keep, *weights), x, keep)
    assert torch.equal(y[~keep][-1], x[~keep][-1])


def test_batch_norms_over_2_31():
    x = large_map(64, 112 if DEVICE == "cuda" else 8)
    vectors = [[normal(64).abs() + 0.5] for _ in range(4)]
    op = OPS["multi_branch_bn_add_relu"]
    check_parts(lambda x: op([x], *vectors, False, 0.1, 1e-5, True)[0], x)
    statistics = op([x], *vectors, True, 0.1, 1e-5, True)
    if DEVICE == "cuda":  # of normal numbers
        assert float(statistics[1].abs().max()) < 1e-3 and float((statistics[2] - 1).abs().max()) < 1e-3


@pytest.mark.parametrize("form", ["many rows", "large table"])
def test_embeddings_over_2_31(form):
    if form == "many rows":
        codes, book = coded(100_000 if DEVICE == "cuda" else 50, 512, 8)
        idx = torch.randint(codes.size(0), (MANY // 512 + 1,), device=DEVICE)
    else:
        codes = torch.empty(MANY // 64 + 1, 64, dtype=torch.uint8, device=DEVICE).random_(0, 255)
        _, book = coded(1, 8, 8)
        idx = codes.size(0) - 1 - torch.arange(999, device=DEVICE)
        idx[0] = 0
    book = book.to(F16)
    y = ops.pq_embedding(idx, codes, book)
    for part in parts(idx.size(0)):
        want = book[0][codes[idx[part]].long()].flatten(1)
        assert torch.equal(y[part], want), f"rows {part}"


def test_decoding_over_2_31():
    codes, book = coded(MANY // 512 + 1, 512, 8)
    check_parts(lambda codes: ops.pq_decode(codes, book.to(F16)), codes)
