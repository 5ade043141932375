"""The CUDA ops' host code and kernels as one library for the CPU: checks, tensors, launches and kernels as they ship,
on the harness in place of a GPU. Its ops are `torch.ops.effkern_simt.*`, with the schemas of the real ones."""

from __future__ import annotations

import os
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from effkern.ops._registry import OPS
from tests.gpu.harness import MACHINE, WORKERS
from tests.native.package import CHECKOUT

NAMESPACE = "effkern_simt"
#: What is in _C_cuda.so beside kernels and `*_cuda.cpp` (setup.py).
SHARED = ("common/arguments.cpp", "sliced_conv/slice.cpp")
FLAGS = (
    "-std=c++20", "-O1", "-g1", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror", "-Wno-psabi",
    "-Wno-unknown-pragmas", "-DEFFKERN_SIMT", "-DTORCH_TARGET_VERSION=0x020a000000000000",
)  # fmt: skip


def sources() -> list[Path]:
    csrc = CHECKOUT / "csrc"
    kernels, host = csrc.glob("*/*.cu"), csrc.glob("**/*_cuda.cpp")
    machine = (csrc / "tests" / "simt" / f"{name}.cpp" for name in MACHINE)
    return [*sorted(kernels), *sorted(host), *(csrc / name for name in SHARED), *machine]


def build(folder: Path, *flags: str) -> Path:
    root = Path(torch.__file__).parent
    include = f"-isystem{root / 'include'}"
    compiler = os.environ.get("CXX", "g++")

    def one(job: tuple[int, Path]) -> Path:
        number, source = job
        target = folder / f"{number}_{source.stem}.o"
        command = [compiler, *FLAGS, *flags, include, "-x", "c++", "-c", source, "-o", target]
        subprocess.run(command, check=True)
        return target

    with ThreadPoolExecutor(WORKERS) as pool:
        objects = list(pool.map(one, enumerate(sources())))
    library = folder / f"{NAMESPACE}{sysconfig.get_config_var('SHLIB_SUFFIX') or '.so'}"
    libraries = [f"-L{root / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10"]
    subprocess.run([compiler, "-shared", *flags, *objects, *libraries, "-o", library], check=True)
    return library


def load(folder: Path) -> frozenset[str]:
    """Builds and loads the library; returns the names of its ops."""
    for name, op in OPS.items():
        torch.library.define(f"{NAMESPACE}::{name}", op.schema)
    torch.ops.load_library(build(folder))
    return frozenset(n for n in OPS if torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::{n}", "CPU"))
