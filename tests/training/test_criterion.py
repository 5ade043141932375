"""Labels and a teacher's answers as one loss: by hand, at the ends of the weight, and what it leaves of the teacher."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from effkern.training import Criterion, soft_divergence


def test_divergence_by_hand():
    scores, wanted = torch.tensor([[0.0, math.log(3)]]), torch.tensor([[math.log(4), 0.0]])
    # Teacher 4/5 and 1/5, student 1/4 and 3/4.
    assert soft_divergence(scores, wanted).item() == pytest.approx(
        0.8 * math.log(0.8 / 0.25) + 0.2 * math.log(0.2 / 0.75), rel=1e-6
    )
    # At T = 2 the roots of the odds: teacher 2/3 and 1/3, student 1 and sqrt(3) over their sum.
    one = 1 / (1 + math.sqrt(3))
    softened = 2 / 3 * math.log(2 / 3 / one) + 1 / 3 * math.log(1 / 3 / (1 - one))
    assert soft_divergence(scores, wanted, 2.0).item() == pytest.approx(4 * softened, rel=1e-6)


def test_divergence_is_the_mean_over_samples_and_keeps_its_gradient_when_softened():
    torch.manual_seed(0)
    scores, wanted = torch.randn(2, 5, 7, dtype=torch.float64)
    each = torch.stack([soft_divergence(s[None], w[None], 3.0) for s, w in zip(scores, wanted, strict=True)])
    torch.testing.assert_close(soft_divergence(scores, wanted, 3.0), each.mean())
    assert soft_divergence(scores, scores, 3.0).abs() < 1e-12
    sizes = []
    for temperature in (50.0, 100.0):
        student = scores.clone().requires_grad_()
        sizes.append(torch.autograd.grad(soft_divergence(student, wanted, temperature), student)[0].norm())
    torch.testing.assert_close(sizes[0], sizes[1], rtol=0.05, atol=0)
    assert soft_divergence(scores.bfloat16(), wanted.bfloat16()).dtype == torch.float32


def test_weight_divides_between_labels_and_teacher():
    teacher, x, y = nn.Linear(4, 3), torch.randn(6, 4), torch.randint(3, (6,))
    scores = torch.randn(6, 3)
    hard, soft = F.cross_entropy(scores, y, label_smoothing=0.1), soft_divergence(scores, teacher(x), 2.0)
    for weight in (0.0, 0.3, 1.0):
        loss = Criterion(0.1, teacher, weight, 2.0)(scores, x, y)
        torch.testing.assert_close(loss, (1 - weight) * hard + weight * soft)
    assert torch.equal(Criterion(0.1)(scores, x, y), hard)


def test_the_teacher_stays_as_it_is():
    teacher = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Dropout(0.5)).train()
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    loss, scores = Criterion(teacher=teacher), torch.randn(8, 3, requires_grad=True)
    x, y = torch.randn(8, 4), torch.randint(3, (8,))
    assert loss(scores, x, y) == loss(scores, x, y)
    loss(scores, x, y).backward()
    assert scores.grad is not None and all(p.grad is None for p in teacher.parameters())
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())


@pytest.mark.parametrize(
    ("given", "message"),
    [({"weight": 1.5}, "weight: must be in"), ({"weight": float("nan")}, "weight"), ({"temperature": 0.0}, "positive")],
)
def test_wrong_use_is_named(given, message):
    with pytest.raises(ValueError, match=message):
        Criterion(teacher=nn.Linear(2, 2), **given)
