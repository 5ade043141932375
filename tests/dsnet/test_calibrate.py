"""Calibration: statistics are averages over the calibration set, for every width, or an error."""

import pytest
import torch
from torch import nn

from effkern.dsnet import calibrate, uncalibrated
from effkern.models.slimmable import SlimmableCNN
from effkern.nn import SwitchableBatchNorm2d

BATCHES = list(torch.randn(5, 6, 1, 8, 8, generator=torch.Generator().manual_seed(0)))


def network():
    torch.manual_seed(0)
    return SlimmableCNN((4, 8), blocks=(1, 1), num_classes=3)


def test_statistics_are_averages_over_all_batches():
    model = network()
    for x in BATCHES:
        model(x + 5, 0)  # training leaves other statistics behind
    calibrate(model, BATCHES, range(2))
    stem = model.features[0]
    for i, c in enumerate((4, 8)):
        outputs = [stem.conv(x, i) for x in BATCHES]
        mean = torch.stack([y.mean((0, 2, 3)) for y in outputs]).mean(0)
        var = torch.stack([y.var((0, 2, 3)) for y in outputs]).mean(0)
        torch.testing.assert_close(stem.bn.running_mean[i, :c], mean, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(stem.bn.running_var[i, :c], var, rtol=1e-5, atol=1e-5)
    assert uncalibrated(model) == []


def test_a_width_that_was_missed_is_named():
    with pytest.raises(RuntimeError, match=r"features\.0\.bn\[1\], features\.1\.bn\[1\]"):
        calibrate(network(), BATCHES, [0])
    with pytest.raises(RuntimeError, match=r"features\.0\.bn\[0\]"):
        calibrate(network(), [], [0, 1])


def test_a_fresh_network_is_not_calibrated():
    assert uncalibrated(network()) == [f"features.{i}.bn[{w}]" for i in range(2) for w in range(2)]


@pytest.mark.parametrize("training", [True, False])
def test_nothing_else_changes(training):
    model = nn.ModuleDict({"net": network(), "dropout": nn.Dropout(0.5)}).train(training)
    model["net"].features[0].eval()
    model.forward = lambda x, width: model["dropout"](model["net"](x, width))
    modes = {name: m.training for name, m in model.named_modules()}
    parameters = [p.clone() for p in model.parameters()]
    calibrate(model, BATCHES, [0, 1])
    assert {name: m.training for name, m in model.named_modules()} == modes
    assert all(m.momentum == 0.1 for m in model.modules() if isinstance(m, SwitchableBatchNorm2d))
    assert all(torch.equal(a, b) for a, b in zip(parameters, model.parameters(), strict=True))
    assert all(p.grad is None for p in model.parameters())


def test_dropout_does_not_disturb_calibration():
    net = network()
    noisy = nn.Sequential(nn.Dropout(0.9))
    model = nn.ModuleDict({"noisy": noisy, "net": net})
    model.forward = lambda x, width: net(noisy(x), width)
    calibrate(model, BATCHES, [0, 1])
    plain = network()
    calibrate(plain, BATCHES, [0, 1])
    assert torch.equal(net.features[1].bn.running_mean, plain.features[1].bn.running_mean)


def test_modes_survive_an_error():
    model = network().eval()
    with pytest.raises(ValueError, match="x must"):
        calibrate(model, [torch.zeros(2, 3)], [0])
    assert not any(m.training for m in model.modules())
    assert all(m.momentum == 0.1 for m in model.modules() if isinstance(m, SwitchableBatchNorm2d))
