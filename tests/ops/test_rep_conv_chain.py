"""``rep_conv2d_chain`` beyond what every op is tested for: several maps in and out, and texts that are no steps."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

from effkern.ops import AverageStep, ConvStep, pack_conv_weight, rep_conv2d_chain, rep_conv2d_packed
from effkern.ops.rep_conv.chain import _chain_op, _reference, read_steps, write_steps


def handle(*shape, groups=1):
    return pack_conv_weight(torch.randn(shape) / 3, torch.randn(shape[0]), groups)


def network():
    """A stem, a bottleneck with a projection, a grouped block, and a branch that is read late."""
    handles = [handle(12, 3, 3, 3), handle(4, 12, 1, 1), handle(4, 4, 3, 3), handle(20, 4, 1, 1), handle(20, 12, 1, 1),
               handle(20, 5, 3, 3, groups=4)]  # fmt: skip
    steps = [
        ConvStep(0, 0, 12, (3, 3), (2, 2), (1, 1)),
        ConvStep(2, 1, 4, (1, 1), act="relu6"),
        ConvStep(3, 2, 4, (3, 3), (1, 1), (2, 2), (2, 2), act="silu"),
        ConvStep(2, 4, 20, (1, 1), act="none"),
        ConvStep(4, 3, 20, (1, 1), residual=5),
        ConvStep(6, 5, 20, (3, 3), (1, 1), (1, 1), groups=4, act="hardswish", residual=1),
        ConvStep(2, 1, 4, (1, 1), act="none"),
    ]
    return handles, steps


def one_by_one(inputs, handles, steps):
    values = list(inputs)
    for s in steps:
        residual = None if s.residual < 0 else values[s.residual]
        x = values[s.x].contiguous(memory_format=torch.channels_last)
        values.append(
            rep_conv2d_packed(
                x, handles[s.handle], s.out_channels, s.kernel_size, s.stride, s.padding, s.dilation, s.groups, s.act,
                residual,
            )
        )  # fmt: skip
    return values[len(inputs) :]


@pytest.mark.parametrize("n", [1, 3])
def test_is_the_single_calls_bit_for_bit(n):
    handles, steps = network()
    inputs = [torch.randn(n, 3, 17, 13), torch.randn(n, 20, 9, 7)]
    expected = one_by_one(inputs, handles, steps)
    for outputs in ([5], [6, 5], list(range(7)), [0, 6]):
        results = rep_conv2d_chain(inputs[0], handles, steps, outputs, inputs[1:])
        assert len(results) == len(outputs)
        for y, i in zip(results, outputs, strict=True):
            assert torch.equal(y, expected[i]) and y.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("threads", [1, 2])
def test_inverted_residuals_are_the_single_calls_bit_for_bit(threads):
    handles = [handle(24, 3, 3, 3), handle(24, 1, 3, 3, groups=24), handle(16, 24, 1, 1), handle(72, 16, 1, 1),
               handle(72, 1, 3, 3, groups=72), handle(16, 72, 1, 1), handle(20, 72, 1, 1)]  # fmt: skip
    depthwise = {"kernel_size": (3, 3), "padding": (1, 1), "act": "relu6"}
    steps = [
        ConvStep(0, 0, 24, (3, 3), (2, 2), (1, 1), act="relu6"),
        ConvStep(1, 1, 24, groups=24, **depthwise),
        ConvStep(2, 2, 16, (1, 1), act="none"),
        ConvStep(3, 3, 72, (1, 1), act="relu6"),
        ConvStep(4, 4, 72, groups=72, **depthwise),
        ConvStep(5, 5, 16, (1, 1), act="none", residual=3),
        ConvStep(6, 3, 72, (1, 1), act="relu6"),
        ConvStep(7, 4, 72, groups=72, stride=(2, 2), **depthwise),
        ConvStep(8, 6, 20, (1, 1), act="none"),
    ]
    x = torch.randn(3, 3, 150, 161)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        expected = one_by_one([x], handles, steps)
        for outputs in ([8], [8, 5], [8, 6], list(range(9))):
            for y, i in zip(rep_conv2d_chain(x, handles, steps, outputs), outputs, strict=True):
                assert torch.equal(y, expected[i])
    finally:
        torch.set_num_threads(before)


def test_results_are_not_overwritten_by_the_next_call():
    handles, steps = network()
    inputs = [torch.randn(2, 3, 17, 13), torch.randn(2, 20, 9, 7)]
    first = rep_conv2d_chain(inputs[0], handles, steps, [2, 5], inputs[1:])
    kept = [y.clone() for y in first]
    rep_conv2d_chain(inputs[0] * 2, handles, steps, [2, 5], inputs[1:])
    assert all(torch.equal(a, b) for a, b in zip(first, kept, strict=True))


def test_maps_beyond_the_kept_scratch():
    handles = [handle(4, 1, 1, 1), handle(4, 4, 1, 1)]
    steps = [ConvStep(0, 0, 4, (1, 1)), ConvStep(1, 1, 4, (1, 1)), ConvStep(2, 1, 4, (1, 1), (64, 64))]
    x = torch.randn(1, 1, 2048, 2304)  # 72 MiB a map
    y = rep_conv2d_chain(x, handles, steps)[0]
    near = [*steps[:2], steps[2]._replace(stride=(1, 1))]
    assert torch.equal(y, rep_conv2d_chain(x[:, :, ::64, ::64].contiguous(), handles, near)[0])


def test_16_bit_maps_between_are_not_rounded():
    handles, steps = network()
    inputs = [torch.randn(2, 3, 17, 13).bfloat16(), torch.randn(2, 20, 9, 7).bfloat16()]
    wide = rep_conv2d_chain(inputs[0].float(), handles, steps, [5], [inputs[1].float()])[0]
    narrow = rep_conv2d_chain(inputs[0], handles, steps, [5], inputs[1:])[0]
    assert torch.equal(narrow, wide.bfloat16())


def test_gradients_of_all_inputs_and_results():
    handles, steps = network()
    inputs = [torch.randn(2, 3, 9, 9, requires_grad=True), torch.randn(2, 20, 5, 5, requires_grad=True)]
    results = rep_conv2d_chain(inputs[0], handles, steps, [6, 5], inputs[1:])
    found = torch.autograd.grad(sum(y.square().sum() for y in results), inputs)
    expected = one_by_one(inputs, handles, steps)
    wanted = torch.autograd.grad(sum(expected[i].square().sum() for i in (6, 5)), inputs)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4)
    only = torch.autograd.grad(rep_conv2d_chain(inputs[0], handles, steps, [1], inputs[1:])[0].sum(), inputs)
    assert bool((only[1] == 0).all())


def test_steps_are_read_as_written():
    _, steps = network()
    assert read_steps(write_steps(steps)) == steps and read_steps("") == []


NO_CHAINS = (
    "1",
    "0 -1 0;",
    "0 -1 0 12 3 3 1 1 1 1 1 1 1 relu",
    "0 -1 0 12 3 3 1 1 1 1 1 1 1 gelu;",
    "a;",
    ";",
    "0 -1 0 12 3 3 1 1 1 1 1 1 1 ;",
    "9 -1 0 12 3 3 1 1 1 1 1 1 1 relu;",
    "0 -2 0 12 3 3 1 1 1 1 1 1 1 relu;",
    "0 2 0 12 3 3 1 1 1 1 1 1 1 relu;",
    "0 -1 6 12 3 3 1 1 1 1 1 1 1 relu;",
    "0 -1 -1 12 3 3 1 1 1 1 1 1 1 relu;",
    "0 -1 0 13 3 3 1 1 1 1 1 1 1 relu;",
    "0 -1 0 12 3 3 0 1 1 1 1 1 1 relu;",
    "0 -1 0 12 3 3 1 1 -1 1 1 1 1 relu;",
    "0 -1 0 12 3 3 1 1 1 1 0 1 1 relu;",
    "0 -1 0 12 3 3 1 1 1 1 1 1 3 relu;",
    "0 -1 0 12 3 3 1 1 1 1 1 1 0 relu;",
    "0 -1 0 12 1 1 1 1 1 1 1 1 1 relu;",
    "0 -1 0 12 3 3 1 1 1 1 99 1 1 relu;",
    "1 -1 0 12 3 3 1 1 1 1 1 1 1 relu;",
    "0 1 0 12 3 3 1 1 1 1 1 1 1 relu;",
    "99999999999999999999 -1 0 12 3 3 1 1 1 1 1 1 1 relu;",
    "0 -1 0 12 3 3 1 1 4611686018427387904 1 1 1 1 relu;",
    "0 -1 0 12 3 3 1 1 2147483647 2147483647 1 1 1 relu;",
)


@pytest.mark.parametrize("text", NO_CHAINS)
def test_what_is_no_chain_is_refused(text):
    handles, _ = network()
    args = (torch.randn(1, 3, 9, 9), [torch.randn(1, 20, 5, 5)], handles, text, [0])
    with pytest.raises((ValueError, TypeError)):
        _chain_op(*args)
    # The fake sees a handle's size only, which is that of 13 outputs, or of 3 groups, too; and it allocates nothing.
    if not any(part in text for part in ("0 13 3", "1 3 relu", "2147483647 2147")):
        with pytest.raises((ValueError, TypeError)):
            _chain_op.fake(*args)


@pytest.mark.parametrize("outputs", [[1], [-1], [0, 0], [2**40]])
def test_outputs_are_different_steps(outputs):
    x, h = torch.randn(1, 3, 5, 5), [handle(12, 3, 3, 3)]
    for call in (_chain_op, _chain_op.fake):
        with pytest.raises(ValueError, match="outputs"):
            call(x, [], h, "0 -1 0 12 3 3 1 1 1 1 1 1 1 relu;", outputs)


def test_a_corrupt_handle_is_refused():
    x, h = torch.randn(1, 3, 5, 5), handle(12, 3, 3, 3)
    h[20] ^= 1
    with pytest.raises(ValueError, match="checksum"):
        rep_conv2d_chain(x, [h], [ConvStep(0, 0, 12, (3, 3))])


def test_no_steps_and_no_outputs():
    assert rep_conv2d_chain(torch.randn(1, 3, 5, 5), [], [], []) == []
    with pytest.raises(ValueError, match="outputs"):
        rep_conv2d_chain(torch.randn(1, 3, 5, 5), [], [])


def test_dtypes_do_not_mix():
    handles, steps = network()
    with pytest.raises(TypeError, match="others"):
        rep_conv2d_chain(torch.randn(1, 3, 17, 13), handles, steps, [5], [torch.randn(1, 20, 9, 7).half()])


def test_the_reference_agrees():
    handles, steps = network()
    inputs = [torch.randn(2, 3, 17, 13), torch.randn(2, 20, 9, 7)]
    results = rep_conv2d_chain(inputs[0], handles, steps, list(range(7)), inputs[1:])
    expected = _reference(inputs[0].double(), [inputs[1].double()], handles, write_steps(steps), list(range(7)))
    for y, exact in zip(results, expected, strict=True):
        torch.testing.assert_close(y.double(), exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("n, side", [(1, 40), (3, 9)])
def test_separable_blocks_in_one_pass_have_the_same_bits(n, side):
    """Inverted residuals: the depthwise and the last pointwise convolution of each are a pair."""
    handles = [handle(60, 10, 1, 1), handle(60, 1, 3, 3, groups=60), handle(10, 60, 1, 1), handle(24, 60, 1, 1)]
    steps = [
        ConvStep(0, 0, 60, (1, 1), act="relu6"),
        ConvStep(1, 1, 60, (3, 3), (1, 1), (1, 1), groups=60, act="relu6"),
        ConvStep(2, 2, 10, (1, 1), act="none", residual=0),
        ConvStep(3, 0, 60, (1, 1), act="relu6"),
        ConvStep(4, 1, 60, (3, 3), (2, 2), (1, 1), groups=60, act="relu6"),
        ConvStep(5, 3, 24, (1, 1), act="none"),
    ]
    for layout in (torch.contiguous_format, torch.channels_last):
        x = torch.randn(n, 10, side, side).contiguous(memory_format=layout)
        expected = one_by_one([x], handles, steps)
        for outputs in ([5], [2, 5], [1, 4, 5]):
            for y, i in zip(rep_conv2d_chain(x, handles, steps, outputs), outputs, strict=True):
                assert torch.equal(y, expected[i]), (outputs, i)


def test_a_batch_beyond_the_kept_scratch_goes_in_groups():
    handles = [handle(4, 1, 1, 1), handle(4, 4, 1, 1)]
    steps = [
        ConvStep(0, 0, 4, (1, 1)),
        ConvStep(2, 1, 4, (1, 1), residual=1),
        ConvStep(3, 1, 4, (1, 1), (64, 64)),
    ]  # 25 MiB of maps a sample: groups of two
    x, other = torch.randn(5, 1, 1024, 768), torch.randn(1, 4, 1024, 768).expand(5, -1, -1, -1)
    y = rep_conv2d_chain(x, handles, steps, others=[other])[0]
    alone = [rep_conv2d_chain(x[i : i + 1], handles, steps, others=[other[:1]])[0] for i in range(5)]
    assert torch.equal(y, torch.cat(alone))


def shortcuts():
    """A pooled shortcut with zero channels behind it and a mean of the map, as in CIFAR's ResNets."""
    handles = [handle(16, 3, 3, 3), handle(32, 16, 3, 3), handle(10, 32, 1, 1)]
    steps = [
        ConvStep(0, 0, 16, (3, 3), padding=(1, 1)),
        AverageStep(1, 32, (2, 2), (2, 2), ceil_mode=True),
        ConvStep(1, 1, 32, (3, 3), (2, 2), (1, 1), residual=2),
        AverageStep(3, 32),
        ConvStep(4, 2, 10, (1, 1), act="none"),
    ]
    return handles, steps


