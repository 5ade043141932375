"""The sweep over tiles, on the CPU: that every way runs the same convolution, and what is said of it."""

from __future__ import annotations

import os

import pytest
import torch

from benchmarks import gpu_sweep
from benchmarks.gpu_cases import Bench, difference
from benchmarks.gpu_timing import HostClock


@pytest.mark.parametrize("shape", gpu_sweep.SHAPES[-4:], ids=lambda shape: shape.name)
def test_every_way_is_the_same_convolution(shape):
    bench = Bench("cpu", torch.float32, small=True)
    calls = gpu_sweep.contenders(bench, shape, triton=False)
    assert list(calls) == [*gpu_sweep.TILES, "cudnn"]
    want = calls["auto"].value()
    assert all(difference(call.value(), want) < 1e-5 for call in calls.values())
    assert gpu_sweep.SWITCH not in os.environ
    found = gpu_sweep.swept(bench, shape, HostClock(), triton=False)
    assert {name for name, _ in found} == set(calls) and found == sorted(found, key=lambda pair: pair[1])


def test_a_report_has_the_fastest_first_and_what_failed():
    found = [("small", 1.0), ("large", 2.5), ("triton 128 256 8 3", "no graph: OutOfResources")]
    text = gpu_sweep.report(gpu_sweep.SHAPES[0], found).splitlines()
    assert text[0].split() == ["3x3", "64->64@56", "n1", "small:", "1.00,", "large:", "2.50"]
    assert text[1] == "  triton 128 256 8 3: no graph: OutOfResources"


def test_names_are_of_one_shape_each():
    names = [shape.name for shape in gpu_sweep.SHAPES]
    assert not [a for a in names for b in names if a != b and a in b], "a process compiles what its shape's name is in"
