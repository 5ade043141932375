"""The table of a report, for a terminal, for Markdown and for the page: the same cells everywhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["HEADS", "amount", "cells", "insert", "losses", "markdown", "section", "terminal", "unrest"]

Row = Mapping[str, Any]

# Saved time may lag saved multiply-adds by this much before the page calls it a loss.
SLACK = 0.08
# Accuracy may lie this far below the baseline's before it is called a loss.
POINTS = 0.5
# A median this much above the minimum means that something else was running.
QUIET = 1.3
BEGIN, END = "<!-- demo table -->", "<!-- end of demo table -->"
BATCHES = (("b1", "batch 1"), ("b64", "batch 64"))

HEADS = (
    "network",
    "top-1 %",
    "params",
    "disk",
    "MACs",
    "b1 ms",
    "b1 eager",
    "b1 gain",
    "b64 ms",
    "b64 eager",
    "b64 gain",
    "MACs left",
    "b1 left",
    "b64 left",
)
LEGEND = (
    "Times: milliseconds per image, median (minimum); b1, b64: batch 1, batch 64. eager: the same function in PyTorch "
    "eager, in its fastest form, interleaved in the same run. gain: eager time over effkern time, below 1 is a loss. "
    "left: share of the multiply-adds and of the time of the network it is compared with."
)


def cells(row: Row, minima: bool = True) -> list[str]:
    """The texts of one row, in the order of :data:`HEADS`."""
    out = [
        row["name"],
        f"{row['top1']:.2f}",
        amount(row["params"]),
        amount(row["bytes_on_disk"]) + "B",
        amount(row["macs"]),
    ]
    for batch in ("b1", "b64"):
        out.append(_time(row, f"ms_{batch}", minima))
        out.append(_time(row, f"eager_ms_{batch}", minima))
        out.append("–" if row["eager_only"] else f"{gain(row, batch):.2f}x")  # noqa: RUF001
    out += [_share(row["macs_left"]), _share(row["time_left_b1"]), _share(row["time_left_b64"])]
    return out


def gain(row: Row, batch: str) -> float:
    """How many times faster than eager; ``batch`` is ``"b1"`` or ``"b64"``."""
    return row[f"eager_ms_{batch}"] / row[f"ms_{batch}"]


def terminal(rows: Sequence[Row], width: int = 100_000) -> str:
    """Aligned columns, grouped by stage; without the minima if they do not fit ``width``."""
    text = _aligned(rows, minima=True)
    if max(map(len, text.splitlines()), default=0) > width:
        text = _aligned(rows, minima=False)
    return text


def markdown(rows: Sequence[Row]) -> str:
    """A Markdown table, with minima."""
    lines = ["| " + " | ".join(HEADS) + " |", "|---" + "|---:" * (len(HEADS) - 1) + "|"]
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in cells(row)) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def section(report: Mapping[str, Any]) -> str:
    """The table in Markdown with all that it must be read with: machine, command, legend, losses."""
    run, machine = report["run"], report["machine"]
    commit = f", commit {machine['commit']}" if machine["commit"] else ""
    where = (
        f"`make demo` on {machine['cpu']}, {run['threads']} threads, {machine['isa']}, torch {machine['torch']}, "
        f"effkern {machine['effkern']}{commit}, {report['date'][:10]}; {run['data']['name']}, "
        f"{run['data']['test']:,} test images."
    )
    parts = [markdown(report["rows"]), where + "\n", LEGEND + "\n"]
    if found := [*losses(report["rows"]), *filter(None, [unrest(report["rows"])])]:
        parts.append("Where it loses:\n\n" + "".join(f"- {sentence}\n" for sentence in found))
    return "\n".join(parts)


def insert(text: str, content: str) -> str:
    """``text`` with ``content`` between the two comment lines that mark the place of the demo's table.

    Raises:
        ValueError: if the marks are not there, once each and in order.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end or BEGIN in rest or END in before + after:
        raise ValueError(f"must hold the lines {BEGIN!r} and {END!r}, once each and in this order")
    return f"{before}{begin}\n{content}{end}{after}"


def losses(rows: Sequence[Row]) -> list[str]:
    """A sentence for every row that is worse than it should be, with all that is worse."""
    accuracy = next((row["top1"] for row in rows if row["stage"] == "baseline"), None)
    return [f"{row['name']}: {'; '.join(found)}." for row in rows if (found := _losses(row, accuracy))]


def _losses(row: Row, accuracy: float | None) -> list[str]:
    found = []
    slow = [
        f"{gain(row, batch):.2f}x at {label} ({row[f'eager_form_{batch}']})"
        for batch, label in BATCHES
        if not row["eager_only"] and gain(row, batch) < 1
    ]
    if slow:
        found.append(f"slower than eager PyTorch, {' and '.join(slow)}")
    if row["macs_left"] is not None:
        wasted = [
            f"{_share(row[f'time_left_{batch}'])} of the time at {label}"
            for batch, label in BATCHES
            if row[f"time_left_{batch}"] > row["macs_left"] + SLACK
        ]
        if wasted:
            work = f"{_share(row['macs_left'])} of the multiply-adds of {row['relative_to']}"
            found.append(f"{work}, but {' and '.join(wasted)}")
    if accuracy is not None and row["top1"] < accuracy - POINTS:
        found.append(f"{accuracy - row['top1']:.2f} points less accurate than the baseline")
    if row["disagreeing"]:
        found.append(f"other decisions than eager on {100 * row['disagreeing']:.2f} % of the images")
    return found


def unrest(rows: Sequence[Row]) -> str | None:
    """A warning when the machine was busy while measuring; None when it was quiet.

    Judged at batch 64, where all calls do about the same work.
    """
    worst = max(rows, key=lambda row: row["ms_b64"] / row["ms_b64_min"], default=None)
    if worst is None or worst["ms_b64"] / worst["ms_b64_min"] <= QUIET:
        return None
    return (
        f"The machine was not quiet: the median time of {worst['name']} is {worst['ms_b64'] / worst['ms_b64_min']:.1f} "
        "times its minimum. The minima say more than the medians then; better measure again with nothing else running."
    )


def amount(value: float) -> str:
    """A count with three digits, in k, M or G."""
    value = float(f"{value:.3g}")
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:g}{unit}"
    return f"{value:g}"


def _time(row: Row, key: str, minima: bool) -> str:
    return f"{_ms(row[key])} ({_ms(row[key + '_min'])})" if minima else _ms(row[key])


def _ms(value: float) -> str:
    return f"{value:.3f}" if value < 10 else f"{value:.1f}"


def _share(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.0f} %"


def _aligned(rows: Sequence[Row], minima: bool) -> str:
    texts = [cells(row, minima) for row in rows]
    widths = [max(map(len, column)) for column in zip(HEADS, *texts, strict=True)]

    def line(parts: Sequence[str]) -> str:
        first = f"  {parts[0]:<{widths[0]}}"
        return first + "".join(f"  {part:>{width}}" for part, width in zip(parts[1:], widths[1:], strict=True))

    out = [line(HEADS), "  " + "-" * (sum(widths) + 2 * (len(widths) - 1))]
    stage = None
    for row, text in zip(rows, texts, strict=True):
        if row["stage"] != stage:
            stage = row["stage"]
            out.append(str(stage))
        out.append(line(text))
    return "\n".join(out) + "\n"
