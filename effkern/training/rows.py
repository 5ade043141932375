"""What a frozen part of a network makes of each image, kept from one epoch to the next."""

from __future__ import annotations

from collections.abc import Callable, Hashable

import torch
from torch import Tensor

__all__ = ["RowCache"]


class RowCache:
    """Results of a function of single samples, by the samples' numbers.

    A frozen prefix of a network in eval mode gives an image the same result in every epoch, as long as the image is
    shown the same, that is without augmentation. The networks of this package give it bit for bit, whatever else is in
    the batch, so a run with a cache ends as one without, and a resumed one, whose cache is empty, as one never stopped.

    Args:
        limit: Bytes kept at most; samples for which there is no room are computed every time. 0 keeps nothing.
    """

    def __init__(self, limit: float) -> None:
        if not limit >= 0:
            raise ValueError(f"limit: must be at least 0 bytes, got {limit}")
        self.limit = limit
        self.size = 0
        self._key: Hashable = None
        self._kept: dict[int, Tensor] = {}

    def __call__(
        self, compute: Callable[[Tensor], Tensor], x: Tensor, rows: Tensor | None, key: Hashable = 0
    ) -> Tensor:
        """``compute(x)``, of the samples that are not kept alone.

        Args:
            compute: From ``[n, ...]`` to ``[n, ...]``, without gradient.
            x: ``[N, ...]``.
            rows: ``[N]``, the samples' numbers; None where a number would not stand for one and the same input.
            key: What else the result depends on; with another one than before everything is forgotten.
        """
        if rows is None or not self.limit:
            return compute(x)
        if key != self._key:
            self._key, self.size = key, 0
            self._kept.clear()
        numbers = rows.tolist()
        missing = [i for i, number in enumerate(numbers) if number not in self._kept]
        if len(missing) == len(numbers):
            results = compute(x)
            self._keep(numbers, results)
            return results
        found = [self._kept.get(number) for number in numbers]
        if missing:
            results = compute(x[torch.tensor(missing, device=x.device)])
            for i, row in zip(missing, results, strict=True):
                found[i] = row
            self._keep([numbers[i] for i in missing], results)
        return _batch([row for row in found if row is not None])

    def _keep(self, numbers: list[int], results: Tensor) -> None:
        for number, row in zip(numbers, results, strict=True):
            size = row.numel() * row.element_size()
            if self.size + size > self.limit:
                return
            if number not in self._kept:
                self._kept[number] = row.detach().clone(memory_format=torch.preserve_format)
                self.size += size


def _batch(rows: list[Tensor]) -> Tensor:
    """The rows in one tensor, in the memory layout they have: arithmetic on another might round otherwise."""
    last = rows[0].dim() == 3 and not rows[0].is_contiguous()
    if last:
        return torch.stack([row.permute(1, 2, 0) for row in rows]).permute(0, 3, 1, 2)
    return torch.stack(rows)
