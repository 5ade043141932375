"""The Triton twins without a GPU: their source in Triton's interpreter, and compiled for GPUs that are not there.

`python -m tests.gpu.proof_triton` from the root rewrites the table of resources after a deliberate change.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.gpu import toolkit
from tests.gpu.counts import COUNTS
from tests.gpu.harness import WORKERS, chosen
from tests.native.package import CHECKOUT
from tests.ops.catalog import every_sample

triton: Any = pytest.importorskip("triton", reason="triton cannot be imported: pip install triton")

RESOURCES = Path(__file__).with_name("triton_resources.json")
BUILD = CHECKOUT / "build" / "gpu-proof"
#: Ops with a twin, by family. One that is lost would otherwise go unseen.
FAMILIES = {
    "rep_conv": ("rep_conv2d",),
    "sliced_conv": ("sliced_conv2d", "sliced_conv2d_ragged", "sliced_linear", "sliced_linear_ragged"),
    "block_skip": ("compact", "skip_basic_block", "skip_bottleneck"),
    "pq": ("pq_conv2d", "pq_decode", "pq_embedding", "pq_embedding_bag", "pq_linear"),
    "multi_branch_bn": ("multi_branch_bn_add_relu", "multi_branch_bn_add_relu_backward"),
}
DTYPES = ("float32", "bfloat16", "float16")
#: What 16-bit products of the implicit GEMM are: instructions of a warp, of a warp group, with tensor memory.
PRODUCTS = {"80": "HMMA", "90": "HGMMA", "100": "UTCHMMA"}


def interpret(*arguments: str) -> str:
    """Output of the interpreter's process; a failed check or a crash fails the test and is named by it."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(CHECKOUT)}
    command = [sys.executable, "-X", "faulthandler", "-m", "tests.gpu.triton_interpreter", *arguments]
    run = subprocess.run(command, capture_output=True, text=True, cwd=CHECKOUT, env=environment)
    assert run.returncode == 0, f"exit status {run.returncode}\n{run.stdout[-6000:]}\n{run.stderr[-3000:]}"
    return run.stdout


def arguments(family: str, dtype: str) -> tuple[str, ...]:
    return "-d", dtype, *(key for key in every_sample() if key.split("/")[0] in FAMILIES[family])


#: What the interpreter runs, one process each.
RUNS = {f"{family} {dtype}": arguments(family, dtype) for family in FAMILIES for dtype in DTYPES}
RUNS |= {case: ("--random", case) for case in ("ragged", "skip", "ranges", "strides", "norms")}


@pytest.fixture(scope="module")
def runs(request) -> Iterator[dict[str, Future[str]]]:
    """Of the chosen tests, on all processors at once."""
    with ThreadPoolExecutor(WORKERS) as pool:
        started = {name: pool.submit(interpret, *RUNS[name]) for name in chosen(request, "interpreted")}
        yield started
    said = [run.result() for run in started.values() if run.exception() is None]
    launches = sum(int(re.search(r"(\d+) launches", text)[1]) for text in said)
    COUNTS["interpreter"] = f"{launches} launches in Triton's interpreter"


def test_the_twins_are_there():
    from effkern.ops import _backend
    from effkern.ops._registry import OPS

    assert {n for n, op in OPS.items() if _backend.twin(op) is not None} == {n for f in FAMILIES.values() for n in f}


@pytest.mark.parametrize("interpreted", RUNS)
def test_values_in_the_interpreter(runs, interpreted):
    print(runs[interpreted].result().splitlines()[-1])


def measure(folder: Path) -> dict[str, dict[str, dict[str, Any]]]:
    """Kernel -> target -> what was compiled."""
    from tests.gpu.triton_cases import CASES
    from tests.gpu.triton_compile import ARCHS, compiled, launches_of

    found: dict[str, dict[str, dict[str, Any]]] = {}
    tool = toolkit.cuobjdump()
    assert tool is not None
    for name, call in CASES.items():
        launches = launches_of(call)
        for number, launch in enumerate(launches):
            key = name if len(launches) == 1 else f"{name} {number}"
            facts = {str(arch): compiled(launch, arch, tool, folder).facts() for arch in ARCHS}
            found[f"{launch.kernel.__name__}: {key}"] = facts
    return found


@pytest.fixture(scope="module")
def kernels(tmp_path_factory) -> dict[str, dict[str, dict[str, Any]]]:
    if toolkit.cuobjdump() is None:
        pytest.skip("no cuobjdump: it comes with triton")
    found = measure(tmp_path_factory.mktemp("triton"))
    BUILD.mkdir(parents=True, exist_ok=True)
    (BUILD / "triton.md").write_text(markdown(found))
    print("\n" + markdown(found))
    COUNTS["triton"] = f"{len(found)} Triton kernels compiled for {len(PRODUCTS)} targets"
    return found


def each(kernels: dict[str, dict[str, dict[str, Any]]]):
    return ((name, arch, facts) for name, archs in kernels.items() for arch, facts in archs.items())


def markdown(kernels: dict[str, dict[str, dict[str, Any]]]) -> str:
    rows = ["| kernel | target | registers | spills | shared | products |", "|---|---|---|---|---|---|"]
    for name, arch, f in each(kernels):
        rows.append(
            f"| {name} | sm_{arch} | {f['registers']} | {f['local']} | {f['shared']} | {f['tensor'] or 'FFMA'} |"
        )
    return "\n".join([*rows, ""])


def test_nothing_spills(kernels):
    found = [(name, arch) for name, arch, facts in each(kernels) if facts["local"]]
    if found and triton.__version__ != (known := json.loads(RESOURCES.read_text())["triton"]):
        pytest.skip(f"tiles were chosen with triton {known}, {triton.__version__} spills in {found}")
    assert not found


def test_accesses_are_16_bytes_wide(kernels):
    """Those of activations and outputs; lists, codes and masks are what they are."""
    wide = (
        "conv_kernel",
        "depthwise_kernel",
        "lookup_kernel",
        "apply_kernel",
        "stats_kernel",
        "dx_kernel",
        "sums_kernel",
    )
    found = [(n, a, f) for n, a, f in each(kernels) if n.startswith(wide)]
    assert not [(n, a) for n, a, f in found if not f["wide_stores"] and not n.startswith(("stats", "sums"))]
    assert not [(n, a) for n, a, f in found if not f["wide_loads"] and not n.startswith("lookup_kernel")]


def test_products_run_on_tensor_cores(kernels):
    found = [(n, a, f) for n, a, f in each(kernels) if n.startswith("conv_kernel") and not n.endswith("fp32")]
    assert found
    assert not [(n, a, f["tensor"]) for n, a, f in found if f["tensor"] != PRODUCTS[a]]


def test_shared_memory_fits_the_smallest_part(kernels):
    assert not [(n, a) for n, a, f in each(kernels) if a == "80" and f["shared"] > 99 << 10]  # of sm_86 and sm_89


def test_resources_are_those_of_the_table(kernels):
    table = json.loads(RESOURCES.read_text())
    if triton.__version__ != table["triton"]:
        pytest.skip(f"the table was made by triton {table['triton']}, this is {triton.__version__}")
    assert kernels == table["kernels"], "rewrite the table by `python -m tests.gpu.proof_triton` if this is meant"


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        table = {"triton": triton.__version__, "kernels": measure(Path(folder))}
    RESOURCES.write_text(json.dumps(table, indent=1) + "\n")
    print(markdown(table["kernels"]), file=sys.stderr)


if __name__ == "__main__":
    main()
