"""The two phases of training as loss functions for :func:`effkern.training.fit`, and the evaluation of a policy."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from effkern.blockdrop.curriculum import Curriculum
from effkern.blockdrop.loss import Credit, EntropyForm, check_credit, credit_of, leave_one_out, policy_loss, reward
from effkern.blockdrop.network import BlockDropNet, eval_mode
from effkern.blockdrop.policy import bound, greedy, sample, wide
from effkern.nn.residual import set_bn_over
from effkern.nn.skip import SkipBlock
from effkern.training import Criterion, RowCache

BnStats = Literal["active", "all", "frozen"]


@torch.no_grad()
def _scores(
    net: Any, x: Tensor, keeps: list[Tensor], forced: int, cache: RowCache | None = None, rows: Tensor | None = None
) -> list[Tensor]:
    """Scores under several decisions. The first ``forced`` blocks, on in all of them, are run once, or found."""
    if forced and all(hasattr(net, part) for part in ("stem", "body", "head")):

        def begin(x: Tensor) -> Tensor:
            return net.body(net.stem(x), None, 0, forced)

        state = begin(x) if cache is None else cache(begin, x, rows, forced)
        return [net.head(net.body(state, keep, forced)) for keep in keeps]
    return [net(x, keep) for keep in keeps]


@dataclass(kw_only=True)
class _Drawing:
    """A loss of drawn decisions, and what it saw of them.

    Attributes:
        generator: source of the draws.
        rewards: mean reward of the draws, one entry a step.
        usages: mean share of blocks the draws ran, one entry a step.
    """

    generator: torch.Generator | None = None
    rewards: list[float] = field(default_factory=list, repr=False)
    usages: list[float] = field(default_factory=list, repr=False)

    def note(self, gains: Tensor, drawn: Tensor) -> None:
        """Record a step."""
        reward, usage = torch.stack([gains.mean(), drawn.float().mean()]).tolist()  # one wait for a device, not two
        self.rewards.append(reward)
        self.usages.append(usage)

    def take(self) -> dict[str, float]:
        """The last step's record, taken out: for who keeps records of his own."""
        return {"reward": self.rewards.pop(), "usage": self.usages.pop()}


@dataclass
class PolicyGradient(_Drawing):
    """Phase A: the loss of the policy in front of a frozen backbone.

    Use as ``fit(policy, ..., loss=PolicyGradient(backbone, ...))``. The self-critical baseline is the greedy action's
    reward. Both passes of the backbone run without gradient and in eval mode, so it may be the deployed form with real
    skipping.

    Attributes:
        backbone: see :class:`effkern.blockdrop.Backbone`; its parameters and statistics are not touched.
        gamma: penalty of a wrong answer.
        a: bound of the probabilities; see :func:`effkern.blockdrop.bound`.
        beta: weight of the entropy.
        curriculum: which blocks are free; default: all.
        cost, overhead: see :func:`effkern.blockdrop.reward`.
        entropy_form: see :func:`effkern.blockdrop.entropy`.
        samples: draws an image. One is held against the greedy decision; several against each other
            (:func:`effkern.blockdrop.leave_one_out`), without a greedy pass.
        cache: keeps what the forced blocks give, for the epochs in which they stay the same.
        credit: see :func:`effkern.blockdrop.credit_of`.
        generator, rewards, usages: source of the draws, and their mean reward and share of blocks, an entry a step.
    """

    backbone: nn.Module
    gamma: float = 1.0
    a: float = 0.8
    beta: float = 0.1
    curriculum: Curriculum | None = None
    cost: Tensor | None = None
    overhead: Tensor | float = 0.0
    entropy_form: EntropyForm = "bernoulli"
    samples: int = 1
    cache: RowCache | None = None
    credit: Credit = "answer"

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise ValueError(f"samples must be at least 1, got {self.samples}")
        check_credit(self.credit)

    def __call__(
        self, policy: nn.Module, x: Tensor, y: Tensor, uniform: Tensor | None = None, rows: Tensor | None = None
    ) -> Tensor:
        """Loss of one batch; only ``policy`` gets a gradient.

        Args:
            policy: ``[N, ...]`` to logits ``[N, K]``.
            x, y: images and labels.
            uniform: ``[N, samples, K]`` numbers in [0, 1) for the draws; default: from ``generator``.
            rows: see :attr:`effkern.training.Step.rows`.
        """
        logits = wide(policy(x))
        s = torch.sigmoid(logits.detach())
        numbers = [None] * self.samples if uniform is None else uniform.unbind(1)
        keeps = [sample(bound(s, self.a), self.generator, one) for one in numbers]
        if self.samples == 1:
            keeps.append(greedy(s))
        forced, free = 0, None
        if self.curriculum is not None:
            keeps = [self.curriculum.force(keep) for keep in keeps]
            forced, free = self.curriculum.forced, self.curriculum.free()
        with eval_mode(self.backbone):
            scores = _scores(self.backbone, x, keeps, forced, self.cache, rows)
        gains = [
            reward(credit_of(score, y, self.credit), keep, self.gamma, self.cost, self.overhead)
            for score, keep in zip(scores, keeps, strict=True)
        ]
        drawn = keeps[: self.samples]
        advantages = [gains[0] - gains[1]] if self.samples == 1 else leave_one_out(torch.stack(gains)).unbind()
        self.note(torch.stack(gains[: self.samples]), torch.stack(drawn))
        losses = [
            policy_loss(logits, keep, advantage, self.a, free, self.beta, self.entropy_form)
            for keep, advantage in zip(drawn, advantages, strict=True)
        ]
        return torch.stack(losses).mean()


