"""The benchmark of the pq ops runs, and checks what it times."""

from benchmarks.bench_pq import run
from benchmarks.common import main


def test_quick(tmp_path):
    bench = main("pq", run, ["--quick", "--out", str(tmp_path), "--peers", "eager_contiguous"])
    assert {row["op"] for row in bench.rows} == {"pq_conv2d", "pq_linear", "pq_embedding"}
    assert {"effkern", "eager_decode_per_call", "eager_contiguous"} <= {row["contender"] for row in bench.rows}
    assert (tmp_path / "pq.csv").exists() and (tmp_path / "pq.json").exists()
