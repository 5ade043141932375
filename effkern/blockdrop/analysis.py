"""What a policy has learned: which decisions there are, who needs many blocks, and what they are worth."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from effkern.blockdrop.train import Usage

__all__ = ["accuracy_by_blocks", "easiest_and_hardest", "summary", "unique_policies"]


def unique_policies(usage: Usage, limit: int | None = None) -> list[dict[str, Any]]:
    """The different decisions, the most frequent first: ``keep``, ``blocks``, ``images`` and ``top1`` of each.

    Args:
        usage: From :func:`effkern.blockdrop.evaluate`.
        limit: At most so many.
    """
    kinds, of_image, counts = usage.keep.unique(dim=0, return_inverse=True, return_counts=True)
    right = torch.zeros(len(kinds), dtype=torch.float64).index_add(0, of_image, usage.correct.double())
    order = counts.argsort(descending=True, stable=True)[:limit].tolist()
    return [
        {
            "keep": kinds[i].int().tolist(),
            "blocks": int(kinds[i].sum()),
            "images": int(counts[i]),
            "top1": 100 * float(right[i] / counts[i]),
        }
        for i in order
    ]


def accuracy_by_blocks(usage: Usage) -> list[dict[str, Any]]:
    """For every number of blocks that occurs: ``blocks``, ``images`` that run so many, and their ``top1``.

    Images the policy gives more blocks are those it finds hard; where it is right, accuracy falls along the list.
    """
    used = usage.keep.sum(1)
    return [
        {
            "blocks": count,
            "images": int((used == count).sum()),
            "top1": 100 * float(usage.correct[used == count].double().mean()),
        }
        for count in used.unique().tolist()
    ]


def easiest_and_hardest(usage: Usage, count: int, label: int | None = None) -> tuple[Tensor, Tensor]:
    """Indices of the images that run the fewest blocks, and of those that run the most; ties in the images' order.

    Args:
        usage: From :func:`effkern.blockdrop.evaluate`.
        count: Of each, at most.
        label: Among the images of one class only.
    """
    rows = torch.arange(len(usage.keep)) if label is None else (usage.labels == label).nonzero().flatten()
    used = usage.keep[rows].sum(1)
    easy = rows[used.argsort(stable=True)[:count]]
    return easy, rows[(-used).argsort(stable=True)[:count]]


def summary(usage: Usage, classes: Sequence[str]) -> dict[str, Any]:
    """Plain data of all of it, for a result file."""
    used = usage.keep.sum(1).double()
    by_class = {
        name: None if index >= len(usage.by_class) or math.isnan(usage.by_class[index]) else usage.by_class[index]
        for index, name in enumerate(classes)
    }
    return {
        "top1": usage.top1,
        "blocks_used": usage.blocks,
        "blocks_deviation": float(used.std(correction=0)),
        "unique_policies": usage.patterns,
        "by_block": usage.by_block,
        "by_class": by_class,
        "accuracy_by_blocks": accuracy_by_blocks(usage),
        "policies": unique_policies(usage, 10),
    }
