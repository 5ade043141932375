"""Both phases on small networks: what is trained, what must stay untouched, and that a policy is learned."""

import copy

import pytest
import torch
from torch import Tensor, nn

from effkern.blockdrop import (
    BlockDropNet,
    Curriculum,
    Finetune,
    PolicyGradient,
    PolicyNet,
    bound,
    by_pattern,
    evaluate,
    sample,
)
from effkern.models import create_model
from effkern.nn import skip_form
from effkern.nn.residual import set_bn_over
from effkern.training import Criterion, Recipe, fit, soft_divergence

K = 5


def backbone() -> nn.Module:
    torch.manual_seed(0)
    net = create_model("resnet20", in_channels=1, widths=(4, 6, 8), blocks=(2, 1, 2), shortcut="pool")
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.2, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return net


def policy() -> nn.Module:
    torch.manual_seed(1)
    return PolicyNet(K, in_channels=1, widths=(4, 4, 4))


def batch(n: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(n, 1, 8, 8, generator=generator), torch.randint(10, (n,), generator=generator)


def snapshot(net: nn.Module) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in net.state_dict().items()}


def unchanged(net: nn.Module, before: dict[str, Tensor]) -> bool:
    return all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_curriculum_clips_forces_and_resumes():
    assert Curriculum(4, 0).free_blocks == 1
    assert Curriculum(4, 9).free_blocks == 4
    course = Curriculum(4)
    assert course.free().tolist() == [False, False, False, True]
    assert course.force(torch.zeros(2, 4, dtype=torch.bool)).tolist() == [[True, True, True, False]] * 2
    course.advance(2)
    assert (course.free_blocks, course.forced, course.done) == (3, 1, False)
    resumed = Curriculum(4)
    resumed.load_state_dict(course.state_dict())
    assert torch.equal(resumed.free(), course.free())
    course.advance(5)
    assert course.done and course.free().all()
    keep = torch.tensor([[True, False, True, False]])
    assert torch.equal(course.force(keep), keep)
    with pytest.raises(ValueError, match="of 5 blocks, expected 4"):
        resumed.load_state_dict(Curriculum(5).state_dict())
    with pytest.raises(ValueError, match="num_blocks"):
        Curriculum(0)


class Recorder(nn.Module):
    """A backbone that notes the decisions it is asked to run and is right when block 3 runs."""

    num_blocks = K

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[Tensor] = []

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        self.asked.append(keep)
        return torch.stack([(~keep[:, 3]).float(), keep[:, 3].float()], 1)


def test_forced_blocks_run_in_both_actions():
    net = Recorder()
    loss = PolicyGradient(net, curriculum=Curriculum(K, 2))
    agent = policy()
    loss(agent, *batch()).backward()
    drawn, best = net.asked
    assert drawn[:, :3].all() and best[:, :3].all()
    head = agent.linear.weight.grad
    assert torch.equal(head[:3], torch.zeros_like(head[:3]))
    assert (head[3:] != 0).any()


def chances(agent: nn.Module, x: Tensor, a: float) -> tuple[Tensor, Tensor]:
    """What the policy says, and the probabilities it draws with, written out."""
    s = torch.sigmoid(agent(x).detach())
    return s, a * s + (1 - a) * (1 - s)


def gains(right: Tensor, keep: Tensor, gamma: float, cost: Tensor | None = None, overhead: float = 0.0) -> Tensor:
    cost = torch.ones(K) if cost is None else cost
    usage = ((keep * cost).sum(1) + overhead) / (cost.sum() + overhead)
    return torch.where(right, 1 - usage**2, torch.tensor(-gamma))


def log_pi(p: Tensor, u: Tensor) -> Tensor:
    return u * p.log() + (1 - u.float()) * (1 - p).log()


