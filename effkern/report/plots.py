"""The pictures of a report, as PNG bytes. Figures are made without pyplot: no global state, no screen needed."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from torch import Tensor

__all__ = ["accuracy_versus_time", "block_usage", "curves", "saved_work", "who_used_what"]

Row = Mapping[str, Any]

# Okabe and Ito's palette, told apart by colour-blind readers too; one colour a stage, everywhere.
COLOURS = {
    "baseline": "#000000",
    "rep_conv": "#0072B2",
    "block_skip": "#D55E00",
    "sliced_conv": "#009E73",
    "pq": "#CC79A7",
}
OTHER = "#56B4E9"
GREY = "#8a8f98"
DPI = 144
ALL = 0.999  # a row with more of the work left saves none


def accuracy_versus_time(rows: Sequence[Row]) -> bytes:
    """Top-1 over milliseconds per image: effkern filled, eager hollow, a line between the two."""
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    for axes, batch, label in zip(figure.subplots(1, 2, sharey=True), ("b1", "b64"), (1, 64), strict=True):
        for number, row in enumerate(rows, 1):
            colour = _colour(row["stage"])
            eager, own = row[f"eager_ms_{batch}"], row[f"ms_{batch}"]
            axes.plot([eager, own], [row["top1"]] * 2, color=colour, alpha=0.45, linewidth=1.2, zorder=1)
            axes.scatter([eager], [row["top1"]], facecolors="white", edgecolors=colour, s=34, linewidths=1.4, zorder=2)
            axes.scatter([own], [row["top1"]], color=colour, s=44, zorder=3)
            _number(axes, number, (own, row["top1"]))
        axes.set_xscale("log")
        # Plain numbers where a reader looks for them: 0.2, 0.5, 1.
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel(f"milliseconds per image at batch {label} (median)")
        _plain(axes)
    figure.axes[0].set_ylabel("top-1, %")
    both = [
        figure.axes[0].scatter([], [], color=GREY, s=44, label="effkern"),
        figure.axes[0].scatter([], [], facecolors="white", edgecolors=GREY, s=34, label="PyTorch eager"),
    ]
    _explain(figure, rows, rows, both)
    return _png(figure)


def saved_work(rows: Sequence[Row]) -> bytes | None:
    """Time left over multiply-adds left: on the diagonal every saved multiply-add is saved time."""
    points = [row for row in rows if row["macs_left"] is not None and row["macs_left"] < ALL]
    if not points:
        return None
    top = 1.08 * max(1.0, *(max(row["macs_left"], row["time_left_b1"], row["time_left_b64"]) for row in points))
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    for axes, batch, label in zip(figure.subplots(1, 2, sharey=True), ("b1", "b64"), (1, 64), strict=True):
        axes.plot([0, top], [0, top], color=GREY, linewidth=1, linestyle="--", zorder=1)
        for row in points:
            place = (row["macs_left"], row[f"time_left_{batch}"])
            axes.scatter(*place, color=_colour(row["stage"]), s=44, zorder=2)
            _number(axes, rows.index(row) + 1, place)
        axes.set_xlim(0, top)
        axes.set_ylim(0, top)
        axes.set_xlabel(f"share of multiply-adds left, batch {label}")
        _plain(axes)
    figure.axes[0].set_ylabel("share of time left")
    _explain(figure, rows, points)
    return _png(figure)


def block_usage(usage: Sequence[float]) -> bytes:
    """How many of the images ran each block."""
    figure = Figure(figsize=(11, 2.6), layout="constrained")
    axes = figure.subplots()
    axes.bar(range(1, len(usage) + 1), [100 * share for share in usage], color=COLOURS["block_skip"])
    axes.set_ylim(0, 100)
    axes.set_xlabel("block")
    axes.set_ylabel("images that run it, %")
    axes.set_xticks(range(1, len(usage) + 1))
    _plain(axes)
    return _png(figure)


def who_used_what(
    samples: Sequence[Mapping[str, Any]], images: Tensor, labels: Tensor, classes: Sequence[str]
) -> bytes:
    """Sample images, and under each the blocks it ran (filled) or skipped (hollow).

    Args:
        samples: ``index`` into ``images``, ``predicted`` label, ``keep`` with 0 or 1 for each block.
        images: ``[n, c, h, w]`` uint8.
        labels: ``[n]``.
        classes: names of the labels.
    """
    columns = min(6, len(samples))
    lines = -(-len(samples) // columns)
    figure = Figure(figsize=(11, 2.5 * lines), layout=ConstrainedLayoutEngine(h_pad=0.12))
    grid = figure.subplots(lines, columns, squeeze=False)
    for axes in grid.flat:
        axes.axis("off")
    for axes, sample in zip(grid.flat, samples, strict=False):
        image = images[sample["index"]].numpy().transpose(1, 2, 0)
        height, width = image.shape[:2]
        axes.imshow(image[:, :, 0] if image.shape[2] == 1 else image, cmap="gray_r", interpolation="nearest")
        keep = np.asarray(sample["keep"])
        step = width / len(keep)
        centres = (np.arange(len(keep)) + 0.5) * step - 0.5
        fill = [COLOURS["block_skip"] if used else "white" for used in keep]
        axes.bar(
            centres, 3.0, 0.82 * step, bottom=height + 0.6, color=fill, edgecolor=COLOURS["block_skip"], linewidth=0.7
        )
        axes.set_xlim(-0.5, width - 0.5)
        axes.set_ylim(height + 4.2, -0.5)
        truth, predicted = int(labels[sample["index"]]), int(sample["predicted"])
        axes.set_title(
            f"{_text(classes[truth])}: {int(keep.sum())} of {len(keep)}"
            + ("" if truth == predicted else f"\n(taken for {_text(classes[predicted])})"),
            fontsize=9,
            color="#1d2430" if truth == predicted else "#b3261e",
        )
    return _png(figure)


def curves(given: Mapping[str, Any]) -> bytes:
    """Lines: labels ``x`` and ``y``, and ``series``, name -> list of [x, y]."""
    figure = Figure(figsize=(7.2, 3.6), layout="constrained")
    axes = figure.subplots()
    palette = [*COLOURS.values(), OTHER][1:]
    for number, (name, points) in enumerate(given["series"].items()):
        xs, ys = zip(*points, strict=True) if points else ((), ())
        axes.plot(
            xs,
            ys,
            label=_text(name),
            color=palette[number % len(palette)],
            marker="o" if len(xs) < 30 else None,
            markersize=4,
        )
    axes.set_xlabel(_text(given["x"]))
    axes.set_ylabel(_text(given["y"]))
    if len(given["series"]) > 1:
        axes.legend(frameon=False, fontsize=8)
    _plain(axes)
    return _png(figure)


def _number(axes: Any, number: int, place: tuple[float, float]) -> None:
    axes.annotate(str(number), place, textcoords="offset points", xytext=(0, 6), ha="center", fontsize=8)


def _explain(figure: Figure, rows: Sequence[Row], shown: Sequence[Row], handles: Sequence[Any] = ()) -> None:
    """What colours and numbers mean; a row has the same number in every plot."""
    axes = figure.axes[0]
    colours = [axes.scatter([], [], color=_colour(stage), s=44, label=stage) for stage in _stages(shown)]
    listed = [*handles, *colours]
    figure.legend(handles=listed, loc="outside upper center", ncols=len(listed), frameon=False, fontsize=9)
    names = "\n".join(f"{number}  {_text(row['name'])}" for number, row in enumerate(rows, 1) if row in shown)
    figure.text(1.0, 0.5, names, fontsize=8, va="center", ha="left")


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    FigureCanvasAgg(figure)
    # Without the version of matplotlib and the time in the file, equal pictures are equal files.
    figure.savefig(buffer, format="png", dpi=DPI, bbox_inches="tight", metadata={"Software": None})
    return buffer.getvalue()


def _plain(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, color="#e3e6ea", linewidth=0.8)
    axes.set_axisbelow(True)


def _colour(stage: str) -> str:
    return COLOURS.get(stage, OTHER)


def _stages(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(row["stage"] for row in rows))


def _text(text: object) -> str:
    """Text as it is: matplotlib would read dollars as mathematics."""
    return str(text).replace("$", r"\$")
