"""What a data set is once loaded: uint8 images and labels in three splits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .augment import shift_and_flip
from .feed import BatchFeed
from .split import Split, one_pass

__all__ = ["Dataset"]


@dataclass(frozen=True)
class Dataset:
    """A data set in memory.

    Attributes:
        name: what it is, e.g. ``Fashion-MNIST``.
        source: where it was found: a folder, an address.
        train: images to learn from.
        val: images held out of the training set, for every choice made while learning.
        test: images looked at once, for the reported number.
        classes: a readable name for each label.
        mean: what is taken off the pixels scaled to [0, 1], as a rule their mean; one number, or one a channel.
        std: what they are divided by then.
        flip: whether a mirrored image keeps its label (a shoe does, a digit does not).
    """

    name: str
    source: str
    train: Split
    val: Split
    test: Split
    classes: tuple[str, ...]
    mean: float | tuple[float, ...]
    std: float | tuple[float, ...]
    flip: bool

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """``(channels, height, width)`` of an image."""
        channels, height, width = self.train.images.shape[1:]
        return channels, height, width

    @property
    def device(self) -> torch.device:
        """Where the images lie, and what learns from them."""
        return self.train.labels.device

    def to(self, device: torch.device | str) -> Dataset:
        """The same with its images on ``device``. What is drawn for them is the same on every device."""
        splits = {name: getattr(self, name).to(device) for name in ("train", "val", "test")}
        return replace(self, **splits)

    def feed(self, split: Split, batch_size: int, seed: int = 0, augment: bool = False, shift: int = 1) -> BatchFeed:
        """Batches of ``split`` by step number, for :func:`effkern.training.train`."""
        return BatchFeed(self, split, batch_size, seed, augment, shift)

    def normalize(self, images: Tensor) -> Tensor:
        """uint8 ``[n, c, h, w]`` to float32 with mean 0 and deviation 1 over the training set."""
        if isinstance(self.mean, tuple) or isinstance(self.std, tuple):
            mean, std = (torch.tensor(value).reshape(-1, 1, 1) for value in (self.mean, self.std))
            factor, offset = (t.to(images.device, non_blocking=True) for t in (1 / (255 * std), mean / std))
            return images.to(torch.float32).mul_(factor).sub_(offset)
        return images.to(torch.float32).mul_(1 / (255 * self.std)).sub_(self.mean / self.std)

    def batches(
        self,
        split: Split,
        batch_size: int,
        *,
        generator: torch.Generator | None = None,
        augment: bool = False,
        shift: int = 1,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """One pass over ``split`` as ``(images float32 normalised, labels)``.

        Args:
            split: one of ``train``, ``val``, ``test``, or a part of them.
            batch_size: images a batch.
            generator: with one the order is random and the last short batch is left out, as training wants it;
                without one the order is fixed and every image comes.
            augment: random shift, and random mirroring where ``flip`` allows it. Needs a generator.
            shift: largest shift in pixels.

        Raises:
            ValueError: if ``augment`` comes without a generator.
        """
        for chosen in one_pass(len(split), batch_size, generator, augment):
            images = split.images[chosen]
            if augment:
                images = shift_and_flip(images, shift, self.flip, generator)
            yield self.normalize(images), split.labels[chosen]
