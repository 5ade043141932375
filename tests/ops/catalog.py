"""Every op and every sample of the package, found by the ``samples.py`` of its folder."""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor

from effkern import ops
from effkern.ops._registry import OPS
from effkern.testing import Sample, assert_within, direct_bound, map_tensors, to_double
from tests.tails import past_width

#: Arguments that hold one entry a sample of the batch in dimension 0, by their name in the schemas.
BATCHED = ("x", "keep", "res", "residual", "c_in", "c_out", "width_idx")
REFUSALS = (ValueError, TypeError, IndexError, RuntimeError)


@cache
def every_sample(dtype: torch.dtype = torch.float32) -> dict[str, Sample]:
    """``"<op>/<sample>"`` to sample, over all op folders."""
    found = {}
    for module in pkgutil.iter_modules(ops.__path__, "effkern.ops."):
        if not module.ispkg or importlib.util.find_spec(f"{module.name}.samples") is None:
            continue
        for sample in importlib.import_module(f"{module.name}.samples").samples(dtype):
            key = f"{sample.op.name}/{sample.name}"
            assert key not in found, f"two samples are called {key}"
            found[key] = sample
    return found


def direct(sample: Sample) -> Any:
    """The operator behind all Python conveniences."""
    return getattr(torch.ops.effkern, sample.op.name).default


def as_tuple(outputs: Any) -> tuple[Tensor, ...]:
    """One tensor or several, as several."""
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal shape, dtype and bits; NaN equals itself."""
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a.isnan(), b.isnan()) and bool(
        torch.equal(a.nan_to_num(), b.nan_to_num())
    )  # fmt: skip


def batch_of(sample: Sample) -> int | None:
    """Size of the batch, or ``None`` for an op without one or with results that sum over it."""
    if "sums_over_batch" in sample.tags:
        return None
    x = sample.named_args().get("x")
    return x.size(0) if isinstance(x, Tensor) else None


def batched(sample: Sample) -> tuple[str, ...]:
    """Names of the arguments with one entry a sample."""
    n = batch_of(sample)
    return tuple(
        name for name, value in sample.named_args().items()
        if name in BATCHED and isinstance(value, Tensor) and value.dim() > 0 and value.size(0) == n
    )  # fmt: skip


def with_rows(sample: Sample, rows: Tensor) -> tuple:
    """The arguments for the listed samples of the batch only."""
    names = batched(sample)
    return tuple(v.index_select(0, rows) if k in names else v for k, v in sample.named_args().items())


def any_nan(args: tuple) -> bool:
    """Whether a NaN is among the arguments."""
    return any(isinstance(t, Tensor) and t.is_floating_point() and bool(t.isnan().any()) for t in args)


def check_values(sample: Sample, args: tuple, outputs: Any, what: str) -> None:
    """Outputs against the fp64 oracle of the same (rounded) arguments."""
    exact = as_tuple(sample.reference(*to_double(args)))
    named = dict(zip(sample.op.arguments, args, strict=True))
    if not named.get("zero_tail", True):  # the contents of a tail are open; the oracle has zeros
        outputs = outputs.masked_fill(past_width(outputs, named["c_out"]), 0)
    outputs = as_tuple(outputs)
    assert len(outputs) == len(exact), what
    for i, (y, y64) in enumerate(zip(outputs, exact, strict=True)):
        if not y.is_floating_point():
            assert torch.equal(y, y64), what
            continue
        if sample.magnitude is None:
            bound = 16 * 2.0**-24 * y64.abs()
        else:
            # A NaN among the arguments would make all of A NaN, also where the output does not depend on it; where it
            # does, the output is NaN and has no error.
            finite = map_tensors(lambda t: t.nan_to_num(1.0) if t.is_floating_point() else t, args)
            magnitudes = as_tuple(sample.magnitude(*finite))  # one for all results, or one each
            magnitude = magnitudes[i if len(magnitudes) > 1 else 0]
            bound = direct_bound(magnitude, y64, y.dtype) + 16 * 2.0**-24 * y64.abs()
            # Sums that leave fp32, or results that leave the output's type, may be infinite or NaN: no error to bound.
            overflow = (magnitude > 1e38) | (y64.abs() > 0.99 * torch.finfo(y.dtype).max)
            if "nan_meets_padding" in sample.tags:
                # Whether NaN meets a pad's zero is a matter of how padding is done: both are right.
                overflow = overflow | y64.isnan() | y.isnan() & any_nan(args)
            y, y64, bound = y.masked_fill(overflow, 0), y64.masked_fill(overflow, 0), bound.masked_fill(overflow, 0)
        assert_within(y, y64, bound, what)


def differentiable_ops() -> Iterator[str]:
    """Keys of the samples that have gradients."""
    return (key for key, sample in every_sample().items() if sample.requires_grad)


__all__ = ["BATCHED", "OPS", "REFUSALS"]
