"""Residual branches that training runs at random, and whose cost it saves when it does not (arXiv 1603.09382).

Three conventions of scale exist. Under batch norm they train different weights, so a network keeps to one:

* ``"original"``: ``b f`` in training, ``p f`` at inference, as published; ``effkern.stochastic_depth.deploy`` folds p
  into the last batch norm.
* ``"inverted"``: ``b f / p`` in training, ``f`` at inference, as in torchvision and timm. The division is there so that
  the mean of training is what inference computes without a further factor.
* ``"none"``: ``b f`` and ``f``. Biased: inference sees more than training's mean.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from effkern.nn._rows import add_rows, fork_rows, take_rows
from effkern.nn.residual import MIN_KEPT, ResidualBlock, share_parts

__all__ = ["StochasticBlock", "StochasticDepth", "draw_keep", "stochastic_depth"]

Mode = Literal["batch", "row", "subset"]
Scale = Literal["original", "inverted", "none"]
MODES, SCALES = ("batch", "row", "subset"), ("original", "inverted", "none")


def draw_keep(
    survival: Tensor,
    batch: int,
    mode: Mode = "batch",
    generator: torch.Generator | None = None,
    rows: Tensor | None = None,
) -> Tensor:
    """Which samples run which of K branches: bool ``[batch, K]``.

    Args:
        survival: ``[K]``, probability of running each.
        batch: samples.
        mode: ``"batch"``: one draw a branch for all samples, as published. ``"row"``: every sample draws for itself.
            ``"subset"``: of every branch a fixed number of samples, ``batch * p`` rounded up or down at random so that
            the mean is exact, chosen at random.
        generator: source of what all samples share.
        rows: ``[batch, K]`` numbers in [0, 1) that belong to the samples; default: from ``generator`` as well.

    Raises:
        ValueError: for an unknown mode, or a probability outside [0, 1].
    """
    _check(mode)
    if survival.dim() != 1 or not bool(((survival >= 0) & (survival <= 1)).all()):
        raise ValueError(f"survival: must be [K] probabilities in [0, 1], got {survival.tolist()}")
    survival = survival.cpu()
    common = torch.rand(len(survival), generator=generator)
    if mode == "batch":
        return (common < survival).expand(batch, -1)
    rows = torch.rand(batch, len(survival), generator=generator) if rows is None else rows.cpu()
    if mode == "row":
        return rows < survival
    # In double precision, where batch * p for p = 0.9 is not a hair below a whole number it should be.
    counts = (batch * survival.double() + common).floor()
    return rows.argsort(0).argsort(0) < counts


def scale_factor(survival: float, scale: Scale, training: bool) -> float:
    """What the residual is multiplied by where it runs."""
    if training:
        return 1.0 / survival if scale == "inverted" and survival > 0 else 1.0
    return survival if scale == "original" else 1.0


def stochastic_depth(
    x: Tensor,
    branch: Callable[[Tensor], Tensor],
    survival: float,
    *,
    mode: Mode = "batch",
    scale: Scale = "original",
    shortcut: Tensor | None = None,
    keep: Tensor | None = None,
    training: bool = True,
    generator: torch.Generator | None = None,
    sync: bool = False,
) -> Tensor:
    """``shortcut + b * branch(x)``, with the branch computed for the samples that drew ``b = 1`` and no others.

    Batch norm inside the branch sees those samples; where fewer than two run, it uses and keeps its running statistics.
    The scale is a float32 number whatever the dtype of ``x``: 1 / 0.9 in bfloat16 would be off by 0.16 %.

    Args:
        x: ``[N, ...]``.
        branch: ``f``, for any number of samples; a module, or a function.
        survival: p, the probability of running it.
        mode: see :func:`draw_keep`.
        scale: see the head of this file.
        shortcut: default: ``x``.
        keep: ``[N]`` bool, a draw made before; with one the arguments of the draw are not used.
        training: otherwise every sample runs, scaled as inference is.
        generator: source of the draw.
        sync: make the draw of rank 0 that of all ranks, so that a whole block is skipped on all of them.

    Raises:
        ValueError: if ``survival`` is outside [0, 1], or ``mode`` or ``scale`` is unknown.
    """
    _check(mode, scale, survival)
    shortcut = x if shortcut is None else shortcut
    factor = scale_factor(survival, scale, training)
    if keep is None and training and survival < 1:
        keep = draw_keep(torch.tensor([float(survival)]), len(x), mode, generator)[:, 0]
        if sync and dist.is_available() and dist.is_initialized():
            drawn = keep.to(device=x.device, dtype=torch.uint8)
            dist.broadcast(drawn, 0)
            keep = drawn.bool()
    if factor == 0:
        return shortcut  # not 0 * branch, which would be NaN where the branch is infinite
    if keep is None:
        return shortcut + _scaled(branch(x), factor)
    rows = keep.nonzero().flatten().to(x.device, non_blocking=True)
    if rows.numel() == 0:
        return shortcut
    with _running_statistics(branch, rows.numel() < MIN_KEPT and training):
        if rows.numel() == len(x):
            return shortcut + _scaled(branch(x), factor)
        if shortcut is x:
            shortcut, part = fork_rows(x, rows)
        else:
            part = take_rows(x, rows)
        residual = _scaled(branch(part), factor)
    return add_rows(shortcut, rows, residual.to(shortcut.dtype))


def _scaled(y: Tensor, factor: float) -> Tensor:
    return y if factor == 1 else y * factor


def _check(mode: str, scale: str = "none", survival: float = 1.0) -> None:
    if mode not in MODES:
        raise ValueError(f"mode: must be one of {', '.join(MODES)}, got {mode!r}")
    if scale not in SCALES:
        raise ValueError(f"scale: must be one of {', '.join(SCALES)}, got {scale!r}")
    if not 0 <= survival <= 1:
        raise ValueError(f"survival: must be in [0, 1], got {survival}")


@contextmanager
def _running_statistics(branch: object, active: bool) -> Iterator[None]:
    norms = []
    if active and isinstance(branch, nn.Module):
        norms = [m for m in branch.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training]
    for norm in norms:
        norm.training = False
    try:
        yield
    finally:
        for norm in norms:
            norm.training = True


class StochasticDepth(nn.Module):
    """``x + f(x)`` with stochastic depth on ``f``, around any branch; see :func:`stochastic_depth`.

    Args:
        branch: f, from ``[N, ...]`` to the same shape.
        survival: p.
        mode: of the draw.
        scale: convention.
        sync: whether all ranks share the draw of the first.
    """

    def __init__(
        self, branch: nn.Module, survival: float, mode: Mode = "batch", scale: Scale = "original", sync: bool = False
    ) -> None:
        super().__init__()
        _check(mode, scale, survival)
        self.branch, self.survival, self.mode, self.scale, self.sync = branch, survival, mode, scale, sync

    def forward(self, x: Tensor, keep: Tensor | None = None) -> Tensor:
        """Run the branch, in training on the samples drawn or on those of ``keep`` ``[N]``."""
        return stochastic_depth(
            x,
            self.branch,
            self.survival,
            mode=self.mode,
            scale=self.scale,
            keep=keep,
            training=self.training,
            sync=self.sync,
        )

    def extra_repr(self) -> str:
        return f"survival={self.survival}, mode={self.mode!r}, scale={self.scale!r}"


class StochasticBlock(ResidualBlock):
    """A residual block with stochastic depth: ``relu(shortcut(x) + b f(x))``.

    Unlike a block that a policy drops, a dropped one still ends in its ReLU. Parameter names are those of the block.
    """

    survival: float = 1.0
    mode: Mode = "batch"
    scale: Scale = "original"
    sync: bool = False

    @classmethod
    def from_block(
        cls,
        block: ResidualBlock,
        survival: float,
        mode: Mode = "batch",
        scale: Scale = "original",
        sync: bool = False,
    ) -> StochasticBlock:
        """The same block in this form. Parameters and statistics are shared with ``block``.

        Raises:
            ValueError: if ``survival`` is outside [0, 1], or ``mode`` or ``scale`` is unknown.
        """
        _check(mode, scale, survival)
        new = share_parts(cls, block)
        new.survival, new.mode, new.scale, new.sync = float(survival), mode, scale, sync
        return new

    def forward(self, x: Tensor, keep: Tensor | None = None) -> Tensor:
        """As :meth:`ResidualBlock.forward`; without ``keep``, training draws."""
        residual = _Residual(self)
        y = stochastic_depth(
            x,
            residual,
            self.survival,
            mode=self.mode,
            scale=self.scale,
            shortcut=self.shortcut(x),
            keep=keep,
            training=self.training,
            sync=self.sync,
        )
        return F.relu(y)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, survival={self.survival:.4g}, mode={self.mode!r}, scale={self.scale!r}"


class _Residual:
    """The branch of a block as a function; alone, a sample gets the running statistics."""

    def __init__(self, block: ResidualBlock) -> None:
        self.block = block

    def __call__(self, x: Tensor) -> Tensor:
        return self.block.residual(x, False if len(x) < MIN_KEPT and self.block.training else None)
