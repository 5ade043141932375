"""The AVX-512 loops as compiled: whole registers, fused multiply-adds, and no trips to the stack where it counts."""

from __future__ import annotations

import platform
import re
import subprocess
from functools import cache

import pytest

from tests.native.package import PACKAGE

pytestmark = pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="x86 registers")

Instructions = list[tuple[int, str]]


@cache
def functions() -> dict[str, Instructions]:
    """Address and text of every instruction of the engine's AVX-512 functions."""
    command = ["objdump", "-d", "-C", "--no-show-raw-insn", str(PACKAGE / "_C.so")]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found: dict[str, Instructions] = {}
    body: Instructions = []
    for line in listing.splitlines():
        if match := re.match(r"[0-9a-f]+ <(.*)>:$", line):
            body = []
            if "effkern::conv::avx512::" in match[1]:
                found[match[1]] = body
        elif match := re.match(r"\s*([0-9a-f]+):\t(.*)", line):
            body.append((int(match[1], 16), match[2]))
    return found


def named(pattern: str) -> dict[str, Instructions]:
    found = {name: body for name, body in functions().items() if re.search(pattern, name)}
    assert found, f"no function {pattern}: was it renamed?"
    return found


def loops(body: Instructions) -> list[Instructions]:
    """The loops that hold no other loop."""
    first = body[0][0]
    jumps = [(int(m[1], 16), at) for at, text in body if (m := re.match(r"j\w+\s+([0-9a-f]+)", text))]
    spans = sorted({(to, at) for to, at in jumps if first <= to <= at})
    inner = [s for s in spans if not any(o != s and s[0] <= o[0] and o[1] <= s[1] for o in spans)]
    return [[(at, text) for at, text in body if low <= at <= high] for low, high in inner]


def wide(body: Instructions) -> int:
    return sum("%zmm" in text for _, text in body)


def multiply_adds(body: Instructions) -> int:
    return sum(text.startswith(("vfmadd", "vfmsub", "vfnmadd", "vfnmsub")) and "%zmm" in text for _, text in body)


def spills(body: Instructions) -> int:
    return sum(bool(re.search(r"\(%r[sb]p[,)]", text)) and "%zmm" in text for _, text in body)


def main_loops(body: Instructions, least: int) -> list[Instructions]:
    """The loops with at least so many multiply-adds: one for each way to store and to mask."""
    found = [loop for loop in loops(body) if multiply_adds(loop) >= least]
    assert found, f"no loop has {least} multiply-adds"
    return found


def halves(body: Instructions) -> int:
    return sum("%ymm" in text for _, text in body)


def test_matrix_tiles_multiply_twelve_rows_in_registers():
    """One broadcast multiply-add a row and one load of the panel for an input channel."""
    best = max((loop for body in named(r"::tile\w*<16, 12").values() for loop in loops(body)), key=multiply_adds)
    assert multiply_adds(best) % 12 == 0 and multiply_adds(best) >= 12
    assert spills(best) == halves(best) == 0
    assert wide(best) <= multiply_adds(best) * 13 / 12, "something besides the loads of a panel"


@pytest.mark.parametrize("form", ["F23", "F33", "F43"])
@pytest.mark.parametrize("part", ["wino_input_lanes", "wino_weight_pair", "wino_output"])
def test_winograd_transforms_stay_in_registers(part, form):
    for name, body in named(rf"{part}<16, effkern::conv::avx512::{form}").items():
        assert wide(body) >= 8, name
        assert halves(body) == 0, name
        assert spills(body) <= 0.02 * len(body), name


@pytest.mark.parametrize("stride", [1, 2])
def test_depthwise_tiles_of_two_rows_by_seven_columns(stride):
    for name, body in named(rf"::shaped<16, 5, {stride}, 2, 7>").items():
        for main in main_loops(body, 2 * 7 * 5**2):
            assert halves(main) == 0, name
            assert spills(main) <= 0.05 * len(main), name


@pytest.mark.parametrize(("stride", "rows"), [(1, 1), (1, 2), (1, 3), (1, 4), (2, 1), (2, 2), (2, 3)])
def test_depthwise_sweeps_keep_the_window_in_registers(stride, rows):
    for name, body in named(rf"::sweep<16, {stride}, {rows}>").items():
        for main in main_loops(body, rows * 9):
            assert halves(main) == 0, name
            # Three rows at stride 2 multiply by two or three weights from the stack. Adding one input row after the
            # other keeps all in registers and was 0 to 7 % slower: its loads start later.
            assert spills(main) <= (0.08 if (stride, rows) == (2, 3) else 0.05) * len(main), name
