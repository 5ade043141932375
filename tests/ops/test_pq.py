"""Product-quantized ops: codes out of range, memory, gradients of shared entries, contracts of the codebook.

Values, layouts, gradients and registration of all samples: test_every_op.py.
"""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import effkern
from effkern.ops import pq_conv2d, pq_decode, pq_embedding, pq_embedding_bag, pq_linear
from effkern.ops.pq import reference
from effkern.ops.pq.samples import random_codes, samples
from effkern.testing import assert_within, direct_bound


def sample_of(name):
    return next(s for s in samples() if s.name == name)


def test_linear_takes_any_leading_dimensions():
    codes, book = random_codes(torch.Generator().manual_seed(1), 6, 8, 4, 5, 0, 1, torch.uint8)
    x = torch.randn(2, 3, 8)
    y = pq_linear(x, codes, book)
    assert y.shape == (2, 3, 6) and pq_linear(x[:0], codes, book).shape == (0, 3, 6)
    assert torch.equal(pq_linear(x[1, 2], codes, book), y[1, 2])
    assert torch.equal(pq_linear(x.transpose(0, 1), codes, book), y.transpose(0, 1))


def test_codebook_gradient_sums_over_all_uses_and_spares_the_unused():
    codes = torch.tensor([[0, 2], [2, 2]], dtype=torch.uint8)
    book = torch.randn(1, 4, 3, requires_grad=True)
    x = torch.randn(5, 6)
    pq_linear(x, codes, book).sum().backward()
    sums = x.sum(0).reshape(2, 3)
    torch.testing.assert_close(book.grad[0, 0], sums[0])
    torch.testing.assert_close(book.grad[0, 2], sums[0] + 2 * sums[1])
    assert torch.equal(book.grad[0, [1, 3]], torch.zeros(2, 3))


def test_gradients_do_not_depend_on_the_chunks(monkeypatch):
    from effkern.ops.pq import gradients

    sample = sample_of("conv_groups_dilated")
    x, codes, book, scale, _, *window = sample.args
    grad = torch.randn(sample.op(*sample.args).shape)
    call = (grad, x, codes, book, scale, *window[:5], [True] * 3)
    whole = gradients.conv2d_backward(*call)
    monkeypatch.setattr(gradients, "chunk_rows", lambda columns: 5)
    for a, b in zip(whole, gradients.conv2d_backward(*call), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bad", [200, 255])
def test_codes_out_of_range_are_refused(bad):
    codes, book = random_codes(torch.Generator(), 20, 32, 8, 100, 0, 1, torch.uint8)
    codes[19, 3] = bad
    idx = torch.tensor([19])
    for call in (
        lambda: pq_linear(torch.randn(3, 32), codes, book),
        lambda: pq_conv2d(torch.randn(1, 32, 4, 4), codes, book),
        lambda: pq_embedding(idx, codes, book),
        lambda: pq_embedding_bag(idx, codes, book, torch.tensor([0])),
        lambda: pq_decode(codes, book),
    ):
        with pytest.raises(ValueError, match=r"codes.*100.*got " + str(bad)):
            call()
    assert pq_embedding(torch.tensor([0]), codes, book).shape == (1, 32)  # a bad row nobody reads harms nobody


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32], ids=str)
def test_negative_codes_are_refused(dtype):
    codes = torch.tensor([[0, -1]], dtype=dtype)
    with pytest.raises(ValueError, match="codes"):
        pq_linear(torch.randn(1, 4), codes, torch.randn(1, 3, 2))


def test_depthwise_codes_are_checked():
    codes = torch.full((4, 1), 9, dtype=torch.uint8)
    with pytest.raises(ValueError, match="codes"):
        pq_conv2d(torch.randn(1, 4, 5, 5), codes, torch.randn(1, 3, 9), kernel_size=3, padding=1, groups=4)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_scale_must_be_finite(bad):
    codes, book = random_codes(torch.Generator(), 4, 8, 4, 3, 0, 1, torch.uint8)
    scale = torch.tensor([1.0, bad, 1.0, 1.0])
    for call in (
        lambda: pq_linear(torch.randn(3, 8), codes, book, scale),
        lambda: pq_embedding(torch.tensor([0]), codes, book, scale),
        lambda: pq_decode(codes, book, scale),
    ):
        with pytest.raises(ValueError, match="scale must be finite"):
            call()


