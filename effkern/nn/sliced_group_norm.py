"""Group norm for sliceable networks: no statistics to keep, so nothing that belongs to one width."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from effkern.nn._rows import layout_of
from effkern.nn._widths import HasWidthTables, as_widths, is_mixed, width_index

__all__ = ["SlicedGroupNorm"]


class SlicedGroupNorm(HasWidthTables):
    """Group norm over the first ``widths[i]`` channels in groups of as many channels at every width.

    Groups are whole at every width, so a channel's result does not depend on how many others run: a sample at a narrow
    width gets the first channels of what the widest computes. It stands in for `SwitchableBatchNorm2d` where training
    is to do without batch statistics, as in the stability study of in-place ensemble bootstrapping (arXiv 2103.13258).

    Args:
        widths: Channels of every width, ascending. An int is one width.
        group: Channels of a group, a divisor of every width; default: the largest up to 16.
        eps: Added to the variance.
        device: Where parameters live.
        dtype: Of parameters.

    Shape:
        As `SwitchableBatchNorm2d`, in training and eval mode alike.

    Raises:
        ValueError: if ``group`` does not divide every width.
    """

    width_table: Tensor

    def __init__(
        self,
        widths: int | Sequence[int],
        group: int | None = None,
        eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.widths = as_widths(widths, "widths")
        common = math.gcd(*self.widths)
        group = max(d for d in range(1, 17) if common % d == 0) if group is None else group
        if group < 1 or common % group:
            raise ValueError(f"group: must divide every width of {list(self.widths)}, got {group}")
        self.group, self.eps = group, eps
        self.weight = nn.Parameter(torch.ones(self.widths[-1], device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(self.widths[-1], device=device, dtype=dtype))
        self._add_width_table("width_table", self.widths, device)

    def forward(self, x: Tensor, width: int | Tensor = -1) -> Tensor:
        """Normalise ``x``; see `SwitchableBatchNorm2d.forward` for ``width``, here in training mode as well.

        Raises:
            IndexError: if an int ``width`` is out of range.
            ValueError: if channels and width disagree.
        """
        if not isinstance(width, Tensor):
            index = width_index(width, self.widths)
            if x.dim() != 4 or x.size(1) != self.widths[index]:
                raise ValueError(
                    f"x must be [N, {self.widths[index]}, H, W] at width index {index}, got {list(x.shape)}"
                )
            return self._normalized(x)
        if x.dim() != 4 or x.size(1) not in self.widths or len(width) != len(x):
            got = f"{list(x.shape)} and {list(width.shape)}"
            raise ValueError(f"x must be [N, C in {list(self.widths)}, H, W] with a width a sample, got {got}")
        channel = torch.arange(x.size(1), device=x.device)
        if is_mixed(width):
            active = channel < self.width_table[: width.size(1), None]
            # Products and a sum, as autocast would round those of a matmul to 16 bits.
            share = (width.float()[:, :, None] * active).sum(1)
            return (self._normalized(x).float() * share[:, :, None, None]).to(x.dtype)
        width = torch.zeros_like(width) if len(self.widths) == 1 else width
        active = (channel < self.width_table[width, None])[:, :, None, None]
        # Both times where and not a product: whatever lies past a sample's width may be NaN.
        return torch.where(active, self._normalized(torch.where(active, x, 0.0)), 0.0)

    def _normalized(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu" or x.is_contiguous():
            return self._grouped(x)
        # In channels-last memory PyTorch adds up in as many parts as it has threads, so a sample's bits would depend on
        # them and on the other samples; in contiguous memory a group is one sum.
        return self._grouped(x.contiguous()).contiguous(memory_format=layout_of(x))

    def _grouped(self, x: Tensor) -> Tensor:
        channels = x.size(1)
        y = F.group_norm(x, channels // self.group, self.weight[:channels], self.bias[:channels], self.eps)
        return y.to(x.dtype)

    def narrow(self, width: int) -> nn.GroupNorm:
        """The layer at one width in plain PyTorch."""
        channels = self.widths[width_index(width, self.widths)]
        norm = nn.GroupNorm(
            channels // self.group, channels, self.eps, device=self.weight.device, dtype=self.weight.dtype
        )
        with torch.no_grad():
            norm.weight.copy_(self.weight[:channels])
            norm.bias.copy_(self.bias[:channels])
        return norm

    def extra_repr(self) -> str:
        return f"{list(self.widths)}, group={self.group}, eps={self.eps}"
