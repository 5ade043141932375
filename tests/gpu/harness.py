"""Builds the SIMT harness (csrc/tests/simt) with the kernels it runs, by g++ alone."""

from __future__ import annotations

import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.native.package import CHECKOUT

FLAGS = (
    "-std=c++20",
    "-g1",
    "-Wall",
    "-Wextra",
    "-Werror",
    "-Wno-psabi",
    "-Wno-unknown-pragmas",  # unroll is nvcc's
    "-DEFFKERN_SIMT",
)
MACHINE = ("fiber", "launch", "memory")
WORKERS = len(os.sched_getaffinity(0))


def compile_all(folder: Path, sources: list[Path], *flags: str) -> list[Path]:
    """Object files of ``sources``, in their order."""

    def one(source: Path) -> Path:
        target = folder / f"{source.stem}.o"
        subprocess.run([os.environ.get("CXX", "g++"), *FLAGS, *flags, "-c", source, "-o", target], check=True)
        return target

    with ThreadPoolExecutor(WORKERS) as pool:
        return list(pool.map(one, sources))


def link(program: Path, objects: list[Path], *flags: str) -> Path:
    subprocess.run([os.environ.get("CXX", "g++"), *flags, *objects, "-o", program], check=True)
    return program


def build(folder: Path, tests: tuple[str, ...], *flags: str) -> Path:
    """The program that runs these files of tests."""
    simt = CHECKOUT / "csrc" / "tests" / "simt"
    sources = [*(simt / f"{name}.cpp" for name in (*MACHINE, *tests)), simt.parent / "main.cpp"]
    return link(folder / "simt_tests", compile_all(folder, sources, *flags), *flags)


def copy_sources(folder: Path) -> Path:
    """csrc in a place where it may be changed."""
    target = folder / "csrc"
    shutil.copytree(CHECKOUT / "csrc", target)
    return target
