"""Training batches by step number: the order is a function of seed and epoch, the augmentation of seed and step."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from .augment import shift_and_flip
from .split import Split

__all__ = ["BatchFeed"]

_ORDER, _AUGMENT = 0, 1


class Source(Protocol):
    """What a feed asks of a data set."""

    @property
    def flip(self) -> bool:
        """Whether mirroring keeps the label."""

    def normalize(self, images: Tensor) -> Tensor:
        """uint8 images as float32 ones."""


class BatchFeed:
    """Shuffled batches of a split for :func:`effkern.training.train`.

    Nothing is remembered between calls (but the order of one epoch, to save time): a resumed run asks for the step it
    is at, and every rank for its part of the same batch. The last short batch of an epoch is left out.

    Args:
        data: gives the normalisation, and whether mirroring keeps the label.
        split: images to learn from, for example ``data.train``.
        batch_size: of all parts together.
        seed: of order and augmentation.
        augment: random shifts and, where allowed, mirroring.
        shift: largest shift in pixels.

    Raises:
        ValueError: if there are fewer images than a batch.
    """

    def __init__(
        self, data: Source, split: Split, batch_size: int, seed: int = 0, augment: bool = False, shift: int = 1
    ) -> None:
        if not 0 < batch_size <= len(split):
            raise ValueError(f"batch_size: must be in [1, {len(split)}], the number of images, got {batch_size}")
        self.data, self.split, self.batch_size = data, split, batch_size
        self.seed, self.augment, self.shift = seed, augment, shift
        self.steps_per_epoch = len(split) // batch_size
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.int64)

    def order(self, epoch: int) -> Tensor:
        """The order of all images in an epoch."""
        if epoch != self._epoch:
            order = torch.randperm(len(self.split), generator=self._generator(_ORDER, epoch))
            self._order = order.to(self.split.labels.device)
            self._epoch = epoch
        return self._order

    def chosen(self, step: int, part: int = 0, parts: int = 1) -> Tensor:
        """Which images of the split those are, int64 ``[batch_size / parts]``."""
        epoch, place = divmod(step, self.steps_per_epoch)
        size = self.batch_size // parts
        begin = place * self.batch_size + part * size
        return self.order(epoch)[begin : begin + size]

    def rows(self, step: int, part: int = 0, parts: int = 1) -> Tensor | None:
        """The same, if an image is shown the same in every epoch; None if it is augmented."""
        return None if self.augment else self.chosen(step, part, parts)

    def __call__(self, step: int, part: int = 0, parts: int = 1) -> tuple[Tensor, Tensor]:
        """Part ``part`` of ``parts`` of the batch of ``step``: images ``[batch_size / parts, ...]`` and labels."""
        chosen = self.chosen(step, part, parts)
        images = self.split.images[chosen]
        if self.augment:
            images = shift_and_flip(images, self.shift, self.data.flip, self._generator(_AUGMENT, step), part, parts)
        return self.data.normalize(images), self.split.labels[chosen]

    def _generator(self, use: int, number: int) -> torch.Generator:
        # Odd multipliers keep different (seed, use, number) apart; the Mersenne Twister's seeding mixes the bits.
        seed = (self.seed * 0x9E3779B97F4A7C15 + number * 0xD1B54A32D192ED03 + use * 0x8CB92BA72F3D8DD7) % 2**63
        return torch.Generator().manual_seed(seed)
