"""The two phases of BlockDrop as methods of the training loop."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from effkern.blockdrop.curriculum import Curriculum
from effkern.blockdrop.loss import Credit, EntropyForm, reward
from effkern.blockdrop.network import BlockDropNet
from effkern.blockdrop.train import BnStats, Finetune, PolicyGradient, Usage, evaluate
from effkern.training import Batches, Criterion, Method, Recipe, RowCache, Step, parameter_groups

__all__ = ["JointTraining", "PolicyTraining"]

_DRAW = 1  # stream


class _OnPolicy(Method):
    """What both phases share: a network with its policy, and what is measured of it."""

    score = "reward"
    num_blocks: Tensor
    cost: Tensor | None
    overhead: Tensor | None

    def __init__(self, net: BlockDropNet, gamma: float, cost: Tensor | None, overhead: float) -> None:
        super().__init__()
        self.net, self.gamma = net, gamma
        # Buffers, as measured costs are those that the run began with, also when it is resumed.
        if cost is None and overhead:
            cost = torch.ones(self.k)
        self.register_buffer("cost", None if cost is None else cost.float().clone())
        self.register_buffer("overhead", None if cost is None else torch.tensor(float(overhead)))
        self.register_buffer("num_blocks", torch.tensor(net.policy.num_blocks))
        self.usage: Usage | None = None

    @property
    def prices(self) -> tuple[Tensor | None, Tensor | float]:
        """Cost and overhead as :func:`reward` takes them."""
        return self.cost, 0.0 if self.overhead is None else self.overhead

    @property
    def k(self) -> int:
        """K, the number of blocks."""
        return int(self.net.policy.num_blocks)  # type: ignore[arg-type]

    def evaluate(self, batches: Batches) -> dict[str, float]:
        """Accuracy, blocks, distinct decisions and mean reward of the greedy policy, all blocks being its own."""
        self.usage = evaluate(self.net.backbone, self.net.policy, batches)
        gains = reward(self.usage.correct, self.usage.keep, self.gamma, *self.prices)
        usage = self.usage
        return {
            "reward": float(gains.double().mean()),
            "top1": usage.top1,
            "blocks": usage.blocks,
            "patterns": usage.patterns,
        }

    def report(self) -> dict[str, Any]:
        """Who uses which blocks."""
        if self.usage is None:
            return {}
        by_class = [None if math.isnan(blocks) else blocks for blocks in self.usage.by_class]
        return {"by_block": self.usage.by_block, "by_class": by_class}

    def result(self) -> nn.Module:
        """Backbone and policy."""
        return self.net

    def load_state_dict(self, state_dict: Any, *args: Any, **kwargs: Any) -> Any:
        """As of any module; a state of another number of blocks is refused by that number. One that holds no costs
        leaves them as they are."""
        found = state_dict.get("num_blocks")
        if found is not None and int(found) != self.k:
            raise ValueError(f"the checkpoint is of a policy over {int(found)} blocks, the network has {self.k}")
        own = {name: getattr(self, name) for name in ("cost", "overhead") if getattr(self, name) is not None}
        return super().load_state_dict({**own, **state_dict}, *args, **kwargs)


class PolicyTraining(_OnPolicy):
    """Phase A: the policy learns in front of a frozen backbone, block by block from the last.

    With t free blocks the first K - t are the same in every pass and are run once a step. The backbone should be in its
    skipping form (:func:`effkern.nn.skip_form`): the passes then cost what they keep.

    Args:
        net: backbone and policy; the backbone is frozen.
        gamma: penalty of a wrong answer.
        a: bound of the probabilities.
        beta: weight of the entropy.
        entropy_form: ``"bernoulli"`` or ``"published"``.
        samples: draws an image, see :class:`PolicyGradient`.
        blocks_per_epoch: how fast the curriculum frees blocks, as published one an epoch.
        ramp: share of the run over which it frees them instead; 0 uses ``blocks_per_epoch``.
        curriculum: whether there is one; without, all blocks are free from the start.
        cost: ``[K]``, of each block; default: all the same. See :func:`effkern.blockdrop.block_costs`.
        overhead: what every image costs besides, in the same unit; see :func:`effkern.blockdrop.reward`.
        cache: bytes for what the forced blocks make of each image, kept as long as they stay the same ones; of use
            where images are not augmented and blocks are freed more slowly than one an epoch.
    """

    free_blocks: Tensor

    def __init__(
        self,
        net: BlockDropNet,
        gamma: float = 1.0,
        a: float = 0.8,
        beta: float = 0.1,
        entropy_form: EntropyForm = "bernoulli",
        samples: int = 1,
        blocks_per_epoch: float = 1.0,
        ramp: float = 0.0,
        curriculum: bool = True,
        cost: Tensor | None = None,
        cache: float = 0.0,
        overhead: float = 0.0,
        credit: Credit = "answer",
    ) -> None:
        super().__init__(net, gamma, cost, overhead)
        net.backbone.requires_grad_(False).eval()
        self.blocks_per_epoch, self.ramp = blocks_per_epoch, ramp
        course = Curriculum(self.k) if curriculum else None
        self.gradient = PolicyGradient(
            net.backbone, gamma, a, beta, course, *self.prices, entropy_form, samples, RowCache(cache), credit
        )
        # In the checkpoint as it is, not worked out again from an epoch number.
        self.register_buffer("free_blocks", torch.tensor(1 if curriculum else self.k))

    def free(self, at: Step) -> int:
        """How many blocks are free in a step."""
        if self.gradient.curriculum is None:
            return self.k
        done = self.k * at.fraction / self.ramp if self.ramp else at.epoch * self.blocks_per_epoch
        return max(1, min(self.k, 1 + int(done)))

    def losses(self, x: Tensor, y: Tensor, at: Step) -> Iterable[Tensor]:
        """One loss, of the policy alone."""
        self.free_blocks.fill_(self.free(at))
        if self.gradient.curriculum is not None:
            self.gradient.curriculum.free_blocks = int(self.free_blocks)
        uniform = at.uniform(len(x), self.gradient.samples, self.k, stream=_DRAW)
        loss = self.gradient(self.net.policy, x, y, uniform, at.rows)
        at.metrics.update(self.gradient.take(), free=int(self.free_blocks))
        yield loss

    def evaluate(self, batches: Batches) -> dict[str, float]:
        """As of both phases, and the accuracy with the blocks forced on that the curriculum has not freed."""
        course = Curriculum(self.k, int(self.free_blocks))
        right, blocks, images = 0, 0, 0

        def forced_too() -> Iterator[tuple[Tensor, Tensor]]:
            # Batch by batch, as a pass over large images is not to be held in memory for a second one.
            nonlocal right, blocks, images
            for x, y in batches:
                forced = evaluate(self.net.backbone, self.net.policy, [(x, y)], course)
                right, blocks = right + int(forced.correct.sum()), blocks + int(forced.keep.sum())
                images += len(y)
                yield x, y

        metrics = super().evaluate(forced_too())
        return {**metrics, "top1_forced": 100 * right / images, "blocks_forced": blocks / images}

    def train(self, mode: bool = True) -> PolicyTraining:
        """The backbone stays in eval mode, with its packed weights."""
        self.training = mode
        self.net.policy.train(mode)
        return self


class JointTraining(_OnPolicy):
    """Phase B: policy and backbone together.

    Args:
        net: backbone and policy.
        gamma: penalty of a wrong answer, larger than in phase A.
        a: bound of the probabilities.
        pg_weight: see :class:`Finetune`.
        bn_stats: see :class:`Finetune`.
        policy_lr: learning rate of the policy as a multiple of the recipe's.
        cost: ``[K]``, of each block; default: all the same. See :func:`effkern.blockdrop.block_costs`.
        overhead: what every image costs besides, in the same unit; see :func:`effkern.blockdrop.reward`.
        beta: see :class:`Finetune`.
        criterion: see :class:`Finetune`.
        credit: of an answer in training, see :func:`effkern.blockdrop.credit_of`.
    """

    def __init__(
        self,
        net: BlockDropNet,
        gamma: float = 5.0,
        a: float = 0.8,
        pg_weight: float = 1.0,
        bn_stats: BnStats = "active",
        policy_lr: float = 1.0,
        cost: Tensor | None = None,
        overhead: float = 0.0,
        beta: float = 0.0,
        criterion: Criterion | None = None,
        credit: Credit = "answer",
    ) -> None:
        super().__init__(net, gamma, cost, overhead)
        self.policy_lr = policy_lr
        judge = criterion or Criterion()
        self.objective = Finetune(gamma, a, pg_weight, bn_stats, *self.prices, beta, judge, credit)

    def parameter_groups(self, recipe: Recipe) -> list[dict[str, Any]]:
        """Both networks, the policy at its own rate."""
        policy = parameter_groups(self.net.policy, recipe, self.policy_lr)
        return [*parameter_groups(self.net.backbone, recipe), *policy]

    def losses(self, x: Tensor, y: Tensor, at: Step) -> Iterable[Tensor]:
        """One loss."""
        loss = self.objective(self.net, x, y, at.uniform(len(x), self.k, stream=_DRAW))
        at.metrics.update(self.objective.take())
        yield loss
