"""What the training loop trains: a method is a module that knows its losses."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .criterion import Criterion
from .evaluate import evaluate
from .recipe import Recipe, parameter_groups

__all__ = ["Batches", "Method", "Step", "Supervised"]

Batches = Iterable[tuple[Tensor, Tensor]]
_MIX = 0x9E3779B97F4A7C15  # 2^64 / golden ratio: spreads neighbouring numbers over all bits


def stream_seed(*parts: int) -> int:
    """One seed from several numbers; different numbers give unrelated streams."""
    seed = 0
    for part in parts:
        seed = ((seed ^ part) * _MIX + 1) % 2**64
        seed ^= seed >> 29
    return seed % 2**63


@dataclass(frozen=True)
class Step:
    """Where in the run a step is. A step is a function of the state and of this, so a resumed run repeats it exactly.

    Attributes:
        number: optimizer steps before this one.
        epoch: passes over the data before this one.
        fraction: share of the run that is over, in [0, 1).
        seed: of the run.
        part: which part of the batch this is.
        parts: number of equal parts the batch is in: ranks times accumulation.
        rows: numbers of this part's samples in their data set, int64, if each is shown the same whenever it comes; None
            if it is not, or the feed does not say.
        metrics: what the method wants to see logged, by name: scalars, the mean over the samples of this part.
    """

    number: int
    epoch: int = 0
    fraction: float = 0.0
    seed: int = 0
    part: int = 0
    parts: int = 1
    rows: Tensor | None = None
    metrics: dict[str, Any] = field(default_factory=dict)

    def generator(self, stream: int = 0) -> torch.Generator:
        """Random numbers of this step, the same in every part; ``stream`` tells independent uses apart."""
        return torch.Generator().manual_seed(stream_seed(self.seed, self.number, stream))

    def uniform(self, rows: int, *shape: int, stream: int = 0, device: torch.device | None = None) -> Tensor:
        """``[rows, *shape]`` in [0, 1): this part's rows of one draw for the whole batch.

        What a sample draws does not depend on how many ranks and parts the batch is in.
        """
        whole = torch.rand(rows * self.parts, *shape, generator=self.generator(stream))
        return whole[self.part * rows : (self.part + 1) * rows].to(device, non_blocking=True)


class Method(nn.Module):
    """A way to train: the modules that take part, as submodules, and what a batch teaches them.

    The loop does the rest: it calls backward on every loss, steps the optimizer, averages over ranks, saves the state
    dict (so what a method must remember is a buffer) and evaluates. A part that is not to be trained has
    ``requires_grad`` off, and :meth:`train` may leave it in eval mode.
    """

    #: Name of the metric of :meth:`evaluate` by which the best state is kept; larger is better.
    score: str | None = None

    def parameter_groups(self, recipe: Recipe) -> list[dict[str, Any]]:
        """Groups for the optimizer; see :func:`parameter_groups`."""
        return parameter_groups(self, recipe)

    def losses(self, x: Tensor, y: Tensor, at: Step) -> Iterable[Tensor]:
        """Yield scalar losses, each the mean over the samples; their gradients add up.

        The loop calls backward on each before it asks for the next, so the graphs of several passes are never alive
        together.
        """
        raise NotImplementedError

    def after_step(self, at: Step) -> None:
        """Called when the optimizer has stepped, e.g. for a teacher that follows the weights."""

    def evaluate(self, batches: Batches) -> dict[str, float]:
        """Metrics on held-out data."""
        raise NotImplementedError

    def report(self) -> dict[str, Any]:
        """Plain data about the last evaluation that is more than numbers, for a result file."""
        return {}

    def result(self) -> nn.Module:
        """The module whose weights are the outcome."""
        raise NotImplementedError


Loss = Callable[[nn.Module, Tensor, Tensor], Tensor]


class Supervised(Method):
    """A module trained on labels, or by any ``loss(module, x, y)``.

    Args:
        module: ``[N, ...]`` to logits.
        loss: of the module and the batch, in place of ``criterion``. If its result needs no gradient, the function has
            called backward itself.
        criterion: what its scores are held against; default: the labels.
    """

    score = "top1"

    def __init__(self, module: nn.Module, loss: Loss | None = None, criterion: Criterion | None = None) -> None:
        super().__init__()
        self.module, self.loss, self.criterion = module, loss, criterion or Criterion()

    def losses(self, x: Tensor, y: Tensor, at: Step) -> Iterable[Tensor]:
        """One loss."""
        if self.loss is not None:
            yield self.loss(self.module, x, y)
        else:
            yield self.criterion(self.module(x), x, y)

    def evaluate(self, batches: Batches) -> dict[str, float]:
        """Top-1 accuracy in percent."""
        return {"top1": evaluate(self.module, batches)}

    def result(self) -> nn.Module:
        """The module."""
        return self.module
