"""Codes from elsewhere."""

from __future__ import annotations

from torch import Tensor


def from_kill_the_bits(assignments: Tensor, centroids: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Codes and codebook of a checkpoint of "And the Bit Goes Down" (kill-the-bits).

    It views a weight as ``(Ci * R * S, Co)``, cuts dimension 0 into ``J`` blocks and puts these side by side, so that
    block ``j`` of output ``o`` is column ``j * Co + o``.

    Args:
        assignments: ``[J * Co]``, integers.
        centroids: ``[K, d]``.
        rows: ``Co``.

    Returns:
        Codes ``[Co, J]`` and codebook ``[1, K, d]``, as :mod:`effkern.nn.pq` takes them.

    Raises:
        ValueError: if ``rows`` does not divide the assignments, or one is outside the centroids.
    """
    if assignments.dim() != 1 or rows < 1 or assignments.numel() % rows:
        raise ValueError(f"assignments: must be [J * {rows}], got shape {list(assignments.shape)}")
    if centroids.dim() != 2:
        raise ValueError(f"centroids: must be [K, d], got shape {list(centroids.shape)}")
    codes = assignments.long()
    if codes.numel() and (int(codes.min()) < 0 or int(codes.max()) >= centroids.shape[0]):
        raise ValueError(
            f"assignments: must lie in [0, {centroids.shape[0]}), got {int(codes.min())}..{int(codes.max())}"
        )
    return codes.reshape(-1, rows).t().contiguous(), centroids.unsqueeze(0)
