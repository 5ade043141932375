"""What every benchmark shares: the contest, the check before the clock, tidy rows, the command line.

A benchmark is a module with one function and three lines at its end::

    from benchmarks.common import Bench, main, rounding
    from benchmarks.layer import ConvLayer
    from benchmarks.peers import conv_peers

    def run(bench: Bench) -> None:
        for shape in bench.choose(SHAPES, quick=SHAPES[:1]):
            layer = ConvLayer(weight, bias, stride=1, padding=1, act="relu")
            bench.compare(
                op="rep_conv2d", case=shape.name, batch=8, layout="channels_last",
                contenders={"effkern": lambda: rep_conv2d(x, weight, bias, ...), **conv_peers(bench, layer, x)},
                exact=y64, allowed=rounding(a64), macs=shape.macs,
            )

    if __name__ == "__main__":
        main("rep_conv", run)

``run`` is called once per thread count under ``torch.no_grad``. Names that begin with ``effkern`` are ours: they must
be within ``allowed`` of ``exact``, elementwise, or the benchmark stops (a wrong kernel has no speed). Peers may use
Winograd or another order of summation and are held to ``peer_error`` of the largest output; one that is further off is
named with its error and not timed. For a dynamic op pass ``macs`` (all of the work), ``macs_done`` (what this call has
to do) and ``dense`` (the contender that does all of it): the row then has ``macs_left`` and ``time_left`` side by side.

A new family is listed in `benchmarks.run_all.PLAN` with the minutes it takes.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import re
import sys
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from benchmarks import results
from benchmarks.results import Row
from benchmarks.timing import Contender, fma_peak, interleave
from effkern.info import machine

T = TypeVar("T")
PACKAGES = ("numpy", "onnx", "onnxruntime", "openvino", "ncnn", "pnnx", "MNN")
#: If the multiply-add peak moves by more than this during a contest, the contest is held once more.
STEADY = 0.1
QUICK_OUT = Path("runs/bench/cpu.json")


class Bench:
    """One run of one benchmark: its options, and the rows and absences it collects."""

    def __init__(self, name: str, options: argparse.Namespace) -> None:
        self.name = name
        self.quick: bool = options.quick
        self.seconds: float = options.seconds
        self.threads = 1
        self.rows: list[Row] = []
        self.missing: dict[str, str] = {}  # peer, or "peer (op/case)" -> why it was not timed
        self.started = time.perf_counter()
        self._budget: float | None = options.budget
        self._cases = re.compile(options.cases)
        self._peers = None if options.peers is None else set(options.peers.split(","))
        self._when = datetime.now(timezone.utc).isoformat(timespec="seconds")
        self._machine = {**machine(), "packages": _versions()}

    def choose(self, cases: Sequence[T], quick: Sequence[T]) -> Sequence[T]:
        """``quick`` under ``--quick``, else all ``cases``."""
        return quick if self.quick else cases

    def wants(self, peer: str) -> bool:
        """Whether ``--peers`` names ``peer``; without that option every peer is wanted."""
        return self._peers is None or peer in self._peers

    def wants_case(self, op: str, case: str) -> bool:
        """Whether ``--cases`` matches. Ask before costly preparations; `compare` asks again."""
        return bool(self._cases.search(f"{op}/{case}"))

    @property
    def partial(self) -> bool:
        """Whether some cases are left out on purpose."""
        return bool(self._cases.pattern)

    def compare(
        self,
        *,
        op: str,
        case: str,
        contenders: Mapping[str, Callable[[], Any]],
        batch: int,
        dtype: str = "float32",
        layout: str = "channels_last",
        exact: Tensor | None = None,
        allowed: Tensor | float | None = None,
        peer_error: float = 1e-3,
        macs: float | None = None,
        macs_done: float | None = None,
        dense: str | None = None,
        judged: Collection[str] = (),
        seconds: float | None = None,
        **extra: Any,
    ) -> list[Row]:
        """Check all contenders, time them interleaved, print and keep one row each.

        Args:
            op: the operator measured, as in ``torch.ops.effkern``.
            case: name of the shape, unique within the op.
            contenders: name to a callable that returns the output (a tensor, or a tuple whose first entry it is), or
                to a `Contender`, which reads its output off the clock.
            batch: samples a call.
            dtype: storage type of the activations.
            layout: memory layout of the input of our contenders.
            exact: float64 result. Without it the first contender is the yardstick.
            allowed: largest error of our contenders, elementwise. Without it they are held to the limit of the peers.
            peer_error: largest error of a peer that is still timed, as a share of the largest output.
            macs: multiply-adds of the whole work.
            macs_done: multiply-adds this case leaves to do; ``macs`` if not given.
            dense: contender that does all of the work, the denominator of ``time_left``.
            judged: peers besides the fastest that a target is about, so that they are timed to the end.
            seconds: time for the contest, in place of the run's.
            **extra: further columns, such as ``keep=0.5``.

        Raises:
            AssertionError: if one of our contenders is wrong.
        """
        if not self.wants_case(op, case):
            return []
        errors = self._check(f"{op}/{case}", contenders, exact, allowed, peer_error)
        running = {name: contenders[name] for name in errors}
        judged = {name for name in running if name.startswith(results.OURS) or name in judged}
        late = self._budget is not None and time.perf_counter() - self.started > self._budget
        options: dict[str, Any] = {"rounds": 3 if self.quick or late else 7, "judged": judged}
        options["seconds"] = 0.0 if self.quick or late else self.seconds if seconds is None else seconds
        before, timings, after = fma_peak(), interleave(running, **options), fma_peak()
        if _moved(before, after) > STEADY and not self.quick and not late:
            again = fma_peak(), interleave(running, **options), fma_peak()
            if _moved(again[0], again[2]) < _moved(before, after):
                before, timings, after = again
        done = macs if macs_done is None else macs_done
        rows = []
        for name, spent in timings.items():
            contender = contenders[name]
            own_threads = contender.threads if isinstance(contender, Contender) else None
            row: Row = {
                "family": self.name,
                "op": op,
                "case": case,
                "batch": batch,
                "threads": self.threads,
                "impl": name,
                "median_ms": spent.median * 1e3,
                "min_ms": spent.minimum * 1e3,
                "gflops": None if done is None else 2e-9 * done / spent.median,
                "correct_error": errors[name],
                "q25_ms": spent.lower * 1e3,
                "q75_ms": spent.upper * 1e3,
                "rounds": spent.rounds,
                "calls": spent.calls,
                "dtype": dtype,
                "layout": layout,
                "peak_gflops_before": round(before, 1),
                "peak_gflops_after": round(after, 1),
                "macs": macs,
                **({} if own_threads is None else {"own_threads": own_threads}),
                **({} if macs is None else {"macs_left": (done or 0) / macs if macs else 0.0}),
                **({} if dense is None else {"time_left": spent.median / timings[dense].median}),
                **({} if dense is None else {"min_time_left": spent.minimum / timings[dense].minimum}),
                **extra,
            }
            rows.append({key: _short(value) for key, value in row.items()})
        self.rows += rows
        passed = time.perf_counter() - self.started
        spans = f"{passed:.0f} s" + (f" of {self._budget:.0f}" if self._budget else "")
        _print_rows(f"[{self.name}, {spans}]  {op}  {case}  batch {batch}  {self.threads} thread(s)", rows)
        return rows

    def note(self, *, op: str, case: str, impl: str, batch: int = 1, **values: Any) -> Row:
        """A row of something other than time, such as bytes."""
        blank = dict.fromkeys(("median_ms", "min_ms", "gflops", "correct_error"))
        row = {"family": self.name, "op": op, "case": case, "batch": batch, "threads": self.threads, "impl": impl}
        row = {**row, **blank, **values}
        self.rows.append({key: _short(value) for key, value in row.items()})
        print(f"[{self.name}]  {op}  {case}  {impl}  " + ", ".join(f"{k} {_short(v)}" for k, v in values.items()))
        return self.rows[-1]

    def _check(
        self,
        where: str,
        contenders: Mapping[str, Callable[[], Any]],
        exact: Tensor | None,
        allowed: Tensor | float | None,
        peer_error: float,
    ) -> dict[str, float]:
        errors = {}
        for name, call in contenders.items():
            out = call()
            out = (out if isinstance(out, Tensor) else out[0]).detach().double()
            exact = out.clone() if exact is None else exact
            if out.shape != exact.shape:
                raise AssertionError(f"{where}: {name} returned {tuple(out.shape)}, expected {tuple(exact.shape)}")
            error = (out - exact).abs()
            worst = float(error.max()) if error.numel() else 0.0
            largest = float(exact.abs().max()) if exact.numel() else 0.0
            limit = peer_error * largest + 1e-12
            ours = name.startswith(results.OURS)
            right = bool((error <= allowed).all()) if ours and allowed is not None else worst <= limit
            if right:
                errors[name] = worst / largest if largest else worst
            elif ours:
                raise AssertionError(f"{where}: {name} is off by {worst:.3g}; a wrong kernel has no speed")
            else:
                self.missing[f"{name} ({where})"] = f"wrong result, off by {worst:.3g} with {limit:.3g} allowed"
        return errors

    def save(self, path: Path) -> None:
        """Put the rows into the file of results, in place of those the family had."""
        run = {
            "machine": self._machine,
            "date": self._when,
            "seconds": round(time.perf_counter() - self.started),
            "seconds_a_contest": self.seconds,
            "partial": self.partial,
            "quick": self.quick,
            "missing": self.missing,
        }
        results.save(path, results.merge(results.load(path), self.name, run, self.rows, self.partial))


def main(
    name: str,
    run: Callable[[Bench], None],
    argv: Sequence[str] | None = None,
    threads: Sequence[int] = (1,),
    seconds: float = 2.0,
) -> Bench:
    """Read the command line, call ``run`` for every thread count, save and report what could not be measured.

    Args:
        name: the family.
        run: collects rows in the `Bench` it is given.
        argv: command line.
        threads: thread counts of the targets of this family.
        seconds: for each contest, all contenders together.
    """
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.bench_{name}")
    parser.add_argument("--quick", action="store_true", help="smallest cases, three rounds: done in seconds")
    parser.add_argument("--threads", type=int, nargs="+", default=list(threads), help=f"default: {list(threads)}")
    parser.add_argument("--seconds", type=float, default=seconds, help=f"of each contest (default: {seconds:g})")
    parser.add_argument("--budget", type=float, help="after so many seconds contests have only a few rounds")
    parser.add_argument("--peers", help="only these peers, comma separated; see benchmarks/peers.py")
    parser.add_argument("--cases", default="", help="only cases whose op/case matches this regular expression")
    parser.add_argument("--out", type=Path, help=f"default: {results.CPU.parent.name}/cpu.json, quick: {QUICK_OUT}")
    options = parser.parse_args(argv)
    if options.out is None:
        options.out = QUICK_OUT if options.quick else results.CPU
    results.load(options.out)  # a file that cannot be added to is better known before the work than after it
    bench, before = Bench(name, options), torch.get_num_threads()
    try:
        for bench.threads in options.threads:
            torch.set_num_threads(bench.threads)
            torch.manual_seed(0)
            with torch.no_grad():
                run(bench)
    finally:
        torch.set_num_threads(before)
    bench.save(options.out)
    for peer, reason in bench.missing.items():
        print(f"not measured: {peer}: {reason}")
    print(f"{len(bench.rows)} rows -> {options.out}")
    sys.stdout.flush()
    return bench


def rounding(magnitude: Tensor) -> Tensor:
    """What float32 may lose in a convolution, by direct sums or Winograd's F(4,3).

    Args:
        magnitude: the same convolution of absolute values in float64. An error of Winograd's depends on all pixels of
            its tile, so of a map its largest entry counts.
    """
    return 48 * 2.0**-24 * (magnitude.amax((2, 3), keepdim=True) if magnitude.dim() == 4 else magnitude)


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _moved(before: float, after: float) -> float:
    return abs(after - before) / max(before, after)


def _short(value: Any) -> Any:
    return float(f"{value:.6g}") if isinstance(value, float) else value


def _print_rows(title: str, rows: Iterable[Row]) -> None:
    print(title)
    for row in sorted(rows, key=lambda r: r["median_ms"]):
        line = f"  {row['impl']:<24}{row['median_ms']:>11.4f} ms  min {row['min_ms']:>10.4f}  x{row['rounds']:<3}"
        if row["gflops"] is not None:
            line += f"  {row['gflops']:>7.1f} GFLOP/s of {row['peak_gflops_before']:.0f}/{row['peak_gflops_after']:.0f}"
        if "time_left" in row and "macs_left" in row:
            line += f"  MACs left {row['macs_left']:>5.1%}, time left {row['time_left']:>6.1%}"
        print(line, flush=True)
