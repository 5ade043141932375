"""A width, or a way through gates, alone as a plain network."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from effkern.dsnet import all_ways, calibrate, extract
from effkern.models import create_model
from effkern.nn import DoubleHeadedGate, SlicedConv2d, SlicedConvBNAct, SlicedLinear, SwitchableBatchNorm2d
from effkern.training import count_macs, count_params
from tests.dsnet.gated import CASES, IMAGE, batch, network

OWN = (SlicedConv2d, SlicedConvBNAct, SlicedLinear, SwitchableBatchNorm2d)
PLAIN = {
    "slimmable_cnn": {"widths": (2, 4, 6), "blocks": (1, 1), "affine": "per_width"},
    "mobilenet_v1_slimmable": {"num_classes": 10, "in_channels": 1, "width_mults": (0.125, 0.25, 0.375)},
}


def lived(net: nn.Module) -> nn.Module:
    for module in net.modules():
        if isinstance(module, SwitchableBatchNorm2d):
            for tensor, low in ((module.weight, 0.5), (module.bias, -0.5), (module.running_mean, -0.2)):
                nn.init.uniform_(tensor, low, low + 1)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return net.eval()


def same(alone: nn.Module, x: torch.Tensor, want: torch.Tensor, trace: bool = True) -> None:
    assert not any(isinstance(module, OWN) for module in alone.modules()) and not alone.training
    assert not any(p.requires_grad for p in alone.parameters())
    with torch.no_grad():
        torch.testing.assert_close(alone(x), want, rtol=1e-3, atol=1e-4)
        if trace:
            traced = torch.jit.trace(alone, x[:2], check_trace=False)
            torch.testing.assert_close(traced(x), want, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("fold", [False, True])
def test_a_width_of_a_slimmable_network(name, fold):
    torch.manual_seed(0)
    net, x = lived(create_model(name, **PLAIN[name])), torch.randn(3, 1, 32, 32)
    if fold:
        for module in net.modules():
            if isinstance(module, SlicedConvBNAct):
                module.fold()
    sizes = []
    for width in (0, 1, 2, -1):
        with torch.no_grad():
            want = net(x, width)
        alone = extract(net, (1, 32, 32), width)
        same(alone, x, want)
        sizes.append(count_params(alone))
    assert sizes[0] < sizes[1] < sizes[2] <= sizes[3] <= count_params(net)


@pytest.mark.parametrize(("name", "options"), CASES)
def test_every_way_of_a_network_with_gates(name, options):
    net, (x, _) = network(name, options), batch(6)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    for way in all_ways(net):
        with torch.no_grad():
            want = net.along(x, way)
        alone = extract(net, IMAGE, way)
        same(alone, x, want, trace=way == all_ways(net)[0])
        assert not any("slim" in key or "offset" in key for key in alone.state_dict())
    for width in range(net.num_widths):
        with torch.no_grad():
            want = net(x, width)
        same(extract(net, IMAGE, width), x, want, trace=False)
    assert count_params(extract(net, IMAGE, 0)) < count_params(extract(net, IMAGE, -1))
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())
    assert all(gate.slim.out_features == len(gate.space) for gate in net.gates)


def test_the_cost_is_that_of_the_width():
    net = network("ds_mobilenet")
    x = torch.zeros(1, *IMAGE)
    for width in range(3):
        alone = extract(net, IMAGE, width)
        assert count_macs(alone, x) == count_macs(_At(net, width), x)


class _At(nn.Module):
    def __init__(self, net: nn.Module, width: int) -> None:
        super().__init__()
        self.net, self.width = net, width

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x, self.width)


class Loose(nn.Module):
    """Layers by themselves; the second is used twice."""

    def __init__(self, widths: tuple[int, int]) -> None:
        super().__init__()
        self.conv, self.bn = SlicedConv2d(1, [4, 8], 3, padding=1), SwitchableBatchNorm2d([4, 8])
        self.again, self.unused = SlicedConv2d([4, 8], [4, 8], 1), SlicedConv2d(1, [2, 4], 1)
        self.widths = widths

    def forward(self, x: torch.Tensor, width: int) -> torch.Tensor:
        x = self.bn(self.conv(x, width), width=width).relu()
        for _ in self.widths:
            x = self.again(x, width)
        return self.again(x[:, :4], 0).mean((2, 3)) if self.widths[0] != self.widths[1] else x.mean((2, 3))


def test_layers_by_themselves_and_what_cannot_be_one_layer():
    torch.manual_seed(0)
    net, x = lived(Loose((0, 0))), torch.randn(2, 1, 6, 6)
    for width in (0, 1):
        with torch.no_grad():
            want = net(x, width)
        alone = extract(net, (1, 6, 6), width)
        same(alone, x, want)
        assert not any("unused" in key for key in alone.state_dict())
    with pytest.raises(ValueError, match=r"model: again runs at widths \(1, None\) and \(0, None\)"):
        extract(Loose((0, 1)).eval(), (1, 6, 6), 1)
    with pytest.raises(RuntimeError, match=r"eval mode only: call eval\(\) first"):
        extract(Loose((0, 0)), (1, 6, 6), 0)


def by_hand(net: nn.Module, widths: list[int], x: torch.Tensor) -> torch.Tensor:
    """A slimmable CNN layer by layer in fp64, its batch norms with statistics of ``x`` at these widths."""
    net, x = copy.deepcopy(net).double(), x.double()
    seen, channels = x, x.size(1)  # what batch norms see as they are calibrated, by the biased variance of a batch
    for layer, width in zip(net.features, widths, strict=True):
        ins, channels = channels, layer.conv.out_channels[width]
        filters = layer.conv.weight[:channels, :ins]
        x, seen = (torch.conv2d(t, filters, None, layer.conv.stride, layer.conv.padding) for t in (x, seen))
        affine = (t[width] if layer.bn.affine == "per_width" else t for t in (layer.bn.weight, layer.bn.bias))
        weight, bias = (t[:channels] for t in affine)
        mean, variance = seen.mean((0, 2, 3)), seen.transpose(0, 1).flatten(1).var(1)
        x = torch.batch_norm(x, weight, bias, mean, variance, False, 0.0, layer.bn.eps, False).relu()
        seen = torch.batch_norm(seen, weight, bias, None, None, True, 0.0, layer.bn.eps, False).relu()
    return (x.mean((2, 3)) @ net.classifier.weight[:, :channels].T + net.classifier.bias).float()


@pytest.mark.parametrize("affine", ["shared", "per_width"])
@pytest.mark.parametrize("fold", [False, True])
def test_a_width_a_layer_calibrated_for_the_mix(affine, fold):
    torch.manual_seed(0)
    net = lived(create_model("slimmable_cnn", **{**PLAIN["slimmable_cnn"], "affine": affine}))
    if fold:
        for module in net.modules():
            if isinstance(module, SlicedConvBNAct):
                module.fold()
    before, x = {key: value.clone() for key, value in net.state_dict().items()}, torch.randn(16, 1, 32, 32)
    with torch.no_grad():
        for first, second in ((0, 2), (2, 0), (1, 2), (1, 1)):
            alone = extract(net, (1, 32, 32), {"features.0": first, "features.1": second}, [x])
            want = by_hand(net, [first, second], x)
            same(alone, x, want)
            assert (alone(x) - want).abs().max() < 3e-6 * want.abs().max()
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())


def test_names_begin_and_depthwise_layers_follow():
    torch.manual_seed(0)
    net, x = lived(create_model("mobilenet_v1_slimmable", **PLAIN["mobilenet_v1_slimmable"])), torch.randn(8, 1, 32, 32)
    alone = extract(net, (1, 32, 32), {"": 1, "features.4": 2, "features.8": 0, "features.9": -1}, [x])
    outs = [module.out_channels for module in alone.modules() if isinstance(module, nn.Conv2d)]
    assert outs == [layer.conv.out_channels[1] for layer in net.features][:3] + [
        layer.conv.out_channels[width]
        for layer, width in zip(net.features[3:], [1, 2, 2, 1, 1, 0, 0, *[1] * 17], strict=True)
    ]
    uniform = copy.deepcopy(net)
    calibrate(uniform, [x], range(3))
    with torch.no_grad():
        same(extract(net, (1, 32, 32), {"": 1}, [x]), x, uniform(x, 1))


@pytest.mark.parametrize(
    ("way", "error", "message"),
    [
        ({"stem": 0}, ValueError, "no layer's name begins with 'stem'; there are features.0, features.1"),
        ({"features": 3}, IndexError, "width must be in"),
        ({"features": 0}, RuntimeError, "batches: none reached features.0.bn, features.1.bn"),
    ],
)
def test_a_wrong_mix_is_named(way, error, message):
    net = create_model("slimmable_cnn", **PLAIN["slimmable_cnn"]).eval()
    with pytest.raises(error, match=message):
        extract(net, (1, 32, 32), way)


class Sum(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = SlicedConv2d(1, [2, 4], 3, padding=1), SlicedConv2d([2, 4], [2, 4], 3, padding=1)
        self.three = SlicedConv2d(4, [2, 4], 3)

    def forward(self, x: torch.Tensor, width: int) -> torch.Tensor:
        x = self.one(x, width)
        return self.three(x + self.two(x, width), width)


def test_a_mix_whose_layers_do_not_fit_is_named():
    with pytest.raises(ValueError, match="the layers of this mix do not fit together"):
        extract(Sum().eval(), (1, 8, 8), {"one": 0, "two": 1})
    with pytest.raises(ValueError, match=r"way: three takes \[4\] channels, the mix gives it 2"):
        extract(Sum().eval(), (1, 8, 8), {"one": 0, "two": 0})
    extract(Sum().eval(), (1, 8, 8), {"one": 1, "two": 1, "three": 0})


def test_a_gate_is_left_as_attention_only():
    net = network("ds_resnet")
    (gate,) = [m for m in extract(net, IMAGE, 1).modules() if isinstance(m, DoubleHeadedGate)]
    assert not hasattr(gate, "slim") and not hasattr(gate, "offset")
    calibrate(net, [batch(8)[0]], range(3))  # the network itself goes on
