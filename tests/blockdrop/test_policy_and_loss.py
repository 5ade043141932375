"""The policy gradient is exact: checked against enumeration of all 2^K decisions, not against itself."""

import itertools
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from effkern.blockdrop import (
    Finetune,
    PolicyGradient,
    PolicyNet,
    bound,
    credit_of,
    entropy,
    greedy,
    leave_one_out,
    load_first_blocks,
    log_probability,
    policy_loss,
    reward,
    sample,
)
from effkern.models import create_model
from effkern.training import count_macs


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64])
def test_reward_table(dtype):
    keep = torch.tensor([[1, 1, 1, 1], [0, 0, 0, 0], [1, 0, 1, 0]] * 2)
    correct = torch.tensor([1, 1, 1, 0, 0, 0]).to(dtype)
    want = torch.tensor([0, 1, 0.75, -5, -5, -5])
    assert torch.equal(reward(correct, keep, gamma=5), want)
    assert torch.equal(reward(correct, keep.bool(), gamma=5), want)
    assert torch.equal(reward(torch.tensor([1, 0]).to(dtype), torch.tensor([[1], [0]])), torch.tensor([0.0, -1.0]))


def test_reward_of_a_probability_is_the_mean_over_answers_drawn_with_it():
    scores = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
    y, keep = torch.tensor([0, 1, 2, 0, 1, 2]), torch.rand(6, 4) < 0.5
    p = credit_of(scores, y, "probability")
    torch.testing.assert_close(p, scores.exp()[torch.arange(6), y] / scores.exp().sum(1))
    drawn = torch.stack([reward(torch.full((6,), c) == y, keep, gamma=3) for c in range(3)], 1)
    torch.testing.assert_close(reward(p, keep, gamma=3), (scores.softmax(1) * drawn).sum(1))
    right = credit_of(scores, y)
    assert right.dtype == torch.bool and torch.equal(right, scores.argmax(1) == y)
    assert torch.equal(reward(right.float(), keep, gamma=3), reward(right, keep, gamma=3))
    assert torch.equal(
        credit_of(scores.bfloat16(), y, "probability"), credit_of(scores.bfloat16().float(), y, "probability")
    )
    with pytest.raises(ValueError, match="credit must be 'answer' or 'probability', got 'top5'"):
        credit_of(scores, y, "top5")
    with pytest.raises(ValueError, match=r"scores must be \[B, classes\] and y \[B\], got \[6, 3\] and \[2\]"):
        credit_of(scores, y[:2], "probability")
    for make in (partial(PolicyGradient, torch.nn.Identity()), Finetune):
        with pytest.raises(ValueError, match="credit must be"):
            make(credit="top5")


def test_reward_by_cost():
    keep = torch.tensor([[1, 0, 1], [0, 1, 0]])
    got = reward(torch.ones(2), keep, cost=torch.tensor([1, 2, 5]))
    torch.testing.assert_close(got, torch.tensor([1 - 0.75**2, 1 - 0.25**2]))


def test_reward_with_what_every_image_costs():
    keep = torch.tensor([[1, 0, 1], [0, 0, 0], [1, 1, 1]])
    got = reward(torch.ones(3), keep, cost=torch.tensor([1, 2, 5]), overhead=2)
    torch.testing.assert_close(got, torch.tensor([1 - 0.8**2, 1 - 0.2**2, 0]))
    torch.testing.assert_close(reward(torch.ones(3), keep, overhead=1.0), torch.tensor([1 - 0.75**2, 1 - 0.25**2, 0]))
    with pytest.raises(ValueError, match="overhead must be at least 0, got -1"):
        reward(torch.ones(3), keep, overhead=-1)


def test_reward_keeps_its_precision_under_autocast():
    keep = torch.rand(8, 54) < 0.5
    cost = torch.rand(54)
    with torch.autocast("cpu", torch.bfloat16):
        got = reward(torch.ones(8), keep, cost=cost)
    assert got.dtype == torch.float32 and torch.equal(got, reward(torch.ones(8), keep, cost=cost))


def test_reward_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match=r"correct must be \[B\]"):
        reward(torch.ones(3), torch.ones(2, 4))
    for cost in (torch.ones(3), torch.zeros(4), torch.tensor([1.0, -1, 1, 1])):
        with pytest.raises(ValueError, match="cost must be 4 numbers"):
            reward(torch.ones(2), torch.ones(2, 4), cost=cost)


def test_bound():
    s = torch.linspace(0, 1, 11)
    for a in (0.6, 0.8, 1.0):
        torch.testing.assert_close(bound(s, a), a * s + (1 - a) * (1 - s))
        assert bound(s, a).min() >= 1 - a - 1e-6
        assert torch.equal(greedy(s), greedy(bound(s, a) + 1e-7))
    for a in (0.5, 0.2, 0.0, 1.1):
        with pytest.raises(ValueError, match="a must be"):
            bound(s, a)


