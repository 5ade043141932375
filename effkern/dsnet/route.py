"""Networks with gates: what is asked of them, their ways through the widths, and what each way costs."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from effkern.nn.gate import DoubleHeadedGate
from effkern.training import count_macs

__all__ = ["Dynamic", "Routed", "expected_cost", "finish", "route_costs", "routed", "uniform_routes"]


class Routed(Protocol):
    """A network in segments 0 to G with a gate behind each but the last; networks of `effkern.models` are such.

    Segment 0 takes images and runs at width 0 when gates decide. ``width`` and ``in_width`` are an index, one a sample
    (int tensor ``[N]``, eval mode) or weights of the first widths (float tensor ``[N, M]``, eval mode).

    A network whose layers behind a gate have more configurations than widths also has ``configuration(k, width,
    before)``, see `effkern.models`; without, a segment runs at the width itself.
    """

    @property
    def gates(self) -> list[DoubleHeadedGate]:
        """In forward order."""

    def segment(self, k: int, x: Tensor, width: int | Tensor, in_width: int | Tensor | None = None) -> Tensor:
        """One segment; the last gives scores."""

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Scores and choices ``[N, G]`` at inference."""


def routed(net: nn.Module) -> Routed:
    """``net``, known to have gates.

    Raises:
        ValueError: if it has none.
    """
    if not getattr(net, "gates", None):
        raise ValueError(f"network: {type(net).__name__} has no gates")
    return net  # type: ignore[return-value]


def configuration(net: Routed, k: int, width: int | Tensor, before: int | Tensor) -> int | Tensor:
    """What segment ``k`` runs at for ``width`` behind a segment that ran at ``before``."""
    rule = getattr(net, "configuration", None)
    return width if rule is None else rule(k, width, before)


class Dynamic(nn.Module):
    """A network with gates as a network of one argument: every image at the widths its gates choose.

    Args:
        net: Shared, not copied.
    """

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        routed(net)
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net.route(x)[0]  # type: ignore[operator]


def finish(net: Routed, x: Tensor, widths: Sequence[int]) -> Tensor:
    """Scores from what the first gate attended on, all samples at ``widths``, one a gate."""
    before: int | Tensor = 0
    gates = net.gates
    for k, width in enumerate(widths):
        at = configuration(net, k + 1, width, before)
        x = net.segment(k + 1, x, at, before)
        if k + 1 < len(gates):
            x = gates[k + 1](x, at)
        before = at
    return x


class _Fixed(nn.Module):
    """The network with its gates at work and their answers replaced."""

    def __init__(self, net: nn.Module, widths: Sequence[int]) -> None:
        super().__init__()
        self.net, self.widths = net, widths

    def forward(self, x: Tensor) -> Tensor:
        net = routed(self.net)
        before: int | Tensor = 0
        x = net.segment(0, x, before)
        for k, (gate, width) in enumerate(zip(net.gates, self.widths, strict=True)):
            x, _ = gate.decide(x, before)
            at = configuration(net, k + 1, width, before)
            x, before = net.segment(k + 1, x, at, before), at
        return x


def route_costs(net: nn.Module, image: Sequence[int]) -> Tensor:
    """Multiply-adds of an image on every way, int64 ``[G_1, ..., G_k]``, one axis a gate; the gates are counted.

    Counted once and kept: no hook stays in the network, and a batch's cost is a look-up in whole numbers.

    Args:
        net: See `Routed`.
        image: ``(C, H, W)``.
    """
    parameter = next(net.parameters())
    x = torch.zeros(1, *image, device=parameter.device, dtype=parameter.dtype)
    ways = [gate.space for gate in routed(net).gates]
    costs = [int(count_macs(_Fixed(net, widths), x)) for widths in itertools.product(*ways)]
    return torch.tensor(costs).reshape([len(space) for space in ways])


def expected_cost(table: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """Cost of every sample, float64 ``[N]``, differentiable in the weights of the choices.

    Args:
        table: From `route_costs`.
        weights: ``[N, G_k]`` for each gate; a row with a single 1 gives the entry of the table, in whole numbers.
    """
    left = table.to(device=weights[0].device, dtype=torch.float64).expand(len(weights[0]), *table.shape)
    for one in weights:
        left = (one.double().reshape(*one.shape, *[1] * (left.dim() - 2)) * left).sum(1)
    return left


def uniform_routes(net: Routed) -> list[tuple[int, ...]]:
    """Choices, one a gate, that go evenly from every gate's slimmest to every gate's widest."""
    counts = [len(gate.space) for gate in net.gates]
    steps = max(counts)
    return [tuple(round(i * (count - 1) / max(1, steps - 1)) for count in counts) for i in range(steps)]
