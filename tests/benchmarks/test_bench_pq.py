"""The benchmark of the pq ops runs, and checks what it times."""

import torch

from benchmarks.bench_pq import run
from benchmarks.common import main
from benchmarks.memory import measure


def test_quick(tmp_path):
    out = str(tmp_path / "r.json")
    bench = main("pq", run, ["--quick", "--out", out, "--peers", "eager_contiguous", "--cases", "^pq_"])
    assert {row["op"] for row in bench.rows} == {"pq_conv2d", "pq_linear", "pq_embedding"}
    assert {"effkern", "eager_decode_per_call", "eager_contiguous"} <= {row["impl"] for row in bench.rows}
    assert (tmp_path / "r.json").exists()


def test_codes_take_less_memory_and_nothing_is_kept_beside_them():
    threads = torch.get_num_threads()
    try:
        dense, codes = measure("resnet18", "dense"), measure("resnet18", "codes")
    finally:
        torch.set_num_threads(threads)
    assert dense["tensor_bytes"] > 10 * codes["tensor_bytes"]
    # A cache of decoded weights would be as large as the dense network.
    assert codes["resident_bytes"] - codes["tensor_bytes"] < dense["tensor_bytes"] / 4
