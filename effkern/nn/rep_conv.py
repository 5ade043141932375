"""Convolution, bias, residual and activation as one layer."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from effkern.nn._geometry import ints
from effkern.nn._packing import HoldsPack
from effkern.ops._checks import ACTIVATIONS
from effkern.ops.rep_conv import pack_conv_weight, rep_conv2d, rep_conv2d_packed

_PADDING_MODES = ("zeros", "reflect", "replicate", "circular")

_MODULES: dict[str, Callable[[], nn.Module] | None] = {
    "none": None,
    "relu": partial(nn.ReLU, inplace=True),
    "relu6": partial(nn.ReLU6, inplace=True),
    "hardswish": partial(nn.Hardswish, inplace=True),
    "silu": partial(nn.SiLU, inplace=True),
}


class RepConv2d(HoldsPack):
    """``act(conv(x) + bias [+ residual])`` in one pass over the output: what a folded block becomes.

    Takes the place of ``Conv2d`` and the activation behind it, with the same parameter names, shapes and
    initialisation as :class:`torch.nn.Conv2d`. In eval mode under ``no_grad`` it keeps a packed copy of its weight (see
    :class:`effkern.nn._packing.HoldsPack` for when that is dropped).

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        kernel_size: height and width of the kernel.
        stride: rows and columns.
        padding: rows and columns on each side, or ``"same"`` or ``"valid"``.
        dilation: rows and columns.
        groups: divides both channel counts.
        bias: whether there is one.
        act: ``"none"``, ``"relu"``, ``"relu6"``, ``"hardswish"`` or ``"silu"``.
        padding_mode: as in :class:`torch.nn.Conv2d`; other than ``"zeros"`` the padded input is written out first.
        device, dtype: of the parameters.

    >>> layer = RepConv2d(8, 16, 3, padding=1).eval()
    >>> with torch.no_grad():
    ...     layer(torch.zeros(2, 8, 5, 5)).shape
    torch.Size([2, 16, 5, 5])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        act: str = "relu",
        padding_mode: str = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if groups < 1 or in_channels % groups or out_channels % groups:
            raise ValueError(
                f"groups: must divide in_channels and out_channels, got {groups} for {in_channels} and {out_channels}"
            )
        if min(in_channels, out_channels) < 1:
            raise ValueError(f"in_channels and out_channels must be at least 1, got {in_channels} and {out_channels}")
        if act not in ACTIVATIONS:
            raise ValueError(f"act: must be one of {', '.join(ACTIVATIONS)}, got {act!r}")
        if padding_mode not in _PADDING_MODES:
            raise ValueError(f"padding_mode: must be one of {', '.join(_PADDING_MODES)}, got {padding_mode!r}")
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, groups
        self.kernel_size, self.stride = ints(kernel_size, "kernel_size"), ints(stride, "stride")
        self.dilation = ints(dilation, "dilation")
        self.act, self.padding_mode, self._padding = act, padding_mode, padding
        self.padding, self._pad_first = self._resolve_padding(padding)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels // groups, *self.kernel_size, **factory))
        self.bias = nn.Parameter(torch.empty(out_channels, **factory)) if bias else None
        self.reset_parameters()

    def _resolve_padding(self, padding: int | tuple[int, int] | str) -> tuple[tuple[int, int], list[int]]:
        """The padding the op does, and what ``F.pad`` must do before it (empty: nothing)."""
        if isinstance(padding, str):
            if padding not in ("same", "valid"):
                raise ValueError(f"padding: must be integers, 'same' or 'valid', got {padding!r}")
            if padding == "same" and self.stride != (1, 1):
                raise ValueError(f"padding: 'same' needs stride 1, got stride {self.stride}")
            totals = [
                d * (k - 1) if padding == "same" else 0 for d, k in zip(self.dilation, self.kernel_size, strict=True)
            ]
        else:
            totals = [2 * p for p in ints(padding, "padding", 0)]
        rows, columns = totals
        if self.padding_mode == "zeros" and rows % 2 == 0 and columns % 2 == 0:
            return (rows // 2, columns // 2), []
        return (0, 0), [columns // 2, columns - columns // 2, rows // 2, rows - rows // 2]

    def reset_parameters(self) -> None:
        """Draw new parameters from the distribution ``torch.nn.Conv2d`` uses."""
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        if self.bias is not None:
            fan_in = self.weight[0].numel()
            bound = 1 / math.sqrt(fan_in) if fan_in else 0.0
            nn.init.uniform_(self.bias, -bound, bound)

    @classmethod
    def from_conv(cls, conv: nn.Conv2d, act: str = "none") -> RepConv2d:
        """Make the same convolution as ``conv``, sharing its parameters, with ``act`` behind it."""
        layer = cls(
            conv.in_channels,
            conv.out_channels,
            (conv.kernel_size[0], conv.kernel_size[1]),
            (conv.stride[0], conv.stride[1]),
            conv.padding if isinstance(conv.padding, str) else (int(conv.padding[0]), int(conv.padding[1])),
            (conv.dilation[0], conv.dilation[1]),
            conv.groups,
            bias=conv.bias is not None,
            act=act,
            padding_mode=conv.padding_mode,
            device="meta",
        )
        layer.weight, layer.bias = conv.weight, conv.bias
        return layer.train(conv.training)

    def plain(self) -> nn.Sequential:
        """The same layer in plain PyTorch, a ``Conv2d`` and the activation, sharing the parameters."""
        options: dict[str, Any] = {"bias": self.bias is not None, "padding_mode": self.padding_mode, "device": "meta"}
        padding: tuple[int, int] | str = (
            self._padding if isinstance(self._padding, str) else ints(self._padding, "padding", 0)
        )
        geometry = (self.kernel_size, self.stride, padding, self.dilation, self.groups)
        conv = nn.Conv2d(self.in_channels, self.out_channels, *geometry, **options)
        conv.weight, conv.bias = self.weight, self.bias
        act = _MODULES[self.act]
        layer = nn.Sequential(conv) if act is None else nn.Sequential(conv, act())
        return layer.train(self.training)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Convolve.

        Args:
            x: ``[n, in_channels, h, w]``.
            residual: ``[n, out_channels, ho, wo]``, added before the activation.

        Returns:
            ``[n, out_channels, ho, wo]``.
        """
        if self._pad_first:
            mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
            x = F.pad(x, self._pad_first, mode)
        geometry = (self.stride, self.padding, self.dilation, self.groups)
        handle = self._packed() if self._may_use_pack(x, self.weight, self.bias) else None
        if handle is None:
            return rep_conv2d(x, self.weight, self.bias, *geometry, act=self.act, residual=residual)
        return rep_conv2d_packed(
            x, handle, self.out_channels, self.kernel_size, *geometry, act=self.act, residual=residual
        )

    def macs(self, input_shape: torch.Size, output_shape: torch.Size) -> float:
        """Multiply-adds of one forward, the whole batch together."""
        return float(output_shape.numel() * self.weight[0].numel())

    def _pack_sources(self) -> tuple[Tensor | None, ...]:
        return self.weight, self.bias

    def _make_pack(self) -> Tensor:
        return pack_conv_weight(self.weight, self.bias, self.groups)

    def extra_repr(self) -> str:
        """The constructor's arguments."""
        text = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"
        text += f", padding={self.padding}" if not self._pad_first else f", padding={self._pad_first}"
        if self.dilation != (1, 1):
            text += f", dilation={self.dilation}"
        if self.groups != 1:
            text += f", groups={self.groups}"
        if self.bias is None:
            text += ", bias=False"
        if self.padding_mode != "zeros":
            text += f", padding_mode={self.padding_mode}"
        return f"{text}, act={self.act}"
