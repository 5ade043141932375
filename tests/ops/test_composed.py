"""Ops that are calls of other ops on CUDA: their values, on the CPU, and that the host reads nothing of the device."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from effkern.ops import _handle
from effkern.ops._registry import OPS
from effkern.testing import DIRECT_LIMIT, UNIT, Sample, map_tensors
from tests.ops.catalog import as_tuple, check_values, every_sample

COMPOSED = {
    "rep_conv2d_chain", "rep_conv2d_packed", "sliced_chain", "sliced_conv2d_packed", "sliced_conv2d_ragged_packed",
    "sliced_dw_pw_packed",
}  # fmt: skip
KEYS = [key for key, sample in every_sample().items() if sample.op.composed is not None]
#: Operators that make the host wait for a GPU.
WAITS = {"_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "item", "_unique2"}


class Watch(TorchDispatchMode):
    """Refuses what reads data, and what makes a tensor of the host's numbers: that copies to the device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().split("::")[1].split(".")[0]
        assert name not in WAITS | {"lift_fresh"}, f"{name} would wait for a GPU"
        return func(*args, **(kwargs or {}))


def composed(sample: Sample) -> tuple[Tensor, ...]:
    return as_tuple(sample.op._composed(*sample.args))


def rounded(sample: Sample, dtype: torch.dtype) -> Sample:
    """With the bound for weights and steps of chains in 16 bits, which the CPU's kernels hold in fp32."""
    if dtype == torch.float32 or sample.magnitude is None:
        return sample
    times = 1 + (3 if sample.op.name.endswith("chain") else 1) * UNIT[dtype] / (DIRECT_LIMIT * UNIT[torch.float32])
    magnitude = sample.magnitude

    def more(*args: Any) -> Any:
        found = magnitude(*args)
        return found * times if isinstance(found, Tensor) else tuple(m * times for m in found)

    return dataclasses.replace(sample, magnitude=more)


def test_the_ops_are_there():
    assert {name for name, op in OPS.items() if op.composed is not None} == COMPOSED


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("key", KEYS)
def test_values_and_strides(key, dtype):
    sample = every_sample(dtype)[key]
    outputs = composed(sample)
    for y, fake in zip(outputs, as_tuple(sample.op.fake(*sample.args)), strict=True):
        assert (y.shape, y.dtype, y.stride()) == (fake.shape, fake.dtype, fake.stride())
    check_values(rounded(sample, dtype), sample.args, outputs if len(outputs) > 1 else outputs[0], key)


@pytest.mark.parametrize("key", KEYS)
def test_nothing_is_read(key):
    sample = every_sample()[key]
    with Watch():
        composed(sample)


def test_the_watch_sees_what_waits():
    for wait in (lambda: torch.ones(2).sum().item(), lambda: torch.ones(2).nonzero(), lambda: torch.tensor([1])):
        with Watch(), pytest.raises(AssertionError, match="would wait"):
            wait()


def test_a_header_on_a_device_is_read_once_for_what_it_holds(monkeypatch):
    handle = _handle.pack_conv_weight(torch.ones(4, 3, 1, 1))
    reads: list[Sequence[int]] = []

    class There(Tensor):
        """Says it is not on the CPU."""

        @property
        def is_cpu(self) -> bool:  # type: ignore[override]
            return False

        def tolist(self) -> list[int]:  # type: ignore[override]
            reads.append(self.shape)
            return super().tolist()

    there = handle.as_subclass(There)
    for _ in range(3):
        assert _handle.check_handle(there, 4, [1, 1], 1) == 3
    assert len(reads) == 1
    there.add_(0)
    assert _handle.check_handle(there, 4, [1, 1], 1) == 3
    assert len(reads) == 2
    there[0] += 1
    with pytest.raises(ValueError, match="magic"):
        _handle.check_handle(there, 4, [1, 1], 1)


def test_a_handle_of_other_dimensions_is_refused():
    sample = every_sample()["rep_conv2d_packed/packed_3x3"]
    x, handle, *rest = sample.args
    for wrong in (handle[:-4], torch.zeros_like(handle), handle.float()):
        with pytest.raises((ValueError, TypeError), match="rep_conv2d_packed: handle"):
            sample.op._composed(x, wrong, *rest)
    assert map_tensors(lambda t: t, x) is x
