"""What networks with gates have in common: segments of one width each, a gate between two of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar, cast

import torch
from torch import Tensor, nn

from effkern.models._by_width import by_width
from effkern.nn.gate import DoubleHeadedGate

T = TypeVar("T")
#: Channels of a stage that all images share; a pair is its narrow form and the one of the largest network alone.
Front = Sequence[tuple[int | Sequence[int], int, int]]
#: Channels of a stage in every configuration, its blocks, its stride.
Stages = Sequence[tuple[Sequence[int], int, int]]

#: A block and its output channels, of every configuration.
Made = tuple[nn.Module, Sequence[int]]


class GatedNet(nn.Module):
    """A slimmable network cut into segments 0 to G by G gates.

    The part in front of the first gate always runs at the first width; behind a gate an image runs at the width that
    gate gave it. There is no state: a width comes with every call.

    Attributes:
        num_widths: Number of configurations that `forward` takes.
        blocks: All blocks in order. A gate is the ``attention`` of the first block of its stage.
    """

    num_widths: int
    blocks: nn.ModuleList

    def _add_blocks(
        self,
        c_in: Sequence[int],
        stages: Sequence[tuple[Sequence[int], int, int]],
        routed: Mapping[int, Sequence[int]],
        block: Callable[[Sequence[int], Sequence[int], int, Sequence[int] | None], Made],
    ) -> Sequence[int]:
        """Make ``blocks``, and return the channels they end with.

        Args:
            c_in: Channels in front, of every configuration.
            stages: Channels of every configuration, blocks, stride of the first one.
            routed: Stage (counted from 0) to the space of the gate it begins with.
            block: From input channels, the stage's channels, stride and space a block and its output channels.
        """
        self.blocks, self._gated = nn.ModuleList(), []
        for i, (channels, count, stride) in enumerate(stages):
            if i in routed:
                self._gated.append(len(self.blocks))
            for k in range(count):
                made, c_in = block(c_in, channels, stride if k == 0 else 1, routed.get(i) if k == 0 else None)
                self.blocks.append(made)
        return c_in

    def _ends(self, k: int) -> tuple[int, int]:
        """The blocks that hold the gates in front of and behind segment ``k``; -1 and their number where none is."""
        begin, end = [-1, *self._gated, len(self.blocks)][k : k + 2]
        return begin, end

    @property
    def gates(self) -> list[DoubleHeadedGate]:
        """The gates in forward order."""
        return [cast(DoubleHeadedGate, self.blocks[i].attention) for i in self._gated]

    def segment(self, k: int, x: Tensor, width: int | Tensor, in_width: int | Tensor | None = None) -> Tensor:
        """Segment ``k`` at ``width``; the first begins with images, the last ends with scores.

        Args:
            k: 0 to G.
            x: What the segment before gave and gate ``k - 1`` attended.
            width: An index, one a sample ``[N]`` (eval mode), or weights of widths, floats ``[N, M]`` (eval mode).
            in_width: That of ``x``, if it is another one.
        """
        raise NotImplementedError

    def forward(self, x: Tensor, width: int | Tensor = -1) -> Tensor:
        """Scores at ``width``, an index or one a sample, in front of the gates too."""
        return by_width(self, self._scores, x, width)

    def _scores(self, x: Tensor, width: int | Tensor) -> Tensor:
        for k, gate in enumerate(self.gates):
            x = gate(self.segment(k, x, width), width)
        return self.segment(len(self.gates), x, width)

    def dynamic(self, x: Tensor) -> Tensor:
        """Scores, every image at the widths the gates choose for it; deterministic in every mode but dropout."""
        return self.route(x)[0]

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Scores and the choices of the gates, int64 ``[N, G]``: positions in their spaces."""
        width: int | Tensor = 0
        choices = []
        x = self.segment(0, x, width)
        for k, gate in enumerate(self.gates):
            x, logits = gate.decide(x, width)
            choice = gate.choose(logits)
            choices.append(choice)
            before, width = width, torch.tensor(gate.space, device=choice.device)[choice]
            x = self._after(k + 1, x, width, before)
        return x, torch.stack(choices, 1)

    def _after(self, k: int, x: Tensor, width: Tensor, before: int | Tensor) -> Tensor:
        if isinstance(before, Tensor):
            return self.segment(k, x, width, before)
        return by_width(self, lambda part, own: self.segment(k, part, own, before), x, width)


def configurations(front: Front, stages: Stages) -> tuple[list[tuple[list[int], int, int]], int]:
    """Every stage with its channels in every configuration, and how many configurations there are.

    With a pair in ``front`` there is one more than ``stages`` list: the largest, of the wide forms.

    Raises:
        ValueError: if the stages list different numbers of widths, or there is none.
    """
    counts = {len(channels) for channels, _, _ in stages}
    if len(counts) != 1 or 0 in counts:
        raise ValueError(f"stages must each list as many widths, got {[len(c) for c, _, _ in stages]}")
    count = counts.pop()
    pairs = [(c, c) if isinstance(c, int) else tuple(c) for c, _, _ in front]
    largest = any(narrow != wide for narrow, wide in pairs)
    result = [
        ([narrow] * count + [wide] * largest, blocks, stride)
        for (narrow, wide), (_, blocks, stride) in zip(pairs, front, strict=True)
    ]
    result += [([*many, *list(many)[-1:] * largest], blocks, stride) for many, blocks, stride in stages]
    return result, count + largest


def spaces(space: Sequence[int] | Sequence[Sequence[int]], gates: int) -> list[Sequence[int]]:
    """The routing space of every gate, from one for all or one a gate."""
    if space and isinstance(space[0], int):
        return [space] * gates  # type: ignore[list-item]
    if len(space) != gates:
        raise ValueError(f"space must be a list of width indices, or one for each of {gates} gates, got {space}")
    return list(space)  # type: ignore[arg-type]


def gated_stages(gated: Sequence[int], front: int, stages: int) -> list[int]:
    """Numbers of the stages, counted from the first, whose first block has a gate.

    Raises:
        ValueError: if one is not there, or they are not ascending.
    """
    if list(gated) != sorted(set(gated)) or not all(0 <= stage < stages for stage in gated):
        raise ValueError(f"gated must be ascending numbers of stages in [0, {stages - 1}], got {list(gated)}")
    return [front + stage for stage in gated]
