"""Multiply-adds of every width of a network, counted once and kept in a table."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from effkern.training import count_macs


class AtWidth(nn.Module):
    """A slimmable network fixed at one width index, as a network of one argument.

    Args:
        model: Called as ``model(x, width)``; shared, not copied.
        width: Index of the width.
    """

    def __init__(self, model: nn.Module, width: int) -> None:
        super().__init__()
        self.model = model
        self.width = width

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x, self.width)

    def extra_repr(self) -> str:
        return f"width={self.width}"


def mac_table(model: nn.Module, image: Sequence[int], widths: int) -> Tensor:
    """Count the multiply-adds an image costs at every width, int64 ``[widths]``.

    Convolutions and linear layers count; bias, batch norm and activation do not. The cost of a batch with per-sample
    widths ``q`` is ``table[q]``, in whole numbers: no average in float32 hides the small terms.

    Args:
        model: Called as ``model(x, width)`` with a width index.
        image: ``(C, H, W)`` of one image.
        widths: Number of widths.

    >>> from effkern.nn import SlicedConv2d
    >>> mac_table(SlicedConv2d([2, 2], [4, 8], 3), (2, 5, 5), widths=2)
    tensor([ 648, 1296])
    """
    parameter = next(model.parameters())
    x = torch.zeros(1, *image, device=parameter.device, dtype=parameter.dtype)
    return torch.tensor([int(count_macs(AtWidth(model, i), x)) for i in range(widths)])
