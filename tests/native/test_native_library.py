"""The built libraries: what they need from the outside, and what they give away."""

from __future__ import annotations

import re
import subprocess

import pytest

from tests.native.package import PACKAGE, ROOT, python

LIBRARIES = [p for p in (PACKAGE / "_C.so", PACKAGE / "_C_cuda.so") if p.exists()]

# The stable ABI of torch, the C and C++ runtimes (versioned, or std symbols that torch exports too, without a version).
ALLOWED = re.compile(
    r"^(aoti_torch_|torch_)\w+$"
    r"|@(GLIBC|GLIBCXX|CXXABI|GCC|LIBC)"
    r"|^_Z(N|NK|NO|NKR|T[ISTV])*(St|Sa|Ss|So|Si)"
    r"|^(__gmon_start__|_ITM_\w+|__cxa_\w+|_Unwind_\w+)$"
)


def undefined(library) -> list[str]:
    listing = subprocess.run(["nm", "-D", "--undefined-only", library], capture_output=True, text=True, check=True)
    return [line.split()[-1] for line in listing.stdout.splitlines()]


def test_the_cpu_library_is_built():
    assert (PACKAGE / "_C.so") in LIBRARIES


@pytest.mark.parametrize("library", LIBRARIES, ids=lambda p: p.name)
def test_needs_only_the_stable_abi_and_the_runtimes(library):
    foreign = [symbol for symbol in undefined(library) if not ALLOWED.search(symbol)]
    assert not foreign
    assert any(symbol.startswith("aoti_torch_") for symbol in undefined(library))


@pytest.mark.parametrize(
    "symbol", ["_ZN2at6Tensor5emptyEv", "_ZN3c105ErrorC1Ev", "PyObject_Call", "_ZTIN3c1011StorageImplE"]
)
def test_the_rule_above_refuses_unstable_symbols(symbol):
    assert not ALLOWED.search(symbol)


@pytest.mark.parametrize("library", LIBRARIES, ids=lambda p: p.name)
def test_holds_no_path_of_the_machine_that_built_it(library):
    assert str(ROOT).encode() not in library.read_bytes()


@pytest.mark.parametrize("library", LIBRARIES, ids=lambda p: p.name)
def test_loads_without_a_gpu_driver(library):
    run = python("-c", f"import torch; torch.ops.load_library({str(library)!r})", CUDA_VISIBLE_DEVICES="")
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("library", LIBRARIES, ids=lambda p: p.name)
def test_links_no_cuda_runtime_library(library):
    needed = subprocess.run(["objdump", "-p", library], capture_output=True, text=True, check=True).stdout
    assert not re.search(r"NEEDED\s+(libcudart|libtorch_cuda|libc10_cuda|libtorch_python|libgomp)", needed)


def test_wide_registers_are_used_only_where_the_name_says_so():
    """Inline library code compiled for AVX-512 would crash older processors at import."""
    listing = subprocess.run(["objdump", "-d", "-C", PACKAGE / "_C.so"], capture_output=True, text=True, check=True)
    function, using, found = "", set(), False
    for line in listing.stdout.splitlines():
        if line.endswith(">:"):
            function = line.split("<", 1)[1][:-2]
        elif "%zmm" in line:
            found = True
            if "avx512" not in function:
                using.add(function)
    assert found, "no AVX-512 code at all"
    assert not using
