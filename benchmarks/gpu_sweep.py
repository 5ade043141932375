"""Which tile is fastest for a convolution of a class of shapes: the library's tiles, the Triton kernel's, and cuDNN.

    python -m benchmarks.gpu_sweep [--only 256@14] [--dtype bfloat16] [--limit 180]

The library obeys ``EFFKERN_CONV_TILE`` only where it was compiled for that (``NVCC_APPEND_FLAGS=-DEFFKERN_TUNING``),
else all its times are of the tile that is chosen anyway, ``auto``. Triton's kernels are compiled beforehand, a process
a class; then one process times all of a class in turn. Tiles of the library give the same bits, Triton's do not.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu_cases import Bench
from benchmarks.gpu_timing import Call, Clock, GraphClock, Timing
from effkern import ops

SWITCH = "EFFKERN_CONV_TILE"
TILES = ("auto", "large", "narrow", "small", "tiny")
#: Rows, columns, warps, stages of the Triton kernel's tiles; channels of a step are those it takes anyway.
TRITON = (
    (128, 128, 8, 3), (128, 128, 4, 3), (128, 128, 8, 4), (128, 256, 8, 3), (256, 128, 8, 3), (128, 64, 4, 3),
    (128, 64, 4, 4), (64, 128, 4, 3), (64, 64, 4, 4), (64, 32, 4, 4), (128, 32, 4, 4), (32, 64, 4, 4),
)  # fmt: skip


class Shape(NamedTuple):
    """A class of convolutions by one of them."""

    n: int
    c: int
    side: int
    c_out: int
    kernel: int = 3

    @property
    def name(self) -> str:
        return f"{self.kernel}x{self.kernel} {self.c}->{self.c_out}@{self.side} n{self.n}"


SHAPES = (
    Shape(1, 64, 56, 64), Shape(1, 256, 14, 256), Shape(1, 512, 7, 512), Shape(32, 64, 56, 64), Shape(32, 128, 28, 128),
    Shape(32, 256, 14, 256), Shape(32, 512, 7, 512), Shape(256, 64, 8, 64), Shape(256, 32, 16, 32),
    Shape(256, 16, 32, 16), Shape(32, 512, 14, 512, 1), Shape(64, 96, 56, 24, 1), Shape(64, 256, 56, 64, 1),
    Shape(1, 512, 14, 512, 1),
)  # fmt: skip


def by_library(tile: str) -> Callable[..., Tensor]:
    """The convolution in one tile of the library."""

    def run(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        os.environ[SWITCH] = tile
        try:
            return ops.rep_conv2d(x, w, b, padding=w.size(2) // 2)
        finally:
            del os.environ[SWITCH]

    return run


def by_triton(rows: int, columns: int, warps: int, stages: int) -> Callable[..., Tensor]:
    """The convolution in one tile of the Triton kernel."""
    from effkern.ops._triton import conv

    usual = conv.tile_of

    def tile_of(*args: Any) -> Any:
        return dataclasses.replace(usual(*args), rows=rows, columns=columns, warps=warps, stages=stages)

    def run(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        conv.tile_of = tile_of  # type: ignore[assignment]
        try:
            with ops.backend("triton"):
                return ops.rep_conv2d(x, w, b, padding=w.size(2) // 2)
        finally:
            conv.tile_of = usual

    return run


def contenders(bench: Bench, shape: Shape, triton: bool) -> dict[str, Call]:
    """All ways to run one shape."""
    n, c, side, c_out = (bench.size(v, most) for v, most in zip(shape, (2, 16, 6, 24), strict=False))
    args = bench.maps(n, c, side), bench.filters(c_out, c, shape.kernel), bench.normal(c_out)
    calls = {tile: by_library(tile) for tile in TILES}
    if triton:
        # A tile may be twice as wide as the outputs, not wider.
        fit = [tile for tile in TRITON if tile[1] < 2 * max(32, shape.c_out)]
        calls |= {"triton " + " ".join(map(str, tile)): by_triton(*tile) for tile in fit}
    calls["cudnn"] = lambda x, w, b: F.relu(F.conv2d(x, w, b, padding=shape.kernel // 2))
    return {name: Call(function, *args) for name, function in calls.items()}


def swept(bench: Bench, shape: Shape, clock: Clock, triton: bool) -> list[tuple[str, float | str]]:
    """Microseconds of every way, the fastest first, then what failed."""
    found = clock.contest(contenders(bench, shape, triton), cold=False)
    times = [(name, t.median) for name, t in found.items() if isinstance(t, Timing)]
    return [*sorted(times, key=lambda pair: pair[1]), *((n, t) for n, t in found.items() if isinstance(t, str))]


def report(shape: Shape, found: Sequence[tuple[str, float | str]]) -> str:
    cells = [f"{name}: {us:.2f}" for name, us in found if isinstance(us, float)]
    failed = [f"  {name}: {why}" for name, why in found if isinstance(why, str)]
    return "\n".join([f"{shape.name:28} " + ", ".join(cells), *failed])


def prepare(shapes: Sequence[Shape], dtype: str, limit: float) -> None:
    """Compile what is not compiled yet, a process a shape."""
    command = [sys.executable, "-m", "benchmarks.gpu_sweep", "--compile-only", "--dtype", dtype, "--only"]
    begun = [subprocess.Popen([*command, shape.name]) for shape in shapes]
    end = time.monotonic() + limit
    for process in begun:
        try:
            process.wait(max(1.0, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def run_each(bench: Bench, shape: Shape) -> Iterator[str]:
    """Run every way once, which compiles it; says what failed."""
    for name, call in contenders(bench, shape, True).items():
        try:
            call()
            torch.cuda.synchronize()
        except Exception as error:
            yield f"{shape.name}, {name}: {type(error).__name__}"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m benchmarks.gpu_sweep", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", action="append", default=[], help="a part of a shape's name")
    parser.add_argument("--dtype", choices=("float16", "bfloat16", "float32"), default="float16")
    parser.add_argument("--limit", type=float, default=180, help="seconds, half of them to compile")
    parser.add_argument("--no-triton", action="store_true")
    parser.add_argument("--compile-only", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("no GPU was found: nothing was measured")
        return 0
    shapes = [s for s in SHAPES if not options.only or any(part in s.name for part in options.only)]
    torch.backends.cudnn.benchmark = True
    begin, bench = time.monotonic(), Bench("cuda", getattr(torch, options.dtype))
    with torch.no_grad():
        if options.compile_only:
            for shape in shapes:
                print("\n".join(run_each(bench, shape)), flush=True)
            return 0
        if not options.no_triton:
            prepare(shapes, options.dtype, options.limit / 2)
        for shape in shapes:
            if time.monotonic() - begin > options.limit:
                print(f"{shape.name}: no time left")
                continue
            print(report(shape, swept(bench, shape, GraphClock(), not options.no_triton)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
