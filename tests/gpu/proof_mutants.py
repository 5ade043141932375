"""Every seeded fault is caught: by a fault of the harness, a wrong value, or a counter. Writes the kill table.

Without a mutant every test passes. With one, the test that caught it when docs/gpu-mutants.md was made (else the first
one) is compiled alone and run up to its first failed check; where that lets it pass, all tests of the file are.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from pathlib import Path
from threading import Lock

import pytest

from tests.gpu import mutants
from tests.gpu.counts import COUNTS
from tests.gpu.harness import FLAGS, WORKERS, chosen, compile_all, compiler, link, machine_sources
from tests.gpu.mutant_table import FOUND, PAGE, SURVIVES, read, table
from tests.gpu.mutants import MUTANTS, Mutant
from tests.native.package import CHECKOUT

#: The file of tests that runs a file of kernels.
TESTS = {
    **dict.fromkeys((mutants.CONV, mutants.LOADER, mutants.MATH, mutants.EPILOGUE), "test_conv_smoke"),
    **dict.fromkeys((mutants.CODES, mutants.LOOKUP), "test_lookup"),
    **dict.fromkeys((mutants.INDICES, mutants.SCHEDULE), "test_schedule"),
    **dict.fromkeys((mutants.STAGE, mutants.STAGE_MATH), "test_stage"),
    **dict.fromkeys((mutants.WGRAD, mutants.WGRAD_LOADER, mutants.WGRAD_MATH), "test_wgrad_smoke"),
    mutants.DEPTHWISE_WGRAD: "test_wgrad_smoke",
    **dict.fromkeys((mutants.ACT_GRAD, mutants.BACKWARD, mutants.FOLD, mutants.TRANSPOSE), "test_backward"),
    **dict.fromkeys((mutants.BN_FORWARD, mutants.BN_BACKWARD, mutants.BN_FINISH), "test_bn"),
    mutants.COMPACT: "test_compact",
    mutants.DECODE: "test_decode",
    mutants.DEPTHWISE: "test_depthwise",
    **dict.fromkeys((mutants.DOTS, mutants.DOTS_MMA), "test_dots"),
    **dict.fromkeys((mutants.BLOCK_GRAD, mutants.COLUMNS, mutants.PIECES, mutants.SLOPE), "test_block_grad"),
    mutants.BOOK_GRAD: "test_book_grad",
    mutants.RAGGED_GRAD: "test_ragged_grad",
}
SIMT = CHECKOUT / "csrc" / "tests" / "simt"
#: Fast to compile; most mutants run for a moment.
OPTIMIZED = "-O0"
#: Of the processor's time: for a loop without end in a kernel that accesses nothing. A file of tests takes a few.
MOST_SECONDS = 120
FAULTS = "race|in flight|out of bounds|forbidden|uninitialized|misaligned|divergence|deadlock|leak|limit"


def how(run: subprocess.CompletedProcess) -> str:
    """What the first failed check tells about a mutant."""
    text = run.stdout + run.stderr
    if run.returncode < 0:
        return "no end" if -run.returncode == signal.SIGXCPU else signal.Signals(-run.returncode).name
    if found := re.search(rf"(?:: |\) )({FAULTS})(?:: .*? at ([\w.]+:\d+))?", text):
        return f"{found[1]} at {found[2]}" if found[2] else found[1]
    if "passes for" in text:
        return "bank conflicts or sectors counted"
    return "bytes or products counted" if ", model " in text else "wrong value"


class Machine:
    """What mutants are compiled with: the harness, and the standard headers that its tests and the kernels name."""

    def __init__(self, folder: Path) -> None:
        self.objects = compile_all(folder, machine_sources(), "-O2")
        self.flags = [flag for flag in FLAGS if flag not in ("-g1", "-Werror")] + ["-w", OPTIMIZED]
        files = [p for p in (CHECKOUT / "csrc").rglob("*") if p.suffix in (".h", ".cuh", ".cpp")]
        named = {name for p in files for name in re.findall(r"^#include <([a-z_]+)>", p.read_text(), re.M)}
        self.headers = folder / "headers.h"
        self.headers.write_text("".join(f"#include <{name}>\n" for name in sorted(named)))
        command = [compiler(), *self.flags, "-x", "c++-header", self.headers, "-o", f"{self.headers}.gch"]
        subprocess.run(command, check=True)

    def run(self, mutant: Mutant | None, only: str, folder: Path, tests: str) -> subprocess.CompletedProcess:
        """One test of a file of tests, or all, with a mutant, up to the first failed check."""
        shutil.copytree(CHECKOUT / "csrc", folder / "csrc")
        if mutant is not None:
            path = folder / "csrc" / mutant.file
            text = path.read_text()
            times = text.count(mutant.old)
            assert times == 1, f"{mutant.what}: its text is {times} times in {mutant.file}"
            path.write_text(text.replace(mutant.old, mutant.new))
        source, target = folder / SIMT.relative_to(CHECKOUT) / f"{tests}.cpp", folder / "tests.o"
        chosen = [f'-DEFFKERN_TEST="{only}"'] if only else []
        command = [compiler(), *self.flags, *chosen, "-include", self.headers, "-c", source, "-o", target]
        subprocess.run(command, check=True)
        program = link(folder / "mutant", [target, *self.objects])
        limited = ["sh", "-c", f'ulimit -S -t {MOST_SECONDS}; exec "$0"', program]
        environment = os.environ | {"EFFKERN_FIRST_FAILURE": "1"}
        run = subprocess.run(limited, capture_output=True, text=True, env=environment)
        shutil.rmtree(folder)
        return run

    def kill(self, mutant: Mutant, hint: str, folder: Path) -> str:
        """The test that caught the mutant and how, as the table shows them."""
        tests = TESTS[mutant.file]
        first = re.search(r"^TEST\((\w+)\)", (SIMT / f"{tests}.cpp").read_text(), re.M)
        # Of a hint that is no longer a test none is compiled, and none fails.
        for only in (hint or first[1], ""):
            run = self.run(mutant, only, folder, tests)
            if run.returncode != 0 and (named := re.search(r"FAILED (\w+)", run.stdout)):
                return f"{named[1]} | {how(run)}"
            if run.returncode < 0:
                return f"{only or tests} | {how(run)}"
        return SURVIVES


class Jobs:
    """All that the chosen tests ask for, on all processors at once, in the order of the tests."""

    def __init__(self, request: pytest.FixtureRequest, pool: Executor, folder: Path) -> None:
        machine = Machine(folder)
        self.found: dict[str, str] = {}
        self.writing = Lock()
        self.healthy: dict[str, Future[subprocess.CompletedProcess]] = {}
        self.kills: dict[str, Future[str]] = {}
        hints = {what: cells.split(" | ")[0] for what, cells in read(PAGE).items()}
        for name in chosen(request, "healthy"):
            self.healthy[name] = pool.submit(machine.run, None, "", folder / name, name)
        for number, m in enumerate(MUTANTS):
            if m.file in chosen(request, "mutated"):
                self.kills[m.what] = pool.submit(self.kill, machine, m, hints.get(m.what, ""), folder / str(number))

    def kill(self, machine: Machine, mutant: Mutant, hint: str, folder: Path) -> str:
        cells = machine.kill(mutant, hint, folder)
        with self.writing:
            self.found[mutant.what] = cells
            FOUND.parent.mkdir(parents=True, exist_ok=True)
            new = FOUND.with_suffix(f".{os.getpid()}")  # a run that is cut off leaves a whole table
            new.write_text("\n".join([*table(read(FOUND) | self.found), ""]))
            new.replace(FOUND)
        return cells

    def count(self) -> None:
        killed = sum(cells != SURVIVES for cells in self.found.values())
        new = len(MUTANTS) - len(read(PAGE))
        missing = f" ({new} not in docs/gpu-mutants.md yet: python -m tests.gpu.mutant_table)" if new else ""
        COUNTS["mutants"] = f"{killed} of {len(MUTANTS)} mutants killed{missing}"


@pytest.fixture(scope="module")
def jobs(request, tmp_path_factory) -> Iterator[Jobs]:
    with ThreadPoolExecutor(WORKERS) as pool:
        running = Jobs(request, pool, tmp_path_factory.mktemp("mutants"))
        yield running
        running.count()


@pytest.mark.parametrize("healthy", sorted(set(TESTS.values())))
def test_no_mutant_is_no_failure(jobs, healthy):
    run = jobs.healthy[healthy].result()
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.mark.parametrize("mutated", sorted({m.file for m in MUTANTS}))
def test_every_mutant_is_killed(jobs, mutated):
    verdicts = {m.what: jobs.kills[m.what].result() for m in MUTANTS if m.file == mutated}
    assert not [what for what, cells in verdicts.items() if cells == SURVIVES]
