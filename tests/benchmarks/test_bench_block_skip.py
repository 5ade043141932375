"""The benchmark of block skipping runs, checks what it times, and counts what is left to do."""

from benchmarks.bench_block_skip import draw, run
from benchmarks.common import main


def test_quick(tmp_path):
    bench = main("block_skip", run, ["--quick", "--out", str(tmp_path / "r.json")])
    assert {row["op"] for row in bench.rows} == {"skip_basic_block", "skip_stage"}
    layouts = ("contiguous", "channels_last")
    peers = {f"{name}_{layout}" for name in ("masked", "gathered") for layout in layouts}
    assert {row["impl"] for row in bench.rows} == {"effkern", "effkern, all", *peers}
    assert not bench.missing
    blocks = [row for row in bench.rows if row["op"] == "skip_basic_block"]
    assert {(row["keep"], row["macs_left"]) for row in blocks} == {(0.0, 0.0), (0.5, 0.5)}
    assert all(row["time_left"] > 0 and row["min_time_left"] > 0 for row in bench.rows)


def test_masks_keep_the_exact_share_and_differ():
    masks = draw(0.25, 8, 4)
    assert all(mask.shape == (8, 4) and mask.sum() == 8 for mask in masks)
    assert len({tuple(mask.flatten().tolist()) for mask in masks}) > 1
