"""Conversion of networks there and back, and training on the loop."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from effkern.data import BatchFeed, load_digits
from effkern.models import create_model
from effkern.nn import StochasticBlock, skip_form
from effkern.stochastic_depth import StochasticDepthTraining, blocks_of, convert, deploy, survival_schedule
from effkern.training import Criterion, Recipe, Step, train


def resnet(shortcut: str = "pool") -> nn.Module:
    torch.manual_seed(0)
    net = create_model("resnet20", in_channels=1, widths=(4, 6, 8), blocks=(2, 1, 2), shortcut=shortcut)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.2, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
    return net


class BasicBlock(nn.Module):
    """As torchvision's."""

    def __init__(self, channels: int, out: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.downsample = None
        if stride > 1 or channels != out:
            self.downsample = nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x):
        identity = x if self.downsample is None else self.downsample(x)
        return self.relu(self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x))))) + identity)


class Twice(BasicBlock):
    """The same parts, joined otherwise."""

    def forward(self, x):
        return super().forward(x) * 2


def foreign(block: type = BasicBlock) -> nn.Module:
    torch.manual_seed(0)
    tail = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 10))
    return nn.Sequential(nn.Conv2d(1, 4, 3), block(4, 4), block(4, 6, 2), *tail)


@pytest.mark.parametrize("make", [resnet, lambda: resnet("conv"), foreign], ids=["pool", "conv", "foreign"])
@pytest.mark.parametrize("scale", ["original", "inverted"])
def test_conversion_keeps_names_and_folding_keeps_the_function(make, scale):
    net = make()
    survival = survival_schedule(len(blocks_of(net)), 0.4)
    stochastic = convert(net, survival, scale=scale)
    assert stochastic.state_dict().keys() == net.state_dict().keys()
    found = [block for block in stochastic.modules() if isinstance(block, StochasticBlock)]
    assert [block.survival for block in found] == pytest.approx(survival.tolist())
    assert not any(isinstance(module, StochasticBlock) for module in net.modules())
    x = torch.randn(3, 1, 12, 12)
    with torch.no_grad():
        want = stochastic.double().eval()(x.double())
        plain = deploy(stochastic)
        torch.testing.assert_close(plain(x.double()), want, rtol=1e-12, atol=1e-12)
        assert not any(isinstance(module, StochasticBlock) for module in plain.modules())
        torch.testing.assert_close(skip_form(plain.float())(x), want.float(), rtol=1e-5, atol=1e-6)
        if scale == "inverted":
            torch.testing.assert_close(net.double().eval()(x.double()), want)


def test_inference_scales_each_residual_by_hand():
    net = resnet("pool").eval()
    stochastic = convert(net, torch.tensor([0.9, 0.5, 0.0, 0.7, 1.0])).eval()
    state = want = net.stem(torch.randn(2, 1, 8, 8))
    for block, p in zip(net.blocks(), (0.9, 0.5, 0.0, 0.7, 1.0), strict=True):
        want = F.relu(block.shortcut(want) + p * block.residual(want))
    torch.testing.assert_close(stochastic.body(state), want)


def test_what_is_no_residual_network_is_refused():
    for net in (nn.Conv2d(1, 1, 1), foreign(Twice)):
        with pytest.raises(ValueError, match=r"network: .* has no residual block"):
            convert(net, torch.ones(2))
    with pytest.raises(ValueError, match=r"survival: must be \[5\], one a residual block, got \[4\]"):
        convert(resnet(), torch.ones(4))
    with pytest.raises(ValueError, match=r"ResNet has no block with stochastic depth; convert\(\) it first"):
        StochasticDepthTraining(resnet())


@pytest.mark.parametrize("mode", ["batch", "row", "subset"])
@pytest.mark.parametrize("make", [resnet, foreign], ids=["ours", "foreign"])
def test_it_trains_on_the_loop_and_repeats_itself(mode, make):
    data = load_digits()
    losses = []
    for _ in range(2):
        net = make()
        method = StochasticDepthTraining(convert(net, survival_schedule(len(blocks_of(net)), 0.3), mode))
        feed = BatchFeed(data, data.train, 32)
        losses.append(train(method, feed, Recipe(epochs=4 / feed.steps_per_epoch, lr=0.05, batch_size=32)).losses)
    assert len(losses[0]) == 4 and losses[0] == losses[1]


def test_the_mask_of_a_batch_does_not_depend_on_its_parts():
    for mode in ("batch", "row"):
        method = StochasticDepthTraining(convert(resnet(), survival_schedule(5, 0.3), mode))
        whole = method.draw(12, Step(3))
        assert torch.equal(torch.cat([method.draw(4, Step(3, part=i, parts=3)) for i in range(3)]), whole)
        assert not torch.equal(whole, method.draw(12, Step(4)))


def test_dropped_blocks_are_not_run():
    """The work of a step, in rows of convolutions, is that of the mask."""
    net = convert(resnet(), survival_schedule(5, 0.2), "row")
    method, rows = StochasticDepthTraining(net), []
    for block in method.blocks:
        block.conv1.register_forward_hook(lambda m, i, o: rows.append(len(o)))
    at = Step(0)
    method.train()
    list(method.losses(torch.randn(16, 1, 8, 8), torch.zeros(16, dtype=torch.long), at))
    assert sum(rows) == int(method.draw(16, Step(0)).sum()) < 5 * 16
    assert float(at.metrics["blocks"]) == pytest.approx(sum(rows) / 16)


@pytest.mark.parametrize("make", [resnet, foreign], ids=["ours", "foreign"])
def test_the_loss_by_hand(make):
    """Smoothed cross-entropy; at survival 1 there is nothing to draw."""
    net = make()
    method = StochasticDepthTraining(
        convert(net, torch.ones(len(blocks_of(net)))), criterion=Criterion(label_smoothing=0.2)
    ).train()
    x, y = torch.randn(8, 1, 10, 10), torch.arange(8)
    (loss,) = method.losses(x, y, Step(0))
    log_p = net.train()(x).log_softmax(1)
    torch.testing.assert_close(loss, -(0.8 * log_p[torch.arange(8), y] + 0.2 * log_p.mean(1)).mean())
