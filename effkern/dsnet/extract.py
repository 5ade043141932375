"""One way through a slimmable network as a plain one: for runtimes that know nothing of widths."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from effkern.nn import DoubleHeadedGate, SlicedConv2d, SlicedConvBNAct, SlicedLinear, SwitchableBatchNorm2d

__all__ = ["extract"]

_LAYERS = (SlicedConvBNAct, SlicedConv2d, SlicedLinear, SwitchableBatchNorm2d)


@torch.no_grad()
def extract(model: nn.Module, image: Sequence[int], way: int | Sequence[int]) -> nn.Module:
    """The network at one width, or along one way of its gates, alone: in eval mode, on PyTorch's own layers.

    What is left is the running channels of every layer, with their calibrated batch norm folded in, and no gate but its
    attention. The result takes images and gives scores, and is traced and exported as any network is.

    Args:
        model: Called as ``model(images, width)``; shared in no way. In eval mode.
        image: ``(C, H, W)``, of a trial that finds out at which width each layer runs.
        way: A width index, or a width for each gate (then in front of the gates everything runs at width 0).

    Raises:
        RuntimeError: if the model is in training mode.
        ValueError: if a layer runs at two widths.
    """
    if model.training:
        raise RuntimeError("extract: batch norm folds in eval mode only: call eval() first")
    net = copy.deepcopy(model)
    called: dict[nn.Module, tuple[int, int | None]] = {}

    def note(name: str, layer: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        width, in_width = [*args[1:], *([None] * 2)][:2]
        width = named.get("width", -1 if width is None else width)
        at = (width, named.get("in_width", in_width))
        if called.setdefault(layer, at) != at:
            raise ValueError(f"model: {name} runs at widths {called[layer]} and {at}: it cannot be one plain layer")

    hooks = [
        module.register_forward_pre_hook(partial(note, name), with_kwargs=True)
        for name, module in net.named_modules()
        if isinstance(module, _LAYERS)
    ]
    parameter = next(net.parameters())
    x = torch.zeros(1, *image, device=parameter.device, dtype=parameter.dtype)
    run = _Uniform(net, way) if isinstance(way, int) else _Along(net, tuple(way))
    run(x)
    for hook in hooks:
        hook.remove()
    _replace(net, called)
    return run.eval().requires_grad_(False)


class _Uniform(nn.Module):
    def __init__(self, net: nn.Module, width: int) -> None:
        super().__init__()
        self.net, self.width = net, width

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x, self.width)


class _Along(nn.Module):
    def __init__(self, net: nn.Module, way: tuple[int, ...]) -> None:
        super().__init__()
        self.net, self.way = net, way

    def forward(self, x: Tensor) -> Tensor:
        return self.net.along(x, self.way)  # type: ignore[operator]


class _Plain(nn.Module):
    """A plain layer where a sliced one was: what it is told about widths is settled."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, *widths: int | None, act: str = "none", **settled: Any) -> Tensor:
        y = self.layer(x)
        return F.relu(y) if act == "relu" else y


def _replace(module: nn.Module, called: dict[nn.Module, tuple[int, int | None]]) -> None:
    if isinstance(module, DoubleHeadedGate):  # called as attention; who chooses is gone
        del module.slim, module.offset
    for name, child in list(module.named_children()):
        if not isinstance(child, _LAYERS):
            _replace(child, called)
        elif child not in called:
            delattr(module, name)
        elif isinstance(child, SwitchableBatchNorm2d):
            setattr(module, name, _Plain(_batch_norm(child, called[child][0])))
        else:
            narrow: Callable[..., nn.Module] = child.narrow
            setattr(module, name, _Plain(narrow(*called[child])))


def _batch_norm(norm: SwitchableBatchNorm2d, width: int) -> nn.BatchNorm2d:
    width = width if len(norm.widths) > 1 else 0
    channels = norm.widths[width]
    plain = nn.BatchNorm2d(channels, norm.eps, device=norm.weight.device, dtype=norm.weight.dtype).eval()
    affine = (norm.weight, norm.bias) if norm.affine == "shared" else (norm.weight[width], norm.bias[width])
    assert plain.running_mean is not None and plain.running_var is not None
    for target, source in zip(
        (plain.weight, plain.bias, plain.running_mean, plain.running_var),
        (*affine, norm.running_mean[width], norm.running_var[width]),
        strict=True,
    ):
        target.copy_(source[:channels])
    return plain
