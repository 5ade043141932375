"""The clock: calls of several contenders interleaved, so that a change in the machine's load meets all alike."""

from __future__ import annotations

import importlib
import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Timing:
    """Seconds per call over the rounds of one contest."""

    median: float
    minimum: float
    lower: float
    upper: float
    rounds: int
    calls: int

    @classmethod
    def of(cls, seconds: list[float], calls: int) -> Timing:
        """Summarise ``seconds`` per call, one entry a round of ``calls`` calls."""
        ordered = sorted(seconds)
        quarter = (len(ordered) - 1) / 4
        return cls(
            median=statistics.median(ordered),
            minimum=ordered[0],
            lower=ordered[math.floor(quarter)],
            upper=ordered[math.ceil(3 * quarter)],
            rounds=len(ordered),
            calls=calls,
        )


def interleave(
    contenders: Mapping[str, Callable[[], Any]], seconds: float = 1.0, rounds: int = 9, slice_s: float = 2e-3
) -> dict[str, Timing]:
    """Time every contender in turn, round after round, starting each round one contender later.

    Args:
        contenders: name to a callable without arguments.
        seconds: time each contender is given in all; at least ``rounds`` rounds are run whatever it costs.
        rounds: least number of rounds.
        slice_s: a round calls a contender until about this long has passed, so that reading the clock is not
            what is measured.
    """
    calls = {}
    for name, call in contenders.items():
        call()  # the first call packs, compiles and allocates
        once = min(_clock(call, 1) for _ in range(3))
        calls[name] = max(1, math.ceil(slice_s / max(once, 1e-7)))
    names = list(contenders)
    spent: dict[str, list[float]] = {name: [] for name in names}
    start, turn = time.perf_counter(), 0
    while turn < rounds or time.perf_counter() - start < seconds * len(names):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            spent[name].append(_clock(contenders[name], calls[name]))
        turn += 1
    return {name: Timing.of(spent[name], calls[name]) for name in names}


def _clock(call: Callable[[], Any], times: int) -> float:
    start = time.perf_counter()
    for _ in range(times):
        call()
    return (time.perf_counter() - start) / times


def fma_peak(seconds: float = 0.03) -> float:
    """GFLOP/s of float32 multiply-adds this process reaches right now with torch's current number of threads.

    One thread of nothing but independent multiply-adds, times the threads; without the host module the fastest of many
    512 x 512 matrix products, which run at 90 to 95 % of it. Unlike a data sheet both know the load of the machine.
    """
    try:
        host = importlib.import_module("effkern._host")
        return host.fma_peak(seconds) * torch.get_num_threads()
    except ImportError:
        pass
    n = 512
    a, b, out = torch.randn(n, n), torch.randn(n, n), torch.empty(n, n)
    best, end = math.inf, time.perf_counter() + seconds
    while time.perf_counter() < end:
        best = min(best, _clock(lambda: torch.mm(a, b, out=out), 1))
    return 2 * n**3 / best / 1e9
