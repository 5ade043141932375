"""The gradient of the ragged convolution, by width class in C++: against fp64, finite differences and itself."""

import pytest
import torch

from effkern.ops.sliced_conv import reference
from effkern.ops.sliced_conv.ragged_backward import ragged_backward, reference_backward
from effkern.testing import assert_within, direct_bound, to_double

NAN = float("nan")
# Weight, groups, group mode, stride, padding, dilation, widths of the samples.
CASES = {
    "pointwise": ((24, 20, 1, 1), 1, "prefix_groups", 1, 0, 1, [(20, 24), (5, 7), (0, 9), (20, 24), (8, 0), (5, 7)]),
    "3x3": ((40, 19, 3, 3), 1, "prefix_groups", 1, 1, 1, [(19, 40), (3, 17), (19, 8), (3, 17), (16, 40), (1, 1)]),
    "stride_2": ((18, 6, 3, 3), 1, "prefix_groups", 2, 1, 1, [(6, 18), (4, 5), (6, 5), (4, 5), (0, 0), (6, 18)]),
    "dilated": ((9, 17, 3, 3), 1, "prefix_groups", 1, 2, 2, [(17, 9), (16, 1), (2, 9), (17, 9), (17, 9), (2, 9)]),
    "depthwise": ((70, 1, 3, 3), 70, "prefix_groups", 2, 1, 1, [(70, 70), (64, 64), (9, 9), (0, 0), (65, 65), (9, 9)]),
    "prefix_groups": ((18, 4, 3, 3), 3, "prefix_groups", 1, 1, 1, [(12, 18), (4, 6), (8, 12), (4, 6), (0, 0), (8, 12)]),
    "within_group": ((18, 4, 3, 3), 3, "within_group", 1, 1, 1, [(12, 18), (3, 9), (12, 3), (0, 9), (3, 0), (6, 6)]),
}  # fmt: skip
RESULTS = ("x", "weight", "bias", "scale_table", "shift_table")


def arguments(name, act="none", dtype=torch.float32, layout=torch.channels_last, algo="direct"):
    """Those of the op for a case, with tables of three widths and a wider x and y than anything runs."""
    shape, groups, mode, stride, padding, dilation, pairs = CASES[name]
    generator = torch.Generator().manual_seed(0)

    def normal(*size):
        return torch.randn(size, generator=generator).to(dtype)

    c_in, c_out = (torch.tensor(w) for w in zip(*pairs, strict=True))
    geometry = ([stride] * 2, [padding] * 2, [dilation] * 2, groups, mode)
    x = normal(len(pairs), shape[1] * groups + 3, 9, 8).contiguous(memory_format=layout)
    weight, bias = normal(*shape), normal(shape[0])
    tables = (normal(3, shape[0]), normal(3, shape[0]), torch.tensor([2, 0, 1, 2, 0, 0]))
    y = reference.sliced_conv2d_ragged(
        *to_double((x, weight, bias)), c_in, c_out, shape[0], *geometry, *to_double(tables), act, algo, True
    ).to(dtype)  # fmt: skip
    y = y.contiguous(memory_format=layout)
    grad = normal(*y.shape).contiguous(memory_format=layout)
    return (grad, y, x, weight, bias, c_in, c_out, *geometry, *tables, act, algo, [True] * 5)


def magnitude(args):
    """A of the bound of every result: the reference over absolute values."""
    positive = [t.double().abs() if isinstance(t, torch.Tensor) and t.is_floating_point() else t for t in args]
    positive[15] = "none"
    return reference_backward(*positive)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "channels_last"])
@pytest.mark.parametrize("act", ["none", "relu", "relu6", "hardswish", "silu"])
@pytest.mark.parametrize("name", CASES)
def test_is_the_gradient(name, act, layout):
    """Curves ask for the slope at a value that is itself a sum: its error, of slope 1/2 at most, counts too."""
    args = arguments(name, act, layout=layout)
    exact = reference_backward(*to_double(args))
    values = [t.abs() if isinstance(t, torch.Tensor) and t.is_floating_point() else t for t in to_double(args[2:15])]
    of_value = float(
        reference.sliced_conv2d_ragged(*values[:5], args[0].size(1), *values[5:], "none", "direct", True).max()
    )
    factor = 1 + of_value / 2 if act in ("hardswish", "silu") else 1
    for result, y, y64, size in zip(RESULTS, ragged_backward(*args), exact, magnitude(args), strict=True):
        bound = factor * direct_bound(size, y64, y.dtype)
        assert_within(y, y64, bound, f"{name} {act} {result}")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_sixteen_bits_are_summed_in_fp32_and_rounded_once(name, dtype):
    args = arguments(name, "relu", dtype)
    exact = reference_backward(*to_double(args))
    for result, y, y64, size in zip(RESULTS, ragged_backward(*args), exact, magnitude(args), strict=True):
        assert y.dtype == dtype
        assert_within(y, y64, direct_bound(size, y64, dtype), f"{name} {result}")


