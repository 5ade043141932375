"""Metrics over the steps, as CSV files and for TensorBoard."""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Mapping
from io import StringIO
from pathlib import Path
from typing import Any

from .checkpoint import write_atomically
from .progress import say

__all__ = ["CsvLog", "TensorBoardLog"]

_ROW = re.compile(r"\d+,[\x20-\x7e]*$")


class CsvLog:
    """One row a step; the first row names the columns.

    Rows that cannot be written, as on a full disk, wait for the next one or for :meth:`flush`.

    Args:
        path: of the file.
        done: a resumed run keeps the rows up to this step; those after it are rewritten. A line that is no row, as one
            cut short or one of the zeros that a power cut may leave, is dropped; a file that is no log is set aside as
            ``*.damaged``.
    """

    def __init__(self, path: Path, done: int = 0) -> None:
        self.path = path
        self.columns: list[str] = []
        self._waiting, self._told = "", False
        text = path.read_text(errors="replace") if done and path.is_file() else ""
        head, *lines = text.split("\n")[:-1] or [""]  # what no newline ends was cut short
        if head.startswith("step,"):
            self.columns = next(csv.reader([head]))
            rows = [line for line in lines if line.count(",") == head.count(",") and _ROW.match(line)]
            kept = [row for row in rows if int(row.split(",", 1)[0]) <= done]
            write_atomically(path, "".join(f"{line}\n" for line in [head, *kept]).encode())
            return
        if text:
            say(f"{path}: is no log of a run; set aside as {path.name}.damaged.")
            os.replace(path, path.with_name(f"{path.name}.damaged"))
        path.unlink(missing_ok=True)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Append a row. A column that was not there in the first row is refused, so that no file has two shapes.

        Raises:
            ValueError: for other names than those of the first row.
        """
        row = {"step": step, **values}
        text = StringIO()
        writer = csv.writer(text, lineterminator="\n")
        if not self.columns:
            self.columns = list(row)
            writer.writerow(self.columns)
        if list(row) != self.columns:
            was, now = ", ".join(self.columns[1:]), ", ".join(values)
            raise ValueError(f"{self.path}: values must be {was}, as in its first row, got {now}")
        writer.writerow([repr(value) if isinstance(value, float) else value for value in row.values()])
        self._waiting += text.getvalue()
        try:
            self.flush()
        except OSError as error:
            if not self._told:
                say(f"{self.path}: cannot be written yet: {error}. Training goes on.")
            self._told = True

    def flush(self) -> None:
        """Write the rows that wait.

        Raises:
            OSError: if they cannot be written; the file then ends with a whole row, and they go on waiting.
        """
        if not self._waiting:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        size = self.path.stat().st_size if self.path.is_file() else 0
        try:
            with open(self.path, "a") as file:
                file.write(self._waiting)
        except OSError:
            if self.path.is_file():
                os.truncate(self.path, size)
            raise
        self._waiting, self._told = "", False


class TensorBoardLog:
    """The same for TensorBoard, if it is installed.

    Args:
        folder: of the event files.
        done: later steps of an earlier start are hidden.

    Raises:
        ModuleNotFoundError: naming the package, if it is not installed.
    """

    def __init__(self, folder: Path, done: int = 0) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ModuleNotFoundError(
                "TensorBoard logs need the package tensorboard (pip install tensorboard); train.csv and eval.csv are "
                "written without it"
            ) from error
        self._writer: Any = SummaryWriter(str(folder), purge_step=done + 1 if done else None)

    def write(self, step: int, values: Mapping[str, float], group: str = "train") -> None:
        """Note each value as ``group/name``."""
        for name, value in values.items():
            self._writer.add_scalar(f"{group}/{name}", value, step)

    def close(self) -> None:
        """Write what is still in memory."""
        self._writer.close()
