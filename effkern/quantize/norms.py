"""Batch norms that can become the row scale and bias of the convolution before them."""

from __future__ import annotations

import inspect
from collections.abc import Sequence

import torch
from torch import Tensor, fx, nn


def batch_norms_behind(model: nn.Module, names: Sequence[str]) -> dict[str, str]:
    """Convolution to batch norm, for those of ``names`` whose output goes to one batch norm and nowhere else.

    The proof is a symbolic trace. A model that cannot be traced, or a layer that runs twice, has none.
    """
    try:
        graph = fx.Tracer().trace(model, concrete_args=_defaults(model))
    except Exception:  # tracing runs the model's own code on proxies, which may raise anything
        return {}
    calls: dict[str, list[fx.Node]] = {}
    for node in graph.nodes:
        if node.op == "call_module":
            calls.setdefault(str(node.target), []).append(node)
    found = {}
    for name in names:
        if len(calls.get(name, [])) != 1 or not isinstance(model.get_submodule(name), nn.Conv2d):
            continue
        users = list(calls[name][0].users)
        if len(users) != 1 or users[0].op != "call_module":
            continue
        behind = str(users[0].target)
        norm = model.get_submodule(behind)
        if type(norm) is nn.BatchNorm2d and norm.track_running_stats and len(calls[behind]) == 1:
            found[name] = behind
    return found


def _defaults(model: nn.Module) -> dict[str, object]:
    """Optional arguments of forward, held at their defaults."""
    parameters = inspect.signature(model.forward).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}


def fold(norm: nn.Module, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Scale and bias, computed in float64, with which ``conv * scale + bias`` equals ``norm(conv + old bias)``."""
    assert isinstance(norm, nn.BatchNorm2d) and norm.running_var is not None and norm.running_mean is not None
    factor = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        factor = factor * norm.weight.detach().double()
    shift = -norm.running_mean.double() if bias is None else bias.detach().double() - norm.running_mean.double()
    shift = shift * factor
    if norm.bias is not None:
        shift = shift + norm.bias.detach().double()
    return factor.to(torch.float32), shift.to(torch.float32)
