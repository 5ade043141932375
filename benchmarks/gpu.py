"""`make gpu-bench`: the CUDA ops against what PyTorch offers for the same work, or one line that says there is no GPU.

    python -m benchmarks.gpu                                  everything, about ten minutes
    python -m benchmarks.gpu --only rep_conv --only networks  families, or parts of case names
    python -m benchmarks.gpu --limit 300 --out FILE           stop after so many seconds; what is done is in the file
    python -m benchmarks.gpu --profile "rep_conv2d 256->256@14 n32" [--contender channels_last]

Peers are those of `benchmarks.gpu_cases` and `benchmarks.gpu_networks`; a peer that does not give the op's values is
named and not timed. Times are of captured graphs, contenders in turn (`benchmarks.gpu_timing`): ``warm`` with the same
tensors again and again, ``cold`` with tensors that are not in L2; ``eager`` is a call from Python.

Each dtype has a process of its own, the Triton twins another. If a case ends its process or takes too long, a new one
goes on behind it. ``tf32``: float32 with `EFFKERN_TF32=1` and PyTorch's switches for it on; ``float32``: with both off.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_cases import Bench, Case, Ops, Spec, Waits, compare
from benchmarks.gpu_networks import Networks
from benchmarks.gpu_tables import NETWORKS, OURS, RESULTS, TWIN, load, save, terminal, time_of
from benchmarks.gpu_timing import Call, Clock, GraphClock, Timing, ceilings, machine, reason
from effkern import ops

#: The processes, most important first: dtype and whether the twins are timed.
JOBS = ("float16", "triton", "bfloat16", "tf32", "float32")
COMPILE_S = 240.0  # of compiling and comparing, after which peers are compiled no more
TWINS = ("RepVGG-A0 n", "MobileNetV2 n")  # networks that are run by the Triton kernels too
MARK = "@gpu "  # of a process's lines that are for us
LOST = 3  # exit status of a process whose device is lost
Row = dict[str, Any]


def bench_of(job: str, device: str = "cuda", small: bool = False) -> Ops:
    """The benchmark of one process, PyTorch's switches set."""
    tf32 = job == "tf32"
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = tf32
    dtype = {"bfloat16": torch.bfloat16, "tf32": torch.float32, "float32": torch.float32}.get(job, torch.float16)
    return Networks(device, dtype, small, tf32)


def specs_of(bench: Bench, job: str, only: Sequence[str] = ()) -> list[Spec]:
    """The cases of one process: all in float16, operators and two networks by Triton, core ones in other dtypes."""
    assert isinstance(bench, Ops)
    every = list(bench.specs())
    if job == "triton":  # of most networks it would compile a hundred kernels
        every = [s for s in every if s.family not in NETWORKS or s.name.startswith(TWINS)]
    elif job != "float16":
        every = [spec for spec in every if spec.core]
    return [s for s in every if not only or any(part == s.family or part in s.name for part in only)]


def twin(call: Call) -> Call:
    """The call on the Triton kernels."""

    def run(*args: Any) -> Any:
        with ops.backend("triton"):
            return call.function(*args)

    return type(call)(run, *call.args)


def contenders(bench: Bench, case: Case, job: str, compiling: bool) -> tuple[dict[str, Call], dict[str, Call]]:
    """Ours and those of equal work, and those of all the work."""
    if job == "triton":
        return {OURS: case.ours, TWIN: twin(case.ours)}, {}
    peers = dict(case.peers)
    if compiling:
        torch._dynamo.reset()  # its caches belong to code, not to closures: after eight shapes it would give up
        for name in case.compiled:
            side = case.whole if name in case.whole else peers
            before, _, rest = name.rpartition("all: ")
            side[f"{before}compiled {rest}"] = side[name].compiled()
    return {OURS: case.ours, **peers}, case.whole


