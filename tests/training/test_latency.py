"""Latency measurement: peers see the same weather."""

import gc

import pytest
import torch

from effkern.training import Timing, measure


class FakeMachine:
    """A clock that only moves when work is done, so that timings are exact."""

    def __init__(self) -> None:
        self.now = 0.0
        self.calls: list[str] = []

    def work(self, name: str, seconds: float):
        def call() -> None:
            self.calls.append(name)
            self.now += seconds

        return call

    def clock(self) -> float:
        return self.now


def test_functions_take_turns_back_and_forth():
    machine = FakeMachine()
    functions = {"a": machine.work("a", 1.0), "b": machine.work("b", 2.0)}
    timings = measure(functions, seconds=0.0, warmup=1, clock=machine.clock)
    assert machine.calls[:2] == ["a", "b"]  # warm-up
    assert machine.calls[2:] == ["a", "b", "b", "a"] * 5
    assert timings == {"a": Timing(1000.0, 1000.0, 10), "b": Timing(2000.0, 2000.0, 10)}


def test_settling_calls_are_off_the_clock():
    machine = FakeMachine()
    functions = {name: machine.work(name, 1.0) for name in "ab"}
    timings = measure(functions, seconds=0.0, warmup=0, settle=2, clock=machine.clock)
    assert machine.calls == ["a", "a", "a", "b", "b", "b", "b", "b", "b", "a", "a", "a"] * 5
    assert timings["a"] == Timing(1000.0, 1000.0, 10)


def test_a_gpu_is_waited_for(monkeypatch):
    machine = FakeMachine()
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", machine.work("wait", 4.0))
    timing = measure({"f": machine.work("f", 1.0)}, seconds=0.0, warmup=1, clock=machine.clock)["f"]
    assert machine.calls == ["f", "wait"] * 11 and timing.median_ms == timing.min_ms == 5000.0


def test_median_and_minimum_are_of_the_calls():
    machine = FakeMachine()
    durations = iter([9.0, 1.0, 5.0, 3.0, 4.0, 2.0, 6.0, 7.0, 8.0, 9.0, 10.0])

    def uneven() -> None:
        machine.now += next(durations)

    timing = measure({"f": uneven}, seconds=0.0, warmup=1, clock=machine.clock)["f"]
    assert timing == Timing(median_ms=5500.0, min_ms=1000.0, n=10)
    assert timing.per(10) == Timing(550.0, 100.0, 10)


def test_time_is_bounded_but_never_below_ten_calls():
    machine = FakeMachine()
    quick = measure({"f": machine.work("f", 0.1)}, seconds=2.05, warmup=0, clock=machine.clock)
    assert quick["f"].n == 21
    slow = measure({"f": machine.work("f", 100.0)}, seconds=2.0, warmup=0, clock=machine.clock)
    assert slow["f"].n == 10
    capped = measure({"f": machine.work("f", 0.001)}, seconds=1e9, max_reps=12, clock=machine.clock)
    assert capped["f"].n == 12


def test_neither_gradients_nor_garbage_collection_while_measuring():
    seen = []

    def look():
        seen.append((torch.is_inference_mode_enabled(), gc.isenabled()))
        if len(seen) == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure({"f": look}, seconds=0.0)
    assert seen == [(True, False)] * 5 and gc.isenabled()


@pytest.mark.parametrize(
    ("functions", "bounds"), [({}, {}), ({"f": int}, {"min_reps": 9}), ({"f": int}, {"max_reps": 5})]
)
def test_senseless_bounds_are_refused(functions, bounds):
    with pytest.raises(ValueError, match="must"):
        measure(functions, **bounds)
