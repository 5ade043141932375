"""`make gpu-bench`: the CUDA ops against what PyTorch offers for the same work, or one line that says there is no GPU.

Written without a GPU at hand; no GPU has run it yet. The whole of it runs on the CPU in the tests, on small shapes.
Times are medians of CUDA events over a captured graph, so that neither side pays for its launches from Python. Before a
case is timed every peer must give the values of the op. Peers:

- cuDNN through `torch.nn.functional`, with channels_last tensors and with contiguous ones, where both exist;
- the first of them under `torch.compile`;
- for linear layers of ragged width `torch._grouped_mm` over the rows in the order of their widths (to sort them costs
  it nothing here), with the weights' idle parts zeroed;
- for codes what AQLM does with them: every call decodes the weight by a lookup and multiplies, also compiled; and the
  dense weight, which codes are there to avoid.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from effkern import ops

RESULTS = Path(__file__).with_name("results") / "gpu.json"
Call = Callable[[], Tensor]
#: What two ways to round the same sums may differ by, as a share of the largest value.
CLOSE = {torch.float16: 1e-2, torch.bfloat16: 8e-2, torch.float32: 1e-4}


class Case(NamedTuple):
    """An op, and calls that give the same values by other means; ``compiled`` names those to compile too."""

    name: str
    ours: Call
    peers: dict[str, Call]
    compiled: tuple[str, ...] = ("channels_last",)


class Bench:
    """The cases on a device. ``small``: shapes that a CPU has done at once."""

    def __init__(self, device: str = "cuda", dtype: torch.dtype = torch.float16, small: bool = False) -> None:
        self.device, self.dtype, self.small = device, dtype, small
        self.generator = torch.Generator(device).manual_seed(0)

    def size(self, n: int, most: int) -> int:
        return min(n, most) if self.small else n

    def normal(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(shape, generator=self.generator, device=self.device).to(dtype or self.dtype)

    def maps(self, n: int, c: int, side: int) -> Tensor:
        return self.normal(n, c, side, side).contiguous(memory_format=torch.channels_last)

    def filters(self, c_out: int, c: int, side: int) -> Tensor:
        w = self.normal(c_out, c, side, side) / (c * side * side) ** 0.5
        return w.contiguous(memory_format=torch.channels_last)

    def widths(self, n: int, c: int) -> Tensor:
        """Quarters of c in turn."""
        return torch.tensor([c // 4, c // 2, 3 * c // 4, c], device=self.device).repeat(n // 4)

    def both(self, conv: Callable[..., Tensor], *tensors: Tensor) -> dict[str, Call]:
        """A call of a convolution in both layouts."""
        plain = [t.contiguous() for t in tensors]
        return {"channels_last": lambda: conv(*tensors), "contiguous": lambda: conv(*plain)}

    def rep_conv(self, n: int, c: int, side: int, c_out: int) -> Case:
        name = f"rep_conv2d {c}->{c_out}@{side} n{n}"
        n, c, side, c_out = self.size(n, 2), self.size(c, 16), self.size(side, 6), self.size(c_out, 24)
        x, w, r, b = self.maps(n, c, side), self.filters(c_out, c, 3), self.maps(n, c_out, side), self.normal(c_out)
        peers = self.both(lambda x, w, r: F.relu(F.conv2d(x, w, b, padding=1) + r), x, w, r)
        return Case(name, lambda: ops.rep_conv2d(x, w, b, padding=1, residual=r), peers)

    def depthwise(self, n: int, c: int, side: int) -> Case:
        name = f"depthwise 3x3 {c}@{side} n{n}"
        n, c, side = self.size(n, 2), self.size(c, 24), self.size(side, 6)
        x, w = self.maps(n, c, side), self.filters(c, 1, 3)
        peers = self.both(lambda x, w: F.relu6(F.conv2d(x, w, padding=1, groups=c)), x, w)
        return Case(name, lambda: ops.rep_conv2d(x, w, padding=1, groups=c, act="relu6"), peers)

    def dw_pw(self, n: int, c: int, side: int) -> Case:
        name = f"depthwise and pointwise {c}@{side} n{n}"
        n, c, side = self.size(n, 2), self.size(c, 24), self.size(side, 6)
        x, dw, pw = self.maps(n, c, side), self.filters(c, 1, 3), self.filters(c, c, 1)
        peers = self.both(
            lambda x, dw, pw: F.relu(F.conv2d(F.relu(F.conv2d(x, dw, padding=1, groups=c)), pw)), x, dw, pw
        )
        return Case(name, lambda: ops.sliced_dw_pw(x, dw, None, pw, padding=1, dw_act="relu", act="relu"), peers)

    def sliced(self, n: int, c: int, side: int, share: float) -> Case:
        name = f"sliced_conv2d 1x1 {c}@{side} n{n} at {share:g}"
        n, c, side = self.size(n, 2), self.size(c, 32), self.size(side, 6)
        active = int(c * share)
        x, w = self.maps(n, active, side), self.filters(c, c, 1)
        part = w[:active, :active].contiguous(memory_format=torch.channels_last)
        peers = self.both(F.conv2d, x, part)
        return Case(name, lambda: ops.sliced_conv2d(x, w, c_out=active), peers)

    def ragged(self, n: int, c: int, side: int) -> Case:
        name = f"sliced_conv2d_ragged 1x1 {c}@{side} n{n}, 4 widths"
        n, c, side = self.size(n, 4), self.size(c, 32), self.size(side, 6)
        x, w, widths = self.maps(n, c, side), self.filters(c, c, 1), self.widths(n, c)
        mask = (torch.arange(c, device=self.device) < widths[:, None]).to(self.dtype)[:, :, None, None]
        peers = self.both(lambda x, w: F.conv2d(x * mask, w) * mask, x, w)
        return Case(name, lambda: ops.sliced_conv2d_ragged(x, w, None, widths, widths, c), peers)

    def ragged_linear(self, n: int, c: int) -> Case:
        name = f"sliced_linear_ragged {c} n{n}, 4 widths"
        n, c = self.size(n, 16), self.size(c, 32)
        x, w, widths = self.normal(n, c), self.normal(c, c) / c**0.5, self.widths(n, c)
        running = torch.arange(c, device=self.device) < widths[:, None]
        mask = running.to(self.dtype)
        # [4, in, out], a weight a width; rows in the order of their widths.
        each = torch.stack([w.t() * m[:, None] * m for m in mask[:4]])
        order = torch.arange(n, device=self.device).view(-1, 4).t().reshape(-1)
        back, ends = order.argsort(), torch.arange(1, 5, device=self.device, dtype=torch.int32) * (n // 4)
        # Only bfloat16 is multiplied in groups by CUDA.
        rows, each = x[order].bfloat16(), each.bfloat16()
        peers: dict[str, Call] = {
            "masked": lambda: F.linear(x * mask, w) * mask,
            "grouped_mm": Sorted(lambda: torch._grouped_mm(rows, each, offs=ends), back),
        }
        return Case(name, lambda: ops.sliced_linear_ragged(x, w, None, widths, widths, c), peers, ("masked",))

    def skip(self, n: int, c: int, side: int) -> Case:
        name = f"skip_basic_block {c}@{side} n{n} keep 0.5"
        n, c, side = self.size(n, 4), self.size(c, 16), self.size(side, 6)
        x, w, b = self.maps(n, c, side), self.filters(c, c, 3), self.normal(c)
        keep = torch.arange(n, device=self.device) % 2 == 0
        blend = keep[:, None, None, None]

        def dense(x: Tensor, w: Tensor) -> Tensor:
            z = F.conv2d(F.relu(F.conv2d(x, w, b, padding=1)), w, b, padding=1)
            return torch.where(blend, F.relu(z + x), x)

        return Case(name, lambda: ops.skip_basic_block(x, keep, w, b, w, b), self.both(dense, x, w))

    def codes(self, c_in: int, c_out: int, d: int, entries: int) -> tuple[Tensor, Tensor, Tensor]:
        """Codes, codebook and the dense weight."""
        book = self.normal(1, entries, d) / c_in**0.5
        codes = torch.randint(entries, (c_out, c_in // d), generator=self.generator, device=self.device)
        return codes.to(torch.uint8 if entries <= 256 else torch.int16), book, book[0][codes].flatten(1)

    def pq_linear(self, rows: int, c_in: int, c_out: int, d: int, entries: int) -> Case:
        name = f"pq_linear {c_in}->{c_out} d{d} K{entries}, {rows} rows"
        c_in, c_out, entries = self.size(c_in, 64), self.size(c_out, 24), self.size(entries, 300)
        codes, book, w = self.codes(c_in, c_out, d, entries)
        x = self.normal(rows, c_in)
        peers: dict[str, Call] = {
            "dense": lambda: F.linear(x, w),
            "decoded": lambda: F.linear(x, F.embedding(codes.int(), book[0]).flatten(1)),
        }
        return Case(name, lambda: ops.pq_linear(x, codes, book), peers, ("decoded",))

    def pq_conv(self, n: int, c: int, side: int) -> Case:
        name = f"pq_conv2d 3x3 {c}@{side} n{n} d9 K256"
        n, c, side = self.size(n, 2), self.size(c, 16), self.size(side, 6)
        codes, book, w = self.codes(9 * c, c, 9, 256)
        x = self.maps(n, c, side)
        kernel = w.view(c, c, 3, 3).contiguous(memory_format=torch.channels_last)

        def decoded() -> Tensor:
            return F.conv2d(x, F.embedding(codes.int(), book[0]).view(c, c, 3, 3), padding=1)

        peers = self.both(lambda x, w: F.conv2d(x, w, padding=1), x, kernel) | {"decoded": decoded}
        return Case(name, lambda: ops.pq_conv2d(x, codes, book, kernel_size=3, padding=1), peers, ("decoded",))

    def pq_embedding(self, tokens: int, rows: int, width: int) -> Case:
        name = f"pq_embedding {rows}x{width} d8 K256, {tokens} tokens"
        tokens, rows, width = self.size(tokens, 16), self.size(rows, 100), self.size(width, 32)
        codes, book, table = self.codes(width, rows, 8, 256)
        idx = torch.randint(rows, (tokens,), generator=self.generator, device=self.device)
        peers: dict[str, Call] = {
            "dense": lambda: F.embedding(idx, table),
            "decoded": lambda: F.embedding(codes[idx].int(), book[0]).flatten(1),
        }
        return Case(name, lambda: ops.pq_embedding(idx, codes, book), peers, ("decoded",))

    def batch_norms(self, n: int, c: int, side: int) -> Case:
        name = f"multi_branch_bn_add_relu 3x{c}@{side} n{n}, training"
        n, c, side = self.size(n, 4), self.size(c, 16), self.size(side, 6)
        xs = [self.maps(n, c, side) for _ in range(3)]
        weights, biases = ([self.normal(c, dtype=torch.float32) for _ in xs] for _ in range(2))

        def eager(*xs: Tensor) -> Tensor:
            ys = [F.batch_norm(x, None, None, w, b, True) for x, w, b in zip(xs, weights, biases, strict=True)]
            return F.relu(ys[0] + ys[1] + ys[2])

        return Case(name, lambda: ops.multi_branch_bn_add_relu(xs, weights, biases)[0], self.both(eager, *xs))

    def cases(self) -> Iterator[Case]:
        for n, c, side in ((1, 64, 56), (32, 64, 56), (1, 256, 14), (32, 256, 14), (32, 512, 7)):
            yield self.rep_conv(n, c, side, c)
        yield self.rep_conv(32, 192, 7, 1280)
        for c, side in ((512, 14), (96, 56)):
            yield self.depthwise(32, c, side)
        yield self.dw_pw(32, 512, 14)
        for share in (0.25, 0.5, 1.0):
            yield self.sliced(32, 512, 14, share)
        yield self.ragged(32, 512, 14)
        yield self.ragged_linear(1024, 1024)
        for c, side, n in ((64, 8, 128), (256, 14, 32)):
            yield self.skip(n, c, side)
        for rows in (1, 8, 64):
            yield self.pq_linear(rows, 4096, 4096, 8, 256)
        yield self.pq_linear(1, 2048, 1000, 4, 1024)
        yield self.pq_conv(32, 512, 7)
        yield self.pq_embedding(4096, 1_000_000, 512)
        yield self.batch_norms(32, 96, 28)


class Sorted:
    """A call whose rows are in another order: it is timed as it is, its values are compared in the op's order."""

    def __init__(self, call: Call, back: Tensor) -> None:
        self.call, self.back = call, back

    def __call__(self) -> Tensor:
        return self.call()

    def values(self) -> Tensor:
        return self.call()[self.back]