def test_indices_out_of_range_are_refused():
    codes, book = random_codes(torch.Generator(), 4, 8, 4, 3, 0, 1, torch.uint8)
    for idx in (torch.tensor([4]), torch.tensor([-1])):
        with pytest.raises(IndexError, match="idx"):
            pq_embedding(idx, codes, book)
        with pytest.raises(IndexError, match="idx"):
            pq_embedding_bag(idx, codes, book, torch.tensor([0]))
    idx = torch.tensor([0, 1])
    for offsets in ([1], [0, 2, 1], [0, 3], []):
        with pytest.raises(ValueError, match="offsets"):
            pq_embedding_bag(idx, codes, book, torch.tensor(offsets, dtype=torch.int64))


def test_wrong_arguments_are_named():
    codes, book = random_codes(torch.Generator(), 4, 8, 4, 3, 0, 1, torch.uint8)
    x, nothing = torch.randn(2, 8), torch.zeros(1)
    staged, image = codes[..., None].expand(-1, -1, 2), torch.randn(1, 8, 3, 3)
    three = (codes.repeat(1, 9), book, None, None, 3)
    for error, match, call in (
        (TypeError, "codes", lambda: pq_linear(x, codes.long(), book)),
        (TypeError, "codebook", lambda: pq_linear(x, codes, book.double())),
        (TypeError, "x must be", lambda: pq_linear(x.double(), codes, book)),
        (ValueError, "positions", lambda: pq_linear(torch.randn(2, 9), codes, book)),
        (ValueError, "1 book or one per position", lambda: pq_linear(x, codes, book.expand(3, -1, -1))),
        (ValueError, "1 book or one per stage", lambda: pq_linear(x, codes[..., None], book.expand(2, -1, -1))),
        (ValueError, "bias", lambda: pq_linear(x, codes, book, bias=torch.randn(5))),
        (ValueError, "act", lambda: pq_linear(x, codes, book, act="tanh")),
        (ValueError, "algo", lambda: pq_linear(x, codes, book, algo="wino_codebook")),
        (ValueError, "lut for codes of more than one stage", lambda: pq_linear(x, staged, book, algo="lut")),
        (ValueError, "more than 256 entries", lambda: pq_linear(x, codes, book[:, :1].expand(1, 257, 4), algo="lut")),
        (ValueError, "but for a 1x1 kernel", lambda: pq_conv2d(image, *three, algo="decode_fma")),
        (ValueError, "but for a 1x1 kernel", lambda: pq_conv2d(image, *three, algo="lut")),
        (ValueError, "codebook must hold fewer", lambda: pq_linear(x, codes, book[:, :1, :1].expand(1, 65536, 16384))),
        (ValueError, "groups", lambda: pq_conv2d(torch.randn(1, 8, 3, 3), codes, book, groups=3)),
        (ValueError, "kernel", lambda: pq_conv2d(torch.randn(1, 8, 2, 2), codes, book, kernel_size=3)),
        (ValueError, "stride", lambda: pq_conv2d(torch.randn(1, 8, 2, 2), codes, book, stride=0)),
        (ValueError, "mode", lambda: pq_embedding_bag(codes[:, 0].long(), codes, book, torch.tensor([0]), mode="max")),
        (TypeError, "idx", lambda: pq_embedding(torch.randn(3), codes, book)),
        (ValueError, "padding_idx", lambda: pq_embedding(torch.tensor([0]), codes, book, padding_idx=4)),
        # One tensor on the meta device makes the whole call a question about shapes: no kernel looks at the devices.
        (ValueError, "offsets", lambda: pq_embedding_bag(nothing.long(), codes, book, nothing.long().to("meta"))),
    ):
        with pytest.raises(error, match=match):
            call()


def test_equal_sizes_are_told_apart_by_the_dimensions_of_codes():
    """Two books, two positions, two stages: the last size of codes decides what a book belongs to."""
    book = torch.randn(2, 3, 2)
    by_position = torch.tensor([[0, 1]], dtype=torch.uint8)
    torch.testing.assert_close(pq_decode(by_position, book)[0], torch.cat([book[0, 0], book[1, 1]]))
    by_stage = torch.tensor([[[0, 1], [2, 2]]], dtype=torch.uint8)
    want = torch.cat([book[0, 0] + book[1, 1], book[0, 2] + book[1, 2]])
    torch.testing.assert_close(pq_decode(by_stage, book)[0], want)