@dataclass
class Finetune(_Drawing):
    """Phase B: policy and backbone together; cross-entropy of the drawn path plus the policy gradient.

    Use as ``fit(BlockDropNet(backbone, policy), ..., loss=Finetune(...))``. The blocks were trained to see all their
    predecessors; this phase shows them the paths they will really run on. The greedy pass is only the baseline: it runs
    without gradient and in eval mode, so it leaves the running statistics as they are.

    Attributes:
        gamma: penalty of a wrong answer, larger than in phase A.
        a: bound of the probabilities.
        pg_weight: weight of the policy gradient, mean over the batch, beside the mean cross-entropy. The batch size
            here reproduces the original, which summed it. With Adam it hardly matters, as the policy's parameters get
            no other gradient.
        bn_stats: ``"active"``: batch statistics over the rows that run a block, which is what test time sees; only
            those rows are computed. ``"all"``: over the whole batch, dropped rows included, as published. ``"frozen"``:
            the backbone's running statistics are used and kept.
        cost, overhead: see :func:`effkern.blockdrop.reward`.
        beta: weight of the entropy; published without.
        criterion: what the scores of the drawn path are held against; default: the labels.
        credit: see :func:`effkern.blockdrop.credit_of`.
        generator, rewards, usages: source of the draws, and their mean reward and share of blocks, an entry a step.
    """

    gamma: float = 5.0
    a: float = 0.8
    pg_weight: float = 1.0
    bn_stats: BnStats = "active"
    cost: Tensor | None = None
    overhead: Tensor | float = 0.0
    beta: float = 0.0
    criterion: Criterion = field(default_factory=Criterion)
    credit: Credit = "answer"

    def __post_init__(self) -> None:
        if self.bn_stats not in ("active", "all", "frozen"):
            raise ValueError(f"bn_stats must be 'active', 'all' or 'frozen', got {self.bn_stats!r}")
        check_credit(self.credit)

    def __call__(self, net: nn.Module, x: Tensor, y: Tensor, uniform: Tensor | None = None) -> Tensor:
        """Loss of one batch for a :class:`BlockDropNet`; ``uniform`` ``[N, K]`` holds numbers for the draw."""
        if not isinstance(net, BlockDropNet):
            raise TypeError(f"net must be a BlockDropNet, got {type(net).__name__}")
        backbone = net.backbone
        set_bn_over(backbone, "all" if self.bn_stats == "all" else "kept")
        logits = wide(net.policy(x))
        s = torch.sigmoid(logits.detach())
        drawn, best = sample(bound(s, self.a), self.generator, uniform), greedy(s)
        # Plain blocks gather the rows they run. How many those are is then known after one wait for a device.
        rows = torch.stack([drawn, best]).cpu()
        skips = any(isinstance(module, SkipBlock) for module in backbone.modules())
        with eval_mode(backbone), torch.no_grad():
            baseline = self._reward(backbone(x, best if skips else rows[1]), y, best)
        if self.bn_stats == "frozen":
            with eval_mode(backbone):
                scores = backbone(x, drawn)
        else:
            scores = backbone(x, rows[0])
        gain = self._reward(scores.detach(), y, drawn)
        self.note(gain, drawn)
        gradient = policy_loss(logits, drawn, gain - baseline, self.a, beta=self.beta)
        return self.criterion(scores, x, y) + self.pg_weight * gradient

    def _reward(self, scores: Tensor, y: Tensor, keep: Tensor) -> Tensor:
        return reward(credit_of(scores, y, self.credit), keep, self.gamma, self.cost, self.overhead)


