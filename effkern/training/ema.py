"""A moving average of a module: its weights and its statistics."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Ema"]


class Ema(nn.Module):
    """A copy of ``source`` that follows it: ``copy <- d * copy + (1 - d) * source``, parameters and buffers alike.

    Always in eval mode and without gradient. Integers (counters) are copied. With ``warmup`` the decay after t updates
    is ``min(decay, (1 + t) / (10 + t))``: at a constant 0.997 the copy would be the random initialisation for the
    first 333 steps.

    Args:
        source: followed; not held.
        decay: d, in [0, 1).
        warmup: see above.
    """

    updates: Tensor

    def __init__(self, source: nn.Module, decay: float = 0.999, warmup: bool = True) -> None:
        super().__init__()
        if not 0 <= decay < 1:
            raise ValueError(f"decay: must be in [0, 1), got {decay}")
        self.decay, self.warmup = decay, warmup
        self.module = copy.deepcopy(source).requires_grad_(False)
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))
        self._count: int | None = 0  # the buffer's value, which may lie on a device; None: to be read
        self.eval()

    def current_decay(self) -> float:
        """The decay the next update uses."""
        t = self._count = int(self.updates) if self._count is None else self._count
        return min(self.decay, (1 + t) / (10 + t)) if self.warmup else self.decay

    @torch.no_grad()
    def update(self, source: nn.Module) -> None:
        """Move towards ``source``.

        Raises:
            ValueError: if ``source`` has other tensors than the copy.
        """
        kept, new = self.module.state_dict(), source.state_dict()
        if kept.keys() != new.keys():
            raise ValueError(
                f"source: must have the tensors of the copy, differs in {sorted(kept.keys() ^ new.keys())}"
            )
        decay = self.current_decay()
        floats = [name for name, average in kept.items() if average.is_floating_point()]
        # A device takes one launch for many of them.
        torch._foreach_lerp_([kept[n] for n in floats], [new[n].to(kept[n].dtype) for n in floats], 1 - decay)
        for name in kept.keys() - set(floats):
            kept[name].copy_(new[name])
        self.updates += 1
        self._count = None if self._count is None else self._count + 1

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._count = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the copy says, without gradient."""
        with torch.no_grad():
            return self.module(*args, **kwargs)

    def train(self, mode: bool = True) -> Ema:
        """Stays in eval mode whatever is asked."""
        if self.training or any(module.training for module in self.module.modules()):
            super().train(False)
        return self
