"""Runs the Triton twins on the CPU, in Triton's interpreter, under conditions that show what it would not.

`python -m tests.gpu.triton_interpreter [-d DTYPE] KEY...` checks samples of the ops' catalog and names each before it
starts, so that a crash has a name too. Started with TRITON_INTERPRET=1 by `tests/gpu/proof_triton.py`. Around the
interpreter:

- **Guard pages.** A launch sees copies of its tensors, each in pages of its own against a page that may not be
  touched: at the end in one run, at the start in the next. An access outside, masked off by nobody, ends the process.
- **Poison.** What lies in a view's gaps (foreign channels, other samples of a wider buffer) is NaN in the copy and must
  be the same after the launch; memory a kernel has not written holds NaN too.
- **Order.** The programs of a launch run in a shuffled order, another in each run; the results must be the same bits.
- **bfloat16** is rounded to nearest as hardware does, where the interpreter cuts it off; products, which it would
  take of the integers it keeps such numbers in, are taken of fp32.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import mmap
import os
import random
import sys
import traceback
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import triton.language as tl
from torch import Tensor
from triton.runtime import interpreter

from effkern.ops import _backend
from effkern.testing import DIRECT_LIMIT, UNIT, Sample
from tests.gpu import triton_numpy
from tests.gpu.proof_host import REFUSED
from tests.ops.catalog import as_tuple, batched, check_values, every_sample, same_bits, with_rows

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
PAGE = mmap.PAGESIZE


class Guarded:
    """A copy of a tensor between two pages that may not be touched."""

    def __init__(self, tensor: Tensor, at_end: bool) -> None:
        self.tensor = tensor
        size = tensor.element_size()
        extent = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
        extent = 0 if tensor.numel() == 0 else extent * size
        pages = -(-extent // PAGE) * PAGE
        self.memory = mmap.mmap(-1, pages + 2 * PAGE)
        whole = np.frombuffer(self.memory, np.uint8)
        whole[:] = 0xFF  # NaN in every floating type, -1 in integers
        first = PAGE + (pages - extent if at_end else 0)
        self.bytes = whole[first : first + extent]
        flat = torch.frombuffer(self.memory, dtype=torch.uint8, count=extent, offset=first) if extent else None
        self.copy = (torch.empty(0, dtype=torch.uint8) if flat is None else flat).view(tensor.dtype)
        self.copy = self.copy.as_strided(tensor.shape, tensor.stride()) if extent else tensor
        if extent:
            self.copy.copy_(tensor)
        gaps = torch.full((extent // size,), True)
        gaps.as_strided(tensor.shape, tensor.stride()).fill_(False) if extent else None
        self.gaps = np.repeat(gaps.numpy(), size)
        address = whole.ctypes.data
        for guard in (address, address + PAGE + pages):
            assert _libc.mprotect(guard, PAGE, mmap.PROT_NONE if hasattr(mmap, "PROT_NONE") else 0) == 0

    def finish(self) -> None:
        """Bring back what was written; nothing may be written between the elements."""
        assert (self.bytes[self.gaps] == 0xFF).all(), "a kernel wrote between the elements of a tensor"
        if self.tensor.numel() and torch._debug_has_internal_overlap(self.tensor) != 1:
            self.tensor.copy_(self.copy)


class Conditions:
    """How launches run: where the guard is, and in which order the programs run."""

    def __init__(self) -> None:
        self.at_end, self.random, self.launches = True, random.Random(0), 0

    def set(self, seed: int) -> None:
        self.at_end, self.random = seed % 2 == 0, random.Random(seed)


conditions = Conditions()


def _launch(self: Any, *args: Any, **kwargs: Any) -> None:
    """In place of `GridExecutor.__call__`: its tensors guarded, its programs shuffled."""
    kwargs = {k: v for k, v in kwargs.items() if k in self.arg_names}
    kept: list[Guarded] = []

    def guard(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        kept.append(Guarded(value, conditions.at_end))
        return kept[-1].copy

    args, kwargs = tuple(map(guard, args)), {k: guard(v) for k, v in kwargs.items()}
    scope = interpreter._patch_lang(self.fn)
    try:
        bound = interpreter.inspect.getcallargs(self.fn, *args, **kwargs)
        bound = {k: v if k in self.constexprs else interpreter._implicit_cvt(v) for k, v in bound.items()}
        grid = self.grid(bound) if callable(self.grid) else self.grid
        grid = (*grid, 1, 1, 1)[:3]
        interpreter.interpreter_builder.set_grid_dim(*grid)
        programs = [(x, y, z) for x in range(grid[0]) for y in range(grid[1]) for z in range(grid[2])]
        conditions.random.shuffle(programs)
        for program in programs:
            interpreter.interpreter_builder.set_grid_idx(*program)
            self.fn(**bound)
    finally:
        scope.restore()
    for tensor in kept:
        tensor.finish()
    conditions.launches += 1


def _wide(handle: Any) -> Any:
    """A bfloat16 handle, which holds its bits as uint16, as fp32."""
    return interpreter.TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


def _widen(dot: Callable[..., Any]) -> Callable[..., Any]:
    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        if a.dtype.scalar == tl.bfloat16:
            a, b = _wide(a), _wide(b)
        return dot(self, a, b, *rest)

    return create_dot


def _round(cast: Callable[..., Any]) -> Callable[..., Any]:
    def cast_impl(self: Any, src: Any, dst_type: Any) -> Any:
        if src.dtype.scalar == tl.bfloat16 and dst_type.scalar == tl.float32:
            return _wide(src)
        if src.dtype.scalar == tl.float32 and dst_type.scalar == tl.bfloat16:
            rounded = torch.from_numpy(np.array(src.data, np.float32)).bfloat16().view(torch.uint16)
            return interpreter.TensorHandle(rounded.numpy(), tl.bfloat16)
        return cast(self, src, dst_type)

    return cast_impl


def install() -> None:
    """Change the interpreter of this process as described above."""
    triton_numpy.mend()
    interpreter.GridExecutor.__call__ = _launch
    builder = interpreter.InterpreterBuilder
    builder.create_dot, builder.cast_impl = _widen(builder.create_dot), _round(builder.cast_impl)
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)  # new memory holds NaN


def run(twin: Callable[..., Any], args: tuple, seed: int) -> tuple[Tensor, ...]:
    conditions.set(seed)
    return flat(twin(*args))


def one_level(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with the lists of its results taken apart."""
    return lambda *args: flat(function(*args))


