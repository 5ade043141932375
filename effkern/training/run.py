"""The folder of a run: its configuration, checkpoints, logs and best weights."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from torch import Tensor, nn

from .checkpoint import CheckpointError, in_a_line, save_weights
from .config import check
from .counting import plain_tensors
from .history import History
from .logs import CsvLog, TensorBoardLog
from .parallel import World
from .progress import say

__all__ = ["Run"]


@dataclass
class Run:
    """Where a run is kept, and how often.

    ``checkpoints/step-*.safetensors``: everything needed to go on. ``train.csv`` and ``eval.csv``: metrics.
    ``best.safetensors``: weights where the method's score was best. While nothing can be written, as on a full disk,
    training goes on and rows and weights wait in memory; at the end of the run that is an error.

    Attributes:
        folder: made if need be; what is there is resumed.
        config: plain data that a resumed run must share; kept in every checkpoint.
        defaults: what ``config`` has where nothing is said: that of an option the checkpoint's version did not have.
        save_every_s: seconds between checkpoints; 0 saves after every step.
        keep: checkpoints kept.
        log_every: steps a row of ``train.csv``, means over them.
        evaluate_every: epochs between evaluations; 0 evaluates at the end only.
        tensorboard: whether metrics go to TensorBoard as well.
        norms: whether the norm of the gradient and of the weights' change is logged, of all parameters together.
    """

    folder: Path
    config: Mapping[str, Any] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    save_every_s: float = 300.0
    keep: int = 3
    log_every: int = 10
    evaluate_every: float = 1.0
    tensorboard: bool = False
    norms: bool = False

    def __post_init__(self) -> None:
        check(
            self,
            log_every=(self.log_every >= 1, "at least 1"),
            save_every_s=(self.save_every_s >= 0, "at least 0"),
            evaluate_every=(self.evaluate_every >= 0, "at least 0"),
        )
        self.history = History(self.folder / "checkpoints", self.keep)
        self._saved = time.monotonic()
        self._rows: list[dict[str, float]] = []
        self._writes = True
        self._board: TensorBoardLog | None = None
        self._best: dict[str, Tensor] | None = None  # not yet on disk

    def start(
        self,
        ranks: World,
        load: Callable[[dict[str, Any]], None],
        fixed: Mapping[str, Any],
        defaults: Mapping[str, Any],
    ) -> None:
        """Resume from the newest whole checkpoint, if there is one, and open the logs.

        Args:
            ranks: the first one writes; all read.
            load: takes the state a checkpoint holds.
            fixed: what must not differ from the checkpoint's, beside ``config``.
            defaults: of ``fixed``.

        Raises:
            CheckpointError: if the checkpoint is of another configuration, or does not fit the method.
        """
        self._writes, done = ranks.is_first, 0
        self._fixed = {**self.config, **fixed}
        found = self.history.load()
        if found is not None:
            where = self.history.folder
            if changed := _differences(found.get("config", {}), self._fixed, {**self.defaults, **defaults}):
                raise CheckpointError(
                    f"{where}: holds a run of another configuration ({'; '.join(changed)}); use the old "
                    "configuration, another folder, or start over with --fresh"
                )
            try:
                load(found["state"])
            except (RuntimeError, ValueError, KeyError) as error:
                raise CheckpointError(f"{where}: does not fit what is to be trained: {in_a_line(error)}") from error
            done = found["state"]["step"]
            self._rows = found["rows"]
        ranks.wait()  # nobody renames a file before all have read
        if not self._writes:
            return
        if found is not None:
            self.history.set_aside_after(done)
        self._train = CsvLog(self.folder / "train.csv", done)
        self._eval = CsvLog(self.folder / "eval.csv", done)
        if self.tensorboard:
            self._board = TensorBoardLog(self.folder / "tensorboard", done)

    def evaluates(self, step: int, steps_per_epoch: int) -> bool:
        """Whether an evaluation is due after ``step`` steps."""
        every = max(1, round(self.evaluate_every * steps_per_epoch))
        return bool(self.evaluate_every) and step % every == 0

    def saves(self, now: bool) -> bool:
        """Whether a checkpoint is due; the first rank alone writes."""
        return self._writes and (now or time.monotonic() - self._saved >= self.save_every_s)

    def log(self, step: int, metrics: dict[str, float], last: bool) -> None:
        """Take the metrics of a step; the mean over ``log_every`` steps becomes a row."""
        if not self._writes:
            return
        self._rows.append(metrics)
        if step % self.log_every == 0 or last:
            # Steps before a resumption may have logged less.
            means = {name: fmean(row[name] for row in self._rows if name in row) for name in metrics}
            self._train.write(step, means)
            if self._board is not None:
                self._board.write(step, means)
            self._rows.clear()

    def log_evaluation(self, step: int, metrics: dict[str, float]) -> None:
        """Write a row of ``eval.csv``."""
        if self._writes:
            self._eval.write(step, metrics)
            if self._board is not None:
                self._board.write(step, metrics, "eval")

    def save(self, step: int, state: dict[str, Any], required: bool) -> None:
        """Write a checkpoint, and first what it relies on: the rows and the best weights before it.

        What cannot be written is an error if ``required``, otherwise it is said and tried again next time: a disk may
        be cleared while a long run goes on.

        Raises:
            CheckpointError: see above.
        """
        self._saved = time.monotonic()
        try:
            try:
                self._write_best()
                self._train.flush()
                self._eval.flush()
            except OSError as error:
                raise CheckpointError(f"{self.folder}: cannot be written: {error}; {self.history.stands()}") from error
            self.history.save(step, {"config": self._fixed, "state": state, "rows": self._rows})
        except CheckpointError as error:
            if required:
                raise
            say(f"{error}. Training goes on.")

    def save_best(self, module: nn.Module) -> None:
        """Keep the weights of ``module`` as the best so far."""
        if self._writes:
            self._best = plain_tensors(module.state_dict())
            try:
                self._write_best()
            except OSError as error:
                path, why = self.folder / "best.safetensors", error.strerror or error
                say(f"{path}: cannot be written yet: {why}. Training goes on.")

    def _write_best(self) -> None:
        if self._best is not None:
            save_weights(self.folder / "best.safetensors", self._best)
            self._best = None

    def close(self) -> None:
        """Flush what is in memory."""
        if self._board is not None:
            self._board.close()


def _differences(old: Any, new: Any, defaults: Any, name: str = "") -> list[str]:
    """What two nested dicts differ in, as ``"name: old, now new"``; what the old one lacks it has by default."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        known = defaults if isinstance(defaults, Mapping) else {}
        return [
            text
            for key in sorted({*old, *new}, key=str)
            for text in _differences(
                old.get(key, known.get(key)), new.get(key), known.get(key), f"{name}.{key}".lstrip(".")
            )
        ]
    old, new = (list(value) if isinstance(value, tuple) else value for value in (old, new))
    return [] if old == new else [f"{name}: {old!r}, now {new!r}"]
