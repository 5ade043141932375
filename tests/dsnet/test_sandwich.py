"""The sandwich rule: which widths a step trains, and on what."""

import pytest
import torch
import torch.nn.functional as F

from effkern.dsnet import SandwichRule, sandwich_backward
from effkern.models.slimmable import SlimmableCNN


def network():
    torch.manual_seed(0)
    return SlimmableCNN((4, 8, 12, 16), blocks=(1, 1), num_classes=3)


IMAGES, LABELS = torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 3


def test_a_step_trains_both_ends_and_different_widths_between():
    rule = SandwichRule(6, random=2)
    seen = set()
    for step in range(100):
        first, *middle, last = rule.draw(step)
        assert (first, last) == (5, 0) and len(set(middle)) == 2 and set(middle) <= {1, 2, 3, 4}
        seen |= set(middle)
    assert seen == {1, 2, 3, 4}


def test_draws_follow_from_seed_and_step_alone():
    rule = SandwichRule(8, seed=3)
    draws = [rule.draw(step) for step in range(20)]
    torch.manual_seed(0)
    state = torch.get_rng_state()
    assert [SandwichRule(8, seed=3).draw(step) for step in reversed(range(20))][::-1] == draws
    assert torch.equal(state, torch.get_rng_state())
    assert [SandwichRule(8, seed=4).draw(step) for step in range(20)] != draws


@pytest.mark.parametrize("widths, drawn", [(1, [0]), (2, [1, 0]), (3, [2, 1, 0])])
def test_few_widths_are_all_trained(widths, drawn):
    assert SandwichRule(widths, random=2).draw(7) == drawn


@pytest.mark.parametrize("options", [(0,), (4, -1)])
def test_impossible_rules_are_refused(options):
    with pytest.raises(ValueError, match="widths must be positive"):
        SandwichRule(*options)


def test_gradients_of_all_widths_add_up():
    model, widths = network(), [3, 1, 0]
    losses = sandwich_backward(model, IMAGES, LABELS, widths)
    together = [p.grad.clone() for p in model.parameters()]
    total = [torch.zeros_like(g) for g in together]
    for i, width in enumerate(widths):
        model.zero_grad()
        loss = F.cross_entropy(model(IMAGES, width), LABELS)
        loss.backward()
        torch.testing.assert_close(losses[i], loss.detach())
        total = [t + p.grad for t, p in zip(total, model.parameters(), strict=True)]
    torch.testing.assert_close(together, total, rtol=1e-4, atol=1e-5)
    assert not losses.requires_grad


def test_the_widest_teaches_its_detached_prediction():
    model = network()
    losses = sandwich_backward(model, IMAGES, LABELS, [3, 2, 0], teacher="widest")
    teacher = model(IMAGES, 3).detach().softmax(1)
    torch.testing.assert_close(losses[0], F.cross_entropy(model(IMAGES, 3), LABELS).detach())
    for loss, width in zip(losses[1:], (2, 0), strict=True):
        torch.testing.assert_close(loss, F.cross_entropy(model(IMAGES, width), teacher).detach())
    model.zero_grad()
    sandwich_backward(model, IMAGES, LABELS, [3, 0], teacher="widest")
    both = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    F.cross_entropy(model(IMAGES, 3), LABELS).backward()
    F.cross_entropy(model(IMAGES, 0), teacher).backward()  # no gradient reaches the teacher
    torch.testing.assert_close(both, [p.grad for p in model.parameters()], rtol=1e-4, atol=1e-5)


def test_an_unknown_teacher_is_refused():
    with pytest.raises(ValueError, match="teacher must be"):
        sandwich_backward(network(), IMAGES, LABELS, [0], teacher="ema")


def test_training_fits_every_width():
    model, rule = network(), SandwichRule(4)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    for step in range(40):
        optimizer.zero_grad()
        losses = sandwich_backward(model, IMAGES, LABELS, rule.draw(step))
        optimizer.step()
    assert losses.max() < 0.1
