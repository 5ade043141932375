"""The last checkpoints of a run, so that a damaged one costs minutes and not the run."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .checkpoint import CheckpointError
from .progress import say
from .snapshot import load_snapshot, save_snapshot

__all__ = ["History"]

_NAME = re.compile(r"step-(\d{8})\.safetensors")


class History:
    """The newest ``keep`` checkpoints in a folder, one file a step.

    Args:
        folder: made when the first is written.
        keep: files kept, at least 2: a file may be damaged without anyone noticing until it is needed.
        tell: prints a line.
    """

    def __init__(self, folder: Path, keep: int = 3, tell: Callable[[str], None] = say) -> None:
        if keep < 2:
            raise ValueError(f"keep: must be at least 2, got {keep}")
        self.folder, self.keep, self.tell = folder, keep, tell

    def paths(self) -> list[Path]:
        """The checkpoints, oldest first."""
        found = [path for path in self.folder.glob("step-*.safetensors") if _NAME.fullmatch(path.name)]
        return sorted(found, key=lambda path: path.name)

    @property
    def newest(self) -> Path | None:
        """The newest checkpoint, unread."""
        return self.paths()[-1] if self.paths() else None

    def stands(self) -> str:
        """For an error message: what there is to go on from."""
        return f"the last good checkpoint is {self.newest}" if self.newest else "there is no checkpoint yet"

    def save(self, step: int, state: Any) -> Path:
        """Write a checkpoint, then forget the oldest beyond ``keep``.

        Raises:
            CheckpointError: if it cannot be written, naming the newest that stands; none is lost.
        """
        path = self.folder / f"step-{step:08}.safetensors"
        try:
            save_snapshot(path, state)
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be written: {error.strerror or error}; {self.stands()}") from error
        for old in self.paths()[: -self.keep]:
            old.unlink(missing_ok=True)
        return path

    def load(self) -> Any | None:
        """The newest checkpoint that is whole, or None if there is none at all.

        A damaged one is named and set aside as ``*.damaged``, and the one before it is taken.

        Raises:
            CheckpointError: if there are checkpoints but not one is whole.
        """
        problems = []
        for path in reversed(self.paths()):
            try:
                return load_snapshot(path)
            except CheckpointError as error:
                problems.append(str(error))
                self.tell(f"{error}; trying the one before it.")
        if problems:
            text = "; ".join(problems)
            raise CheckpointError(f"no checkpoint is whole: {text}; use another folder, or start over with --fresh")
        return None

    def set_aside_after(self, step: int) -> None:
        """Rename checkpoints later than ``step``, which could not be read, so that they count no longer."""
        for path in self.paths():
            match = _NAME.fullmatch(path.name)
            if match and int(match[1]) > step:
                os.replace(path, path.with_name(f"{path.name}.damaged"))