@pytest.mark.parametrize(("samples", "form"), [(1, "bernoulli"), (3, "bernoulli"), (1, "published")])
def test_phase_a_by_hand(samples, form):
    """Reward, baseline, mask and entropy put together: -mean A sum log pi - beta mean sum H, over the free units."""
    agent, net, (x, y), forced = policy().eval(), Depends(), batch(16), 2
    y = (y > 4).long()
    uniform = torch.rand(16, samples, K)
    loss = PolicyGradient(net, 2.0, 0.7, 0.3, Curriculum(K, K - forced), entropy_form=form, samples=samples)
    got = loss(agent, x, y, uniform)
    s, p = chances(agent, x, 0.7)

    def gain(u: Tensor) -> tuple[Tensor, Tensor]:
        keep = torch.cat([torch.ones(16, forced, dtype=torch.bool), u[:, forced:]], 1)
        return gains(net(x, keep).argmax(1) == y, keep, 2.0), keep

    drawn = [gain(uniform[:, i] < p) for i in range(samples)]
    if samples == 1:
        advantages = [drawn[0][0] - gain(s >= 0.5)[0]]
    else:
        advantages = [r - sum(o for j, (o, _) in enumerate(drawn) if j != i) / 2 for i, (r, _) in enumerate(drawn)]
    scores = [(a * log_pi(p, u)[:, forced:].sum(1)).mean() for a, (_, u) in zip(advantages, drawn, strict=True)]
    other = 0 if form == "published" else (1 - p) * (1 - p).log()
    spread = -(p * p.log() + other)[:, forced:].sum(1).mean()
    torch.testing.assert_close(got, -sum(scores) / samples - 0.3 * spread)
    assert any(a.any() for a in advantages), "no draw was better or worse: the test says nothing"
    assert loss.rewards == [pytest.approx(float(torch.stack([r for r, _ in drawn]).mean()))]
    assert loss.usages == [pytest.approx(float(torch.stack([u for _, u in drawn]).float().mean()))]


@pytest.mark.parametrize("cost", [None, torch.tensor([1.0, 2, 4, 8, 16])], ids=["blocks", "cost"])
def test_phase_b_by_hand(cost):
    """Cross-entropy of the drawn path plus the weighted policy gradient, without entropy."""
    net, agent, (x, y) = backbone().eval(), policy().eval(), batch(32)
    with torch.no_grad():
        y = torch.where(torch.arange(32) % 2 == 0, net(x).argmax(1), y)  # right now and then
    uniform = torch.rand(32, K)
    s, p = chances(agent, x, 0.7)
    drawn, best = uniform < p, s >= 0.5
    scores = net(x, drawn)
    price = (2.0, cost, 0.0 if cost is None else 3.0)
    advantage = gains(scores.argmax(1) == y, drawn, *price) - gains(net(x, best).argmax(1) == y, best, *price)
    assert advantage.unique().numel() > 2
    want = torch.nn.functional.cross_entropy(scores, y) - 3 * (advantage * log_pi(p, drawn).sum(1)).mean()
    joint = BlockDropNet(net, agent).eval()
    loss = Finetune(2.0, 0.7, pg_weight=3.0, cost=cost, overhead=price[2])
    torch.testing.assert_close(loss(joint, x, y, uniform), want)


def test_phase_b_with_entropy_and_a_teacher_by_hand():
    net, agent, teacher, (x, y) = backbone().eval(), policy().eval(), backbone(), batch(32)
    uniform, joint = torch.rand(32, K), BlockDropNet(net, agent).eval()
    _, p = chances(agent, x, 0.7)
    soft = soft_divergence(net(x, uniform < p), teacher.eval()(x), 2.0)
    spread = -(p * p.log() + (1 - p) * (1 - p).log()).sum(1).mean()
    plain = Finetune(2.0, 0.7)(joint, x, y, uniform)
    hard = torch.nn.functional.cross_entropy(net(x, uniform < p), y)
    want = plain - 0.25 * hard + 0.25 * soft - 0.3 * spread
    given = Finetune(2.0, 0.7, beta=0.3, criterion=Criterion(teacher=teacher, weight=0.25, temperature=2.0))
    torch.testing.assert_close(given(joint, x, y, uniform), want)


