"""Group norm of a slimmable network: each width's slice, with groups that narrow widths share with wide ones."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from effkern.dsnet import GateTraining, calibrate, uncalibrated
from effkern.models import create_model
from effkern.nn import SlicedConvBNAct, SlicedGroupNorm
from effkern.training import Step
from tests.dsnet.gated import spread

WIDTHS = (4, 8, 8, 12)


def norm() -> SlicedGroupNorm:
    layer = SlicedGroupNorm(WIDTHS)
    nn.init.normal_(layer.weight)
    nn.init.normal_(layer.bias)
    return layer


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("index", [0, 1, 2, 3, -1])
def test_a_width_is_the_group_norm_of_its_slice(training, index):
    layer, channels = norm().train(training), WIDTHS[index]
    assert layer.group == 4
    plain = nn.GroupNorm(channels // 4, channels)
    plain.load_state_dict({"weight": layer.weight[:channels], "bias": layer.bias[:channels]})
    x = torch.randn(3, channels, 5, 4, requires_grad=True)
    towards = torch.randn(3, channels, 5, 4)
    got = torch.autograd.grad((layer(x, index) * towards).sum(), [x, layer.weight, layer.bias])
    want = torch.autograd.grad((plain(x) * towards).sum(), [x, plain.weight, plain.bias])
    assert torch.equal(layer(x, index), plain(x)) and torch.equal(layer.narrow(index)(x), plain(x))
    assert torch.equal(got[0], want[0])
    for ours, theirs in zip(got[1:], want[1:], strict=True):
        assert torch.equal(ours[:channels], theirs) and not ours[channels:].any()


def test_a_sample_of_its_own_width_is_that_slice_whatever_lies_past_it():
    layer = norm()
    choice = torch.tensor([0, 3, 1, 2])
    x = torch.randn(4, 12, 3, 3)
    for n, i in enumerate(choice):
        x[n, WIDTHS[i] :] = float("nan")
    y = layer(x, choice)
    weights = layer(torch.where(x.isnan(), 0.0, x), F.one_hot(choice, 4).float())
    for n, i in enumerate(choice):
        alone = layer(x[n : n + 1, : WIDTHS[i]], int(i))
        torch.testing.assert_close(y[n, : WIDTHS[i]], alone[0])
        torch.testing.assert_close(weights[n, : WIDTHS[i]], alone[0])
        assert not y[n, WIDTHS[i] :].any() and not weights[n, WIDTHS[i] :].any()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_bits_depend_on_neither_threads_neighbours_nor_wider_samples(layout):
    layer = SlicedGroupNorm((16, 32))
    x, choice = torch.randn(5, 32, 24, 24).contiguous(memory_format=layout), torch.tensor([0, 1, 1, 0, 1])
    torch.set_num_threads(1)
    want = layer(x, choice)
    assert want.is_contiguous(memory_format=layout)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        assert torch.equal(layer(x, choice), want), threads
        for n, i in enumerate(choice):
            channels = layer.widths[i]
            alone = x[n : n + 1, :channels].contiguous(memory_format=layout)
            assert torch.equal(layer(alone, int(i)), want[n : n + 1, :channels]), (threads, n)


def test_a_weight_learns_what_its_width_would_have_given():
    layer = norm().double()
    x = torch.randn(2, 12, 2, 2, dtype=torch.float64)
    weights = torch.tensor([[1.0, 0, 0, 0], [0.3, 0, 0, 0.7]], dtype=torch.float64, requires_grad=True)
    layer(x, weights).sum().backward()
    for i, channels in enumerate(WIDTHS):
        want = layer(x[:, :channels], i).sum((1, 2, 3))
        torch.testing.assert_close(weights.grad[:, i], want, rtol=1e-5, atol=1e-5)


def test_wrong_use_is_named():
    with pytest.raises(ValueError, match=r"group: must divide every width of \[4, 8, 8, 12\], got 8"):
        SlicedGroupNorm(WIDTHS, 8)
    with pytest.raises(ValueError, match=r"x must be \[N, 8, H, W\] at width index 1, got \[2, 4, 3, 3\]"):
        norm()(torch.zeros(2, 4, 3, 3), 1)
    with pytest.raises(ValueError, match="with a width a sample"):
        norm()(torch.zeros(2, 12, 3, 3), torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match='norm must be "batch" or "group"'):
        SlicedConvBNAct(3, WIDTHS, 3, norm="layer")


@pytest.mark.parametrize("act", ["relu", "silu", "none"])
def test_the_fused_layer_is_its_parts_in_every_mode(act):
    layer, x = SlicedConvBNAct(3, WIDTHS, 3, act=act, norm="group"), torch.randn(2, 3, 6, 6)
    for i, channels in enumerate(WIDTHS):
        y = F.group_norm(F.conv2d(x, layer.conv.weight[:channels], padding=1), channels // 4)
        want = {"relu": F.relu, "silu": F.silu, "none": lambda v: v}[act](y)
        with torch.no_grad():
            for mode in (True, False):
                torch.testing.assert_close(layer.train(mode)(x, i), want, rtol=1e-4, atol=1e-5)
            layer.fold()
            torch.testing.assert_close(layer(x, i), want, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(layer.narrow(i)(x), want, rtol=1e-4, atol=1e-5)


STAGES = {
    "ds_resnet": {"stem": 4, "front": [[8, 1, 1]], "stages": [[[8, 12, 16], 2, 2], [[4, 8, 16], 1, 2]]},
    "ds_mobilenet": {"stem": (4, 8), "front": [[[8, 12], 1, 1]], "stages": [[[8, 12, 16], 2, 1], [[4, 8, 16], 1, 2]]},
}


@pytest.mark.parametrize("name", STAGES)
def test_networks_need_no_calibration_and_route_without_it(name):
    """With two gates: no statistics, so none that a mixed way would lack."""
    torch.manual_seed(0)
    net = create_model(name, in_channels=1, norm="group", space=[0, 1, 2], gated=[0, 1], **STAGES[name])
    assert not any("running" in key for key in net.state_dict()) and uncalibrated(net) == []
    x, y = torch.randn(6, 1, 12, 12), torch.arange(6) % 10
    net(x, 1).sum().backward()
    calibrate(net, [x], range(net.num_widths))
    for gate in net.gates:
        nn.init.ones_(gate.reduce.bias)  # no unit of it is dead
    spread(net.eval(), x)
    with torch.no_grad():
        scores, choice = net.route(x)
        assert len(choice.unique(dim=0)) > 1
        alone = torch.cat([net.dynamic(x[n : n + 1]) for n in range(6)])
        torch.testing.assert_close(alone, scores, rtol=1e-4, atol=1e-4)
    method = GateTraining(net, (1, 12, 12)).train()
    (loss,) = method.losses(x, y, Step(0))
    loss.backward()
    assert all(gate.slim.weight.grad.abs().sum() > 0 for gate in net.gates)
