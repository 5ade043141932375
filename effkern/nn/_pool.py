"""Global average pooling whose bits do not depend on how many channels there are."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def pooled(x: Tensor) -> Tensor:
    """The mean of every channel of ``[N, C, H, W]``, ``[N, C]``.

    `torch.Tensor.mean` adds up 16 channels in another order than 32, so that an image at one width would get other bits
    than the same image among wider ones, whose maps have zeros behind its own.
    """
    return F.avg_pool2d(x, x.shape[2:]).flatten(1)  # type: ignore[arg-type]