@dataclass(frozen=True)
class Usage:
    """What a policy does on a set of images.

    Attributes:
        top1: accuracy in percent.
        blocks: mean number of blocks run.
        patterns: number of distinct decisions.
        by_block: ``[K]``, share of the images that run each block.
        by_class: ``[classes]``, mean number of blocks for the images of each label; NaN for a label not seen.
        keep: ``[N, K]`` bool, every decision.
        correct: ``[N]`` bool, whether the answer was right.
        labels: ``[N]``, what it should have been.
    """

    top1: float
    blocks: float
    patterns: int
    by_block: list[float]
    by_class: list[float]
    keep: Tensor = field(repr=False)
    correct: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.bool), repr=False)
    labels: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64), repr=False)


@torch.no_grad()
def evaluate(
    backbone: nn.Module,
    decide: Callable[[Tensor], Tensor],
    batches: Iterable[tuple[Tensor, Tensor]],
    curriculum: Curriculum | None = None,
) -> Usage:
    """Run a backbone under a decision rule, greedy, in eval mode.

    Args:
        backbone: see :class:`effkern.blockdrop.Backbone`.
        decide: images to ``[N, K]``: 0/1 decisions (bool or integer), or logits of keeping (float), for example a
            policy network.
        batches: ``(x, labels)``.
        curriculum: with one, its forced blocks are on, as during training; without, the policy decides on all. Report
            both while a curriculum is not done: the forced figure flatters.

    Raises:
        ValueError: if there is no image.
    """
    keeps, right, labels = [], [], []
    modules = [net for net in (backbone, decide) if isinstance(net, nn.Module)]
    with eval_mode(nn.ModuleList(modules)):
        for x, y in batches:
            keep = decide(x)
            keep = greedy(torch.sigmoid(keep)) if keep.is_floating_point() else keep.bool()
            keep = keep if curriculum is None else curriculum.force(keep)
            keeps.append(keep)
            right.append(backbone(x, keep).argmax(1) == y)
            labels.append(y)
    if not keeps:
        raise ValueError("batches: must hold at least one image, got none")
    keep, correct, label = torch.cat(keeps), torch.cat(right), torch.cat(labels)
    used = keep.sum(1).double()
    return Usage(
        top1=100 * float(correct.double().mean()),
        blocks=float(used.mean()),
        patterns=len(keep.unique(dim=0)),
        by_block=keep.double().mean(0).tolist(),
        by_class=[float(used[label == c].mean()) for c in range(int(label.max()) + 1)],
        keep=keep,
        correct=correct,
        labels=label,
    )