def measure(bench: Bench, spec: Spec, clock: Clock, job: str, compiling: bool) -> Row:
    """One case: microseconds of every contender, or why there are none."""
    torch.manual_seed(0)
    case = spec.make()
    same, whole = contenders(bench, case, job, compiling)
    case.peers, case.whole = {name: call for name, call in same.items() if name != OURS}, whole
    start = time.perf_counter()
    refused = compare(bench, case)
    compared = time.perf_counter() - start
    runs = {name: call for name, call in (same | whole).items() if name not in refused}
    times: dict[str, Row] = {name: {"error": why} for name, why in refused.items()}
    times |= {name: {"eager_us": clock.eager(call)} for name, call in runs.items()}
    graphs = {name: call for name, call in runs.items() if not isinstance(call, Waits)}
    for kind in ("warm", "cold") if case.cold else ("warm",):
        for name, timing in clock.contest(graphs, kind == "cold").items():
            if isinstance(timing, Timing):
                times[name] |= {f"{kind}_us": timing.median, f"{kind}_min_us": timing.minimum}
            else:
                times[name]["error"] = timing
    out = case.ours.value()
    moved = case.ours.bytes() + out.nbytes if case.bytes is None else case.bytes
    row: Row = {"family": spec.family, "case": spec.name, "dtype": job, "macs": case.macs, "bytes": moved}
    if case.share is not None:
        row["share"] = case.share
    return row | {"compare_s": round(compared, 1), "times": times}


def worker(job: str, names: Sequence[str], compiling: bool, deadline: float) -> None:
    """A process: a line of JSON for each case, and before it a line with its name."""

    def say(what: Row) -> None:
        print(MARK + json.dumps(what), flush=True)

    if names[:1] == ["machine"]:
        say({"begin": "machine"})
        say({"machine": machine() | {"ceilings": ceilings()}})
        return
    bench, clock = bench_of(job), GraphClock()
    specs = {spec.name: spec for spec in specs_of(bench, job)}
    spent = 0.0
    for name in names:
        if time.time() > deadline:
            return
        say({"begin": name})
        try:
            with torch.no_grad():
                row = measure(bench, specs[name], clock, job, compiling)
        except Exception as error:
            row = {"family": specs[name].family, "case": name, "dtype": job, "error": reason(error)}
        spent += row.get("compare_s", 0)
        compiling = compiling and spent < COMPILE_S
        say(row)
        try:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        except Exception:  # the error stays with the process
            os._exit(LOST)


def lines_of(command: list[str], env: dict[str, str], patience: float) -> Iterator[str | None]:
    """Lines of a process as they come; None where none comes for so long, after which it is ended."""
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True)
    lines: queue.Queue[str | None] = queue.Queue()

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            lines.put(line)
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    try:
        while True:
            try:
                line = lines.get(timeout=patience)
            except queue.Empty:
                yield None
                return
            if line is None:
                return
            yield line
    finally:
        process.kill()
        process.wait()


def run_job(job: str, names: Sequence[str], compiling: bool, deadline: float, patience: float) -> Iterator[Row]:
    """The rows of one job, in as many processes as it takes. A case that is too slow gets a second go uncompiled."""
    env = os.environ | {"EFFKERN_TF32": "1" if job == "tf32" else "0"}
    left, plain = list(names), False
    while left and time.time() < deadline:
        command = [sys.executable, "-m", "benchmarks.gpu", "--worker", job, "--until", str(deadline), "--names"]
        command += [*(left[:1] if plain else left), *([] if compiling and not plain else ["--no-compile"])]
        begun, silent, done = "", False, 0
        for line in lines_of(command, env, patience):
            silent = line is None
            if line is None or not line.startswith(MARK):
                continue
            row = json.loads(line[len(MARK) :])
            if "begin" in row:
                begun = row["begin"]
                continue
            yield row
            left.remove(begun)
            begun, done = "", done + 1
        if begun and silent and compiling and not plain:
            plain = True
        elif begun:
            left.remove(begun)
            plain = False
            why = f"nothing came for {patience:.0f} s" if silent else "its process ended"
            yield {"family": "", "case": begun, "dtype": job, "error": why}
        elif done:
            plain = False
        else:
            return  # it ended before its first case, as the next one would


