"""Fused batch norms, sum and ReLU of a training block against eager PyTorch and torch.compile, in both layouts.

Shapes are those of RepVGG-A0's stages. A forward row is the forward pass without recording, a backward row is the
forward pass with its graph and the gradients of all branches and parameters. All contenders are given the same maps in
their layout; nobody converts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.common import Bench, main
from effkern.ops import multi_branch_bn_add_relu
from effkern.ops.multi_branch_bn import reference
from effkern.ops.multi_branch_bn.samples import magnitude

ROUNDOFF = 16 * 2.0**-24
EAGER = ("eager_contiguous", "eager_channels_last")
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


@dataclass(frozen=True)
class Norms:
    """``branches`` maps ``[batch, channels, size, size]``."""

    name: str
    channels: int
    size: int
    batch: int
    branches: int = 3


CASES = (
    *(
        Norms(f"{channels}@{size}_{branches}_branches", channels, size, batch, branches)
        for channels, size in ((48, 56), (96, 28), (192, 14))
        for batch, branches in ((8, 3), (32, 3), (32, 2))
    ),
    Norms("64@112_3_branches", 64, 112, 8),
)
QUICK = (Norms("quick_16@8", 16, 8, 4), Norms("quick_5@7", 5, 7, 2, 2))


def eager(
    xs: list[Tensor], weight: list[Tensor], bias: list[Tensor], mean: list[Tensor], var: list[Tensor]
) -> Tensor:  # fmt: skip
    """What a block does without the op."""
    z = F.batch_norm(xs[0], mean[0], var[0], weight[0], bias[0], training=True)
    for i in range(1, len(xs)):
        z = z + F.batch_norm(xs[i], mean[i], var[i], weight[i], bias[i], training=True)
    return F.relu(z)


def fused(xs: list[Tensor], weight: list[Tensor], bias: list[Tensor], mean: list[Tensor], var: list[Tensor]) -> Tensor:
    """The op, and the copies of the running statistics that eager makes in place."""
    y, _, _, new_mean, new_var = multi_branch_bn_add_relu(xs, weight, bias, mean, var)
    with torch.no_grad():
        for i in range(len(xs)):
            mean[i].copy_(new_mean[i])
            var[i].copy_(new_var[i])
    return y


def gradient(call: Callable[..., Tensor], args: tuple[Any, ...], incoming: Tensor) -> Callable[[], tuple[Tensor, ...]]:
    """Forward and backward; returns the gradients of the weights, then all others.

    The first is what is checked. A sum within rounding of 0 falls on either side of the ReLU, and a branch's gradient
    is then another one at that pixel, for whom it is right as for us; a weight's hardly notices.
    """
    inputs = [[t.detach().requires_grad_() for t in part] for part in args[:3]]

    def run() -> tuple[Tensor, ...]:
        with torch.enable_grad():
            y = call(*inputs, *args[3:])
        xs, weight, bias = inputs
        return torch.autograd.grad(y, [*weight, *bias, *xs], incoming)

    return run


def run_case(bench: Bench, case: Norms) -> None:
    """One shape, forward and with its gradient, all contenders in both layouts."""
    shape = (case.batch, case.channels, case.size, case.size)
    xs, incoming = [torch.randn(shape) for _ in range(case.branches)], torch.randn(shape)
    weight, bias, mean, var = ([torch.rand(case.channels) + 0.5 for _ in range(case.branches)] for _ in range(4))
    compiled = None
    if bench.wants("compile"):
        try:
            torch._dynamo.reset()
            compiled = torch.compile(eager)
            compiled(xs, weight, bias, mean, var)
        except Exception as error:  # no compiler on this machine
            bench.missing["compile"] = str(error).strip().splitlines()[0]
            compiled = None
    forward: dict[str, Callable[[], Any]] = {}
    backward: dict[str, Callable[[], Any]] = {}
    for layout, memory_format in LAYOUTS.items():
        maps = [x.contiguous(memory_format=memory_format) for x in xs]
        grad = incoming.contiguous(memory_format=memory_format)
        calls = {f"effkern_{layout}": fused}
        if bench.wants(f"eager_{layout}"):
            calls[f"eager_{layout}"] = eager
        if compiled is not None:
            calls[f"compile_{layout}"] = compiled
        for name, call in calls.items():
            args = (maps, weight, bias, [m.clone() for m in mean], [v.clone() for v in var])
            forward[name] = lambda call=call, args=args: call(*args)
            backward[name] = gradient(call, args, grad)
    double = tuple([t.double() for t in part] for part in (xs, weight, bias, mean, var))
    options: tuple[Any, ...] = (True, 0.1, 1e-5, True)
    bench.compare(
        op="multi_branch_bn_add_relu",
        case=f"{case.name}_forward",
        batch=case.batch,
        layout="both",
        contenders=forward,
        judged=EAGER,
        exact=reference.multi_branch_bn_add_relu(*double, *options)[0],
        allowed=ROUNDOFF * magnitude(xs, weight, bias, mean, var, *options)[0],
    )
    bench.compare(
        op="multi_branch_bn_add_relu",
        case=f"{case.name}_forward_backward",
        batch=case.batch,
        layout="both",
        contenders=backward,
        judged=EAGER,
        peer_error=1e-2,
        exact=gradient(eager, double, incoming.double())()[0],
    )


def run(bench: Bench) -> None:
    """All shapes."""
    for case in bench.choose(CASES, quick=QUICK):
        run_case(bench, case)


if __name__ == "__main__":
    main("multi_branch_bn", run)
