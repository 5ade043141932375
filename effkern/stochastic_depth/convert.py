"""Any residual network with stochastic depth, and back."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from effkern.nn.residual import ResidualBlock, share_parts
from effkern.nn.stochastic_depth import Mode, Scale, StochasticBlock

__all__ = ["blocks_of", "convert", "deploy"]


def blocks_of(network: nn.Module) -> list[nn.Module]:
    """The residual blocks of a network in the order they are registered: ours, and torchvision's by their parts."""
    return [block for module in network.modules() if (block := _as_block(module)) is not None]


def convert(
    network: nn.Module, survival: Tensor, mode: Mode = "batch", scale: Scale = "original", sync: bool = False
) -> nn.Module:
    """A copy of ``network`` whose residual blocks have stochastic depth.

    Blocks are :class:`effkern.nn.ResidualBlock`, or modules with the parts and the function of torchvision's
    ``BasicBlock`` and ``Bottleneck`` (which is checked by running them). State dict names stay.

    Args:
        network: changed in no way.
        survival: ``[K]``, for the blocks in order; see :func:`effkern.stochastic_depth.survival_schedule`.
        mode: see :func:`effkern.nn.draw_keep`.
        scale: see :mod:`effkern.nn.stochastic_depth`.
        sync: whether a block that draws for itself takes the draw of rank 0, so that it is skipped on all ranks;
            :class:`StochasticDepthTraining` draws alike on all ranks for networks that take a mask anyway.

    Raises:
        ValueError: if the network has no residual block, or another number than ``survival``.
    """
    network = copy.deepcopy(network)
    count = len(blocks_of(network))
    if count == 0:
        raise ValueError(f"network: {type(network).__name__} has no residual block")
    if survival.shape != (count,):
        raise ValueError(f"survival: must be [{count}], one a residual block, got {list(survival.shape)}")
    left = iter(survival.tolist())
    return _replace(network, lambda block: StochasticBlock.from_block(block, next(left), mode, scale, sync))


@torch.no_grad()
def deploy(network: nn.Module) -> nn.Module:
    """A copy with plain residual blocks again, the scale of inference folded into each last batch norm.

    ``p * bn(x) = bn'(x)`` with weight and bias times p, so the fold costs nothing and changes the result by rounding.
    """
    network = copy.deepcopy(network)

    def plain(block: nn.Module) -> nn.Module:
        if not isinstance(block, StochasticBlock):
            return block
        new = share_parts(ResidualBlock, block)
        if block.scale == "original":
            last = new.layers()[-1][1]
            last.weight.mul_(block.survival)
            last.bias.mul_(block.survival)
        return new

    return _replace(network, plain)


def _replace(module: nn.Module, make: Callable[[ResidualBlock], nn.Module]) -> nn.Module:
    block = _as_block(module)
    if block is not None:
        return make(block)
    for name, child in module.named_children():
        new = _replace(child, make)
        if new is not child:
            setattr(module, name, new)
    return module


def _as_block(module: nn.Module) -> ResidualBlock | None:
    """``module`` as a residual block, or None if it is none."""
    if isinstance(module, ResidualBlock):
        return module
    names = {name for name, _ in module.named_children()} - {"relu", "downsample"}
    pairs = {"conv1", "bn1", "conv2", "bn2"}
    if names not in (pairs, pairs | {"conv3", "bn3"}):
        return None
    kind = "bottleneck" if "conv3" in names else "basic"
    convs = [getattr(module, name) for name in sorted(names) if name.startswith("conv")]
    if not all(isinstance(conv, nn.Conv2d) and conv.groups == 1 for conv in convs):
        return None
    strided = convs[1] if kind == "bottleneck" else convs[0]
    with torch.device("meta"):
        block = ResidualBlock(convs[0].in_channels, convs[0].out_channels, strided.stride[0], kind)
    for name in names:
        setattr(block, name, getattr(module, name))
    block.downsample = getattr(module, "downsample", None)
    block.training = module.training
    return block if _same_function(module, block) else None


@torch.no_grad()
def _same_function(module: nn.Module, block: ResidualBlock) -> bool:
    """Whether the two agree on a random input, in eval mode: the parts alone do not say how they are joined."""
    first, second = (copy.deepcopy(m).double().eval() for m in (module, block))
    device = next(module.parameters()).device
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, block.in_channels, 8, 8, dtype=torch.float64, generator=generator).to(device)
    try:
        want = first(x)
    except (RuntimeError, TypeError, ValueError):
        return False
    got = second(x)
    return isinstance(want, Tensor) and got.shape == want.shape and torch.allclose(got, want, 1e-9, 1e-9)
