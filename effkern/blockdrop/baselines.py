"""Decisions that do not look at the image, as many blocks given: what a learned policy has to beat.

All of them are functions from images to ``[N, K]`` decisions, as :func:`effkern.blockdrop.evaluate` takes them.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from effkern.blockdrop.train import evaluate

__all__ = ["best_static", "best_statics", "first_blocks", "fixed_policy", "random_policy"]

Decide = Callable[[Tensor], Tensor]


def random_policy(num_blocks: int, blocks: float, generator: torch.Generator | None = None) -> Decide:
    """Every image draws its own blocks: the whole number below or above ``blocks``, so that the mean is that.

    Raises:
        ValueError: if ``blocks`` is outside [0, num_blocks].
    """
    _check(num_blocks, blocks)
    low = int(blocks)

    def decide(x: Tensor) -> Tensor:
        counts = low + (torch.rand(len(x), 1, generator=generator) < blocks - low).long()
        ranks = torch.rand(len(x), num_blocks, generator=generator).argsort(1).argsort(1)
        return (ranks < counts).to(x.device)

    return decide


def fixed_policy(keep: Tensor) -> Decide:
    """The same decision ``keep`` ``[K]`` for every image."""
    row = keep.bool()
    return lambda x: row.to(x.device).expand(len(x), -1)


def first_blocks(num_blocks: int, blocks: float) -> Tensor:
    """``[K]`` bool, the first ``blocks`` on, rounded up in favour of the baseline.

    Raises:
        ValueError: if ``blocks`` is outside [0, num_blocks].
    """
    _check(num_blocks, blocks)
    return torch.arange(num_blocks) < blocks


def best_static(
    backbone: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    blocks: float,
    others: Sequence[Tensor] = (),
) -> Tensor:
    """The best of the fixed decisions with ``blocks`` blocks (rounded up) that could be found, ``[K]`` bool.

    From all blocks on, the one whose loss costs the least accuracy is dropped, again and again; the result is held
    against ``others`` of as many blocks. At most K^2 / 2 passes over the images, each the cheaper the fewer blocks run.

    Args:
        backbone: See :class:`effkern.blockdrop.Backbone`; of the networks compared, the one that skips.
        batches: ``(x, labels)`` to choose by; not those the result is reported on.
        blocks: The budget.
        others: Decisions ``[K]`` to consider besides, as those of a policy's most used blocks.

    Raises:
        ValueError: if ``blocks`` is outside [0, K], or another decision exceeds it.
    """
    _check(int(backbone.num_blocks), blocks)  # type: ignore[arg-type]
    budget = -int(-blocks // 1)
    if any(int(other.sum()) > budget for other in others):
        raise ValueError(f"others: must have at most {budget} blocks, got {[int(other.sum()) for other in others]}")
    return best_statics(backbone, batches, [budget], others)[budget]


def best_statics(
    backbone: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    budgets: Iterable[int],
    others: Sequence[Tensor] = (),
) -> dict[int, Tensor]:
    """:func:`best_static` of several whole numbers of blocks, for the passes of the smallest one alone.

    Of ``others`` those are considered that fit, and what was found for a smaller number.

    Raises:
        TypeError: if a number is not whole.
        ValueError: if one is outside [0, K], there is none, or another decision is not ``[K]``.
    """
    shown, wanted = list(batches), sorted({operator.index(budget) for budget in budgets}, reverse=True)
    total = int(backbone.num_blocks)  # type: ignore[arg-type]
    if not wanted or wanted[0] > total or wanted[-1] < 0:
        raise ValueError(f"budgets: must be at least one number of blocks in [0, {total}], got {wanted}")
    if any(other.shape != (total,) for other in others):
        raise ValueError(f"others: must be [{total}] each, got {[list(other.shape) for other in others]}")

    def top1(keep: Tensor) -> float:
        return evaluate(backbone, fixed_policy(keep), shown).top1

    keep, left = torch.ones(total, dtype=torch.bool), {}
    for budget in wanted:
        while int(keep.sum()) > budget:
            trials = []
            for k in keep.nonzero().flatten().tolist():
                trial = keep.clone()
                trial[k] = False
                trials.append(trial)
            keep = max(trials, key=top1)
        left[budget] = keep
    found: dict[int, Tensor] = {}
    for budget in reversed(wanted):
        fit = [other for other in others if int(other.sum()) <= budget]
        found[budget] = max([left[budget], first_blocks(total, budget), *fit, *found.values()], key=top1)
    return found


def _check(num_blocks: int, blocks: float) -> None:
    if not 0 <= blocks <= num_blocks:
        raise ValueError(f"blocks: must be in [0, {num_blocks}], got {blocks}")
