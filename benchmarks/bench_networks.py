"""Whole ImageNet networks through ``effkern.optimize`` against every engine, and how they scale from one thread to two.

RepVGG is deployed: its branches are folded for all. The peers are given all networks with batch norm folded, in plain
operators; ours is given what a user has.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import effkern
from benchmarks.common import Bench, main
from benchmarks.networks import Network, for_peers, macs
from benchmarks.peers import EAGER, module_peers
from benchmarks.timing import Contender

NETWORKS = (
    (Network("repvgg_a0", 224), (1, 8)),
    (Network("repvgg_b1", 224), (1,)),
    (Network("resnet50", 224), (1, 8)),
    (Network("mobilenet_v2", 224), (1, 8)),
)
QUICK = ((Network("repvgg_small", 28, channels=1), (2,)),)
#: Of the largest output: far above the rounding of a hundred layers, far below a mistake.
ALLOWED = 1e-4
#: MNN's Winograd tiles are large and lose digits in a deep network; it is a peer all the same.
PEER_ERROR = 2e-2


def optimized(bench: Bench, net: nn.Module, x: Tensor) -> nn.Module | None:
    """``net`` on effkern; None, noted as missing, where this version cannot."""
    optimize: Callable[..., nn.Module] | None = getattr(effkern, "optimize", None)
    if optimize is None:
        bench.missing["effkern"] = "this version has no effkern.optimize"
        return None
    return optimize(copy.deepcopy(net), x)


def bench_network(bench: Bench, op: str, network: Network, batch: int, judged: tuple[str, ...] = ()) -> None:
    """One network, all contenders."""
    if not bench.wants_case(op, network.name):
        return
    net, x = network.build(), network.images(batch)
    ours, plain = optimized(bench, net, x), for_peers(net)
    contenders: dict[str, Callable[[], Any]] = {} if ours is None else {"effkern": lambda: ours(x)}
    contenders.update(module_peers(bench, plain, x))
    exact = copy.deepcopy(plain).double()(x.double())
    bench.compare(
        op=op,
        case=network.name,
        batch=batch,
        layout="contiguous",
        contenders=contenders,
        exact=exact,
        allowed=ALLOWED * float(exact.abs().max()),
        peer_error=PEER_ERROR,
        macs=macs(plain, x),
        judged=judged,
        size=network.size,
    )


def bench_scaling(bench: Bench, op: str, network: Network, batch: int) -> None:
    """Our form of one network with one and with two threads, in turn."""
    if not bench.wants_case(op, network.name):
        return
    net, x = network.build(), network.images(batch)
    ours = optimized(bench, net, x)
    if ours is None:
        return
    names = {1: "effkern", 2: "effkern, 2 threads"}
    contenders = {name: Contender(lambda: ours(x), threads=threads) for threads, name in names.items()}
    options = {"layout": "contiguous", "macs": macs(net, x), "seconds": bench.seconds / 3}
    bench.compare(op=op, case=network.name, batch=batch, contenders=contenders, **options)


def run(bench: Bench) -> None:
    """All networks; the scaling once, beside the runs of one thread."""
    for network, batches in bench.choose(NETWORKS, QUICK):
        for batch in batches:
            judged = EAGER if network.name == "repvgg_a0" else ()
            bench_network(bench, "network", network, batch, judged)
            torch._dynamo.reset()
            if bench.threads == 1:
                bench_scaling(bench, "scaling", network, batch)


if __name__ == "__main__":
    main("networks", run, threads=(1, 2), seconds=12)
