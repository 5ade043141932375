"""The Triton twins: how they are chosen, and the part of their proof that takes seconds. `make test-gpu-proof` runs
the rest (proof_triton.py)."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys

import pytest

from effkern.ops import _backend, backend
from tests.gpu import toolkit
from tests.native.package import CHECKOUT, python

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton cannot be imported: pip install triton"
)
SMOKE = (
    "rep_conv2d/3x3_residual", "rep_conv2d/depthwise", "sliced_conv2d/3x3_slice_epilogue",
    "sliced_conv2d_ragged/ragged_tables", "skip_basic_block/soft", "pq_linear/linear_three_dims_two_stages",
    "pq_embedding_bag/bag_mean", "multi_branch_bn_add_relu/two_branches",
)  # fmt: skip
CHOICE = """
import torch
from effkern.ops import _backend, backend
from tests.gpu import triton_numpy
triton_numpy.mend()
_backend.route("CPU")
op = torch.ops.effkern.sliced_linear
x, w = torch.randn(3, 40), torch.randn(50, 40, requires_grad=True)
native = op(x, w, None, 50, None, None, "relu", "auto")
with backend("triton"):
    assert _backend.chosen() == "triton"
    twin = op(x, w, None, 50, None, None, "relu", "auto")
    {raising}
assert _backend.chosen() == "cuda"
assert torch.equal(op(x, w, None, 50, None, None, "relu", "auto"), native)
torch.testing.assert_close(twin, native)
assert not torch.equal(twin, native), "the twin was not called"
twin.sum().backward()
assert w.grad is not None
"""


@needs_triton
def test_the_twin_is_called_where_it_is_asked_for():
    raising = "assert torch.ops.effkern.rep_conv2d_packed  # without a twin: stays with the library"
    run = python("-c", CHOICE.format(raising=raising), path=CHECKOUT, TRITON_INTERPRET="1")
    assert run.returncode == 0, run.stderr
    assert "Warning" not in run.stderr


@needs_triton
def test_the_environment_chooses():
    code = "from effkern.ops import _backend; print(_backend.chosen(), sorted(_backend._routed))"
    assert python("-c", code).stdout.split() == ["cuda", "[]"]
    assert python("-c", code, EFFKERN_BACKEND="triton").stdout.split() == ["triton", "['CUDA']"]


def test_other_names_are_refused():
    with pytest.raises(ValueError, match=r"must be one of cuda, triton, got 'opencl'"), backend("opencl"):
        pass
    run = python("-c", "import effkern", EFFKERN_BACKEND="opencl")
    assert "EFFKERN_BACKEND must be one of cuda, triton, got 'opencl'" in run.stderr


def test_without_triton_only_who_asks_is_told():
    hidden = "import sys; sys.modules['triton'] = None; from effkern.ops import backend\n"
    run = python("-c", hidden + "with backend('cuda'): pass\nwith backend('triton'): pass")
    assert "ImportError: the Triton kernels were asked for" in run.stderr
    run = python("-c", hidden + "import effkern.ops")
    assert run.returncode == 0, run.stderr


def test_importing_the_package_leaves_triton_alone():
    run = python("-c", "import sys, effkern.ops; print('triton' in sys.modules)")
    assert run.stdout.strip() == "False" or "triton" in _imported_by_torch()


def _imported_by_torch() -> str:
    return python("-c", "import sys, torch; print('triton' if 'triton' in sys.modules else '')").stdout


def interpreted(*arguments: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(CHECKOUT)}
    command = [sys.executable, "-m", "tests.gpu.triton_interpreter", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=CHECKOUT, env=environment)


@needs_triton
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_twins_in_the_interpreter(dtype):
    run = interpreted("-d", dtype, *SMOKE)
    assert run.returncode == 0, run.stdout + run.stderr


@needs_triton
def test_the_interpreters_conditions_show_mistakes():
    run = interpreted("--mistakes")
    assert run.returncode == 0, run.stderr
    found = run.stdout.splitlines()
    for side in ("end", "start"):  # an access outside meets the page that may not be touched
        assert f"{side}: exit status {-signal.SIGSEGV}" in found, run.stdout
    for name, said in (("gap", "NaN of a gap"), ("write", "between the elements"), ("order", "order of the programs")):
        assert f"{name}: exit status 1" in found and said in run.stdout, run.stdout


@needs_triton
@pytest.mark.skipif(toolkit.cuobjdump() is None, reason="no cuobjdump: it comes with triton")
def test_a_kernel_compiles_for_a_gpu_that_is_not_there(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    from tests.gpu.triton_cases import CASES
    from tests.gpu.triton_compile import compiled, launches_of

    (launch,) = launches_of(CASES["conv 32 fp16"])
    facts = compiled(launch, 80, toolkit.cuobjdump(), tmp_path).facts()
    assert facts["tensor"] == "HMMA" and facts["local"] == 0
    assert facts["wide_loads"] and facts["wide_stores"]


def test_every_twin_is_found_by_its_ops_name():
    found = {path.parent.name for path in (CHECKOUT / "effkern" / "ops").glob("*/triton.py")}
    assert found >= {"rep_conv", "sliced_conv", "block_skip", "pq"}
    assert _backend.BACKENDS == ("cuda", "triton")
