"""The benchmark for a GPU, all of its code but events and graphs, on the CPU at small shapes."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from types import SimpleNamespace

import pytest
import torch

from benchmarks import gpu, gpu_cases
from benchmarks.gpu_timing import Call, GraphClock, HostClock, Timing

LARGE = {"networks", "supernets"}


@pytest.fixture
def bench() -> gpu_cases.Ops:
    return gpu.bench_of("float32", "cpu", small=True)


def plain_compile(function, dynamic):
    return lambda *args: function(*args)


def test_every_contender_gives_the_values_of_its_side(bench, monkeypatch):
    monkeypatch.setattr(torch, "compile", plain_compile)
    specs = gpu.specs_of(bench, "float16")
    # A network at several batches and widths is one network at these sizes.
    again = {(spec.make.func, *(a for a in spec.make.args if isinstance(a, str))): spec for spec in reversed(specs)}
    specs = [spec for spec in specs if spec.family not in LARGE or spec in again.values()]
    assert {spec.family for spec in specs} >= LARGE
    with torch.no_grad():
        rows = [gpu.measure(bench, spec, HostClock(), "float16", compiling=True) for spec in specs]
    assert len({row["case"] for row in rows}) == len(rows)
    for row in rows:
        errors = {name: t["error"] for name, t in row["times"].items() if "error" in t}
        assert not errors, (row["case"], errors)
        assert all(t.keys() >= {"warm_us", "eager_us"} for name, t in row["times"].items() if name != "gathered")
        assert "warm_us" not in row["times"].get("gathered", {})
        assert row["bytes"] > 0 and row["macs"] >= 0
        assert (row.get("share") is not None) == any(name.startswith("all: ") for name in row["times"])
    named = {name for row in rows for name in row["times"]}
    assert named >= {"effkern", "compiled channels_last", "masked", "grouped_mm", "decoded", "all: effkern"}
    assert json.loads(json.dumps(rows)) == rows


def test_a_peer_that_does_other_work_is_not_timed(bench):
    spec = next(spec for spec in bench.specs() if spec.family == "rep_conv")

    def make():
        case = spec.make()
        case.peers |= {
            "wrong": Call(lambda *args: case.ours.function(*args) * 1.001, *case.ours.args),
            "broken": Call(lambda: 1 / 0),
            "nan": Call(lambda *args: case.ours.function(*args) * float("nan"), *case.ours.args),
        }
        return case

    row = gpu.measure(bench, spec._replace(make=make), HostClock(), "float32", compiling=False)
    assert "values differ" in row["times"]["wrong"]["error"] and "values differ" in row["times"]["nan"]["error"]
    assert row["times"]["broken"]["error"].startswith("failed: ZeroDivisionError")
    assert gpu.time_of(row["times"]["wrong"]) is None and "wrong: values differ" in gpu.line(row)


@pytest.mark.parametrize("job", ["bfloat16", "tf32"])
def test_values_are_close_in_other_dtypes(job):
    half = gpu.bench_of(job, "cpu", small=True)
    torch.manual_seed(0)
    with torch.no_grad():
        for spec in gpu.specs_of(half, job):
            assert spec.core and not gpu_cases.compare(half, spec.make()), spec.name


def test_16_bit_values_are_close():
    half = gpu.bench_of("float16", "cpu", small=True)
    torch.manual_seed(0)
    with torch.no_grad():
        for spec in (s for s in half.specs() if s.family not in LARGE):
            assert not gpu_cases.compare(half, spec.make()), spec.name


def test_copies_share_nothing(bench):
    call = bench.batch_norms(4, 8, 6, backward=True).ours
    again = call.again()
    assert again.bytes() == call.bytes() and torch.equal(again.value(), call.value())
    assert not {t.data_ptr() for t in call.args} & {t.data_ptr() for t in again.args}
    assert [t.stride() for t in again.args] == [t.stride() for t in call.args]


def test_the_rest_goes_on_behind_a_case_that_ends_its_process(monkeypatch):
    def process(command, env, patience):
        options = command[command.index("--names") + 1 :]
        for name in options[:-1] if options[-1] == "--no-compile" else options:
            yield gpu.MARK + json.dumps({"begin": name})
            if name == "ends":
                return
            if name == "hangs" or (name == "slow" and "--no-compile" not in command):
                yield None
                return
            yield "not for us"
            yield gpu.MARK + json.dumps({"case": name, "dtype": "float16", "times": {}})

    monkeypatch.setattr(gpu, "lines_of", process)
    names = ["a", "ends", "b", "hangs", "slow", "c"]
    rows = list(gpu.run_job("float16", names, True, time.time() + 1000, patience=2.0))
    assert [row["case"] for row in rows] == names
    errors = {row["case"]: row["error"] for row in rows if "error" in row}
    assert errors == {"ends": "its process ended", "hangs": "nothing came for 2 s"}


def test_lines_come_from_a_process_that_is_ended_when_it_is_silent():
    said = [sys.executable, "-c", "print(1); print(2)"]
    assert list(gpu.lines_of(said, {}, 1000)) == ["1\n", "2\n"]
    silent = [sys.executable, "-c", "import time; time.sleep(1000)"]
    assert list(gpu.lines_of(silent, {}, 0.01)) == [None]


def test_a_process_that_ends_at_once_is_not_started_again(monkeypatch):
    monkeypatch.setattr(gpu, "lines_of", lambda *_: iter(()))
    assert list(gpu.run_job("float16", ["a", "b"], True, time.time() + 60, 1.0)) == []


def test_results_are_kept_case_by_case(tmp_path):
    path, card = tmp_path / "gpu.json", {"device": "a card", "torch": "2"}
    results = gpu.load(path)
    for row in (
        {"machine": card},
        {"case": "a", "dtype": "float16", "n": 1},
        {"case": "a", "dtype": "float32"},
        {"case": "a", "dtype": "float16", "n": 2},
        {"machine": card | {"l2_mb": 50}},
    ):
        gpu.add(results, row)
    gpu.save(path, results)
    assert gpu.load(path) == results
    assert [row.get("n") for row in results["rows"]] == [None, 2] and results["machine"]["l2_mb"] == 50
    gpu.add(results, {"machine": {"device": "another"}})
    assert results["rows"] == []


class FakeGraph:
    """What is captured runs at once; a replay takes a millisecond a call."""

    replayed = 0

    def replay(self):
        FakeGraph.replayed += 1


class FakeEvent:
    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.at = FakeGraph.replayed

    def synchronize(self):
        pass

    def elapsed_time(self, end):
        return float(end.at - self.at)


class FakeStream:
    def wait_stream(self, other):
        pass


def test_what_the_clock_asks_of_a_device(bench, monkeypatch):
    cuda = {"CUDAGraph": FakeGraph, "Event": FakeEvent, "Stream": FakeStream, "current_stream": FakeStream}
    cuda |= {"graph": contextlib.nullcontext, "stream": contextlib.nullcontext, "synchronize": lambda: None}
    cuda |= {"get_device_properties": lambda: SimpleNamespace(L2_cache_size=20_000)}
    for name, fake in cuda.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    clock, case = GraphClock(), bench.skip(4, 16, 6)
    assert 2 < clock.copies(case.ours) < 96 and clock.copies(Call(lambda: None)) == 96
    calls = {"effkern": case.ours, "other": case.peers["contiguous"], "broken": Call(lambda: 1 / 0)}
    for cold, each in ((False, 1000.0), (True, 1000.0 / clock.copies(case.ours))):
        found = clock.contest(calls, cold)
        assert found.keys() == calls.keys() and found["broken"].startswith("no graph: ZeroDivisionError")
        assert found["effkern"] == Timing(pytest.approx(each), pytest.approx(each))
    assert clock.eager(case.ours) > 0


@pytest.fixture
def on_the_cpu(monkeypatch):
    """What a process calls of a device, on the CPU."""
    made = gpu.bench_of
    monkeypatch.setattr(gpu, "bench_of", lambda job: made(job, "cpu", small=True))
    monkeypatch.setattr(gpu, "GraphClock", HostClock)
    for name in ("synchronize", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    for name in ("start", "stop"):
        monkeypatch.setattr(torch.cuda.profiler, name, lambda: None)
    monkeypatch.setattr(torch, "compile", plain_compile)


NAMES = ["rep_conv2d 64->64@56 n1", "rep_conv2d 256->256@14 n1"]


def test_a_process_says_what_it_begins_and_goes_on_behind_an_error(on_the_cpu, monkeypatch, capsys):
    make = gpu_cases.Ops.rep_conv
    monkeypatch.setattr(gpu_cases.Ops, "rep_conv", lambda self, n, c, *rest: make(self, n, c // (c - 64), *rest))
    gpu.worker("float16", NAMES, True, time.time() + 1000)
    said = [json.loads(line[len(gpu.MARK) :]) for line in capsys.readouterr().out.splitlines()]
    assert [row.get("begin") for row in said] == [NAMES[0], None, NAMES[1], None]
    assert said[1]["error"].startswith("ZeroDivisionError") and "compiled channels_last" in said[3]["times"]
    gpu.worker("float16", NAMES, True, time.time() - 1)
    assert not capsys.readouterr().out


def test_a_whole_run(on_the_cpu, monkeypatch, tmp_path, capsys):
    def process(command, env, patience):
        options = gpu.arguments(command[3:])
        if options.names == ["machine"]:
            return iter(
                [gpu.MARK + json.dumps(row) for row in ({"begin": "machine"}, {"machine": {"device": "a card"}})]
            )
        gpu.worker(options.worker, options.names, not options.no_compile, options.until)
        return iter(capsys.readouterr().out.splitlines())

    monkeypatch.setattr(gpu, "lines_of", process)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu, "terminal", lambda results: f"{len(results['rows'])} rows")
    out, only = tmp_path / "gpu.json", [part for name in NAMES for part in ("--only", name)]
    assert gpu.main(["--out", str(out), "--jobs", "float16", "bfloat16", "--limit", "1000", *only]) == 0
    results = gpu.load(out)
    cases = [(row["dtype"], row["case"]) for row in results["rows"]]
    assert cases == [("float16", NAMES[0]), ("float16", NAMES[1]), ("bfloat16", NAMES[1])]
    assert capsys.readouterr().out.endswith("3 rows\n") and results["machine"] == {"device": "a card"}


def test_a_profiler_gets_one_case(on_the_cpu):
    assert gpu.profile("float16", NAMES[1], "channels_last") == 0
    with pytest.raises(KeyError):
        gpu.profile("float16", NAMES[1], "nobody")
