"""The training loop learns, keeps its schedule and its time, and ends cleanly."""

import pytest
import torch
from torch import nn

from effkern.training import Recipe, evaluate, fit, learning_rate, loop


def problem(count: int = 256):
    """Two classes that a line separates."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, 8, generator=generator)
    return x, (x[:, 0] + 0.5 * x[:, 1] > 0).long()


def batches(size: int = 32):
    x, y = problem()
    return lambda: zip(x.split(size), y.split(size), strict=True)


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 2))


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(epochs=6, lr=0.2),
        Recipe(epochs=6, lr=0.2, schedule="cosine", momentum=0.0, clip=1.0),
        Recipe(epochs=6, lr=0.01, optimizer="adamw", schedule="constant", label_smoothing=0.1),
    ],
    ids=["one-cycle", "cosine", "adamw"],
)
def test_learns(recipe):
    model = net()
    before = evaluate(model, batches()())
    result = fit(model, batches(), 8, recipe)
    assert result.steps == result.planned == len(result.losses) == 48 and not result.cut_short
    assert evaluate(model, batches()()) > max(before, 85)
    assert not model.training


def test_is_repeatable_to_the_bit():
    first, second = net(), net()
    assert fit(first, batches(), 8, Recipe(epochs=2)).losses == fit(second, batches(), 8, Recipe(epochs=2)).losses


def test_fractions_of_an_epoch_and_no_less_than_one_step():
    assert fit(net(), batches(), 8, Recipe(epochs=1.5)).steps == 12
    assert fit(net(), batches(), 8, Recipe(epochs=0.01)).steps == 1


def test_one_cycle_rises_and_falls_to_nothing():
    recipe = Recipe(epochs=1, lr=1.0, warmup=0.25)
    rates = [learning_rate(recipe, k / 100) for k in range(101)]
    assert rates.index(max(rates)) == 25 and max(rates) == 1.0
    assert rates[0] == pytest.approx(0.04) and rates[100] == pytest.approx(0.0)
    assert rates[:26] == sorted(rates[:26]) and rates[25:] == sorted(rates[25:], reverse=True)


def test_the_schedule_is_played_to_its_end_when_time_is_short(monkeypatch):
    now = 0.0
    rates = []

    def record(recipe, fraction):
        rates.append(learning_rate(recipe, fraction))
        return rates[-1]

    def slow(model, x, y):
        nonlocal now
        now += 1.0
        return nn.functional.cross_entropy(model(x), y)

    monkeypatch.setattr(loop, "learning_rate", record)
    result = fit(net(), batches(), 8, Recipe(epochs=100, lr=1.0, budget_s=20), loss=slow, clock=lambda: now)
    assert result.steps == 20 and result.planned == 800 and result.cut_short and result.seconds == 20
    assert len(rates) == 20 and max(rates) == 1.0 and rates[-1] < 0.02
    assert "20 of its 800" in result.remark("It")


def test_a_loss_of_ones_own_may_call_backward_itself():
    calls = []

    def loss(model, x, y):
        calls.append(len(x))
        value = nn.functional.cross_entropy(model(x), y)
        value.backward()
        return value.detach()

    own, usual = net(), net()
    assert (
        fit(own, batches(), 8, Recipe(epochs=1), loss=loss).losses == fit(usual, batches(), 8, Recipe(epochs=1)).losses
    )
    assert calls == [32] * 8
    assert all(torch.equal(a, b) for a, b in zip(own.parameters(), usual.parameters(), strict=True))


def test_after_step_counts_and_frozen_weights_stay():
    model, steps = net(), []
    model[0].requires_grad_(False)
    frozen = model[0].weight.clone()
    fit(model, batches(), 8, Recipe(epochs=0.5), after_step=steps.append)
    assert steps == [1, 2, 3, 4] and torch.equal(model[0].weight, frozen)


def test_norms_and_biases_do_not_decay():
    model = nn.Linear(4, 3)
    with torch.no_grad():
        model.bias.fill_(1.0)
    fit(
        model,
        lambda: [(torch.zeros(1, 4), torch.zeros(1))],
        1,
        Recipe(epochs=1, weight_decay=0.5),
        loss=lambda m, x, y: 0 * m(x).sum(),
    )
    assert torch.equal(model.bias.detach(), torch.ones(3))


def test_an_interrupt_passes_through_and_leaves_a_usable_model():
    model = net()

    def interrupt(step):
        if step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(model, batches(), 8, Recipe(epochs=1), after_step=interrupt)
    assert not model.training and evaluate(model, batches()()) >= 0


def test_divergence_is_an_error():
    with pytest.raises(FloatingPointError, match="demo: the loss became nan after 0 steps"):
        fit(net(), batches(), 8, Recipe(epochs=1), loss=lambda m, x, y: m(x).sum() * float("nan"), desc="demo")


def test_no_batches_is_an_error():
    with pytest.raises(ValueError, match="epoch: must give at least one batch"):
        fit(net(), lambda: [], 1, Recipe(epochs=1))


@pytest.mark.parametrize(
    ("name", "value"),
    [("optimizer", "lamb"), ("schedule", "steps"), ("epochs", 0), ("epochs", float("nan")), ("warmup", 1.0)],
)
def test_a_recipe_is_checked(name, value):
    with pytest.raises(ValueError, match=f"{name}: must be"):
        Recipe(**{"epochs": 1, name: value})


def test_plain_results_are_short():
    result = fit(net(), batches(), 8, Recipe(epochs=20))
    plain = result.plain(points=10)
    assert len(plain["loss"]) == 10 and plain["steps"] == 160
    assert plain["loss"][0] == pytest.approx(sum(result.losses[:16]) / 16, abs=1e-4)


def test_evaluate_counts_and_restores_the_training_flag():
    model = nn.Sequential(nn.Identity(), nn.Dropout())
    model[0].eval()
    scores = torch.eye(4)
    assert evaluate(model, [(scores, torch.tensor([0, 1, 2, 0])), (scores[:2], torch.tensor([1, 1]))]) == 100 * 4 / 6
    assert model.training and model[1].training and not model[0].training
    assert evaluate(lambda x: -x, [(scores, torch.tensor([1, 0, 0, 0]))]) == 100.0


def test_evaluate_refuses_what_it_cannot_count():
    with pytest.raises(ValueError, match="batches: must hold at least one sample"):
        evaluate(lambda x: x, [])
    with pytest.raises(ValueError, match=r"predict: must return \[2, classes\] scores, got shape \(3, 4\)"):
        evaluate(lambda x: torch.zeros(3, 4), [(torch.zeros(2, 4), torch.zeros(2).long())])
