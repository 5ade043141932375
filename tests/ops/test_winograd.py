"""Winograd through the ops: the error bound of every tile on data made to hurt, and what direct promises instead."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from effkern.ops import rep_conv2d
from effkern.testing import UNIT, assert_within, direct_bound, layouts, winograd_excess

U = UNIT[torch.float32]
#: Channels in and out, height, width, stride, padding: forms of tile 4, 2 and 3, cut tiles, wide padding.
SHAPES = [
    (16, 16, 32, 32, 1, (1, 1)),
    (64, 40, 13, 29, 1, (1, 1)),
    (24, 8, 5, 6, 1, (2, 0)),
    (256, 24, 7, 7, 1, (1, 1)),
    (48, 33, 2, 2, 1, (1, 1)),
    (32, 32, 4, 4, 1, (4, 3)),
    (40, 24, 28, 27, 2, (1, 1)),
    (24, 17, 9, 14, 2, (0, 3)),
]


def normal(x):
    return x


def after_relu(x):
    return x.relu()


def on_an_offset(x):
    return x + 100


def with_spikes(x):
    return torch.where(torch.rand_like(x) < 0.01, x * 1e4, x)


def of_all_sizes(x):
    return x * torch.logspace(-12, 12, x.size(1)).view(1, -1, 1, 1)


def pixels_of_all_sizes(x):
    return x * 10 ** torch.empty(1, 1, *x.shape[2:]).uniform_(-10, 10)


def alternating(x):
    rows, columns = torch.meshgrid(torch.arange(x.size(2)), torch.arange(x.size(3)), indexing="ij")
    return x.abs() * (1 - 2.0 * ((rows + columns) % 2))


def tiny(x):
    return x * 1e-40  # denormal, and so are their products


#: The bounds are for terms of like size. Where one large term comes early every later sum is rounded at its size: torch
#: reaches 20 u, a sum in order over 2304 terms 34 u, F(4,3) 16 u of its T.
SPREAD = {with_spikes: 3, pixels_of_all_sizes: 2, of_all_sizes: 2}
DATA = [normal, after_relu, on_an_offset, with_spikes, of_all_sizes, pixels_of_all_sizes, alternating, tiny]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("data", DATA, ids=lambda f: f.__name__)
def test_every_output_is_within_the_bound_of_its_tile(shape, data):
    ins, outs, rows, columns, stride, padding = shape
    x, weight = data(torch.randn(2, ins, rows, columns)), torch.randn(outs, ins, 3, 3)
    geometry = ((stride, stride), padding, (1, 1))
    exact = F.conv2d(x.double(), weight.double(), None, *geometry)
    direct = F.conv2d(x.double().abs(), weight.double().abs(), None, *geometry)
    denormal = 9 * ins * 2.0**-149  # what products and sums of denormal numbers lose besides
    for algo in ("auto", "direct"):
        size = direct + winograd_excess(x, weight, *geometry, 1, algo)
        y = rep_conv2d(x, weight, None, *geometry, act="none", algo=algo)
        bound = SPREAD.get(data, 1) * direct_bound(size, exact, y.dtype) + denormal
        assert_within(y, exact, bound, f"{algo} {data.__name__}")


@pytest.mark.parametrize("shape", SHAPES[:1] + SHAPES[-2:-1], ids=str)
def test_the_shapes_above_are_winograd(shape):
    """Otherwise they would test nothing: other bits than direct, and noise where direct has exact zeros."""
    ins, outs, rows, columns, stride, padding = shape
    x, weight = torch.randn(1, ins, rows, columns), torch.randn(outs, ins, 3, 3)
    x[:, :, : rows // 2] = 0
    auto, direct = (rep_conv2d(x, weight, None, stride, padding, act="none", algo=a) for a in ("auto", "direct"))
    assert not torch.equal(auto, direct)
    silent = slice(0, (rows // 2 - 3 + padding[0]) // stride)
    assert not direct[:, :, silent].any()


def test_the_bound_is_one_of_tiles():
    """A row of outputs without inputs has A = 0, and a bound all the same; far from the data it is 0 again."""
    x, weight = torch.zeros(1, 8, 16, 16), torch.ones(8, 8, 3, 3)
    x[:, :, 8] = 1
    excess = winograd_excess(x, weight, (1, 1), (1, 1), (1, 1), 1, "auto")
    rows = excess.amax((0, 1, 3)) > 0
    assert rows.tolist() == [4 <= row <= 11 for row in range(16)]
    for other in ({"dilation": (2, 2)}, {"algo": "direct"}, {"stride": (1, 2)}):
        call = {"stride": (1, 1), "padding": (1, 1), "dilation": (1, 1), "groups": 1, "algo": "auto"} | other
        assert winograd_excess(x, weight, **call) == 0.0


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_stays_where_it_is_in_direct_and_in_its_tiles_otherwise(stride, bad):
    x, weight = torch.randn(2, 16, 24, 24), torch.randn(16, 16, 3, 3)
    x[0, 3, 11, 13] = bad
    options = {"stride": stride, "padding": 1, "act": "none"}
    direct = rep_conv2d(x, weight, algo="direct", **options)
    reached = F.conv2d((~x.isfinite()).double(), torch.ones(1, 16, 3, 3).double(), stride=stride, padding=1)[:, 0] > 0
    assert torch.equal(~direct.isfinite(), reached[:, None].expand_as(direct))
    auto = rep_conv2d(x, weight, **options)
    assert (~auto.isfinite()).any(1)[reached].all(), "NaN must not vanish"
    assert auto[1].isfinite().all(), "nor reach another sample"
    assert int((~auto[0].isfinite()).any(0).sum()) <= 4 * 16, "nor other tiles"


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bits_do_not_depend_on_batch_layout_or_threads(shape):
    ins, outs, rows, columns, stride, padding = shape
    x, weight = torch.randn(5, ins, rows, columns), torch.randn(outs, ins, 3, 3)
    want = rep_conv2d(x, weight, None, stride, padding, act="silu")
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        for view in layouts(x).values():
            assert torch.equal(rep_conv2d(view, weight, None, stride, padding, act="silu"), want)
        for n in range(5):
            assert torch.equal(rep_conv2d(x[n : n + 1], weight, None, stride, padding, act="silu"), want[n : n + 1])
