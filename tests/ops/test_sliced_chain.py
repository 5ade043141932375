"""``sliced_chain`` beyond what every op is tested for: the bits of single calls, large maps, refusals."""

from __future__ import annotations

import pytest
import torch

from effkern.ops import MeanStep, SlicedStep, pack_conv_weight, sliced_chain, sliced_conv2d_packed
from effkern.ops.sliced_conv.chain import _chain
from effkern.ops.sliced_conv.samples import samples
from effkern.ops.sliced_conv.steps import read_steps, write_steps

WIDTHS = ((8, 12, 16), (16, 40, 64), (24, 24, 48))


def network(mean=False):
    """A stem, a depthwise and a pointwise step, a 3x3 step that Winograd may do, a classifier."""
    shapes = [(16, 3, 3, 3), (16, 1, 3, 3), (64, 16, 1, 1), (48, 64, 3, 3), (10, 48, 1, 1)]
    groups = [1, 16, 1, 1, 1]
    handles = [
        pack_conv_weight(torch.randn(s) / (s[1] * s[2] * s[3]) ** 0.5, torch.randn(s[0]), g)
        for s, g in zip(shapes, groups, strict=True)
    ]
    tables = [torch.rand(3, 64) + 0.5, torch.randn(3, 64)]
    steps = [
        SlicedStep(0, shapes[0], WIDTHS[0], -1, (2, 2), (1, 1), act="silu"),
        SlicedStep(1, shapes[1], WIDTHS[0], -1, (1, 1), (1, 1), groups=16, act="relu6"),
        SlicedStep(2, shapes[2], WIDTHS[1], 0, act="relu"),
        SlicedStep(3, shapes[3], WIDTHS[2], -1, (1, 1), (1, 1)),
        *([MeanStep()] if mean else []),
        SlicedStep(4, shapes[4], (10, 10, 10)),
    ]
    return handles, tables, steps


def one_by_one(x, handles, tables, steps, i):
    x = x.contiguous(memory_format=torch.channels_last)
    for s in steps:
        scale, shift = (t[i] for t in tables) if s.table >= 0 else (None, None)
        x = sliced_conv2d_packed(
            x, handles[s.handle], s.weight_shape[0], s.weight_shape[2:], s.widths[i], s.stride, s.padding, s.dilation,
            s.groups, "prefix_groups", scale, shift, s.act,
        )  # fmt: skip
    return x


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("size", [15, 97])  # maps of up to 16 and 600 KiB
@pytest.mark.parametrize("index", [[2], [1, 1, 1, 1, 1, 1, 1], [2, 0, 1, 2, 2, 1]])
def test_is_the_single_calls_bit_for_bit(size, index, threads):
    torch.set_num_threads(threads)
    handles, tables, steps = network()
    x = torch.randn(len(index), 3, size, size)
    y = sliced_chain(x, handles, tables, torch.tensor(index), steps)
    for n, i in enumerate(index):
        assert torch.equal(y[n : n + 1], one_by_one(x[n : n + 1], handles, tables, steps, i)), n


def test_a_last_step_behind_a_large_map():
    handles, tables, steps = network()
    x, index = torch.randn(3, 3, 161, 150), torch.tensor([2, 0, 2])
    y = sliced_chain(x, handles, tables, index, steps[:3])
    assert y.shape == (3, 64, 81, 75) and bool((y[1, 16:] == 0).all())
    for n, i in enumerate(index.tolist()):
        expected = one_by_one(x[n : n + 1], handles, tables, steps[:3], i)
        assert torch.equal(y[n : n + 1, : WIDTHS[1][i]], expected), n


def test_what_is_past_a_width_is_zero_and_never_read():
    handles, tables, steps = network(mean=True)
    handles[2] = pack_conv_weight(torch.full((64, 16, 1, 1), 0.1).index_fill(1, torch.arange(8, 16), float("nan")))
    y = sliced_chain(torch.randn(4, 3, 9, 9), handles, tables, torch.tensor([0, 0, 0, 0]), steps)
    assert bool(y.isfinite().all())


def test_steps_are_read_as_written():
    _, _, steps = network(mean=True)
    assert read_steps(write_steps(steps)) == (3, steps)
    with pytest.raises(ValueError, match="3 widths"):
        write_steps([*steps, steps[0]._replace(widths=(1,))])


def changed(at, value):
    """The sample's numbers with one of them another one."""
    numbers = list(next(s for s in samples() if s.name == "chain").args[-1])
    numbers[at] = value
    return numbers


@pytest.mark.parametrize(
    "at, value",
    [
        (0, 0), (0, 2), (0, 2**40), (1, 1), (1, 3), (1, -1), (2, 8), (2, -1), (3, 3), (3, -2), (4, 19), (5, 4), (6, 2),
        (7, 2**33), (8, 0), (9, 2**31), (10, -1), (12, 0), (14, 0), (14, 3), (15, 5), (15, -1), (16, 0), (16, 21),
        (17, -5), (33, 21),
    ],
)  # fmt: skip
def test_what_is_no_chain_is_refused(at, value):
    sample = next(s for s in samples() if s.name == "chain")
    args = (*sample.args[:-1], changed(at, value))
    for call in (_chain, _chain.fake):
        with pytest.raises((ValueError, TypeError)):
            call(*args)


def test_ends_that_are_no_convolutions_are_refused():
    handles, tables, steps = network()
    x, index = torch.randn(1, 3, 9, 9), torch.tensor([0])
    for wrong in ([], [MeanStep(), *steps], [*steps, MeanStep()]):
        with pytest.raises(ValueError, match="convolution"):
            sliced_chain(x, handles, tables, index, wrong)
    with pytest.raises(ValueError, match="end in the middle"):
        _chain(x, handles, tables, index, write_steps(steps)[:-1])


def test_widths_and_tables_that_do_not_fit_are_refused():
    handles, tables, steps = network()
    x = torch.randn(2, 3, 9, 9)
    with pytest.raises(ValueError, match=r"width_idx\[1\]"):
        sliced_chain(x, handles, tables, torch.tensor([0, 3]), steps)
    for wrong in ([tables[0]], [t[:2] for t in tables], [t[:, :63] for t in tables], [tables[0] / 0, tables[1]]):
        with pytest.raises(ValueError, match="tables"):
            sliced_chain(x, handles, wrong, torch.tensor([0, 1]), steps)
    with pytest.raises(ValueError):
        sliced_chain(x[:, :2], handles, tables, torch.tensor([0, 1]), [steps[1]])


def test_a_corrupt_handle_is_refused():
    handles, tables, steps = network()
    handles[3][20] ^= 1
    with pytest.raises(ValueError, match="checksum"):
        sliced_chain(torch.randn(1, 3, 9, 9), handles, tables, torch.tensor([0]), steps)


def test_it_has_no_gradient():
    handles, tables, steps = network()
    x = torch.randn(1, 3, 9, 9, requires_grad=True)
    with pytest.raises(RuntimeError, match="no gradient"):
        sliced_chain(x, handles, tables, torch.tensor([0]), steps).sum().backward()
