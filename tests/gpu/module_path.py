"""Layers, networks and what works with them on a GPU: the kernels are handed what they take, and the results are those
of the CPU. `proof_runtime.py` runs this file on a device that is not there (stub.py), pytest on one that is."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

from effkern import nn as effnn
from effkern.blockdrop import BlockDropNet, JointTraining, PolicyNet, PolicyTraining
from effkern.data import BatchFeed
from effkern.dsnet import Dynamic, GateTraining, SupernetTraining
from effkern.models import create_model
from effkern.nn import multi_branch_bn
from effkern.nn.residual import ResidualBlock
from effkern.ops import _backend, backend
from effkern.ops._registry import OPS
from effkern.ops.multi_branch_bn import multi_branch_bn_add_relu
from effkern.quantize import Rule, quantize, tune
from effkern.reparam import ACBlock, fold_model
from effkern.stochastic_depth import StochasticDepthTraining, convert, survival_schedule
from effkern.training import Method, Recipe, Run, Step, Supervised, train
from tests.dsnet import gated
from tests.gpu import stub
from tests.nn.test_skip import lived
from tests.training import small


@pytest.fixture(autouse=True)
def device(monkeypatch) -> Iterator[None]:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    if stub.loaded():
        runtime = stub.Runtime()
        runtime.device(2, 227 << 10)
        runtime.begin(running=True, waits=True)
        yield
        runtime.begin(running=True, waits=True)
    elif torch.cuda.is_available():
        yield
    else:
        pytest.skip("no GPU")


def maps(channels: int, side: int = 7, n: int = 4) -> Tensor:
    return torch.randn(n, channels, side, side).to(memory_format=torch.channels_last)


def resnet(shortcut: str = "subsample") -> nn.Module:
    return lived(create_model("resnet20", blocks=(2, 1, 2), widths=(16, 16, 32), shortcut=shortcut))


def blockdrop(**options: object) -> nn.Module:
    policy = lived(PolicyNet(5, widths=(8, 8)))
    nn.init.normal_(policy.linear.weight, std=3.0)
    return BlockDropNet(effnn.skip_form(resnet()), policy, **options)  # type: ignore[arg-type]


def skip_block(kind: str, into: int, channels: int, stride: int, shortcut: str) -> nn.Module:
    return effnn.SkipBlock.from_block(lived(ResidualBlock(into, channels, stride, kind, shortcut)))


class At(nn.Module):
    """A network whose other arguments are fixed, and go where it goes."""

    def __init__(self, net: nn.Module, *args: object, **options: object) -> None:
        super().__init__()
        self.net, self.args, self.options = net, args, options

    def forward(self, x: Tensor) -> Tensor:
        moved = [a.to(x.device) if isinstance(a, Tensor) else a for a in self.args]
        return self.net(x, *moved, **self.options)


KEEP = torch.tensor([[1, 0, 1, 0, 0], [0, 1, 1, 0, 1], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0]], dtype=torch.bool)
SOFT = torch.tensor([1.0, 0.3, 0.0, 0.9])
WIDTH = torch.tensor([0, 2, 1, 2])
WIDTHS = [8, 16, 24]

#: Name to a module and its input, both on the CPU.
CASES: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "RepConv2d": lambda: (effnn.RepConv2d(8, 16, 3, padding=1), maps(8)),
    "RepConv2d reflect": lambda: (effnn.RepConv2d(8, 16, 3, padding=1, padding_mode="reflect"), maps(8)),
    "RepVGGBlock": lambda: (lived(effnn.RepVGGBlock(8, 8)), maps(8)),
    "RepVGGBlock folded": lambda: (fold_model(lived(effnn.RepVGGBlock(8, 8)).eval()), maps(8)),
    "ACBlock folded": lambda: (fold_model(lived(ACBlock(8, 16)).eval()), maps(8)),
    "batch norms": lambda: (Thrice(lived(effnn.MultiBranchBNAddReLU(8))), maps(8)),
    "PQLinear": lambda: (filled(effnn.PQLinear(24, 16, 4, 32)), torch.randn(5, 24)),
    "PQConv2d": lambda: (filled(effnn.PQConv2d(8, 16, 3, 9, 32, padding=1)), maps(8)),
    "PQEmbedding": lambda: (filled(effnn.PQEmbedding(50, 16, 4, 300)), torch.tensor([[3, 49], [0, 7]])),
    "SlicedLinear": lambda: (At(effnn.SlicedLinear(WIDTHS, WIDTHS), 1), torch.randn(4, 24)),
    "SlicedLinear by sample": lambda: (At(effnn.SlicedLinear(WIDTHS, WIDTHS), WIDTH), torch.randn(4, 24)),
    "SlicedConvBNAct": lambda: (At(effnn.SlicedConvBNAct(WIDTHS, WIDTHS, 3), 1), maps(24)[:, :16]),
    "SlicedConvBNAct by sample": lambda: (At(effnn.SlicedConvBNAct(WIDTHS, WIDTHS, 3), WIDTH), maps(24)),
    "SkipBlock basic": lambda: (At(skip_block("basic", 16, 16, 1, "identity"), SOFT), maps(16)),
    "SkipBlock convolved": lambda: (At(skip_block("basic", 8, 16, 2, "conv"), SOFT > 0.5), maps(8)),
    "SkipBlock bottleneck": lambda: (At(skip_block("bottleneck", 8, 8, 2, "conv"), SOFT > 0.5), maps(8)),
    "skipping network": lambda: (At(effnn.skip_form(resnet()), KEEP), maps(3, 8)),
    "skipping network convolved": lambda: (At(effnn.skip_form(resnet("conv")), KEEP), maps(3, 8)),
    "plain network": lambda: (At(resnet(), KEEP), maps(3, 8)),
    "BlockDropNet": lambda: (blockdrop(), maps(3, 8)),
    "BlockDropNet in buckets": lambda: (blockdrop(reorder=True, bucket=2), maps(3, 8)),
    "stochastic depth": lambda: (convert(resnet(), survival_schedule(5)), maps(3, 8)),
    "slimmable_cnn": lambda: (At(slimmable(), 1), torch.randn(4, 1, 8, 8)),
    "slimmable_cnn by sample": lambda: (At(slimmable(), WIDTH), torch.randn(4, 1, 8, 8)),
    "ds_resnet": lambda: (Dynamic(gated.network("ds_resnet")), gated.batch(3)[0]),
    "ds_mobilenet of two gates": lambda: (
        Dynamic(gated.network("ds_mobilenet", {**gated.TWO["ds_mobilenet"], "statistics": "way"})),
        gated.batch(3)[0],
    ),
}


class Thrice(nn.Module):
    """A layer of three branches on three inputs made of one."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x, x * 0.5, -x)


