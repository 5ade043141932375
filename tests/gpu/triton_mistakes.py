"""Kernels with a mistake each, which the interpreter's conditions must show: a check has to be able to fail."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl


@triton.jit
def _copy(x, y, n, SIDE: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if SIDE == "end":  # no mask: reads behind the last element
        value = tl.load(x + i)
    elif SIDE == "start":
        value = tl.load(x + i - 1, mask=i < n)
    elif SIDE == "gap":  # every second element belongs to somebody else
        value = tl.load(x + i, mask=i < n)
    else:
        value = tl.load(x + i, mask=i < n)
        tl.store(y + 2 * i + 1, value, mask=i < n - 1)
    tl.store(y + i, value, mask=i < n)


@triton.jit
def _race(x, y):
    """Programs that read what others write."""
    i = tl.program_id(0)
    tl.store(y + i, tl.load(y + (i + 1) % 8, mask=i < 7, other=0.0) + tl.load(x + i))


def _copied(side: str, run: Callable[..., Any], gap: int = 1, into: int = 1) -> torch.Tensor:
    x, y = torch.ones(5 * gap)[::gap], torch.zeros(5 * into)[::into]
    for seed in range(2):  # the guard behind, then before
        run(lambda: _copy[(1,)](x, y, 5, side, 8) or y, (), seed)
    return y


def _order(run: Callable[..., Any]) -> None:
    results = []
    for seed in range(2):
        y = torch.zeros(8)
        results.append(run(lambda y=y: _race[(8,)](torch.ones(8), y) or y, (), seed)[0])
    assert torch.equal(*results), "the order of the programs changes the values"


def _gap(run: Callable[..., Any]) -> None:
    assert not _copied("gap", run, gap=2).isnan().any(), "NaN of a gap was read"


MISTAKES: dict[str, Callable[[Callable[..., Any]], None]] = {
    "end": lambda run: _copied("end", run) and None,
    "start": lambda run: _copied("start", run) and None,
    "gap": _gap,
    "write": lambda run: _copied("write", run, into=2) and None,
    "order": _order,
}
