"""Both phases on the training loop."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from effkern.blockdrop import BlockDropNet, JointTraining, PolicyNet, PolicyTraining, evaluate, fixed_policy
from effkern.data import BatchFeed, load_digits
from effkern.models import create_model
from effkern.nn import skip_form
from effkern.training import CheckpointError, Criterion, Recipe, Run, Step, Supervised, train

K, DATA = 5, load_digits()
RECIPE = Recipe(epochs=0.1, lr=1e-3, optimizer="adam", weight_decay=0.0, batch_size=32, schedule="constant")


def both(blocks=(2, 1, 2)) -> BlockDropNet:
    torch.manual_seed(0)
    backbone = create_model("resnet20", in_channels=1, widths=(4, 6, 8), blocks=blocks, stem_stride=2, shortcut="pool")
    return BlockDropNet(skip_form(backbone), PolicyNet(sum(blocks), 1, (4, 4, 4), stem_stride=2))


def go(method, recipe=RECIPE, **options):
    feed = BatchFeed(DATA, DATA.train, recipe.batch_size, recipe.seed)
    return train(method, feed, recipe, held_out=lambda: DATA.batches(DATA.val, 100), **options)


def test_phase_a_trains_the_policy_alone(tmp_path):
    net = both()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    result = go(PolicyTraining(net), run=Run(tmp_path))
    changed = {name.split(".")[0] for name, value in net.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"policy"} and result.steps == 4
    assert (tmp_path / "train.csv").read_text().startswith("step,loss,reward,usage,free,lr\n")
    assert set(result.metrics) == {"reward", "top1", "blocks", "patterns", "top1_forced", "blocks_forced"}


def test_the_curriculum_follows_the_run_and_is_saved():
    method = PolicyTraining(both())
    assert [method.free(Step(0, epoch=e)) for e in (0, 1, 3, 4, 9)] == [1, 2, 4, 5, 5]
    half = PolicyTraining(both(), ramp=0.5)
    assert [half.free(Step(0, fraction=f)) for f in (0, 0.09, 0.11, 0.25, 0.41, 0.5, 1)] == [1, 1, 2, 3, 5, 5, 5]
    slow = PolicyTraining(both(), blocks_per_epoch=0.5)
    assert [slow.free(Step(0, epoch=e)) for e in (0, 1, 2, 5, 9)] == [1, 1, 2, 3, 5]
    assert PolicyTraining(both(), curriculum=False).free(Step(0)) == K
    x, y = DATA.normalize(DATA.val.images[:8]), DATA.val.labels[:8]
    list(method.losses(x, y, Step(7, epoch=2)))
    resumed = PolicyTraining(both())
    resumed.load_state_dict(method.state_dict())
    assert int(resumed.free_blocks) == 3


@pytest.mark.parametrize("samples", [1, 3])
def test_a_batch_in_parts_draws_what_the_whole_draws(samples):
    x, y = DATA.normalize(DATA.val.images[:12]), DATA.val.labels[:12]
    gradients = []
    for parts in (1, 3):
        net = both().eval()
        method = PolicyTraining(net, curriculum=False, samples=samples)
        for part in range(parts):
            rows = slice(part * 12 // parts, (part + 1) * 12 // parts)
            (loss,) = method.losses(x[rows], y[rows], Step(2, part=part, parts=parts))
            (loss / parts).backward()
        gradients.append(net.policy.linear.weight.grad)
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-6)


def test_phase_b_draws_for_parts_what_it_draws_for_the_whole():
    method, drawn = JointTraining(both()), []
    method.objective = lambda net, x, y, uniform: (drawn.append(uniform), torch.zeros(()))[1]
    method.objective.take = dict
    x, y = torch.zeros(12, 1, 28, 28), torch.zeros(12, dtype=torch.long)
    list(method.losses(x, y, Step(5, seed=1)))
    for part in range(3):
        list(method.losses(x[:4], y[:4], Step(5, seed=1, part=part, parts=3)))
    assert drawn[0].shape == (12, K) and torch.equal(torch.cat(drawn[1:]), drawn[0])
    list(method.losses(x, y, Step(6, seed=1)))
    assert not torch.equal(drawn[-1], drawn[0])


@pytest.mark.parametrize("bn_stats", ["active", "all", "frozen"])
def test_phase_b_trains_both_at_their_rates(tmp_path, bn_stats):
    net = both()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    method = JointTraining(net, bn_stats=bn_stats, policy_lr=0.2)
    go(method, run=Run(tmp_path))
    moved = {
        name: (value - before[name]).abs().max().item() for name, value in net.named_parameters() if value.dim() > 1
    }
    # Adam's first steps are as long as the rate
    assert 0 < max(v for name, v in moved.items() if name.startswith("policy")) < 5 * 0.2e-3
    assert max(v for name, v in moved.items() if name.startswith("backbone")) > 1.1e-3
    assert set(method.report()) == {"by_block", "by_class"} and len(method.report()["by_block"]) == K
    statistics = [name for name in before if "backbone" in name and "running" in name]
    same = all(torch.equal(net.state_dict()[name], before[name]) for name in statistics)
    assert same == (bn_stats == "frozen")


def test_a_resumed_phase_is_the_same_to_the_bit(tmp_path):
    whole, halves = both(), both()
    go(JointTraining(whole), run=Run(tmp_path / "whole"))

    class Stops(JointTraining):
        def after_step(self, at: Step) -> None:
            if at.number == 1:
                raise InterruptedError

    with pytest.raises(InterruptedError):
        go(Stops(halves), run=Run(tmp_path / "halves", save_every_s=0.0))
    halves = both()
    go(JointTraining(halves), run=Run(tmp_path / "halves"))
    assert all(
        torch.equal(a, b) for a, b in zip(whole.state_dict().values(), halves.state_dict().values(), strict=True)
    )


def test_a_checkpoint_of_another_k_is_named(tmp_path):
    go(PolicyTraining(both()), run=Run(tmp_path))
    with pytest.raises(CheckpointError, match=r"does not fit .* policy over 5 blocks, the network has 4"):
        go(PolicyTraining(both((2, 1, 1))), run=Run(tmp_path))


def test_reward_of_an_evaluation_by_hand():
    class Fixed(nn.Module):
        num_blocks = 2

        def forward(self, x, keep):
            return torch.stack([keep[:, 0].float(), 0.5 * torch.ones(len(x))], 1)

    class Policy(nn.Module):
        num_blocks = 2

        def forward(self, x):
            return torch.stack([x[:, 0], -torch.ones(len(x))], 1)

    method = PolicyTraining(BlockDropNet(Fixed(), Policy()), gamma=3.0)
    batch = (torch.tensor([[1.0], [-1.0], [1.0], [-1.0]]), torch.tensor([0, 0, 1, 1]))
    metrics = method.evaluate([batch])
    # right with one of two blocks; wrong; wrong; right with none
    assert metrics["reward"] == pytest.approx((0.75 - 3 - 3 + 1) / 4)
    assert (metrics["top1"], metrics["blocks"], metrics["patterns"]) == (50.0, 0.5, 2)
    # While the first block is not yet free it runs for every image.
    assert (metrics["top1_forced"], metrics["blocks_forced"]) == (50.0, 1.0)
    for kind in (PolicyTraining, JointTraining):
        dear = kind(BlockDropNet(Fixed(), Policy()), gamma=3.0, cost=torch.tensor([3.0, 1.0]), overhead=1.0)
        assert dear.evaluate([batch])["reward"] == pytest.approx((1 - 0.8**2 - 3 - 3 + 1 - 0.2**2) / 4)


def test_options_reach_the_losses():
    cost = torch.arange(1.0, 6)
    phase_a = PolicyTraining(
        both(), 2.0, 0.7, 0.3, "published", 3, cost=cost, overhead=6.0, credit="probability"
    ).gradient
    assert (phase_a.gamma, phase_a.a, phase_a.beta) == (2.0, 0.7, 0.3)
    assert (phase_a.entropy_form, phase_a.samples) == ("published", 3)
    judge = Criterion(0.1)
    options = {"cost": cost, "overhead": 6.0, "beta": 0.4, "criterion": judge, "credit": "probability"}
    phase_b = JointTraining(both(), 2.0, 0.7, 3.0, "all", **options).objective
    assert phase_b.beta == 0.4 and phase_b.criterion is judge
    assert (phase_b.gamma, phase_b.a, phase_b.pg_weight, phase_b.bn_stats) == (2.0, 0.7, 3.0, "all")
    for loss in (phase_a, phase_b):
        assert torch.equal(loss.cost, cost) and float(loss.overhead) == 6 and loss.credit == "probability"


def test_passes_without_gradient_run_the_skip_ops(monkeypatch):
    """Of phase A all of them, with what is forced on once; of phase B the baseline's."""
    import effkern.nn.skip as skip

    rows = []
    for name in ("skip_stage", "skip_basic_block"):
        real = getattr(skip, name)
        monkeypatch.setattr(
            skip,
            name,
            lambda x, keep, *rest, real=real, **more: (
                rows.append((torch.is_grad_enabled(), keep.shape[1] if keep.dim() == 2 else 1)),
                real(x, keep, *rest, **more),
            )[1],
        )
    monkeypatch.setattr(skip._direct, "stage", lambda *args: None)
    x, y = DATA.normalize(DATA.val.images[:8]), DATA.val.labels[:8]
    phase_a = PolicyTraining(both()).train()  # one block is free
    list(phase_a.losses(x, y, Step(0)))
    assert not any(grad for grad, _ in rows)
    assert sum(blocks for _, blocks in rows) == K - 1 + 2
    rows.clear()
    phase_b = JointTraining(both()).train()
    list(phase_b.losses(x, y, Step(0)))
    assert [grad for grad, _ in rows] == [False] * len(rows) and sum(blocks for _, blocks in rows) == K


