"""Forwards that are no fixed sequence of calls although they can be traced: state, randomness, modes, layouts."""

from __future__ import annotations

import copy
import random

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad

import effkern
from tests.inference.common import lived_in, ops, optimized_and_same

X = torch.randn(2, 4, 6, 5, generator=torch.Generator().manual_seed(0))


def conv(k=3, **options):
    return nn.Conv2d(4, 4, k, padding=k // 2, **options)


class Runs(nn.Module):
    """A forward given as a function of the module and x, and whatever else the module holds."""

    def __init__(self, run, **held):
        super().__init__()
        self.run = run
        for name, value in held.items():
            self.register_buffer(name, value) if isinstance(value, torch.Tensor) else setattr(self, name, value)

    def forward(self, x):
        return self.run(self, x)


def count_in_a_buffer(self, x):
    self.state.add_(1)
    return self.conv(x) * self.state


def smooth_in_a_buffer(self, x):
    self.state.mul_(0.5).add_(x.mean())
    return self.conv(x) + self.state


def keep_the_last(self, x):
    y = self.conv(x) + self.last
    self.last = y.mean()
    return y


def count(self, x):
    self.n += 1
    return self.conv(x) * self.n


def collect(self, x):
    self.seen.append(x.shape)
    return self.conv(x) * len(self.seen)


def cache_a_grid(self, x):
    y = self.conv(x)
    if self.last is None or self.last.shape != y.shape:
        self.last = torch.arange(y.shape[-1]) * torch.ones_like(y)
    return y + self.last


STATEFUL = {
    "counter in a buffer": (count_in_a_buffer, {"state": torch.zeros(())}, "writes"),
    "moving average in a buffer": (smooth_in_a_buffer, {"state": torch.zeros(())}, "writes"),
    "result of the last call": (keep_the_last, {"last": 0.0}, "sets the attribute"),
    "number of calls": (count, {"n": 0}, "sets the attribute"),
    "list of calls": (collect, {"seen": []}, "what seen holds"),
    "grid made when shapes change": (cache_a_grid, {"last": None}, ""),
}


@pytest.mark.parametrize("case", STATEFUL)
@pytest.mark.parametrize("nested", [False, True], ids=["root", "nested"])
@torch.no_grad()
def test_a_forward_that_keeps_state_goes_on_doing_so(case, nested):
    run, held, why = STATEFUL[case]
    stateful = Runs(run, conv=conv(), **copy.deepcopy(held))
    model = lived_in(nn.Sequential(conv(), nn.ReLU(), stateful) if nested else stateful)
    twin = copy.deepcopy(model)
    result = effkern.optimize(model)
    assert why in result.report().why("2" if nested else "")
    assert len(ops(result)) == 1 + nested  # the convolutions in it are optimized all the same
    for x in (X, X[:1], X, X * 2):
        assert torch.allclose(result(x), twin(x), atol=1e-5)


def test_random_numbers_are_drawn_at_every_call():
    for noise in (
        lambda self, x: self.conv(x) + torch.randn(1, 4, 1, 1),
        lambda self, x: self.conv(x) + random.random(),
    ):
        result = effkern.optimize(Runs(noise, conv=conv()).eval())
        assert "random" in result.report().why("")
        assert not torch.equal(result(X), result(X))


def bfloat16_inside(self, x):
    with torch.autocast("cpu", torch.bfloat16):
        return self.conv(x)


@torch.no_grad()
def test_autocast_switched_on_inside_stays_on():
    for model in (Runs(bfloat16_inside, conv=conv()), nn.Sequential(conv(), Runs(bfloat16_inside, conv=conv()))):
        model.eval()
        y = effkern.optimize(model)(X)
        assert y.dtype == torch.bfloat16 and torch.allclose(y, model(X), atol=0.05)


def gradient_inside(self, x):
    with torch.enable_grad():
        z = x.detach().clone().requires_grad_()
        return torch.autograd.grad(self.conv(z).square().sum(), z)[0]


@pytest.mark.parametrize("outer", [False, True])
def test_a_forward_may_differentiate(outer):
    for model in (Runs(gradient_inside, conv=conv()), nn.Sequential(conv(), Runs(gradient_inside, conv=conv()))):
        model.eval()
        result = effkern.optimize(model)
        with torch.set_grad_enabled(outer):
            assert torch.allclose(result(X), model(X), atol=1e-4)


def test_an_error_caught_by_the_forward_is_not_taken_for_its_answer():
    def run(self, x):
        try:
            large = bool(x.sum() > 1e9)
        except Exception:
            large = True
        return self.conv(x) * (2 if large else 1)

    result = optimized_and_same(Runs(run, conv=conv()).eval(), X)
    assert "control flow" in result.report().why("")


def test_forward_mode_is_refused_instead_of_called_zero():
    result = effkern.optimize(conv().eval())
    with forward_ad.dual_level():
        assert result(X).shape == X.shape
        with pytest.raises(NotImplementedError, match="forward-mode"):
            result(forward_ad.make_dual(X, X))


@pytest.mark.parametrize(
    "run",
    [
        lambda self, x: torch.flatten(self.conv(x), 2),
        lambda self, x: nn.Flatten(2)(self.conv(x)).view(8, -1),
        lambda self, x: torch.flatten(self.conv(x), 2).view(8, -1),
        lambda self, x: self.conv(x).flatten(0, 1).view(2, -1),
        lambda self, x: self.conv(x).flatten(1).view(4, -1),
        lambda self, x: torch.as_strided(self.conv(x), (4, 5), (7, 1)),
    ],
)
def test_views_have_the_original_layout(run):
    optimized_and_same(Runs(run, conv=conv()).eval(), X)


def test_one_image_as_example_does_not_hide_a_broadcast_sum():
    models = (
        Runs(lambda self, x: self.conv(x) + self.at, conv=conv(), at=torch.randn(1, 4, 6, 5)),
        Runs(lambda self, x: self.conv(x) + x.mean(0, keepdim=True), conv=conv()),
        Runs(lambda self, x: self.conv(x) + F.adaptive_max_pool2d(x, 1), conv=conv()),
    )
    for model in models:
        optimized_and_same(model.eval(), X, example=X[:1])
    optimized_and_same(models[2], X, example=X[:1, :, :1, :1])


class FrozenBatchNorm2d(nn.Module):
    """DETR's: without ``eps``. A network's own class of a known name may compute anything."""

    def __init__(self):
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.rand(4) + 0.5)

    def forward(self, x):
        weight, bias, mean, var = (t.reshape(1, -1, 1, 1) for t in self.buffers())
        scale = weight * (var + 1e-3).rsqrt()
        return x * scale + (bias - mean * scale)


