"""The file of results: one JSON with the rows of all families, and for each family how and when it was measured.

    {"format": 1, "runs": {FAMILY: {"machine": .., "date": .., "seconds": .., "missing": {..}, ..}}, "rows": [{..}, ..]}

A row has ``family, op, case, batch, threads, impl, median_ms, min_ms, gflops, correct_error`` and more, see
`benchmarks.common.Bench.compare`. Rows of one `contest` were timed interleaved; only they may be divided by one
another.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from effkern.training import write_atomically

FOLDER = Path(__file__).with_name("results")
CPU = FOLDER / "cpu.json"
FORMAT = 1
Row = dict[str, Any]
Results = dict[str, Any]
#: What tells one contest from another.
CONTEST = ("family", "op", "case", "batch", "dtype", "layout", "threads")
OURS = "effkern"


class ResultsError(ValueError):
    """A file of results that cannot be read or added to."""


def load(path: Path) -> Results:
    """The results of ``path``; empty ones if there is no such file.

    Raises:
        ResultsError: if the file is not one of ours.
    """
    if not path.exists():
        return {"format": FORMAT, "runs": {}, "rows": []}
    try:
        results = json.loads(path.read_text())
        if (
            results["format"] != FORMAT
            or not isinstance(results["rows"], list)
            or not isinstance(results["runs"], dict)
        ):
            raise ResultsError(f"{path}: format {results['format']}, expected {FORMAT}")
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ResultsError(f"{path}: not a file of results ({type(error).__name__}: {error})") from None
    return results


def save(path: Path, results: Mapping[str, Any]) -> None:
    """Write all or nothing, rows a line each, so that two states of the file can be compared by eye."""
    rows = ",\n".join(json.dumps(row, default=str, separators=(",", ":")) for row in results["rows"])
    runs = json.dumps(results["runs"], indent=1, default=str)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = f'{{"format": {FORMAT},\n"runs": {runs},\n"rows": [\n{rows}\n]}}\n'
    write_atomically(path, text.encode())


def merge(old: Results, family: str, run: Mapping[str, Any], rows: Iterable[Row], partial: bool = False) -> Results:
    """``old`` with the rows of ``family`` replaced.

    Args:
        old: results so far.
        family: what was measured.
        run: how; takes the place of what was noted before.
        rows: of this run.
        partial: only some of the family's cases were run; its other contests stay.

    Raises:
        ResultsError: if ``old`` was measured on another processor or instruction set. Rows of two machines in one
            table would be compared by whoever reads it.
    """
    for name, other in old["runs"].items():
        for key in ("cpu", "isa"):
            if name != family and other["machine"][key] != run["machine"][key]:
                raise ResultsError(
                    f"the results so far were measured with {key} {other['machine'][key]!r} ({name}), "
                    f"these with {run['machine'][key]!r}: give another file with --out"
                )
    rows = list(rows)
    replaced = {contest(row) for row in rows}
    kept = [row for row in old["rows"] if row["family"] != family or (partial and contest(row) not in replaced)]
    return {"format": FORMAT, "runs": {**old["runs"], family: dict(run)}, "rows": kept + rows}


def contest(row: Row) -> tuple[Any, ...]:
    """What the row shares with those it was interleaved with."""
    return tuple(row.get(key) for key in CONTEST)


def contests(rows: Iterable[Row]) -> list[list[Row]]:
    """Rows that were timed together, in the order of measuring."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(contest(row), []).append(row)
    return list(groups.values())


def is_ours(row: Row) -> bool:
    """Whether the row is one of this package's own forms."""
    return row["impl"].startswith(OURS)
