"""Block skipping: single blocks and whole bodies of CIFAR ResNets, over keep ratios, against what PyTorch can do.

Masks are new at every call, drawn from a pool, with the exact share of kept blocks; all contenders see the same ones in
the same order. The peers have batch norm folded into their convolutions, as we have.

    masked     every block for every sample, then a choice by mask: how such networks are usually run
    gathered   index_select the kept samples, run the block, index_copy them back
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain, cycle, repeat

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.common import Bench, main, rounding
from benchmarks.networks import calibrated
from effkern.models import create_model
from effkern.models.resnet import ResNet
from effkern.nn import freeze_packs, skip_form
from effkern.nn.residual import ResidualBlock, fold_bn
from effkern.ops import pack_conv_weight, skip_basic_block
from effkern.ops.block_skip import reference

KEEPS = (0.0, 0.25, 0.5, 0.75, 1.0)
MASKS = 16  # drawn beforehand, taken in turn
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
Folded = list[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Shape:
    """Basic blocks of one stage: ``channels`` at ``size`` x ``size``."""

    channels: int
    size: int

    @property
    def name(self) -> str:
        return f"{self.channels}@{self.size}"

    @property
    def macs(self) -> int:
        """Multiply-adds of one block for one sample."""
        return 2 * 9 * self.channels**2 * self.size**2


BLOCKS = (Shape(16, 32), Shape(32, 16), Shape(64, 8))
BODIES = (("resnet110", KEEPS), ("resnet32", (0.5, 1.0)))
QUICK_BODIES = (("resnet20", (0.5,)),)


def draw(keep: float, samples: int, blocks: int) -> list[Tensor]:
    """Masks ``[samples, blocks]`` that each keep exactly the nearest share of all their entries."""
    total = samples * blocks
    kept = round(keep * total)
    return [(torch.rand(total).argsort() < kept).view(samples, blocks) for _ in range(MASKS)]


def in_turn(function: Callable[[Tensor], Tensor], masks: Sequence[Tensor]) -> Callable[[], Tensor]:
    """A call without arguments that takes the next mask each time."""
    turn = cycle(masks)
    return lambda: function(next(turn))


def masked(x: Tensor, keep: Tensor, block: Folded, stride: int, shortcut: Tensor) -> Tensor:
    """The block for every sample, then the choice."""
    (w1, b1), (w2, b2) = block
    y = F.conv2d(F.relu_(F.conv2d(x, w1, b1, stride, 1)), w2, b2, 1, 1)
    return torch.where(keep.view(-1, 1, 1, 1), F.relu_(y.add_(shortcut)), shortcut)


def gathered(x: Tensor, keep: Tensor, block: Folded, stride: int, shortcut: Tensor) -> Tensor:
    """The block for the kept samples, copied out and back."""
    rows = keep.nonzero().flatten()
    if rows.numel() == 0:
        return shortcut
    (w1, b1), (w2, b2) = block
    y = F.conv2d(F.relu_(F.conv2d(x.index_select(0, rows), w1, b1, stride, 1)), w2, b2, 1, 1)
    return shortcut.index_copy(0, rows, F.relu_(y.add_(shortcut.index_select(0, rows))))


def all_kept(function: Callable[[Tensor], Tensor], first: Tensor) -> Callable[[], Tensor]:
    """The same call with every block kept, what ``time_left`` divides by; the first call, the check, takes
    ``first``."""
    turn = chain([first], repeat(torch.ones_like(first)))
    return lambda: function(next(turn))


PEERS: dict[str, Callable[..., Tensor]] = {"masked": masked, "gathered": gathered}


def bench_block(bench: Bench, shape: Shape, samples: int, keep: float) -> None:
    """One identity block of a CIFAR ResNet."""
    if not bench.wants_case("skip_basic_block", f"{shape.name}, keep {keep:.2f}"):
        return
    c = shape.channels
    weights = [torch.randn(c, c, 3, 3) / (9 * c) ** 0.5 for _ in range(2)]
    biases = [torch.randn(c) for _ in range(2)]
    x = torch.randn(samples, c, shape.size, shape.size).to(memory_format=torch.channels_last)
    masks = [m[:, 0] for m in draw(keep, samples, 1)]
    handles = [pack_conv_weight(w) for w in weights]

    def ours(mask: Tensor) -> Tensor:
        return skip_basic_block(x, mask, handles[0], biases[0], handles[1], biases[1])

    contenders = {"effkern": in_turn(ours, masks), "effkern, all": all_kept(ours, masks[0])}
    for layout, memory_format in LAYOUTS.items():
        block = [(w.to(memory_format=memory_format), b) for w, b in zip(weights, biases, strict=True)]
        laid = x.to(memory_format=memory_format)
        for name, peer in PEERS.items():
            if bench.wants(name):
                call = in_turn(lambda m, run=peer, at=laid, with_=block: run(at, m, with_, 1, at), masks)
                contenders[f"{name}_{layout}"] = call
    double = [t.double() for t in (x, weights[0], biases[0], weights[1], biases[1])]
    exact = reference.skip_basic_block(double[0], masks[0], *double[1:], 1, None, "relu", "auto")
    positive = [t.abs() for t in double]
    size = reference.skip_basic_block(positive[0], torch.ones(samples), *positive[1:], 1, None, "none", "auto")
    compare(
        bench, "skip_basic_block", shape.name, keep, contenders, exact, 2 * rounding(size), samples, shape.macs, masks
    )


def bench_body(bench: Bench, name: str, samples: int, keep: float) -> None:
    """All blocks of a network, shortcuts included, stem and classifier left out."""
    if not bench.wants_case("skip_stage", f"{name} body, keep {keep:.2f}"):
        return
    net = calibrated(create_model(name, shortcut="pool"), torch.randn(16, 3, 32, 32))
    assert isinstance(net, ResNet)
    skip = freeze_packs(skip_form(net).to(memory_format=torch.channels_last))  # as the peers' weights are folded once
    assert isinstance(skip, ResNet)
    x = torch.randn(samples, 16, 32, 32).to(memory_format=torch.channels_last)
    masks = draw(keep, samples, net.num_blocks)
    contenders = {
        "effkern": in_turn(lambda m: skip.body(x, m), masks),
        "effkern, all": all_kept(lambda m: skip.body(x, m), masks[0]),
    }
    for layout, memory_format in LAYOUTS.items():
        blocks = [folded(block, memory_format) for block in net.blocks()]
        laid = x.to(memory_format=memory_format)
        for peer_name, peer in PEERS.items():
            if bench.wants(peer_name):
                contenders[f"{peer_name}_{layout}"] = in_turn(
                    lambda m, run=peer, at=laid, body=blocks: through(run, at, m, net.blocks(), body), masks
                )
    double = [[(w.double(), b.double()) for w, b in folded(block, torch.contiguous_format)] for block in net.blocks()]
    exact = through(masked, x.double(), masks[0], net.blocks(), double)
    # A chain of up to 108 convolutions: 1e-4 of the largest value is far above rounding and far below a mistake.
    allowed = 1e-4 * exact.abs().max()
    _, each = net.block_macs((3, 32, 32))
    macs = sum(each) / len(each)
    compare(bench, "skip_stage", f"{name} body", keep, contenders, exact, allowed, samples, macs, masks, each)


def through(
    run: Callable[..., Tensor], x: Tensor, keep: Tensor, blocks: Sequence[ResidualBlock], weights: Sequence[Folded]
) -> Tensor:
    """A body made of one peer's blocks."""
    for k, (block, folded_block) in enumerate(zip(blocks, weights, strict=True)):
        x = run(x, keep[:, k], folded_block, block.stride, block.shortcut(x))
    return x