@pytest.mark.parametrize("algo", ["auto", "direct"])
@pytest.mark.parametrize("name", CASES)
def test_agrees_with_finite_differences(name, algo):
    """Of the fp64 reference, along a random direction of each input."""
    args = arguments(name, "silu", algo=algo)
    grad, _, *inputs, act, _, _ = to_double(args)
    c_out_max = grad.size(1)

    def loss(step, at, direction):
        moved = list(inputs)
        moved[at] = moved[at] + step * direction
        y = reference.sliced_conv2d_ragged(*moved[:5], c_out_max, *moved[5:], act, "direct", True)
        return float((y * grad).sum())

    for result, at, gradient in zip(RESULTS, (0, 1, 2, 10, 11), ragged_backward(*args), strict=True):
        direction = torch.randn(inputs[at].shape, generator=torch.Generator().manual_seed(1)).double()
        slope = (loss(1e-5, at, direction) - loss(-1e-5, at, direction)) / 2e-5
        parts = gradient.double() * direction
        assert abs(float(parts.sum()) - slope) <= 1e-5 * float(parts.abs().sum()), result


@pytest.mark.parametrize("act", ["none", "relu", "silu"])
@pytest.mark.parametrize("name", CASES)
def test_nothing_past_a_width_is_read_or_has_a_gradient(name, act):
    args = list(arguments(name, act))
    expected = ragged_backward(*args)
    c_in, c_out = args[5:7]
    for at, widths in ((0, c_out), (1, c_out), (2, c_in)):
        args[at] = args[at].clone()
        for n, width in enumerate(widths.tolist()):
            args[at][n, width:] = NAN
    got = ragged_backward(*args)
    assert all(map(torch.equal, got, expected))
    gx, gw = got[:2]
    for n, (ins, outs) in enumerate(zip(c_in.tolist(), c_out.tolist(), strict=True)):
        assert not gx[n, ins if outs else 0 :].any() and (act == "relu" or bool(gx[n, :ins].any()) == (ins * outs > 0))
    ran = torch.zeros_like(gw)
    groups, mode = args[10:12]
    for ins, outs in zip(c_in.tolist(), c_out.tolist(), strict=True):
        rows = ran[:outs] if mode == "prefix_groups" else ran.unflatten(0, (groups, -1))[:, : outs // groups]
        (rows[:, :ins] if groups == 1 else rows if mode == "prefix_groups" else rows[:, :, : ins // groups]).fill_(1)
    assert not gw[ran == 0].any()
    if act == "none":  # relu may clip all of a channel
        assert (gw.abs().sum((2, 3)) > 0)[ran.sum((2, 3)) > 0].all()


@pytest.mark.parametrize("name", CASES)
def test_is_the_same_bits_on_any_number_of_threads_and_of_a_sample_alone(name):
    args = arguments(name, "silu")
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(ragged_backward(*args))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(map(torch.equal, other, results[0]))
    for n in range(len(args[0])):
        alone = [t[n : n + 1] if i in (0, 1, 2, 5, 6, 14) else t for i, t in enumerate(args)]
        assert torch.equal(ragged_backward(*alone)[0], results[0][0][n : n + 1])


def test_no_samples_and_no_channels():
    args = list(arguments("3x3", "silu"))
    nothing = [t[:0] if i in (0, 1, 2, 5, 6, 14) else t for i, t in enumerate(args)]
    args[5] = args[6] = torch.zeros(6, dtype=torch.int32)
    for call in (nothing, args):
        grads = ragged_backward(*call)
        assert [g.shape for g in grads] == [call[i].shape for i in (2, 3, 4, 12, 13)]
        assert not any(g.any() for g in grads)


def test_only_what_is_needed_is_given():
    args = arguments("3x3", "relu")
    every = ragged_backward(*args)
    for at in range(5):
        needs = [i == at for i in range(5)]
        grads = ragged_backward(*args[:-1], needs)
        assert torch.equal(grads[at], every[at]) and all(g.numel() == 0 for i, g in enumerate(grads) if i != at)
    plain = ragged_backward(*args[:4], None, *args[5:12], None, None, None, "none", "direct", [True] * 5)
    assert [g.numel() > 0 for g in plain] == [True, True, False, False, False]


@pytest.mark.parametrize(
    ("at", "value", "match"),
    [
        (0, torch.zeros(6, 40, 9, 7), "grad must have shape"),
        (1, torch.zeros(6, 39, 9, 8), "y must have grad's shape"),
        (5, torch.tensor([19, 19, 19, 19, 19, 20]), r"c_in\[5\] must be in \[0, 19\], got 20"),
        (6, torch.tensor([40, 40, -1, 40, 40, 40]), r"c_out\[2\] must be in \[0, 40\], got -1"),
        (4, torch.zeros(39), "bias must have shape"),
        (14, torch.tensor([0, 0, 0, 3, 0, 0]), r"width_idx\[3\] must be in \[0, 2\], got 3"),
        (17, [True] * 4, "needs must have 5 values, got 4"),
    ],
)
def test_the_operator_refuses_what_does_not_fit(at, value, match):
    """Not the formula, which gives what the forward took: anybody may call the operator."""
    args = list(arguments("3x3"))
    args[at] = value
    if ragged_backward.backends["cpu"] != "native":
        pytest.skip("the reference trusts its caller")
    with pytest.raises(ValueError, match=match):
        ragged_backward(*args)
