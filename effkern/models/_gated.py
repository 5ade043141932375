"""What networks with gates have in common: segments of one width each, a gate between two of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal, TypeVar, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from effkern.models._by_width import by_width
from effkern.nn._widths import is_mixed, width_index
from effkern.nn.gate import DoubleHeadedGate
from effkern.nn.switchable_bn import SwitchableBatchNorm2d

T = TypeVar("T")
Statistics = Literal["width", "way"]
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

    Batch norm behind a second gate sees other inputs on every way there. With statistics ``"way"`` the layers of a
    segment have a configuration for each of its widths and each one of the segment before, with the channels of the
    width and statistics of their own; `configuration` says which. With ``"width"`` ways of one width share them.

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
        statistics: Statistics,
        block: Callable[[Sequence[int], Sequence[int], int, Sequence[int] | None], Made],
    ) -> Sequence[int]:
        """Make ``blocks``, and return the channels they end with.

        Args:
            c_in: Channels in front, of every configuration.
            stages: Channels of every configuration, blocks, stride of the first one.
            routed: Stage (counted from 0) to the space of the gate it begins with.
            statistics: Whose batch norm has its own.
            block: From input channels, the stage's channels, stride and space a block and its output channels.
        """
        if statistics not in get_args(Statistics):
            raise ValueError(f"statistics must be one of {', '.join(get_args(Statistics))}, got {statistics!r}")
        self.blocks = nn.ModuleList()
        self._gated: list[int] = []
        self._configurations = [self.num_widths]  # of each segment
        for i, (channels, count, stride) in enumerate(stages):
            if i in routed:
                ways = self._configurations[-1] if self._gated and statistics == "way" else 1
                self._configurations.append(self.num_widths * ways)
                self._gated.append(len(self.blocks))
            ways = self._configurations[-1] // self.num_widths
            channels = [c for c in channels for _ in range(ways)]
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

    def configuration(self, k: int, width: int | Tensor, before: int | Tensor) -> int | Tensor:
        """What segment ``k`` is run at for an image to go on at ``width``.

        Args:
            k: 1 to G.
            width: An index, one a sample ``[N]``, or weights of widths, floats ``[N, M]``.
            before: What the segment before was run at.
        """
        count, ways = self._configurations[k - 1], self._configurations[k] // self.num_widths
        if ways == 1:
            return width
        if is_mixed(width):
            if not is_mixed(before):
                before = F.one_hot(torch.as_tensor(before, device=width.device), count).expand(len(width), -1)
            both = width[:, :, None] * F.pad(before, (0, count - before.size(1)))[:, None]
            return both.flatten(1)
        return (width if isinstance(width, Tensor) else width_index(width, (0,) * self.num_widths)) * ways + before

    def segment(self, k: int, x: Tensor, width: int | Tensor, in_width: int | Tensor | None = None) -> Tensor:
        """Segment ``k`` at ``width``; the first begins with images, the last ends with scores.

        Args:
            k: 0 to G.
            x: What the segment before gave and gate ``k - 1`` attended.
            width: From `configuration`: an index, one a sample ``[N]`` (eval mode), or weights of widths, floats
                ``[N, M]`` (eval mode).
            in_width: That of ``x``, if it is another one.
        """
        raise NotImplementedError

    def forward(self, x: Tensor, width: int | Tensor = -1) -> Tensor:
        """Scores at ``width``, an index or one a sample, in front of the gates too."""
        return by_width(self, self._scores, x, width)

    def _scores(self, x: Tensor, width: int | Tensor) -> Tensor:
        x, at = self.segment(0, x, width), width
        for k, gate in enumerate(self.gates):
            x, before = gate(x, at), at
            at = self.configuration(k + 1, width, before)
            x = self.segment(k + 1, x, at, before)
        return x

    def along(self, x: Tensor, way: Sequence[int]) -> Tensor:
        """Scores, all images at the widths ``way``, one a gate; in front of the gates at the first width."""
        at: int | Tensor = 0
        x = self.segment(0, x, at)
        for k, (gate, width) in enumerate(zip(self.gates, way, strict=True)):
            x, before = gate(x, at), at
            at = self.configuration(k + 1, width, before)
            x = self.segment(k + 1, x, at, before)
        return x

    @torch.no_grad()
    def share_statistics(self) -> None:
        """Give every way that no batch has gone the statistics of the way that has its last width everywhere."""
        even = list(range(self.num_widths))
        for k, count in enumerate(self._configurations):
            if k:
                even = [int(self.configuration(k, width, even[width])) for width in range(self.num_widths)]
            if count == self.num_widths:
                continue
            for norm in self.modules():
                if isinstance(norm, SwitchableBatchNorm2d) and len(norm.widths) == count:
                    source = torch.tensor(even, device=norm.running_mean.device).repeat_interleave(
                        count // self.num_widths
                    )
                    source = torch.where(norm.num_batches_tracked == 0, source, torch.arange(count).to(source))
                    for table in (norm.running_mean, norm.running_var, norm.num_batches_tracked):
                        table.copy_(table[source])

    def dynamic(self, x: Tensor) -> Tensor:
        """Scores, every image at the widths the gates choose for it; deterministic in every mode but dropout."""
        return self.route(x)[0]

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Scores and the choices of the gates, int64 ``[N, G]``: positions in their spaces."""
        width: int | Tensor = 0
        choices, pixels = [], x.shape[-1] * x.shape[-2]
        x = self.segment(0, x, width)
        for k, gate in enumerate(self.gates):
            x, logits = gate.decide(x, width)
            choice = gate.choose(logits)
            choices.append(choice)
            before, chosen = width, torch.tensor(gate.space, device=choice.device)[choice]
            width = self.configuration(k + 1, chosen, before)
            x = self._after(k + 1, x, width, before, pixels)
        return x, torch.stack(choices, 1)

    def _after(self, k: int, x: Tensor, width: int | Tensor, before: int | Tensor, pixels: int) -> Tensor:
        # In front of another gate every sample's map has all channels, whatever its width.
        if isinstance(before, Tensor) or k < len(self.gates):
            return self.segment(k, x, width, before)
        return by_width(self, lambda part, own: self.segment(k, part, own, before), x, width, pixels)


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