@pytest.mark.parametrize("augment", [False, True])
def test_a_cache_of_the_forced_blocks_changes_nothing_but_the_work(augment):
    """Three epochs of which the first two have the same blocks free; the second finds what they see."""
    recipe, results = replace(RECIPE, epochs=3), []
    for cache in (0.0, 1e9):
        method, stems = PolicyTraining(both(), blocks_per_epoch=0.5, cache=cache), []
        method.net.backbone.conv1.register_forward_hook(lambda m, i, o, seen=stems: seen.append(len(o)))
        feed = BatchFeed(DATA, DATA.train[:128], 32, augment=augment)
        results.append((train(method, feed, recipe).losses, sum(stems), method.net.state_dict()))
    (losses, plain, weights), (cached_losses, cached, cached_weights) = results
    assert losses == cached_losses and all(torch.equal(w, cached_weights[name]) for name, w in weights.items())
    assert (plain, cached) == (384, 384 if augment else 256)


class Foreign(nn.Module):
    """A residual network of somebody else's, without convolutions: all it has of the protocol is what must be."""

    num_blocks = 3

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(64, 16), nn.Linear(16, 10)
        self.branches = nn.ModuleList(nn.Sequential(nn.Linear(16, 16), nn.Tanh()) for _ in range(3))

    def forward(self, x: torch.Tensor, keep: torch.Tensor | None = None) -> torch.Tensor:
        x = self.first(nn.functional.adaptive_avg_pool2d(x, 8).flatten(1))
        for k, branch in enumerate(self.branches):
            x = x + branch(x) if keep is None else x + keep[:, k : k + 1] * branch(x)
        return self.last(x)


def test_any_residual_network_learns_what_to_drop(tmp_path):
    """The whole method in front of a network that knows nothing of this package."""
    backbone = Foreign()
    learn = replace(RECIPE, epochs=3, lr=5e-3)
    go(Supervised(backbone), learn)
    batches = list(DATA.batches(DATA.val, 100))
    dense = evaluate(backbone, fixed_policy(torch.ones(3)), batches)
    assert dense.top1 > 80 and dense.blocks == 3
    net = BlockDropNet(backbone, PolicyNet(3, 1, (4, 4, 4), stem_stride=2, init=1.0))
    go(PolicyTraining(net, ramp=0.5), learn, run=Run(tmp_path / "policy"))
    result = go(JointTraining(net, policy_lr=0.5), replace(learn, epochs=2), run=Run(tmp_path / "joint"))
    assert result.metrics["blocks"] < 3 and result.metrics["top1"] > 80
    with torch.no_grad():
        x = batches[0][0]
        torch.testing.assert_close(net.eval()(x), backbone(x, net.decide(x).float()))
