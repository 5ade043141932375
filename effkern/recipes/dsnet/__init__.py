"""A supernet of many widths: sandwich training, the batch-norm statistics of every width, then its gates."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor, nn

from effkern.data import Dataset
from effkern.dsnet import GateTraining, SupernetTraining, all_ways, calibrate, meet_budget
from effkern.dsnet.gate_loss import Hopeless, SgsForm, Targets
from effkern.dsnet.gating import CostForm
from effkern.dsnet.method import Target
from effkern.dsnet.route import routed
from effkern.recipes._runner import Phase
from effkern.recipes._shared import DataConfig, NetworkConfig, RunConfig, load_network
from effkern.training import Method, Recipe
from effkern.training.config import check

__all__ = ["Config", "phases"]


@dataclass(frozen=True)
class SupernetConfig:
    """The supernet's training; see :class:`effkern.dsnet.SupernetTraining`.

    Attributes:
        train: how; None takes the network, trained and calibrated, as its ``init`` file has it.
        random: widths drawn a step between the ends.
        target: what the narrower widths learn: ``"labels"``, ``"distillation"`` or ``"bootstrapping"``.
        ensemble: whether the slimmest learns from the teacher at several widths.
        decay: of the teacher.
        calibration: batches that every width's statistics are measured on at the end.
        held_out: share of the training images that it does not see, for gates to learn from: on images it has learned
            the slimmest width is right too often.
    """

    train: Recipe | None = None
    random: int = 2
    target: Target = "bootstrapping"
    ensemble: bool = True
    decay: float = 0.997
    calibration: int = 100
    held_out: float = 0.0

    def __post_init__(self) -> None:
        check(
            self,
            random=(self.random >= 0, "at least 0"),
            decay=(0 <= self.decay < 1, "in [0, 1)"),
            calibration=(self.calibration >= 1, "at least 1"),
            held_out=(0 <= self.held_out < 1, "in [0, 1)"),
        )


@dataclass(frozen=True)
class GateConfig:
    """The gates' training; see :class:`effkern.dsnet.GateTraining`.

    Attributes:
        train: how.
        space: width indices the gates choose from, if others than the network's.
        seen: share of the training images shown beside those held out, which the supernet was trained on; None: all.
        exact: whether offsets are set on held-out images so that they cost the budget; see
            :func:`effkern.dsnet.meet_budget`.
    """

    train: Recipe
    space: tuple[int, ...] = ()
    sgs: SgsForm = "balanced"
    targets: Targets = "ends"
    hopeless: Hopeless = "widest"
    task: float = 1.0
    sgs_weight: float = 1.0
    cost: CostForm = "relative"
    cost_weight: float = 0.5
    budget: float | None = None
    exact: bool = True
    tau: float = 1.0
    gate_smoothing: float = 0.0
    heads: Literal["slim", "both"] = "both"
    entropy: float = 0.05
    seen: float | None = None

    def __post_init__(self) -> None:
        check(
            self,
            task=(self.task >= 0, "at least 0"),
            sgs_weight=(self.sgs_weight >= 0, "at least 0"),
            cost_weight=(self.cost_weight >= 0, "at least 0"),
            tau=(self.tau > 0, "positive"),
            entropy=(0 <= self.entropy < math.inf, "at least 0 and finite"),
            gate_smoothing=(0 <= self.gate_smoothing <= 1, "in [0, 1]"),
            seen=(self.seen is None or 0 <= self.seen <= 1, "in [0, 1]"),
        )


@dataclass(frozen=True)
class Config:
    """A run: phases ``supernet`` (if it is trained) and ``gate`` (if there is one)."""

    network: NetworkConfig
    supernet: SupernetConfig = field(default_factory=SupernetConfig)
    gate: GateConfig | None = None
    data: DataConfig = field(default_factory=DataConfig)
    run: RunConfig = field(default_factory=RunConfig)


def phases(config: Config, data: Dataset, outcome: Callable[[str], Mapping[str, Tensor]]) -> Sequence[Phase]:
    """Supernet, gates.

    Raises:
        ValueError: if nothing is to be trained.
    """
    chosen, gating = config.supernet, config.gate
    if chosen.train is None and gating is None:
        raise ValueError("supernet.train, gate: at least one must be given")
    learned = data.train[: round(len(data.train) * (1 - chosen.held_out))]
    seed = 0 if chosen.train is None else chosen.train.seed

    def supernet() -> Method:
        assert chosen.train is not None
        model = load_network(config.network, data, seed)
        widths = _widths(model)
        if gating is not None:
            learning(copy.deepcopy(model))  # what it refuses is said now, and not when the supernet is trained
        smoothing = chosen.train.label_smoothing
        return SupernetTraining(model, widths, chosen.random, chosen.target, chosen.ensemble, chosen.decay, smoothing)

    def finish_supernet(method: Method) -> None:
        # Fresh passes over training images as they are; their order is the seed's.
        feed = data.feed(learned, min(250, len(learned)), seed)
        images = (feed(step)[0] for step in range(chosen.calibration))
        model = method.result()
        ways = all_ways(model) if config.network.options.get("statistics") == "way" else ()
        calibrate(model, images, range(_widths(model)), ways)

    def gate() -> Method:
        assert gating is not None
        model = load_network(config.network, data, seed)
        if chosen.train is not None:
            model.load_state_dict(outcome("supernet"))
        return learning(model)

    def learning(model: nn.Module) -> Method:
        assert gating is not None
        for one in routed(model).gates:
            one.space = gating.space or one.space
            if one.space[-1] >= _widths(model):
                last = _widths(model) - 1
                raise ValueError(f"gate.space: must be width indices of at most {last}, got {list(one.space)}")
        return GateTraining(
            model,
            data.image_shape,
            gating.sgs,
            gating.targets,
            gating.hopeless,
            gating.task,
            gating.sgs_weight,
            gating.cost,
            gating.cost_weight,
            gating.budget,
            gating.tau,
            gating.train.label_smoothing,
            gating.gate_smoothing,
            gating.heads,
            config.run.cache_gb * 1e9,
            gating.entropy,
        )

    def finish_gate(method: Method) -> None:
        assert isinstance(method, GateTraining) and gating is not None
        if gating.budget is not None and gating.exact:
            meet_budget(method.net, _HeldOut(data), gating.budget * method.most, method.costs)

    result = []
    if chosen.train is not None:
        before = ("network", "supernet")
        result.append(Phase("supernet", chosen.train, supernet, before, finish=finish_supernet, images=learned))
    if gating is not None:
        seen = len(learned) if gating.seen is None else min(len(learned), round(len(data.train) * gating.seen))
        shown = data.train[len(learned) - seen :]
        depends = ("network", "supernet", "gate")
        result.append(Phase("gate", gating.train, gate, depends, finish=finish_gate, images=shown))
    return result


class _HeldOut:
    """The held-out images in batches, as often as they are asked for."""

    def __init__(self, data: Dataset) -> None:
        self.data = data

    def __iter__(self) -> Iterator[Tensor]:
        return (x for x, _ in self.data.batches(self.data.val, 250))


def _widths(model: nn.Module) -> int:
    """Number of width indices of a slimmable network.

    Raises:
        ValueError: if it has none.
    """
    count = getattr(model, "num_widths", None) or len(getattr(model, "widths", ()))
    if not count:
        raise ValueError(f"network: {type(model).__name__} is not slimmable (it has neither widths nor num_widths)")
    return int(count)