def filled(layer: nn.Module) -> nn.Module:
    layer.reset_parameters()  # type: ignore[operator]
    return layer


def slimmable() -> nn.Module:
    return lived(create_model("slimmable_cnn", widths=(4, 8, 12), blocks=(1, 1)))


def close(got: Tensor, want: Tensor) -> None:
    """Within the roundings of a chain of fp32 sums in another order."""
    assert got.device.type == "cuda"
    assert got.shape == want.shape and got.dtype == want.dtype
    assert (got.cpu() - want).abs().max() <= 2e-5 * want.abs().max() + 1e-6


@pytest.mark.parametrize("name", CASES)
def test_results_are_those_of_the_cpu(name):
    net, x = CASES[name]()
    with torch.no_grad():
        want = net.eval()(x)
        net = net.to("cuda")
        for _ in range(2):  # with what the first call remembered
            close(net(x.cuda()), want)


@pytest.mark.parametrize("name", CASES)
def test_deployed_networks_too(name):
    net, x = CASES[name]()
    net = net.eval()
    with torch.no_grad():
        want = net(x)
        net = net.to("cuda")
        effnn.freeze_packs(net)
        for layer in net.modules():
            if isinstance(layer, effnn.SlicedConvBNAct):
                layer.fold()
        close(net(x.cuda()), want)
        close(copy.deepcopy(net)(x.cuda()), want)


def test_a_layer_that_cannot_freeze_says_so():
    layer = effnn.RepConv2d(8, 16, 3).eval().to("cuda")
    with pytest.raises(RuntimeError, match="plain CPU parameters"):
        layer.freeze_pack()


def test_a_block_follows_its_parameters():
    block = skip_block("basic", 16, 16, 1, "identity").eval().to("cuda")
    x, keep = maps(16).cuda(), torch.ones(4, dtype=torch.bool, device="cuda")
    with torch.no_grad():
        before = block(x, keep)
        block.conv2.weight.mul_(2)
        after = block(x, keep)
        close(after, copy.deepcopy(block).cpu()(x.cpu(), keep.cpu()))
    assert not torch.equal(before.cpu(), after.cpu())