def folded(block: ResidualBlock, memory_format: torch.memory_format) -> Folded:
    """The convolutions of a block with batch norm folded in."""
    pairs = [fold_bn(conv, bn) for conv, bn in block.layers()]
    return [(w.float().to(memory_format=memory_format), b.float()) for w, b in pairs]


def compare(
    bench: Bench,
    op: str,
    name: str,
    keep: float,
    contenders: dict[str, Callable[[], Tensor]],
    exact: Tensor,
    allowed: Tensor,
    samples: int,
    macs: float,
    masks: Sequence[Tensor],
    each: Sequence[float] = (),
) -> None:
    """One contest. ``each``: multiply-adds of every block where they differ."""
    blocks = masks[0].shape[1] if masks[0].dim() == 2 else 1
    counts = torch.stack(list(masks)).double().mean(0).view(samples, blocks)
    done = float((counts * torch.tensor(each or [macs] * blocks, dtype=torch.float64)).sum())
    bench.compare(
        op=op,
        case=f"{name}, keep {keep:.2f}",
        contenders=contenders,
        batch=samples,
        exact=exact,
        allowed=allowed,
        macs=macs * blocks * samples,
        macs_done=done,
        dense="effkern, all",
        keep=keep,
    )


def run(bench: Bench) -> None:
    """All shapes, batches and keep ratios."""
    for name, keeps in bench.choose(BODIES, quick=QUICK_BODIES):
        for samples in bench.choose((1, 64), quick=(2,)):
            for keep in keeps:
                bench_body(bench, name, samples, keep)
    for shape in bench.choose(BLOCKS, quick=BLOCKS[2:]):
        for samples in bench.choose((1, 64), quick=(8,)):
            for keep in bench.choose(KEEPS if samples > 1 else (0.0, 1.0), quick=(0.0, 0.5)):
                bench_block(bench, shape, samples, keep)


if __name__ == "__main__":
    main("block_skip", run, seconds=3)
