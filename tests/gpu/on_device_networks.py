"""Whole networks on a GPU: in eval mode, one step of training, optimized, compiled; the CPU's network is the oracle."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from effkern import ops, optimize
from effkern.blockdrop import BlockDropNet, PolicyNet
from effkern.dsnet import Dynamic
from effkern.models import create_model
from effkern.nn import skip_form
from effkern.quantize import Rule, quantize
from effkern.reparam import fold_model
from effkern.stochastic_depth import blocks_of, convert, survival_schedule
from tests.gpu.device import DEVICE, needs_device, there

pytestmark = [needs_device, pytest.mark.usefixtures("in_full")]
N = 8
#: Largest difference of scores relative to their size. In fp32 both round; a network in 16 bits rounds every map.
LIMIT = {torch.float32: 1e-3, torch.float16: 8e-2, torch.bfloat16: 5e-1}
Made = tuple[nn.Module, tuple]


def lively(net: nn.Module, side: int = 32) -> nn.Module:
    """With batch norms that do something, and the statistics of some images: others make signals die or explode."""
    norms = [module for module in net.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.uniform_(norm.bias, -0.2, 0.2)
        norm.momentum = 1.0
    with torch.no_grad():
        net.train()(images(side, 16))
    for norm in norms:
        norm.momentum = 0.1
    return net


def images(side: int = 32, n: int = N) -> Tensor:
    return torch.randn(n, 3, side, side)


def repvgg() -> Made:
    return lively(create_model("repvgg_small", in_channels=3)), (images(),)


def folded() -> Made:
    net, x = repvgg()
    return fold_model(net.eval()), x


def resnet(name: str = "resnet110", side: int = 32) -> Made:
    net = lively(create_model(name), side)
    keep = torch.rand(N, net.num_blocks) < 0.6
    keep[0], keep[1] = True, False
    return net, (images(side), keep)


def skipping() -> Made:
    net, x = resnet()
    return skip_form(net), x


def skipping_bottlenecks() -> Made:
    net, inputs = resnet("resnet50", 64)
    return skip_form(net), inputs


def blockdrop() -> Made:
    net, (x, _) = resnet("resnet32")
    policy = lively(PolicyNet(net.num_blocks))
    for parameter in policy.parameters():  # the last layer of a fresh policy is 0: all blocks run
        if not bool(parameter.any()):
            nn.init.normal_(parameter)
    return BlockDropNet(skip_form(net), skip_form(policy)), (x,)


def statistics(net: nn.Module, widths: tuple[int, ...], side: int) -> nn.Module:
    """Of the batch norms of these widths."""
    for module in net.modules():
        if hasattr(module, "momentum"):
            module.momentum = 1.0
    with torch.no_grad():
        for width in widths:
            net.train()(images(side), width)
    return net


def supernet() -> Made:
    net = statistics(create_model("ds_mobilenet", num_classes=10), (14, 0, 5, 13), 64)
    return net, (images(64), torch.tensor([14, 0, 5, 13, 0, 5, 14, 0]))


def one_width() -> Made:
    net, (x, _) = supernet()
    return net, (x, 5)


def gated() -> Made:
    options = {"stem": 8, "front": [[16, 1, 1]], "stages": [[[16, 24, 32], 2, 2], [[32, 40, 64], 1, 2]],
               "gated": [0, 1], "space": [0, 1, 2]}  # fmt: skip
    net = statistics(create_model("ds_resnet", num_classes=10, **options), (0, 1, 2), 32)
    for gate in net.gates:
        nn.init.normal_(gate.slim.weight)
    return Dynamic(net), (images(),)


def stochastic() -> Made:
    net, inputs = resnet("resnet20")
    return convert(net, survival_schedule(len(blocks_of(net)))), inputs


def quantized() -> Made:
    net = nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 64, 3, 2, 1), nn.ReLU(),
        nn.Conv2d(64, 64, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(256, 10),
    )  # fmt: skip
    rule = Rule(d=4, entries=32)
    return quantize(lively(net), lambda name, layer: None if name == "0" else rule, iterations=3)[0], (images(),)


NETWORKS: dict[str, Callable[[], Made]] = {
    "repvgg": repvgg, "repvgg folded": folded, "resnet110": resnet, "resnet110 skip_form": skipping,
    "resnet50 skip_form": skipping_bottlenecks, "blockdrop": blockdrop, "ds_mobilenet mixed": supernet,
    "ds_mobilenet width 5": one_width, "ds_resnet gates": gated, "stochastic depth": stochastic, "pq": quantized,
}  # fmt: skip
#: In training mode; the two of ds_mobilenet differ in nothing else there.
TRAINED = ["repvgg", "resnet110", "ds_mobilenet width 5", "stochastic depth", "pq"]


def distance(got: Tensor, want: Tensor) -> float:
    return float((got.cpu().double() - want.double()).norm() / want.double().norm())


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("key", NETWORKS)
def test_networks(key, dtype, layout):
    net, inputs = NETWORKS[key]()
    net.eval()
    twin = copy.deepcopy(net).to(DEVICE, dtype=dtype, memory_format=layout)
    with torch.no_grad():
        want = net(*inputs)
        args = there((inputs[0].to(dtype, memory_format=layout), *inputs[1:]))
        got = twin(*args)
        again = twin(*args)
    assert bool(want.isfinite().all()) and float(want.std()) > 1e-6, "the network is dead"
    if key in ("blockdrop", "ds_resnet gates") and dtype != torch.float32:
        # A decision near its threshold may fall otherwise in 16 bits: most images take the same path.
        near = (got.cpu().double() - want).norm(dim=1) <= LIMIT[dtype] * want.norm(dim=1)
        assert int(near.sum()) >= N // 2
    else:
        assert distance(got, want) <= LIMIT[dtype], distance(got, want)
    assert distance(again, got.cpu()) <= LIMIT[dtype] / 10


@pytest.mark.parametrize("key", TRAINED)
def test_a_step_of_training(key):
    net, inputs = NETWORKS[key]()
    twin = copy.deepcopy(net).to(DEVICE)
    labels = torch.arange(N) % 10
    found = []
    for module, args, target in ((net, inputs, labels), (twin, there(inputs), there(labels))):
        module.train()
        loss = F.cross_entropy(module(*args), target)
        loss.backward()
        found.append((loss, {name: p.grad for name, p in module.named_parameters() if p.grad is not None}))
    (loss, grads), (other, theirs) = found
    assert bool(loss.isfinite()) and abs(float(other) - float(loss)) <= 1e-4 * float(loss)
    assert grads.keys() == theirs.keys() and grads
    scale = torch.stack([g.double().norm() for g in grads.values()]).norm()
    for name, g in grads.items():  # an activation whose sum is near 0 may take the other side: not every element agrees
        wrong = (theirs[name].cpu().double() - g.double()).norm()
        assert float(wrong) <= 5e-2 * float(g.double().norm()) + 1e-3 * float(scale), name
    torch.optim.SGD(twin.parameters(), 0.1).step()
    with torch.no_grad():
        after = F.cross_entropy(twin(*there(inputs)), there(labels))
    assert bool(after.isfinite())


@pytest.mark.parametrize("moved", ["before", "after"])
@pytest.mark.parametrize("name", ["resnet20", "mobilenet_v2", "repvgg_small", "resnet18"])
def test_optimized_networks(name, moved):
    options = {"in_channels": 3} if name == "repvgg_small" else {}
    net = lively(create_model(name, **options), 64).eval()
    x = images(64)
    with torch.no_grad():
        exact = copy.deepcopy(net).double()(x.double())
    fast = optimize(net.to(DEVICE)) if moved == "before" else optimize(net).to(DEVICE)
    with torch.no_grad():
        got = fast(there(x))
        half = fast.half()(there(x).half()) if moved == "after" else None
    assert distance(got, exact) <= LIMIT[torch.float32]
    assert half is None or distance(half, exact) <= LIMIT[torch.float16]


class Small(nn.Module):
    """A call of several ops, one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Parameter(torch.randn(16, 3, 3, 3) / 5)
        self.wide = nn.Parameter(torch.randn(32, 32, 1, 1) / 4)
        self.convs = nn.ParameterList([nn.Parameter(torch.randn(16, 16, 3, 3) / 12) for _ in range(2)])
        self.biases = nn.ParameterList([nn.Parameter(torch.randn(16)) for _ in range(2)])
        self.book = nn.Parameter(torch.randn(1, 16, 4) / 4)
        self.register_buffer("codes", torch.randint(16, (10, 5), dtype=torch.uint8))

    def forward(self, x: Tensor, keep: Tensor, width: Tensor) -> Tensor:
        y = ops.rep_conv2d(x, self.stem, None, padding=1)
        y = ops.skip_basic_block(y, keep, self.convs[0], self.biases[0], self.convs[1], self.biases[1])
        y = ops.sliced_conv2d_ragged(y, self.wide, None, width, width, 20)
        return ops.pq_linear(y.mean((2, 3)) + 1, self.codes, self.book)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled(backend):
    net = Small()
    keep, width = torch.arange(N) % 3 > 0, torch.tensor([16, 4, 9, 16] * (N // 4))
    x = images(16)
    torch._dynamo.reset()
    twin = copy.deepcopy(net).to(DEVICE)
    compiled = torch.compile(twin, backend=backend, fullgraph=True)
    want = net(x, keep, width)
    got = compiled(*there((x, keep, width)))
    assert distance(got.detach(), want.detach()) <= LIMIT[torch.float32]
    want.square().sum().backward()
    got.square().sum().backward()
    for (name, p), q in zip(net.named_parameters(), twin.parameters(), strict=True):
        assert p.grad is not None and q.grad is not None and distance(q.grad, p.grad) <= 1e-3, name
    torch._dynamo.reset()
