"""A slimmable network as one call, where nothing has to see what is between its layers."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from effkern.nn._widths import width_index
from effkern.nn.gate import ChannelAttention
from effkern.nn.sliced import SlicedLinear
from effkern.nn.sliced_block import SlicedConvBNAct
from effkern.ops.sliced_conv.chain import _chain
from effkern.ops.sliced_conv.packed import remembered
from effkern.ops.sliced_conv.steps import AttentionStep, MeanStep, SlicedStep, Step, write_steps


class Mean(NamedTuple):
    """The mean over the map."""


Part = SlicedConvBNAct | SlicedLinear | ChannelAttention | Mean


class RunsAsChain(nn.Module):
    """A slimmable network that is a chain of layers, and may run by `effkern.ops.sliced_chain`."""

    def __init__(self) -> None:
        super().__init__()
        # The layers that were looked at, all modules that may have hooks, and the steps: one attribute, so that threads
        # never see parts of two looks. None in place of the steps: the layers are no chain.
        self._looked: tuple[list[nn.Module], list[nn.Module], list[int] | None] | None = None

    def _parts(self) -> Sequence[Part]:
        """The layers in order."""
        raise NotImplementedError

    def _as_chain(self, x: Tensor, width: int | Tensor) -> Tensor | None:
        """Scores ``[N, K]`` at ``width``, an index or an index tensor ``[N]``, in one call, or ``None``.

        It serves a network deployed for inference: in eval mode, every `SlicedConvBNAct` folded, no gradient
        recorded, float32 on the CPU, no hooks inside, not under ``torch.compile``, tracing or autocast. The scores
        are those of the layers but for the rounding of means and gates.
        """
        if (
            self.training
            or torch.is_grad_enabled()
            or type(x) is not Tensor
            or x.dtype != torch.float32
            or not x.is_cpu
            or x.dim() != 4
            or torch.compiler.is_compiling()
            or torch.jit.is_tracing()
            or torch.is_autocast_enabled("cpu")
        ):
            return None
        parts = self._parts()
        numbers = self._steps(parts)
        if numbers is None:
            return None
        handles: list[Tensor | None] = []
        tables: list[Tensor] = []
        for part in parts:
            if isinstance(part, SlicedConvBNAct):
                if part._folded is None:
                    return None
                tables += part._folded.tables
                handles.append(part.conv._packed())
            else:
                for linear in _linears(part):
                    weight = linear.weight.unsqueeze(2).unsqueeze(3)
                    handles.append(remembered(x, weight, linear.bias, 1, "auto", ()))
        if any(handle is None for handle in handles):
            return None
        if not isinstance(width, Tensor):
            width = torch.full((x.size(0),), width_index(width, (0,) * numbers[0]))
        with suppress(ValueError, TypeError, IndexError):  # the layers raise them in their own names
            return _chain(x, handles, tables, width, numbers).flatten(1)
        return None

    def _steps(self, parts: Sequence[Part]) -> list[int] | None:
        """The steps as the operator takes them; ``None``: no chain, or there are hooks or training layers."""
        layers = [m for part in parts if isinstance(part, nn.Module) for m in (part, *_linears(part))]
        looked = self._looked
        if looked is None or [*map(id, looked[0])] != [*map(id, layers)]:
            inner = [m for m in self.modules() if m is not self]
            looked = self._looked = (layers, inner, _steps_of(parts))
        watched = any(m.training or m._forward_hooks or m._forward_pre_hooks for m in looked[1])
        return None if watched else looked[2]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_looked": None}


def _linears(part: Part) -> tuple[SlicedLinear, ...]:
    if isinstance(part, ChannelAttention):
        return part.reduce, part.expand
    return (part,) if isinstance(part, SlicedLinear) else ()


def _steps_of(parts: Sequence[Part]) -> list[int] | None:
    count = max((len(p.conv.out_channels) for p in parts if isinstance(p, SlicedConvBNAct)), default=1)

    def each(widths: tuple[int, ...]) -> tuple[int, ...]:
        return widths * count if len(widths) == 1 else widths

    steps: list[Step] = []
    handles = tables = 0
    before: tuple[int, ...] = ()
    for part in parts:
        if isinstance(part, SlicedConvBNAct):
            conv = part.conv
            ins, outs = each(conv.in_channels), each(conv.out_channels)
            shape = tuple(conv.weight.shape)
            depthwise = conv.groups == shape[0] and shape[1] == 1
            if (conv.groups > 1 and not depthwise) or conv.bias is not None or len(outs) != count:
                return None
            if ins != (before or ins[:1] * count):
                return None
            geometry = (conv.stride, conv.padding, conv.dilation, conv.groups)
            steps.append(SlicedStep(handles, shape, outs, tables, *geometry, part.act))
            handles, tables, before = handles + 1, tables + 1, outs
        elif isinstance(part, SlicedLinear):
            outs = each(part.out_features)
            if each(part.in_features) != before or len(outs) != count:
                return None
            steps.append(SlicedStep(handles, (*part.weight.shape, 1, 1), outs))
            handles, before = handles + 1, outs
        elif isinstance(part, ChannelAttention):
            hidden, channels = part.reduce.weight.shape
            fits = each(part.reduce.in_features) == before == each(part.expand.out_features)
            if (
                not fits
                or part.form != "sigmoid"
                or part.reduce.out_features != (hidden,)
                or part.expand.in_features != (hidden,)
            ):
                return None
            steps.append(AttentionStep(handles, handles + 1, hidden, channels))
            handles += 2
        elif isinstance(part, Mean):
            steps.append(MeanStep())
        else:  # a layer put in the place of one of these
            return None
    return write_steps(steps)
