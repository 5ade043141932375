"""Images with their labels, and the order in which a pass takes them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Split", "one_pass"]


@dataclass(frozen=True)
class Split:
    """``images``: ``[n, channels, height, width]`` uint8; ``labels``: ``[n]`` int64."""

    images: Tensor
    labels: Tensor

    def __post_init__(self) -> None:
        if self.images.dtype != torch.uint8 or self.images.dim() != 4:
            raise ValueError(f"images: must be [n, c, h, w] uint8, got {tuple(self.images.shape)} {self.images.dtype}")
        if self.labels.dtype != torch.int64 or self.labels.shape != self.images.shape[:1]:
            raise ValueError(
                f"labels: must be [{len(self.images)}] int64, got {tuple(self.labels.shape)} {self.labels.dtype}"
            )

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device | str) -> Split:
        """The same on ``device``."""
        return Split(self.images.to(device), self.labels.to(device))

    def __getitem__(self, index: slice | Tensor) -> Split:
        return Split(self.images[index], self.labels[index])


def one_pass(count: int, batch_size: int, generator: torch.Generator | None, augment: bool = False) -> Sequence[Tensor]:
    """Indices of every batch of a pass, as :meth:`Dataset.batches` describes it."""
    if augment and generator is None:
        raise ValueError("augment: needs a generator, got None")
    if generator is None:
        return torch.arange(count).split(batch_size) if count else ()
    order = torch.randperm(count, generator=generator)
    return order[: count - count % batch_size].split(batch_size) if count >= batch_size else (order,)
