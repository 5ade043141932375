"""The CUDA library as nvcc made it, on the host's side.

Where host code calls a function that is for the device alone, inside of a template nvcc says nothing and puts a call of
`exit` in its place: the process ends at the first launch. No harness sees that, since a C++ compiler knows no such
functions.
"""

from __future__ import annotations

import re
import shutil
import subprocess

import pytest

from tests.native.package import PACKAGE

LIBRARY = PACKAGE / "_C_cuda.so"


def functions_that_exit(listing: str) -> list[str]:
    """Our functions in objdump's listing that call `exit`."""
    name, found = "", []
    for line in listing.splitlines():
        if start := re.match(r"[0-9a-f]+ <(.*)>:$", line):
            name = start[1]
        elif "effkern" in name and re.search(r"\b(call|jmp)\b.*<exit@plt>", line):
            found.append(name)
    return found


@pytest.mark.skipif(not LIBRARY.exists(), reason="the CUDA library was not built")
@pytest.mark.skipif(shutil.which("objdump") is None, reason="objdump is not installed")
def test_no_function_ends_the_process():
    command = ["objdump", "-d", "-C", "--no-show-raw-insn", str(LIBRARY)]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "effkern::" in listing, "the library has lost its names"
    assert not functions_that_exit(listing)


def test_a_function_that_ends_the_process_is_found():
    listing = """
00000000000004c0 <effkern::block_skip::run(effkern::block_skip::Compaction const&, CUstream_st*)>:
 4e4:\tcall   4e9 <exit@plt>
0000000000000520 <someone_elses>:
 524:\tcall   529 <exit@plt>
0000000000000560 <effkern::conv::gpu::run(int)>:
 564:\tcall   569 <atexit@plt>
"""
    assert functions_that_exit(listing) == [
        "effkern::block_skip::run(effkern::block_skip::Compaction const&, CUstream_st*)"
    ]
