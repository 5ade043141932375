"""EFFKERN_ISA: every set this machine has passes the tests of the ops; one it lacks is an error, not a downgrade."""

from __future__ import annotations

import pytest

from tests.native.package import CHECKOUT, python

CALL = "import torch, effkern; effkern.ops.sliced_conv2d(torch.ones(1, 1, 1, 1), torch.ones(1, 1, 1, 1))"


def flags() -> set[str]:
    with open("/proc/cpuinfo") as lines:
        return set(next(line for line in lines if line.startswith("flags")).split())


def narrower() -> list[str]:
    return ["scalar", *(["avx2"] if {"avx2", "fma", "f16c"} <= flags() else [])]


def test_an_unknown_set_is_an_error(tmp_path):
    run = python("-c", CALL, cwd=tmp_path, EFFKERN_ISA="avx1024")
    assert run.returncode != 0
    assert "ValueError: instruction set must be scalar, avx2 or avx512, got 'avx1024'" in run.stderr


@pytest.mark.parametrize("isa", ["scalar", "avx2", "avx512"])
def test_a_set_is_used_or_refused(isa, tmp_path):
    has = {"scalar": set(), "avx2": {"avx2", "fma", "f16c"}, "avx512": {"avx512f", "avx512bw", "avx512vl", "avx512dq"}}
    run = python("-c", CALL, cwd=tmp_path, EFFKERN_ISA=isa)
    if has[isa] <= flags():
        assert run.returncode == 0, run.stderr
    else:
        assert run.returncode != 0 and f"this processor has no {isa}" in run.stderr


@pytest.mark.slow
@pytest.mark.parametrize("isa", narrower())
def test_the_ops_on_a_narrower_set(isa):
    """What a kernel can get wrong; registration, compilation and refusals are the same on every set."""
    chosen = "test_values or test_layouts or test_gradients or neighbours or threads or empty"
    where = ("tests/ops/test_every_op.py", "-k", chosen, "-m", "not slow", "-p", "no:cacheprovider")
    tests = python("-m", "pytest", "-q", *where, cwd=CHECKOUT, EFFKERN_ISA=isa, OMP_NUM_THREADS="1")
    assert tests.returncode == 0, tests.stdout[-4000:]
    assert " passed" in tests.stdout
