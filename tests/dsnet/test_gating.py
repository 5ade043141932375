"""Gate training: its loss by hand, what it trains, that it comes back from a stop, and what it is for."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from effkern.data import BatchFeed
from effkern.dsnet import GateTraining, expected_cost, gumbel_noise, gumbel_softmax
from effkern.dsnet.gating import _weights
from effkern.dsnet.route import configuration
from effkern.training import Recipe, Run, Step, train
from tests.dsnet.gated import CASES, DATA, IMAGE, TWO, batch, network

AT = Step(3, seed=5)


def method(net=None, **options) -> GateTraining:
    return GateTraining(network() if net is None else net, IMAGE, **options).train()


def parts(net, x, tau=1.0):
    """Attended maps, logits, noise and choice at the first gate of a network."""
    gate = net.gates[0]
    a, z = gate.decide(net.segment(0, x, 0), 0)
    noise = gumbel_noise(AT.uniform(len(x), len(gate.space), stream=1))
    return a, z, noise, gumbel_softmax(z, noise, tau)


def test_the_whole_loss_by_hand():
    x, y = batch()
    trained = method(sgs="logits", task=2.0, sgs_weight=3.0, cost="relative", cost_weight=0.5)
    (loss,) = trained.losses(x, y, AT)
    net = network()
    a, z, _, choice = parts(net, x)
    task = F.cross_entropy(net.segment(1, a, _weights(choice, (0, 1, 2)), 0), y, label_smoothing=0.1)
    easy = net(x, 0).argmax(1) == y
    sgs = F.cross_entropy(z, torch.where(easy, 0, 2))
    cost = (expected_cost(trained.costs, [choice]).mean() / trained.most) ** 2
    assert 0 < easy.float().mean() < 1 or not easy.any()
    torch.testing.assert_close(loss.double(), 2 * task + 3 * sgs + 0.5 * cost, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", ["logits", "published"])
def test_the_labels_of_two_gates_by_hand(form):
    """The mean over the gates, each towards its own end, where the first has two choices and the second three."""
    (x, y), net, tau = batch(), network("ds_resnet", TWO["ds_resnet"]), 0.5
    trained = method(net, sgs=form, task=0.0, cost="none", tau=tau, gate_smoothing=0.1)
    (loss,) = trained.losses(x, y, AT)
    a, first, noise, choice = parts(net, x, tau)
    at = configuration(net, 1, _weights(choice, (0, 2)), 0)
    _, second = net.gates[1].decide(net.segment(1, a, at, 0), at)
    scored = [(first, noise), (second, gumbel_noise(AT.uniform(len(x), 3, stream=2)))]
    easy = net.along(x, (0, 0)).argmax(1) == y
    assert 0 < easy.float().mean() < 1
    losses = [
        F.cross_entropy(
            z if form == "logits" else ((z + g) / tau).softmax(1), torch.where(easy, 0, end), label_smoothing=0.1
        )
        for (z, g), end in zip(scored, (1, 2), strict=True)
    ]
    torch.testing.assert_close(loss, sum(losses) / 2, rtol=1e-5, atol=1e-5)


def test_the_expected_answers_of_two_gates_by_hand():
    """Every choice of a gate stands for the even ways that take it: two of the first gate's choices share three."""
    (x, y), net = batch(), network("ds_resnet", TWO["ds_resnet"])
    trained = method(net, sgs="expected", task=0.0, cost="relative", cost_weight=3.0, sgs_weight=2.0, entropy=0.3)
    (loss,) = trained.losses(x, y, AT)
    _, first, _, choice = parts(net, x)
    at = configuration(net, 1, _weights(choice, (0, 2)), 0)
    a = net.gates[0].decide(net.segment(0, x, 0), 0)[0]
    _, second = net.gates[1].decide(net.segment(1, a, at, 0), at)
    slim, middle, wide = (net.along(x, way).argmax(1) == y for way in ((0, 0), (0, 1), (2, 2)))
    p, q = first.softmax(1), second.softmax(1)
    one = (p[:, 0] * (slim.float() + middle.float()) / 2 + p[:, 1] * wide).mean()
    two = (q[:, 0] * slim + q[:, 1] * middle + q[:, 2] * wide).mean()
    spread = sum(-(s * s.log()).sum(1).mean() for s in (p, q))
    cost = 3 * (expected_cost(trained.costs, [p, q]).mean() / trained.most) ** 2  # of probabilities: nothing is drawn
    torch.testing.assert_close(loss.double(), -2 * (one + two + 0.3 * spread) / 2 + cost, rtol=1e-5, atol=1e-6)


