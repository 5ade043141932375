"""The benchmarks run (``--quick``), refuse wrong kernels, name what is missing, can be drawn. Nothing is timed here."""

from __future__ import annotations

import importlib
import json
import time
from pathlib import Path

import pytest
import torch

from benchmarks import plot, results, run_all
from benchmarks.common import Bench, main
from benchmarks.layer import ConvLayer
from benchmarks.networks import for_peers
from benchmarks.peers import CONV_PEERS, MODULE_PEERS, _within, conv_peers, module_peers
from benchmarks.timing import Contender, fma_peak, interleave

FILES = sorted(Path(plot.__file__).parent.glob("bench_*.py"))
TORCH_PEERS = "eager_contiguous,eager_channels_last,mkldnn_prepacked"
#: Rows every family has, with the key of the file's format.
KEYS = {"family", "case", "batch", "threads", "impl", "median_ms", "min_ms", "gflops", "correct_error"}


def test_every_family_is_planned_and_all_fit_their_time():
    planned = {family.name for family in run_all.PLAN}
    assert {path.stem.removeprefix("bench_") for path in FILES} <= planned
    assert sum(family.minutes for family in run_all.PLAN) <= 40


SLOW = {"bench_pq"}  # starts two processes more
RUNS = [pytest.param(p, id=p.stem, marks=[pytest.mark.slow] if p.stem in SLOW else []) for p in FILES]


@pytest.mark.parametrize("path", RUNS)
def test_quick_run(path, tmp_path):
    module, name = importlib.import_module(f"benchmarks.{path.stem}"), path.stem.removeprefix("bench_")
    file = tmp_path / "cpu.json"
    main(name, module.run, ["--quick", "--threads", "1", "--out", str(file), "--peers", TORCH_PEERS])
    found = results.load(file)
    timed = [row for row in found["rows"] if row["median_ms"] is not None]
    assert timed and all(row["median_ms"] >= row["min_ms"] > 0 for row in timed)
    assert all(row["family"] == name and set(row) >= KEYS for row in found["rows"])
    assert all(row["correct_error"] < 1e-3 for row in timed if results.is_ours(row))
    assert any(results.is_ours(row) for row in timed) or "effkern" in found["runs"][name]["missing"]
    assert found["runs"][name]["machine"]["cpu"] and found["runs"][name]["quick"]
    plot.main([str(file)])


def layer() -> tuple[ConvLayer, torch.Tensor]:
    return ConvLayer(torch.randn(8, 4, 3, 3), torch.randn(8), padding=1, act="relu"), torch.randn(2, 4, 6, 6)


def test_every_peer_is_timed_or_named(tmp_path):
    def run(bench: Bench) -> None:
        conv, x = layer()
        x = x.contiguous(memory_format=torch.channels_last)
        calls = conv_peers(bench, conv, x, torch.randn(2, 8, 6, 6))
        assert set(calls) | set(bench.missing) == set(MODULE_PEERS) | set(CONV_PEERS)
        bench.compare(op="conv", case="small", batch=2, contenders=calls, exact=None, macs=1e6)

    bench = main("peers", run, ["--quick", "--out", str(tmp_path / "r.json")])
    assert {"eager_contiguous", "eager_channels_last"} <= {row["impl"] for row in bench.rows}
    assert all(bench.missing.values()) and not any("wrong result" in why for why in bench.missing.values())


def test_a_whole_network_goes_to_the_module_peers(tmp_path):
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(64, 5))

    def run(bench: Bench) -> None:
        x = torch.randn(2, 3, 6, 6)
        calls = module_peers(bench, net, x)
        bench.compare(op="net", case="tiny", batch=2, contenders=calls, exact=net.double()(x.double()))

    rows = main("net", run, ["--quick", "--out", str(tmp_path / "r.json"), "--peers", TORCH_PEERS]).rows
    assert {row["impl"] for row in rows} == set(TORCH_PEERS.split(","))


def test_what_the_peers_are_given_is_the_network():
    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4)
            self.norm.running_mean.uniform_()
            self.norm.running_var.uniform_(0.5, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.norm(self.conv(x)).relu().mean((2, 3))

    net, x = Net().eval().double(), torch.randn(2, 3, 6, 6).double()
    plain = for_peers(net)
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in plain.modules())
    torch.testing.assert_close(plain(x), net(x))