def test_training_and_its_evaluation(tmp_path):
    images = small.data()
    recipe = Recipe(epochs=2, lr=0.05, batch_size=16, ema=0.9)
    results = []
    for device in ("cpu", "cuda"):
        method = Supervised(small.network(dropout=False)).to(device)
        feed = BatchFeed(images, images.train, recipe.batch_size, recipe.seed, augment=True)
        run = Run(tmp_path / device, save_every_s=0.0)
        results.append(train(method, feed, recipe, run=run, held_out=lambda: images.batches(images.val, 32)))
    cpu, cuda = results
    assert torch.allclose(torch.tensor(cpu.losses), torch.tensor(cuda.losses), 1e-4, 1e-4)
    assert cpu.metrics == cuda.metrics


METHODS: dict[str, Callable[[], Method]] = {
    "PolicyTraining": lambda: PolicyTraining(blockdrop()),
    "JointTraining": lambda: JointTraining(blockdrop()),
    "StochasticDepthTraining": lambda: StochasticDepthTraining(convert(resnet(), survival_schedule(5))),
    "SupernetTraining": lambda: SupernetTraining(slimmable(), 3),
    "GateTraining": lambda: GateTraining(gated.network(), gated.IMAGE, cost="budget", budget=0.7),
}


@pytest.mark.parametrize("name", METHODS)
def test_methods(name):
    method = METHODS[name]()
    channels = 1 if name in ("SupernetTraining", "GateTraining") else 3
    x, y = maps(channels, 8), torch.tensor([1, 0, 3, 2])
    results = []
    for device in ("cpu", "cuda"):
        there = copy.deepcopy(method).to(device).train()
        losses = []
        for loss in there.losses(x.to(device), y.to(device), Step(0)):
            loss.backward()
            losses.append(loss.detach().cpu())
        there.after_step(Step(0))
        results.append(torch.stack(losses))
        assert there.evaluate([(x.to(device), y.to(device))])
    assert torch.allclose(*results, 1e-4, 1e-4)


def test_quantizing_with_calibration():
    net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 36, 8)).eval()
    x = maps(3, 8)
    forms = []
    for device in ("cpu", "cuda"):
        there = copy.deepcopy(net).to(device)
        coded, report = quantize(there, Rule(9), calibration=[x.to(device)], fold_batch_norm=True)
        assert all(layer.error is not None for layer in report.layers)
        forms.append(coded)
        with torch.no_grad():
            assert coded(x.to(device)).device.type == device
    tune(forms[1], net.to("cuda"), [x.cuda()])


@pytest.mark.parametrize("block", [effnn.RepVGGBlock, ACBlock])
def test_parallel_norms_are_one_call(block, monkeypatch):
    calls = []

    def counted(xs, *args):
        calls.append(len(xs))
        return multi_branch_bn_add_relu(xs, *args)

    monkeypatch.setattr(multi_branch_bn, "multi_branch_bn_add_relu", counted)
    here = lived(block(8, 8)).train()
    there, x = copy.deepcopy(here).to("cuda"), maps(8)
    for layer, of in ((here, x), (there, x.cuda())):
        layer(of).square().sum().backward()
    assert calls == [3, 3]
    for (name, a), b in zip(here.named_parameters(), there.parameters(), strict=True):
        assert (b.grad.cpu() - a.grad).abs().max() <= 1e-4 * a.grad.abs().max() + 1e-5, name
    for a, b in zip(here.buffers(), there.buffers(), strict=True):
        torch.testing.assert_close(b.cpu(), a)


def test_images_are_normalized_where_they_are():
    data = dataclasses.replace(small.data(), mean=(0.5,), std=(0.3,))
    images = data.train.images[:4]
    assert torch.equal(data.normalize(images.cuda()).cpu(), data.normalize(images))


@pytest.mark.skipif(not stub.loaded() and torch.cuda.device_count() < 2, reason="one GPU")
def test_twins_run_on_the_device_of_their_tensors(monkeypatch):
    devices = []
    op = OPS["sliced_linear"]

    def twin(op):
        def run(*args):
            devices.append(torch.accelerator.current_device_index())
            return op.fake(*args)

        return run

    monkeypatch.setattr(_backend, "_import_triton", lambda: None)
    monkeypatch.setattr(_backend, "twin", twin)
    x, w = (torch.zeros(4, 4, device="cuda:1") for _ in range(2))
    with backend("triton"):
        assert op(x, w, None, 4, None, None, "none", "auto").device == torch.device("cuda:1")
    assert devices == [1] and torch.accelerator.current_device_index() == 0


@pytest.mark.parametrize("mode", ["row", "subset"])
def test_blocks_are_drawn_from_numbers_of_the_gpu(mode):
    survival, rows = torch.tensor([0.3, 0.5, 0.9]), torch.rand(8, 3)
    first, second = (
        effnn.draw_keep(survival, 8, mode, torch.Generator().manual_seed(1), numbers) for numbers in (rows, rows.cuda())
    )
    assert torch.equal(first, second)
