"""The CUDA kernels' own source, run on the CPU: the part that takes seconds. `make test-gpu-proof` runs the rest."""

from __future__ import annotations

import subprocess

import pytest

from tests.gpu.harness import build

SMOKE = (
    "test_harness",
    "test_compact",
    "test_schedule",
    "test_depthwise",
    "test_lookup",
    "test_decode",
    "test_dots",
    "test_stage",
    "test_backward",
    "test_wgrad_smoke",
    "test_block_grad",
    "test_ragged_grad",
    "test_book_grad",
    "test_bn",
    "test_conv_smoke",
)


@pytest.mark.slow
def test_kernels_in_the_harness(tmp_path):
    program = build(tmp_path, SMOKE, "-O1")
    run = subprocess.run([program], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert ", 0 failed checks" in run.stdout