def test_a_wrong_kernel_has_no_speed(tmp_path):
    def run(bench: Bench) -> None:
        conv, x = layer()
        wrong = {"eager": lambda: conv(x), "effkern": lambda: conv(x) + 1e-3}
        bench.compare(op="conv", case="wrong", batch=2, contenders=wrong, exact=conv(x).double(), allowed=1e-5)

    with pytest.raises(AssertionError, match="effkern is off by"):
        main("wrong", run, ["--quick", "--out", str(tmp_path / "r.json")])
    assert not list(tmp_path.iterdir())


def test_a_wrong_peer_is_named_and_not_timed(tmp_path):
    def run(bench: Bench) -> None:
        conv, x = layer()
        calls = {"effkern": lambda: conv(x), "peer": lambda: conv(x) * 1.5}
        bench.compare(op="conv", case="c", batch=2, contenders=calls, exact=conv(x).double(), allowed=1e-4)

    bench = main("peer", run, ["--quick", "--out", str(tmp_path / "r.json")])
    assert [row["impl"] for row in bench.rows] == ["effkern"]
    assert "wrong result" in bench.missing["peer (conv/c)"]


def test_a_peer_that_takes_too_long_is_given_up(monkeypatch):
    with pytest.raises(Exception, match="took longer than 1 s"), _within(1):
        time.sleep(10)


def test_a_run_replaces_its_family_and_only_cases_only_those(tmp_path):
    file = tmp_path / "r.json"

    def run(bench: Bench) -> None:
        conv, x = layer()
        for case in ("a", "b"):
            bench.compare(op="conv", case=case, batch=2, contenders={"effkern": lambda: conv(x)}, macs=10)

    for name in ("one", "two", "one"):
        main(name, run, ["--quick", "--out", str(file), "--threads", "1", "2"])
    assert len(results.load(file)["rows"]) == 8
    main("one", run, ["--quick", "--out", str(file), "--cases", "/b$"])
    found = results.load(file)
    assert len(found["rows"]) == 8 and found["runs"]["one"]["partial"] and not found["runs"]["two"]["partial"]


def test_the_clock_calls_contenders_in_turn():
    order: list[str] = []
    calls = {"a": lambda: order.append("a"), "b": lambda: order.append("b")}
    times = interleave(calls, seconds=0, rounds=4, slice_s=0)
    assert all(t.rounds == 4 and t.minimum <= t.lower <= t.median <= t.upper for t in times.values())
    assert "".join(order[-16:]) == "aabbbbaaaabbbbaa"  # one call to warm up, one on the clock


def test_the_hopeless_leave_an_expensive_contest_early_and_the_judged_stay():
    calls = {"ours": lambda: time.sleep(0.05), "fast": lambda: time.sleep(0.001), "slow": lambda: time.sleep(0.05)}
    times = interleave(calls, seconds=0, rounds=4, slice_s=0, judged={"ours"})
    assert {name: t.rounds for name, t in times.items()} == {"ours": 4, "fast": 4, "slow": 3}


def test_a_contender_reads_its_output_off_the_clock_and_sets_its_threads():
    seen: list[int] = []
    before = torch.get_num_threads()
    contender = Contender(lambda: seen.append(torch.get_num_threads()), lambda _: 7, threads=2)
    interleave({"a": contender}, seconds=0, rounds=2)
    assert set(seen) == {2} and torch.get_num_threads() == before and contender() == 7


def test_the_peak_is_a_speed():
    assert fma_peak(0.01) > 0.1


def test_only_names_families(capsys):
    assert run_all.main(["--plan", "--only", "pq,overhead"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["pq", "overhead", "together"]
    with pytest.raises(SystemExit, match="no family nonsense"):
        run_all.main(["--only", "nonsense"])


def test_run_all_goes_on_after_a_failure_and_draws(tmp_path, monkeypatch, capsys):
    def run(command, cwd):
        class Done:
            returncode = int("bench_pq" in command[2])

        file = Path(command[command.index("--out") + 1])
        if not Done.returncode:
            save = {"machine": {"cpu": "x", "isa": "y"}, "date": "2026-01-01", "missing": {}}
            results.save(file, results.merge(results.load(file), command[2].partition("bench_")[2], save, []))
        return Done

    monkeypatch.setattr(run_all.subprocess, "run", run)
    file = tmp_path / "r.json"
    assert run_all.main(["--only", "pq,overhead", "--out", str(file)]) == 1
    assert list(json.loads(file.read_text())["runs"]) == ["overhead"]
    assert "failed: pq" in capsys.readouterr().err