def test_greedy_keeps_on_a_tie():
    assert greedy(torch.tensor([0.4999, 0.5, 0.5001])).tolist() == [False, True, True]


def test_sample_has_the_asked_rate_and_is_reproducible():
    s = torch.tensor([0.0, 0.2, 0.8, 1.0]).expand(20_000, 4)
    draw = sample(s, torch.Generator().manual_seed(0))
    assert draw.dtype == torch.bool
    rate = draw.double().mean(0)
    assert rate[0] == 0 and rate[3] == 1
    # four standard deviations of a mean of 20,000 draws
    assert ((rate - s[0]).abs() <= 4 * (s[0] * (1 - s[0]) / 20_000).sqrt()).all()
    assert torch.equal(draw, sample(s, torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("a", [0.7, 0.8, 1.0])
def test_log_probability_is_minus_binary_cross_entropy(a):
    z, u = 2 * torch.randn(5, 3, dtype=torch.float64), torch.rand(5, 3) < 0.5
    want = -torch.nn.functional.binary_cross_entropy(bound(torch.sigmoid(z), a), u.double(), reduction="none")
    torch.testing.assert_close(log_probability(z, u, a), want)


def test_entropy_forms():
    z = torch.randn(20, dtype=torch.float64)
    for a in (0.6, 0.8, 1.0):
        p = bound(torch.sigmoid(z), a)
        torch.testing.assert_close(entropy(z, a), -p * p.log() - (1 - p) * (1 - p).log())
        torch.testing.assert_close(entropy(z, a, "published"), -p * p.log())
    even = torch.zeros(1, requires_grad=True)
    assert entropy(even).item() == pytest.approx(math.log(2))
    (grad,) = torch.autograd.grad(entropy(even, form="published").sum(), even)
    assert grad.item() == pytest.approx(0.6 * 0.25 * (math.log(2) - 1))  # pushes towards dropping
    (grad,) = torch.autograd.grad(entropy(even).sum(), even)
    assert grad.item() == pytest.approx(0, abs=1e-6)
    with pytest.raises(ValueError, match="form"):
        entropy(even, form="shannon")


@pytest.mark.parametrize("a", [0.8, 1.0])
def test_nothing_overflows_however_sure_the_policy_is(a):
    """With a = 1 the probabilities of an improbable draw are below float32; its logarithm is the logit."""
    z = torch.tensor([[-1e4, -200.0, -20.0, 0.0, 20.0, 200.0, 1e4]], requires_grad=True)
    for keep in (torch.ones(1, 7), torch.zeros(1, 7)):
        for form in ("bernoulli", "published"):
            loss = policy_loss(z, keep, torch.ones(1), a, beta=0.1, entropy_form=form)
            (grad,) = torch.autograd.grad(loss, z)
            assert loss.isfinite() and grad.isfinite().all()
    if a == 1:
        kept = log_probability(z, torch.ones(1, 7), a).detach()
        torch.testing.assert_close(kept[0, :2], z.detach()[0, :2])
        assert torch.equal(kept[0, 5:], torch.zeros(2)) and 0 > kept[0, 4] > -1e-8


def test_gradients_by_differences():
    """Of the loss with its entropy and its mask, against central differences in double precision."""
    z = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    keep, gain = torch.rand(3, 5) < 0.5, torch.randn(3, dtype=torch.float64)
    free = torch.tensor([False, True, True, False, True])
    for form in ("bernoulli", "published"):
        for a in (0.8, 1.0):
            assert torch.autograd.gradcheck(lambda z, a=a, form=form: policy_loss(z, keep, gain, a, free, 0.3, form), z)


def decisions(k: int) -> Tensor:
    return torch.tensor(list(itertools.product([False, True], repeat=k)))


def setting(k: int, batch: int = 3) -> tuple[Tensor, Tensor]:
    """Logits, and a reward for every decision of every image."""
    generator = torch.Generator().manual_seed(k)
    logits = torch.randn(batch, k, dtype=torch.float64, generator=generator, requires_grad=True)
    correct = torch.rand(batch, 2**k, generator=generator) < 0.6
    table = torch.stack([reward(row, decisions(k), gamma=2) for row in correct]).double()
    return logits, table


def probability(s: Tensor, u: Tensor) -> Tensor:
    """``pi(u)`` as a product of the factors s or 1 - s, ``[B, 2^K]``."""
    return torch.where(u, s.unsqueeze(1), 1 - s.unsqueeze(1)).prod(2)


@pytest.mark.parametrize("k", [1, 2, 4, 5, 8])
@pytest.mark.parametrize("curriculum", [False, True])
def test_expected_gradient_is_that_of_the_expected_reward(k, curriculum):
    logits, table = setting(k)
    free = torch.arange(k) >= k // 2 if curriculum else torch.ones(k, dtype=torch.bool)
    s, u = bound(torch.sigmoid(logits)), decisions(k)
    # Forced units are 1 in what runs, so the reward does not depend on their own draw.
    index = ((u | ~free).long() * 2 ** torch.arange(k - 1, -1, -1)).sum(1)
    run = table[:, index]
    objective = (probability(s, u) * run).sum(1).mean()
    (want,) = torch.autograd.grad(-objective, logits, retain_graph=True)

    best = (greedy(s).long() * 2 ** torch.arange(k - 1, -1, -1)).sum(1)
    baseline = run.gather(1, best.unsqueeze(1)).squeeze(1)
    got = torch.zeros_like(want)
    for i, decision in enumerate(u):
        for b in range(len(logits)):
            keep = (decision | ~free).unsqueeze(0)
            advantage = run[b, i : i + 1] - baseline[b : b + 1]
            loss = policy_loss(logits[b : b + 1], keep, advantage, free=free)
            (grad,) = torch.autograd.grad(loss, logits, retain_graph=True)
            got += probability(s[b : b + 1].detach(), decision.unsqueeze(0)).item() * grad / len(logits)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)
    assert torch.equal(got[:, ~free], torch.zeros_like(got[:, ~free]))


def test_sampled_gradient_points_the_exact_way():
    k, draws = 6, 100_000
    logits, table = setting(k, batch=1)
    s = bound(torch.sigmoid(logits))
    (want,) = torch.autograd.grad(-(probability(s, decisions(k)) * table).sum(), logits, retain_graph=True)
    keep = sample(s.detach().expand(draws, k), torch.Generator().manual_seed(1))
    gain = table[0][(keep.long() * 2 ** torch.arange(k - 1, -1, -1)).sum(1)]
    (got,) = torch.autograd.grad(policy_loss(logits.expand(draws, k), keep, gain - gain.mean()), logits)
    assert torch.cosine_similarity(got, want).item() > 0.999


def test_forced_units_get_no_gradient_from_the_entropy_either():
    z = torch.randn(4, 5, requires_grad=True)
    free = torch.tensor([False, False, True, True, True])
    policy_loss(z, torch.rand(4, 5) < 0.5, torch.randn(4), free=free, beta=0.1).backward()
    assert torch.equal(z.grad[:, :2], torch.zeros(4, 2))
    assert (z.grad[:, 2:] != 0).all()


def test_loss_does_not_depend_on_the_batch_size():
    z, keep, gain = torch.randn(4, 5), torch.rand(4, 5) < 0.5, torch.randn(4)
    once = policy_loss(z, keep, gain, beta=0.1)
    twice = policy_loss(z.repeat(2, 1), keep.repeat(2, 1), gain.repeat(2), beta=0.1)
    torch.testing.assert_close(once, twice)


def test_advantage_is_constant_and_per_sample():
    z, keep = torch.randn(4, 5, requires_grad=True), torch.rand(4, 5) < 0.5
    gain = torch.randn(4, requires_grad=True)
    policy_loss(z, keep, gain).backward()
    assert gain.grad is None
    with pytest.raises(ValueError, match=r"advantage \[B\]"):
        policy_loss(z, keep, torch.randn(4, 5))
    with pytest.raises(ValueError, match=r"free must be \[5\]"):
        policy_loss(z, keep, torch.randn(4), free=torch.ones(4, dtype=torch.bool))


def test_policy_net_has_only_parameters_that_are_trained():
    policy = PolicyNet(7, in_channels=1, widths=(4, 8, 8), stem_stride=2, init=1.5)
    assert torch.equal(policy.linear.bias, torch.full((7,), 1.5))
    logits = policy(torch.randn(3, 1, 14, 14))
    assert logits.shape == (3, 7)
    logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in policy.parameters())
    with pytest.raises(ValueError, match="num_blocks"):
        PolicyNet(0)


