"""The C++ tests of the engine, built by g++ alone and run under sanitizers."""

from __future__ import annotations

import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.native.package import CHECKOUT

FLAGS = ("-std=c++20", "-O1", "-g1", "-Wall", "-Wextra", "-Werror", "-Wno-psabi", "-ffp-contract=fast")
# The files that know no torch, the engine's besides.
PLAIN = ("common/cpu.cpp", "common/parallel.cpp")
PLAIN_PQ = ("decode", "dots", "lut", "choose", "kernels*")
PLAIN_BN = ("access", "bn", "kernels*")


def build(folder: Path, sanitizers: str, tests: str) -> Path:
    csrc = CHECKOUT / "csrc"
    own = [*csrc.glob(f"tests/{tests}.cpp"), csrc / "tests" / "main.cpp"]
    sources = [
        *own,
        *(p for p in csrc.glob("conv/*.cpp") if not p.stem.endswith("_cuda")),
        *(csrc / name for name in PLAIN),
    ]
    sources += [path for path in csrc.glob("conv_backward/*.cpp") if not path.stem.endswith(("_cpu", "_cuda"))]
    sources += [path for name in PLAIN_PQ for path in csrc.glob(f"pq/{name}.cpp")]
    sources += [path for name in PLAIN_BN for path in csrc.glob(f"multi_branch_bn/{name}.cpp")]
    flags = (*FLAGS, f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all")

    def compile_one(source: Path) -> Path:
        target = folder / f"{source.parent.name}_{source.stem}.o"
        subprocess.run([os.environ.get("CXX", "g++"), *flags, "-c", source, "-o", target], check=True)
        return target

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        objects = list(pool.map(compile_one, sources))
    program = folder / "tests"
    subprocess.run([os.environ.get("CXX", "g++"), *flags, *objects, "-o", program, "-pthread"], check=True)
    return program


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sanitizers", "files", "tests"),
    [("address,undefined", "test_*", ""), *(("thread", f"test_{f}", "threads") for f in ("conv*", "pq", "multi_*"))],
)
def test_the_engine_under_sanitizers(tmp_path, sanitizers, files, tests):
    program = build(tmp_path, sanitizers, files)
    run = subprocess.run([program, tests], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert ", 0 failed checks" in run.stdout
