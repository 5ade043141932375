"""The tables of docs/performance.md and the README, made from the results: nothing in them is written by hand.

    python -m benchmarks.tables                                       on the terminal
    python -m benchmarks.tables --into docs/performance.md README.md  between the marks in these files

A file holds one or more places, each between two comment lines: ``<!-- targets -->`` and ``<!-- end of targets -->``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import results
from benchmarks.common import STEADY
from benchmarks.results import Results, Row, contests
from benchmarks.targets import STATS, TORCH, Line, Measure, best_peer, lines, our_row
from effkern.training import write_atomically

HEADS = ("work", "minima", "medians", "against", "reach", "beyond", "")
#: Families whose contests have one form of ours that a loss can be stated of.
CONTESTED = (
    "networks",
    "cifar",
    "block_skip",
    "supernet",
    "rep_conv",
    "sliced_conv",
    "pq",
    "multi_branch_bn",
    "backward",
)


def table(found: Iterable[Line]) -> str:
    """The lines in Markdown."""
    rows = [
        (
            line.target.work,
            _value(line, line.minima),
            _value(line, line.medians),
            _against(line),
            _goal(line, line.target.reach),
            _goal(line, line.target.beyond),
            f"**{line.verdict}**" if line.verdict in ("missed", "not measured") else line.verdict,
        )
        for line in found
    ]
    return markdown(HEADS, rows)


def _value(line: Line, measure: Measure | None) -> str:
    return "–" if measure is None else _number(line, measure.value)  # noqa: RUF001


def _number(line: Line, value: float) -> str:
    return f"{value:+.3f}" if line.target.unit == "+" else f"{value:.2f}x"


def _goal(line: Line, value: float) -> str:
    sign = "" if line.target.more_is_better else "≤ "
    return sign + (f"{value:+.2f}" if line.target.unit == "+" else f"{value:g}x")


def _against(line: Line) -> str:
    first, second = line.minima, line.medians
    if first is None or second is None:
        return ""
    return first.against if first.against == second.against else f"{first.against}; medians: {second.against}"


def markdown(heads: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> str:
    """A table whose first ``left`` columns are text."""
    text = ["| " + " | ".join(heads) + " |", "|---" * left + "|---:" * (len(heads) - left) + "|"]
    text += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join(text) + "\n"


def count(found: Sequence[Line]) -> str:
    """How many were met."""
    verdicts = [line.verdict for line in found]
    parts = [f"{verdicts.count(v)} {v}" for v in ("beyond", "met", "missed", "not measured") if v in verdicts]
    return f"{len(found)} lines: {', '.join(parts)}."


def targets_section(res: Results) -> str:
    """The whole target table with what it must be read with."""
    found = lines(res)
    return "\n".join([table(found), count(found) + "\n", machine(res)])


def reading_section(res: Results) -> str:
    """The table in sentences: what was missed and by how much, then what went beyond."""
    found = lines(res)
    parts = [count(found) + "\n"]
    missed = [line for line in found if line.verdict == "missed"]
    for line in sorted(missed, key=_distance, reverse=True):
        goal = _goal(line, line.target.reach)
        values = f"{_value(line, line.minima)} by minima, {_value(line, line.medians)} by medians"
        parts.append(f"- Missed: {line.target.work}: {values}, of {goal} ({_against(line)}).\n")
    beyond = [line.target.work for line in found if line.verdict == "beyond"]
    if beyond:
        parts.append(f"- Beyond: {'; '.join(beyond)}.\n")
    return parts[0] + "\n" + "".join(parts[1:]) if parts[1:] else parts[0]


def _distance(line: Line) -> float:
    """How far a missed line is from its goal: the worse value, as a factor or a difference."""
    values = [measure.value for measure in (line.minima, line.medians) if measure is not None]
    target = line.target
    if target.unit == "+":
        return max(values) - target.reach
    return target.reach / min(values) - 1 if target.more_is_better else max(values) / target.reach - 1


def headline_section(res: Results) -> str:
    """The README's part of the table."""
    found = lines(res)
    shown = [line for line in found if line.target.headline]
    return "\n".join([table(shown), f"All of the table: {count(found)}\n", machine(res)])


