"""BlockDrop from a dense network to a policy: the base (fine-tuned or trained), the policy alone, both together."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from effkern.blockdrop import (
    BlockDropNet,
    JointTraining,
    PolicyNet,
    PolicyTraining,
    block_costs,
    load_first_blocks,
)
from effkern.blockdrop.loss import Credit, EntropyForm
from effkern.blockdrop.train import BnStats
from effkern.data import Dataset
from effkern.nn import skip_form
from effkern.nn.stochastic_depth import Mode, Scale
from effkern.recipes._runner import Phase
from effkern.recipes._shared import DataConfig, NetworkConfig, RunConfig, load_into, load_network, read_weights
from effkern.stochastic_depth import StochasticDepthTraining, convert, deploy, survival_schedule
from effkern.stochastic_depth.schedule import Form
from effkern.training import Criterion, Method, Recipe, Supervised
from effkern.training.config import check

__all__ = ["Config", "phases"]


#: What the reward counts: blocks, their multiply-adds, or the time they take on the machine that begins the phase.
Cost = Literal["blocks", "macs", "time"]


@dataclass(frozen=True)
class BaseConfig:
    """The dense network's own training.

    Attributes:
        train: how; None takes the network as its ``init`` file has it.
        survival: probability of running the last block; below 1 the base learns by stochastic depth, which makes its
            blocks easier to drop.
        form: of the survival over the blocks.
        mode: ``"batch"``, ``"row"`` or ``"subset"``; with the last two each image takes a path of its own, as later.
        scale: ``"original"``, ``"inverted"`` or ``"none"``; with the last a path of the usual length computes what it
            did in training, while the original scale of inference is meant for all blocks.
    """

    train: Recipe | None = None
    survival: float = 1.0
    form: Form = "linear"
    mode: Mode = "batch"
    scale: Scale = "original"

    def __post_init__(self) -> None:
        check(self, survival=(0 <= self.survival <= 1, "in [0, 1]"))


@dataclass(frozen=True)
class TeacherConfig:
    """A trained network from whose answers, besides the labels, base and joint phase learn; see
    :class:`effkern.training.Criterion`.

    Attributes:
        init: file of its weights.
        name, options: of a network that is another one than the student; see `NetworkConfig`.
    """

    init: str
    name: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    weight: float = 0.5
    temperature: float = 1.0

    def __post_init__(self) -> None:
        check(
            self,
            init=(bool(self.init), "a file of weights"),
            weight=(0 <= self.weight <= 1, "in [0, 1]"),
            temperature=(self.temperature > 0, "positive"),
            options=(bool(self.name) or not self.options, "left out without a name"),
        )


@dataclass(frozen=True)
class PolicyConfig:
    """The policy network and phase A; see :class:`effkern.blockdrop.PolicyNet` and
    :class:`effkern.blockdrop.PolicyTraining`.

    Attributes:
        weights: file of a trained residual network whose stem and first blocks, of its shapes, the policy begins with.
        overhead: whether the reward counts what every image costs besides, the policy network included.
    """

    train: Recipe
    widths: tuple[int, ...] = (16, 32, 64)
    stem_stride: int = 1
    pool: int = 1
    init: float = 0.0
    large: bool = False
    weights: str = ""
    gamma: float = 1.0
    a: float = 0.8
    beta: float = 0.1
    entropy_form: EntropyForm = "bernoulli"
    samples: int = 1
    curriculum: bool = True
    blocks_per_epoch: float = 1.0
    ramp: float = 0.0
    cost: Cost = "blocks"
    overhead: bool = False
    credit: Credit = "answer"

    def __post_init__(self) -> None:
        check(
            self,
            gamma=(self.gamma >= 0, "at least 0"),
            a=(0.5 < self.a <= 1, "in (0.5, 1]"),
            beta=(self.beta >= 0, "at least 0"),
            samples=(self.samples >= 1, "at least 1"),
            blocks_per_epoch=(self.blocks_per_epoch > 0, "positive"),
            ramp=(0 <= self.ramp <= 1, "in [0, 1]"),
        )


@dataclass(frozen=True)
class JointConfig:
    """Phase B; see :class:`effkern.blockdrop.JointTraining` and, of ``cost`` and ``overhead``, `PolicyConfig`.

    Attributes:
        init: file of what an earlier joint phase left, to go on from with, say, another penalty: base and policy phase
            are left out then.
    """

    train: Recipe
    init: str = ""
    gamma: float = 5.0
    a: float = 0.8
    pg_weight: float = 1.0
    bn_stats: BnStats = "active"
    policy_lr: float = 1.0
    beta: float = 0.0
    cost: Cost = "blocks"
    overhead: bool = False
    credit: Credit = "answer"

    def __post_init__(self) -> None:
        check(
            self,
            gamma=(self.gamma >= 0, "at least 0"),
            a=(0.5 < self.a <= 1, "in (0.5, 1]"),
            pg_weight=(self.pg_weight >= 0, "at least 0"),
            beta=(self.beta >= 0, "at least 0"),
            policy_lr=(self.policy_lr >= 0, "at least 0"),
        )


@dataclass(frozen=True)
class Config:
    """A run: phases ``base`` (if it is trained), ``policy`` and ``joint``."""

    network: NetworkConfig
    policy: PolicyConfig
    joint: JointConfig
    base: BaseConfig = field(default_factory=BaseConfig)
    teacher: TeacherConfig | None = None
    data: DataConfig = field(default_factory=DataConfig)
    run: RunConfig = field(default_factory=RunConfig)


def phases(config: Config, data: Dataset, outcome: Callable[[str], Mapping[str, Tensor]]) -> Sequence[Phase]:
    """Base, policy, joint.

    Raises:
        ValueError: if overhead is to be counted in blocks.
    """
    learning: dict[str, PolicyConfig | JointConfig] = {"policy": config.policy, "joint": config.joint}
    for name, chosen in learning.items():
        if chosen.overhead and chosen.cost == "blocks":
            raise ValueError(f"{name}.overhead: needs {name}.cost = 'macs' or 'time', as it is no number of blocks")

    def base() -> Method:
        network = load_network(config.network, data, _base_seed(config))
        policy_net(network)  # what is wrong with it is said now, and not when the base is trained
        train = config.base.train
        assert train is not None
        judge = criterion(train.label_smoothing)
        if config.base.survival == 1:
            return Supervised(network, criterion=judge)
        return StochasticDepthTraining(_stochastic(network, config.base), judge)

    def criterion(label_smoothing: float = 0.0) -> Criterion:
        if config.teacher is None:
            return Criterion(label_smoothing)
        chosen = config.teacher
        like = NetworkConfig(chosen.name, chosen.options) if chosen.name else config.network
        teacher = load_network(replace(like, init=chosen.init), data, 0)
        if config.run.skip_ops and hasattr(teacher, "num_blocks"):
            teacher = skip_form(teacher)
        return Criterion(label_smoothing, teacher, chosen.weight, chosen.temperature)

    def backbone() -> nn.Module:
        network = load_network(config.network, data, _base_seed(config))
        if config.base.train is not None and not config.joint.init:
            network.load_state_dict(outcome("base"))
            if config.base.survival < 1:  # the scale of inference becomes part of the weights
                network = deploy(_stochastic(network, config.base))
        network = skip_form(network) if config.run.skip_ops else network
        return network.to(memory_format=torch.channels_last)

    def policy_net(network: nn.Module) -> PolicyNet:
        chosen, (channels, *size) = config.policy, data.image_shape
        if chosen.pool > min(size):
            raise ValueError(f"policy.pool: must be at most {min(size)}, the size of the images, got {chosen.pool}")
        torch.manual_seed(chosen.train.seed + 1)
        policy = PolicyNet(
            _blocks(network), channels, chosen.widths, chosen.stem_stride, chosen.pool, chosen.init, chosen.large
        )
        if chosen.weights:
            load_first_blocks(policy, read_weights(Path(chosen.weights)))
        return policy.to(memory_format=torch.channels_last)

    def net() -> BlockDropNet:
        network = backbone()
        return BlockDropNet(network, policy_net(network))

    def prices(net: BlockDropNet, chosen: PolicyConfig | JointConfig) -> tuple[Tensor | None, float]:
        if chosen.cost == "blocks":
            return None, 0.0
        each, rest = block_costs(net, data.image_shape, chosen.cost)
        return each, rest if chosen.overhead else 0.0

    def policy() -> Method:
        both, chosen = net(), config.policy
        cost, overhead = prices(both, chosen)
        return PolicyTraining(
            both,
            chosen.gamma,
            chosen.a,
            chosen.beta,
            chosen.entropy_form,
            chosen.samples,
            chosen.blocks_per_epoch,
            chosen.ramp,
            chosen.curriculum,
            cost,
            config.run.cache_gb * 1e9,
            overhead,
            chosen.credit,
        )

    def joint() -> Method:
        both, chosen = net(), config.joint
        if chosen.init:
            load_into(both, Path(chosen.init), f"{config.network.name} and its policy")
        else:
            both.load_state_dict(outcome("policy"))
        return JointTraining(
            both,
            chosen.gamma,
            chosen.a,
            chosen.pg_weight,
            chosen.bn_stats,
            chosen.policy_lr,
            *prices(both, chosen),
            chosen.beta,
            criterion(),
            chosen.credit,
        )

    before = ("network", "base", "teacher")
    last = Phase("joint", config.joint.train, joint, (*before, "policy", "joint"), keep_best=True)
    if config.joint.init:
        return [last]
    first = [] if config.base.train is None else [Phase("base", config.base.train, base, before)]
    return [*first, Phase("policy", config.policy.train, policy, (*before, "policy")), last]


def _stochastic(network: nn.Module, base: BaseConfig) -> nn.Module:
    survival = survival_schedule(_blocks(network), base.survival, base.form)
    return convert(network, survival, base.mode, base.scale)


def _base_seed(config: Config) -> int:
    return 0 if config.base.train is None else config.base.train.seed


def _blocks(network: nn.Module) -> int:
    """K.

    Raises:
        ValueError: if the network has no blocks to skip.
    """
    blocks = getattr(network, "num_blocks", 0)
    if not blocks:
        raise ValueError(f"network: {type(network).__name__} has no skippable blocks (num_blocks)")
    return int(blocks)
