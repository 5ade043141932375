"""Convolution and linear layers of which every call, or every sample, uses only the first channels."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from effkern import ops
from effkern.nn._geometry import ints
from effkern.nn._packing import HoldsPack
from effkern.nn._widths import HasWidthTables, as_widths, layer_width, sample_widths, width_index
from effkern.ops._slices import slice_bias, slice_weight

Pair = int | tuple[int, int]
Tables = tuple[Tensor, Tensor]


class SlicedConv2d(HasWidthTables, HoldsPack):
    """2-D convolution with one weight of the widest size, run at a leading slice of it.

    ``layer(x, i)`` uses the first ``in_channels[i]`` inputs and ``out_channels[i]`` outputs of the weight; with
    ``i`` an int tensor ``[N]`` every sample takes its own width, in one call. Nothing is copied or masked, and no width
    is remembered: it comes with every call. In eval mode without gradients the weight is packed once, for all widths.

    Args:
        in_channels: Input width of every configuration, ascending. An int is the same width in all of them.
        out_channels: Output widths, as ``in_channels``.
        kernel_size: Of the window, as ``stride``, ``padding`` and ``dilation`` an int or a pair.
        groups: Of the widest layer. A depthwise layer has ``groups == in_channels[-1] == out_channels[-1]``.
        bias: Whether there is a bias (sliced like the outputs).
        group_mode: What a prefix means for ``1 < groups``: ``"prefix_groups"`` (the first groups, whole) or
            ``"within_group"`` (all groups, the first channels of each).
        device: Where the parameters live.
        dtype: Of the parameters.

    Shape:
        ``x`` ``[N, C, H, W]`` with ``C >= in_channels[width]`` (more channels are not read); the result has
        ``out_channels[width]`` channels, or ``out_channels[-1]`` with zeros past each sample's width.

    >>> layer = SlicedConv2d([8, 16], [16, 32], 3, padding=1)
    >>> layer(torch.randn(2, 8, 5, 5), 0).shape
    torch.Size([2, 16, 5, 5])
    >>> layer(torch.randn(2, 16, 5, 5), torch.tensor([1, 0])).shape
    torch.Size([2, 32, 5, 5])
    """

    in_table: Tensor
    out_table: Tensor

    def __init__(
        self,
        in_channels: int | Sequence[int],
        out_channels: int | Sequence[int],
        kernel_size: Pair,
        stride: Pair = 1,
        padding: Pair = 0,
        dilation: Pair = 1,
        groups: int = 1,
        bias: bool = True,
        group_mode: str = "prefix_groups",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_channels = as_widths(in_channels, "in_channels")
        self.out_channels = as_widths(out_channels, "out_channels")
        for name, widths in (("in_channels", self.in_channels), ("out_channels", self.out_channels)):
            if groups < 1 or widths[-1] % groups:
                raise ValueError(f"groups must divide {name}, got {groups} and {widths[-1]}")
        self.kernel_size = ints(kernel_size, "kernel_size")
        self.stride = ints(stride, "stride")
        self.padding = ints(padding, "padding", 0)
        self.dilation = ints(dilation, "dilation")
        self.groups = groups
        self.group_mode = group_mode
        shape = (self.out_channels[-1], self.in_channels[-1] // groups, *self.kernel_size)
        _make_parameters(self, shape, bias, {"device": device, "dtype": dtype})
        _make_width_tables(self, self.in_channels, self.out_channels, device)

    def forward(
        self,
        x: Tensor,
        width: int | Tensor = -1,
        in_width: int | Tensor | None = None,
        *,
        tables: Tables | None = None,
        act: str = "none",
        zero_tail: bool = True,
    ) -> Tensor:
        """Run the layer at ``width``.

        Args:
            x: Input, see the class.
            width: Index of the output width: an int, or an int tensor ``[N]`` with one a sample. Weights of the first M
                widths, floats ``[N, M]``, run the widest of those.
            in_width: Index of the input width if it is another one than ``width``.
            tables: Scale and shift, each ``[W, out_channels[-1]]``, of which row ``width`` is applied to the result
                (`SwitchableBatchNorm2d.tables`). For an int ``width`` also that row alone.
            act: Activation applied last.
            zero_tail: False, for a result that only layers at the same widths read: with a width a sample nothing is
                written past it, see `effkern.ops.sliced_conv2d_ragged`.

        Raises:
            IndexError: if a width index is out of range.
            ValueError: if ``x`` has fewer channels than the width needs.
        """
        in_width = layer_width(width if in_width is None else in_width)
        width = layer_width(width)
        # The packed sliced ops have no gradient, so nothing they take may want one.
        may_pack = self._may_use_pack(x, x, self.weight, self.bias, *(tables or ()))
        handle = self._packed() if may_pack else None
        weight: tuple[Any, ...] = (self.weight, self.bias)
        if handle is not None:
            weight = (handle, self.out_channels[-1], self.kernel_size)
        geometry = (self.stride, self.padding, self.dilation, self.groups, self.group_mode)
        if isinstance(width, Tensor) or isinstance(in_width, Tensor):
            c_in = sample_widths(in_width, self.in_table, x.size(0))
            c_out = sample_widths(width, self.out_table, x.size(0))
            ragged: Callable[..., Tensor] = (
                ops.sliced_conv2d_ragged if handle is None else ops.sliced_conv2d_ragged_packed
            )
            options = {**_rows(tables, width, x), "act": act, "zero_tail": zero_tail}
            return ragged(x, *weight, c_in, c_out, self.out_channels[-1], *geometry, **options)
        x = leading_channels(x, self.in_channels[width_index(in_width, self.in_channels)])
        outs = self.out_channels[width_index(width, self.out_channels)]
        scale, shift = (None, None) if tables is None else (_row_of(t, width) for t in tables)
        uniform: Callable[..., Tensor] = ops.sliced_conv2d if handle is None else ops.sliced_conv2d_packed
        return uniform(x, *weight, outs, *geometry, scale, shift, act)

    def _pack_sources(self) -> tuple[Tensor | None, ...]:
        return self.weight, self.bias

    def _make_pack(self) -> Tensor:
        return ops.pack_conv_weight(self.weight, self.bias, self.groups)

    def narrow(self, width: int, in_width: int | None = None) -> nn.Conv2d:
        """The layer at one width as an ordinary layer with a copy of the slice, in eval mode."""
        outs, ins = _widths_at(self.out_channels, self.in_channels, width, in_width)
        part, groups = slice_weight(self.weight.detach(), ins, outs, self.groups, self.group_mode)
        geometry = (self.kernel_size, self.stride, self.padding, self.dilation)
        factory: dict[str, Any] = {"device": part.device, "dtype": part.dtype}
        conv = nn.Conv2d(ins, outs, *geometry, groups=groups, bias=self.bias is not None, **factory)
        with torch.no_grad():
            conv.weight.copy_(part)
            if self.bias is not None and conv.bias is not None:
                conv.bias.copy_(slice_bias(self.bias, outs, self.groups, self.group_mode))
        return conv.eval()

    def macs(self, input_shape: torch.Size, output_shape: torch.Size) -> float:
        """Multiply-adds of a call that took and gave these shapes, all of their channels active."""
        per_group = self.weight.size(1)
        if self.groups == 1 or self.group_mode == "within_group":
            per_group = min(input_shape[1] // self.groups, per_group)
        return float(output_shape.numel() * per_group * math.prod(self.kernel_size))

    def extra_repr(self) -> str:
        return (
            f"{list(self.in_channels)}, {list(self.out_channels)}, kernel_size={self.kernel_size}, "
            f"stride={self.stride}, padding={self.padding}, dilation={self.dilation}, groups={self.groups}, "
            f"bias={self.bias is not None}"
        )


class SlicedLinear(HasWidthTables):
    """Linear layer with one weight of the widest size, run at a leading slice of it; see `SlicedConv2d`.

    Args:
        in_features: Input width of every configuration, ascending, or one int for all.
        out_features: Output widths, as ``in_features``. The classifier of a slimmable network has one.
        bias: Whether there is a bias.
        device: Where the parameters live.
        dtype: Of the parameters.

    Shape:
        ``x`` ``[..., C]`` with ``C >= in_features[width]``, or ``[N, C]`` for an index tensor ``[N]``.
    """

    in_table: Tensor
    out_table: Tensor

    def __init__(
        self,
        in_features: int | Sequence[int],
        out_features: int | Sequence[int],
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features = as_widths(in_features, "in_features")
        self.out_features = as_widths(out_features, "out_features")
        shape = (self.out_features[-1], self.in_features[-1])
        _make_parameters(self, shape, bias, {"device": device, "dtype": dtype})
        _make_width_tables(self, self.in_features, self.out_features, device)

    def forward(
        self,
        x: Tensor,
        width: int | Tensor = -1,
        in_width: int | Tensor | None = None,
        *,
        act: str = "none",
        zero_tail: bool = True,
    ) -> Tensor:
        """Run the layer at ``width``; arguments as in `SlicedConv2d.forward`."""
        in_width = layer_width(width if in_width is None else in_width)
        width = layer_width(width)
        if isinstance(width, Tensor) or isinstance(in_width, Tensor):
            c_in = sample_widths(in_width, self.in_table, x.size(0))
            c_out = sample_widths(width, self.out_table, x.size(0))
            widths = (c_in, c_out, self.out_features[-1])
            return ops.sliced_linear_ragged(x, self.weight, self.bias, *widths, act=act, zero_tail=zero_tail)
        x = leading_channels(x, self.in_features[width_index(in_width, self.in_features)], dim=-1)
        return ops.sliced_linear(
            x, self.weight, self.bias, self.out_features[width_index(width, self.out_features)], act=act
        )

    def narrow(self, width: int, in_width: int | None = None) -> nn.Linear:
        """The layer at one width as an ordinary layer with a copy of the slice, in eval mode."""
        outs, ins = _widths_at(self.out_features, self.in_features, width, in_width)
        linear = nn.Linear(ins, outs, self.bias is not None, self.weight.device, self.weight.dtype)
        with torch.no_grad():
            linear.weight.copy_(self.weight[:outs, :ins])
            if self.bias is not None:
                linear.bias.copy_(self.bias[:outs])
        return linear.eval()

    def macs(self, input_shape: torch.Size, output_shape: torch.Size) -> float:
        """Multiply-adds of a call that took and gave these shapes, all of their features active."""
        return float(output_shape.numel() * min(input_shape[-1], self.in_features[-1]))

    def extra_repr(self) -> str:
        return f"{list(self.in_features)}, {list(self.out_features)}, bias={self.bias is not None}"


def _make_parameters(layer: nn.Module, shape: tuple[int, ...], bias: bool, factory: dict[str, Any]) -> None:
    """Create weight and bias as torch's own layers do: uniform in 1/sqrt(fan in) of the widest layer."""
    layer.weight = nn.Parameter(torch.empty(shape, **factory))
    nn.init.kaiming_uniform_(layer.weight, a=math.sqrt(5))
    if bias:
        bound = 1 / math.sqrt(math.prod(shape[1:]))
        layer.bias = nn.Parameter(torch.empty(shape[0], **factory).uniform_(-bound, bound))
    else:
        layer.register_parameter("bias", None)


