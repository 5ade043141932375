"""Bytes one network's weights take in a process that runs it: ``python -m benchmarks.memory resnet50 codes``.

Prints a JSON object. ``tensor_bytes``: all parameters and buffers. ``resident_bytes``: what the process has grown by,
in anonymous memory, from before the network is made to after two runs on a small image, freed memory given back to the
system. It has every cache of the network in it. A first copy of the network is made, run and dropped beforehand, so
that scratch and the libraries' own first-time costs are no part of it.
"""

from __future__ import annotations

import ctypes
import gc
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from effkern.models import create_model
from effkern.nn import PQConv2d, PQLinear
from effkern.quantize import regime


def from_codes(net: nn.Module) -> nn.Module:
    """``net`` (on the meta device) with random codes in the place of its weights: block sizes of `regime`, "small"."""
    rules = regime("small")
    for name, layer in list(net.named_modules()):
        rule = rules(name, layer) if isinstance(layer, (nn.Conv2d, nn.Linear)) else None
        if rule is None:
            continue
        if isinstance(layer, nn.Conv2d):
            code: nn.Module = PQConv2d(
                layer.in_channels, layer.out_channels, layer.kernel_size, rule.d, rule.entries, bias=False,
                stride=layer.stride, padding=layer.padding, device="cpu",
            )  # fmt: skip
        else:
            code = PQLinear(layer.in_features, layer.out_features, rule.d, rule.entries, device="cpu")
        parent, _, own = name.rpartition(".")
        setattr(net.get_submodule(parent), own, code)
    return net


def on_cpu(net: nn.Module) -> nn.Module:
    """Zeros in the place of all tensors that are still on the meta device."""

    def fill(t: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(t, device="cpu") if t.is_meta else t

    for module in net.modules():
        for key, value in module._parameters.items():
            if value is not None and value.is_meta:
                module._parameters[key] = nn.Parameter(fill(value), requires_grad=False)
        module._buffers.update({key: None if t is None else fill(t) for key, t in module._buffers.items()})
    return net


def tensors(net: nn.Module) -> Iterator[torch.Tensor]:
    """Parameters and buffers, each once."""
    yield from net.parameters()
    yield from net.buffers()


def resident() -> int:
    """Bytes of anonymous memory this process has, after giving back what is free."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Anonymous:")) * 1024


@torch.no_grad()
def measure(name: str, form: str) -> dict[str, float]:
    """The two numbers, for ``form`` "dense" or "codes"."""
    torch.set_num_threads(1)
    x = torch.randn(1, 3, 64, 64).to(memory_format=torch.channels_last)

    def made_and_run() -> nn.Module:
        with torch.device("meta"):
            net = create_model(name)
        net = on_cpu(from_codes(net) if form == "codes" else net).eval()
        for _ in range(2):
            net(x)
        return net

    made_and_run()
    before = resident()
    net = made_and_run()
    return {
        "tensor_bytes": sum(t.numel() * t.element_size() for t in tensors(net)),
        "resident_bytes": resident() - before,
    }


if __name__ == "__main__":
    print(json.dumps(measure(*sys.argv[1:3])))
