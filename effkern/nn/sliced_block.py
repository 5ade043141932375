"""Sliced convolution, switchable batch norm and activation as one layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules import module as module_hooks

from effkern import ops
from effkern.nn._packing import freeze_packs
from effkern.nn._widths import is_mixed, width_index
from effkern.nn.sliced import Pair, SlicedConv2d, Tables, leading_channels
from effkern.nn.sliced_group_norm import SlicedGroupNorm
from effkern.nn.switchable_bn import Affine, SwitchableBatchNorm2d
from effkern.ops import _direct

Norm = Literal["batch", "group"]
# In place where the gradient needs no input: batch norm's own gradient does not need its output.
_ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "none": nn.Identity,
    "relu": partial(nn.ReLU, inplace=True),
    "relu6": partial(nn.ReLU6, inplace=True),
    "hardswish": nn.Hardswish,
    "silu": nn.SiLU,
}


class _Folded(NamedTuple):
    """What a deployed layer keeps."""

    tables: Tables
    rows: list[Tables]  # of the tables, one a width
    handle: Tensor | None
    calls: list[tuple[Any, ...]]  # the short way's arguments behind x, one a width; empty where it is closed


class SlicedConvBNAct(nn.Module):
    """``act(bn(conv(x)))`` at the width of the call: three ops in training, one kernel with an epilogue in eval mode.

    Args:
        in_channels: Input widths, see `SlicedConv2d`.
        out_channels: Output widths. Give one for every configuration even if they are equal, so that each has its own
            statistics.
        kernel_size: Of the window.
        stride: Of the window.
        padding: Of the input, by default half the window.
        groups: Of the widest layer.
        act: Activation name.
        affine: Of the batch norm, see `SwitchableBatchNorm2d`.
        norm: ``"batch"``, or ``"group"``: `SlicedGroupNorm` in its place, which does not fold into the kernel.
        device: Where the parameters live.
        dtype: Of the parameters.
    """

    def __init__(
        self,
        in_channels: int | Sequence[int],
        out_channels: int | Sequence[int],
        kernel_size: int,
        stride: Pair = 1,
        padding: Pair | None = None,
        groups: int = 1,
        act: str = "relu",
        affine: Affine = "shared",
        norm: Norm = "batch",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if norm not in ("batch", "group"):
            raise ValueError(f'norm must be "batch" or "group", got {norm!r}')
        if act not in _ACTIVATIONS:
            raise ValueError(f"act must be one of {sorted(_ACTIVATIONS)}, got {act!r}")
        self.act = act
        self.conv = SlicedConv2d(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            kernel_size // 2 if padding is None else padding,
            groups=groups,
            bias=False,
            device=device,
            dtype=dtype,
        )
        self.bn: SwitchableBatchNorm2d | SlicedGroupNorm
        if norm == "batch":
            self.bn = SwitchableBatchNorm2d(out_channels, affine=affine, device=device, dtype=dtype)
        else:
            self.bn = SlicedGroupNorm(out_channels, device=device, dtype=dtype)
        self.activation = _ACTIVATIONS[act]()
        self._folded: _Folded | None = None

    def forward(
        self,
        x: Tensor,
        width: int | Tensor = -1,
        in_width: int | Tensor | None = None,
        *,
        zero_tail: bool = True,
    ) -> Tensor:
        """Run the layer at ``width`` (and ``in_width``), see `SlicedConv2d.forward`.

        Weights of the first M widths, floats ``[N, M]``, mix what batch norm makes of the widest convolution's result
        at each width, ``act(sum_i w_i bn_i(y))``, with zeros past a width: a row with a single 1 gives that width, and
        the gradient of a weight says what its width would have given. In eval mode only.
        """
        folded = self._folded
        if folded is not None and in_width is None and type(width) is int and not torch.compiler.is_compiling():
            y = self._short_way(folded, x, width)
            if y is not None:
                return y
        if self.training or is_mixed(width) or isinstance(self.bn, SlicedGroupNorm):
            return self.activation(self.bn(self.conv(x, width, in_width), width))
        return self.conv(x, width, in_width, tables=self._tables(width), act=self.act, zero_tail=zero_tail)

    def _tables(self, width: int | Tensor) -> Tables:
        assert isinstance(self.bn, SwitchableBatchNorm2d)
        folded = self._folded
        if folded is None or (torch.is_grad_enabled() and self.bn.weight.requires_grad):
            return self.bn.tables()
        if isinstance(width, Tensor):
            return folded.tables
        return folded.rows[width_index(width, self.bn.widths)]

    def _short_way(self, folded: _Folded, x: Tensor, width: int) -> Tensor | None:
        """The call past modules, checks and dispatcher, which take longer than a small convolution; or None."""
        calls, conv = folded.calls, self.conv
        if (
            not -len(calls) <= width < len(calls)
            or conv._frozen is not folded.handle
            or conv._forward_hooks
            or conv._forward_pre_hooks
            or module_hooks._global_forward_hooks
            or module_hooks._global_forward_pre_hooks
            or (torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters()))
        ):
            return None
        return _direct.sliced_conv2d_packed(x, *calls[width])

    @torch.no_grad()
    def narrow(self, width: int, in_width: int | None = None) -> nn.Sequential:
        """The layer at one width in plain PyTorch, in eval mode: a convolution with batch norm folded in, then act."""
        conv = self.conv.narrow(width, in_width)
        if isinstance(self.bn, SlicedGroupNorm):
            return nn.Sequential(conv, self.bn.narrow(width), self.activation).eval()
        row = width_index(width, self.bn.widths)
        scale, shift = (table[row, : conv.out_channels] for table in self.bn.tables())
        conv.weight.mul_(scale[:, None, None, None])
        conv.bias = nn.Parameter(shift.to(conv.weight.dtype))
        return nn.Sequential(conv, self.activation).eval()

    def fold(self) -> None:
        """Deploy: compute the scale and shift tables and pack the weight once, and look at neither at a call.

        ``train()``, a load of a state dict and every move or cast drop them again. Writing to the parameters or
        statistics by hand in eval mode does not: call `fold` again. Calls that record gradients do not use them.
        """
        if self.training:
            raise RuntimeError("batch norm folds in eval mode only: call eval() first")
        freeze_packs(self.conv)
        if not isinstance(self.bn, SwitchableBatchNorm2d):
            return
        scale, shift = (t.detach() for t in self.bn.tables())
        rows = list(zip(scale.unbind(), shift.unbind(), strict=True))
        conv, handle, calls = self.conv, self.conv._frozen, []
        if handle is not None and handle.device == scale.device:
            shape = (conv.out_channels[-1], conv.kernel_size)
            geometry = (conv.stride, conv.padding, conv.dilation, conv.groups, conv.group_mode)
            for i, row in enumerate(rows):
                c_in, c_out = (w[width_index(i, w)] for w in (conv.in_channels, conv.out_channels))
                calls.append((c_in, handle, *shape, c_out, *geometry, *row, self.act, "auto"))
        self._folded = _Folded((scale, shift), rows, handle, calls)

    def train(self, mode: bool = True) -> SlicedConvBNAct:
        if mode:  # eval() of a network in eval mode, as an evaluation does, changes nothing
            self._folded = None
        return super().train(mode)

    def _apply(self, fn, recurse: bool = True) -> SlicedConvBNAct:  # type: ignore[no-untyped-def]
        self._folded = None
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        folded = self._folded  # the handle is the convolution's, whose copies and pickles have none
        return {**self.__dict__, "_folded": folded and folded._replace(handle=None, calls=[])}

    def _load_from_state_dict(self, *args, **kwargs) -> None:  # type: ignore[no-untyped-def]
        self._folded = None
        super()._load_from_state_dict(*args, **kwargs)


def separable(
    depthwise: SlicedConvBNAct, pointwise: SlicedConvBNAct, x: Tensor, width: int | Tensor, zero_tail: bool = True
) -> Tensor:
    """``pointwise(depthwise(x, width), width)``, in one pass where both are folded and the batch has one width.

    The result is the same bit for bit. Layers with hooks run one after the other, so that the hooks see them.
    """
    layers = (depthwise, pointwise)
    if not all(isinstance(layer, SlicedConvBNAct) for layer in layers):  # others put in their place
        return pointwise(depthwise(x, width), width)
    convs = (depthwise.conv, pointwise.conv)
    folded = all(layer._folded is not None and not layer.training for layer in layers)
    hooked = any(m._forward_hooks or m._forward_pre_hooks for m in (*layers, *convs))
    if isinstance(width, Tensor) or not folded or hooked:
        return pointwise(depthwise(x, width, zero_tail=False), width, zero_tail=zero_tail)
    tables = [layer._tables(width) for layer in layers]
    handles = [
        conv._packed() if conv._may_use_pack(x, x, conv.weight, conv.bias, *table) else None
        for conv, table in zip(convs, tables, strict=True)
    ]
    if handles[0] is None or handles[1] is None:
        return pointwise(depthwise(x, width, zero_tail=False), width, zero_tail=zero_tail)
    filters, mix = convs
    return ops.sliced_dw_pw_packed(
        leading_channels(x, filters.in_channels[width_index(width, filters.in_channels)]),
        handles[0],
        handles[1],
        filters.out_channels[-1],
        filters.kernel_size,
        mix.out_channels[-1],
        mix.out_channels[width_index(width, mix.out_channels)],
        filters.stride,
        filters.padding,
        filters.dilation,
        *tables[0],
        depthwise.act,
        *tables[1],
        None,
        pointwise.act,
    )