def machine(res: Results) -> str:
    """Where, with what, and how steadily it was measured."""
    if not res["runs"]:
        return "Nothing has been measured yet.\n"
    runs = res["runs"].values()

    def each(key: str) -> str:
        return ", ".join(sorted({str(run["machine"][key]) for run in runs if run["machine"].get(key)}))

    packages: dict[str, Any] = {}
    for run in runs:
        packages |= run["machine"].get("packages", {})
    timed = [contest[0] for contest in contests(res["rows"]) if contest[0].get("peak_gflops_before")]
    single = [row["peak_gflops_before"] for row in timed if row["threads"] == 1]
    moved = sum(_moved(row) > STEADY for row in timed)
    dates = sorted(run["date"][:10] for run in runs)
    when = dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}"
    peak = f"{min(single):.0f} to {max(single):.0f} GFLOP/s" if single else "not measured"
    versions = ", ".join(f"{name} {version}" for name, version in packages.items())
    text = (
        f"{each('cpu')}, {each('cores')} cores, {each('isa')}; torch {each('torch')}; {versions or 'no engines'}; "
        f"effkern {each('effkern')}, commit {each('commit') or 'unknown'}; {when}. "
        f"Multiply-add peak of one core, measured around each contest: {peak}; "
        f"it moved by more than {STEADY:.0%} during {moved} of {len(timed)} contests.\n"
    )
    partial = [name for name, run in res["runs"].items() if run.get("quick") or run.get("partial")]
    if partial:
        text += f"\nMeasured in part only or with `--quick`: {', '.join(partial)}.\n"
    return text


def _moved(row: Row) -> float:
    before, after = row["peak_gflops_before"], row["peak_gflops_after"]
    return abs(after - before) / max(before, after)


def losses_section(res: Results) -> str:
    """A line for every contest that a peer wins."""
    found = []
    for contest in contests(res["rows"]):
        if contest[0]["family"] not in CONTESTED or contest[0].get("median_ms") is None:
            continue
        ours, ours_steady = (our_row(contest, stat=stat) for stat in STATS)
        fastest, steady = (best_peer(contest, stat) for stat in STATS)
        if ours is None or ours_steady is None or fastest is None or steady is None:
            continue
        ratios = fastest["min_ms"] / ours["min_ms"], steady["median_ms"] / ours_steady["median_ms"]
        if min(ratios) < 1:
            name = f"{ours['op']} {ours['case']}"
            peers = " / ".join(dict.fromkeys((fastest["impl"], steady["impl"])))
            cells = (ours["family"], name, str(ours["batch"]), str(ours["threads"]))
            found.append((*cells, f"{ratios[0]:.2f}x", f"{ratios[1]:.2f}x", peers))
    if not found:
        return "No contest was lost.\n"
    return markdown(("family", "case", "batch", "threads", "minima", "medians", "to"), found, left=2)


def layers_section(res: Results) -> str:
    """Single layers: ours, the best form of PyTorch and the best engine, by minima."""
    rows = []
    for contest in contests(row for row in res["rows"] if row["family"] == "rep_conv"):
        ours = our_row(contest)
        torch, engine = best_peer(contest, "min_ms", TORCH), best_peer(contest, "min_ms", TORCH, excluded=True)
        best, steady = best_peer(contest, "min_ms"), best_peer(contest, "median_ms")
        if ours is None or best is None or steady is None:
            continue
        rows.append(
            (
                ours["case"],
                str(ours["batch"]),
                f"{ours['min_ms']:.3f}",
                f"{ours['gflops'] * ours['median_ms'] / ours['min_ms']:.0f}",
                _peer(torch),
                _peer(engine),
                f"{best['min_ms'] / ours['min_ms']:.2f}x",
                f"{steady['median_ms'] / ours['median_ms']:.2f}x",
            )
        )
    heads = ("layer", "batch", "ms", "GFLOP/s", "best torch, ms", "best engine, ms", "minima", "medians")
    return markdown(heads, rows)


