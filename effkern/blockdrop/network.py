"""A backbone and its policy as one network."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor, nn

from effkern.blockdrop.policy import greedy
from effkern.nn._rows import take_rows


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
        reorder: whether images of the same decision run next to each other, so that what a block gathers lies together.
            Scores and their order stay the same. effkern's own ops read rows where they are and gain nothing by it.
        bucket: with one, so many images or more of the same decision run as a batch of their own, in which nothing is
            gathered, and the others together. It pays where few decisions fill a large batch (ResNet-32, 256 images of
            8 decisions, one core: 107 ms against 123) and costs where they do not (64 images of 40, all apart: 37
            against 30).

    Raises:
        ValueError: if the policy decides on another number of blocks.
    """

    def __init__(self, backbone: nn.Module, policy: nn.Module, reorder: bool = False, bucket: int = 0) -> None:
        super().__init__()
        if bucket < 0:
            raise ValueError(f"bucket must be at least 0, got {bucket}")
        have, wanted = getattr(policy, "num_blocks", None), getattr(backbone, "num_blocks", None)
        if have != wanted or have is None:
            raise ValueError(f"policy and backbone must agree on num_blocks, got {have} and {wanted}")
        self.backbone, self.policy, self.reorder, self.bucket = backbone, policy, reorder, bucket

    def decide(self, x: Tensor) -> Tensor:
        """The blocks each image runs, ``[N, K]`` bool: ``sigmoid(logit) >= 0.5``, no bounding, no sampling."""
        return greedy(torch.sigmoid(self.policy(x)))

    def forward(self, x: Tensor) -> Tensor:
        """Logits of the backbone under the policy's decision."""
        keep = self.decide(x)
        if not (self.reorder or self.bucket) or len(x) < 2:
            return self.backbone(x, keep)
        order = by_pattern(keep)
        x, keep = take_rows(x, order), keep[order]
        sizes = _runs(keep, self.bucket) if self.bucket else [len(x)]
        scores = [self.backbone(*part) for part in zip(x.split(sizes), keep.split(sizes), strict=True)]
        return torch.cat(scores)[order.argsort()]


def by_pattern(keep: Tensor) -> Tensor:
    """An order of the images, int64 ``[N]``, in which those of one decision are neighbours and keep their order.

    Args:
        keep: ``[N, K]`` bool.
    """
    order = torch.arange(len(keep), device=keep.device)
    for k in range(0, keep.shape[1], 62):  # stable sorts by 62 blocks at a time, as one number each
        part = keep[order, k : k + 62].long()
        number = (part << torch.arange(part.shape[1], device=keep.device)).sum(1)
        order = order[number.argsort(stable=True)]
    return order


def _runs(keep: Tensor, least: int) -> list[int]:
    """Sizes of the parts of a sorted batch: runs of ``least`` equal rows or more, and what lies between them."""
    edges = (keep[1:] != keep[:-1]).any(1).nonzero().flatten() + 1
    sizes = [0]  # the last is that of the rows between
    for begin, end in pairwise([0, *edges.tolist(), len(keep)]):
        if end - begin >= least:
            sizes += [end - begin, 0]
        else:
            sizes[-1] += end - begin
    return [size for size in sizes if size]


@contextmanager
def eval_mode(net: nn.Module) -> Iterator[None]:
    """Inside, ``net`` is in eval mode.

    Module by module, since a part (frozen batch norm) may be in another mode than the whole. A network that is in eval
    mode already is left alone: its layers may hold packed weights that a call of train() or eval() drops.
    """
    modes = [(module, module.training) for module in net.modules()]
    if any(training for _, training in modes):
        net.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
