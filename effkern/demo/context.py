"""What every stage of the demo is given, and what it gives back."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from effkern.data import Dataset
from effkern.training import FitResult, Recipe, Timing, evaluate, fit, load_weights, measure, progress, say

__all__ = ["DemoContext", "Row", "StageResult", "Subject"]

Predict = Callable[[Tensor], Any]

BATCH = 64  # the large batch of every row
SINGLES = 8  # images that one timed call at batch 1 runs, one after another: a per-image cost, less timer noise
MIN_STEPS = 100  # in an epoch
POOL = 8  # different batches that the timed calls take in turn, since dynamic networks cost what the images ask for


@dataclass
class Subject:
    """One network to be timed, with what is known of it already.

    Attributes:
        name: of the row.
        top1: accuracy on the test set, percent.
        params: parameters.
        bytes_on_disk: of the weights that deployment needs, saved.
        macs: multiply-adds per image (a mean where it depends on the image).
        eager: the same function in plain eager PyTorch, by form (``"nchw"``, ``"channels_last"``, ``"masked"``, ..);
            the row shows the fastest.
        run: the same function on effkern; None where effkern has no part in it (the baseline).
        relative_to: name of the subject whose multiply-adds and time are 100 % for this one.
        note: what a reader must know, in a sentence.
    """

    name: str
    top1: float
    params: int
    bytes_on_disk: int
    macs: float
    eager: Mapping[str, Predict]
    run: Predict | None = None
    relative_to: str | None = None
    note: str = ""


@dataclass
class Row:
    """One row of the table; times are milliseconds per image, medians and minima.

    ``top1`` is in percent; ``eager_form_*`` names the fastest eager form; ``*_left`` are shares of the row
    ``relative_to``; ``eager_only`` says that effkern has no part in the row; ``disagreeing`` is the share of images on
    which two forms gave different scores.
    """

    stage: str
    name: str
    top1: float
    params: int
    bytes_on_disk: int
    macs: float
    ms_b1: float
    ms_b64: float
    eager_ms_b1: float
    eager_ms_b64: float
    ms_b1_min: float
    ms_b64_min: float
    eager_ms_b1_min: float
    eager_ms_b64_min: float
    eager_form_b1: str
    eager_form_b64: str
    repetitions: int
    macs_left: float | None = None
    time_left_b1: float | None = None
    time_left_b64: float | None = None
    relative_to: str | None = None
    eager_only: bool = False
    disagreeing: float = 0.0
    note: str = ""


@dataclass
class StageResult:
    """What a stage hands back.

    Attributes:
        rows: of the table, from :func:`.measuring.measure_rows`.
        extra: plain data for the report; must survive JSON. The page draws two keys of it:
            ``"curves"``: ``[{"title", "x", "y", "series": {name: [[x, y], ...]}}]``, and
            ``"blocks"``: ``{"usage": [share of images for each block], "patterns": number of different policies,
            "samples": [{"index": of a test image, "predicted": label, "keep": [0 or 1 for each block]}]}``.
        state: name -> state dict; saved as safetensors, read back by :meth:`DemoContext.load_state`.
        notes: honest sentences for the report: where effkern loses, what was cut short.
    """

    rows: list[Row]
    extra: dict[str, Any] = field(default_factory=dict)
    state: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def plain(self) -> dict[str, Any]:
        """Everything but the weights, as plain data."""
        return {"rows": [asdict(row) for row in self.rows], "extra": self.extra, "notes": self.notes}


@dataclass
class DemoContext:
    """The data, the budgets and the tools of a stage.

    Attributes:
        data: images; see :class:`effkern.data.Dataset`.
        folder: of this run; a stage writes nothing there itself, it returns a :class:`StageResult`.
        seed: of the run; ``generator(k)`` gives independent streams.
        quick: whether this is a smoke test: tiny nets, few steps, short measurements.
        threads: of torch.
        budget_s: stage -> seconds its training may take; measuring comes on top.
        measure_s: seconds of timing for each form of each subject of ``measure_rows``.
        begun: when the running stage began, on ``time.monotonic``.
    """

    data: Dataset
    folder: Path
    seed: int = 0
    quick: bool = False
    threads: int = 1
    budget_s: dict[str, float] = field(default_factory=dict)
    measure_s: float = 3.0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    begun: float = field(default_factory=time.monotonic)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of an image."""
        channels, height, width = self.data.test.images.shape[1:]
        return channels, height, width

    @property
    def classes(self) -> int:
        """Number of labels."""
        return len(self.data.classes)

    def generator(self, stream: int = 0) -> torch.Generator:
        """A random generator; streams are independent and depend on the seed only."""
        return torch.Generator().manual_seed(self.seed * 1_000_003 + stream)

    def time_left(self, stage: str) -> float:
        """Seconds of the stage's budget that are left; at least one, infinite where it has none."""
        return max(1.0, self.begun + self.budget_s.get(stage, float("inf")) - time.monotonic())

    def progress(self, what: Iterable[Any] | int, desc: str) -> Any:
        """A progress bar with the time left, over an iterable or ``what`` steps counted with ``update``."""
        return progress(what, desc)

    def say(self, text: str) -> None:
        """Print a line without tearing a bar."""
        say(text)

    def batches(self, split: str, batch_size: int = 256, *, train: bool = False, stream: int = 0) -> Iterable[Any]:
        """One pass over ``"train"``, ``"val"`` or ``"test"`` as normalised ``(x, labels)``.

        With ``train`` shuffled and augmented, otherwise in order.
        """
        generator = self.generator(stream) if train else None
        return self.data.batches(getattr(self.data, split), batch_size, generator=generator, augment=train)

    def fit(
        self,
        model: nn.Module,
        recipe: Recipe,
        *,
        batch_size: int = 256,
        stream: int = 0,
        augment: bool = True,
        **options: Any,
    ) -> FitResult:
        """Train on the training split, shuffled and by default augmented; options as in :func:`effkern.training.fit`.

        With ``quick`` at most 2 steps are taken. A small data set (the digits) is gone through more often, so that
        an epoch has at least 100 steps.
        """
        generator = self.generator(stream)
        train = self.data.train
        batch_size = min(batch_size, len(train))
        steps = max(MIN_STEPS, len(train) // batch_size)
        if self.quick:
            recipe = Recipe(**{**asdict(recipe), "epochs": min(recipe.epochs, 2 / steps)})
        return fit(
            model,
            lambda: self.data.batches(train, batch_size, generator=generator, augment=augment),
            steps,
            recipe,
            **options,
        )

    def accuracy(self, predict: Callable[[Tensor], Tensor], split: str = "test", batch_size: int = 250) -> float:
        """Top-1 in percent of a module (in eval mode) or a function that returns scores."""
        return evaluate(predict, self.batches(split, batch_size))

    def load_state(self, stage: str, name: str) -> dict[str, Tensor]:
        """State dict ``name`` that a finished stage returned.

        Raises:
            CheckpointError: if that stage has not finished.
        """
        return load_weights(self.folder / "stages" / f"{stage}.{name}.safetensors")

    def measure(self, functions: Mapping[str, Callable[[], object]], seconds: float | None = None) -> dict[str, Timing]:
        """Interleaved timings of functions without arguments; see :func:`effkern.training.measure`."""
        return measure(functions, seconds=self.measure_s * len(functions) if seconds is None else seconds)
