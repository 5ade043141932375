"""What scores are held against: labels, and the answers of a trained network besides."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Criterion", "soft_divergence"]


def soft_divergence(scores: Tensor, wanted: Tensor, temperature: float = 1.0) -> Tensor:
    """``T² KL(teacher || student)`` of softened scores, the mean over the samples, computed in fp32 at least.

    The factor keeps the size of the gradient whatever the temperature (Hinton et al., arXiv 1503.02531, section 2).

    Args:
        scores: ``[N, classes]`` of the student.
        wanted: those of the teacher.
        temperature: T, positive.

    Raises:
        ValueError: for a temperature that is not positive.
    """
    if not temperature > 0:
        raise ValueError(f"temperature: must be positive, got {temperature}")
    given, target = (
        F.log_softmax((x if x.dtype == torch.float64 else x.float()) / temperature, 1) for x in (scores, wanted)
    )
    return F.kl_div(given, target, reduction="batchmean", log_target=True) * temperature**2


class Criterion:
    """``(1 - weight)`` of the cross-entropy with the labels and ``weight`` of `soft_divergence` from a teacher.

    The teacher is no part of the method that uses it: it is in no checkpoint, always in eval mode, and nothing about it
    is trained. It sees what the student sees.

    Args:
        label_smoothing: of the cross-entropy.
        teacher: ``[N, ...]`` to scores; None: labels alone.
        weight: of the teacher, in [0, 1].
        temperature: see `soft_divergence`.

    Raises:
        ValueError: for a weight or a temperature out of range.
    """

    def __init__(
        self,
        label_smoothing: float = 0.0,
        teacher: nn.Module | None = None,
        weight: float = 0.5,
        temperature: float = 1.0,
    ) -> None:
        if not 0 <= weight <= 1:
            raise ValueError(f"weight: must be in [0, 1], got {weight}")
        if not temperature > 0:
            raise ValueError(f"temperature: must be positive, got {temperature}")
        self.label_smoothing, self.weight, self.temperature = label_smoothing, weight, temperature
        self.teacher = None if teacher is None else teacher.eval().requires_grad_(False)

    def __call__(self, scores: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """The loss of ``scores`` ``[N, classes]`` for what is in ``x`` with labels ``y``."""
        if self.teacher is None:
            return F.cross_entropy(scores, y, label_smoothing=self.label_smoothing)
        with torch.no_grad():
            if next(self.teacher.parameters(), x).device != x.device:
                self.teacher.to(x.device)
            wanted = self.teacher(x)
        soft = soft_divergence(scores, wanted, self.temperature)
        hard = F.cross_entropy(scores, y, label_smoothing=self.label_smoothing)
        return (1 - self.weight) * hard + self.weight * soft