def test_both_phases_by_hand_with_probabilities_for_answers():
    net, agent, (x, y) = backbone().eval(), policy().eval(), batch(32)
    s, p = chances(agent, x, 0.7)

    def gain(keep):
        right = net(x, keep).softmax(1).gather(1, y[:, None])[:, 0]
        return (right * (1 - keep.float().mean(1) ** 2) - 2 * (1 - right)).detach()

    def gradient(keep, advantage):
        return -(advantage * (keep * p.log() + (~keep) * (1 - p).log()).sum(1)).mean()

    uniform = torch.rand(32, 2, K)
    one, two = (uniform < p.unsqueeze(1)).unbind(1)
    want = (gradient(one, gain(one) - gain(two)) + gradient(two, gain(two) - gain(one))) / 2
    loss = PolicyGradient(net, 2.0, 0.7, beta=0.0, samples=2, credit="probability")
    torch.testing.assert_close(loss(agent, x, y, uniform), want)
    want = torch.nn.functional.cross_entropy(net(x, one), y) + gradient(one, gain(one) - gain(s > 0.5))
    loss = Finetune(2.0, 0.7, credit="probability")
    torch.testing.assert_close(loss(BlockDropNet(net, agent).eval(), x, y, uniform[:, 0]), want)


@pytest.mark.parametrize("phase", ["policy", "joint"])
def test_a_draw_and_its_log_probability_are_of_the_same_numbers(phase):
    """Logits that autocast made 16-bit ones are rounded once, and nothing behind them is."""

    class Rounding(nn.Module):
        num_blocks = K

        def __init__(self, back: torch.dtype) -> None:
            super().__init__()
            self.agent, self.back = policy(), back

        def forward(self, x: Tensor) -> Tensor:
            return self.agent(x).bfloat16().to(self.back)

    net, (x, y), uniform, losses = backbone().eval(), batch(32), torch.rand(32, K), []
    for back in (torch.bfloat16, torch.float32):
        agent = Rounding(back).eval()
        if phase == "policy":
            losses.append(PolicyGradient(net)(agent, x, y, uniform.unsqueeze(1)))
        else:
            losses.append(Finetune()(BlockDropNet(net, agent), x, y, uniform))
    assert losses[0].dtype == torch.float32 and torch.equal(*losses)


def test_phase_a_leaves_the_backbone_bit_for_bit():
    net, agent = backbone().train(), policy().train()
    before, modes = snapshot(net), [m.training for m in net.modules()]
    loss = PolicyGradient(net, curriculum=Curriculum(K, 3))
    loss(agent, *batch()).backward()
    assert unchanged(net, before)
    assert all(p.grad is None for p in net.parameters())
    assert [m.training for m in net.modules()] == modes
    assert all(p.grad is not None for p in agent.parameters())


def test_shared_prefix_changes_nothing():
    """Through stem, body and head the forced blocks run once; hidden behind a plain forward they run twice."""

    class Plain(nn.Module):
        num_blocks = K

        def __init__(self, net: nn.Module) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: Tensor, keep: Tensor) -> Tensor:
            return self.net(x, keep)

    net, grads = backbone().eval(), []
    calls = []
    net.layer1[0].register_forward_hook(lambda *_: calls.append(1))
    for model in (net, Plain(net)):
        agent = policy()
        loss = PolicyGradient(model, curriculum=Curriculum(K, 2), generator=torch.Generator().manual_seed(3))
        loss(agent, *batch()).backward()
        grads.append([p.grad for p in agent.parameters()])
    assert len(calls) == 1 + 2
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


