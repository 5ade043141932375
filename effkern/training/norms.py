"""How long the gradient of a step is and how far it moves the weights: what tells a stable training from another."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

__all__ = ["observed_step"]


@torch.no_grad()
def observed_step(optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor]) -> dict[str, float]:
    """Step ``optimizer``; returns ``grad_norm`` and ``weight_change``, Euclidean norms over all ``parameters``."""
    before = [parameter.detach().clone() for parameter in parameters]
    length = _norm(parameter.grad for parameter in parameters if parameter.grad is not None)
    optimizer.step()
    moved = _norm(parameter.detach() - old for parameter, old in zip(parameters, before, strict=True))
    return {"grad_norm": length, "weight_change": moved}


def _norm(tensors: Iterable[Tensor]) -> float:
    return math.sqrt(sum(float(tensor.double().square().sum()) for tensor in tensors))
