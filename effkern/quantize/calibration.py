"""What the inputs of a layer look like, for errors that matter to its output."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ROWS = 4096  # input rows a batch that enter the mean; more change it by less than k-means can see


def call(model: nn.Module, batch: Any) -> None:
    """Run the model on a batch, a tuple as several arguments."""
    with torch.no_grad():
        model(*batch) if isinstance(batch, tuple | list) else model(batch)


def running_order(model: nn.Module, layers: Mapping[str, nn.Module], batch: Any) -> list[str]:
    """Names of the layers in the order they first run; those that do not run come last."""
    names = {layer: name for name, layer in layers.items()}
    order: dict[str, None] = {}
    hooks = [layer.register_forward_pre_hook(lambda module, inputs: order.setdefault(names[module])) for layer in names]
    try:
        call(model, batch)
    finally:
        for hook in hooks:
            hook.remove()
    return [*order, *(name for name in layers if name not in order)]


def input_metric(model: nn.Module, layer: nn.Module, batches: Iterable[Any], d: int) -> Tensor | None:
    """``H = E[u u^T]`` ``[d, d]``, ``u`` being the pieces of the layer's input that meet a sub-vector of its weight.

    Args:
        model: run in eval mode on every batch.
        layer: a ``Conv2d`` or ``Linear`` of the model; for an ``Embedding`` all rows are equal: no metric.
        batches: inputs of the model; a tuple is unpacked.
        d: length of a sub-vector.

    Returns:
        The metric in float64, or None if the layer has none or was not reached.
    """
    if isinstance(layer, nn.Embedding):
        return None
    total = torch.zeros(d, d, dtype=torch.float64)
    count = 0

    def collect(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        nonlocal count
        rows = _input_rows(module, inputs[0].detach().float())
        rows = rows[:: max(1, rows.shape[0] // ROWS)]
        pieces = F.pad(rows, (0, -rows.shape[1] % d)).reshape(-1, d).double()
        total.add_((pieces.T @ pieces).cpu())
        count += pieces.shape[0]

    hook = layer.register_forward_pre_hook(collect)
    try:
        for batch in batches:
            call(model, batch)
    finally:
        hook.remove()
    return total / count if count else None


def _input_rows(layer: nn.Module, x: Tensor) -> Tensor:
    """Inputs as rows in the order of the weight's rows: ``[pixels * groups, Ci / groups * R * S]``."""
    if isinstance(layer, nn.Linear):
        return x.reshape(-1, x.shape[-1])
    assert isinstance(layer, nn.Conv2d)
    padding = layer._reversed_padding_repeated_twice  # also what "same" means, per side
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    x = F.pad(x, padding, mode=mode)
    columns = F.unfold(x, layer.kernel_size, layer.dilation, 0, layer.stride)  # type: ignore[arg-type]
    n, _, pixels = columns.shape
    return columns.reshape(n, layer.groups, -1, pixels).permute(0, 3, 1, 2).flatten(0, 2)
