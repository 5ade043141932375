"""What an optimized network survives, and what it refuses."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
import threading

import pytest
import torch
from torch import nn

import effkern
from effkern.inference import Optimized, Report
from effkern.models import create_model
from effkern.nn import SkipBlock, skip_form
from tests.inference.common import error, lived_in, same
from tests.inference.test_tracing import EarlyExit, block

X = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def network() -> nn.Module:
    return lived_in(create_model("resnet20", widths=(8, 8, 8), blocks=(1, 1, 1)))


def fallback() -> nn.Module:
    return lived_in(nn.Sequential(nn.Conv2d(3, 4, 3), EarlyExit()))


NETWORKS = {"traced": network, "module by module": fallback, "untraceable": lambda: lived_in(Untraceable())}


class Untraceable(EarlyExit):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)

    def forward(self, x, threshold=0.5):
        return super().forward(self.stem(x), threshold)


@pytest.fixture(params=NETWORKS)
def model(request):
    return NETWORKS[request.param]()


def saved(module: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def test_transforms_fill_the_cache_they_are_given_and_change_no_bit():
    model = lived_in(create_model("resnet20", widths=(16, 32, 64), blocks=(2, 2, 2)))
    sizes, outputs = {}, {}
    for cache_bytes in (0, 1 << 20, 1 << 22):
        fast = effkern.optimize(model, cache_bytes=cache_bytes)
        handles = [b for b in fast.buffers() if b.dtype == torch.uint8]
        sizes[cache_bytes], outputs[cache_bytes] = sum(h.numel() for h in handles), fast(X)
        assert torch.equal(copy.deepcopy(fast)(X), outputs[0]) and torch.equal(saved(fast)(X), outputs[0])
    assert sizes[0] == sizes[1 << 20] < sizes[1 << 22] <= (1 << 22)
    assert sizes[1 << 22] > 4 * sizes[0]  # every 3x3 convolution of stride 1 but the first
    with pytest.raises(ValueError, match="cache_bytes"):
        effkern.optimize(model, cache_bytes=-1)


def test_transforms_of_what_skips_fill_the_same_cache():
    model = skip_form(lived_in(create_model("resnet20", widths=(16, 32, 64), blocks=(2, 2, 2))))
    x = torch.randn(2, 3, 16, 16)
    keep = torch.rand(2, model.num_blocks) < 0.5
    outputs = []
    for cache_bytes, transforms in ((0, False), (1 << 20, False), (1 << 22, True)):
        fast = effkern.optimize(model, (x, keep), cache_bytes=cache_bytes)
        blocks = [module for module in fast.modules() if isinstance(module, SkipBlock)]
        assert [block.transforms for block in blocks] == [transforms] * model.num_blocks
        outputs.append(fast(x, keep))
    assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[0], outputs[2])
    assert not any(block.transforms for block in model.modules() if isinstance(block, SkipBlock))


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), saved],
                         ids=["deepcopy", "pickle", "save"])  # fmt: skip
def test_copies_stand_alone(model, copier):
    optimized = effkern.optimize(model)
    expected = optimized(X)
    twin = copier(optimized)
    assert torch.equal(twin(X), expected) and str(twin.report()) == str(optimized.report())
    packs = [b for b in optimized.buffers() if b.dtype == torch.uint8]
    assert packs
    for pack in packs:
        pack[64:] = 0
    assert not torch.equal(optimized(X), expected)
    assert torch.equal(twin(X), expected)


def test_saved_networks_load_in_a_fresh_process(tmp_path):
    file = tmp_path / "net.pt"
    torch.save(effkern.optimize(network()), file)
    code = f"import torch; f = torch.load({str(file)!r}, weights_only=False); print(*f(torch.ones(1, 3, 16, 16)).shape)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.stdout.strip() == "1 10", run.stderr


def test_state_dict_carries_the_whole_network(model):
    optimized = effkern.optimize(model)
    for p in model.parameters():
        p.data.mul_(0.5)
    other = effkern.optimize(model)
    expected = optimized(X)
    assert not torch.equal(other(X), expected)
    other.load_state_dict(optimized.state_dict())
    assert torch.equal(other(X), expected)
    with pytest.raises(RuntimeError, match="Missing key"):
        optimized.load_state_dict(network().state_dict())


def test_a_pack_of_another_shape_is_refused_by_name():
    optimized = effkern.optimize(network())
    wide = effkern.optimize(lived_in(create_model("resnet20", widths=(9, 9, 9), blocks=(1, 1, 1))))
    with pytest.raises(RuntimeError, match="size mismatch"):
        optimized.load_state_dict(wide.state_dict())


def test_the_original_is_neither_changed_nor_followed(model):
    before = {k: v.clone() for k, v in model.state_dict().items()}
    types = [type(m) for m in model.modules()]
    optimized = effkern.optimize(model, X)
    assert [type(m) for m in model.modules()] == types and not model.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    expected = optimized(X)
    for p in model.parameters():
        p.data.zero_()
    assert torch.equal(optimized(X), expected)


def test_it_cannot_be_trained(model):
    optimized = effkern.optimize(model)
    with pytest.raises(RuntimeError, match="cannot be trained"):
        optimized.train()
    with pytest.raises(RuntimeError, match="cannot be trained"):
        nn.Sequential(optimized).train()
    assert optimized.eval() is optimized and not optimized.training
    assert not any(p.requires_grad for p in optimized.parameters())


def test_threads_may_share_it(model):
    optimized = effkern.optimize(model)
    inputs = [torch.randn(1 + i % 3, 3, 16, 16) for i in range(6)]
    expected = [optimized(x) for x in inputs]
    wrong = []

    def work(i: int) -> None:
        for _ in range(20):
            if not torch.equal(optimized(inputs[i]), expected[i]):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_gradients_reach_the_input():
    model = network()
    optimized = effkern.optimize(model)
    x = X.clone().requires_grad_()
    optimized(x).square().sum().backward()
    y = X.clone().requires_grad_()
    model(y).square().sum().backward()
    assert error(x.grad, y.grad.double()) < 1e-4


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad, torch.inference_mode])
def test_every_gradient_mode(mode):
    model = network()
    optimized = effkern.optimize(model)
    with mode():
        y = optimized(X)
    assert not y.requires_grad and y.is_inference() == (mode is torch.inference_mode)
    same(optimized, model, X, depth=20)


def test_autocast():
    model = network()
    optimized = effkern.optimize(model)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        y, y0 = optimized(X), model(X)
    assert y.dtype == y0.dtype == torch.bfloat16
    assert error(y, y0.double()) < 0.1


def test_casts_follow():
    optimized = effkern.optimize(network())
    expected = optimized(X)
    assert error(optimized.bfloat16()(X.bfloat16()), expected.double()) < 0.1
    assert error(optimized.float()(X), expected.double()) < 0.01


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles(dynamic):
    model = network()
    optimized = effkern.optimize(model)
    torch._dynamo.reset()
    compiled = torch.compile(optimized, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    with torch.no_grad():
        for x in (X, torch.cat([X, X, X]), X.contiguous(memory_format=torch.channels_last)):
            assert torch.equal(compiled(x), optimized(x))


@pytest.mark.slow
def test_exports():
    optimized = effkern.optimize(network())
    program = torch.export.export(optimized, (X,), dynamic_shapes=(({0: torch.export.Dim("n")},),))
    for x in (X, torch.cat([X, X])):
        torch.testing.assert_close(program.module()(x), optimized(x))


@pytest.mark.slow
def test_compiles_around_what_cannot_be_traced():
    optimized = effkern.optimize(fallback())
    torch._dynamo.reset()
    compiled = torch.compile(optimized, backend="eager")
    with torch.no_grad():
        assert torch.equal(compiled(X), optimized(X))


def test_optimizing_twice_changes_nothing():
    optimized = effkern.optimize(network())
    again = effkern.optimize(optimized)
    assert isinstance(again, Optimized) and torch.equal(again(X), optimized(X))
    inside = effkern.optimize(nn.Sequential(optimized, nn.ReLU()).eval())
    assert torch.equal(inside(X), optimized(X).relu())


def test_the_report_is_a_table_and_data():
    report = effkern.optimize(network(), X).report()
    assert isinstance(report, Report) and 0 <= report.error < 1e-5
    text = str(report)
    assert "replaced" in text and "conv1" in text and text.count("\n") == len(report.rows) + 1
    assert {row.action for row in report.rows} <= {"replaced", "removed", "left"}
    assert len(report.replaced) + len(report.removed) + len(report.left) == len(report.rows)
    assert "3->8 3x3 relu" in report.why("conv1")


def test_every_layer_of_the_model_is_in_the_report(model):
    told = {row.module for row in effkern.optimize(model).report().rows}
    layers = {n for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.BatchNorm2d | nn.Linear)}
    inside = {n for n in layers if any(n == t or (t and n.startswith(f"{t}.")) for t in told)}
    assert layers == inside


def test_repr_names_the_original():
    assert "CifarResNet" in repr(effkern.optimize(network()))
    assert "Optimized" in repr(effkern.optimize(nn.Sequential(block()).eval()))
