"""What every benchmark shares: the contest, the check before the clock, tidy rows, the command line.

A benchmark is a module with one function and three lines at its end::

    from benchmarks.common import Bench, main
    from benchmarks.peers import ConvLayer, conv_peers

    def run(bench: Bench) -> None:
        for shape in bench.choose(SHAPES, quick=SHAPES[:1]):
            layer = ConvLayer(weight, bias, stride=1, padding=1, act="relu")
            bench.compare(
                op="rep_conv2d", case=shape.name, batch=8, layout="channels_last",
                contenders={"effkern": lambda: rep_conv2d(x, weight, bias, ...), **conv_peers(bench, layer, x)},
                exact=y64, allowed=16 * 2**-24 * a64, macs=shape.macs,
            )

    if __name__ == "__main__":
        main("rep_conv", run)

``run`` is called once per thread count under ``torch.no_grad``. Names that begin with ``effkern`` are ours: they must
be within ``allowed`` of ``exact``, elementwise, or the benchmark stops (a wrong kernel has no speed). Peers may use
Winograd or another order of summation and are held to 1e-3 of the largest output; one that is further off is named
with its error and not timed. For a dynamic op pass ``macs`` (all of the work), ``macs_done`` (what this call has to
do) and ``dense`` (the contender that does all of it): the row then has ``macs_left`` and ``time_left`` side by side.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from benchmarks.timing import fma_peak, interleave
from effkern.info import machine

RESULTS = Path(__file__).with_name("results")
T = TypeVar("T")
Row = dict[str, Any]


class Bench:
    """One run of one benchmark: its options, and the rows and absences it collects."""

    def __init__(self, name: str, options: argparse.Namespace) -> None:
        self.name = name
        self.quick: bool = options.quick
        self.seconds: float = options.seconds
        self.threads = 1
        self.rows: list[Row] = []
        self.missing: dict[str, str] = {}  # peer -> why it was not timed
        self._only = re.compile(options.only)
        self._peers = None if options.peers is None else set(options.peers.split(","))
        self._when = datetime.now(timezone.utc).isoformat(timespec="seconds")
        self._machine = machine()

    def choose(self, cases: Sequence[T], quick: Sequence[T]) -> Sequence[T]:
        """``quick`` under ``--quick``, else all ``cases``."""
        return quick if self.quick else cases

    def wants(self, peer: str) -> bool:
        """Whether ``--peers`` names ``peer``; without that option every peer is wanted."""
        return self._peers is None or peer in self._peers

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
        macs: float | None = None,
        macs_done: float | None = None,
        dense: str | None = None,
        **extra: Any,
    ) -> list[Row]:
        """Check all contenders, time them interleaved, print and keep one row each.

        Args:
            op: the operator measured, as in ``torch.ops.effkern``.
            case: name of the shape, unique within the op.
            contenders: name to a callable that returns the output (a tensor, or a tuple whose first entry it is).
            batch: samples a call.
            dtype: storage type of the activations.
            layout: memory layout of the input of our contenders.
            exact: float64 result. Without it the first contender is the yardstick.
            allowed: largest error of our contenders, elementwise. Without it they are held to the limit of the peers.
            macs: multiply-adds of the whole work.
            macs_done: multiply-adds this case leaves to do; ``macs`` if not given.
            dense: contender that does all of the work, the denominator of ``time_left``.
            **extra: further columns, such as ``keep=0.5``.

        Raises:
            AssertionError: if one of our contenders is wrong.
        """
        if not self._only.search(f"{op}/{case}"):
            return []
        errors = self._check(f"{op}/{case}", contenders, exact, allowed)
        running = {name: contenders[name] for name in errors}
        before = fma_peak()
        timings = interleave(running, seconds=self.seconds, rounds=3 if self.quick else 9)
        after = fma_peak()
        done = macs if macs_done is None else macs_done
        rows = []
        for name, time in timings.items():
            row: Row = {
                "benchmark": self.name,
                "op": op,
                "case": case,
                "batch": batch,
                "dtype": dtype,
                "layout": layout,
                "contender": name,
                "threads": self.threads,
                "median_us": time.median * 1e6,
                "min_us": time.minimum * 1e6,
                "q25_us": time.lower * 1e6,
                "q75_us": time.upper * 1e6,
                "rounds": time.rounds,
                "calls": time.calls,
                "gflops": None if done is None else 2e-9 * done / time.median,
                "peak_gflops_before": before,
                "peak_gflops_after": after,
                "macs": macs,
                "macs_left": None if macs is None or not macs else (done or 0) / macs,
                "time_left": None if dense is None else time.median / timings[dense].median,
                "max_error": errors[name],
                **extra,
                **{key: self._machine[key] for key in ("cpu", "isa", "torch", "effkern", "commit")},
                "date": self._when,
            }
            rows.append(row)
        self.rows += rows
        _print_rows(f"{op}  {case}  batch {batch}  {dtype}  {layout}  {self.threads} thread(s)", rows)
        return rows

    def _check(
        self,
        where: str,
        contenders: Mapping[str, Callable[[], Any]],
        exact: Tensor | None,
        allowed: Tensor | float | None,
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
            limit = 1e-3 * float(exact.abs().max()) + 1e-12 if exact.numel() else 0.0
            ours = name.startswith("effkern")
            right = bool((error <= allowed).all()) if ours and allowed is not None else worst <= limit
            if right:
                errors[name] = worst
            elif ours:
                raise AssertionError(f"{where}: {name} is off by {worst:.3g}; a wrong kernel has no speed")
            else:
                self.missing[f"{name} ({where})"] = f"wrong result, off by {worst:.3g} with {limit:.3g} allowed"
        return errors

    def save(self, folder: Path) -> None:
        """Append the rows to ``<name>.csv`` and write this run, with the machine, to ``<name>.json``."""
        folder.mkdir(parents=True, exist_ok=True)
        table = folder / f"{self.name}.csv"
        rows: list[Row] = []
        if table.exists():
            with table.open(newline="") as old:
                rows += csv.DictReader(old)
        rows += self.rows
        columns = list(dict.fromkeys(key for row in rows for key in row))
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            fresh = Path(scratch) / "rows"
            with fresh.open("w", newline="") as new:
                writer = csv.DictWriter(new, columns, restval="", lineterminator="\n")
                writer.writeheader()
                writer.writerows({k: _short(v) for k, v in row.items()} for row in rows)
            os.replace(fresh, table)
            run = {"machine": self._machine, "date": self._when, "missing": self.missing, "rows": self.rows}
            fresh.write_text(json.dumps(run, indent=1, default=str) + "\n")
            os.replace(fresh, folder / f"{self.name}.json")


def main(name: str, run: Callable[[Bench], None], argv: Sequence[str] | None = None) -> Bench:
    """Read the command line, call ``run`` for every thread count, save and report what could not be measured."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.bench_{name}")
    parser.add_argument("--quick", action="store_true", help="smallest cases, three rounds: done in seconds")
    parser.add_argument("--threads", type=int, nargs="+", default=[1], help="thread counts to run with (default: 1)")
    parser.add_argument("--seconds", type=float, help="time for each contender of each case (default: 1)")
    parser.add_argument("--peers", help="only these peers, comma separated; see benchmarks/peers.py")
    parser.add_argument("--only", default="", help="only cases whose op/case matches this regular expression")
    parser.add_argument("--out", type=Path, help="results go here (default: benchmarks/results, quick: runs/bench)")
    options = parser.parse_args(argv)
    if options.seconds is None:
        options.seconds = 0.0 if options.quick else 1.0
    if options.out is None:
        options.out = Path("runs/bench") if options.quick else RESULTS
    bench, threads = Bench(name, options), torch.get_num_threads()
    try:
        for bench.threads in options.threads:
            torch.set_num_threads(bench.threads)
            torch.manual_seed(0)
            with torch.no_grad():
                run(bench)
    finally:
        torch.set_num_threads(threads)
    bench.save(options.out)
    for peer, reason in bench.missing.items():
        print(f"not measured: {peer}: {reason}")
    print(f"{len(bench.rows)} rows -> {options.out / name}.csv")
    sys.stdout.flush()
    return bench


def _short(value: Any) -> Any:
    return f"{value:.6g}" if isinstance(value, float) else value


def _print_rows(title: str, rows: Iterable[Row]) -> None:
    print(title)
    for row in sorted(rows, key=lambda r: r["median_us"]):
        line = f"  {row['contender']:<24}{row['median_us']:>12.1f} us  min {row['min_us']:>10.1f}"
        if row["gflops"] is not None:
            line += f"  {row['gflops']:>7.1f} GFLOP/s of {row['peak_gflops_before']:.0f}/{row['peak_gflops_after']:.0f}"
        if row["time_left"] is not None:
            line += f"  MACs left {row['macs_left']:>5.1%}, time left {row['time_left']:>6.1%}"
        print(line, flush=True)