def test_the_gradient_of_choices_has_their_temperature():
    x, y = batch()
    trained = method(sgs="none", task=0.0, cost="relative", tau=0.3)
    (loss,) = trained.losses(x, y, AT)
    net = trained.net
    *_, choice = parts(net, x, 0.3)
    want = 0.5 * (expected_cost(trained.costs, [choice]).mean() / trained.most) ** 2
    grads = [torch.autograd.grad(value, net.gates[0].slim.weight)[0] for value in (loss, want)]
    assert grads[0].any()
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize(
    ("cost", "want"),
    [
        ("published", lambda c, most: 0.5 * (c / 1e9) ** 2),
        ("relative", lambda c, most: 0.5 * (c / most) ** 2),
        ("hinge", lambda c, most: 0.5 * max(c / (0.8 * most) - 1, 0)),
        ("none", lambda c, most: 0.0),
    ],
)
def test_costs_by_hand(cost, want):
    x, y = batch()
    trained = method(sgs="none", task=0.0, cost=cost, budget=0.8)
    (loss,) = trained.losses(x, y, AT)
    *_, choice = parts(network(), x)
    spent = float(trained.costs[choice.argmax(1)].double().mean())
    assert loss.item() == pytest.approx(want(spent, trained.most), rel=1e-5, abs=1e-12)


def test_pressure_grows_above_the_budget_and_falls_below():
    x, y = batch()
    for budget, sign in ((0.6, 1), (1.0, -1)):
        trained = method(cost="budget", budget=budget, cost_weight=0.1, sgs="none", task=0.0)
        trained.gates[0].offset.copy_(
            torch.tensor([0.0, 1e6, 0.0]) * (sign < 0) + torch.tensor([0, 0, 1e6]) * (sign > 0)
        )
        (loss,) = trained.losses(x, y, AT)
        spent = float(trained.costs[2 if sign > 0 else 1]) / (budget * trained.most)
        assert trained.pressure.item() == pytest.approx(0.1 * (spent - 1)) and sign * trained.pressure > 0
        *_, drawn = parts(network(), x)
        share = trained.costs[drawn.argmax(1)].double().mean() / trained.most
        assert loss.item() == pytest.approx(float(trained.pressure * share))
        before = trained.pressure.clone()
        trained.eval()
        list(trained.losses(x, y, AT))
        assert torch.equal(trained.pressure, before) and "pressure" in trained.state_dict()


@pytest.mark.parametrize(("name", "options"), CASES)
@pytest.mark.parametrize("heads", ["slim", "both"])
def test_only_the_gates_learn_and_statistics_stay(name, options, heads):
    net = network(name, options).train()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    trained, (x, y) = method(net, heads=heads), batch()
    (loss,) = trained.losses(x, y, AT)
    loss.backward()
    learned = {key for key, p in net.named_parameters() if p.grad is not None}
    assert learned == {
        key
        for key, _ in net.named_parameters()
        if ("slim" if heads == "slim" else "attention") in key
        and any(key.startswith(f"blocks.{i}.") for i in net._gated)
    }
    assert all(p.grad.any() for key, p in net.named_parameters() if "slim" in key)
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert not any(m.training for m in net.modules())


def test_the_tasks_gradient_reaches_the_logits_alone_too():
    trained, (x, y) = method(sgs="none", cost="none"), batch()
    (loss,) = trained.losses(x, y, AT)
    loss.backward()
    assert trained.gates[0].slim.weight.grad.any()


