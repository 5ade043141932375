"""From a trained network to the one that is deployed, and the proof that both compute the same."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from effkern.nn.rep_conv import RepConv2d
from effkern.nn.repvgg_block import BranchBlock, ConvBN
from effkern.reparam.fold import Conv, ReparamError, add, fold_batch_norm, identity, read_conv

_ACTIVATIONS: dict[type[nn.Module], str] = {
    nn.ReLU: "relu",
    nn.ReLU6: "relu6",
    nn.Hardswish: "hardswish",
    nn.SiLU: "silu",
}
_BLOCKS = (BranchBlock, ConvBN)
#: A bias so many times larger than a layer's output means that large terms cancel there.
_CANCELLATION = 100.0


def fold_block(block: BranchBlock | ConvBN) -> RepConv2d:
    """One convolution that computes what ``block`` computes in eval mode.

    Raises:
        ReparamError: if the block has no exact fold.
    """
    folded, convs = read_block(block)
    act = block.act if isinstance(block, BranchBlock) else "none"
    return _layer(folded, convs, act, list(block.parameters()))


def read_block(block: BranchBlock | ConvBN) -> tuple[Conv, list[nn.Conv2d]]:
    """The numbers of the one convolution that ``block`` is without its activation, and the convolutions it is made of.

    Raises:
        ReparamError: if the block has no exact fold.
    """
    branches = [block] if isinstance(block, ConvBN) else list(block.branches.values())
    convs, folded = [], []
    for branch in branches:
        if isinstance(branch, ConvBN):
            convs.append(branch.conv)
            folded.append(fold_batch_norm(read_conv(branch.conv), branch.norm))
        elif isinstance(branch, _BatchNorm):
            folded.append(fold_batch_norm(identity(branch.num_features), branch))
        else:
            raise ReparamError(
                f"a branch is a {type(branch).__name__}", "use ConvBN or BatchNorm2d branches, or fold it yourself"
            )
    if not convs:
        raise ReparamError("no branch is a convolution", "leave the block as it is")
    return add(folded), convs


def _layer(conv: Conv, like: Sequence[nn.Conv2d], act: str, parameters: Sequence[nn.Parameter]) -> RepConv2d:
    """A layer of these numbers; dtype, device and memory format are those of the first module it came from."""
    if not (bool(conv.weight.isfinite().all()) and bool(conv.bias.isfinite().all())):
        raise ReparamError("the folded weight is not finite", "look for NaN, Inf or a negative running variance")
    (top, bottom), (left, right) = conv.padding
    if top != bottom or left != right:
        raise ReparamError(
            f"padding {conv.padding} differs between two sides",
            "pad the input with nn.ZeroPad2d and use an unpadded convolution",
        )
    weight = like[0].weight
    limit = torch.finfo(weight.dtype).max
    if max(float(conv.weight.abs().max()), float(conv.bias.abs().max())) > limit:
        raise ReparamError(f"the folded weight exceeds the range of {weight.dtype}", "fold in float32, then convert")
    layer = RepConv2d(
        conv.in_channels,
        int(conv.weight.shape[0]),
        conv.kernel_size,
        conv.stride,
        (top, left),
        conv.dilation,
        conv.groups,
        act=act,
        padding_mode=conv.padding_mode,
        device=weight.device,
        dtype=weight.dtype,
    )
    assert layer.bias is not None
    with torch.no_grad():
        layer.weight.copy_(conv.weight)  # the one rounding
        layer.bias.copy_(conv.bias)
    if weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous():
        layer = layer.to(memory_format=torch.channels_last)
    return layer.requires_grad_(any(p.requires_grad for p in parameters)).eval()


def fold_model(model: nn.Module, inplace: bool = False) -> nn.Module:
    """Replace everything that is one convolution at inference by a :class:`~effkern.nn.RepConv2d`.

    That is: every block of branches, every :class:`~effkern.nn.repvgg_block.ConvBN`, and every run of ``Conv2d``,
    ``BatchNorm2d`` and perhaps an activation in a ``Sequential``.

    Works on any module in eval mode. Folding is done in fp64 and rounded once to the weights' dtype. Layers keep the
    device, dtype, memory format and ``requires_grad`` of what they replace and stand in its place under its name; in a
    ``Sequential`` the places behind them are taken by ``Identity``, so that names do not move. A block used twice is
    folded once. Folding a folded model changes nothing.

    Args:
        model: in eval mode.
        inplace: change ``model`` itself instead of a deep copy.

    Returns:
        The folded model, in eval mode.

    Raises:
        ReparamError: naming the module, the reason and the remedy. A model folded in place is not touched then.

    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
    >>> _ = net(torch.randn(2, 3, 8, 8))  # running statistics
    >>> fold_model(net.eval())[0]
    RepConv2d(3, 8, kernel_size=(3, 3), stride=(1, 1), padding=(0, 0), act=relu)
    """
    for name, module in model.named_modules():
        if isinstance(module, DistributedDataParallel):
            raise ReparamError("the model is wrapped in DistributedDataParallel", "fold its .module", name)
    if not inplace:
        model = copy.deepcopy(model)
    if isinstance(model, _BLOCKS):
        return _fold_named(model, "")
    # All folds first, all replacements after: an error leaves the model as it was.
    folded: dict[nn.Module, RepConv2d] = {}
    inside: set[nn.Module] = set()
    for name, module in model.named_modules():
        if isinstance(module, _BLOCKS) and module not in inside:
            folded[module] = _fold_named(module, name)
            inside |= set(module.modules())
    places: list[tuple[nn.Module, str, nn.Module]] = []
    for name, parent in model.named_modules():
        if parent not in inside:
            if isinstance(parent, nn.Sequential):
                places += _sequential(parent, name)
            # not named_children(): it tells a child that stands in two places only once
            places += [(parent, key, folded[child]) for key, child in parent._modules.items() if child in folded]
    for parent, key, child in places:
        parent._modules[key] = child
    return model.eval()


def _sequential(parent: nn.Sequential, name: str) -> list[tuple[nn.Module, str, nn.Module]]:
    """What to put where for each Conv2d-BatchNorm2d[-activation] run."""
    places: list[tuple[nn.Module, str, nn.Module]] = []
    children = list(parent._modules.items())
    for i in range(len(children) - 1):
        (key, conv), (norm_key, norm) = children[i], children[i + 1]
        if type(conv) is not nn.Conv2d or not isinstance(norm, nn.BatchNorm2d | nn.SyncBatchNorm):
            continue
        path = f"{name}.{key}" if name else key
        third = children[i + 2] if i + 2 < len(children) else None
        act = _ACTIVATIONS.get(type(third[1])) if third is not None else None
        gone = [(key, conv), (norm_key, norm), *([third] if act is not None and third is not None else [])]
        for _, module in gone:
            _refuse_training(module, path)
            _warn_of_hooks(module, path)
        try:
            folded = fold_batch_norm(read_conv(conv), norm)
            layer = _layer(folded, [conv], act or "none", [*conv.parameters(), *norm.parameters()])
        except ReparamError as error:
            raise error.at(path) from None
        places.append((parent, key, layer))
        places += [(parent, slot, nn.Identity()) for slot, _ in gone[1:]]
    return places


def _fold_named(block: BranchBlock | ConvBN, name: str) -> RepConv2d:
    _refuse_training(block, name)
    _warn_of_hooks(block, name)
    try:
        return fold_block(block)
    except ReparamError as error:
        raise error.at(name) from None


def _refuse_training(module: nn.Module, name: str) -> None:
    for inner, part in module.named_modules():
        if part.training:
            where = ".".join(filter(None, (name, inner)))
            raise ReparamError("is in training mode", "call model.eval() before folding", where)


def _warn_of_hooks(module: nn.Module, name: str) -> None:
    for inner, part in module.named_modules():
        if part._forward_hooks or part._forward_pre_hooks or part._backward_hooks:
            where = ".".join(filter(None, (name, inner)))
            warnings.warn(f"{where}: its hooks vanish with it when it is folded", stacklevel=3)


def unfuse(model: nn.Module) -> nn.Module:
    """A copy with every :class:`~effkern.nn.RepConv2d` as ``Conv2d`` and activation: folded, but in plain PyTorch.

    For comparisons, and for tools that know only PyTorch's own layers.
    """
    model = copy.deepcopy(model)
    if isinstance(model, RepConv2d):
        return model.plain()
    for parent in list(model.modules()):
        for key, child in list(parent._modules.items()):
            if isinstance(child, RepConv2d):
                parent._modules[key] = child.plain()
    return model


@dataclass(frozen=True)
class Check:
    """How far two forms of a network are from the exact one.

    Attributes:
        train_error: ``max |y - y64| / max |y64|`` of the training form, ``y64`` the training form run in fp64.
        deploy_error: the same of the folded form.
        agreement: fraction of samples (of pixels, for maps) whose largest channel is the same one in both forms.
        cancelling: folded layers whose bias is far larger than their output, where low precision will hurt.
    """

    train_error: float
    deploy_error: float
    agreement: float
    cancelling: tuple[str, ...] = ()


@torch.no_grad()
def check(model: nn.Module, x: Tensor, deployed: nn.Module | None = None) -> Check:
    """Measure what folding does to a network's results.

    Args:
        model: the training form, in eval mode.
        x: an input of it, in its dtype.
        deployed: the folded form; made by :func:`fold_model` unless given.

    Returns:
        Errors against the training form run in fp64, and the agreement of both forms.

    Raises:
        ReparamError: if the model cannot be folded.
    """
    deployed = fold_model(model) if deployed is None else deployed
    exact = copy.deepcopy(model).double()(x.double())
    trained = model(x)
    largest: dict[str, float] = {}
    hooks = [
        layer.register_forward_hook(_watch(name, largest))
        for name, layer in deployed.named_modules()
        if isinstance(layer, RepConv2d)
    ]
    try:
        folded = deployed(x)
    finally:
        for hook in hooks:
            hook.remove()
    cancelling = tuple(name for name, ratio in largest.items() if ratio > _CANCELLATION)
    for name in cancelling:
        warnings.warn(
            f"{name or 'the model'}: its bias is {largest[name]:.0f} times its output: large terms cancel, expect "
            "errors in bfloat16 and float16",
            stacklevel=2,
        )
    agree = (trained.argmax(1) == folded.argmax(1)).double()
    return Check(
        _error(trained, exact), _error(folded, exact), float(agree.mean()) if agree.numel() else 1.0, cancelling
    )


def _watch(name: str, ratios: dict[str, float]) -> Any:
    def hook(layer: RepConv2d, inputs: Any, output: Tensor) -> None:
        rms = float(output.double().square().mean().sqrt()) if output.numel() else 0.0
        if layer.bias is not None and rms > 0:
            ratios[name] = float(layer.bias.double().abs().max()) / rms

    return hook


def _error(y: Tensor, exact: Tensor) -> float:
    if y.numel() == 0:
        return 0.0
    scale = float(exact.abs().max())
    return float((y.double() - exact).abs().max()) / (scale if scale > 0 else 1.0)
