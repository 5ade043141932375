"""Latency of several functions on one machine, measured side by side.

Shared machines change speed from second to second (frequency, neighbours). Peers are therefore never timed one after
another: every round calls each of them once, in alternating order, so that all see the same weather.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch

__all__ = ["Timing", "measure"]

MIN_REPS = 10  # below this a median says little and a minimum nothing


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one call: median and minimum over ``n`` calls."""

    median_ms: float
    min_ms: float
    n: int

    def per(self, items: int) -> Timing:
        """The same timing divided by ``items``, e.g. per image of a batch."""
        return Timing(self.median_ms / items, self.min_ms / items, self.n)


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """A collection in the middle of a call would be charged to that call."""
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _call(function: Callable[[], object]) -> None:
    function()
    if torch.cuda.is_initialized():  # a launch returns before its work is done
        torch.cuda.synchronize()


def measure(
    functions: Mapping[str, Callable[[], object]],
    *,
    seconds: float = 2.0,
    warmup: int = 2,
    min_reps: int = MIN_REPS,
    max_reps: int = 1000,
    settle: int = 0,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Timing]:
    """Time ``functions`` interleaved (ABBA) in inference mode, with what they leave the current GPU to do.

    Args:
        functions: name -> function without arguments. Inputs are bound by the caller, e.g. with ``functools.partial``.
        seconds: stop after the round in which this much time (warm-up excluded, all functions together) has passed,
            though never before ``min_reps`` rounds.
        warmup: calls of each function before the clock starts; caches, packs and thread pools come up here.
        min_reps: fewest timed calls of each function, at least 10.
        max_reps: most timed calls of each function.
        settle: calls off the clock before each timed one. With one, nobody pays for the caches of the function before,
            which the first and the last, as neighbours of themselves, are spared half of the time.
        clock: seconds counter; tests pass a fake one.

    Returns:
        name -> :class:`Timing`, in the order of ``functions``.

    Raises:
        ValueError: if there is nothing to measure, or the repetition bounds contradict each other.
    """
    if not functions:
        raise ValueError("functions: must hold at least one function, got none")
    if min_reps < MIN_REPS or max_reps < min_reps:
        raise ValueError(f"min_reps: must be in [{MIN_REPS}, max_reps={max_reps}], got {min_reps}")

    samples: dict[str, list[float]] = {name: [] for name in functions}
    order = list(functions)
    with torch.inference_mode(), no_garbage_collection():
        for name in order:
            for _ in range(warmup):
                _call(functions[name])
        begin = clock()
        for repetition in range(max_reps):
            if repetition >= min_reps and clock() - begin >= seconds:
                break
            # Back and forth, so that no function always runs in the wake of the same other one.
            for name in order if repetition % 2 == 0 else reversed(order):
                for _ in range(settle):
                    _call(functions[name])
                start = clock()
                _call(functions[name])
                samples[name].append(clock() - start)
    return {
        name: Timing(statistics.median(values) * 1e3, min(values) * 1e3, len(values))
        for name, values in samples.items()
    }
