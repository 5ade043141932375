"""How to train, as plain numbers: length, optimizer, learning rate over the run."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .config import check

__all__ = ["Recipe", "learning_rate", "make_optimizer", "parameter_groups"]

Optimizer = Literal["sgd", "adam", "adamw"]
Schedule = Literal["onecycle", "cosine", "step", "linear", "constant"]
ONE_CYCLE_WARMUP = 0.25


@dataclass(frozen=True)
class Recipe:
    """How to train.

    Attributes:
        epochs: passes over the data; a fraction is allowed.
        lr: largest learning rate.
        optimizer: ``"sgd"`` (Nesterov momentum where it has momentum), ``"adam"`` or ``"adamw"``.
        momentum: of SGD.
        nesterov: whether SGD's momentum looks ahead.
        weight_decay: applied to weights of two or more dimensions only; biases and norms are left alone.
        schedule: how the rate falls after the warm-up: by a ``"cosine"``, ``"linear"``-ly, in steps or not at all;
            ``"onecycle"`` is a cosine with a quarter of the run as warm-up.
        warmup: fraction of the run in which the rate rises linearly; default: none, a quarter for one-cycle.
        warmup_from: share of ``lr`` the warm-up begins with.
        milestones: of ``"step"``: fractions of the run after which the rate is multiplied by ``factor``.
        factor: of ``"step"``.
        label_smoothing: of the default cross-entropy.
        clip: largest gradient norm, or None. With a number the norm is logged; 1e9 does nothing else.
        batch_size: images of one optimizer step, of all ranks and accumulated parts together.
        accumulate: parts a rank computes one after the other to save memory; batch norm sees a part.
        bf16: whether forward passes run under bfloat16 autocast.
        ema: decay of a moving average of the weights that is evaluated and kept beside them; 0 is off.
        seed: of the data order, the augmentation and all draws of the method.
        budget_s: seconds after which training ends, with the schedule played to its end. The schedule advances with
            steps or with time, whichever is ahead: on a machine fast enough the budget changes nothing. A run with a
            budget is the only kind that is not repeatable.
    """

    epochs: float
    lr: float = 0.1
    optimizer: Optimizer = "sgd"
    momentum: float = 0.9
    nesterov: bool = True
    weight_decay: float = 5e-4
    schedule: Schedule = "onecycle"
    warmup: float | None = None
    warmup_from: float = 0.04
    milestones: tuple[float, ...] = (0.5, 0.75)
    factor: float = 0.1
    label_smoothing: float = 0.0
    clip: float | None = None
    batch_size: int = 128
    accumulate: int = 1
    bf16: bool = False
    ema: float = 0.0
    seed: int = 0
    budget_s: float | None = None

    def __post_init__(self) -> None:
        for name, known in (
            ("optimizer", ("sgd", "adam", "adamw")),
            ("schedule", ("onecycle", "cosine", "step", "linear", "constant")),
        ):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}: must be one of {', '.join(known)}, got {getattr(self, name)!r}")
        for name in ("epochs", "lr", "batch_size", "accumulate"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: must be positive, got {getattr(self, name)}")
        rising = list(self.milestones) == sorted(self.milestones) and all(0 < m < 1 for m in self.milestones)
        check(
            self,
            epochs=(math.isfinite(self.epochs), "finite"),
            warmup=(0 <= self.warmed_up < 1, "in [0, 1)"),
            warmup_from=(0 <= self.warmup_from <= 1, "in [0, 1]"),
            momentum=(0 <= self.momentum < 1, "in [0, 1)"),
            weight_decay=(self.weight_decay >= 0, "at least 0"),
            label_smoothing=(0 <= self.label_smoothing <= 1, "in [0, 1]"),
            factor=(self.factor > 0, "positive"),
            clip=(self.clip is None or self.clip > 0, "positive"),
            budget_s=(self.budget_s is None or self.budget_s > 0, "positive"),
            seed=(-(2**63) <= self.seed < 2**63, "of 64 bits"),
            ema=(0 <= self.ema < 1, "in [0, 1)"),
            milestones=(rising, "ascending fractions between 0 and 1"),
        )

    @property
    def warmed_up(self) -> float:
        """Fraction of the run after which the warm-up is over."""
        if self.warmup is not None:
            return self.warmup
        return ONE_CYCLE_WARMUP if self.schedule == "onecycle" else 0.0


def learning_rate(recipe: Recipe, fraction: float) -> float:
    """The learning rate when ``fraction`` in [0, 1] of the run is over."""
    begin = recipe.warmed_up
    if fraction < begin:
        return recipe.lr * (recipe.warmup_from + (1 - recipe.warmup_from) * fraction / begin)
    if recipe.schedule == "constant":
        return recipe.lr
    if recipe.schedule == "step":
        return recipe.lr * recipe.factor ** sum(fraction >= milestone for milestone in recipe.milestones)
    done = min(1.0, (fraction - begin) / (1 - begin))
    return recipe.lr * (1 - done if recipe.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done)))


def parameter_groups(module: nn.Module, recipe: Recipe, lr_scale: float = 1.0) -> list[dict[str, Any]]:
    """The trainable parameters of ``module`` as two groups for :func:`make_optimizer`, with weight decay and without.

    Args:
        module: parameters that need no gradient are left out.
        recipe: gives the weight decay.
        lr_scale: these parameters learn at the scheduled rate times this.
    """
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    return [
        {"params": [p for p in trained if p.dim() > 1], "weight_decay": recipe.weight_decay, "lr_scale": lr_scale},
        {"params": [p for p in trained if p.dim() <= 1], "weight_decay": 0.0, "lr_scale": lr_scale},
    ]


def make_optimizer(groups: Iterable[dict[str, Any]], recipe: Recipe) -> torch.optim.Optimizer:
    """The optimizer a recipe names, over parameter groups."""
    groups = [{"lr_scale": 1.0, **group} for group in groups if group["params"]]
    if not groups:
        raise ValueError("groups: must hold at least one trainable parameter, got none")
    if recipe.optimizer == "sgd":
        nesterov = recipe.nesterov and recipe.momentum > 0
        return torch.optim.SGD(groups, lr=recipe.lr, momentum=recipe.momentum, nesterov=nesterov)
    return (torch.optim.Adam if recipe.optimizer == "adam" else torch.optim.AdamW)(groups, lr=recipe.lr)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give every group its share of the scheduled rate."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["lr_scale"]


def parameters_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """All parameters of an optimizer, in order."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
