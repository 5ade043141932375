"""Every seeded fault is caught: by a fault of the harness, a wrong value, or a counter. Writes the kill table."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.gpu.harness import FLAGS, MACHINE, WORKERS, compile_all, link
from tests.gpu.mutants import (
    ACT_GRAD,
    BACKWARD,
    BN_BACKWARD,
    BN_FORWARD,
    CODES,
    COLUMNS,
    COMPACT,
    DECODE,
    DEPTHWISE,
    DEPTHWISE_WGRAD,
    DOTS,
    FOLD,
    INDICES,
    LOOKUP,
    MUTANTS,
    SCHEDULE,
    STAGE,
    STAGE_MATH,
    TRANSPOSE,
    WGRAD,
    WGRAD_LOADER,
    WGRAD_MATH,
    Mutant,
)
from tests.native.package import CHECKOUT

TABLE = CHECKOUT / "build" / "gpu-proof" / "mutants.md"
TESTS = {  # of the others: CONV
    CODES: "test_lookup",
    COMPACT: "test_compact",
    DECODE: "test_decode",
    DEPTHWISE: "test_depthwise",
    DOTS: "test_dots",
    INDICES: "test_schedule",
    LOOKUP: "test_lookup",
    SCHEDULE: "test_schedule",
    STAGE: "test_stage",
    STAGE_MATH: "test_stage",
    **dict.fromkeys((BN_FORWARD, BN_BACKWARD), "test_bn"),
    **dict.fromkeys((ACT_GRAD, BACKWARD, FOLD, TRANSPOSE), "test_backward"),
    **dict.fromkeys((COLUMNS, DEPTHWISE_WGRAD, WGRAD, WGRAD_LOADER, WGRAD_MATH), "test_wgrad_smoke"),
}
CONV = "test_conv_smoke"
FAULTS = "race|in flight|out of bounds|forbidden|uninitialized|misaligned|divergence|deadlock|leak|limit"
MOST_SECONDS = 120


def verdict(run: subprocess.CompletedProcess) -> str:
    """What caught the mutant, from the first failed checks; empty if nothing did."""
    text = run.stdout + run.stderr
    if run.returncode == 0:
        return ""
    if found := re.search(rf"(?:: |\) )({FAULTS}): .*? at ([\w.]+:\d+)", text):
        return f"{found[1]} at {found[2]}"
    if "stores, not" in text:
        return "wrong value"
    if "passes" in text:
        return "bank conflicts counted"
    return "failed checks" if "failed checks" in text else f"the program ended with {run.returncode}"


@pytest.fixture(scope="module")
def machine(tmp_path_factory) -> list[Path]:
    folder = tmp_path_factory.mktemp("machine")
    tests = CHECKOUT / "csrc" / "tests"
    return compile_all(folder, [*(tests / "simt" / f"{name}.cpp" for name in MACHINE), tests / "main.cpp"], "-O2")


def run_mutant(mutant: Mutant | None, test: str, folder: Path, machine: list[Path]) -> subprocess.CompletedProcess:
    shutil.copytree(CHECKOUT / "csrc", folder / "csrc")
    if mutant:
        path = folder / "csrc" / mutant.file
        text = path.read_text()
        assert text.count(mutant.old) == 1, (
            f"{mutant.what}: its text is {text.count(mutant.old)} times in {mutant.file}"
        )
        path.write_text(text.replace(mutant.old, mutant.new))
    flags = [flag for flag in FLAGS if flag != "-Werror"]
    source, target = folder / "csrc" / "tests" / "simt" / f"{test}.cpp", folder / f"{test}.o"
    subprocess.run(["g++", *flags, "-w", "-O1", "-g0", "-c", source, "-o", target], check=True)
    program = link(folder / "mutant", [target, *machine])
    try:
        run = subprocess.run([program], capture_output=True, text=True, timeout=MOST_SECONDS)
    except subprocess.TimeoutExpired as error:
        run = subprocess.CompletedProcess(error.cmd, 1, "", "the program did not end: failed checks")
    shutil.rmtree(folder)
    return run


@pytest.fixture(scope="module")
def verdicts() -> Iterator[dict[str, str]]:
    """Filled by the tests below; the table is written when they are done."""
    found: dict[str, str] = {}
    yield found
    rows = [f"| {m.what} | `{m.file}` | {found[m.what] or '**survives**'} |" for m in MUTANTS if m.what in found]
    TABLE.parent.mkdir(parents=True, exist_ok=True)
    TABLE.write_text("\n".join(["| mutant | file | caught by |", "|---|---|---|", *rows, ""]))
    print(f"\n{TABLE.read_text()}{len(rows)} mutants, {sum(map(bool, found.values()))} killed")


@pytest.mark.parametrize("test", sorted({*TESTS.values(), CONV}))
def test_no_mutant_is_no_failure(tmp_path, machine, test):
    run = run_mutant(None, test, tmp_path / "healthy", machine)
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.mark.parametrize("file", sorted({m.file for m in MUTANTS}))
def test_every_mutant_is_killed(tmp_path, machine, verdicts, file):
    mutants = [m for m in MUTANTS if m.file == file]

    def one(number: int) -> str:
        return verdict(run_mutant(mutants[number], TESTS.get(file, CONV), tmp_path / str(number), machine))

    with ThreadPoolExecutor(WORKERS) as pool:
        verdicts |= zip((m.what for m in mutants), pool.map(one, range(len(mutants))), strict=True)
    assert not [m.what for m in mutants if not verdicts[m.what]]
