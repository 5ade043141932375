"""The host's side of the CUDA ops on a runtime that is not there, and `make gpu-check` as it is on the same device."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.gpu import stub
from tests.gpu.proof_host import OPS_ON_CUDA
from tests.native.package import CHECKOUT, python
from tests.ops.catalog import every_sample

#: One sample of each op: the values of the others are proof_host.py's matter.
ONE_EACH = sorted({key.split("/")[0]: key for key in every_sample() if key.split("/")[0] in OPS_ON_CUDA}.values())

GRAPH = "test_a_captured_graph_gives_the_same_bits"


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> Path:
    return stub.build(tmp_path_factory.mktemp("runtime"))


def run(library: Path, *arguments: str) -> str:
    """The last line of a run of pytest on the device, which must succeed and skip nothing."""
    done = python("-m", "tests.gpu.stub", str(library), *arguments, path=CHECKOUT, cwd=CHECKOUT, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    last = done.stdout.strip().splitlines()[-1]
    assert "passed" in last and "skipped" not in last, last
    return last


def test_the_host_path(library):
    print(f"\nhost path: {run(library, 'tests/gpu/host_path.py')}")


def test_the_module_path(library):
    print(f"\nmodules: {run(library, 'tests/gpu/module_path.py')}")


def test_gpu_check_runs_as_it_is(library):
    file = "tests/gpu/on_device.py"
    tests = [f"{file}::test_all_kernels_are_called", f"{file}::test_gradients_of_batch_norms"]
    for key in ONE_EACH:
        tests += [f"{file}::test_values[{key}-torch.float16]", f"{file}::{GRAPH}[{key}]"]
    print(f"\ngpu-check on the harness: {run(library, *tests)}")
