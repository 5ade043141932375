"""Draws the results: ``python -m benchmarks.plot [FOLDER]`` makes PNGs beside the CSV files, nothing is drawn by hand.

``<name>_speed.png``: for each op, GFLOP/s of every contender per case, with the arithmetic peak of the same minutes.
``<name>_saved.png``: time left against multiply-adds left; on the diagonal saved work is saved time.
"""

from __future__ import annotations

import argparse
import csv
import io
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from effkern.training import write_atomically

matplotlib.use("Agg")
RESULTS = Path(__file__).with_name("results")
Row = dict[str, str]


def latest(path: Path) -> list[Row]:
    """The rows of a table, of each measurement the last one on the machine that measured last."""
    with path.open(newline="") as table:
        rows = list(csv.DictReader(table))
    if not rows:
        return []
    machine = rows[-1]["cpu"], rows[-1]["isa"]
    key = ("op", "case", "batch", "dtype", "layout", "contender", "threads")
    kept = {tuple(row[k] for k in key): row for row in rows if (row["cpu"], row["isa"]) == machine}
    return list(kept.values())


def speed(rows: Sequence[Row]) -> Figure | None:
    """Bars of GFLOP/s: a panel for each op and thread count, a group for each case."""
    rows = [r for r in rows if r["gflops"]]
    panels = list(dict.fromkeys((r["op"], r["threads"]) for r in rows))
    if not panels:
        return None
    figure, axes = plt.subplots(len(panels), 1, squeeze=False, figsize=(12, 3.6 * len(panels)), layout="constrained")
    names = list(dict.fromkeys(r["contender"] for r in rows))
    for axis, (op, threads) in zip(axes[:, 0], panels, strict=True):
        here = [r for r in rows if (r["op"], r["threads"]) == (op, threads)]
        cases = list(dict.fromkeys((r["case"], r["batch"], r["dtype"]) for r in here))
        width = 0.8 / len(names)
        for i, name in enumerate(names):
            bars = {(r["case"], r["batch"], r["dtype"]): float(r["gflops"]) for r in here if r["contender"] == name}
            at = [j + (i - (len(names) - 1) / 2) * width for j, case in enumerate(cases) if case in bars]
            heights = [bars[case] for case in cases if case in bars]
            axis.bar(at, heights, width, label=name, color=f"C{i % 10}")
        peak = max(float(r["peak_gflops_before"]) for r in here)
        axis.axhline(peak, color="gray", linestyle=":", linewidth=1)
        axis.annotate("multiply-add peak", (0, peak), fontsize=8, color="gray", va="bottom")
        labels = [f"{case}\nbatch {batch}{'' if dtype == 'float32' else ' ' + dtype}" for case, batch, dtype in cases]
        axis.set_xticks(range(len(cases)), labels, fontsize=7, rotation=0 if len(cases) <= 8 else 60)
        axis.set_ylabel("GFLOP/s of work done")
        axis.set_title(f"{op}, {threads} thread{'' if threads == '1' else 's'}, median", fontsize=10)
    axes[0, 0].legend(fontsize=7, ncols=4)
    return figure


def saved(rows: Sequence[Row]) -> Figure | None:
    """Time left over multiply-adds left, one line for each contender and batch size of each op."""
    rows = [r for r in rows if r["time_left"] and r["macs_left"] and r["contender"].startswith("effkern")]
    if len({r["macs_left"] for r in rows}) < 2:
        return None
    figure, axis = plt.subplots(figsize=(6.5, 6), layout="constrained")
    axis.plot([0, 1], [0, 1], color="gray", linestyle=":", linewidth=1, label="saved work is saved time")
    series = sorted({(r["op"], r["contender"], int(r["batch"]), r["threads"]) for r in rows})
    for i, (op, name, batch, threads) in enumerate(series):
        points = sorted(
            (float(r["macs_left"]), float(r["time_left"]))
            for r in rows
            if (r["op"], r["contender"], int(r["batch"]), r["threads"]) == (op, name, batch, threads)
        )
        label = f"{op}, {name}, batch {batch}, {threads} thread(s)"
        axis.plot(*zip(*points, strict=True), marker="o", markersize=3, linewidth=1, color=f"C{i % 10}", label=label)
    axis.set_xlabel("multiply-adds left")
    axis.set_ylabel("time left")
    axis.legend(fontsize=7)
    return figure


def main(argv: Sequence[str] | None = None) -> list[Path]:
    """Draw every table of a folder; returns the files written."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plot")
    parser.add_argument("folder", nargs="?", type=Path, default=RESULTS)
    folder = parser.parse_args(argv).folder
    written = []
    for table in sorted(folder.glob("*.csv")):
        rows = latest(table)
        for kind, draw in (("speed", speed), ("saved", saved)):
            figure = draw(rows)
            if figure is not None:
                written.append(table.with_name(f"{table.stem}_{kind}.png"))
                picture = io.BytesIO()
                figure.savefig(picture, format="png", dpi=110)
                write_atomically(written[-1], picture.getvalue())
                plt.close(figure)
                print(written[-1])
    return written


if __name__ == "__main__":
    main()
