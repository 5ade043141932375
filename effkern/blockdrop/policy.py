"""The policy: a small network that says, before the backbone runs, which of its blocks an image needs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from effkern.nn.residual import ResidualBlock, ResidualStage


def bound(s: Tensor, a: float = 0.8) -> Tensor:
    """Keep probabilities squeezed into ``[1 - a, a]``: ``s' = a * s + (1 - a) * (1 - s)``.

    Exploration never dies and no log-probability is below ``log(1 - a)``. Sample from ``s'`` and take log-probabilities
    of ``s'``; the greedy action is the same for ``s`` and ``s'``.

    Args:
        s: probabilities, any shape.
        a: in (0.5, 1]. 0.5 would make the policy constant, less would invert it.

    Raises:
        ValueError: if ``a`` is outside (0.5, 1].
    """
    if not 0.5 < a <= 1:
        raise ValueError(f"a must be in (0.5, 1], got {a}")
    return a * s + (1 - a) * (1 - s)


def sample(s: Tensor, generator: torch.Generator | None = None, uniform: Tensor | None = None) -> Tensor:
    """One independent Bernoulli draw for each entry of ``s``: bool, True keeps the block.

    Args:
        s: probabilities, any shape.
        generator: source of the draw.
        uniform: numbers in [0, 1) of the shape of ``s`` drawn before; the generator is not used then.
    """
    if uniform is None:
        uniform = torch.rand(s.shape, generator=generator, device=s.device, dtype=torch.float32)
    return uniform.to(s.device, non_blocking=True) < s


def wide(logits: Tensor) -> Tensor:
    """16-bit logits, as autocast makes them, as float32: a draw and its log-probability must be of the same s'."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def greedy(s: Tensor) -> Tensor:
    """The more probable action: bool, True keeps the block; a tie keeps it."""
    return s >= 0.5


class PolicyNet(nn.Module):
    """A residual network of one block a stage that gives one logit for each block of the backbone.

    ``sigmoid(logit)`` is the probability of *keeping* the block. With three stages this is the ResNet-8 of the CIFAR
    experiments. All K decisions are taken at once from the image. There is no value head: the baseline of the policy
    gradient is the greedy action's reward.

    Args:
        num_blocks: K.
        in_channels: channels of the image.
        widths: channels of each stage.
        stem_stride: of the first convolution.
        pool: the image is average-pooled by this first; 2 for ImageNet.
        large: a stem of 7x7 with stride 2 and a max pool, and projection shortcuts, as networks for ImageNet have; with
            widths 64, 128, 256, 512 this is the ResNet-10 of the ImageNet experiments, see :func:`load_first_blocks`.
        init: first value of every logit's bias; positive starts near the backbone that runs everything.

    Raises:
        ValueError: for a number that is not positive, or no width.
    """

    def __init__(
        self,
        num_blocks: int,
        in_channels: int = 3,
        widths: Sequence[int] = (16, 32, 64),
        stem_stride: int = 1,
        pool: int = 1,
        init: float = 0.0,
        large: bool = False,
    ) -> None:
        super().__init__()
        if num_blocks < 1:
            raise ValueError(f"num_blocks must be at least 1, got {num_blocks}")
        if not widths or min(widths) < 1 or min(stem_stride, pool) < 1:
            raise ValueError(
                f"widths, stem_stride and pool must be at least 1, got {list(widths)}, {stem_stride} and {pool}"
            )
        self.num_blocks, self.pool, self.large = num_blocks, pool, large
        kernel, stem_stride = (7, 2) if large else (3, stem_stride)
        self.conv1 = nn.Conv2d(in_channels, widths[0], kernel, stride=stem_stride, padding=kernel // 2, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        blocks, channels = [], widths[0]
        for i, width in enumerate(widths):
            shortcut = "conv" if large or width < channels else "pool"
            blocks.append(ResidualBlock(channels, width, 2 if i else 1, "basic", shortcut))
            channels = width
        self.blocks = ResidualStage(*blocks)
        self.linear = nn.Linear(channels, num_blocks)
        nn.init.constant_(self.linear.bias, init)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``[N, K]`` of images ``[N, C, H, W]``.

        Raises:
            ValueError: if an image has fewer rows or columns than are pooled.
        """
        x = _pooled(x, self.pool)
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.max_pool2d(x, 3, stride=2, padding=1) if self.large else x
        return self.linear(self.blocks(x).mean((2, 3)))


@fx.wrap  # one call in a traced network, where there are no sizes to compare
def _at_least(x: Tensor, pool: int) -> Tensor:
    if min(x.shape[-2:]) < pool:
        raise ValueError(f"x must be at least {pool} pixels high and wide to be pooled by {pool}, got {list(x.shape)}")
    return x


def _pooled(x: Tensor, size: int) -> Tensor:
    if size == 1:
        return x
    x = _at_least(x, size)
    if size == 2:
        # Halfway between pixels, interpolation is the mean of the four. For 3 channels in channels-last memory pooling
        # takes 3.4 times as long (64 images of 32x32: 0.44 against 0.13 ms).
        return F.interpolate(x, scale_factor=0.5, mode="bilinear")
    return F.avg_pool2d(x, size)


def load_first_blocks(policy: PolicyNet, weights: Mapping[str, Tensor]) -> None:
    """Begin with the stem and the first block of each stage of a trained network, as published from a ResNet-18.

    Args:
        policy: With ``large=True``; its last layer stays as it is.
        weights: State dict of a residual network with basic blocks, in torchvision's names.

    Raises:
        ValueError: if a tensor is missing or has another shape; the policy is left as it was.
    """
    wanted = {name: tensor for name, tensor in policy.state_dict().items() if not name.startswith("linear.")}
    found = {}
    for name, tensor in wanted.items():
        room, _, rest = name.partition(".")
        stage, _, part = rest.partition(".")
        source = f"layer{int(stage) + 1}.0.{part}" if room == "blocks" else name
        if source not in weights and source.endswith(".num_batches_tracked"):
            continue  # older files do not count the batches
        if source not in weights or weights[source].shape != tensor.shape:
            got = list(weights[source].shape) if source in weights else "nothing"
            raise ValueError(f"weights: {source} must be {list(tensor.shape)}, got {got}")
        found[name] = weights[source]
    policy.load_state_dict(found, strict=False)