@pytest.mark.parametrize("size", [(16, 16), (9, 13), (2, 3), (1, 4), (1, 1)])
def test_averages_between_convolutions(size):
    handles, steps = shortcuts()
    x = torch.randn(5, 3, *size)
    first, pooled, second, mean, _ = rep_conv2d_chain(x, handles, steps, range(5))
    expected = F.avg_pool2d(first.double(), 2, ceil_mode=True)
    assert pooled.shape[2:] == expected.shape[2:] and not pooled[:, 16:].any()
    assert (pooled[:, :16] - expected).abs().max() <= 4e-7 * first.abs().max()
    exact = second.double().mean((2, 3), keepdim=True)
    assert (mean - exact).abs().max() <= 1e-6 * second.abs().max()
    alone = torch.cat([rep_conv2d_chain(x[i : i + 1], handles, steps)[0] for i in range(5)])
    assert torch.equal(alone, rep_conv2d_chain(x, handles, steps)[0])


@pytest.mark.parametrize("up", [False, True])
def test_as_many_windows_are_averaged_as_by_torch(up):
    for size, kernel, stride in itertools.product(range(1, 8), range(1, 6), range(1, 5)):
        x, step = torch.randn(1, 2, size, 7), AverageStep(0, 2, (kernel, 1), (stride, 1), ceil_mode=up)
        try:
            expected = F.avg_pool2d(x, (kernel, 1), (stride, 1), ceil_mode=up)
        except RuntimeError:
            with pytest.raises(ValueError, match="smaller than its kernel"):
                rep_conv2d_chain(x, [], [step])
            continue
        for form in (x, x.to("meta")):
            assert rep_conv2d_chain(form, [], [step])[0].shape == expected.shape, (size, kernel, stride)
        torch.testing.assert_close(rep_conv2d_chain(x, [], [step])[0], expected)


def test_threads_do_not_change_the_bits_of_a_chain():
    handles, steps = shortcuts()
    x = torch.randn(3, 3, 48, 48)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            results.append(rep_conv2d_chain(x, handles, steps, range(5)))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize(
    "step, message",
    [
        (AverageStep(0, 2), "as many channels as its input, 3"),
        (AverageStep(0, 3, (5, 1)), "smaller than its kernel"),
        (AverageStep(0, 3, (0, 1)), "must be positive, or 0x0"),
        (AverageStep(0, 3, (1, 1), (0, 1)), "stride"),
        (AverageStep(1, 3), "values below 1"),
        ("0 -1 -1 3 1 1 1 1 1 0 1 1 1 mean;", "no padding"),
        ("0 0 -1 3 1 1 1 1 0 0 1 1 1 mean;", "residual and handle -1"),
    ],
)
def test_averages_that_are_refused(step, message):
    text = step if isinstance(step, str) else write_steps([step])
    for x in (torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4, device="meta")):
        with pytest.raises(ValueError, match=message):
            _chain_op(x, [], [], text, [0])
