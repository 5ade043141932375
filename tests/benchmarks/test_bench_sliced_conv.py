"""The benchmark of sliced convolution runs, checks what it times, and counts what is left to do."""

import torch

from benchmarks.bench_sliced_conv import DRAWS, LAYERS, MIXED, draw, run
from benchmarks.common import main


def test_quick(tmp_path):
    bench = main(
        "sliced_conv", run, ["--quick", "--out", str(tmp_path / "r.json"), "--peers", "eager_channels_last,loop,masked"]
    )
    mixed = [row for row in bench.rows if row["op"] == "sliced_conv2d_ragged"]
    uniform = [row for row in bench.rows if row["op"] == "sliced_conv2d"]
    assert {row["impl"] for row in uniform} == {"effkern", "effkern, all", "eager_channels_last"}
    masked = {"masked_contiguous", "masked_channels_last"}
    assert {row["impl"] for row in mixed} == {"effkern", "effkern, all", "loop", *masked}
    assert {row["macs_left"] for row in uniform} == {0.25, 0.5}  # dense and depthwise at half the width
    assert {row["draw"] for row in mixed} == set(DRAWS)
    assert {row["macs_left"] for row in mixed if row["draw"] == "single"} == {0.25}
    assert all(row["time_left"] > 0 for row in bench.rows)


def test_draws_keep_their_shares():
    assert draw("even", 32).bincount().tolist() == [8, 8, 8, 8]
    assert draw("skewed", 32).bincount().tolist() == [20, 8, 4]
    assert draw("single", 8).bincount().tolist() == [0, 8]


def test_cases_have_names_of_their_own_and_whole_channels():
    assert len({layer.name for layer in LAYERS}) == len(LAYERS)
    for layer in (*LAYERS, *MIXED):
        assert torch.tensor(layer.widths).diff(dim=0).min() > 0 and layer.macs(*layer.widths[0]) > 0