def finetune_once(bn_stats: str, keep_all_out: bool = False) -> tuple[nn.Module, nn.Module]:
    net, agent = backbone(), policy()
    if keep_all_out:
        nn.init.zeros_(agent.linear.weight)
        nn.init.constant_(agent.linear.bias, -40.0)
    joint = BlockDropNet(net, agent).train()
    # a = 1 leaves the probabilities at 0 when everything is to be dropped
    loss = Finetune(bn_stats=bn_stats, a=1.0 if keep_all_out else 0.8, generator=torch.Generator().manual_seed(4))
    if keep_all_out:
        loss.pg_weight = 0.0
    loss(joint, *batch()).backward()
    return net, agent


@pytest.mark.parametrize("bn_stats", ["active", "all", "frozen"])
def test_phase_b_trains_both(bn_stats):
    net, agent = finetune_once(bn_stats)
    assert all(p.grad is not None for p in agent.parameters())
    assert sum(p.grad is not None for p in net.parameters()) > 10
    assert net.training


def test_phase_b_frozen_statistics_stay():
    net, _ = finetune_once("frozen")
    assert unchanged(net, snapshot(backbone()))


def test_phase_b_dropped_rows_leave_active_statistics():
    net, _ = finetune_once("active", keep_all_out=True)
    before = snapshot(backbone())
    blocks = [k for k in before if k.startswith("layer")]
    assert all(torch.equal(net.state_dict()[k], before[k]) for k in blocks)
    assert not torch.equal(net.bn1.running_mean, before["bn1.running_mean"])  # the stem runs for every row
    net, _ = finetune_once("all", keep_all_out=True)
    assert not torch.equal(net.layer1[0].bn1.running_mean, before["layer1.0.bn1.running_mean"])


def test_greedy_pass_leaves_the_statistics():
    """One step's statistics are those of the drawn path alone."""
    net, _ = finetune_once("active")
    alone, agent = backbone(), policy().train()
    x, _ = batch()
    keep = sample(bound(torch.sigmoid(agent(x))).detach(), torch.Generator().manual_seed(4))
    set_bn_over(alone, "kept")
    alone.train()(x, keep)
    assert unchanged(net, snapshot(alone))


def test_wrong_use_is_named():
    with pytest.raises(ValueError, match="bn_stats"):
        Finetune(bn_stats="some")
    with pytest.raises(TypeError, match="BlockDropNet"):
        Finetune()(backbone(), *batch())
    with pytest.raises(ValueError, match="num_blocks"):
        BlockDropNet(backbone(), PolicyNet(K + 1))
    with pytest.raises(ValueError, match="at least one image"):
        evaluate(backbone(), policy(), [])


def test_deployed_network_is_deterministic_and_copies():
    net = BlockDropNet(backbone(), policy()).eval()
    x, _ = batch()
    with torch.no_grad():
        first = net(x)
        torch.manual_seed(99)
        assert torch.equal(net(x), first)
        assert torch.equal(copy.deepcopy(net)(x), first)
        other = BlockDropNet(backbone(), PolicyNet(K, 1, (4, 4, 4))).eval()
        other.load_state_dict(net.state_dict())
        assert torch.equal(other(x), first)
        keep = net.decide(x)
        assert keep.dtype == torch.bool and keep.shape == (8, K)
        torch.testing.assert_close(net.backbone(x, keep), first)