def flat(outputs: Any) -> tuple[Tensor, ...]:
    """The tensors of results that may hold lists."""
    return tuple(t for o in as_tuple(outputs) for t in ((o,) if isinstance(o, Tensor) else o))


def check(key: str, sample: Sample) -> None:
    """Values, strides, the same bits in another order, a sample alone."""
    twin = _backend.twin(sample.op)
    assert twin is not None, f"{sample.op.name} has no twin"
    try:
        outputs = run(twin, sample.args, 0)
    except ValueError as error:
        if any(text in str(error) for text in REFUSED.values()):
            return  # as docs/gpu.md says
        raise
    if sample.op.name.startswith("skip_") and outputs[0].dtype != torch.float32:
        # What lies between the convolutions of a block is rounded to 16 bits, twice at most; each error passes through
        # the sums and activations behind it.
        times = 1 + 3 * UNIT[outputs[0].dtype] / (DIRECT_LIMIT * UNIT[torch.float32])
        magnitude = sample.magnitude
        assert magnitude is not None
        sample = dataclasses.replace(sample, magnitude=lambda *args: magnitude(*args) * times)
    check_values(sample, sample.args, outputs if len(outputs) > 1 else outputs[0], key)
    for y, fake in zip(flat(outputs), flat(sample.op.fake(*sample.args)), strict=True):
        assert y.stride() == fake.stride() and y.dtype == fake.dtype, f"{key}: strides or dtype"
    for y, again in zip(flat(outputs), flat(run(twin, sample.args, 1)), strict=True):
        assert same_bits(y, again), f"{key}: the order of the programs changes the values"
    if "x" in batched(sample) and sample.named_args()["x"].size(0) > 1:
        rows = torch.arange(sample.named_args()["x"].size(0)).flip(0)[:1]
        for y, alone in zip(outputs, run(twin, with_rows(sample, rows), 2), strict=True):
            assert same_bits(y.index_select(0, rows), alone), f"{key}: a sample depends on its batch"


def random_cases(name: str) -> int:
    """Check the calls of `tests.gpu.triton_random`."""
    from tests.gpu.triton_random import CASES

    calls = list(CASES[name]())
    for number, call in enumerate(calls):
        print(f"{name} {number}", flush=True)
        if isinstance(call, Sample):
            check(f"{name} {number}", dataclasses.replace(call, reference=one_level(call.reference)))
            continue
        wild, held = (run(_backend.twin(s.op), s.args, number) for s in call)
        assert all(map(same_bits, wild, held)), f"{name} {number}: values out of range are not held to it"
    print(f"{len(calls)} calls, {conditions.launches} launches, 0 failed")
    return 0


def mistakes() -> int:
    """Run each of `tests.gpu.triton_mistakes` in a process of its own and print how it ended."""
    from tests.gpu.triton_mistakes import MISTAKES

    for name, mistake in MISTAKES.items():
        sys.stdout.flush()
        child = os.fork()
        if child == 0:
            status = 0
            try:
                mistake(run)
            except AssertionError as error:
                status = 1
                print(f"{name}: {error}", flush=True)
            os._exit(status)
        print(f"{name}: exit status {os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])}")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("-d", "--dtype", default="float32")
    parser.add_argument("-r", "--random")
    parser.add_argument("-m", "--mistakes", action="store_true")
    parser.add_argument("keys", nargs="*")
    options = parser.parse_args()
    assert os.environ.get("TRITON_INTERPRET") == "1"
    install()
    if options.mistakes:
        return mistakes()
    if options.random:
        return random_cases(options.random)
    samples = every_sample(getattr(torch, options.dtype))
    failed = 0
    for key in options.keys:
        print(f"{key} {options.dtype}", flush=True)
        try:
            check(key, samples[key])
        except Exception:
            failed += 1
            traceback.print_exc(file=sys.stdout)
    print(f"{len(options.keys)} samples, {conditions.launches} launches, {failed} failed")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
