"""The clock: calls of several contenders interleaved, so that a change in the machine's load meets all alike."""

from __future__ import annotations

import importlib
import math
import statistics
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from effkern.training.latency import no_garbage_collection

#: A call longer than this is warmed up by nothing before it is timed: it fills its caches in a small part of its time.
LONG_CALL = 0.02
#: Enough for a median and a minimum; more rounds than this only cost time.
MOST_ROUNDS = 60
#: After this many rounds a contender slower than `HOPELESS` times the fastest peer has shown that it is not the best.
TRIAL_ROUNDS = 3
HOPELESS = 2.0


@dataclass(frozen=True)
class Contender:
    """A call to time, and how to read its result as a tensor where that is no part of the work.

    Args:
        call: runs once and returns its engine's own output.
        read: makes a tensor of that output, outside of the clock.
        threads: threads of torch during this call, where they are not the run's.
    """

    call: Callable[[], Any]
    read: Callable[[Any], Any] = lambda out: out
    threads: int | None = None

    def __call__(self) -> Any:
        """The result, readable."""
        return self.read(self.call())


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
    contenders: Mapping[str, Callable[[], Any]],
    seconds: float = 4.0,
    rounds: int = 9,
    slice_s: float = 2e-3,
    judged: Collection[str] = (),
) -> dict[str, Timing]:
    """Time every contender in turn, round after round, starting each round one contender later.

    Before each slice the contender runs once off the clock (or, if one call is long, the machine rests a moment): the
    caches are its own then, and the threads with which the one before it waits for more work have gone to sleep.

    Args:
        contenders: name to a callable without arguments; each has been called before.
        seconds: time for all of them together; at least ``rounds`` rounds are run whatever it costs.
        rounds: least number of rounds.
        slice_s: a round calls a contender until about this long has passed, so that reading the clock is not
            what is measured.
        judged: contenders that are timed in every round. If the time is too short for many rounds, the others leave
            after `TRIAL_ROUNDS` when they need more than `HOPELESS` times what the fastest of them needs.
    """
    run = {name: c.call if isinstance(c, Contender) else c for name, c in contenders.items()}
    threads = {name: c.threads for name, c in contenders.items() if isinstance(c, Contender) and c.threads}
    usual = torch.get_num_threads()

    def turn_of(name: str, times: int, long: bool) -> float:
        if name in threads:
            torch.set_num_threads(threads[name])
        if long:
            time.sleep(5e-3)
        else:
            run[name]()
        spent = _clock(run[name], times)
        if name in threads:
            torch.set_num_threads(usual)
        return spent

    with no_garbage_collection():
        once = {name: turn_of(name, 1, False) for name in run}
        once = {name: t if t > LONG_CALL else min(t, turn_of(name, 2, False)) for name, t in once.items()}
        calls = {name: max(1, math.ceil(slice_s / max(t, 1e-7))) for name, t in once.items()}
        names = list(run)
        spent: dict[str, list[float]] = {name: [] for name in names}
        short_of_time = sum(once.values()) * MOST_ROUNDS / 2 > seconds
        start, turn = time.perf_counter(), 0
        while turn < rounds or (turn < MOST_ROUNDS and time.perf_counter() - start < seconds):
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                spent[name].append(turn_of(name, calls[name], once[name] > LONG_CALL))
            turn += 1
            if turn == TRIAL_ROUNDS and judged and short_of_time:
                best = min((min(spent[name]) for name in names if name not in judged), default=0.0)
                names = [name for name in names if name in judged or min(spent[name]) <= HOPELESS * best]
    return {name: Timing.of(times, calls[name]) for name, times in spent.items()}


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
