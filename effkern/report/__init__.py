"""What a run of the demo leaves behind: a table, ``report.json``, ``report.html`` and the plots."""

from __future__ import annotations

import datetime
import os
import platform
import shutil
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from effkern.training import CheckpointError, load_json, save_json, say, write_atomically

from . import page, plots, table

__all__ = ["build", "load_report", "write_report"]

FORMAT = 1


def write_report(folder: Path, report: Mapping[str, Any], images: Tensor, labels: Tensor) -> Path:
    """Print the table and write ``report.json``, ``report.html`` and the PNG plots to ``folder``.

    Args:
        folder: of the run.
        report: from :func:`build`.
        images: test images ``[n, c, h, w]`` uint8 that stages may point at.
        labels: ``[n]``.

    Returns:
        The path of the page.
    """
    rows = report["rows"]
    width = shutil.get_terminal_size((160, 40)).columns
    say("\n" + table.terminal(rows, width))
    say(textwrap.fill(table.LEGEND, min(width, 120)))
    for sentence in table.losses(rows):
        say(f"  loss: {sentence}")
    if warning := table.unrest(rows):
        say(f"  {warning}")

    pictures = _pictures(report, images, labels)
    save_json(folder / "report.json", report)
    for file, _, _, png in pictures:
        write_atomically(folder / file, png)
    write_atomically(folder / "report.html", page.render(report, [picture[1:] for picture in pictures]).encode())
    return folder / "report.html"


def build(
    *,
    run: Mapping[str, Any],
    machine: Mapping[str, Any],
    classes: Sequence[str],
    stages: Mapping[str, Mapping[str, Any]],
    failed: Mapping[str, str],
) -> dict[str, Any]:
    """Everything ``report.json`` holds, as plain data.

    Args:
        run: ``quick``, ``seed``, ``threads``, ``seconds``, ``data``.
        machine: from :func:`effkern.info.machine`; memory and operating system are added.
        classes: names of the labels.
        stages: stage -> ``title``, ``seconds``, ``rows`` (plain), ``notes``, ``extra``.
        failed: stage -> reason.
    """
    return {
        "format": FORMAT,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "run": dict(run),
        "machine": {**machine, "ram_gib": _ram_gib(), "os": _os_name()},
        "classes": list(classes),
        "rows": [row for stage in stages.values() for row in stage["rows"]],
        "stages": {
            name: {key: stage[key] for key in ("title", "seconds", "notes", "extra")} for name, stage in stages.items()
        },
        "failed": dict(failed),
    }


def load_report(path: Path) -> dict[str, Any]:
    """Read a ``report.json``.

    Raises:
        CheckpointError: if the file is missing, damaged or no report.
    """
    report = load_json(path)
    if not isinstance(report, dict) or report.get("format") != FORMAT or not isinstance(report.get("rows"), list):
        raise CheckpointError(f"{path}: expected a report of format {FORMAT}, found something else")
    return report


def _pictures(report: Mapping[str, Any], images: Tensor, labels: Tensor) -> list[tuple[str, str, str, bytes]]:
    """``(file, title, caption, PNG)`` of everything there is to draw."""
    rows, stages = report["rows"], report["stages"]
    found: list[tuple[str, str, str, bytes]] = []
    if rows:
        caption = (
            "Filled: effkern. Hollow: the same function in PyTorch eager. Further left is faster, higher is better."
        )
        found.append(("accuracy_time.png", "Accuracy versus time", caption, plots.accuracy_versus_time(rows)))
    if png := plots.saved_work(rows):
        caption = "On the dashed line every saved multiply-add is saved time; above it, overhead eats part of it."
        found.append(("saved_work.png", "Saved work and saved time", caption, png))
    for name, stage in stages.items():
        if blocks := stage["extra"].get("blocks"):
            caption = (
                f"{blocks['patterns']} different policies over the test set; mean {sum(blocks['usage']):.1f} blocks."
            )
            png = plots.block_usage(blocks["usage"])
            found.append((f"{name}_usage.png", f"{name}: which blocks the images used", caption, png))
            if blocks["samples"]:
                caption = "Test images with the blocks each of them ran: filled is run, hollow is skipped."
                png = plots.who_used_what(blocks["samples"], images, labels, report["classes"])
                found.append((f"{name}_samples.png", f"{name}: image by image", caption, png))
        for number, curve in enumerate(stage["extra"].get("curves", ()), 1):
            found.append((f"{name}_curve{number}.png", f"{name}: {curve['title']}", "", plots.curves(curve)))
    return found


def _ram_gib() -> float:
    return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)


def _os_name() -> str:
    try:
        return platform.freedesktop_os_release()["PRETTY_NAME"]
    except (OSError, KeyError):
        return platform.platform()
