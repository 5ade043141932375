"""Training of a supernet as a method of the training loop: sandwich rule and three kinds of teacher."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from effkern.dsnet.cost import AtWidth
from effkern.dsnet.sandwich import SandwichRule
from effkern.training import Batches, Ema, Method, Step, evaluate

__all__ = ["SupernetTraining", "Target", "soft_cross_entropy"]

Target = Literal["labels", "distillation", "bootstrapping"]


def soft_cross_entropy(logits: Tensor, probabilities: Tensor) -> Tensor:
    """``-mean_b sum_c t_c log softmax(z)_c``: the Kullback-Leibler divergence from ``t`` plus its entropy.

    Args:
        logits: z, ``[N, C]``.
        probabilities: t, ``[N, C]``.
    """
    return -(probabilities * F.log_softmax(logits, 1)).sum(1).mean()


class SupernetTraining(Method):
    """Every step trains the widest network L, random ones r and the slimmest S on one batch (arXiv 2103.13258).

    L always learns the labels. What the others learn:

    * ``"labels"``: the labels too.
    * ``"distillation"``: the live, detached prediction of L (in-place distillation).
    * ``"bootstrapping"``: what a moving average E of the network says, in eval mode: r learns ``softmax(E_L)``; S too,
      or with ``ensemble`` the mean of the *probabilities* of E at the widths of L and of every r (in-place ensemble
      bootstrapping). The released code's default is without the ensemble, which costs a forward for every r.

    Each width updates its own batch-norm statistics only; E averages those as well.

    Args:
        model: called as ``model(images, width)``.
        widths: number of widths.
        random: widths drawn a step between the ends.
        target: see above.
        ensemble: see above.
        decay: of E; it warms up, see :class:`effkern.training.Ema`.
        label_smoothing: of L's cross-entropy, and of all with ``"labels"``.
        evaluated: width indices :meth:`evaluate` looks at; default: all.
    """

    score = "top1"

    def __init__(
        self,
        model: nn.Module,
        widths: int,
        random: int = 2,
        target: Target = "bootstrapping",
        ensemble: bool = True,
        decay: float = 0.997,
        label_smoothing: float = 0.1,
        evaluated: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        if target not in get_args(Target):
            raise ValueError(f"target: must be one of {', '.join(get_args(Target))}, got {target!r}")
        self.model, self.widths, self.random, self.target = model, widths, random, target
        self.ensemble, self.label_smoothing = ensemble, label_smoothing
        self.evaluated = tuple(range(widths) if evaluated is None else evaluated)
        self.teacher = Ema(model, decay) if target == "bootstrapping" else None
        self.by_width: list[float] = []

    def losses(self, x: Tensor, y: Tensor, at: Step) -> Iterable[Tensor]:
        """A loss for L, each r, and S, in this order."""
        widest, *others = SandwichRule(self.widths, self.random, at.seed).draw(at.number)
        scores = self.model(x, widest)
        loss = F.cross_entropy(scores, y, label_smoothing=self.label_smoothing)
        at.metrics["loss_widest"] = loss.detach()
        yield loss
        if not others:
            return
        widest_says = scores.detach().float().softmax(1) if self.target == "distillation" else None
        if self.teacher is not None:
            widest_says = self._teach(x, widest)
        answers = [] if widest_says is None else [widest_says]
        for width in others[:-1]:
            yield self._learn(x, y, width, widest_says)
            if self.teacher is not None and self.ensemble:
                answers.append(self._teach(x, width))
        together = torch.stack(answers).mean(0) if answers else None
        loss = self._learn(x, y, others[-1], together)
        at.metrics["loss_slimmest"] = loss.detach()
        yield loss

    def _teach(self, x: Tensor, width: int) -> Tensor:
        assert self.teacher is not None
        return self.teacher(x, width).float().softmax(1)

    def _learn(self, x: Tensor, y: Tensor, width: int, target: Tensor | None) -> Tensor:
        scores = self.model(x, width)
        if target is None:
            return F.cross_entropy(scores, y, label_smoothing=self.label_smoothing)
        return soft_cross_entropy(scores, target)

    def after_step(self, at: Step) -> None:
        """The teacher follows."""
        if self.teacher is not None:
            self.teacher.update(self.model)

    def evaluate(self, batches: Batches) -> dict[str, float]:
        """Mean top-1 over the widths looked at, and that of the slimmest and the widest."""
        # All widths batch by batch: a pass over large images is not to be held in memory for the next width.
        right, images = [0.0] * len(self.evaluated), 0
        for x, y in batches:
            for i, width in enumerate(self.evaluated):
                right[i] += evaluate(AtWidth(self.model, width), [(x, y)]) * len(y) / 100
            images += len(y)
        if not images:
            raise ValueError("batches: must hold at least one image, got none")
        self.by_width = [100 * round(count) / images for count in right]
        return {
            "top1": sum(self.by_width) / len(self.by_width),
            "top1_slimmest": self.by_width[0],
            "top1_widest": self.by_width[-1],
        }

    def report(self) -> dict[str, Any]:
        """Top-1 of every width looked at."""
        return {"widths": list(self.evaluated), "top1_by_width": self.by_width}

    def result(self) -> nn.Module:
        """The supernet."""
        return self.model
