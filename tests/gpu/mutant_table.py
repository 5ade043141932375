"""The page of seeded faults and what caught each, docs/gpu-mutants.md. `python -m tests.gpu.mutant_table` from the root
brings it up to date with mutants.py and the last `make test-gpu-proof`."""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from tests.gpu.mutants import MUTANTS
from tests.native.package import CHECKOUT

PAGE = CHECKOUT / "docs" / "gpu-mutants.md"
FOUND = CHECKOUT / "build" / "gpu-proof" / "mutants.md"
SURVIVES = "- | **survives**"  # the last two cells of a mutant that nothing caught


def table(kills: Mapping[str, str]) -> list[str]:
    """A row each mutant in `kills`, which holds its last two cells: the test, and how it failed."""
    rows = [f"| {m.what} | `{m.file}` | {kills[m.what]} |" for m in MUTANTS if m.what in kills]
    return ["| mutant | file | killed by | how |", "|---|---|---|---|", *rows]


def read(path: Path) -> dict[str, str]:
    """Mutant -> last two cells, of what `table` made."""
    if not path.exists():
        return {}
    return dict(re.findall(r"^\| (.+?) \| `[\w/.]+` \| (.+? \| .+?) \|$", path.read_text(), re.M))


def page(kills: Mapping[str, str]) -> str:
    """The page of the mutants in `kills`."""
    known = [m for m in MUTANTS if m.what in kills]
    ways: dict[str, Counter[str]] = {}
    for m in known:
        ways.setdefault(m.file, Counter())[kills[m.what].split(" | ")[1]] += 1
    text = [
        "# Faults seeded into the CUDA kernels",
        "",
        "Made by `python -m tests.gpu.mutant_table` from the last run of `make test-gpu-proof`; not edited by hand.",
        f"{len(known)} changes of the source of kernels in {len(ways)} files (`tests/gpu/mutants.py`). One at a time",
        "they are compiled into the [harness](gpu.md#the-harness-csrctestssimt), where each fails a test.",
        "A mutant of that file that is missing here is newer than the run.",
        "",
        "| file | mutants | caught as |",
        "|---|---|---|",
        *(f"| `{file}` | {found.total()} | {listed(found)} |" for file, found in ways.items()),
        "",
        *table(kills),
        "",
    ]
    return "\n".join(text)


def listed(found: Counter[str]) -> str:
    return ", ".join(f"{how} {times}" for how, times in sorted(found.items(), key=lambda item: (-item[1], item[0])))


def without_line(cells: str) -> str:
    """Lines move with every edit of a kernel: the page leaves them out."""
    return re.sub(r" at [\w.]+:\d+$", "", cells)


def main() -> None:
    kills = read(PAGE) | {what: without_line(cells) for what, cells in read(FOUND).items()}
    PAGE.write_text(page(kills))
    if missing := [m.what for m in MUTANTS if m.what not in kills]:
        print(f"not run yet: {', '.join(missing)}", file=sys.stderr)


if __name__ == "__main__":
    main()