def compare(case: Case, dtype: torch.dtype) -> None:
    """Every peer gives the op's values.

    Raises:
        ValueError: one does not, and would be timed at other work.
    """
    want = case.ours().double()
    for name, peer in case.peers.items():
        got = peer.values() if isinstance(peer, Sorted) else peer()
        most = CLOSE[torch.bfloat16 if got.dtype == torch.bfloat16 else dtype] * float(want.abs().max())
        error = float((got.double() - want).abs().max())
        if got.shape != want.shape or not error <= most:
            raise ValueError(f"{case.name}: {name} gives {list(got.shape)} with an error of {error:.2g}")


def graph_us(call: Call, repeats: int = 50) -> float:
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


def host_us(call: Call, repeats: int = 3) -> float:
    """The same by the host's clock, for a device that is the host."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(1e6 * (time.perf_counter() - start))
    return statistics.median(times)


def measure(bench: Bench, time_us: Callable[[Call], float], compiler: Callable[[Call], Call]) -> Iterator[dict]:
    """A row a case: microseconds of the op and of every peer."""
    for case in bench.cases():
        compiled = {f"compiled {name}": compiler(case.peers[name]) for name in case.compiled}
        whole = case._replace(peers=case.peers | compiled)
        compare(whole, bench.dtype)
        peers = {name: time_us(peer) for name, peer in whole.peers.items()}
        yield {"case": case.name, "effkern_us": time_us(case.ours), "peers_us": peers}


def line(row: dict) -> str:
    best = min(row["peers_us"], key=row["peers_us"].get)
    ours, theirs = row["effkern_us"], row["peers_us"][best]
    return f"{row['case']:52} {ours:9.1f} us   best peer {theirs:9.1f} us ({best})   {theirs / ours:.2f}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULTS)
    out = parser.parse_args(argv).out
    if not torch.cuda.is_available():
        print("no GPU was found: nothing was measured")
        return 0
    rows = []
    with torch.no_grad():
        for row in measure(Bench(), graph_us, torch.compile):
            rows.append(row)
            print(line(row), flush=True)
    head = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
    out.write_text(json.dumps({**head, "rows": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
