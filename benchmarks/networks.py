"""The networks that are measured whole, in two forms: as a user has them, and as the peers are given them.

Weights are random, batch-norm statistics those of random images, so that activations have the size of a trained
network's. No speed here depends on the values.

The peers' form has batch norm and branches folded and is spelled in operators that every converter knows: a mean over
the map is an adaptive average pool. It computes the same function.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.experimental.optimization import fuse

from effkern.models import create_model
from effkern.reparam import fold_model, unfuse


@dataclass(frozen=True)
class Network:
    """One network at one image size.

    Attributes:
        name: as :func:`effkern.models.create_model` knows it.
        size: height and width of the image.
        options: for ``create_model``.
    """

    name: str
    size: int
    options: tuple[tuple[str, object], ...] = ()
    channels: int = 3

    def images(self, batch: int) -> Tensor:
        """Random images."""
        return torch.randn(batch, self.channels, self.size, self.size)

    def build(self) -> nn.Module:
        """The network in eval mode, as trained: with its batch norm, though without branches."""
        net = calibrated(create_model(self.name, **dict(self.options)), self.images(4))
        return unfuse(fold_model(net)) if self.name.startswith("repvgg") else net


@torch.no_grad()
def calibrated(net: nn.Module, images: Tensor) -> nn.Module:
    """``net`` in eval mode with the batch statistics of ``images``."""
    norms = [module for module in net.modules() if isinstance(module, nn.BatchNorm2d)]
    kept = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
    net.train()(images)
    for norm, momentum in zip(norms, kept, strict=True):
        norm.momentum = momentum
    return net.eval()


class _OneInput(nn.Module):
    """Hides further arguments of ``net`` from the tracer."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


def for_peers(net: nn.Module) -> nn.Module:
    """The same function with batch norm folded, in plain operators of PyTorch; ``net`` is left as it is."""
    graph = fuse(fx.symbolic_trace(_OneInput(copy.deepcopy(net))))
    for node in list(graph.graph.nodes):
        is_mean = node.target is torch.mean or (node.op == "call_method" and node.target == "mean")
        if is_mean and node.args[1:] == ((2, 3),):
            with graph.graph.inserting_before(node):
                pooled = graph.graph.call_function(F.adaptive_avg_pool2d, (node.args[0], 1))
                flat = graph.graph.call_function(torch.flatten, (pooled, 1))
            node.replace_all_uses_with(flat)
            graph.graph.erase_node(node)
    graph.recompile()
    return graph.eval()


def macs(net: nn.Module, x: Tensor) -> float:
    """Multiply-adds of the convolutions and linear layers of ``net(x)``."""
    total = 0.0

    def count(module: nn.Module, _: object, out: Tensor) -> None:
        nonlocal total
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            total += out.numel() * module.weight[0].numel()

    hooks = [module.register_forward_hook(count) for module in net.modules()]
    net(x)
    for hook in hooks:
        hook.remove()
    return total
