"""Random keep masks for the backbone's own training: its blocks learn to do without each other (arXiv 1603.09382)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor


def keep_schedule(num_blocks: int, last: float = 0.7, form: Literal["linear", "uniform"] = "linear") -> Tensor:
    """Probability of keeping each block, ``[K]``: ``1 - l / K * (1 - last)`` for block l = 1..K, or ``last`` for all.

    Raises:
        ValueError: if ``last`` is outside [0, 1] or ``form`` is unknown.
    """
    if not 0 <= last <= 1:
        raise ValueError(f"last must be in [0, 1], got {last}")
    if form not in ("linear", "uniform"):
        raise ValueError(f"form must be 'linear' or 'uniform', got {form!r}")
    if form == "uniform":
        return torch.full((num_blocks,), float(last))
    return 1 - torch.arange(1, num_blocks + 1) / num_blocks * (1 - last)


def sample_keep(
    schedule: Tensor, batch: int, mode: Literal["row", "batch"] = "row", generator: torch.Generator | None = None
) -> Tensor:
    """A keep mask ``[batch, K]``, bool.

    Args:
        schedule: ``[K]``, probability of keeping each block.
        batch: rows.
        mode: ``"row"``: every image draws for itself. ``"batch"``: one draw a block for the whole batch, as published;
            with ``bn_over="kept"`` a dropped block then costs nothing at all.
        generator: source of the draw.

    Raises:
        ValueError: for an unknown ``mode``.
    """
    if mode not in ("row", "batch"):
        raise ValueError(f"mode must be 'row' or 'batch', got {mode!r}")
    rows = batch if mode == "row" else 1
    draw = torch.rand(rows, len(schedule), generator=generator) < schedule
    return draw.expand(batch, -1)
