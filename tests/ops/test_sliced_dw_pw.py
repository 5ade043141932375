"""`sliced_dw_pw`: the bits of two convolutions, the gradient of two convolutions, refusals in its own name."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from effkern import ops
from effkern.ops._checks import ACTIVATIONS
from effkern.ops.sliced_conv import reference
from effkern.testing import assert_within, layouts

CHANNELS_LAST = torch.channels_last


def pair(mid=24, outs=40, kernel=3):
    torch.manual_seed(0)
    filters, mix = torch.randn(mid, 1, kernel, kernel), torch.randn(outs, mid, 1, 1)
    return filters, torch.randn(mid), mix, torch.randn(outs)


def one_after_the_other(x, filters, filter_bias, mix, mix_bias, c_out, stride, padding, dw_act, act, residual=None):
    """The same by the packed ops; the residual as `rep_conv2d` adds it, which knows no widths."""
    maps = ops.sliced_conv2d(
        x, filters, filter_bias, x.size(1), stride, padding, groups=filters.size(0), act=dw_act
    )  # fmt: skip
    if residual is None:
        return ops.sliced_conv2d(maps, mix, mix_bias, c_out, act=act)
    narrow = mix[:c_out, : x.size(1)].contiguous()
    return ops.rep_conv2d(maps, narrow, mix_bias[:c_out], act=act, residual=residual)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("batch, side, stride", [(1, 56, 1), (1, 57, 2), (2, 14, 1), (3, 7, 1), (1, 7, 2)])
def test_it_gives_the_bits_of_two_ops(batch, side, stride, threads, dtype):
    filters, filter_bias, mix, mix_bias = (t.to(dtype) for t in pair())
    torch.set_num_threads(threads)
    for c_mid, c_out in ((24, 40), (13, 40), (24, 7)):
        x = torch.randn(batch, c_mid, side, side).to(dtype)
        out = (side - 1) // stride + 1
        for residual in (None, torch.randn(batch, c_out, out, out).to(dtype)):
            for name, form in layouts(x).items():
                options = (c_out, stride, 1)
                y = ops.sliced_dw_pw(
                    form, filters, filter_bias, mix, mix_bias, *options, dw_act="relu6", act="silu", residual=residual
                )
                expected = one_after_the_other(
                    form, filters, filter_bias, mix, mix_bias, *options, "relu6", "silu", residual
                )
                assert torch.equal(y, expected), (name, c_mid, c_out, residual is None)
                assert y.stride() == expected.stride()


@torch.no_grad()
@given(data=st.data())
def test_any_shape_is_within_the_bound(data):
    def integer(least, most):
        return data.draw(st.integers(least, most))

    kernel, stride, dilation = integer(1, 5), integer(1, 3), integer(1, 2)
    reach = dilation * (kernel - 1) + 1
    padding = integer(0, 3)
    height, width = (integer(max(1, reach - 2 * padding), 20) for _ in range(2))
    batch, mid, outs = integer(0, 3), integer(1, 40), integer(1, 40)
    filters, filter_bias, mix, mix_bias = pair(mid, outs, kernel)
    c_mid, c_out = integer(0, mid), integer(0, outs)
    dw_act, act = (data.draw(st.sampled_from(ACTIVATIONS)) for _ in range(2))
    x = torch.randn(batch, c_mid, height, width)
    if data.draw(st.booleans()):
        x = x.contiguous(memory_format=CHANNELS_LAST)
    y = ops.sliced_dw_pw(
        x, filters, filter_bias, mix, mix_bias, c_out, stride, padding, dilation, dw_act=dw_act, act=act
    )
    args = [x, filters, filter_bias, mix, mix_bias, c_out, [stride] * 2, [padding] * 2, [dilation] * 2, None, None]
    double = [t.double() if isinstance(t, torch.Tensor) else t for t in args]
    exact = reference.sliced_dw_pw(*double, dw_act, None, None, None, act, "auto")
    size = [t.abs() if isinstance(t, torch.Tensor) else t for t in double]
    magnitude = reference.sliced_dw_pw(*size, "none", None, None, None, "none", "auto")
    assert_within(y, exact, 2.5 * 16 * 2.0**-24 * magnitude)


def test_gradients_are_those_of_two_convolutions():
    filters, filter_bias, mix, mix_bias = pair(8, 6)
    x, residual = torch.randn(2, 8, 7, 7), torch.randn(2, 6, 7, 7)
    leaves = [t.double().requires_grad_() for t in (x, filters, filter_bias, mix, mix_bias, residual)]
    inputs = [t.detach().float().requires_grad_() for t in leaves]

    def plain(x, filters, filter_bias, mix, mix_bias, residual):
        maps = F.relu(F.conv2d(x, filters, filter_bias, 1, 1, 1, 8))
        return F.relu(F.conv2d(maps, mix, mix_bias) + residual)

    x, *weights, residual = inputs
    y = ops.sliced_dw_pw(x, *weights, padding=1, dw_act="relu", act="relu", residual=residual)
    torch.testing.assert_close(y.double(), plain(*leaves), rtol=1e-5, atol=1e-5)
    got = torch.autograd.grad(y.square().sum(), inputs, create_graph=True)
    want = torch.autograd.grad(plain(*leaves).square().sum(), leaves, create_graph=True)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-4)
    (twice,) = torch.autograd.grad(got[1].square().sum(), inputs[:1])
    (exact,) = torch.autograd.grad(want[1].square().sum(), leaves[:1])
    torch.testing.assert_close(twice.double(), exact, rtol=1e-3, atol=1e-2)


def test_the_operators_themselves_have_no_gradient_and_say_so():
    filters, filter_bias, mix, mix_bias = pair()
    handles = (ops.pack_conv_weight(filters, filter_bias, 24), ops.pack_conv_weight(mix, mix_bias))
    y = ops.sliced_dw_pw_packed(torch.randn(1, 24, 5, 5, requires_grad=True), *handles, 24, 3, 40, padding=1)
    with pytest.raises(RuntimeError, match=r"train with effkern\.ops\.sliced_dw_pw"):
        y.sum().backward()


@torch.no_grad()
def test_packs_follow_a_change_of_either_weight():
    filters, filter_bias, mix, mix_bias = pair()
    x = torch.randn(1, 24, 6, 6).contiguous(memory_format=CHANNELS_LAST)
    for change in (lambda: None, lambda: filters.mul_(2), lambda: mix.neg_(), lambda: mix_bias.add_(1)):
        change()
        expected = F.conv2d(F.conv2d(x, filters, filter_bias, 1, 1, 1, 24), mix, mix_bias)
        torch.testing.assert_close(
            ops.sliced_dw_pw(x, filters, filter_bias, mix, mix_bias, padding=1), expected, rtol=1e-4, atol=1e-3
        )


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize(
    "change, error, match",
    [
        ({"dw_weight": torch.randn(24, 2, 3, 3)}, ValueError, "dw_weight must be depthwise"),
        ({"pw_weight": torch.randn(40, 24, 3, 3)}, ValueError, "pw_weight must have a 1x1 kernel"),
        ({"pw_weight": torch.randn(40, 23, 1, 1)}, ValueError, r"x's channels must be in \[0, 23\], got 24"),
        ({"x": torch.randn(1, 25, 6, 6)}, ValueError, r"x's channels must be in \[0, 24\], got 25"),
        ({"c_out": 41}, ValueError, r"c_out must be in \[0, 40\], got 41"),
        ({"residual": torch.randn(1, 40, 5, 6)}, ValueError, "residual must have the output's shape"),
        ({"residual": torch.randn(1, 40, 6, 6).double()}, TypeError, "residual must"),
        ({"dw_act": "tanh"}, ValueError, "act"),
        ({"dw_scale": torch.full((24,), float("nan"))}, ValueError, "scale must be finite"),
        ({"dw_shift": torch.ones(23)}, ValueError, "dw_shift must be 1-d with at least 24"),
        ({"scale": torch.ones(39)}, ValueError, "scale must be 1-d with at least 40"),
    ],
)
def test_bad_arguments_are_named(change, error, match, grad):
    filters, filter_bias, mix, mix_bias = pair()
    arguments = {"x": torch.randn(1, 24, 6, 6), "dw_weight": filters, "dw_bias": filter_bias, "pw_weight": mix,
                 "pw_bias": mix_bias, "padding": 1, **change}  # fmt: skip
    arguments["pw_bias"] = arguments["pw_bias"].requires_grad_(grad)
    with pytest.raises(error, match=match):
        ops.sliced_dw_pw(**arguments)
