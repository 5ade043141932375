"""The one training loop: any method, one process or many, stopped and resumed at any step with the same end.

What makes a resumed run the same to the last bit: a step is a function of the saved state and of its number alone. The
data order, the augmentation, every draw of the method, dropout and the learning rate follow from (seed, step), so there
is no generator, sampler or scheduler to save.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .config import defaults_of
from .criterion import Criterion
from .ema import Ema
from .interrupt import Interrupted, StopRequest, stop_on_signals
from .method import Batches, Loss, Method, Step, Supervised, stream_seed
from .norms import observed_step
from .parallel import World, world
from .progress import progress
from .recipe import Recipe, learning_rate, make_optimizer, parameters_of, set_learning_rate
from .run import Run

__all__ = ["Feed", "FitResult", "fit", "train"]

_GLOBAL = 0x61  # stream of torch's own generator (dropout)


class Feed(Protocol):
    """Training data by step number.

    One that also has ``rows(step, part, parts)`` says which samples those are; see :attr:`Step.rows`.
    """

    steps_per_epoch: int

    def __call__(self, step: int, part: int, parts: int) -> tuple[Tensor, Tensor]:
        """Part ``part`` of ``parts`` of the batch of ``step``, as ``(x, y)``; parts are equally large."""


@dataclass
class FitResult:
    """What a training run did.

    Attributes:
        steps: taken of those planned, over all starts.
        planned: by the recipe.
        seconds: over all starts.
        losses: of every step since this start.
        metrics: of the last evaluation.
        best: metrics where the method's score was best.
    """

    steps: int
    planned: int
    seconds: float
    losses: list[float] = field(repr=False)
    metrics: dict[str, float] = field(default_factory=dict)
    best: dict[str, float] = field(default_factory=dict)

    @property
    def cut_short(self) -> bool:
        """Whether the time budget ended the run before its planned steps."""
        return self.steps < self.planned

    def remark(self, what: str) -> str:
        """A sentence for a report, when the run was cut short."""
        return f"{what} took {self.steps} of its {self.planned} planned steps: its time was over."

    def plain(self, points: int = 60) -> dict[str, Any]:
        """Plain data for a report: the numbers, and the loss as about ``points`` means over the run."""
        width = max(1, math.ceil(len(self.losses) / points))
        chunks = [self.losses[begin : begin + width] for begin in range(0, len(self.losses), width)]
        return {
            "steps": self.steps,
            "planned": self.planned,
            "seconds": round(self.seconds, 2),
            "loss": [round(sum(chunk) / len(chunk), 4) for chunk in chunks],
        }


def train(
    method: Method,
    feed: Feed,
    recipe: Recipe,
    *,
    run: Run | None = None,
    held_out: Callable[[], Batches] | None = None,
    desc: str = "train",
    clock: Callable[[], float] = time.monotonic,
) -> FitResult:
    """Train a method and leave it in eval mode, with the last weights.

    Under ``torchrun`` every process calls this with the same arguments; each takes its part of every batch.

    Args:
        method: what is trained.
        feed: the data, with batches of ``recipe.batch_size``.
        recipe: how.
        run: the folder with checkpoints and logs; what is there is resumed. None keeps nothing.
        held_out: a fresh pass over held-out data, for :meth:`Method.evaluate`; needs ``run``.
        desc: shown with the progress bar and in errors.
        clock: seconds counter; tests pass a fake one.

    Raises:
        FloatingPointError: if the loss or the weights stop being finite, naming the step and the last good checkpoint.
        CheckpointError: if there is a checkpoint, but of another configuration or method, or none is whole.
        Interrupted: after Ctrl-C or SIGTERM, with the state saved if there is a ``run``.
        ValueError: if the batch size cannot be divided among the ranks.
    """
    with stop_on_signals(run is not None) as stop:
        loop = _Loop(method, feed, recipe, run, held_out, desc, clock, world(_device(method)))
        try:
            return loop.run(stop)
        finally:
            method.eval()
            loop.close()


def _numbers(values: Iterable[Any]) -> list[float]:
    """Scalars and numbers as floats, after one wait for the device they are on."""
    values = list(values)
    on_device = [value.detach().double().reshape(()) for value in values if isinstance(value, Tensor)]
    found = iter(torch.stack(on_device).tolist() if on_device else [])
    return [next(found) if isinstance(value, Tensor) else float(value) for value in values]


def _device(module: nn.Module) -> torch.device:
    return next((p.device for p in module.parameters()), torch.device("cpu"))


class _Loop:
    """The state of a run: the method, its optimizer, the average of its weights, the number of steps done."""

    def __init__(
        self,
        method: Method,
        feed: Feed,
        recipe: Recipe,
        run: Run | None,
        held_out: Callable[[], Batches] | None,
        desc: str,
        clock: Callable[[], float],
        ranks: World,
    ) -> None:
        self.method, self.feed, self.recipe, self.files, self.held_out = method, feed, recipe, run, held_out
        self.desc, self.clock, self.ranks, self.device = desc, clock, ranks, _device(method)
        if recipe.batch_size % (ranks.size * recipe.accumulate):
            raise ValueError(
                f"batch_size: must be a multiple of ranks x accumulate = {ranks.size} x {recipe.accumulate}, "
                f"got {recipe.batch_size}"
            )
        self.planned = max(1, round(recipe.epochs * feed.steps_per_epoch))
        ranks.copy_from_first(method)
        self.optimizer = make_optimizer(method.parameter_groups(recipe), recipe)
        self.parameters = parameters_of(self.optimizer)
        self.ema = Ema(method, recipe.ema) if recipe.ema else None
        self.step, self.before = 0, 0.0
        self.losses: list[float] = []
        self.metrics: dict[str, float] = {}
        self.best: dict[str, float] = {}
        self.begin = clock()
        if run is not None:
            fixed = {"recipe": asdict(recipe), "planned": self.planned}
            run.start(ranks, self.load_state, fixed, {"recipe": defaults_of(recipe)})

    @property
    def seconds(self) -> float:
        """Over all starts."""
        return self.before + self.clock() - self.begin

    def run(self, stop: StopRequest) -> FitResult:
        """All steps that are left."""
        self.method.train()
        with progress(self.planned, self.desc, initial=self.step, disable=not self.ranks.is_first) as bar:
            fraction = self.fraction()
            while fraction < 1:
                at = Step(self.step, self.step // self.feed.steps_per_epoch, fraction, self.recipe.seed)
                metrics = self.one(at, stop)
                self.step += 1
                self.method.after_step(at)
                if self.ema is not None:
                    self.ema.update(self.method)
                bar.update()
                if self.step % 10 == 0:
                    bar.set_postfix_str(f"loss {sum(self.losses[-10:]) / len(self.losses[-10:]):.3f}", refresh=False)
                fraction = self.fraction()
                self.report(metrics, stop, last=fraction >= 1)
        return FitResult(self.step, self.planned, self.seconds, self.losses, self.metrics, self.best)

    def fraction(self) -> float:
        """Share of the run that is over, by steps or by time, whichever is ahead."""
        fraction = self.step / self.planned
        if self.recipe.budget_s is None:
            return fraction
        spent = self.seconds / self.recipe.budget_s
        return max(fraction, self.ranks.sum([spent], self.device)[0] / self.ranks.size)

    def one(self, at: Step, stop: StopRequest) -> dict[str, float]:
        """One optimizer step; returns the metrics, means over the whole batch."""
        set_learning_rate(self.optimizer, learning_rate(self.recipe, at.fraction))
        self.optimizer.zero_grad(set_to_none=True)
        parts = self.ranks.size * self.recipe.accumulate
        sums: dict[str, float] = {}
        for i in range(self.recipe.accumulate):
            part = self.ranks.rank * self.recipe.accumulate + i
            rows = getattr(self.feed, "rows", None)
            shown = None if rows is None else rows(at.number, part, parts)
            mine = Step(at.number, at.epoch, at.fraction, at.seed, part, parts, shown)
            for name, value in self.backward(mine).items():
                sums[name] = sums.get(name, 0.0) + value / parts
        asked, *values = self.ranks.sum([float(stop.signal), *sums.values()], self.device)
        metrics = dict(zip(sums, values, strict=True))
        if asked and not stop.signal:
            stop.signal = int(asked)  # another rank was asked to stop: all stop at the same step
        if not math.isfinite(metrics["loss"]):
            raise FloatingPointError(
                f"{self.desc}: the loss became {metrics['loss']} after {self.step} steps{self.last_good()}"
            )
        self.ranks.sum_gradients(self.parameters)
        if self.recipe.clip is not None:
            metrics["grad_norm"] = float(nn.utils.clip_grad_norm_(self.parameters, self.recipe.clip))
        if self.files is not None and self.files.norms:
            metrics = {**observed_step(self.optimizer, self.parameters), **metrics}  # the gradient's before clipping
        else:
            self.optimizer.step()
        self.ranks.average_statistics(self.method)
        self.losses.append(metrics["loss"])
        return {**metrics, "lr": self.optimizer.param_groups[0]["lr"]}

    def backward(self, at: Step) -> dict[str, float]:
        """Gradients of one part of the batch, and its metrics."""
        x, y = self.feed(at.number, at.part, at.parts)
        x, y = x.to(self.device), y.to(self.device)
        losses: list[Tensor] = []
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(stream_seed(at.seed, at.number, at.part, _GLOBAL))
            each = iter(self.method.losses(x, y, at))
            while True:
                # Autocast ends before the backward pass, which runs in the dtypes the forward pass chose.
                with torch.autocast(self.device.type, torch.bfloat16, enabled=self.recipe.bf16):
                    loss = next(each, None)
                if loss is None:
                    break
                if loss.requires_grad:
                    (loss / at.parts).backward()
                losses.append(loss.detach())
        return {"loss": sum(_numbers(losses)), **dict(zip(at.metrics, _numbers(at.metrics.values()), strict=True))}

    def last_good(self) -> str:
        """For an error message."""
        if self.files is None:
            return ""
        return f"; {self.files.history.stands()}"

    def report(self, metrics: dict[str, float], stop: StopRequest, last: bool) -> None:
        """Log, evaluate and save what is due after a step."""
        if self.files is None:
            if stop.signal:
                raise Interrupted(f"{self.desc}: stopped after {self.step} of {self.planned} steps", stop.signal)
            return
        if self.held_out is not None and (last or self.files.evaluates(self.step, self.feed.steps_per_epoch)):
            self.evaluate(self.held_out)
        self.files.log(self.step, metrics, last)
        if self.files.saves(last or bool(stop.signal)):
            self.check_weights()
            self.files.save(self.step, self.state(), required=last or bool(stop.signal))
        if stop.signal and not last:
            raise Interrupted(
                f"{self.desc}: stopped after {self.step} of {self.planned} steps; the same command goes on from there",
                stop.signal,
            )

    def evaluate(self, held_out: Callable[[], Batches]) -> None:
        """Metrics of the method (of its average, if there is one), and whether they are the best so far."""
        assert self.files is not None
        subject = self.method if self.ema is None else self.ema.module
        assert isinstance(subject, Method)
        batches = ((x.to(self.device), y.to(self.device)) for x, y in held_out())
        self.metrics = {name: float(value) for name, value in subject.evaluate(batches).items()}
        self.files.log_evaluation(self.step, self.metrics)
        score = self.method.score
        if score is not None and (not self.best or self.metrics[score] > self.best[score]):
            self.best = {**self.metrics, "step": self.step}
            self.files.save_best(subject.result())

    def check_weights(self) -> None:
        """A checkpoint is a good one: its weights are finite.

        Raises:
            FloatingPointError: naming the first parameter that is not.
        """
        for name, parameter in self.method.named_parameters():
            if not bool(torch.isfinite(parameter.detach()).all()):
                raise FloatingPointError(
                    f"{self.desc}: {name} stopped being finite after {self.step} steps{self.last_good()}"
                )

    def state(self) -> dict[str, Any]:
        """All that the steps after this one depend on."""
        return {
            "step": self.step,
            "seconds": self.seconds,
            "method": dict(self.method.state_dict()),
            "optimizer": self.optimizer.state_dict(),
            "ema": None if self.ema is None else dict(self.ema.state_dict()),
            "metrics": self.metrics,
            "best": self.best,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on where :meth:`state` was taken.

        Raises:
            RuntimeError, ValueError: if it is of another method or network.
        """
        self.method.load_state_dict(state["method"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"])
        self.step, self.before = state["step"], state["seconds"]
        self.metrics, self.best = state["metrics"], state["best"]

    def close(self) -> None:
        """Flush the logs."""
        if self.files is not None:
            self.files.close()


def fit(
    model: nn.Module,
    epoch: Callable[[], Iterable[tuple[Tensor, Tensor]]],
    steps_per_epoch: int,
    recipe: Recipe,
    *,
    loss: Loss | None = None,
    after_step: Callable[[int], None] | None = None,
    desc: str = "train",
    clock: Callable[[], float] = time.monotonic,
) -> FitResult:
    """Train ``model`` in place, without files, from an iterable, and leave it in eval mode.

    Args:
        model: trained in train mode.
        epoch: gives a fresh pass over the data as ``(x, y)`` batches; their size is theirs, not the recipe's.
        steps_per_epoch: batches in one pass.
        recipe: optimizer, schedule, length, time budget.
        loss: see :class:`Supervised`.
        after_step: called with the number of finished steps.
        desc: shown with the progress bar.
        clock: seconds counter; tests pass a fake one.

    Raises:
        FloatingPointError: if the loss stops being finite; the weights are then of no use.
        KeyboardInterrupt: passes through; the bar is closed and the model is in eval mode.
    """
    method = _Called(model, loss, Criterion(recipe.label_smoothing), after_step)
    return train(method, _Iterated(epoch, steps_per_epoch), recipe, desc=desc, clock=clock)


class _Called(Supervised):
    """Supervised training that tells somebody of every step."""

    def __init__(
        self, module: nn.Module, loss: Loss | None, criterion: Criterion, told: Callable[[int], None] | None
    ) -> None:
        super().__init__(module, loss, criterion)
        self.told = told

    def after_step(self, at: Step) -> None:
        if self.told is not None:
            self.told(at.number + 1)


class _Iterated:
    """A feed over passes of an iterable, in order; it cannot go back, so it serves runs that are not resumed."""

    def __init__(self, epoch: Callable[[], Iterable[tuple[Tensor, Tensor]]], steps_per_epoch: int) -> None:
        self.steps_per_epoch = steps_per_epoch
        self.batches = self._endless(epoch)

    def __call__(self, step: int, part: int, parts: int) -> tuple[Tensor, Tensor]:
        return next(self.batches)

    @staticmethod
    def _endless(epoch: Callable[[], Iterable[tuple[Tensor, Tensor]]]) -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            empty = True
            for batch in epoch():
                empty = False
                yield batch
            if empty:
                raise ValueError("epoch: must give at least one batch, got none")
