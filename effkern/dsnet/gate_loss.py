"""What a gate learns from: Gumbel-softmax choices, easy and hard labels, and the price of multiply-adds."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["GateCrossEntropy", "SgsForm", "Targets", "expected_right", "gumbel_noise", "gumbel_softmax", "sgs_targets"]

SgsForm = Literal["balanced", "logits", "published", "expected", "none"]
Targets = Literal["ends", "cheapest"]
Hopeless = Literal["widest", "slimmest"]


def gumbel_noise(uniform: Tensor) -> Tensor:
    """Standard Gumbel numbers ``-log(-log u)`` of uniform ones in [0, 1); finite for all of them."""
    tiny = torch.finfo(uniform.dtype).tiny
    return -(-uniform.clamp_min(tiny).log()).clamp_min(tiny).log()


def gumbel_softmax(logits: Tensor, noise: Tensor, tau: float = 1.0) -> Tensor:
    """A draw of the choices as one-hot rows ``[N, G]``, through which gradients pass as through a softmax.

    ``y = softmax((z + g) / tau)``; the value is ``onehot(argmax y)``, the gradient that of ``y`` (straight through).

    Args:
        logits: z, ``[N, G]``.
        noise: g, see `gumbel_noise`; zeros give the best choice.
        tau: Temperature of the gradient.
    """
    y = ((logits.float() + noise) / tau).softmax(1)
    hard = F.one_hot(y.argmax(1), y.size(1)).to(y.dtype)
    return hard + (y - y.detach())


def sgs_targets(right: Tensor, hopeless: Hopeless = "widest", targets: Targets = "ends") -> Tensor:
    """The choice every sample should have got, int64 ``[N]`` from 0 to W - 1 (sandwich gate sparsification).

    ``"ends"``, as published: the slimmest for *easy* samples, which it answers rightly; the widest for *dependent*
    ones, which only it does. ``"cheapest"``: the slimmest width that is right. *Hard* samples, on which nobody is
    right, go to the widest ("try best", as the released code has it) or to the slimmest ("give up").

    Args:
        right: ``[N, W]`` bool, whether each width, from the slimmest to the widest, is right. ``"ends"`` looks at the
            first and the last column only; with ``hopeless="widest"`` at the first only.
        hopeless: Target of hard samples.
        targets: See above.
    """
    last = right.size(1) - 1
    if targets == "ends":
        wide = ~right[:, 0] if hopeless == "widest" else ~right[:, 0] & right[:, -1]
        return wide.long() * last
    first = right.long().argmax(1)
    return torch.where(right.any(1), first, last if hopeless == "widest" else 0)


def expected_right(logits: Tensor, right: Tensor, entropy: float = 0.0) -> Tensor:
    """Share of right answers if every sample drew its choice from ``p = softmax(logits)``; a scalar to be raised.

    ``mean_n sum_g p_ng right_ng``: what Gumbel's draws estimate of the task, exactly, as every choice's answer is
    looked at. It needs no targets: a choice is worth what it answers rightly beyond the others, images that all or none
    are right on have no say, and a price on multiply-adds decides among the rest.

    Args:
        logits: z, ``[N, G]``, finite.
        right: ``[N, G]`` bool, or a share where a choice stands for several ways.
        entropy: weight of the mean entropy of p in nats, added. Without it a gate soon gives all samples one choice,
            from which the gradient ``p (right - sum p right)`` no longer leads away; with it the best logits are what
            each choice is worth, divided by the weight.

    Raises:
        ValueError: for shapes that differ, or no sample.
    """
    if logits.dim() != 2 or right.shape != logits.shape or not len(logits):
        raise ValueError(
            f"logits and right must be [N, G] of at least one sample, got {list(logits.shape)} and {list(right.shape)}"
        )
    log_p = logits.float().log_softmax(1)
    p = log_p.exp()
    return (p * right - entropy * p * log_p).sum(1).mean()


class GateCrossEntropy(nn.Module):
    """Cross-entropy of a gate towards its targets.

    * ``"logits"``: of the noise-free logits. Where most samples have one target, that answer for all is its minimum.
    * ``"balanced"``: samples weighted by one over how frequent their target is, so that every target has the same say.
    * ``"published"``: the released code's form, for reproduction: fed ``softmax((z + g) / tau)`` as if it were logits.
      With four choices it cannot fall below ``log(e + 3) - 1 = 0.744``.

    Args:
        choices: G.
        form: See above.
        smoothing: Of the targets; the released code smooths by 0.1.
        momentum: Of the running frequencies of the targets.
    """

    frequency: Tensor
    steps: Tensor

    def __init__(
        self, choices: int, form: SgsForm = "balanced", smoothing: float = 0.0, momentum: float = 0.05
    ) -> None:
        super().__init__()
        self.form, self.smoothing, self.momentum = form, smoothing, momentum
        self.register_buffer("frequency", torch.zeros(choices))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def forward(self, logits: Tensor, target: Tensor, noise: Tensor | None = None, tau: float = 1.0) -> Tensor:
        """The loss; in training mode the frequencies follow the targets.

        Args:
            logits: ``[N, G]``.
            target: ``[N]``.
            noise: Gumbel numbers of the draw, for ``"published"``.
            tau: Temperature of the draw.
        """
        logits = logits.float()
        if self.form == "published":
            logits = ((logits + (0 if noise is None else noise)) / tau).softmax(1)
        losses = F.cross_entropy(logits, target, label_smoothing=self.smoothing, reduction="none")
        if self.form != "balanced":
            return losses.mean()
        if self.training:
            now = target.bincount(minlength=len(self.frequency)).to(self.frequency) / max(1, len(target))
            self.frequency.lerp_(now, max(self.momentum, 1 / (1 + int(self.steps))))
            self.steps += 1
        present = self.frequency > 0
        weight = torch.where(present, 1 / self.frequency.clamp_min(1e-6), 0.0) / present.sum().clamp_min(1)
        return (weight[target] * losses).mean()