def test_a_norm_is_not_known_by_its_name():
    optimized_and_same(nn.Sequential(conv(), FrozenBatchNorm2d(), nn.ReLU()).eval(), X)


@torch.no_grad()
def test_parts_may_have_the_names_of_what_an_optimized_network_has():
    held = {name: torch.randn(4, 1, 1) for name in ("_source", "_title", "_report", "source")}
    model = Runs(lambda self, x: self.report(self.conv(x)) + sum(getattr(self, name) for name in held), **held)
    model.report, model.conv = nn.Sigmoid(), conv()
    result = effkern.optimize(model.eval(), X)
    assert torch.allclose(copy.deepcopy(result)(X), model(X), atol=1e-5)
    assert result.report().left


def test_the_report_sees_nan():
    class Spoils(nn.Module):
        calls = 0

        def forward(self, x):
            Spoils.calls += 1  # on the class: nothing can notice
            return x if Spoils.calls <= 1 else x * float("nan")

    model = nn.Sequential(conv(), Spoils()).eval()
    assert effkern.optimize(model, X).report().error == float("inf")
    assert effkern.optimize(conv().eval(), X * float("nan")).report().error == 0


def test_refusals_are_the_exceptions_that_are_documented():
    result = effkern.optimize(nn.Sequential(conv(), nn.ReLU()).eval())
    with pytest.raises(ValueError, match=r"takes batches.*\[4, 6, 5\]"):
        result(X[0])
    with pytest.raises(TypeError, match="float32, bfloat16 or float16"):
        result(X.double())
    with pytest.raises(ValueError, match="channels"):
        result(X[:, :3])


def test_a_network_without_numbers_is_left():
    report = effkern.optimize(nn.Sequential(conv(), nn.BatchNorm2d(4), nn.ReLU()).eval().to("meta")).report()
    assert not report.replaced and "meta" in report.why("0") and "meta" in report.why("1")


def test_hooks_of_all_modules_are_called():
    handle = nn.modules.module.register_module_forward_hook(lambda m, args, y: y + 1 if type(m) is nn.Conv2d else y)
    try:
        optimized_and_same(nn.Sequential(conv(), nn.ReLU()).eval(), X)
    finally:
        handle.remove()
