"""The curriculum: decisions are handed to the policy from the last block forwards, a few at a time.

At the start almost every one of the 2^K paths is wrong and the policy gets no signal. The late blocks come first
because what they see is still what they were trained on.
"""

from __future__ import annotations

import torch
from torch import Tensor


class Curriculum:
    """The last ``free_blocks`` of K blocks are the policy's; the others run for every image.

    Args:
        num_blocks: K.
        free_blocks: at the start; clipped to 1..K.
    """

    def __init__(self, num_blocks: int, free_blocks: int = 1) -> None:
        if num_blocks < 1:
            raise ValueError(f"num_blocks must be at least 1, got {num_blocks}")
        self.num_blocks = num_blocks
        self.free_blocks = free_blocks

    @property
    def free_blocks(self) -> int:
        """How many blocks are free, 1 to K."""
        return self._free_blocks

    @free_blocks.setter
    def free_blocks(self, value: int) -> None:
        self._free_blocks = max(1, min(int(value), self.num_blocks))

    @property
    def forced(self) -> int:
        """How many blocks, from the first on, run for every image."""
        return self.num_blocks - self.free_blocks

    @property
    def done(self) -> bool:
        """Whether all blocks are free."""
        return self.forced == 0

    def free(self) -> Tensor:
        """``[K]`` bool, True for the blocks that are the policy's."""
        return torch.arange(self.num_blocks) >= self.forced

    def force(self, keep: Tensor) -> Tensor:
        """``keep`` ``[B, K]`` (bool) with the blocks that are not yet free turned on."""
        return keep | ~self.free().to(keep.device)

    def advance(self, blocks: int = 1) -> None:
        """Free ``blocks`` more."""
        self.free_blocks += blocks

    def state_dict(self) -> dict[str, int]:
        """For a checkpoint: the step itself, so that a resumed run need not guess it from an epoch number."""
        return {"num_blocks": self.num_blocks, "free_blocks": self.free_blocks}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on where :meth:`state_dict` was taken.

        Raises:
            ValueError: if the state is of another number of blocks.
        """
        if state["num_blocks"] != self.num_blocks:
            raise ValueError(f"state is of {state['num_blocks']} blocks, expected {self.num_blocks}")
        self.free_blocks = state["free_blocks"]

    def __repr__(self) -> str:
        return f"Curriculum({self.num_blocks}, free_blocks={self.free_blocks})"
