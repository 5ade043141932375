"""A supernet of many widths: sandwich training, then the batch-norm statistics of every width."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

from effkern.data import BatchFeed, Dataset
from effkern.dsnet import SupernetTraining, calibrate
from effkern.dsnet.method import Target
from effkern.recipes._runner import Phase
from effkern.recipes._shared import DataConfig, NetworkConfig, RunConfig, load_network
from effkern.training import Method, Recipe

__all__ = ["Config", "phases"]


@dataclass(frozen=True)
class SupernetConfig:
    """The supernet's training; see :class:`effkern.dsnet.SupernetTraining`.

    Attributes:
        train: how.
        random: widths drawn a step between the ends.
        target: what the narrower widths learn: ``"labels"``, ``"distillation"`` or ``"bootstrapping"``.
        ensemble: whether the slimmest learns from the teacher at several widths.
        decay: of the teacher.
        calibration: batches that every width's statistics are measured on at the end.
    """

    train: Recipe
    random: int = 2
    target: Target = "bootstrapping"
    ensemble: bool = True
    decay: float = 0.997
    calibration: int = 100


@dataclass(frozen=True)
class Config:
    """A run: one phase, ``supernet``."""

    network: NetworkConfig
    supernet: SupernetConfig
    data: DataConfig = field(default_factory=DataConfig)
    run: RunConfig = field(default_factory=RunConfig)


def phases(config: Config, data: Dataset, outcome: Callable[[str], Mapping[str, Tensor]]) -> Sequence[Phase]:
    """Train, then calibrate."""
    chosen = config.supernet

    def build() -> Method:
        model = load_network(config.network, data, chosen.train.seed)
        return SupernetTraining(
            model,
            _widths(model),
            chosen.random,
            chosen.target,
            chosen.ensemble,
            chosen.decay,
            chosen.train.label_smoothing,
        )

    def finish(method: Method) -> None:
        # Fresh passes over training images as they are; their order is the seed's.
        feed = BatchFeed(data, data.train, min(250, len(data.train)), chosen.train.seed)
        images = (feed(step)[0] for step in range(chosen.calibration))
        model = method.result()
        calibrate(model, images, range(_widths(model)))

    return [Phase("supernet", chosen.train, build, ("network", "supernet"), finish=finish)]


def _widths(model: nn.Module) -> int:
    """Number of width indices of a slimmable network.

    Raises:
        ValueError: if it has none.
    """
    count = getattr(model, "num_widths", None) or len(getattr(model, "widths", ()))
    if not count:
        raise ValueError(f"network: {type(model).__name__} is not slimmable (it has neither widths nor num_widths)")
    return int(count)
