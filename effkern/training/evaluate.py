"""Accuracy of anything that turns images into scores."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

__all__ = ["evaluate"]


def evaluate(predict: Callable[[Tensor], Tensor], batches: Iterable[tuple[Tensor, Tensor]]) -> float:
    """Top-1 accuracy in percent.

    Args:
        predict: a module (run in eval mode and put back as it was) or a function, ``[n, ...]`` -> scores
            ``[n, classes]``.
        batches: ``(x, labels)``.

    Raises:
        ValueError: if there is no sample, or the scores do not fit the labels.
    """
    modules = list(predict.modules()) if isinstance(predict, nn.Module) else []
    was_training = [module.training for module in modules]
    if isinstance(predict, nn.Module):
        predict.eval()
    right = count = 0
    try:
        with torch.inference_mode():
            for x, labels in batches:
                scores = predict(x)
                if scores.dim() != 2 or len(scores) != len(labels):
                    raise ValueError(
                        f"predict: must return [{len(labels)}, classes] scores, got shape {tuple(scores.shape)}"
                    )
                right += int((scores.argmax(1) == labels).sum())
                count += len(labels)
    finally:
        for module, training in zip(modules, was_training, strict=True):
            module.training = training
    if count == 0:
        raise ValueError("batches: must hold at least one sample, got none")
    return 100.0 * right / count
