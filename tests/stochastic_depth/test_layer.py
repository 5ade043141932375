"""The layer: what is drawn, how it is scaled, and that what is dropped is not computed."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from effkern.nn import ResidualBlock, StochasticBlock, StochasticDepth, draw_keep, stochastic_depth
from effkern.stochastic_depth import expected_depth, survival_schedule


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_schedules_by_hand():
    assert survival_schedule(3, 0.7).tolist() == pytest.approx([0.9, 0.8, 0.7])
    assert survival_schedule(3, 0.7, "uniform").tolist() == pytest.approx([0.7] * 3)
    assert survival_schedule(3, 0.7, "linspace").tolist() == pytest.approx([1, 0.85, 0.7])
    assert expected_depth(survival_schedule(54, 0.5)) == pytest.approx(40.25)  # ResNet-110, published
    assert expected_depth(survival_schedule(15, 0.3)) == pytest.approx(15 - 0.7 * 16 / 2)
    for options, name in (({"last": -0.1}, "last"), ({"last": 1.1}, "last"), ({"form": "cosine"}, "form")):
        with pytest.raises(ValueError, match=f"{name}: must be"):
            survival_schedule(3, **options)


def test_draws_have_their_rates():
    survival = torch.tensor([0.0, 0.6, 1.0])
    rate = draw_keep(survival, 10_000, "row", generator()).double().mean(0)
    assert rate[0] == 0 and rate[2] == 1 and abs(rate[1] - 0.6) <= 4 * math.sqrt(0.24 / 10_000)
    shared = torch.cat([draw_keep(survival, 3, "batch", generator(i))[:1] for i in range(4000)]).double().mean(0)
    assert shared[0] == 0 and shared[2] == 1 and abs(shared[1] - 0.6) <= 4 * math.sqrt(0.24 / 4000)
    whole = draw_keep(torch.full((9,), 0.5), 6, "batch", generator())
    assert whole.shape == (6, 9) and (whole == whole[:1]).all()


def test_a_subset_has_a_fixed_count_that_is_right_on_average():
    # 10 * 0.25 is 2.5: 2 or 3 samples, never DINOv2's truncated 2 (or 7 of 10 at p_drop 0.25) alone
    counts = torch.stack([draw_keep(torch.tensor([0.25, 0.9]), 10, "subset", generator(i)).sum(0) for i in range(4000)])
    assert set(counts[:, 0].tolist()) == {2, 3} and set(counts[:, 1].tolist()) == {9}
    assert abs(counts[:, 0].double().mean() - 2.5) <= 4 * 0.5 / math.sqrt(4000)
    rows = torch.stack([draw_keep(torch.tensor([0.3]), 5, "subset", generator(i))[:, 0] for i in range(4000)])
    assert (rows.double().mean(0) - 0.3).abs().max() <= 4 * math.sqrt(0.21 / 4000)  # every sample alike


class Linear(nn.Module):
    """A branch that counts the samples it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(2.0))
        self.seen: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(len(x))
        return self.weight * x


@pytest.mark.parametrize("mode", ["batch", "row", "subset"])
@pytest.mark.parametrize(("scale", "mean"), [("original", 0.3 * 2), ("inverted", 2.0), ("none", 0.3 * 2)])
def test_expectation_in_training_is_inference(mode, scale, mean):
    x, branch, draws = torch.ones(8, 1), Linear(), 3000
    layer = StochasticDepth(branch, 0.3, mode, scale)
    got = torch.stack([layer(x) for _ in range(draws)]).detach().double() - 1
    step = 2 / 0.3 if scale == "inverted" else 2.0
    spread = step * math.sqrt(0.21 / (draws if mode == "batch" else draws * 8))
    assert abs(got.mean() - mean) <= 4 * spread
    assert set(got.flatten().mul(1e4).round().tolist()) == {0.0, float(round(step * 1e4))}
    assert (layer.eval()(x) - 1).mean().item() == pytest.approx(2.0 if scale == "none" else mean)


def test_only_kept_samples_are_computed():
    x, branch = torch.randn(8, 4), Linear()
    keep = torch.tensor([1, 0, 0, 1, 0, 0, 0, 1]).bool()
    y = stochastic_depth(x, branch, 0.5, keep=keep)
    assert branch.seen == [3]
    assert torch.equal(y, torch.where(keep[:, None], 3 * x, x))
    assert stochastic_depth(x, branch, 0.5, keep=torch.zeros(8, dtype=torch.bool)) is x and branch.seen == [3]
    y.sum().backward()
    assert branch.weight.grad.item() == pytest.approx(x[keep].sum().item(), rel=1e-5)


@pytest.mark.parametrize("scale", ["original", "inverted", "none"])
def test_ends_are_exact(scale):
    x = torch.randn(4, 2)

    def endless(x: Tensor) -> Tensor:
        return x / 0

    assert torch.equal(stochastic_depth(x, endless, 0.0, mode="row", scale=scale), x)
    assert torch.equal(stochastic_depth(x, endless, 0.0, mode="batch", scale=scale), x)
    assert torch.equal(stochastic_depth(x, lambda v: v, 1.0, mode="row", scale=scale), 2 * x)
    if scale == "original":
        assert torch.equal(stochastic_depth(x, endless, 0.0, scale=scale, training=False), x)


