"""The benchmark for a GPU, all of its code but events and graphs, on the CPU at small shapes."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import gpu


@pytest.fixture
def bench() -> gpu.Bench:
    return gpu.Bench("cpu", torch.float32, small=True)


def test_every_peer_gives_the_values_of_the_op(bench):
    with torch.no_grad():
        rows = list(gpu.measure(bench, gpu.host_us, lambda call: torch.compile(call, backend="eager")))
    assert len({row["case"] for row in rows}) == len(rows)
    named = {name for row in rows for name in row["peers_us"]}
    assert named == {
        "channels_last", "contiguous", "compiled channels_last", "masked", "compiled masked", "grouped_mm", "dense",
        "decoded", "compiled decoded",
    }  # fmt: skip
    assert all("best peer" in gpu.line(row) for row in rows)
    assert json.loads(json.dumps(rows)) == rows


def test_a_peer_that_does_other_work_is_not_timed(bench):
    case = bench.rep_conv(1, 8, 6, 8)
    gpu.compare(case, bench.dtype)
    wrong = case._replace(peers=case.peers | {"wrong": lambda: case.ours() * 1.001})
    with pytest.raises(ValueError, match="wrong gives"):
        gpu.compare(wrong, bench.dtype)


def test_16_bit_values_are_close(bench):
    half = gpu.Bench("cpu", torch.float16, small=True)
    with torch.no_grad():
        for case in half.cases():
            gpu.compare(case, half.dtype)
