"""The GPU's clock: replays of captured graphs, contenders in turn, with the inputs in L2 and out of it.

A graph holds many calls, so that neither side pays for its launches from Python and one event's half microsecond is
spread over them. Warm: the same call again and again, what fits L2 stays there. Cold: calls on copies of all tensors in
turn, together several times L2, each with an output of its own, so that every byte comes from memory and goes there.
"""

from __future__ import annotations

import math
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

ROUNDS = 15
SLICE_US = 1000.0  # of replays between two events
GRAPH_US = 200.0  # of calls in a graph
WARM_US = 20_000.0  # of replays before the first round: the clocks are up and the caches each contender's own
EAGER_CALLS = 50
MOST_COPIES, MOST_COPIED = 96, 12 << 30  # copies of a call's tensors, and bytes of them


class Call:
    """A function and its tensors, so that it can be repeated on copies of them."""

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self.function, self.args = function, args

    def __call__(self) -> Any:
        return self.function(*self.args)

    def value(self) -> Tensor:
        """The result that is compared: the first of several."""
        out = self()
        return out if isinstance(out, Tensor) else out[0]

    def bytes(self) -> int:
        """Of its tensors."""
        return sum(t.nbytes for t in pytree.tree_leaves(self.args) if isinstance(t, Tensor))

    def compiled(self) -> Call:
        make = getattr(self.function, "compiled", lambda: torch.compile(self.function, dynamic=False))
        return type(self)(make(), *self.args)

    def again(self) -> Call:
        """The same on tensors of its own."""
        return type(self)(self.function, *pytree.tree_map_only(Tensor, _copy, self.args))


def _copy(t: Tensor) -> Tensor:
    return t.detach().clone(memory_format=torch.preserve_format).requires_grad_(t.requires_grad)


@dataclass(frozen=True)
class Timing:
    """Microseconds of one call."""

    median: float
    minimum: float


class Clock(Protocol):
    """What the benchmark asks of a device."""

    def contest(self, calls: Mapping[str, Call], cold: bool) -> dict[str, Timing | str]:
        """A time for each contender, or why there is none."""

    def eager(self, call: Call) -> float:
        """Microseconds of a call from Python, many of them in a row: the larger of the host's part and the device's."""


class _Graph:
    """Calls captured, and how often they are replayed between two events."""

    def __init__(self, calls: list[Call], keep: bool) -> None:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                calls[0]()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        self.graph, self.calls, outs = torch.cuda.CUDAGraph(), len(calls), []
        with torch.cuda.graph(self.graph):
            for call in calls:
                out = call()
                if keep:  # else the next call writes to the same memory
                    outs.append(out)
        del outs
        self.graph.replay()
        torch.cuda.synchronize()
        self.replays = 1
        self.replays = max(1, math.ceil(SLICE_US / (self.calls * self.slice())))

    def slice(self) -> float:
        """Microseconds of one call."""
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(self.replays):
            self.graph.replay()
        end.record()
        end.synchronize()
        return max(1e-2, 1000 * start.elapsed_time(end) / (self.replays * self.calls))


class GraphClock:
    """Of a CUDA device."""

    def __init__(self) -> None:
        self.l2 = torch.cuda.get_device_properties().L2_cache_size

    def copies(self, call: Call) -> int:
        """How many sets of tensors, together, fill L2 three times, as far as memory and patience allow."""
        size = max(1, call.bytes())
        return max(2, min(math.ceil(3 * self.l2 / size), MOST_COPIES, MOST_COPIED // size))

    def contest(self, calls: Mapping[str, Call], cold: bool) -> dict[str, Timing | str]:
        graphs: dict[str, _Graph] = {}
        found: dict[str, Timing | str] = {}
        for name, call in calls.items():
            try:
                if cold:
                    graphs[name] = _Graph([call, *(call.again() for _ in range(self.copies(call) - 1))], keep=True)
                else:
                    once = _Graph([call], keep=False)
                    graphs[name] = _Graph([call] * max(1, min(100, round(GRAPH_US / once.slice()))), keep=False)
            except Exception as error:
                torch.cuda.synchronize()  # raises if the device is lost, for which the process has to end
                found[name] = f"no graph: {reason(error)}"
        spent: dict[str, list[float]] = {name: [] for name in graphs}
        for graph in graphs.values():
            for _ in range(math.ceil(WARM_US / SLICE_US)):
                graph.slice()
        names = list(graphs)
        for turn in range(ROUNDS if names else 0):
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                spent[name].append(graphs[name].slice())
        return found | {name: Timing(statistics.median(times), min(times)) for name, times in spent.items()}

    def eager(self, call: Call) -> float:
        times = []
        for _ in range(5):
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(EAGER_CALLS):
                call()
            torch.cuda.synchronize()
            times.append(1e6 * (time.perf_counter() - start) / EAGER_CALLS)
        return statistics.median(times)


class HostClock:
    """The same by the host's clock, for a device that is the host; cold is a set of tensors a call."""

    def contest(self, calls: Mapping[str, Call], cold: bool) -> dict[str, Timing | str]:
        sets = {name: [call, call.again()] if cold else [call] for name, call in calls.items()}
        return {name: Timing(min(t), min(t)) for name, copies in sets.items() if (t := [self.eager(c) for c in copies])}

    def eager(self, call: Call) -> float:
        start = time.perf_counter()
        call()
        return 1e6 * (time.perf_counter() - start)


def reason(error: BaseException) -> str:
    """One line of an exception."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:160] if text else ''}"


def ceilings() -> dict[str, float]:
    """What this card does at best: GB/s of a large copy, read and written, and TFLOP/s of large matrix products."""

    def best(call: Call) -> float:
        timing = GraphClock().contest({"it": call}, cold=False)["it"]
        if isinstance(timing, str):
            raise RuntimeError(timing)
        return timing.median

    source = torch.randn(1 << 28, device="cuda")
    copy = best(Call(lambda a, b: b.copy_(a), source, torch.empty_like(source)))
    found = {"copy_gb_s": 2 * source.nbytes / copy / 1e3}
    del source
    allowed = torch.backends.cuda.matmul.allow_tf32
    for name, dtype, n in (
        ("float16", torch.float16, 8192),
        ("bfloat16", torch.bfloat16, 8192),
        ("tf32", torch.float32, 8192),
        ("float32", torch.float32, 4096),
    ):
        torch.backends.cuda.matmul.allow_tf32 = name == "tf32"
        a, b = (torch.randn(n, n, device="cuda").to(dtype) for _ in range(2))
        found[f"{name}_tflops"] = 2 * n**3 / best(Call(torch.mm, a, b)) / 1e6
    torch.backends.cuda.matmul.allow_tf32 = allowed
    return found


def machine() -> dict[str, Any]:
    """What the numbers belong to."""
    device = torch.cuda.get_device_properties()
    try:
        asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(asked, capture_output=True, text=True, timeout=20, check=True).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        driver = "unknown"
    try:
        import triton

        version = triton.__version__
    except ImportError:
        version = "none"
    return {
        "device": device.name,
        "multiprocessors": device.multi_processor_count,
        "l2_mb": device.L2_cache_size / 1e6,
        "driver": driver,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "torch": torch.__version__,
        "triton": version,
    }
