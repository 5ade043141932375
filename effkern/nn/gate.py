"""Channel attention, and the gate that shares its first half: how important is each channel, how many does it take?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from effkern.nn._pool import pooled
from effkern.nn._widths import as_widths
from effkern.nn.sliced import SlicedLinear

Form = Literal["sigmoid", "tanh"]


class ChannelAttention(nn.Module):
    """Squeeze and excitation over the running channels: ``x * sigmoid(W2 r + b2)`` with ``r = relu(W1 mean(x) + b1)``.

    Args:
        widths: Channels of every configuration.
        reduction: The widest over it is the number of channels inside.
        form: ``"sigmoid"``, or ``"tanh"``: ``x * (1 + tanh(W2 r + b2))`` with ``W2 = b2 = 0`` at first, which leaves a
            residual network as it is.

    Shape:
        ``[N, C, H, W]`` to the same, at a width index, at one a sample ``[N]`` or at weights of widths ``[N, W]``.
    """

    def __init__(self, widths: int | Sequence[int], reduction: int = 4, form: Form = "sigmoid") -> None:
        super().__init__()
        if form not in get_args(Form):
            raise ValueError(f"form must be one of {', '.join(get_args(Form))}, got {form!r}")
        widths = as_widths(widths, "widths")
        self.hidden, self.form = max(1, widths[-1] // reduction), form
        self.reduce = SlicedLinear(widths, self.hidden)
        self.expand = SlicedLinear(self.hidden, widths)
        if form == "tanh":
            nn.init.zeros_(self.expand.weight)
            nn.init.zeros_(self.expand.bias)

    def forward(self, x: Tensor, width: int | Tensor) -> Tensor:
        return self._attend(x, self._reduced(x, width), width)

    def _reduced(self, x: Tensor, width: int | Tensor) -> Tensor:
        return self.reduce(pooled(x), width, act="relu")

    def _attend(self, x: Tensor, r: Tensor, width: int | Tensor) -> Tensor:
        scores = self.expand(r, width)
        factor = scores.sigmoid() if self.form == "sigmoid" else 1 + scores.tanh()
        return x * factor[:, :, None, None]


class DoubleHeadedGate(ChannelAttention):
    """Channel attention with a second head that says at which width an image goes on (DS-Net, arXiv 2103.13258).

    Both heads read the same ``r``. The slimming head has no bias, one logit for each width of the routing space; called
    as attention, the module costs nothing of it.

    Args:
        widths: Channels of every configuration of the layer it stands behind.
        space: Width indices an image may go on at, ascending. It is data, not structure: any indices of the network
            that are as many will do, also later.
        reduction: See `ChannelAttention`.
        form: See `ChannelAttention`.

    Attributes:
        offset: ``[G]``, added to the logits where a width is chosen at inference; a price on wide ones. Zero at first.
    """

    offset: Tensor

    def __init__(
        self, widths: int | Sequence[int], space: Sequence[int], reduction: int = 4, form: Form = "sigmoid"
    ) -> None:
        super().__init__(widths, reduction, form)
        self._space: tuple[int, ...] = ()
        self.space = space  # type: ignore[assignment]
        self.slim = nn.Linear(self.hidden, len(self._space), bias=False)
        self.register_buffer("offset", torch.zeros(len(self._space)))

    @property
    def space(self) -> tuple[int, ...]:
        """Width indices of the choices."""
        return self._space

    @space.setter
    def space(self, indices: Sequence[int]) -> None:
        found = tuple(int(i) for i in indices)
        if len(found) < 1 or list(found) != sorted(set(found)) or found[0] < 0:
            raise ValueError(f"space must be ascending width indices of at least 0, got {list(indices)}")
        if hasattr(self, "slim") and len(found) != self.slim.out_features:
            raise ValueError(f"space must have {self.slim.out_features} indices, got {list(indices)}")
        self._space = found

    def decide(self, x: Tensor, width: int | Tensor) -> tuple[Tensor, Tensor]:
        """The attended ``x``, and the logits ``[N, G]`` of the choices, without noise and without `offset`."""
        r = self._reduced(x, width)
        return self._attend(x, r, width), self.slim(r)

    def choose(self, logits: Tensor) -> Tensor:
        """The best choice of every sample, int64 ``[N]`` from 0 to G - 1; the same in training and inference."""
        return (logits + self.offset.to(logits.dtype)).argmax(1)

    def extra_repr(self) -> str:
        return f"space={list(self.space)}"
