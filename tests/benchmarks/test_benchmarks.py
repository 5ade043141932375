"""The benchmarks run (``--quick``), refuse wrong kernels, name what is missing, can be drawn. Nothing is timed here."""

from __future__ import annotations

import csv
import importlib
import json
from pathlib import Path

import pytest
import torch

from benchmarks import plot
from benchmarks.common import Bench, main
from benchmarks.peers import CONV_PEERS, MODULE_PEERS, ConvLayer, conv_peers, module_peers
from benchmarks.timing import fma_peak, interleave

FILES = sorted(Path(plot.__file__).parent.glob("bench_*.py"))
TORCH_PEERS = "eager_contiguous,eager_channels_last,mkldnn_prepacked"


def test_there_is_one_file_for_each_family():
    assert {p.stem for p in FILES} >= {"bench_sliced_conv", "bench_block_skip", "bench_pq", "bench_rep_conv"}


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_quick_run(path, tmp_path, capsys):
    module, name = importlib.import_module(f"benchmarks.{path.stem}"), path.stem.removeprefix("bench_")
    main(name, module.run, ["--quick", "--out", str(tmp_path), "--peers", TORCH_PEERS])
    with (tmp_path / f"{name}.csv").open(newline="") as table:
        rows = list(csv.DictReader(table))
    assert rows and all(float(row["median_us"]) >= float(row["min_us"]) > 0 for row in rows)
    assert any(row["contender"].startswith("effkern") for row in rows)
    report = json.loads((tmp_path / f"{name}.json").read_text())
    assert len(report["rows"]) == len(rows) and report["machine"]["cpu"]
    assert plot.main([str(tmp_path)])


def layer() -> tuple[ConvLayer, torch.Tensor]:
    return ConvLayer(torch.randn(8, 4, 3, 3), torch.randn(8), padding=1, act="relu"), torch.randn(2, 4, 6, 6)


def test_every_peer_is_timed_or_named(tmp_path):
    def run(bench: Bench) -> None:
        conv, x = layer()
        calls = conv_peers(bench, conv, x, torch.randn(2, 8, 6, 6))
        assert set(calls) | set(bench.missing) == set(MODULE_PEERS) | set(CONV_PEERS)
        bench.compare(op="conv", case="small", batch=2, contenders=calls, exact=None, macs=1e6)

    bench = main("peers", run, ["--quick", "--out", str(tmp_path)])
    assert {"eager_contiguous", "eager_channels_last"} <= {row["contender"] for row in bench.rows}
    assert all(bench.missing.values())


def test_a_whole_network_goes_to_the_module_peers(tmp_path):
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(64, 5))

    def run(bench: Bench) -> None:
        x = torch.randn(2, 3, 6, 6)
        calls = module_peers(bench, net, x)
        bench.compare(op="net", case="tiny", batch=2, contenders=calls, exact=net.double()(x.double()))

    assert len(main("net", run, ["--quick", "--out", str(tmp_path), "--peers", TORCH_PEERS]).rows) == 2


def test_a_wrong_kernel_has_no_speed(tmp_path):
    def run(bench: Bench) -> None:
        conv, x = layer()
        wrong = {"eager": lambda: conv(x), "effkern": lambda: conv(x) + 1e-3}
        bench.compare(op="conv", case="wrong", batch=2, contenders=wrong, exact=conv(x).double(), allowed=1e-5)

    with pytest.raises(AssertionError, match="effkern is off by"):
        main("wrong", run, ["--quick", "--out", str(tmp_path)])
    assert not list(tmp_path.iterdir())


def test_a_wrong_peer_is_named_and_not_timed(tmp_path):
    def run(bench: Bench) -> None:
        conv, x = layer()
        calls = {"effkern": lambda: conv(x), "peer": lambda: conv(x) * 1.5}
        bench.compare(op="conv", case="c", batch=2, contenders=calls, exact=conv(x).double(), allowed=1e-4)

    bench = main("peer", run, ["--quick", "--out", str(tmp_path)])
    assert [row["contender"] for row in bench.rows] == ["effkern"]
    assert "wrong result" in bench.missing["peer (conv/c)"]


def test_rows_are_appended_and_of_each_the_last_is_drawn(tmp_path):
    def run(bench: Bench) -> None:
        conv, x = layer()
        bench.compare(
            op="conv", case="c", batch=2, contenders={"effkern": lambda: conv(x)}, macs=10, extra=bench.threads
        )

    for _ in range(2):
        main("twice", run, ["--quick", "--out", str(tmp_path), "--threads", "1", "2"])
    with (tmp_path / "twice.csv").open(newline="") as table:
        assert [row["threads"] for row in csv.DictReader(table)] == ["1", "2", "1", "2"]
    assert len(plot.latest(tmp_path / "twice.csv")) == 2


def test_the_clock_calls_contenders_in_turn():
    order = []
    times = interleave({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, seconds=0, rounds=4, slice_s=0)
    assert all(t.rounds == 4 and t.minimum <= t.lower <= t.median <= t.upper for t in times.values())
    assert "".join(order[-8:]) == "abbaabba"


def test_the_peak_is_a_speed():
    assert fma_peak(0.01) > 0.1