def test_strided_codes_and_codebook():
    codes, book = random_codes(torch.Generator().manual_seed(1), 6, 8, 4, 5, 0, 1, torch.uint8)
    x = torch.randn(3, 8)
    want = pq_linear(x, codes, book)
    assert torch.equal(
        pq_linear(x, codes.t().contiguous().t(), book.transpose(1, 2).contiguous().transpose(1, 2)), want
    )


def test_codebook_dtype_is_independent_of_x():
    codes, book = random_codes(torch.Generator().manual_seed(1), 6, 8, 4, 5, 0, 1, torch.uint8)
    x = torch.randn(3, 8)
    for dtype in (torch.bfloat16, torch.float16):
        assert torch.equal(pq_linear(x, codes, book.to(dtype)), pq_linear(x, codes, book.to(dtype).float()))
        assert pq_linear(x.to(dtype), codes, book).dtype == dtype


def test_batch_and_threads_change_no_bit():
    sample = sample_of("conv_3x3_d9")
    x, *rest = sample.args
    x = torch.randn(7, *x.shape[1:])
    whole = sample.op(x, *rest)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            assert torch.equal(sample.op(x, *rest), whole)
            for n in range(7):
                assert torch.equal(sample.op(x[n : n + 1], *rest), whole[n : n + 1])
    finally:
        torch.set_num_threads(threads)


ALGOS = ["auto", "decode_fma", "panel", "lut", "direct"]


@pytest.mark.parametrize("algo", ALGOS)
@pytest.mark.parametrize("d", [4, 8, 16, 3])
def test_rows_of_a_linear_layer_do_not_depend_on_each_other(algo, d):
    """1 row and 107 rows, in one thread or two, with columns left over: the same bits."""
    codes, book = random_codes(torch.Generator().manual_seed(d), 70, 100, d, 200, 0, 1, torch.uint8)
    x = torch.randn(107, 100)
    whole = pq_linear(x, codes, book, algo=algo)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            for rows in (1, 2, 5, 8, 50, 107):
                assert torch.equal(pq_linear(x[:rows], codes, book, algo=algo), whole[:rows]), (count, rows)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("algo", ALGOS)
@pytest.mark.parametrize("size", [(7, 7), (6, 6), (2, 3)], ids=str)
def test_samples_of_a_pointwise_convolution_do_not_depend_on_each_other(algo, size):
    """Maps of 49 pixels leave one to decode_fma where lut runs, those of 36 leave four to lut, 6 are fewer than 8."""
    codes, book = random_codes(torch.Generator().manual_seed(1), 530, 64, 8, 64, 0, 1, torch.uint8)
    x = torch.randn(5, 64, *size).contiguous(memory_format=torch.channels_last)
    whole = pq_conv2d(x, codes, book, algo=algo)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            for n in range(5):
                assert torch.equal(pq_conv2d(x[n : n + 1], codes, book, algo=algo), whole[n : n + 1])
            assert torch.equal(pq_conv2d(x.contiguous(), codes, book, algo=algo), whole)
    finally:
        torch.set_num_threads(threads)


