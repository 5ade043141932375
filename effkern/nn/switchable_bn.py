"""Batch norm for sliceable networks: one set of statistics a width, one affine shared or one a width."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from effkern.nn._widths import HasWidthTables, as_widths, is_mixed, width_index

Affine = Literal["shared", "per_width"]


class SwitchableBatchNorm2d(HasWidthTables):
    """Batch norm over the first ``widths[i]`` channels, with its own running mean and variance for every ``i``.

    The same layer sees other inputs at every width of a slimmable network, so statistics cannot be shared. The affine
    part can: ``affine="shared"`` slices one weight and one bias (DS-Net, arXiv 2103.13258), ``affine="per_width"``
    keeps a row a width (slimmable networks, arXiv 1812.08928).

    The width is an argument of every call, never state. An index, not the number of channels, picks the statistics:
    two configurations may have the same width here and still differ upstream.

    Args:
        widths: Channels of every width, ascending; equal neighbours are legal. An int is one width.
        eps: Added to the variance.
        momentum: Of the running statistics; ``None`` accumulates the plain average over all batches (calibration).
        affine: ``"shared"`` (parameters ``[C]``) or ``"per_width"`` (parameters ``[W, C]``).
        device: Where parameters and statistics live.
        dtype: Of parameters and statistics.

    Shape:
        ``[N, widths[width], H, W]`` for an index; ``[N, C, H, W]`` with ``C >= max(widths[width])`` for an index
        tensor ``[N]``, with zeros in the result past each sample's width.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor
    width_table: Tensor

    def __init__(
        self,
        widths: int | Sequence[int],
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: Affine = "shared",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if affine not in ("shared", "per_width"):
            raise ValueError(f'affine must be "shared" or "per_width", got {affine!r}')
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.widths = as_widths(widths, "widths")
        self.eps = eps
        self.momentum = momentum
        self.affine: Affine = affine
        table = (len(self.widths), self.widths[-1])
        shape = table if affine == "per_width" else table[1:]
        self.weight = nn.Parameter(torch.ones(shape, **factory))
        self.bias = nn.Parameter(torch.zeros(shape, **factory))
        self.register_buffer("running_mean", torch.zeros(table, **factory))
        self.register_buffer("running_var", torch.ones(table, **factory))
        self.register_buffer("num_batches_tracked", torch.zeros(table[0], dtype=torch.long, device=device))
        self._add_width_table("width_table", self.widths, device)

    def reset_running_stats(self) -> None:
        """Forget the statistics of every width."""
        self.running_mean.zero_()
        self.running_var.fill_(1)
        self.num_batches_tracked.zero_()

    def tables(self) -> tuple[Tensor, Tensor]:
        """The whole layer in eval mode as ``y = x * scale[i] + shift[i]``: two float32 tables ``[W, C]``.

        Entries past a width are zero, so an epilogue that takes a row of the tables yields zeros there.
        """
        scale = self.weight.float() * torch.rsqrt(self.running_var.float() + self.eps)
        shift = self.bias.float() - self.running_mean.float() * scale
        channel = torch.arange(self.widths[-1], device=scale.device)
        active = channel < self.width_table[:, None]
        zero = scale.new_zeros(())
        return torch.where(active, scale, zero), torch.where(active, shift, zero)

    def forward(self, x: Tensor, width: int | Tensor = -1) -> Tensor:
        """Normalise ``x`` with the statistics of ``width``.

        Args:
            x: Input, see the class.
            width: Index into ``widths`` (negative counts from the widest) or, in eval mode, an int tensor ``[N]`` or
                weights of the first M widths, floats ``[N, M]``: the weighted sum of what each would give.

        Raises:
            IndexError: if an int ``width`` is out of range.
            ValueError: if channels and width disagree, or per-sample widths are given in training mode: statistics
                belong to one width, so train with one width a batch (the sandwich rule).
        """
        if is_mixed(width):
            return self._mixed(x, width)
        if isinstance(width, Tensor):
            return self._per_sample(x, width)
        index = width_index(width, self.widths)
        channels = self.widths[index]
        if x.dim() != 4 or x.size(1) != channels:
            raise ValueError(f"x must be [N, {channels}, H, W] at width index {index}, got {list(x.shape)}")
        factor = 0.0 if self.momentum is None else self.momentum
        if self.training:
            self.num_batches_tracked[index] += 1
            if self.momentum is None:
                factor = 1.0 / float(self.num_batches_tracked[index])
        affine = (self.weight[index], self.bias[index]) if self.affine == "per_width" else (self.weight, self.bias)
        return F.batch_norm(
            x,
            self.running_mean[index, :channels],
            self.running_var[index, :channels],
            affine[0][:channels],
            affine[1][:channels],
            self.training,
            factor,
            self.eps,
        )

    def _per_sample(self, x: Tensor, width: Tensor) -> Tensor:
        if self.training:
            raise ValueError("per-sample widths need fixed statistics: call eval() or give one width for the batch")
        if x.dim() != 4 or x.size(1) > self.widths[-1] or width.shape != x.shape[:1]:
            got = f"{list(x.shape)} and {list(width.shape)}"
            raise ValueError(f"x must be [N, C <= {self.widths[-1]}, H, W] and width [N], got {got}")
        channels = x.size(1)
        width = torch.zeros_like(width) if len(self.widths) == 1 else width
        scale, shift = (table[width, :channels, None, None] for table in self.tables())
        active = torch.arange(channels, device=x.device) < self.width_table[width, None]
        # where and not a product: whatever lies past a sample's width may be NaN.
        return torch.where(active[:, :, None, None], x.float() * scale + shift, 0.0).to(x.dtype)

    def _mixed(self, x: Tensor, weights: Tensor) -> Tensor:
        if self.training:
            raise ValueError("weights of widths need fixed statistics: call eval() or give one width for the batch")
        count, limit = weights.size(1), len(self.widths)
        if x.dim() != 4 or len(weights) != len(x) or not 0 < count <= limit or x.size(1) != self.widths[count - 1]:
            got = f"{list(x.shape)} and {list(weights.shape)}"
            raise ValueError(f"x must be [N, widths[M - 1], H, W] and weights [N, M <= {limit}], got {got}")
        # Products and a sum, as autocast would round those of a matmul to 16 bits.
        parts = weights.float()[:, :, None]
        scale, shift = ((parts * table[:count, : x.size(1)]).sum(1) for table in self.tables())
        return (x.float() * scale[:, :, None, None] + shift[:, :, None, None]).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{list(self.widths)}, eps={self.eps}, momentum={self.momentum}, affine={self.affine!r}"
