"""Convolution gradients: random shapes against fp64, invariance bit for bit, Winograd's bound, compilation, memory."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from effkern.ops import rep_conv2d, sliced_conv2d
from effkern.ops._conv_backward import conv2d_backward, reference
from effkern.ops._conv_backward.samples import magnitude
from effkern.testing import assert_within, direct_bound, layouts
from tests.ops.catalog import same_bits

EVERYTHING = [True, True, True, False]


def call(x: Tensor, weight: Tensor, stride=1, pad=0, dil=1, groups=1, algo="direct", needs=EVERYTHING) -> tuple:
    """Arguments with a random gradient at the output."""
    rows, columns = ((n + 2 * pad - dil * (k - 1) - 1) // stride + 1 for n, k in zip(x.shape[2:], weight.shape[2:]))  # noqa: B905
    gy = torch.randn(x.size(0), weight.size(0), rows, columns)
    geometry = ([stride] * 2, [pad] * 2, [dil] * 2)
    return (gy, None, x, weight, *geometry, groups, "within_group", "none", algo, needs)


def check(args: tuple) -> None:
    gy, y, x, weight, *rest = args
    exact = reference.conv2d_backward(gy.double(), y, x.double(), weight.double(), *rest)
    bounds = magnitude(*args)
    names = ("gx", "gw", "gb")
    for got, y64, size, name in zip(conv2d_backward(*args)[:3], exact, bounds, names, strict=False):
        assert_within(got, y64, direct_bound(size, y64, got.dtype), name)


@st.composite
def calls(draw):
    groups = draw(st.sampled_from([1, 1, 1, 2, 3]))
    ins, outs = draw(st.integers(1, 50)), draw(st.integers(1, 40))
    if draw(st.integers(0, 3)) == 0:
        groups, ins, outs = draw(st.integers(2, 140)), 1, 1
    kernel = draw(st.integers(1, 5)), draw(st.integers(1, 5))
    pad, dil = draw(st.integers(0, 5)), draw(st.integers(1, 3))
    least = [max(1, dil * (k - 1) + 1 - 2 * pad) for k in kernel]
    size = [n + draw(st.integers(0, 20)) for n in least]
    torch.manual_seed(draw(st.integers(0, 2**20)))
    x = torch.randn(draw(st.integers(0, 5)), ins * groups, *size)
    args = list(call(x, torch.randn(outs * groups, ins, *kernel), draw(st.integers(1, 4)), pad, dil, groups))
    for i in (0, 2, 3):
        forms = layouts(args[i])
        args[i] = forms[draw(st.sampled_from(sorted(forms)))]
    return tuple(args)


@given(calls())
def test_random_shapes_match_fp64(args):
    check(args)


@given(calls())
def test_layouts_do_not_change_a_bit(args):
    gy, y, x, weight, *rest = args
    dense = conv2d_backward(gy.contiguous(), y, x.contiguous(), weight.contiguous(), *rest)
    assert all(same_bits(a, b) for a, b in zip(conv2d_backward(*args), dense, strict=True))


SHAPES = {
    "merged taps": (9, 16, 20, 33, 3, 1, 1, 1),
    "in place": (5, 48, 17, 40, 3, 1, 1, 1),
    "tiles": (9, 512, 9, 40, 1, 1, 0, 1),
    "one block": (7, 64, 8, 130, 3, 1, 1, 1),
    "stride": (9, 32, 28, 48, 3, 2, 1, 1),
    "groups": (5, 48, 17, 64, 3, 1, 1, 4),
    "image in bands": (4, 3, 144, 48, 3, 2, 1, 1),
    "images": (40, 3, 16, 20, 5, 1, 2, 1),
    "depthwise": (9, 150, 28, 150, 3, 2, 1, 150),
}


def shaped(name: str, algo: str = "auto") -> tuple:
    n, ins, size, outs, kernel, stride, pad, groups = SHAPES[name]
    torch.manual_seed(0)
    x = torch.randn(n, ins, size, size).contiguous(memory_format=torch.channels_last)
    return call(x, torch.randn(outs, ins // groups, kernel, kernel), stride, pad, 1, groups, algo)


@pytest.mark.parametrize("name", SHAPES)
def test_values_of_larger_shapes(name):
    check(shaped(name, "direct"))


@pytest.mark.parametrize("name", SHAPES)
def test_threads_do_not_change_a_bit(name):
    args, results = shaped(name), []
    for threads in (1, 2, 3, 5):
        torch.set_num_threads(threads)
        results.append(conv2d_backward(*args))
    for other in results[1:]:
        assert all(same_bits(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("name", SHAPES)
def test_the_input_gradient_of_a_sample_does_not_depend_on_its_neighbours(name):
    gy, y, x, *rest = shaped(name)
    together = conv2d_backward(gy, y, x, *rest)[0]
    for rows in ([0], [3, 1], [*range(x.size(0)), 2]):
        assert same_bits(conv2d_backward(gy[rows], y, x[rows], *rest)[0], together[rows])


@pytest.mark.parametrize("needs", [(True, False, False), (False, True, False), (False, False, True)])
@pytest.mark.parametrize("name", SHAPES)
def test_what_else_is_wanted_does_not_change_a_bit(name, needs):
    args = shaped(name)
    whole, part = conv2d_backward(*args), conv2d_backward(*args[:-1], [*needs, False])
    for a, b, need in zip(part, whole, needs, strict=False):
        assert same_bits(a, b) if need else a.shape == (0,)


@pytest.mark.parametrize("size", [8, 14, 23])
def test_auto_keeps_the_bound_of_winograd(size):
    x, weight = torch.randn(2, 40, size, size), torch.randn(48, 40, 3, 3)
    args = call(x, weight, pad=1, algo="auto")
    exact = reference.conv2d_backward(args[0].double(), None, x.double(), weight.double(), *args[4:])[0]
    # An output's error is bounded by its whole tile of gy, which lies within 5 pixels of it.
    largest = F.max_pool2d(args[0].abs(), 11, 1, 5).double()
    tile = F.conv2d(largest, weight.abs().double().sum((2, 3)).t()[:, :, None, None])
    assert_within(conv2d_backward(*args)[0], exact, 12 * 2.0**-24 * tile)


def test_the_reference_is_the_gradient_of_convolution():
    x, w = torch.randn(2, 6, 5, 7, dtype=torch.double), torch.randn(8, 3, 3, 2, dtype=torch.double)
    x, w, b = x.requires_grad_(), w.requires_grad_(), torch.randn(8, dtype=torch.double, requires_grad=True)
    geometry = ([2, 1], [1, 2], [1, 2])
    y = F.relu(F.conv2d(x, w, b, *geometry, 2))
    gy = torch.randn_like(y)
    want = torch.autograd.grad(y, (x, w, b), gy)
    got = reference.conv2d_backward(gy, y, x, w, *geometry, 2, "within_group", "relu", "auto", [True] * 4)
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(got, want, strict=False))

    def grads(gy, x, w):
        return reference.conv2d_backward(gy, y.detach(), x, w, *geometry, 2, "within_group", "relu", "auto", [True] * 4)

    assert torch.autograd.gradcheck(grads, (gy.requires_grad_(), x, w))


def test_third_order_gradients_are_finite_and_right():
    x, w = torch.randn(1, 3, 5, 5, requires_grad=True), torch.randn(4, 3, 3, 3, requires_grad=True)

    def third(function, x, w):
        (g,) = torch.autograd.grad(function(x, w).pow(3).sum(), x, create_graph=True)
        (h,) = torch.autograd.grad(g.pow(2).sum(), w, create_graph=True)
        return torch.autograd.grad(h.pow(2).sum(), x)[0]

    got = third(lambda x, w: rep_conv2d(x, w, padding=1), x, w)
    want = third(lambda x, w: F.relu(F.conv2d(x, w, padding=1)), x.double(), w.double())
    assert (got - want).abs().max() <= 1e-4 * want.abs().max()


@pytest.mark.parametrize("act", ["none", "relu", "relu6", "silu"])
def test_a_compiled_backward_is_the_eager_one(act):
    def loss(x, w, b):
        return (rep_conv2d(x, w, b, padding=1, act=act) + sliced_conv2d(x, w, b, padding=1, act=act)).sum()

    tensors = [torch.randn(2, 4, 7, 7), torch.randn(6, 4, 3, 3), torch.randn(6)]
    results = []
    for function in (loss, torch.compile(loss, backend="aot_eager", fullgraph=True)):
        leaves = [t.clone().requires_grad_() for t in tensors]
        function(*leaves).backward()
        results.append([t.grad for t in leaves])
    torch._dynamo.reset()
    assert all(same_bits(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last])
def test_gradients_lie_like_what_they_belong_to(form):
    x = torch.randn(2, 8, 5, 5).contiguous(memory_format=form).requires_grad_()
    w = torch.randn(6, 8, 3, 3).contiguous(memory_format=form).requires_grad_()
    rep_conv2d(x, w).sum().backward()
    assert x.grad.stride() == x.stride() and w.grad.stride() == w.stride()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: torch.randn(2, 6, 4, 5)}, "gy must have the output's shape"),
        ({0: torch.randn(2, 7, 5, 5)}, "gy's channels must be in"),
        ({2: torch.randn(2, 5, 5, 5)}, "x's channels must be in"),
        ({9: "relu"}, "y must be given"),
        ({9: "silu"}, "act must be"),
        ({1: torch.randn(2, 6, 5, 4), 9: "relu"}, "y must have the output's shape"),
        ({11: [True, True, True, True]}, "must leave gz out"),
        ({11: [True, True]}, "needs must have 4 values"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    good = call(torch.randn(2, 4, 5, 5), torch.randn(6, 4, 3, 3), pad=1)
    args = [change.get(i, a) for i, a in enumerate(good)]
    for function in (conv2d_backward, conv2d_backward.fake):
        with pytest.raises(ValueError, match=message):
            function(*args)
