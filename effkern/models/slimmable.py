"""A small slimmable network for images of about 28x28."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from effkern.models._by_width import by_width
from effkern.models._registry import register_model
from effkern.nn._pool import pooled
from effkern.nn.sliced import SlicedLinear
from effkern.nn.sliced_block import SlicedConvBNAct
from effkern.nn.switchable_bn import Affine


class SlimmableCNN(nn.Module):
    """Plain 3x3 convolutions in three stages, each at one of several widths per call or per sample.

    The stem halves the image and so does each later stage: 14, 7 and 4 pixels a side from 28.

    Args:
        widths: Channels of the first stage in every configuration, ascending; the second and third have twice and
            four times as many.
        blocks: Convolutions of each stage.
        num_classes: Of the classifier.
        in_channels: Of the images.
        affine: Batch-norm parameters, ``"shared"`` or a set a width.

    Shape:
        ``[N, in_channels, H, W]`` to ``[N, num_classes]``, with a width index or an index tensor ``[N]`` (eval mode).
    """

    def __init__(
        self,
        widths: Sequence[int] = (8, 16, 24, 32),
        blocks: Sequence[int] = (1, 2, 2),
        num_classes: int = 10,
        in_channels: int = 1,
        affine: Affine = "shared",
    ) -> None:
        super().__init__()
        self.widths = tuple(widths)
        previous: int | list[int] = in_channels
        layers = []
        for stage, count in enumerate(blocks):
            channels = [width << stage for width in widths]
            for block in range(count):
                layers.append(SlicedConvBNAct(previous, channels, 3, 2 if block == 0 else 1, affine=affine))
                previous = channels
        self.features = nn.ModuleList(layers)
        self.classifier = SlicedLinear(previous, num_classes)

    def forward(self, x: Tensor, width: int | Tensor = -1) -> Tensor:
        """Scores at ``width``: an index into ``widths``, or one a sample."""
        return by_width(self, self._scores, x, width)

    def _scores(self, x: Tensor, width: int | Tensor) -> Tensor:
        for layer in self.features:
            # A tensor of one channel has no layout to hand on, so behind the stem the engine's own one is chosen.
            x = layer(x, width, zero_tail=False).contiguous(memory_format=torch.channels_last)
        return self.classifier(pooled(x), width)


@register_model
def slimmable_cnn(
    widths: Sequence[int] = (8, 16, 24, 32),
    blocks: Sequence[int] = (1, 2, 2),
    num_classes: int = 10,
    in_channels: int = 1,
    affine: Affine = "shared",
) -> SlimmableCNN:
    """Small slimmable network of four widths; see `SlimmableCNN`."""
    return SlimmableCNN(widths, blocks, num_classes, in_channels, affine)
