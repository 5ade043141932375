"""Stochastic depth on a residual network."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

from effkern.data import Dataset
from effkern.nn.stochastic_depth import Mode, Scale
from effkern.recipes._runner import Phase
from effkern.recipes._shared import DataConfig, NetworkConfig, RunConfig, load_network
from effkern.stochastic_depth import StochasticDepthTraining, blocks_of, convert, deploy, survival_schedule
from effkern.stochastic_depth.schedule import Form
from effkern.training import Criterion, Method, Recipe

__all__ = ["Config", "phases"]


@dataclass(frozen=True)
class DepthConfig:
    """How blocks survive; ``last`` = 1 is plain training.

    Attributes:
        last: probability of running the last block.
        form: ``"linear"``, ``"uniform"`` or ``"linspace"``.
        mode: ``"batch"``, ``"row"`` or ``"subset"``.
        scale: ``"original"``, ``"inverted"`` or ``"none"``.
    """

    last: float = 0.5
    form: Form = "linear"
    mode: Mode = "batch"
    scale: Scale = "original"


@dataclass(frozen=True)
class Config:
    """A run: one phase, ``train``."""

    network: NetworkConfig
    train: Recipe
    depth: DepthConfig = field(default_factory=DepthConfig)
    data: DataConfig = field(default_factory=DataConfig)
    run: RunConfig = field(default_factory=RunConfig)


def phases(config: Config, data: Dataset, outcome: Callable[[str], Mapping[str, Tensor]]) -> Sequence[Phase]:
    """Train the converted network; ``deployed.safetensors`` is the plain one, with the scale of inference folded in."""

    def build() -> StochasticDepthTraining:
        network = load_network(config.network, data, config.train.seed)
        survival = survival_schedule(len(blocks_of(network)), config.depth.last, config.depth.form)
        network = convert(network, survival, config.depth.mode, config.depth.scale)
        return StochasticDepthTraining(network, Criterion(config.train.label_smoothing))

    def deployed(method: Method) -> dict[str, nn.Module]:
        return {"deployed": deploy(method.result())}

    return [Phase("train", config.train, build, ("network", "depth", "train"), also=deployed)]
