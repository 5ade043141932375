"""What gates learn from, by hand: draws, labels, forms of the cross-entropy."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from effkern.dsnet import GateCrossEntropy, expected_right, gumbel_noise, gumbel_softmax, sgs_targets


def test_noise_is_gumbel_and_finite():
    noise = gumbel_noise(torch.rand(200_000, generator=torch.Generator().manual_seed(0)))
    assert abs(noise.mean() - 0.5772) < 0.01 and abs(noise.var() - math.pi**2 / 6) < 0.02
    ends = gumbel_noise(torch.tensor([0.0, 1 - 2**-24, 1.0]))
    assert ends.isfinite().all() and ends[0] < ends[1]


def test_draws_follow_the_softmax_and_are_one_hot():
    logits = torch.tensor([[0.0, 1.0, -1.0]]).expand(100_000, 3)
    noise = gumbel_noise(torch.rand(logits.shape, generator=torch.Generator().manual_seed(1)))
    drawn = gumbel_softmax(logits, noise)
    assert set(drawn.unique().tolist()) == {0.0, 1.0} and (drawn.sum(1) == 1).all()
    torch.testing.assert_close(drawn.mean(0), logits[0].softmax(0), rtol=0, atol=0.006)


@pytest.mark.parametrize("tau", [1.0, 0.5])
def test_gradients_pass_as_through_the_softmax(tau):
    logits = torch.randn(4, 3, requires_grad=True)
    noise, towards = torch.randn(4, 3), torch.randn(4, 3)
    (got,) = torch.autograd.grad((gumbel_softmax(logits, noise, tau) * towards).sum(), logits)
    (want,) = torch.autograd.grad((((logits + noise) / tau).softmax(1) * towards).sum(), logits)
    torch.testing.assert_close(got, want)


RIGHT = torch.tensor(
    [
        [1, 1, 1, 1],  # easy
        [0, 0, 1, 1],  # dependent
        [0, 0, 0, 0],  # hard
        [0, 1, 1, 0],  # only the middle
        [1, 0, 0, 0],  # easy, though the widest is wrong
    ]
).bool()


@pytest.mark.parametrize(
    ("targets", "hopeless", "want"),
    [
        ("ends", "widest", [0, 3, 3, 3, 0]),
        ("ends", "slimmest", [0, 3, 0, 0, 0]),
        ("cheapest", "widest", [0, 2, 3, 1, 0]),
        ("cheapest", "slimmest", [0, 2, 0, 1, 0]),
    ],
)
def test_targets(targets, hopeless, want):
    assert sgs_targets(RIGHT, hopeless, targets).tolist() == want
    assert sgs_targets(RIGHT[:, [0, 3]], hopeless, "ends").tolist() == [min(1, w) for w in sgs_targets(RIGHT, hopeless)]


def test_targets_come_from_the_list_whatever_its_length():
    for count in (1, 2, 7, 14):
        right = torch.zeros(2, count, dtype=torch.bool)
        right[0] = True
        assert sgs_targets(right).tolist() == [0, count - 1]


def test_logits_can_be_learned_and_published_ones_cannot():
    target = torch.tensor([0, 3, 3])
    sure = 50 * F.one_hot(target, 4).float()
    assert GateCrossEntropy(4, "logits")(sure, target) < 0.01
    floor = GateCrossEntropy(4, "published")(sure, target)
    assert floor.item() == pytest.approx(math.log(math.e + 3) - 1, abs=1e-4)
    z, noise = torch.randn(3, 4), torch.randn(3, 4)
    want = F.cross_entropy(((z + noise) / 0.5).softmax(1), target)
    torch.testing.assert_close(GateCrossEntropy(4, "published")(z, target, noise, 0.5), want)
    assert not torch.equal(GateCrossEntropy(4, "logits", 0.1)(z, target), GateCrossEntropy(4, "logits")(z, target))


@pytest.mark.parametrize("form", ["logits", "balanced", "published"])
def test_gradients_by_differences(form):
    """Central ones, in steps as long as float32 inside allows."""
    torch.manual_seed(0)
    z, noise, target = torch.randn(5, 4, dtype=torch.float64), torch.randn(5, 4), torch.tensor([0, 3, 3, 0, 0])
    loss = GateCrossEntropy(4, form, smoothing=0.1)
    loss(z, target, noise, 0.7)  # the frequencies of the targets
    loss.eval()
    (got,) = torch.autograd.grad(loss(z.requires_grad_(), target, noise, 0.7), z)
    step, want = 1e-2, torch.zeros_like(z)
    with torch.no_grad():
        for i, j in itertools.product(range(5), range(4)):
            ends = []
            for sign in (1, -1):
                moved = z.clone()
                moved[i, j] += sign * step
                ends.append(loss(moved, target, noise, 0.7).double())
            want[i, j] = (ends[0] - ends[1]) / (2 * step)
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)
    assert got.abs().max() > 1e-2


def test_expected_right_is_the_mean_over_every_choice():
    z = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    right = torch.tensor([[0, 1, 1], [1, 1, 1], [0, 0, 0], [1, 0, 0], [0, 0, 1]]).bool()
    p = (z.exp() / z.exp().sum(1, keepdim=True)).detach()
    got = expected_right(z, right)
    assert got.item() == pytest.approx(
        sum(float(p[i, j]) for i in range(5) for j in range(3) if right[i, j]) / 5, rel=1e-6
    )
    (gradient,) = torch.autograd.grad(got, z)
    want = p * (right.double() - (p * right).sum(1, keepdim=True)) / 5  # of a softmax, by hand
    torch.testing.assert_close(gradient, want, rtol=1e-5, atol=1e-7)
    assert gradient[1:3].abs().max() < 1e-7  # where all or none are right, no choice is better
    spread = -(p * p.log()).sum(1).mean()
    with pytest.raises(ValueError, match=r"logits and right must be \[N, G\] .* got \[5, 3\] and \[3\]"):
        expected_right(z, right[0])
    torch.testing.assert_close(expected_right(z, right, 0.25).double(), got + 0.25 * spread, rtol=1e-6, atol=1e-7)


def test_with_entropy_the_best_logits_are_what_choices_are_worth():
    """And without, a gate that gives all samples one choice hears nothing of the others."""
    right, found = torch.tensor([[0.9, 0.8, 0.3]]), {}
    for entropy in (0.0, 0.2):
        z = torch.tensor([[0.0, 6.0, 0.0]], requires_grad=True)
        optimizer = torch.optim.SGD([z], 3.0)
        for _ in range(1000):
            optimizer.zero_grad()
            (-expected_right(z, right, entropy)).backward()
            optimizer.step()
        found[entropy] = z.detach()[0]
    assert found[0.0].argmax() == 1
    torch.testing.assert_close(found[0.2] - found[0.2][0], (right[0] - right[0, 0]) / 0.2, rtol=1e-2, atol=1e-2)


def test_logits_are_taken_without_noise():
    z, target = torch.randn(3, 4), torch.tensor([0, 3, 3])
    for form in ("logits", "balanced"):
        loss = GateCrossEntropy(4, form)
        assert torch.equal(loss(z, target, torch.randn(3, 4)), GateCrossEntropy(4, form)(z, target))


def test_balanced_targets_have_the_same_say():
    """Eight easy samples and two hard ones: weights 1 / (2 p)."""
    target = torch.tensor([0] * 8 + [3] * 2)
    z = torch.randn(10, 4, dtype=torch.float32)
    losses = F.cross_entropy(z, target, reduction="none")
    loss = GateCrossEntropy(4, "balanced").train()
    got = loss(z, target)
    torch.testing.assert_close(got, (losses[:8].mean() + losses[8:].mean()) / 2)
    torch.testing.assert_close(loss.frequency, torch.tensor([0.8, 0, 0, 0.2]))
    # The same answer for all cannot be better than chance, as it is for the plain form.
    same = torch.tensor([[4.0, 0, 0, 0]]).expand(10, 4)
    assert loss(same, target) > loss(torch.zeros(10, 4), target)
    plain = GateCrossEntropy(4, "logits")
    assert plain(same, target) < plain(torch.zeros(10, 4), target)


def test_frequencies_are_a_running_mean_of_training():
    loss = GateCrossEntropy(2, "balanced", momentum=0.25).train()
    for targets in ([0, 0], [0, 1], [1, 1], [0, 0]):
        loss(torch.zeros(2, 2), torch.tensor(targets))
    # 1; halves; thirds; then the momentum.
    assert loss.frequency[0].item() == pytest.approx((1 + 0.5 + 0) / 3 * 0.75 + 0.25)
    before = loss.frequency.clone()
    loss.eval()(torch.zeros(2, 2), torch.tensor([1, 1]))
    assert torch.equal(loss.frequency, before)
