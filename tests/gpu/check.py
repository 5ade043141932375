"""`make gpu-check`: every op on the GPU, or a line that there is none. Neither is a failure; a wrong value is one.

``python -m tests.gpu.check --only rep_conv2d graph --jobs 8 --limit 500 --report all.txt``. A kernel that takes the
device from its process, or never ends, is one failed test: each of several processes is replaced when that happens.
``EFFKERN_CHECK_DEVICE=cpu`` runs the same tests on the CPU's kernels, to check the tests.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path

import torch

from tests.gpu.device import DEVICE
from tests.gpu.pool import Pool, Result, op_of

FOLDER = Path(__file__).parent
FILES = ("on_device.py", "on_device_order.py", "on_device_triton.py", "on_device_sizes.py", "on_device_networks.py")


def arguments(given: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.gpu.check", description="every op on the GPU")
    parser.add_argument("--only", nargs="+", default=[], metavar="SUBSTRING", help="tests whose id has one of these")
    parser.add_argument("--skip", nargs="+", default=[], metavar="SUBSTRING", help="tests not to run")
    parser.add_argument("--jobs", type=int, default=min(8, os.cpu_count() or 1), help="processes at once")
    parser.add_argument("--limit", type=float, default=float("inf"), metavar="SECONDS", help="for all of it")
    parser.add_argument("--test-limit", type=float, default=60.0, metavar="SECONDS", help="for one test, 60 by default")
    parser.add_argument("--report", type=Path, metavar="FILE", help="where all of what failed is written")
    parser.add_argument("files", nargs="*", default=[str(FOLDER / name) for name in FILES], help=argparse.SUPPRESS)
    return parser.parse_args(given)


def summary(results: Sequence[Result]) -> list[str]:
    """A line for each op, one for each failure, and the sum."""
    ops: dict[str, Counter[str]] = defaultdict(Counter)
    for result in results:
        ops[op_of(result.name)][result.outcome] += 1
    lines = [f"{op}: {', '.join(f'{n} {what}' for what, n in sorted(ops[op].items()))}" for op in sorted(ops)]
    failures = sorted((r for r in results if r.bad and r.outcome != "not run"), key=lambda r: r.name)
    lines += [f"{r.outcome.upper()} {short(r)}: {r.line()}" for r in failures]
    slow = sorted(results, key=lambda r: -r.seconds)[:5]
    lines.append("slowest: " + ", ".join(f"{short(r)} {r.seconds:.1f} s" for r in slow))
    total = Counter(result.outcome for result in results)
    return [*lines, ", ".join(f"{n} {what}" for what, n in sorted(total.items())) or "no test has such a name"]


def short(result: Result) -> str:
    """The id without its folders."""
    file, _, test = result.name.partition("::")
    return f"{file.rpartition('/')[2]}::{test}"


def main(given: Sequence[str] | None = None) -> int:
    options = arguments(given)
    if DEVICE == "cuda" and not torch.cuda.is_available():
        print("no GPU was found: nothing was checked")
        return 0
    name = torch.cuda.get_device_name() if DEVICE == "cuda" else "the CPU"
    print(f"checking on {name} in {options.jobs} processes", flush=True)
    started = time.monotonic()
    done = 0

    def seen(result: Result) -> None:
        nonlocal done
        done += 1
        if result.bad and result.outcome != "not run":
            print(f"{result.outcome.upper()} {short(result)}: {result.line()}", flush=True)
            if options.report is not None:
                with options.report.open("a") as file:
                    print(f"{'=' * 8} {result.outcome} {result.name}\n{result.text}\n", file=file)
        if done % 200 == 0:
            print(f"{done} tests, {time.monotonic() - started:.0f} s", flush=True)

    def wanted(name: str) -> bool:
        return (not options.only or any(s in name for s in options.only)) and not any(s in name for s in options.skip)

    pool = Pool(options.files, options.jobs, options.test_limit, options.limit, wanted, seen)
    try:
        results = pool.run()
    except RuntimeError as error:
        print(error)
        return 1
    print("\n".join(summary(results)))
    print(f"{time.monotonic() - started:.0f} s")
    return int(any(result.bad for result in results) or not results)


if __name__ == "__main__":
    sys.exit(main())
