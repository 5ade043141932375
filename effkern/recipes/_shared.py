"""What the configurations of all recipes have in common."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from effkern.data import Dataset, ImageOptions
from effkern.data._archive import UNREADABLE
from effkern.models import create_model
from effkern.training import CheckpointError, in_a_line, load_weights
from effkern.training.config import check

__all__ = ["DataConfig", "NetworkConfig", "RunConfig", "load_into", "load_network", "read_weights"]


@dataclass(frozen=True)
class DataConfig:
    """How training images are shown.

    Attributes:
        augment: random shifts and, where it keeps the label, mirroring.
        shift: largest shift in pixels.
        files: how image files are cut and augmented (:class:`effkern.data.ImageOptions`); data in memory has no use
            for it, as files have none for ``shift``.
    """

    augment: bool = True
    shift: int = 4
    files: ImageOptions | None = None

    def __post_init__(self) -> None:
        check(self, shift=(self.shift >= 0, "at least 0"))


@dataclass(frozen=True)
class RunConfig:
    """How often a run is saved, logged and evaluated; see :class:`effkern.training.Run`.

    Attributes:
        cache_gb: memory for what frozen parts of a network make of images that are not augmented; it changes no result,
            so a run may be resumed with another.
        skip_ops: whether passes without gradient skip blocks by effkern's ops; else they run plain PyTorch. It changes
            rounding alone.
    """

    save_every_s: float = 300.0
    keep: int = 3
    log_every: int = 10
    evaluate_every: float = 1.0
    tensorboard: bool = False
    norms: bool = False
    cache_gb: float = 0.0
    skip_ops: bool = True

    def __post_init__(self) -> None:
        check(self, cache_gb=(self.cache_gb >= 0, "at least 0"))


@dataclass(frozen=True)
class NetworkConfig:
    """A network by name.

    Attributes:
        name: of :func:`effkern.models.create_model`.
        options: of that network; channels and classes follow from the data.
        init: weights to begin with, a ``.safetensors`` or a ``.npz`` file; empty: random ones from the seed.
    """

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    init: str = ""


def load_network(config: NetworkConfig, data: Dataset, seed: int) -> nn.Module:
    """The network for a data set, with its first weights.

    Raises:
        ValueError: for an unknown name or option, or a value the network cannot be built with.
        CheckpointError: if ``init`` cannot be read or is of another network.
    """
    given = {"in_channels": data.image_shape[0], "num_classes": len(data.classes)}
    if known := given.keys() & config.options.keys():
        raise ValueError(f"network.options: {', '.join(sorted(known))} must be left out, as the data say it")
    torch.manual_seed(seed)
    try:
        network = create_model(config.name, **given, **config.options)
    except (TypeError, IndexError, ArithmeticError, RuntimeError) as error:  # of values no network checks
        options = ", ".join(f"{name}={value!r}" for name, value in config.options.items())
        raise ValueError(f"network.options: no {config.name} has {options}: {in_a_line(error)}") from error
    if config.init:
        load_into(network, Path(config.init), config.name)
    return network.to(memory_format=torch.channels_last)


def load_into(network: nn.Module, path: Path, name: str) -> None:
    """Give a network the weights of a file.

    Raises:
        CheckpointError: if it cannot be read or is of another network.
    """
    weights = read_weights(path)
    try:
        network.load_state_dict(weights)
    except RuntimeError as error:
        raise CheckpointError(f"{path}: does not fit {name}: {in_a_line(error)}") from error


def read_weights(path: Path) -> Mapping[str, Tensor]:
    """A state dict from safetensors or a NumPy archive; neither can execute anything.

    Raises:
        CheckpointError: if it cannot be read.
    """
    if path.suffix != ".npz":
        return load_weights(path)
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {name: torch.from_numpy(archive[name]) for name in archive.files}
    except UNREADABLE as error:
        raise CheckpointError(f"{path}: cannot be read as weights: {error}") from error
