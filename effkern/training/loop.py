"""The one training loop: any module, any loss, a schedule that fits a time budget."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .progress import progress

__all__ = ["FitResult", "Recipe", "fit", "learning_rate"]

Batches = Iterable[tuple[Tensor, Tensor]]
Loss = Callable[[nn.Module, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Recipe:
    """How to train.

    Attributes:
        epochs: passes over the data; a fraction is allowed.
        lr: largest learning rate.
        optimizer: ``"sgd"`` (Nesterov momentum) or ``"adamw"``.
        momentum: of SGD.
        weight_decay: applied to weights of two or more dimensions only; biases and norms are left alone.
        schedule: ``"onecycle"`` (up linearly, down by a cosine), ``"cosine"`` or ``"constant"``.
        warmup: fraction of the run in which one-cycle rises.
        label_smoothing: of the default cross-entropy.
        clip: largest gradient norm, or None.
        budget_s: seconds after which training ends, with the schedule played to its end. The schedule advances with
            steps or with time, whichever is ahead: on a machine fast enough the budget changes nothing.
    """

    epochs: float
    lr: float = 0.1
    optimizer: str = "sgd"
    momentum: float = 0.9
    weight_decay: float = 5e-4
    schedule: str = "onecycle"
    warmup: float = 0.25
    label_smoothing: float = 0.0
    clip: float | None = None
    budget_s: float | None = None

    def __post_init__(self) -> None:
        if self.optimizer not in ("sgd", "adamw"):
            raise ValueError(f"optimizer: must be 'sgd' or 'adamw', got {self.optimizer!r}")
        if self.schedule not in ("onecycle", "cosine", "constant"):
            raise ValueError(f"schedule: must be 'onecycle', 'cosine' or 'constant', got {self.schedule!r}")
        if not self.epochs > 0:
            raise ValueError(f"epochs: must be positive, got {self.epochs}")
        if not 0 <= self.warmup < 1:
            raise ValueError(f"warmup: must be in [0, 1), got {self.warmup}")


@dataclass
class FitResult:
    """What a training run did: steps taken of those planned, seconds, and the loss of every step."""

    steps: int
    planned: int
    seconds: float
    losses: list[float] = field(repr=False)

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


def learning_rate(recipe: Recipe, fraction: float) -> float:
    """The learning rate when ``fraction`` in [0, 1] of the run is over."""
    if recipe.schedule == "constant":
        return recipe.lr
    if recipe.schedule == "onecycle" and fraction < recipe.warmup:
        return recipe.lr * (0.04 + 0.96 * fraction / recipe.warmup)
    start = recipe.warmup if recipe.schedule == "onecycle" else 0.0
    return recipe.lr * 0.5 * (1 + math.cos(math.pi * min(1.0, (fraction - start) / (1 - start))))


def fit(
    model: nn.Module,
    epoch: Callable[[], Batches],
    steps_per_epoch: int,
    recipe: Recipe,
    *,
    loss: Loss | None = None,
    after_step: Callable[[int], None] | None = None,
    desc: str = "train",
    clock: Callable[[], float] = time.monotonic,
) -> FitResult:
    """Train ``model`` in place and leave it in eval mode.

    Args:
        model: trained in train mode.
        epoch: gives a fresh pass over the data as ``(x, y)`` batches.
        steps_per_epoch: batches in one pass.
        recipe: optimizer, schedule, length, time budget.
        loss: ``loss(model, x, y)`` -> scalar tensor; cross-entropy by default. If the result needs no gradient, the
            function has called ``backward`` itself (as in-place distillation over several widths does).
        after_step: called with the number of finished steps, e.g. for a moving average of the weights.
        desc: shown with the progress bar.
        clock: seconds counter; tests pass a fake one.

    Raises:
        FloatingPointError: if the loss stops being finite; the weights are then of no use.
        KeyboardInterrupt: passes through; the bar is closed and the model is in eval mode.
    """
    planned = max(1, round(recipe.epochs * steps_per_epoch))
    optimizer = _optimizer(model, recipe)
    criterion = nn.CrossEntropyLoss(label_smoothing=recipe.label_smoothing)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    losses: list[float] = []
    begin = clock()
    model.train()
    try:
        with progress(planned, desc) as bar:
            for x, y in _endless(epoch):
                elapsed = clock() - begin
                fraction = len(losses) / planned
                if recipe.budget_s is not None:
                    fraction = max(fraction, elapsed / recipe.budget_s)
                if fraction >= 1:
                    break
                rate = learning_rate(recipe, fraction)
                for group in optimizer.param_groups:
                    group["lr"] = rate
                optimizer.zero_grad(set_to_none=True)
                value = loss(model, x, y) if loss else criterion(model(x), y)
                if value.requires_grad:
                    value.backward()
                if not math.isfinite(value.item()):
                    raise FloatingPointError(f"{desc}: the loss became {value.item()} after {len(losses)} steps")
                if recipe.clip is not None:
                    nn.utils.clip_grad_norm_(parameters, recipe.clip)
                optimizer.step()
                losses.append(value.item())
                if after_step:
                    after_step(len(losses))
                bar.update()
                if len(losses) % 10 == 0:
                    bar.set_postfix_str(f"loss {sum(losses[-10:]) / 10:.3f}", refresh=False)
    finally:
        model.eval()
    return FitResult(len(losses), planned, clock() - begin, losses)


def _endless(epoch: Callable[[], Batches]) -> Iterator[tuple[Tensor, Tensor]]:
    while True:
        empty = True
        for batch in epoch():
            empty = False
            yield batch
        if empty:
            raise ValueError("epoch: must give at least one batch, got none")


def _optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() > 1], "weight_decay": recipe.weight_decay},
        {"params": [p for p in trained if p.dim() <= 1], "weight_decay": 0.0},
    ]
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=recipe.lr)
    return torch.optim.SGD(groups, lr=recipe.lr, momentum=recipe.momentum, nesterov=recipe.momentum > 0)
