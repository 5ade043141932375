"""`make gpu-bench`: the CUDA ops against what PyTorch offers for the same work, or one line that says there is no GPU.

Written without a GPU at hand; no GPU has run it yet. Times are medians of CUDA events over a captured graph, so that
neither side pays for its launches from Python. Peers: cuDNN through `torch.nn.functional` in channels_last, and the
same under `torch.compile`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from effkern import ops

RESULTS = Path(__file__).with_name("results") / "gpu.json"
Call = Callable[[], Any]
DTYPE = torch.float16


def time_us(call: Call, repeats: int = 50) -> float:
    """Median time of one call in a captured graph, in microseconds."""
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    times = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(1000 * start.elapsed_time(end))
    return statistics.median(times)


def maps(*shape: int) -> Tensor:
    return torch.randn(shape, device="cuda", dtype=DTYPE).contiguous(memory_format=torch.channels_last)


def rep_conv(n: int, c: int, side: int, c_out: int) -> tuple[Call, Call]:
    x, w, b, r = (
        maps(n, c, side, side),
        maps(c_out, c, 3, 3),
        torch.randn(c_out, device="cuda"),
        maps(n, c_out, side, side),
    )
    half = b.to(DTYPE)
    return (
        lambda: ops.rep_conv2d(x, w, b, padding=1, residual=r),
        lambda: F.relu(F.conv2d(x, w, half, padding=1) + r),
    )


def sliced(n: int, c: int, side: int, share: float) -> tuple[Call, Call]:
    active = int(c * share)
    x, w = maps(n, active, side, side), maps(c, c, 1, 1)
    return lambda: ops.sliced_conv2d(x, w, c_out=active), lambda: F.conv2d(x, w[:active, :active].contiguous())


def ragged(n: int, c: int, side: int) -> tuple[Call, Call]:
    x, w = maps(n, c, side, side), maps(c, c, 1, 1)
    widths = torch.tensor([c // 4, c // 2, 3 * c // 4, c], device="cuda").repeat(n // 4)
    mask = (torch.arange(c, device="cuda") < widths[:, None]).to(DTYPE)[:, :, None, None]
    return lambda: ops.sliced_conv2d_ragged(x, w, None, widths, widths, c), lambda: F.conv2d(x * mask, w) * mask


def depthwise(n: int, c: int, side: int) -> tuple[Call, Call]:
    x, w = maps(n, c, side, side), maps(c, 1, 3, 3)
    return (
        lambda: ops.rep_conv2d(x, w, padding=1, groups=c, act="relu6"),
        lambda: F.relu6(F.conv2d(x, w, padding=1, groups=c)),
    )


def skip(n: int, c: int, side: int) -> tuple[Call, Call]:
    x, w, b = maps(n, c, side, side), maps(c, c, 3, 3), torch.zeros(c, device="cuda")
    keep = torch.arange(n, device="cuda") % 2 == 0
    half, blend = b.to(DTYPE), keep[:, None, None, None]

    def dense() -> Tensor:
        z = F.conv2d(F.relu(F.conv2d(x, w, half, padding=1)), w, half, padding=1)
        return torch.where(blend, F.relu(z + x), x)

    return lambda: ops.skip_basic_block(x, keep, w, b, w, b), dense


def pq_linear(rows: int, c_in: int, c_out: int, d: int, entries: int) -> tuple[Call, Call]:
    x, book = (
        torch.randn(rows, c_in, device="cuda", dtype=DTYPE),
        torch.randn(1, entries, d, device="cuda", dtype=DTYPE),
    )
    codes = torch.randint(entries, (c_out, c_in // d), device="cuda")
    codes = codes.to(torch.uint8 if entries <= 256 else torch.int16)
    w = ops.pq_decode(codes, book)
    return lambda: ops.pq_linear(x, codes, book), lambda: F.linear(x, w)


def cases() -> Iterator[tuple[str, tuple[Call, Call]]]:
    for n, c, side in ((1, 64, 56), (32, 64, 56), (1, 256, 14), (32, 256, 14), (32, 512, 7)):
        yield f"rep_conv2d {n}x{c}@{side}", rep_conv(n, c, side, c)
    yield "rep_conv2d 192->1280@7 n32", rep_conv(32, 192, 7, 1280)
    for share in (0.25, 0.5, 1.0):
        yield f"sliced_conv2d 1x1 512@14 n32 at {share:g}", sliced(32, 512, 14, share)
    yield "sliced_conv2d_ragged 1x1 512@14 n32, 4 widths", ragged(32, 512, 14)
    yield "depthwise 3x3 512@14 n32", depthwise(32, 512, 14)
    yield "depthwise 3x3 96@56 n32", depthwise(32, 96, 56)
    yield "skip_basic_block 64@8 n128 keep 0.5", skip(128, 64, 8)
    for rows in (1, 8, 64):
        yield f"pq_linear 4096->4096 d8 K256, {rows} rows", pq_linear(rows, 4096, 4096, 8, 256)
    yield "pq_linear 2048->1000 d4 K1024, 1 row", pq_linear(1, 2048, 1000, 4, 1024)
    yield "skip_basic_block 256@14 n32 keep 0.5", skip(32, 256, 14)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULTS)
    out = parser.parse_args(argv).out
    if not torch.cuda.is_available():
        print("no GPU was found: nothing was measured")
        return 0
    rows = []
    for name, (ours, theirs) in cases():
        compiled = torch.compile(theirs)
        row = {"case": name, "effkern_us": time_us(ours), "cudnn_us": time_us(theirs), "compiled_us": time_us(compiled)}
        rows.append(row)
        best = min(row["cudnn_us"], row["compiled_us"])
        print(f"{name:48} {row['effkern_us']:9.1f} us   best peer {best:9.1f} us   {best / row['effkern_us']:.2f}")
    out.write_text(
        json.dumps({"device": torch.cuda.get_device_name(), "torch": torch.__version__, "rows": rows}, indent=1)
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
