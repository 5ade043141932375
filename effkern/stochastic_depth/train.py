"""Stochastic depth as a method of the training loop."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from effkern.nn.stochastic_depth import StochasticBlock, draw_keep
from effkern.training import Batches, Criterion, Method, Step, evaluate

__all__ = ["StochasticDepthTraining"]

_COMMON, _ROWS = 1, 2  # streams of draws


class StochasticDepthTraining(Method):
    """Cross-entropy under a random keep mask; evaluation runs every block, scaled.

    Args:
        network: from :func:`effkern.stochastic_depth.convert`. Where its ``forward`` takes a mask (it has
            ``num_blocks``), the draw is made for the whole batch, whatever ranks and parts it is in; otherwise each
            block draws for itself from torch's generator, which the loop seeds step by step.
        criterion: what the scores are held against; default: the labels.

    Raises:
        ValueError: if the network has no block with stochastic depth.
    """

    score = "top1"

    def __init__(self, network: nn.Module, criterion: Criterion | None = None) -> None:
        super().__init__()
        self.blocks = [module for module in network.modules() if isinstance(module, StochasticBlock)]
        if not self.blocks:
            raise ValueError(
                f"network: {type(network).__name__} has no block with stochastic depth; convert() it first"
            )
        self.network, self.criterion = network, criterion or Criterion()

    def losses(self, x: Tensor, y: Tensor, at: Step) -> Iterable[Tensor]:
        """One loss."""
        if hasattr(self.network, "num_blocks"):
            keep = self.draw(len(x), at)
            at.metrics["blocks"] = keep.float().sum(1).mean()
            scores = self.network(x, keep)  # the mask stays on the host, where rows are counted
        else:
            scores = self.network(x)
        yield self.criterion(scores, x, y)

    def draw(self, rows: int, at: Step) -> Tensor:
        """The keep mask of a step, ``[rows, K]``."""
        survival = torch.tensor([block.survival for block in self.blocks])
        mine = at.uniform(rows, len(survival), stream=_ROWS)
        return draw_keep(survival, rows, self.blocks[0].mode, at.generator(_COMMON), mine)

    def evaluate(self, batches: Batches) -> dict[str, float]:
        """Top-1 accuracy with every block."""
        return {"top1": evaluate(self.network, batches)}

    def result(self) -> nn.Module:
        """The network, its weights as trained."""
        return self.network