def _peer(row: Row | None) -> str:
    return "–" if row is None else f"{row['min_ms']:.3f} {row['impl']}"  # noqa: RUF001


def networks_section(res: Results) -> str:
    """Whole networks: milliseconds of every contender, minima (medians)."""
    found = [
        r for r in contests(r for r in res["rows"] if r["family"] in ("networks", "cifar") and r["op"] == "network")
    ]
    names = sorted(
        {row["impl"] for contest in found for row in contest}, key=lambda n: (not n.startswith("effkern"), n)
    )
    rows = []
    for contest in found:
        times = {row["impl"]: f"{row['min_ms']:.4g} ({row['median_ms']:.4g})" for row in contest}
        first = contest[0]
        where = (first["case"], str(first["batch"]), str(first["threads"]))
        rows.append((*where, *(times.get(name, "–") for name in names)))  # noqa: RUF001
    return markdown(("network", "batch", "threads", *names), rows)


def missing_section(res: Results) -> str:
    """What could not be measured, and why."""
    found = [f"- {name}: {peer}: {why}\n" for name, run in res["runs"].items() for peer, why in run["missing"].items()]
    return "".join(found) or "Everything was measured.\n"


SECTIONS: dict[str, Callable[[Results], str]] = {
    "targets": targets_section,
    "headline": headline_section,
    "reading": reading_section,
    "networks": networks_section,
    "layers": layers_section,
    "losses": losses_section,
    "missing": missing_section,
}


def fill(text: str, res: Results, sections: Mapping[str, Callable[[Results], str]] = SECTIONS) -> str:
    """``text`` with every place marked for one of ``sections`` filled anew.

    Raises:
        ValueError: if there is no such place, or one is opened twice or not closed.
    """
    places = 0
    for name, section in sections.items():
        begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
        if begin not in text and end not in text:
            continue
        before, _, rest = text.partition(begin)
        _, closed, after = rest.partition(end)
        if text.count(begin) != 1 or text.count(end) != 1 or not closed:
            raise ValueError(f"must hold {begin!r} and {end!r} once each and in this order")
        text = f"{before}{begin}\n{section(res)}{end}{after}"
        places += 1
    if not places:
        raise ValueError(f"has no place to fill, such as {f'<!-- {next(iter(sections))} -->'!r}")
    return text


def terminal(res: Results) -> str:
    """The target table in aligned columns."""
    cells = [HEADS] + [
        (
            line.target.work,
            _value(line, line.minima),
            _value(line, line.medians),
            _against(line)[:60],
            _goal(line, line.target.reach),
            _goal(line, line.target.beyond),
            line.verdict,
        )
        for line in lines(res)
    ]
    widths = [max(len(row[i]) for row in cells) for i in range(len(HEADS))]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]
    return "\n".join([*text, "", count(lines(res)), machine(res)])


def main(argv: Sequence[str] | None = None) -> None:
    """Print, or fill files."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tables")
    parser.add_argument("--results", type=Path, default=results.CPU)
    parser.add_argument("--into", type=Path, nargs="+", metavar="FILE", help="Markdown files with marked places")
    options = parser.parse_args(argv)
    res = results.load(options.results)
    if options.into is None:
        print(terminal(res))
        return
    filled = {}
    for path in options.into:
        try:
            filled[path] = fill(path.read_text(), res)
        except ValueError as error:
            sys.exit(f"{path}: {error}")
    for path, text in filled.items():
        write_atomically(path, text.encode())
        print(path)


if __name__ == "__main__":
    main()
