"""What the ragged ops leave open with ``zero_tail=False``: the contents past a sample's width."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from effkern import ops


def past_width(y: Tensor, c_out: Tensor) -> Tensor:
    """Whether an element of ``y [N, C, ...]`` is in a channel from ``c_out[n]`` on; broadcasts to ``y``."""
    past = torch.arange(y.size(1), device=y.device) >= c_out[:, None]
    return past.reshape(*past.shape, *[1] * (y.dim() - 2))


def nan_tails(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Puts NaN past the prefix of whatever the layers ask without zeros; returns the list such results are added to."""
    found: list[Tensor] = []

    def patched(function: Callable[..., Tensor], c_out: int) -> Callable[..., Tensor]:
        def call(*args: Any, zero_tail: bool = True, **options: Any) -> Tensor:
            y = function(*args, zero_tail=zero_tail, **options)
            if zero_tail:
                return y
            y.data.masked_fill_(past_width(y, args[c_out]), float("nan"))
            found.append(y)
            return y

        return call

    for name, c_out in (("sliced_conv2d_ragged", 4), ("sliced_conv2d_ragged_packed", 5), ("sliced_linear_ragged", 4)):
        monkeypatch.setattr(ops, name, patched(getattr(ops, name), c_out))
    return found
