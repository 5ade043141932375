"""Draws the results: ``python -m benchmarks.plot [FILE]`` makes SVGs beside the file, nothing is drawn by hand.

``cpu.svg``: whole networks, the speed of every contender relative to the best peer; the README's picture.
``cpu_layers.svg``: single layers, the same.
``cpu_saved.svg``: time left against multiply-adds left; on the diagonal saved work is saved time.
"""

from __future__ import annotations

import argparse
import io
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from benchmarks import results
from benchmarks.results import Row, contests, is_ours
from effkern.training import write_atomically

matplotlib.use("Agg")
matplotlib.rcParams["svg.hashsalt"] = "effkern"  # else the ids inside differ from run to run

MARKS = {
    "effkern": ("o", "#d62728", 60),
    "eager_contiguous": ("^", "#7f7f7f", 24),
    "eager_channels_last": ("v", "#7f7f7f", 24),
    "mkldnn_prepacked": ("D", "#1f77b4", 18),
    "compile": ("s", "#17becf", 20),
    "onnxruntime": ("P", "#2ca02c", 26),
    "openvino": ("X", "#9467bd", 26),
    "ncnn": ("<", "#8c564b", 26),
    "mnn": (">", "#e377c2", 26),
}


def relative(rows: Sequence[Row], title: str) -> Figure | None:
    """A line a contest: where every contender stands, the best peer at 1. By medians."""
    found = [c for c in contests(rows) if any(not is_ours(r) for r in c)]
    if not found:
        return None
    figure, axis = plt.subplots(figsize=(8.5, 1.6 + 0.24 * len(found)), layout="constrained")
    for i, contest in enumerate(found):
        best = min(row["median_ms"] for row in contest if not is_ours(row))
        for row in contest:
            if row["impl"] in MARKS:
                mark, color, size = MARKS[row["impl"]]
                over = 3 if is_ours(row) else 2
                axis.scatter(best / row["median_ms"], i, s=size, marker=mark, color=color, zorder=over, linewidths=0)
    labels = [f"{c[0]['case']}  b{c[0]['batch']}  {c[0]['threads']}t" for c in found]
    axis.set_yticks(range(len(found)), labels, fontsize=8)
    axis.invert_yaxis()
    axis.axvline(1, color="black", linewidth=0.8, zorder=1)
    axis.grid(axis="x", color="#dddddd", linewidth=0.6, zorder=0)
    axis.set_xlim(left=0)
    axis.set_xlabel("speed relative to the best peer (medians; right of 1 is faster than every peer)", fontsize=8)
    axis.set_title(title, fontsize=10)
    present = {row["impl"] for contest in found for row in contest}
    for name, (mark, color, size) in MARKS.items():
        if name in present:
            axis.scatter([], [], s=size, marker=mark, color=color, label=name, linewidths=0)
    figure.legend(loc="outside lower center", fontsize=7, ncols=5)
    return figure


def saved(rows: Sequence[Row]) -> Figure | None:
    """Time left over multiply-adds left, one line for each piece of work and batch size."""
    rows = [
        r for r in rows if r.get("time_left") is not None and r["impl"] == "effkern" and r.get("macs_left") is not None
    ]
    rows = [r for r in rows if r["op"] in ("skip_stage", "width")]
    if len({r["macs_left"] for r in rows}) < 2:
        return None
    figure, axis = plt.subplots(figsize=(6.5, 5.5), layout="constrained")
    axis.plot([0, 1], [0, 1], color="gray", linestyle=":", linewidth=1, label="saved work is saved time")
    series: dict[tuple[str, int], list[tuple[float, float]]] = {}
    for row in rows:
        name = row.get("network") or row["case"].partition(",")[0]
        series.setdefault((name, row["batch"]), []).append((row["macs_left"], row["time_left"]))
    for i, ((name, batch), points) in enumerate(series.items()):
        xs, ys = zip(*sorted(points), strict=True)
        axis.plot(xs, ys, marker="o", markersize=3, linewidth=1, color=f"C{i % 10}", label=f"{name}, batch {batch}")
    axis.set_xlabel("multiply-adds left")
    axis.set_ylabel("time left")
    axis.legend(fontsize=7)
    return figure


def main(argv: Sequence[str] | None = None) -> list[Path]:
    """Draw one file of results; returns the files written."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plot")
    parser.add_argument("file", nargs="?", type=Path, default=results.CPU)
    file: Path = parser.parse_args(argv).file
    rows = [row for row in results.load(file)["rows"] if row.get("median_ms") is not None]
    networks = [row for row in rows if row["op"] == "network"]
    layers = [row for row in rows if row["family"] == "rep_conv"]
    figures = {
        "": relative(networks, "Whole networks, float32"),
        "_layers": relative(layers, "Single layers with their epilogue, float32"),
        "_saved": saved(rows),
    }
    written = []
    for suffix, figure in figures.items():
        if figure is None:
            continue
        picture = io.BytesIO()
        figure.savefig(picture, format="svg", metadata={"Date": None})
        written.append(file.with_name(f"{file.stem}{suffix}.svg"))
        write_atomically(written[-1], picture.getvalue())
        plt.close(figure)
        print(written[-1])
    return written


if __name__ == "__main__":
    main()