def test_images_of_a_decision_become_neighbours():
    kinds = torch.rand(5, 130) < 0.5
    kinds[1] = kinds[0]
    kinds[1, 129] = ~kinds[0, 129]  # told apart by the last block alone
    keep = kinds[torch.randint(5, (40,))]
    order = by_pattern(keep)
    sorted_keep = keep[order]
    changes = (sorted_keep[1:] != sorted_keep[:-1]).any(1)
    assert int(changes.sum()) + 1 == len(keep.unique(dim=0)) and order.unique().numel() == 40
    assert all(changes[i] or order[i] < order[i + 1] for i in range(39))
    assert by_pattern(torch.zeros(0, 3, dtype=torch.bool)).shape == (0,)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_reordering_changes_no_bit(layout):
    agent, (x, _) = policy(), batch(24)
    with torch.no_grad():
        agent.linear.bias -= agent.eval()(x).mean(0)  # no block that all images keep or drop
    net = BlockDropNet(skip_form(backbone()), agent).to(memory_format=layout).eval()
    other = BlockDropNet(net.backbone, agent, reorder=True).eval()
    bucketed, seen = BlockDropNet(net.backbone, agent, bucket=3).eval(), []
    net.backbone.register_forward_pre_hook(lambda m, args: seen.append(args[1]))
    with torch.no_grad():
        assert torch.equal(net(x), other(x))
    assert len(seen[0].unique(dim=0)) > 2 and not torch.equal(*seen)
    counts = sorted(seen[0].unique(dim=0, return_counts=True)[1].tolist())
    seen.clear()
    with torch.no_grad():
        assert torch.equal(net(x), bucketed(x))
    alone = [len(part) for part in seen[1:] if len(part.unique(dim=0)) == 1 and len(part) >= 3]
    assert sorted(alone) == [n for n in counts if n >= 3] and alone and counts[0] < 3
    assert sum(map(len, seen[1:])) == len(x)
    with pytest.raises(ValueError, match="bucket must be at least 0, got -1"):
        BlockDropNet(net.backbone, agent, bucket=-1)


def test_evaluate_counts():
    net = Recorder()
    keeps = torch.tensor([[1, 1, 0, 1, 0], [0, 0, 0, 0, 0], [1, 1, 0, 1, 0], [0, 0, 0, 1, 0]])
    batches = [(torch.zeros(2, 1), torch.tensor([1, 0])), (torch.zeros(2, 1), torch.tensor([0, 3]))]
    parts = iter(keeps.split(2))
    usage = evaluate(net, lambda x: next(parts), batches)
    assert usage.top1 == 50.0  # right: rows 0 and 1
    assert usage.blocks == (3 + 0 + 3 + 1) / 4
    assert usage.patterns == 3
    assert usage.by_block == [0.5, 0.5, 0, 0.75, 0]
    assert usage.by_class[:2] == [1.5, 3.0] and usage.by_class[3] == 1.0
    assert usage.by_class[2] != usage.by_class[2]  # no image of this class
    assert torch.equal(usage.keep, keeps.bool())
    forced = evaluate(net, lambda x: torch.full((len(x), K), -1.0), batches, Curriculum(K, 1))
    assert forced.blocks == 4
    for logit, blocks in ((0.2, K), (0.0, K), (-0.2, 0)):  # logits and no probabilities; a tie keeps
        assert evaluate(net, lambda x, logit=logit: torch.full((len(x), K), logit), batches).blocks == blocks


class Depends(nn.Module):
    """Right where block 3 runs, on dark images; where no block 3 runs, on bright ones. The rest is waste."""

    num_blocks = K

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        right = keep[:, 3] == (x.mean((1, 2, 3)) < 0)
        return torch.stack([right.float(), (~right).float()], 1)


def test_a_policy_is_learned():
    """Each image has one best decision: block 3 alone if it is dark, nothing if it is bright."""
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(64, 1, 8, 8, generator=generator) * 0.1
    x[::2] += 1
    x[1::2] -= 1
    y = torch.zeros(64, dtype=torch.long)
    agent, course = policy(), Curriculum(K)
    loss = PolicyGradient(Depends(), beta=0.02, curriculum=course, generator=generator)
    fit(
        agent,
        lambda: [(x, y)],
        1,
        Recipe(epochs=250, lr=0.01, optimizer="adamw", weight_decay=0, schedule="constant"),
        loss=loss,
        after_step=lambda step: course.advance() if step % 20 == 0 else None,
    )
    usage = evaluate(Depends(), agent, [(x, y)])
    assert usage.top1 == 100
    assert usage.blocks == 0.5
    assert usage.patterns == 2
    assert sum(loss.rewards[-20:]) > sum(loss.rewards[:20])
