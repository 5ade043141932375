"""A backbone and its policy as one network."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from effkern.blockdrop.policy import greedy


class Backbone(Protocol):
    """What BlockDrop needs of a network."""

    num_blocks: int

    def __call__(self, x: Tensor, keep: Tensor | None = None) -> Tensor:
        """Logits of ``x``; ``keep`` ``[N, K]`` says which blocks run for which image."""


class BlockDropNet(nn.Module):
    """Decide, then run what was decided. Greedy in every mode: the same image always takes the same path.

    Args:
        backbone: see :class:`Backbone`.
        policy: images to ``[N, K]`` logits of keeping.

    Raises:
        ValueError: if the policy decides on another number of blocks.
    """

    def __init__(self, backbone: nn.Module, policy: nn.Module) -> None:
        super().__init__()
        have, wanted = getattr(policy, "num_blocks", None), getattr(backbone, "num_blocks", None)
        if have != wanted or have is None:
            raise ValueError(f"policy and backbone must agree on num_blocks, got {have} and {wanted}")
        self.backbone, self.policy = backbone, policy

    def decide(self, x: Tensor) -> Tensor:
        """The blocks each image runs, ``[N, K]`` bool: ``sigmoid(logit) >= 0.5``, no bounding, no sampling."""
        return greedy(torch.sigmoid(self.policy(x)))

    def forward(self, x: Tensor) -> Tensor:
        """Logits of the backbone under the policy's decision."""
        return self.backbone(x, self.decide(x))