@pytest.mark.parametrize("targets", ["ends", "cheapest"])
@pytest.mark.parametrize("hopeless", ["widest", "slimmest"])
def test_only_the_widths_the_labels_need_are_run(targets, hopeless, monkeypatch):
    import effkern.dsnet.gating as gating

    seen = []
    real = gating.finish
    monkeypatch.setattr(gating, "finish", lambda net, x, widths: (seen.append(widths), real(net, x, widths))[1])
    trained, (x, y) = method(targets=targets, hopeless=hopeless, task=0.0), batch()
    list(trained.losses(x, y, AT))
    want = [[0], [1], [2]] if targets == "cheapest" else ([[0]] if hopeless == "widest" else [[0], [2]])
    assert seen == want
    seen.clear()
    list(method(sgs="expected", targets=targets, hopeless=hopeless, task=0.0).losses(x, y, AT))
    assert seen == [[0], [1], [2]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sgs": "hard"}, "sgs: must be one of balanced"),
        ({"targets": "all"}, "targets: must be one of ends"),
        ({"hopeless": "none"}, "hopeless: must be one of widest"),
        ({"cost": "flops"}, "cost: must be one of budget"),
        ({"heads": "attention"}, "heads: must be one of slim"),
        ({"tau": 0}, "tau: must be positive"),
        ({"entropy": -1}, "entropy: must be at least 0"),
        ({"cost": "budget"}, "budget: must be given"),
        ({"budget": 1.5}, r"budget: must be in \["),
        ({"budget": 0.01}, r"budget: must be in \["),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        method(**options)


def test_runs_on_the_loop_and_resumes_to_the_same_bits(tmp_path):
    recipe = Recipe(epochs=0.4, lr=0.05, batch_size=64, accumulate=2, bf16=True)

    def go(folder, stop=None):
        trained = method(cost="budget", budget=0.8)
        inner = trained.after_step

        def after(at):
            inner(at)
            if at.number == stop:
                raise InterruptedError

        trained.after_step = after
        feed = BatchFeed(DATA, DATA.train, 64)
        run = Run(folder, save_every_s=0)
        return trained, train(trained, feed, recipe, run=run, held_out=lambda: DATA.batches(DATA.val, 100))

    whole, result = go(tmp_path / "whole")
    assert set(result.metrics) == {"top1", "macs_left", "gate_diversity", "over_mixture"}
    assert whole.report()["routing"]["gate_diversity"] == result.metrics["gate_diversity"]
    with pytest.raises(InterruptedError):
        go(tmp_path / "halves", stop=2)
    halves, _ = go(tmp_path / "halves")
    pairs = zip(whole.state_dict().values(), halves.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_balanced_targets_keep_a_gate_from_the_majoritys_answer():
    """With 84 % easy images plain cross-entropy has one answer for all as its near optimum; balanced does not."""
    found = {}
    for form in ("logits", "balanced"):
        torch.manual_seed(0)
        hard = torch.arange(1000) % 6 == 0
        features = torch.randn(1000, 4) + 0.5 * hard[:, None]
        head = torch.nn.Linear(4, 2)
        from effkern.dsnet import GateCrossEntropy

        loss, optimizer = GateCrossEntropy(2, form), torch.optim.Adam(head.parameters(), 0.05)
        for _ in range(150):
            optimizer.zero_grad()
            loss(head(features), hard.long()).backward()
            optimizer.step()
        choice = head(features).argmax(1).bool()
        found[form] = float(choice[hard].float().mean() - choice[~hard].float().mean())
    assert found["balanced"] > 0.4 and found["balanced"] > 2 * found["logits"]


def test_a_cache_of_the_frozen_front_changes_nothing_but_the_work():
    results = []
    for cache in (0.0, 1e9):
        trained, stems = method(cache=cache), []
        trained.net.stem.register_forward_hook(lambda m, i, o, seen=stems: seen.append(len(o)))
        feed = BatchFeed(DATA, DATA.train[:128], 64)
        losses = train(trained, feed, Recipe(epochs=3, lr=0.1, batch_size=64, schedule="constant")).losses
        results.append((losses, sum(stems), trained.net.state_dict()))
    (losses, plain, weights), (cached_losses, cached, cached_weights) = results
    assert losses == cached_losses and all(torch.equal(w, cached_weights[name]) for name, w in weights.items())
    assert (plain, cached) == (384, 128)