def test_wrong_values_are_named():
    for options, name in (({"survival": 1.2}, "survival"), ({"mode": "rows"}, "mode"), ({"scale": "keep"}, "scale")):
        given = {"survival": 0.5, **options}
        with pytest.raises(ValueError, match=f"{name}: must be"):
            stochastic_depth(torch.ones(2), lambda x: x, **given)
        with pytest.raises(ValueError, match=f"{name}: must be"):
            StochasticDepth(nn.Identity(), **given)
        with pytest.raises(ValueError, match=f"{name}: must be"):
            StochasticBlock.from_block(ResidualBlock(2, 2), **given)
    with pytest.raises(ValueError, match=r"survival: must be \[K\] probabilities"):
        draw_keep(torch.tensor([float("nan")]), 3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_scale_is_not_rounded_to_the_dtype(dtype):
    x = (torch.randn(4000, generator=generator()) + 3).to(dtype)
    y = stochastic_depth(x, lambda v: v, 0.9, scale="inverted", keep=torch.ones(4000), shortcut=torch.zeros_like(x))
    ratio = (y.double().sum() / x.double().sum()).item()
    assert ratio == pytest.approx(1 / 0.9, rel=1e-3 / 2)
    assert abs((torch.tensor(1 / 0.9, dtype=torch.bfloat16).item() * 0.9) - 1) > 1e-3  # what rounding would do


def test_batch_norm_sees_the_kept_samples_only():
    block = ResidualBlock(3, 3, shortcut="identity")
    x = torch.randn(6, 3, 5, 5)
    for keep, changes in (([1, 0, 1, 1, 0, 0], True), ([0, 1, 0, 0, 0, 0], False), ([0] * 6, False)):
        some, alone = StochasticBlock.from_block(block, 0.5).train(), ResidualBlock(3, 3, shortcut="identity")
        alone.load_state_dict(block.state_dict())
        before = {name: buffer.clone() for name, buffer in some.named_buffers()}
        mask = torch.tensor(keep).bool()
        y = some(x, mask)
        if changes:
            want = alone.train()(x[mask])
            torch.testing.assert_close(y[mask], want)
            assert all(torch.equal(a, b) for a, b in zip(some.buffers(), alone.buffers(), strict=True))
        else:
            assert all(torch.equal(before[name], buffer) for name, buffer in some.named_buffers())
        assert torch.equal(y[~mask], x[~mask].relu())


def test_batch_norm_of_any_branch_does_without_statistics_of_one_sample():
    layer = StochasticDepth(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)), 0.5).train()
    x, before = torch.randn(4, 3, 5, 5), [buffer.clone() for buffer in layer.buffers()]
    one, two = torch.tensor([0, 0, 1, 0]).bool(), torch.tensor([1, 0, 1, 0]).bool()
    want = x[2:3] + layer.branch.eval()(x[2:3])
    layer.train()
    torch.testing.assert_close(layer(x, one)[2:3], want)
    assert all(torch.equal(old, new) for old, new in zip(before, layer.buffers(), strict=True))
    assert all(module.training for module in layer.modules())
    layer(x, two)
    assert not torch.equal(before[0], next(layer.buffers()))


def test_a_dropped_block_ends_in_its_relu():
    """With a convolution as shortcut, a dropped block of BlockDrop passes signed values on; this one does not."""
    block = StochasticBlock.from_block(ResidualBlock(2, 4, 2, shortcut="conv"), 0.5)
    x, keep = torch.randn(5, 2, 6, 6), torch.zeros(5, dtype=torch.bool)
    assert torch.equal(block(x, keep), block.shortcut(x).relu())


def test_gradients_are_those_of_the_masked_form():
    block = ResidualBlock(3, 4, 2, "bottleneck").double().eval()
    stochastic = StochasticBlock.from_block(block, 0.5, scale="inverted")
    x, keep = torch.randn(6, 3, 6, 6, dtype=torch.float64), torch.tensor([1, 0, 1, 1, 0, 1]).bool()
    weights = torch.randn(6, 16, 3, 3, dtype=torch.float64)
    parameters = list(block.parameters())
    stochastic.training = True  # the block draws; its batch norms stay in eval mode
    got = torch.autograd.grad((stochastic(x, keep) * weights).sum(), parameters)
    masked = (block.shortcut(x) + keep.double().view(-1, 1, 1, 1) * 2 * block.residual(x)).relu()
    want = torch.autograd.grad((masked * weights).sum(), parameters)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


def test_two_ranks_with_sync_draw_the_same(tmp_path):
    """Layer, function and block; without it each rank draws for itself."""
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("ranks.py"), tmp_path],
        env={**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = ((tmp_path / f"{rank}.txt").read_text().splitlines() for rank in (0, 1))
    assert len(first) == len(second) == 6
    assert first[:3] == second[:3] and all(a != b for a, b in zip(first[3:], second[3:], strict=True))
    for line in first:
        assert len(line.split()) == 24 and 0 < line.count("1") < line.count("0") + line.count("1")