def _make_width_tables(
    layer: HasWidthTables, c_in: tuple[int, ...], c_out: tuple[int, ...], device: torch.device | str | None
) -> None:
    # Of outputs there may be a multiple: layers behind a choice of widths, whose calls name both.
    if len(c_in) > 1 and len(c_out) > 1 and len(c_out) % len(c_in):
        raise ValueError(f"input and output widths must be as many, or one for all, got {list(c_in)} and {list(c_out)}")
    layer._add_width_table("in_table", c_in, device)
    layer._add_width_table("out_table", c_out, device)


def _widths_at(outs: tuple[int, ...], ins: tuple[int, ...], width: int, in_width: int | None) -> tuple[int, int]:
    return outs[width_index(width, outs)], ins[width_index(width if in_width is None else in_width, ins)]


def leading_channels(x: Tensor, channels: int, dim: int = 1) -> Tensor:
    if x.size(dim) < channels:
        raise ValueError(f"x must have at least {channels} channels in dim {dim}, got {list(x.shape)}")
    return x if x.size(dim) == channels else x.narrow(dim, 0, channels)


def _row(table: Tensor, width: int) -> int:
    return width_index(width, (0,) * table.size(0))


def _row_of(table: Tensor, width: int) -> Tensor:
    return table if table.dim() == 1 else table.select(0, _row(table, width))


def _rows(tables: Tables | None, width: int | Tensor, x: Tensor) -> dict[str, Any]:
    """Epilogue arguments of the ragged op: the tables and the row of every sample."""
    if tables is None:
        return {}
    rows = width if isinstance(width, Tensor) and tables[0].size(0) > 1 else None
    if rows is None:
        row = 0 if isinstance(width, Tensor) else _row(tables[0], width)
        rows = torch.full((x.size(0),), row, device=x.device)
    return {"scale_table": tables[0], "shift_table": tables[1], "width_idx": rows}
