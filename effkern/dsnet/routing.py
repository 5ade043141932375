"""What gates do on a set of images, and what they are held against: one width for all, mixtures, an oracle."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from effkern.dsnet.route import finish, routed, uniform_routes

__all__ = ["Routing", "entropy_of", "evaluate_routing"]


def entropy_of(choice: Tensor, choices: int) -> float:
    """Entropy in nat of the histogram of ``choice`` ``[N]``: 0 where all are the same, ``log(choices)`` at most."""
    share = choice.bincount(minlength=choices).double() / max(1, len(choice))
    return float(-torch.special.xlogy(share, share).sum()) + 0.0


@dataclass(frozen=True)
class Routing:
    """Every choice, and whether it and the others would have been right.

    Attributes:
        choice: ``[N, G]``, positions in the gates' spaces.
        correct: ``[N]`` bool, of the chosen way.
        correct_at: ``[N, P]`` bool, of one way for all, from the slimmest to the widest.
        macs: ``[N]`` int64, of the chosen way, gates included.
        macs_at: ``[P]`` int64, of one way for all.
        spaces: number of choices of every gate.
    """

    choice: Tensor = field(repr=False)
    correct: Tensor = field(repr=False)
    correct_at: Tensor = field(repr=False)
    macs: Tensor = field(repr=False)
    macs_at: Tensor
    spaces: list[int]

    @property
    def top1(self) -> float:
        """Accuracy in percent."""
        return _percent(self.correct)

    @property
    def top1_at(self) -> list[float]:
        """Accuracy of one way for all, in percent."""
        return [_percent(column) for column in self.correct_at.unbind(1)]

    @property
    def mean_macs(self) -> float:
        """Multiply-adds an image, a mean of whole numbers in float64."""
        return float(self.macs.double().mean())

    @property
    def macs_left(self) -> float:
        """Share of the widest way's multiply-adds."""
        return self.mean_macs / float(self.macs_at[-1])

    @property
    def diversity(self) -> float:
        """Entropy of the choices in nat, mean over the gates; 0 is a collapse."""
        pairs = zip(self.choice.unbind(1), self.spaces, strict=True)
        return sum(entropy_of(column, count) for column, count in pairs) / len(self.spaces)

    @property
    def histogram(self) -> list[list[float]]:
        """Share of the images at every choice, a list for each gate."""
        pairs = zip(self.choice.unbind(1), self.spaces, strict=True)
        return [(column.bincount(minlength=count).double() / len(column)).tolist() for column, count in pairs]

    @property
    def oracle(self) -> float:
        """Accuracy of who knows for every image a way that is right, in percent."""
        return _percent(self.correct_at.any(1))

    @property
    def same_histogram(self) -> float | None:
        """Accuracy of widths dealt out blindly, as often as the gate does; None for several gates."""
        if len(self.spaces) > 1:
            return None
        return sum(share * top1 for share, top1 in zip(self.histogram[0], self.top1_at, strict=True))

    @property
    def static_mixture(self) -> float:
        """The most that widths dealt out blindly reach with as many multiply-adds on average, in percent."""
        points = list(zip(self.macs_at.tolist(), self.top1_at, strict=True))
        best = max((top1 for macs, top1 in points if macs <= self.mean_macs), default=-math.inf)
        for low, first in points:
            for high, second in points:
                if low <= self.mean_macs < high:
                    share = (self.mean_macs - low) / (high - low)
                    best = max(best, (1 - share) * first + share * second)
        return best if math.isfinite(best) else points[0][1]

    @property
    def wide_given_hard(self) -> float:
        """Share of the images the slimmest way gets wrong that the last gate sends to its widest."""
        return self._wide(~self.correct_at[:, 0])

    @property
    def wide_given_easy(self) -> float:
        """Share of the images the slimmest way gets right that the last gate sends to its widest."""
        return self._wide(self.correct_at[:, 0])

    def _wide(self, rows: Tensor) -> float:
        wide = self.choice[rows, -1] == self.spaces[-1] - 1
        return float(wide.double().mean()) if len(wide) else math.nan

    def plain(self) -> dict[str, Any]:
        """Plain data for a result file."""
        return {
            "top1": self.top1,
            "macs": self.mean_macs,
            "macs_left": self.macs_left,
            "gate_diversity": self.diversity,
            "histogram": self.histogram,
            "static_mixture": self.static_mixture,
            "same_histogram": self.same_histogram,
            "oracle": self.oracle,
            "wide_given_hard": _number(self.wide_given_hard),
            "wide_given_easy": _number(self.wide_given_easy),
            "top1_at": self.top1_at,
            "macs_at": self.macs_at.tolist(),
        }


@torch.no_grad()
def evaluate_routing(net: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], costs: Tensor) -> Routing:
    """Run a network with gates dynamically, each image's channels alone, and at every width for all; in eval mode.

    Args:
        net: see `effkern.dsnet.Routed`.
        batches: ``(x, labels)``.
        costs: of the ways, from `effkern.dsnet.route_costs`.

    Raises:
        ValueError: if there is no image.
    """
    model = routed(net)
    modes = [(module, module.training) for module in net.modules()]
    if any(training for _, training in modes):
        net.eval()
    gates, ways = model.gates, uniform_routes(model)
    widths = [[gate.space[i] for gate, i in zip(gates, way, strict=True)] for way in ways]
    choices, right, right_at = [], [], []
    try:
        for x, y in batches:
            scores, choice = model.route(x)
            choices.append(choice)
            right.append(scores.argmax(1) == y)
            begin = gates[0](model.segment(0, x, 0), 0)
            right_at.append(torch.stack([finish(model, begin, one).argmax(1) == y for one in widths], 1))
    finally:
        for module, training in modes:
            module.training = training
    if not choices:
        raise ValueError("batches: must hold at least one image, got none")
    choice = torch.cat(choices)
    return Routing(
        choice,
        torch.cat(right),
        torch.cat(right_at),
        costs[choice.cpu().unbind(1)],
        torch.stack([costs[way] for way in ways]),
        [len(gate.space) for gate in gates],
    )


def _percent(correct: Tensor) -> float:
    return 100 * float(correct.double().mean())


def _number(value: float) -> float | None:
    return None if math.isnan(value) else value
