"""The sandwich rule: every step trains the widest, the slimmest and some random widths on one batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Teacher = Literal["labels", "widest"]


class SandwichRule:
    """Draws the widths of a training step: widest, ``random`` others, slimmest (arXiv 1903.05134).

    The draw is a function of the seed and the step alone: ranks agree without talking, a resumed run goes on with the
    same widths, and no other random number of the program changes.

    Args:
        widths: Number of widths.
        random: Widths drawn a step, without replacement, from those between the ends; all of them if they are fewer.
        seed: Of the draws.

    >>> SandwichRule(4, random=2).draw(0)[::3]
    [3, 0]
    """

    def __init__(self, widths: int, random: int = 2, seed: int = 0) -> None:
        if widths < 1 or random < 0:
            raise ValueError(f"widths must be positive and random not negative, got {widths} and {random}")
        self.widths = widths
        self.random = min(random, max(widths - 2, 0))
        self.seed = seed

    def draw(self, step: int) -> list[int]:
        """Width indices of step ``step``: the widest first (it may teach the others), the slimmest last."""
        if self.widths == 1:
            return [0]
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + step) % 2**63)
        middle = (torch.randperm(self.widths - 2, generator=generator)[: self.random] + 1).tolist()
        return [self.widths - 1, *middle, 0]


def sandwich_backward(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    widths: Sequence[int],
    teacher: Teacher = "labels",
    criterion: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
) -> Tensor:
    """Add up the gradients of the model at every width in ``widths``, one forward and backward each.

    The caller zeroes the gradients before and steps the optimizer after.

    Args:
        model: Called as ``model(images, width)``, in training mode.
        images: Batch, ``[N, ...]``.
        labels: Class indices ``[N]``.
        widths: Indices in order of training; with ``teacher="widest"`` the first is the teacher.
        teacher: What all but the first width learn: ``"labels"``, or ``"widest"``, the detached prediction the first
            width just made (in-place distillation). Distillation wins in long runs; in short ones its teacher is weak
            and labels do better.
        criterion: Loss of logits and labels, also called with class probabilities when distilling.

    Returns:
        The losses ``[len(widths)]``, detached, in the order of ``widths``.
    """
    if teacher not in ("labels", "widest"):
        raise ValueError(f'teacher must be "labels" or "widest", got {teacher!r}')
    target = labels
    losses = []
    for width in widths:
        logits = model(images, width)
        loss = criterion(logits, target)
        loss.backward()
        losses.append(loss.detach())
        if teacher == "widest" and target is labels:
            target = logits.detach().softmax(1)
    return torch.stack(losses)
