"""Builds the SIMT harness (csrc/tests/simt) with the kernels it runs, by g++ alone, and runs its tests."""

from __future__ import annotations

import os
import re
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

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


def compiler() -> str:
    return os.environ.get("CXX", "g++")


def compile_all(folder: Path, sources: list[Path], *flags: str) -> list[Path]:
    """Object files of ``sources``, in their order."""

    def one(source: Path) -> Path:
        target = folder / f"{source.stem}.o"
        subprocess.run([compiler(), *FLAGS, *flags, "-c", source, "-o", target], check=True)
        return target

    with ThreadPoolExecutor(WORKERS) as pool:
        return list(pool.map(one, sources))


def link(program: Path, objects: list[Path], *flags: str) -> Path:
    subprocess.run([compiler(), *flags, *objects, "-o", program], check=True)
    return program


def machine_sources() -> list[Path]:
    """What every test program is linked with."""
    tests = CHECKOUT / "csrc" / "tests"
    return [*(tests / "simt" / f"{name}.cpp" for name in (*MACHINE, "count")), tests / "main.cpp"]


def build(folder: Path, tests: tuple[str, ...], *flags: str) -> Path:
    """The program that runs these files of tests."""
    sources = [CHECKOUT / "csrc" / "tests" / "simt" / f"{name}.cpp" for name in tests]
    return link(folder / "simt_tests", compile_all(folder, [*machine_sources(), *sources], *flags), *flags)


def run_tests(program: Path, **environment: str) -> int:
    """Runs each test of a program in a process of its own, so that what it draws at random depends on nothing else.
    Returns how often kernels ran; fails with the output of the tests that failed."""
    names = subprocess.run([program, "--list"], capture_output=True, text=True, check=True).stdout.split()

    def one(name: str) -> subprocess.CompletedProcess:
        command = [program, "--only", name]
        return subprocess.run(command, capture_output=True, text=True, env=os.environ | environment)

    with ThreadPoolExecutor(WORKERS) as pool:
        runs = list(pool.map(one, names))
    failed = [run.stdout + run.stderr for run in runs if run.returncode != 0 or ", 0 failed checks" not in run.stdout]
    assert not failed, "\n".join(failed)
    return sum(int(found[1]) for run in runs if (found := re.search(r"(\d+) kernel runs", run.stdout)))


def chosen(request: pytest.FixtureRequest, parameter: str) -> list[str]:
    """Values of a parameter in the tests that pytest runs."""
    specs = [item.callspec for item in request.session.items if hasattr(item, "callspec")]
    return [spec.params[parameter] for spec in specs if parameter in spec.params]
