"""How a network runs a batch in which every sample has its own width."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from effkern.nn._rows import layout_of

#: Input pixels from which a network runs its samples by width: below, the maps of a whole batch stay in the last-level
#: cache and one ragged pass has the fewest calls; above, every layer would stream them through memory.
_PIXELS = 8 * 224 * 224


def by_width(
    net: nn.Module,
    forward: Callable[[Tensor, int | Tensor], Tensor],
    x: Tensor,
    width: int | Tensor,
    pixels: int | None = None,
) -> Tensor:
    """``forward(x, width)``, in inference for a large batch of different widths one width and a few samples at a time,
    and for samples of one width, as a single one is, at that width.

    A sample's scores do not depend on its neighbours, so this changes no bit; it keeps the maps between layers in cache
    and computes no channel that a narrower sample lacks. One width for all has the fewest and shortest calls.

    Args:
        net: The network; in training it refuses a width a sample, and that is left to it.
        forward: Its computation, from ``[n, C, H, W]`` and a width index, or one a sample, to ``[n, K]``.
        x: ``[N, C, H, W]``.
        width: An index, or an index tensor ``[N]``.
        pixels: Of the image, where ``x`` is what some layers made of it.
    """
    if (
        not isinstance(width, Tensor)
        or x.dim() != 4
        or width.shape != x.shape[:1]
        or len(x) == 0
        or x.device.type != "cpu"
        or net.training
        or torch.is_grad_enabled()
        or torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or type(x) is not Tensor
        or type(width) is not Tensor
    ):
        return forward(x, width)
    first = int(width[0])
    if len(x) == 1 or bool((width == first).all()):
        return forward(x, first)
    samples = max(1, _PIXELS // max(1, pixels or x.shape[-1] * x.shape[-2]))
    if len(x) <= samples:
        return forward(x, width)
    y = None
    layout = layout_of(x)  # which an index loses
    for one in width.unique().tolist():
        for rows in (width == one).nonzero().flatten().split(samples):
            part = forward(x.index_select(0, rows).contiguous(memory_format=layout), one)
            y = x.new_empty(len(x), *part.shape[1:]) if y is None else y
            y.index_copy_(0, rows, part)
    assert y is not None
    return y
