"""What a network costs on paper: parameters, bytes of its saved weights, multiply-adds."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from safetensors.torch import save
from torch import Tensor, nn

__all__ = ["CountsMacs", "bytes_on_disk", "count_macs", "count_params"]


@runtime_checkable
class CountsMacs(Protocol):
    """A layer that knows its own multiply-adds, because its work is not that of its shape.

    Such a layer is asked instead of its children, so nothing is counted twice.
    """

    def macs(self, input_shape: torch.Size, output_shape: torch.Size) -> float:
        """Multiply-adds of one forward from ``input_shape`` to ``output_shape``, the whole batch together."""


def count_params(model: nn.Module) -> int:
    """Number of elements of all parameters; a shared parameter counts once. Buffers do not count."""
    return sum(parameter.numel() for parameter in model.parameters())


def plain_tensors(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """Contiguous CPU tensors of their own, as safetensors wants them.

    Raises:
        TypeError: if an entry is no tensor.
    """
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"state[{name!r}]: must be a tensor, got {type(value).__name__}")
    # safetensors refuses shared memory and other strides, so each tensor gets its own plain copy.
    return {name: value.detach().cpu().contiguous().clone() for name, value in state.items()}


def bytes_on_disk(state: nn.Module | Mapping[str, Tensor]) -> int:
    """Size in bytes of ``state`` (a module or a state dict) saved as one safetensors file."""
    if isinstance(state, nn.Module):
        state = state.state_dict()
    return len(save(plain_tensors(state)))


def count_macs(model: nn.Module, x: Tensor) -> float:
    """Multiply-adds per image of ``model(x)``, found by running it once.

    Counts ``Conv1d/2d/3d``, ``ConvTranspose``, ``Linear`` and every layer that implements :class:`CountsMacs`;
    normalisation, activations and pooling are left out, as is usual. Functional calls are not seen: a layer that uses
    them should implement ``macs``. A layer called twice counts twice.

    Args:
        model: any module that takes ``x``; its training flag and hooks are as before afterwards, also after an error.
        x: ``[n, ...]``, ``n >= 1``.

    Returns:
        Multiply-adds divided by ``n``. A float, since layers that skip per sample have a fractional mean.

    Raises:
        ValueError: if the batch is empty.
    """
    if x.shape[0] < 1:
        raise ValueError(f"x: must hold at least one sample, got shape {tuple(x.shape)}")
    total = 0.0

    def count(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        nonlocal total
        total += _layer_macs(module, _shape(inputs), _shape(output))

    hooks = [module.register_forward_hook(count) for module in _counted(model)]
    was_training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            model(x)
    finally:
        for hook in hooks:
            hook.remove()
        for module, training in was_training.items():
            module.training = training
    return total / x.shape[0]


def _counted(module: nn.Module) -> list[nn.Module]:
    """The layers to ask: one that counts for itself hides its children."""
    if isinstance(module, CountsMacs | nn.modules.conv._ConvNd | nn.Linear):
        return [module]
    found: dict[nn.Module, None] = {}  # an ordered set: a layer used under two names has one hook
    for child in module.children():
        found.update(dict.fromkeys(_counted(child)))
    return list(found)


def _layer_macs(module: nn.Module, input_shape: torch.Size, output_shape: torch.Size) -> float:
    if isinstance(module, CountsMacs):
        return float(module.macs(input_shape, output_shape))
    if isinstance(module, nn.modules.conv._ConvTransposeNd):
        # Every input element meets the kernel once for each output channel of its group.
        return input_shape.numel() * module.out_channels / module.groups * math.prod(module.kernel_size)
    if isinstance(module, nn.modules.conv._ConvNd):
        return output_shape.numel() * module.in_channels / module.groups * math.prod(module.kernel_size)
    assert isinstance(module, nn.Linear)
    return float(output_shape.numel() * module.in_features)


def _shape(value: Any) -> torch.Size:
    """Shape of the first tensor in a layer's inputs or output."""
    if isinstance(value, Tensor):
        return value.shape
    if isinstance(value, tuple | list):
        for item in value:
            if isinstance(item, Tensor | tuple | list):
                return _shape(item)
    raise TypeError(f"a counted layer must take and return tensors, got {type(value).__name__}")