def test_leave_one_out_by_hand():
    got = leave_one_out(torch.tensor([[1.0, 0.0], [0.0, 0.0], [-1.0, 3.0]]))
    torch.testing.assert_close(got, torch.tensor([[1.5, -1.5], [0.0, -1.5], [-1.5, 3.0]]))
    with pytest.raises(ValueError, match="at least 2 draws"):
        leave_one_out(torch.ones(1, 4))


def test_leave_one_out_is_unbiased():
    """Its expectation over all pairs of draws, by enumeration for K = 4, is the gradient of the expected reward."""
    k = 4
    logits, table = setting(k, batch=1)
    s, u = bound(torch.sigmoid(logits)), decisions(k)
    pi = probability(s, u)[0]
    (want,) = torch.autograd.grad(-(pi * table[0]).sum(), logits, retain_graph=True)
    fixed, rows = pi.detach(), logits.expand(2, k)
    got = torch.zeros_like(want)
    for i, j in itertools.product(range(2**k), repeat=2):
        advantages = leave_one_out(table[:, [i, j]].T)[:, 0]
        loss = policy_loss(rows, u[[i, j]], advantages)
        (grad,) = torch.autograd.grad(loss, logits, retain_graph=True)
        got += fixed[i] * fixed[j] * grad
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


