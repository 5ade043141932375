"""Random calls of every op: a valid one matches the oracle, an invalid one is refused, none crashes.

A call starts from a sample and has up to three of its arguments changed. The fake's checks and the reference together
decide what is valid: a call that either refuses must be refused by the kernel too, with an exception of the right
type; a call that both accept must be computed, and be right.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from effkern.testing import Sample, to_double
from tests.ops.catalog import REFUSALS, as_tuple, check_values, direct, every_sample

OPS = sorted({sample.op.name for sample in every_sample().values()})
DTYPES = (
    torch.float32, torch.bfloat16, torch.float16, torch.float64,
    torch.int64, torch.int32, torch.uint8, torch.bool, torch.complex64,
)  # fmt: skip
SIZES = st.sampled_from((0, 1, 2, 3, 4, 5, 8, 15, 16, 17))
INTS = st.one_of(st.integers(-2, 9), st.sampled_from((16, 17, 255, 256, 2**40, -(2**40))))


def fresh(like: Tensor, shape: list[int]) -> Tensor:
    """Random entries of the kind ``like`` has."""
    if like.dtype == torch.bool:
        return torch.rand(shape) < 0.5
    if like.is_complex():
        return torch.randn(shape, dtype=like.dtype)
    if not like.is_floating_point():
        top = min(int(like.long().max()), 2**31) + 1 if like.numel() else 2
        return torch.randint(0, max(top, 1), shape).to(like.dtype)
    values = (
        torch.rand(shape) if like.numel() and 0 <= float(like.min()) <= float(like.max()) <= 1 else torch.randn(shape)
    )
    return values.to(like.dtype)


def change_tensor(draw: Any, t: Tensor) -> Tensor:
    kind = draw(st.sampled_from(("size", "size", "layout", "dtype", "rank", "values", "values")))
    shape = list(t.shape)
    if kind == "size" and shape:
        shape[draw(st.integers(0, len(shape) - 1))] = draw(SIZES)
        return fresh(t, shape)
    if kind == "layout" and t.dim() >= 2:
        a, b = draw(st.sampled_from([(i, j) for i in range(t.dim()) for j in range(i)]))
        if draw(st.booleans()):
            return t.transpose(a, b).contiguous().transpose(a, b)
        if t.size(a) > 0:  # the same entries all along one dimension, one element of memory
            return t.narrow(a, 0, 1).expand(t.shape)
    if kind == "dtype":
        return t.to(draw(st.sampled_from(DTYPES)))
    if kind == "rank":
        return t[None] if draw(st.booleans()) or t.dim() == 0 else t[0] if t.size(0) else t.flatten()
    if t.numel() == 0:
        return t
    t = t.clone()
    at = draw(st.integers(0, t.numel() - 1))
    flat = t.flatten()
    if t.is_floating_point():
        flat[at] = draw(st.sampled_from((float("nan"), 0.0, -1.0, 0.25, 7.0)))
    elif not t.is_complex() and t.dtype != torch.bool:
        most = torch.iinfo(t.dtype).max
        flat[at] = draw(st.sampled_from((0, 1, 5, 17, 100, most)))
        if t.dtype.is_signed and draw(st.booleans()):
            flat[at] = -flat[at]
    return flat.reshape(t.shape)


def change(draw: Any, value: Any) -> Any:
    if isinstance(value, Tensor):
        return change_tensor(draw, value)
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return draw(INTS)
    if isinstance(value, float):
        return draw(st.sampled_from((0.0, -1.0, 0.5, 1e30)))
    if isinstance(value, str):
        return draw(
            st.sampled_from(("", "none", "relu", "silu", "auto", "direct", "within_group", "sum", "mean", "no"))
        )
    if isinstance(value, list | tuple):
        values = list(value)
        how = draw(st.sampled_from(("entry", "entry", "shorter", "longer")))
        if how == "shorter":
            return values[:-1]
        if how == "longer":
            return values + values[-1:]
        if values:
            at = draw(st.integers(0, len(values) - 1))
            values[at] = change(draw, values[at])
        return values
    return value


class Call:
    """A sample's op with other arguments; printed as types and shapes."""

    def __init__(self, sample: Sample, args: tuple) -> None:
        self.sample, self.args = sample, args

    def __repr__(self) -> str:
        named = zip(self.sample.op.arguments, self.args, strict=True)
        return f"{self.sample.op.name}({', '.join(f'{name}={describe(value)}' for name, value in named)})"


@st.composite
def calls(draw: Any, op: str) -> Call:
    """A sample of the op and arguments that differ from its own in at most three places."""
    dtype = draw(st.sampled_from((torch.float32, torch.float32, torch.bfloat16, torch.float16)))
    choices = [s for s in every_sample(dtype).values() if s.op.name == op]
    sample = draw(st.sampled_from(choices))
    torch.manual_seed(draw(st.integers(0, 2**16)))
    args = list(sample.args)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(args) - 1))
        optional = "Optional" in str(direct(sample)._schema.arguments[at].type)
        args[at] = None if optional and draw(st.integers(0, 4)) == 0 else change(draw, args[at])
    return Call(sample, tuple(args))


def refusal(function: Any, args: tuple) -> Exception | None:
    try:
        function(*args)
    except REFUSALS as error:
        return error
    return None


def describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)} strides {value.stride()}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(describe(v) for v in value)}]"
    return repr(value)


def run(call: Call) -> None:
    sample, args = call.sample, call.args
    expected = refusal(sample.op.fake, args) or refusal(sample.reference, to_double(args))
    if type(expected) is RuntimeError:  # a call that only torch's own operators cannot do, such as a map of 0 rows
        refusal(sample.op, args)  # must not crash
        return
    if expected is None:
        check_values(sample, args, sample.op(*args), repr(call))
        return
    got = refusal(sample.op, args)
    if got is None and refusal(sample.op.fake, args) is None and not any(y.numel() for y in as_tuple(sample.op(*args))):
        return  # no output element: data that nothing is computed from need not be read
    assert got is not None, f"{call}: accepted, but {expected!r}"
    # RuntimeError: torch refuses what the schema cannot take before a kernel is asked.
    assert isinstance(got, (ValueError, TypeError, IndexError)) or "effkern::" in str(got), f"{call}: {got!r}"
    assert refusal(direct(sample), args) is not None, f"{call}: the operator itself accepts it, but {expected!r}"


@pytest.mark.parametrize("op", OPS)
def test_random_calls(op):
    @settings(max_examples=150)
    @given(call=calls(op))
    def check(call):
        run(call)

    check()


@pytest.mark.slow
@pytest.mark.parametrize("op", OPS)
def test_many_random_calls(op):
    @settings(max_examples=400)
    @given(call=calls(op))
    def check(call):
        run(call)

    check()