def add(results: Row, row: Row) -> None:
    """``row`` in the place of what was measured of its case before."""
    if "machine" in row:
        kept = results["rows"] if same_machine(results["machine"], row["machine"]) else []
        results.update(machine=row["machine"], rows=kept)
        return
    key = row["case"], row["dtype"]
    results["rows"] = [r for r in results["rows"] if (r["case"], r["dtype"]) != key] + [row]


def same_machine(a: Row, b: Row) -> bool:
    """Whether rows of the two may stand in one table."""
    return all(a.get(key) == b.get(key) for key in ("device", "driver", "torch", "triton", "effkern"))


def line(row: Row) -> str:
    """A row on the terminal."""
    head = f"{row['dtype']:9} {row['case']:58}"
    if "error" in row:
        return f"{head} {row['error']}"
    text = [f"{name} {us:.1f}" for name, t in row["times"].items() if (us := time_of(t)) is not None]
    text += [f"{name}: {t['error']}" for name, t in row["times"].items() if "error" in t]
    return f"{head} us: " + ", ".join(text)


def profile(job: str, case: str, contender: str) -> int:
    """A few calls of one contender between the marks a profiler waits for."""
    bench = bench_of(job)
    (spec,) = [s for s in specs_of(bench, job) if s.name == case]
    with torch.no_grad():
        made = spec.make()
        call = {OURS: made.ours, TWIN: twin(made.ours), **made.peers, **made.whole}[contender]
        for _ in range(3):
            call()
        torch.cuda.synchronize()
        torch.cuda.profiler.start()
        for _ in range(2):
            call()
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()
    return 0


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    text = (__doc__ or "").splitlines()
    parser = argparse.ArgumentParser("python -m benchmarks.gpu", description=text[0])
    parser.add_argument("--out", type=Path, default=RESULTS, help="rows of the same machine in it stay")
    parser.add_argument("--jobs", nargs="+", choices=JOBS, default=JOBS, help="dtypes, and the Triton twins")
    parser.add_argument("--only", action="append", default=[], help="a family, or a part of a case's name")
    parser.add_argument("--limit", type=float, default=1200, help="seconds for all of it")
    parser.add_argument("--patience", type=float, default=90, help="seconds for one case")
    parser.add_argument("--no-compile", action="store_true", help="without torch.compile")
    parser.add_argument("--list", action="store_true", help="the cases")
    parser.add_argument("--profile", metavar="CASE", help="a few calls of one case, for a profiler")
    parser.add_argument("--contender", default=OURS, help="of --profile")
    parser.add_argument("--worker", choices=JOBS, help=argparse.SUPPRESS)
    parser.add_argument("--names", nargs="*", help=argparse.SUPPRESS)
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    options = arguments(argv)
    work = {job: [s.name for s in specs_of(Networks("cpu"), job, options.only)] for job in JOBS if job in options.jobs}
    if options.list:
        print("\n".join(f"{job}: {name}" for job, names in work.items() for name in names))
        return 0
    if not torch.cuda.is_available():
        print("no GPU was found: nothing was measured")
        return 0
    if options.worker:
        worker(options.worker, options.names, not options.no_compile, options.until)
        return 0
    if options.profile:
        return profile(options.jobs[0], options.profile, options.contender)
    results, begin = load(options.out), time.time()
    deadline, total, done = begin + options.limit, sum(map(len, work.values())), 0
    for job, names in [("float16", ["machine"]), *work.items()]:
        compiling = job == "float16" and not options.no_compile
        for row in run_job(job, names, compiling, deadline, options.patience):
            add(results, row)
            results["date"] = datetime.now(timezone.utc).isoformat(timespec="seconds")
            save(options.out, results)
            if "machine" in row:
                print(json.dumps(row["machine"]), flush=True)
                continue
            done += 1
            spent = time.time() - begin
            print(
                f"[{done}/{total}, {spent:.0f} s, left {spent / done * (total - done):.0f} s] {line(row)}", flush=True
            )
    if done < total:
        print(f"{total - done} of {total} cases were not run")
    print("\n" + terminal(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