@settings(max_examples=120, deadline=None)
@given(st.data())
def test_every_algorithm_is_within_the_bound_for_random_shapes(data):
    """Also with codes that do not exist: a ValueError, and nothing read past the codebook."""
    draw = data.draw
    c_in, c_out = draw(st.integers(1, 70)), draw(st.integers(1, 40))
    size = (draw(st.integers(1, 3)), c_in, draw(st.integers(1, 5)), draw(st.integers(1, 5)))
    d, k = draw(st.integers(1, 20) | st.sampled_from([24, 32, 80])), draw(st.integers(1, 256))
    algo, stages = draw(st.sampled_from(ALGOS)), draw(st.integers(0, 2))
    algo = "auto" if algo == "lut" and stages > 1 else algo
    seed = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    dtype = draw(st.sampled_from([torch.uint8, torch.int16, torch.uint16, torch.int32]))
    books = draw(st.sampled_from([1, stages or -(-c_in // d)]))
    codes, book = random_codes(seed, c_out, c_in, d, k, stages, books, dtype)
    poison = draw(st.booleans()) and k < 250
    if poison:
        value = draw(st.sampled_from([k, 255] if dtype == torch.uint8 else [k, 30000, torch.iinfo(dtype).max]))
        codes.view(-1)[draw(st.integers(0, codes.numel() - 1))] = value
    x, stride = torch.randn(size, generator=seed), draw(st.integers(1, 2))
    x = x.contiguous(memory_format=torch.channels_last) if draw(st.booleans()) else x
    args = (codes, book, None, torch.randn(c_out, generator=seed), 1, stride)
    if poison:
        with pytest.raises(ValueError, match=f"got {value}"):
            pq_conv2d(x, *args, algo=algo)
        return
    window = ([1, 1], [stride] * 2, [0, 0], [1, 1], 1)
    exact = reference.pq_conv2d(x.double(), codes, book.double(), None, args[3].double(), *window)
    bound = reference.pq_conv2d(x.double().abs(), codes, book.double().abs(), None, args[3].double().abs(), *window)
    assert_within(pq_conv2d(x, *args, algo=algo), exact, direct_bound(bound, exact, torch.float32), algo)


@pytest.mark.parametrize("algo", ALGOS)
def test_infinite_entries_reach_only_the_outputs_that_use_them(algo):
    """Neither filling up sub-vectors, nor rows of a tile, nor what overhangs may multiply an infinity by zero."""
    codes = torch.zeros(33, 4, dtype=torch.uint8)
    codes[5, 1] = 1
    book = torch.ones(1, 2, 9)
    book[0, 1], book[0, 0, 6:] = float("inf"), 1.0
    tail = torch.ones(1, 1, 9)
    tail[..., 3:] = float("inf")  # overhangs rows of 30
    x = torch.ones(11, 36)
    y = pq_linear(x, codes, book, algo=algo)
    assert bool(y[:, 5].isinf().all()) and bool((y[:, [0, 4, 6, 32]] == 36).all())
    per_position = torch.cat([torch.ones(3, 1, 9), tail])
    assert bool((pq_linear(x[:, :30], torch.zeros_like(codes), per_position, algo=algo) == 30).all())


def test_autocast_casts_x_and_spares_the_codebook():
    codes, book = random_codes(torch.Generator().manual_seed(1), 6, 8, 4, 5, 0, 1, torch.uint8)
    x = torch.randn(3, 8)
    with torch.autocast("cpu", torch.bfloat16):
        y = pq_linear(x, codes, book)
        assert y.dtype == torch.bfloat16
        assert pq_embedding(torch.tensor([0]), codes, book).dtype == torch.float32
    assert torch.equal(y, pq_linear(x.bfloat16(), codes, book))


def test_double_backward_is_refused():
    codes, book = random_codes(torch.Generator().manual_seed(1), 6, 8, 4, 5, 0, 1, torch.uint8)
    x = torch.randn(3, 8, requires_grad=True)
    (g,) = torch.autograd.grad(pq_linear(x, codes, book).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward of pq_conv2d and pq_linear is not supported"):
        g.sum().backward()


def test_bags_agree_with_torch():
    codes, book = random_codes(torch.Generator().manual_seed(1), 9, 8, 4, 5, 0, 1, torch.uint8)
    idx, offsets = torch.randint(9, (12,)), torch.tensor([0, 0, 5, 12])
    table = pq_decode(codes, book)
    for mode in ("sum", "mean"):
        for padding in (None, int(idx[1])):
            got = pq_embedding_bag(idx, codes, book, offsets, mode=mode, padding_idx=padding)
            torch.testing.assert_close(got, F.embedding_bag(idx, table, offsets, mode=mode, padding_idx=padding))
    fixed = idx.reshape(4, 3)
    weights = torch.rand(4, 3)
    got = pq_embedding_bag(fixed, codes, book, mode="sum", per_sample_weights=weights)
    torch.testing.assert_close(got, F.embedding_bag(fixed, table, mode="sum", per_sample_weights=weights))


def test_compiles_and_exports_with_a_dynamic_batch():
    sample = sample_of("conv_3x3_d9")
    x, codes, book, scale, bias = sample.args[:5]

    class Layer(torch.nn.Module):
        def forward(self, x):
            y = pq_conv2d(x, codes, book, scale, bias, 3, padding=1, act="relu")
            return pq_linear(y.mean((2, 3)), codes[:, :3], book, act="silu")

    layer = Layer()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    program = torch.export.export(layer, (x,), dynamic_shapes={"x": {0: torch.export.Dim("n")}}).module()
    for n in (2, 3, 5):
        batch = torch.randn(n, *x.shape[1:])
        assert torch.equal(compiled(batch), layer(batch))
        assert torch.equal(program(batch), layer(batch))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_random_calls_compute_or_raise(data):
    """A valid call is within its bound; an invalid one raises what it should, and never reads out of bounds."""
    draw = data.draw
    groups = draw(st.integers(1, 3))
    channels, per_group, n = draw(st.integers(1, 9)), draw(st.integers(1, 20)), draw(st.integers(0, 3))
    kernel, size = draw(st.integers(1, 3)), draw(st.integers(1, 7))
    stride, padding, dilation = draw(st.integers(0, 2)), draw(st.integers(0, 2)), draw(st.integers(1, 2))
    d, k, stages = draw(st.sampled_from([1, 2, 3, 4, 8, 9, 16, 18])), draw(st.integers(1, 300)), draw(st.integers(0, 3))
    columns = channels * kernel * kernel
    seed = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    positions = -(-columns // d)
    books = draw(st.sampled_from([1, stages or positions]))
    dtype = draw(st.sampled_from([torch.uint8, torch.int16, torch.uint16, torch.int32]))
    codes, book = random_codes(seed, groups * per_group, columns, d, k, stages, books, torch.int32)
    codes = codes.to(dtype)  # of more than 256 entries as uint8: wraps, and stays in range
    poison = draw(st.booleans()) and n > 0 and k < 250
    if poison:
        codes.view(-1)[draw(st.integers(0, codes.numel() - 1))] = 255
    x = torch.randn(n, groups * channels, size, size, generator=seed)
    args = (codes, book, None, None, kernel, stride, padding, dilation, groups)
    span = size + 2 * padding - dilation * (kernel - 1) - 1
    if stride == 0 or span < 0 or poison:
        with pytest.raises(ValueError):
            pq_conv2d(x, *args)
        return
    pairs = ([kernel] * 2, [stride] * 2, [padding] * 2, [dilation] * 2)
    exact = reference.pq_conv2d(x.double(), codes, book.double(), None, None, *pairs, groups)
    bound = reference.pq_conv2d(x.double().abs(), codes, book.double().abs(), None, None, *pairs, groups)
    assert_within(pq_conv2d(x, *args), exact, direct_bound(bound, exact, torch.float32))


PEAKS = r"""
import re, sys, torch
from effkern.ops import pq_conv2d, pq_decode, pq_linear

torch.set_num_threads(2)
peak = lambda: int(re.search(r"VmHWM:\s+(\d+) kB", open("/proc/self/status").read())[1])
what, algo = sys.argv[1:]
book = torch.randn(1, 256, 9 if what == "3x3" else 8, requires_grad=True)
rows, columns = (2048, 1820 * 9) if what == "3x3" else (8192, 4096)
codes = torch.zeros(rows, columns // book.shape[2], dtype=torch.uint8).random_(256)
if what == "linear":
    x = torch.randn(4, columns, requires_grad=True)
    call = lambda part: pq_linear(x[:, : part * 8], codes[: part * 8, :part], book, algo=algo)
elif what == "1x1":
    x = torch.randn(1, columns, 2, 2).contiguous(memory_format=torch.channels_last).requires_grad_()
    call = lambda part: pq_conv2d(x[:, : part * 8], codes[: part * 8, :part], book, algo=algo)
else:
    x = torch.randn(1, columns // 9, 2, 2).contiguous(memory_format=torch.channels_last).requires_grad_()
    call = lambda part: pq_conv2d(x[:, :part], codes[: part * 8, :part], book, kernel_size=3, padding=1, algo=algo)
call(8).sum().backward()  # libraries and pools are loaded now
before = peak()
y = call(codes.shape[1])
forward = peak()
y.sum().backward()
backward = peak()
pq_decode(codes, book)
print(forward - before, backward - forward, peak() - backward)
"""


@pytest.mark.parametrize(
    ("what", "algo"),
    [
        *(("linear", algo) for algo in ("auto", "panel", "lut")),
        *(("1x1", algo) for algo in ("decode_fma", "panel", "lut")),
        *(("3x3", algo) for algo in ("auto", "direct")),
    ],
)
def test_memory_stays_at_a_panel_and_never_reaches_the_dense_weight(what, algo):
    """Growth of the peak resident memory of a process of its own over forward, backward and decoding."""
    root = str(Path(effkern.__file__).parents[1])
    command = [sys.executable, "-c", PEAKS, what, algo]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=root)
    forward, backward, decoded = (1024 * int(kilobytes) for kilobytes in done.stdout.split())
    dense = 8192 * 4096 * 4  # 128 MiB, about as much for the 3x3 kernels
    assert decoded > 0.75 * dense  # the measure does see a dense weight
    assert forward < dense / 16
    assert backward < dense / 4
