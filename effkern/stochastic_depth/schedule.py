"""How likely each block is to run, from the first to the last."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

__all__ = ["Form", "expected_depth", "survival_schedule"]

Form = Literal["linear", "uniform", "linspace"]


def survival_schedule(num_blocks: int, last: float = 0.5, form: Form = "linear") -> Tensor:
    """Probability of running each block, ``[K]``.

    Args:
        num_blocks: K.
        last: p_L, that of the last block.
        form: ``"linear"``: ``1 - l / K * (1 - last)`` for block l = 1..K, as published: the input counts as block 0, so
            the first block already drops a little. ``"linspace"``: from 1 for the first block to ``last``, as timm
            does. ``"uniform"``: ``last`` for all.

    Raises:
        ValueError: if ``last`` is outside [0, 1], ``form`` is unknown or there is no block.
    """
    if num_blocks < 1:
        raise ValueError(f"num_blocks: must be at least 1, got {num_blocks}: there is no residual block")
    if not 0 <= last <= 1:
        raise ValueError(f"last: must be in [0, 1], got {last}")
    if form not in get_args(Form):
        raise ValueError(f"form: must be one of {', '.join(get_args(Form))}, got {form!r}")
    if form == "uniform":
        return torch.full((num_blocks,), float(last))
    if form == "linspace":
        return torch.linspace(1.0, float(last), num_blocks)
    return 1 - torch.arange(1, num_blocks + 1) / num_blocks * (1 - last)


def expected_depth(survival: Tensor) -> float:
    """Blocks that run in a step, on average; linear decay over L blocks: ``L - (1 - p_L)(L + 1) / 2``."""
    return float(survival.double().sum())
