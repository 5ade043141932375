"""What blocks cost, and that a reward may count it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from effkern.blockdrop import BlockDropNet, JointTraining, PolicyNet, PolicyTraining, block_costs, cost, reward
from effkern.models import create_model
from effkern.nn import skip_form
from effkern.training import Step, Timing, count_macs

K = 3


def both() -> BlockDropNet:
    torch.manual_seed(0)
    net = create_model("resnet20", in_channels=1, widths=(4, 6, 8), blocks=(1, 1, 1), shortcut="conv")
    return BlockDropNet(skip_form(net), PolicyNet(K, 1, (4, 4)))


def test_multiply_adds_are_those_of_the_networks():
    net = both()
    each, rest = block_costs(net, (1, 8, 8))
    always, blocks = net.backbone.block_macs((1, 8, 8))
    policy = count_macs(net.policy, torch.zeros(1, 1, 8, 8))
    assert each.tolist() == blocks and rest == always + policy and policy > 0


def test_times_are_differences(monkeypatch):
    """A block's is that of its stretch less that of its shortcut; everything else is what every image pays."""
    asked = []

    def fake(functions, *, seconds):
        for function in functions.values():
            function()
        asked.extend(functions)
        ms = {
            "policy": 1.0,
            "stem": 2.0,
            "head": 4.0,
            "with 0": 10.0,
            "without 0": 8.0,
            "with 1": 5.0,
            "without 1": 6.0,
        }
        return {name: Timing(ms.get(name, 3.0), 0.0, 10) for name in functions}

    monkeypatch.setattr(cost, "measure", fake)
    each, rest = block_costs(both(), (1, 8, 8), "time")
    assert each.tolist() == [2.0, 0.0, 0.0] and rest == 1 + 2 + 4 + 8 + 6 + 3
    assert len(asked) == 2 * K + 3


def test_measuring_leaves_the_network_as_it_was():
    net = both().train()
    net.policy.bn1.eval()
    modes, before = [m.training for m in net.modules()], {k: v.clone() for k, v in net.state_dict().items()}
    each, rest = block_costs(net, (1, 8, 8), "time", batch=2, seconds=0.0)
    assert each.shape == (K,) and (each >= 0).all() and rest > 0
    assert [m.training for m in net.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_what_has_no_costs_is_named():
    class Foreign(nn.Module):
        num_blocks = K

    net = BlockDropNet(Foreign(), PolicyNet(K, 1, (4,)))
    for kind, part in (("macs", "block_macs"), ("time", "stem")):
        with pytest.raises(ValueError, match=rf"backbone: Foreign has no {part}\(\)"):
            block_costs(net, (1, 8, 8), kind)
    with pytest.raises(ValueError, match="kind must be 'macs' or 'time', got 'joules'"):
        block_costs(both(), (1, 8, 8), "joules")


@pytest.mark.parametrize("kind", [PolicyTraining, JointTraining])
def test_a_run_goes_on_with_the_costs_it_began_with(kind):
    """Measured ones would be others each time."""
    begun = kind(both(), cost=torch.tensor([1.0, 2.0, 3.0]), overhead=4.0)
    resumed = kind(both(), cost=torch.tensor([7.0, 7.0, 7.0]), overhead=7.0)
    resumed.load_state_dict(begun.state_dict())
    losses = []
    x = torch.randn(6, 1, 8, 8)
    y = begun.eval().net(x).argmax(1)  # an answer that is wrong is worth the same at any cost
    for method in (begun, resumed, kind(both())):
        method.eval()
        losses.append([loss.item() for loss in method.losses(x, y, Step(1))])
        if method.cost is None:
            break
        got = method.evaluate([(x, y)])["reward"]
        want = reward(method.usage.correct, method.usage.keep, method.gamma, torch.tensor([1.0, 2.0, 3.0]), 4.0)
        assert got == pytest.approx(float(want.mean()))
    assert losses[0] == losses[1] != losses[2]
    # One from before costs were kept leaves them as they are.
    older = {name: value for name, value in begun.state_dict().items() if name not in ("cost", "overhead")}
    resumed.load_state_dict(older)
    assert resumed.cost.tolist() == [1.0, 2.0, 3.0]
    assert not {"cost", "overhead"} & kind(both()).state_dict().keys()


def test_draws_are_rewarded_by_their_cost():
    """The dear block alone, or both cheap ones: with costs the second is worth more, by number the first."""

    class Right(nn.Module):
        num_blocks = K

        def forward(self, x: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
            return torch.tensor([[1.0, 0.0]]).expand(len(x), 2)

    one, two = torch.tensor([[1, 0, 0]]), torch.tensor([[0, 1, 1]])
    by_cost = [float(reward(torch.ones(1), keep, 1.0, torch.tensor([5.0, 1, 1]))) for keep in (one, two)]
    assert by_cost[0] < by_cost[1] and reward(torch.ones(1), one) > reward(torch.ones(1), two)
    method = PolicyTraining(BlockDropNet(Right(), PolicyNet(K, 1, (4,))), cost=torch.tensor([5.0, 1, 1]), overhead=1.0)
    at = Step(0)
    list(method.eval().losses(torch.randn(4, 1, 8, 8), torch.zeros(4, dtype=torch.long), at))
    assert any(at.metrics["reward"] == pytest.approx(n / 4 * (1 - (7 / 8) ** 2)) for n in range(5))
