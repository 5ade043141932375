"""No call keeps memory: neither of an operator nor of its gradient.

Even a few bytes a call matter: they lie between the activations and keep the allocator from joining what is freed.
"""

from __future__ import annotations

import ctypes
import gc
import time
from collections.abc import Callable, Iterable

import pytest
import torch

from tests.ops.catalog import as_tuple, differentiable_ops, direct, every_sample
from tests.ops.test_every_op import gradients

CALLS = 40
FIELDS_BEFORE = ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks")
SMALLEST = 24  # bytes an allocation takes at the least


def first_of_each_op(keys: Iterable[str]) -> list[str]:
    return list({key.split("/")[0]: key for key in reversed(list(keys))}.values())


class MallInfo(ctypes.Structure):
    """glibc's ``struct mallinfo2``."""

    _fields_ = [(name, ctypes.c_size_t) for name in (*FIELDS_BEFORE, "uordblks", "fordblks", "keepcost")]


try:
    libc = ctypes.CDLL(None)
    mallinfo2 = libc.mallinfo2
    mallinfo2.restype = MallInfo
except (AttributeError, OSError):
    pytestmark = pytest.mark.skip(reason="the C library has no mallinfo2")


def kept(call: Callable[[], object]) -> float:
    """Bytes a call keeps: the least of up to ten times forty, because caches of others may fill meanwhile, and on a
    busy machine autograd's threads give memory back late."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for _ in range(20):
            call()
        least = float("inf")
        for _ in range(10):
            gc.collect()
            time.sleep(0.02)
            before = mallinfo2()
            for _ in range(CALLS):
                call()
            gc.collect()
            time.sleep(0.02)
            after = mallinfo2()
            least = min(least, (after.uordblks + after.hblkhd - before.uordblks - before.hblkhd) / CALLS)
            if least < SMALLEST:
                break
        return least
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("key", first_of_each_op(every_sample()))
def test_a_call_keeps_nothing(key):
    sample = every_sample()[key]
    run = direct(sample)
    args = sample.args
    assert kept(lambda: run(*args)) < SMALLEST


@pytest.mark.parametrize("key", first_of_each_op(differentiable_ops()))
def test_a_gradient_keeps_nothing(key):
    sample = every_sample()[key]
    run = direct(sample)
    args = sample.args
    incoming = tuple(torch.ones_like(y) for y in as_tuple(run(*args)))
    assert kept(lambda: gradients(run, sample, args, incoming)) < SMALLEST


def test_a_leak_is_seen():
    assert kept(lambda: libc.malloc(8)) >= SMALLEST
