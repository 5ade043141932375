"""Whole slimmable supernets, DS-Net's MobileNetV1 and a four-width MobileNetV1: mixed widths, each width, raggedness.

Mixed: every sample of a batch has its own width. The peer is a torch loop over the width classes: gather the samples of
a class, run the narrow network (batch norm folded) on them, scatter the scores.

Width by width: ``effkern, all`` is the whole supernet, the denominator of "time left".

Ragged: ``effkern`` runs the mixed batch, ``effkern, classes`` its classes one after the other, gathered beforehand.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.common import Bench, main
from benchmarks.networks import macs
from benchmarks.timing import Contender
from effkern.models import create_model
from effkern.models.ds_mobilenet import ChannelAttention, DSMobileNet, SeparableBlock
from effkern.models.mobilenet import SlimmableMobileNetV1
from effkern.nn import SlicedConvBNAct

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
NETWORKS = ("ds_mobilenet", "mobilenet_v1_slimmable")
#: Of the largest score: far above the rounding of thirty layers, far below a mistake.
ALLOWED = 1e-4


class Attention(nn.Module):
    """`ChannelAttention` at one width."""

    def __init__(self, whole: ChannelAttention, width: int) -> None:
        super().__init__()
        self.reduce, self.expand = whole.reduce.narrow(width), whole.expand.narrow(width)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.expand(F.relu_(self.reduce(x.mean((2, 3))))).sigmoid()
        return x * gate[:, :, None, None]


class Scores(nn.Module):
    """Average pool and classifier."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.mean((2, 3)))


def narrow(net: nn.Module, width: int) -> nn.Module:
    """The supernet at one width as an ordinary network of PyTorch."""
    if isinstance(net, SlimmableMobileNetV1):
        layers = [cast(SlicedConvBNAct, layer).narrow(width) for layer in net.features]
        return nn.Sequential(*layers, Scores(net.classifier.narrow(width))).eval()
    assert isinstance(net, DSMobileNet)
    parts: list[nn.Module] = [net.stem.narrow(width)]
    for block in net.blocks:
        assert isinstance(block, SeparableBlock)
        parts += [block.depthwise.narrow(width), Attention(block.attention, width), block.pointwise.narrow(width)]
    return nn.Sequential(*parts, Scores(net.classifier.narrow(width))).eval()


def build(name: str) -> tuple[nn.Module, int]:
    """A supernet ready to run, folded and packed, and the number of its widths."""
    net = create_model(name).eval()
    for module in net.modules():
        if isinstance(module, SlicedConvBNAct):
            module.fold()
    return net, getattr(net, "num_widths", None) or len(cast(SlimmableMobileNetV1, net).width_mults)


def draw(widths: int, samples: int) -> Tensor:
    """Every width as often as every other, as far as whole samples allow, in random order."""
    return (torch.arange(samples) % widths)[torch.randperm(samples)]


def loop(x: Tensor, rows: Sequence[Tensor], nets: Sequence[nn.Module]) -> Tensor:
    """Each class of samples through its own network."""
    y = None
    for members, net in zip(rows, nets, strict=True):
        part = net(x.index_select(0, members))
        y = x.new_empty(len(x), part.shape[1]) if y is None else y
        y.index_copy_(0, members, part)
    assert y is not None
    return y


def bench_mixed(bench: Bench, name: str, samples: int, size: int) -> None:
    """A width a sample, against the loop and against our own uniform runs."""
    if not (bench.wants_case("mixed", name) or bench.wants_case("ragged", name)):
        return
    net, widths = build(name)
    # DS-Net's gate chooses among the fourteen dynamic widths; the fifteenth, the largest network, is a teacher.
    index = draw(14 if widths == 15 else widths, samples)
    x = torch.randn(samples, 3, size, size).to(memory_format=torch.channels_last)
    classes = index.unique().tolist()
    rows = [(index == width).nonzero().flatten() for width in classes]
    narrowed = [narrow(net, width) for width in classes]
    exact = loop(x.double(), rows, [net.double() for net in (narrow(net, width) for width in classes)])
    done = sum(macs(one, x[members]) for one, members in zip(narrowed, rows, strict=True))
    options: dict[str, Any] = {"case": name, "batch": samples, "exact": exact, "macs": done, "widths": len(classes)}
    options["allowed"] = ALLOWED * float(exact.abs().max())
    contenders: dict[str, Callable[[], Any]] = {"effkern": lambda: net(x, index)}
    for key, layout in LAYOUTS.items():
        laid, nets = (
            x.contiguous(memory_format=layout),
            [one.to(memory_format=layout) for one in copy.deepcopy(narrowed)],
        )
        contenders[f"loop_{key}"] = partial(loop, laid, rows, nets)
    bench.compare(op="mixed", contenders=contenders, **options)
    parts = [x.index_select(0, members).contiguous(memory_format=torch.channels_last) for members in rows]

    def apart() -> list[Tensor]:
        return [net(part, width) for part, width in zip(parts, classes, strict=True)]

    order = torch.cat(rows).argsort()
    each = Contender(apart, lambda outs: torch.cat(outs)[order])
    bench.compare(op="ragged", contenders={"effkern": contenders["effkern"], "effkern, classes": each}, **options)


def bench_width(bench: Bench, name: str, net: nn.Module, width: int, whole: float, x: Tensor) -> None:
    """The batch at one width, against the whole supernet."""
    plain = narrow(net, width)
    first = iter([width])  # the check is of the narrow network; then the clock runs the whole one
    bench.compare(
        op="width",
        case=f"{name} width {width}",
        batch=len(x),
        contenders={
            "effkern": lambda: net(x, width),
            "effkern, all": Contender(lambda: net(x, next(first, -1))),
        },
        exact=plain.double()(x.double()),
        allowed=ALLOWED * 10,
        macs=whole,
        macs_done=macs(plain.float(), x),
        dense="effkern, all",
        seconds=bench.seconds / 2,
        network=name,
        width=width,
    )


def bench_widths(bench: Bench, name: str, samples: int, size: int) -> None:
    """Every width of a supernet, the largest too."""
    if not bench.wants_case("width", name):
        return
    net, widths = build(name)
    x = torch.randn(samples, 3, size, size).to(memory_format=torch.channels_last)
    whole = macs(narrow(net, widths - 1), x)
    for width in bench.choose(range(widths), quick=(1,)):
        bench_width(bench, name, net, width, whole, x)


def run(bench: Bench) -> None:
    """Both supernets."""
    for name in bench.choose(NETWORKS, quick=NETWORKS[1:]):
        samples, size = bench.choose(((32, 224),), quick=((6, 32),))[0]
        bench_mixed(bench, name, samples, size)
        bench_widths(bench, name, min(samples, 8), size)


if __name__ == "__main__":
    main("supernet", run, seconds=8)
