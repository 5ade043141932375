"""Width lists and width indices, as every sliceable layer reads them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn


def as_widths(channels: int | Sequence[int], name: str) -> tuple[int, ...]:
    """Check a width list: positive and ascending. A plain int is a list of one.

    >>> as_widths([16, 32, 32], "out_channels"), as_widths(3, "in_channels")
    ((16, 32, 32), (3,))
    """
    widths = (channels,) if isinstance(channels, int) else tuple(int(c) for c in channels)
    if not widths or widths[0] < 1 or list(widths) != sorted(widths):
        raise ValueError(f"{name} must be a positive int or an ascending list of them, got {channels}")
    return widths


def width_index(width: int, widths: tuple[int, ...]) -> int:
    """Turn a width index into one from 0 on. A layer with one width has it at every index.

    >>> width_index(-1, (16, 32)), width_index(3, (10,))
    (1, 0)
    """
    if len(widths) == 1:
        return 0
    if not -len(widths) <= width < len(widths):
        raise IndexError(f"width must be in [{-len(widths)}, {len(widths) - 1}], got {width}")
    return width % len(widths)


def layer_width(width: int | Tensor) -> int | Tensor:
    """What a layer without statistics runs at: weights of widths, ``[N, M]`` floats, run at the widest of the M.

    Weights are how a choice of widths is trained: a row of 0 and a single 1, through which gradients pass. The channels
    past a sample's width are zero then, so the widest layer computes what the narrow one would.
    """
    return width.size(1) - 1 if is_mixed(width) else width


def is_mixed(width: int | Tensor | None) -> TypeGuard[Tensor]:
    """Whether ``width`` is weights of widths and not an index or indices."""
    return isinstance(width, Tensor) and width.dim() == 2 and width.is_floating_point()


class HasWidthTables(nn.Module):
    """A layer with its widths as buffers ``[W]``, for per-sample look-ups on its device; they are in no state dict."""

    def __init__(self) -> None:
        super().__init__()
        self._widths: dict[str, tuple[int, ...]] = {}

    def _add_width_table(self, name: str, widths: tuple[int, ...], device: torch.device | str | None) -> None:
        self._widths[name] = widths
        self.register_buffer(name, torch.tensor(widths, device=device), persistent=False)

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        absent = [name for name in self._widths if getattr(self, name).is_meta]
        super()._apply(*args, **kwargs)
        for name in absent:  # to_empty() gives memory and no content, and no state dict brings it
            table = getattr(self, name)
            if not table.is_meta:
                table.copy_(torch.tensor(self._widths[name]))
        return self


def sample_widths(width: int | Tensor, table: Tensor, samples: int) -> Tensor:
    """Channels of every sample, int64 ``[samples]``: an index or an index tensor looked up in the widths ``[W]``."""
    if isinstance(width, Tensor):
        if width.shape != (samples,) or width.dtype not in (torch.int32, torch.int64):
            raise ValueError(
                f"width must be an int32 or int64 tensor [{samples}], got {width.dtype} {list(width.shape)}"
            )
        if table.numel() > 1:
            return table[width]
    index = width_index(-1 if isinstance(width, Tensor) else width, (0,) * table.numel())
    return table[index].expand(samples)
