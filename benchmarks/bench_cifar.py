"""Whole CIFAR ResNets, dense, through ``effkern.optimize`` against every engine. Their shortcuts pool and pad."""

from __future__ import annotations

import torch

from benchmarks.bench_networks import bench_network, bench_scaling
from benchmarks.common import Bench, main
from benchmarks.networks import Network
from benchmarks.peers import TORCH

POOL = (("shortcut", "pool"),)
NETWORKS = (Network("resnet32", 32, POOL), Network("resnet110", 32, POOL))
QUICK = (Network("resnet20", 8, (*POOL, ("blocks", (1, 1, 1)))),)


def run(bench: Bench) -> None:
    """Both networks at batch 1 and 64."""
    for network in bench.choose(NETWORKS, QUICK):
        for batch in bench.choose((1, 64), quick=(2,)):
            bench_network(bench, "network", network, batch, judged=TORCH)
            torch._dynamo.reset()
            if bench.threads == 1:
                bench_scaling(bench, "scaling", network, batch)


if __name__ == "__main__":
    main("cifar", run, threads=(1, 2), seconds=10)
