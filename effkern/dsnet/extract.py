"""One way through a slimmable network as a plain one: for runtimes that know nothing of widths."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from effkern.dsnet.calibrate import averaging
from effkern.nn import DoubleHeadedGate, SlicedConv2d, SlicedConvBNAct, SlicedLinear, SwitchableBatchNorm2d

__all__ = ["extract"]

_LAYERS = (SlicedConvBNAct, SlicedConv2d, SlicedLinear, SwitchableBatchNorm2d)


@torch.no_grad()
def extract(
    model: nn.Module,
    image: Sequence[int],
    way: int | Sequence[int] | Mapping[str, int],
    batches: Iterable[Tensor] = (),
) -> nn.Module:
    """The network at one width, along one way of its gates, or at a width a layer: in eval mode, on PyTorch's layers.

    What is left is the running channels of every layer, with their calibrated batch norm folded in, and no gate but its
    attention. The result takes images and gives scores, and is traced and exported as any network is.

    Args:
        model: Called as ``model(images, width)``; shared in no way. In eval mode.
        image: ``(C, H, W)``, of a trial that finds out at which width each layer runs.
        way: A width index, or a width for each gate (then in front of the gates everything runs at width 0), or output
            widths of layers by name: a layer runs at that of the longest name it begins with, ``""`` being all, and
            reads as many channels as come. A depthwise layer gives as many as it is given.
        batches: Images, seen once: with a width a layer, batch norm has met no such mix and is calibrated on them.

    Raises:
        RuntimeError: if the model is in training mode, or a batch norm of a mix met no batch.
        ValueError: if a layer runs at two widths, no layer has a name, or layers of a mix do not fit together.
    """
    if model.training:
        raise RuntimeError("extract: batch norm folds in eval mode only: call eval() first")
    net = copy.deepcopy(model)
    mix = way if isinstance(way, Mapping) else None
    hooks = [] if mix is None else _settle(net, mix)
    run = _Along(net, tuple(way)) if isinstance(way, Sequence) else _Uniform(net, way if isinstance(way, int) else -1)
    called: dict[nn.Module, tuple[int, int | None]] = {}

    def note(name: str, layer: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        width, in_width = [*args[1:], *([None] * 2)][:2]
        width = named.get("width", -1 if width is None else width)
        at = (width, named.get("in_width", in_width))
        if called.setdefault(layer, at) != at:
            raise ValueError(f"model: {name} runs at widths {called[layer]} and {at}: it cannot be one plain layer")

    hooks += [
        module.register_forward_pre_hook(partial(note, name), with_kwargs=True)
        for name, module in net.named_modules()
        if isinstance(module, _LAYERS)
    ]
    parameter = next(net.parameters())
    try:
        run(torch.zeros(1, *image, device=parameter.device, dtype=parameter.dtype))
    except RuntimeError as error:
        if mix is None:
            raise
        raise ValueError(f"way: the layers of this mix do not fit together: {error}") from error
    if mix is not None:
        with averaging(net):
            for images in batches:
                run(images)
        ran = {module for layer in called for module in layer.modules()}
        norms = [(n, m) for n, m in net.named_modules() if isinstance(m, SwitchableBatchNorm2d) and m in ran]
        if missed := [name for name, norm in norms if not norm.num_batches_tracked.any()]:
            raise RuntimeError(f"batches: none reached {', '.join(missed)}, which no such mix has met")
    for hook in hooks:
        hook.remove()
    _replace(net, called)
    return run.eval().requires_grad_(False)


def _settle(net: nn.Module, widths: Mapping[str, int]) -> list[RemovableHandle]:
    """Let every layer run at its own width, whatever it is called with."""
    layers = dict(_layers(net))
    for begin in widths:
        if not any(_begins(name, begin) for name in layers):
            raise ValueError(f"way: no layer's name begins with {begin!r}; there are {', '.join(layers)}")

    def settle(name: str, layer: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> Any:
        x, at = args[0], [widths[begin] for begin in sorted(widths, key=len) if _begins(name, begin)]
        width = at[-1] if at else -1
        if isinstance(layer, SwitchableBatchNorm2d):
            return (x, _index_of(name, x, layer.widths, width)), {}
        conv = layer.conv if isinstance(layer, SlicedConvBNAct) else layer
        ins: tuple[int, ...] = conv.in_features if isinstance(conv, SlicedLinear) else conv.in_channels  # type: ignore[assignment]
        in_width = _index_of(name, x, ins, width)
        if isinstance(conv, SlicedConv2d) and 1 < conv.groups == conv.out_channels[-1]:
            width = in_width
        return (x, width, in_width), {key: named[key] for key in named.keys() - {"width", "in_width"}}

    return [layer.register_forward_pre_hook(partial(settle, name), with_kwargs=True) for name, layer in layers.items()]


def _begins(name: str, begin: str) -> bool:
    return not begin or name == begin or name.startswith(f"{begin}.")


def _index_of(name: str, x: Tensor, widths: tuple[int, ...], preferred: int) -> int:
    """The index at which a layer takes the channels of ``x``, the preferred one where several do."""
    fit = [i for i, channels in enumerate(widths) if channels == x.shape[1]]
    if not fit:
        raise ValueError(f"way: {name} takes {list(widths)} channels, the mix gives it {x.shape[1]}")
    return preferred % len(widths) if preferred % len(widths) in fit else fit[0]


def _layers(module: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Every layer with widths by its name, the parts of a fused one left out."""
    for child_name, child in module.named_children():
        if isinstance(child, _LAYERS):
            yield name + child_name, child
        else:
            yield from _layers(child, f"{name}{child_name}.")


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