def test_logit_gradient_by_hand():
    """For u = 1 and a = 0.8 it is -A 3s(1-s)/(3s+1), at most |A|/3, where s = 1/3."""
    s = torch.tensor([[0.1, 1 / 3, 0.9]], dtype=torch.float64)
    logits = torch.logit(s).requires_grad_()
    policy_loss(logits, torch.ones(1, 3), torch.tensor([2.0])).backward()
    torch.testing.assert_close(logits.grad, -2 * 3 * s * (1 - s) / (3 * s + 1))
    assert logits.grad.abs().max().item() == pytest.approx(2 / 3)


def test_the_large_policy_is_a_resnet10_that_begins_as_a_resnet18():
    source = create_model("resnet18", in_channels=3, num_classes=4)
    policy = PolicyNet(33, 3, (64, 128, 256, 512), pool=2, large=True)
    before = policy.linear.weight.clone()
    load_first_blocks(policy, source.state_dict())
    assert torch.equal(policy.blocks[2].downsample[0].weight, source.layer3[0].downsample[0].weight)
    assert torch.equal(policy.linear.weight, before)
    # Nothing but these parts, at half the size: what ResNet-18 computes with its second blocks left out.
    source.eval(), policy.eval()
    x = torch.randn(2, 3, 64, 64)
    keep = torch.tensor([[1, 0] * 4]).expand(2, 8)
    with torch.no_grad():
        features = source.body(source.stem(F.avg_pool2d(x, 2)), keep).mean((2, 3))
        torch.testing.assert_close(policy(x), policy.linear(features))
    # 2.7 % of ResNet-101's 7.80 G are stated with a last map of 3x3; padded convolutions make it 4x4.
    macs = count_macs(policy, torch.zeros(1, 3, 224, 224))
    assert 0.027 < macs / 7.80e9 < 0.031


def test_the_cifar_policy_costs_what_was_published():
    """12.2 M multiply-adds: 17.8 % of ResNet-32, 4.8 % of ResNet-110; a block of theirs 4.72 M, or 3.54 M."""
    macs = count_macs(PolicyNet(15), torch.zeros(1, 3, 32, 32))
    assert macs == pytest.approx(12.2e6, rel=5e-3)
    for name, share in (("resnet32", 0.178), ("resnet110", 0.048)):
        always, blocks = create_model(name, shortcut="pool").block_macs((3, 32, 32))
        assert macs / (always + sum(blocks)) == pytest.approx(share, abs=6e-4)
        assert {round(block / 1e6, 2) for block in blocks} == {4.72, 3.54} and blocks.count(min(blocks)) == 2


def test_weights_of_another_network_are_refused_by_name():
    policy = PolicyNet(3, 3, (4, 8), large=True)
    before = {name: tensor.clone() for name, tensor in policy.state_dict().items()}
    with pytest.raises(ValueError, match=r"weights: conv1.weight must be \[4, 3, 7, 7\], got \[64, 3, 7, 7\]"):
        load_first_blocks(policy, create_model("resnet18").state_dict())
    with pytest.raises(ValueError, match=r"weights: conv1.weight must be .* got nothing"):
        load_first_blocks(policy, {})
    assert all(torch.equal(tensor, before[name]) for name, tensor in policy.state_dict().items())


@pytest.mark.parametrize("pool", [2, 3])
def test_an_image_that_is_smaller_than_what_is_pooled_is_refused(pool):
    with pytest.raises(ValueError, match=rf"x must be at least {pool} pixels .*got \[1, 3, 1, 8\]"):
        PolicyNet(4, widths=(4,), pool=pool).eval()(torch.zeros(1, 3, 1, 8))


@pytest.mark.parametrize("size", [(8, 8), (9, 7), (3, 4)])
@pytest.mark.parametrize("pool", [1, 2, 3])
def test_a_policy_sees_the_mean_of_the_pixels_it_pools(pool, size):
    torch.manual_seed(0)
    x = torch.randn(3, 3, *size)
    net = PolicyNet(4, widths=(4, 8), pool=pool).eval()
    plain = PolicyNet(4, widths=(4, 8)).eval()
    plain.load_state_dict(net.state_dict())
    want = plain(torch.nn.functional.avg_pool2d(x.double(), pool).float())
    for image in (x, x.to(memory_format=torch.channels_last)):
        torch.testing.assert_close(net(image), want, rtol=1e-5, atol=1e-5)
