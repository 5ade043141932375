"""Single operators on a GPU, each with what PyTorch offers for the same work.

- cuDNN through `torch.nn.functional`, with channels_last tensors and with contiguous ones, where both exist;
- where there is a residual and a relu, cuDNN's call that does all three in one (`torch.cudnn_convolution_add_relu`);
- the first of them under `torch.compile`;
- for linear layers of ragged width `torch._grouped_mm` over the rows in the order of their widths (to sort them costs
  it nothing here), with the weights' idle parts zeroed;
- for codes what AQLM does with them: every call decodes the weight by a lookup and multiplies, also compiled; and the
  dense weight, which codes are there to avoid.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree as pytree

from benchmarks.gpu_timing import Call, reason
from effkern import ops

#: What two ways to round the same sums may differ by: norm of the difference over the norm.
CLOSE = {torch.float16: 1e-2, torch.bfloat16: 4e-2, torch.float32: 1e-4}
TF32_CLOSE = 1e-2
#: A sum within rounding of 0 falls on either side of a relu, and its gradient is then wholly another: times so much.
SLOPES = 6.0


@dataclass
class Case:
    """An op, and calls that give the same values by other means.

    Attributes:
        compiled: peers to compile too.
        macs: multiply-adds that have to be done.
        bytes: that have to move, each once; default: all tensors of the call and its result.
        whole: calls of all the work, of which ``ours`` leaves a part out: they give other values, alike among them.
        share: multiply-adds left, of those of ``whole``.
        cold: whether to time it with its tensors out of L2 as well. What does not fit L2 anyway need not be.
        close: times the usual difference, for what is deeper than one op.
    """

    ours: Call
    peers: dict[str, Call]
    macs: float
    bytes: float | None = None
    compiled: tuple[str, ...] = ("channels_last",)
    whole: dict[str, Call] = field(default_factory=dict)
    share: float | None = None
    cold: bool = True
    close: float = 1.0


class Spec(NamedTuple):
    """A case that is not built yet. ``core``: it is timed in every dtype."""

    family: str
    name: str
    make: Callable[[], Case]
    core: bool = False


class Sorted(Call):
    """A call whose rows are in another order: it is timed as it is, its values are compared in the op's order.

    The last argument is that order.
    """

    def __call__(self) -> Any:
        return self.function(*self.args[:-1])

    def value(self) -> Tensor:
        return self()[self.args[-1]]


class Waits(Call):
    """A call that waits for the device, so that no graph can hold it."""


class Bench:
    """Makes the tensors. ``small``: shapes that a CPU has done at once."""

    def __init__(
        self, device: str = "cuda", dtype: torch.dtype = torch.float16, small: bool = False, tf32: bool = False
    ) -> None:
        self.device, self.dtype, self.small, self.tf32 = device, dtype, small, tf32
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

    def close(self, dtype: torch.dtype) -> float:
        return TF32_CLOSE if self.tf32 and dtype == torch.float32 else CLOSE[dtype]


def both(function: Callable[..., Any], *tensors: Any) -> dict[str, Call]:
    """A call in both layouts."""
    plain = pytree.tree_map_only(Tensor, lambda t: t.detach().contiguous().requires_grad_(t.requires_grad), tensors)
    return {"channels_last": Call(function, *tensors), "contiguous": Call(function, *plain)}


def compare(bench: Bench, case: Case) -> dict[str, str]:
    """Peers that do not give the op's values, by name: they are not timed."""
    refused = {}
    sides = [(case.ours, case.peers)]
    if case.whole:
        first = next(iter(case.whole.values()))
        sides.append((first, case.whole))
    for ours, peers in sides:
        want = ours.value()
        for name, peer in peers.items():
            try:
                got = want if peer is ours else peer.value()
            except Exception as error:
                if bench.device == "cuda":
                    torch.cuda.synchronize()  # raises if the device is lost
                refused[name] = f"failed: {reason(error)}"
                continue
            most = case.close * max(bench.close(got.dtype), bench.close(want.dtype))
            by = difference(got, want)
            if not by <= most:
                refused[name] = f"values differ: {list(got.shape)}, by {by:.2g}"
    return refused


def difference(got: Tensor, want: Tensor) -> float:
    """Norm of the difference over the norm; NaN if there is one."""
    if got.shape != want.shape:
        return float("nan")
    exact = want.double()
    return float((got.double() - exact).norm() / exact.norm())


class Ops(Bench):
    """The cases of single operators."""

    def rep_conv(self, n: int, c: int, side: int, c_out: int, kernel: int = 3) -> Case:
        n, c, side, c_out = self.size(n, 2), self.size(c, 16), self.size(side, 6), self.size(c_out, 24)
        pad = kernel // 2
        args = self.maps(n, c, side), self.filters(c_out, c, kernel), self.normal(c_out), self.maps(n, c_out, side)
        peers = both(lambda x, w, b, r: F.relu(F.conv2d(x, w, b, padding=pad) + r), *args)
        if self.device == "cuda":
            peers["cudnn fused"] = Call(lambda x, w, b, r: cudnn_add_relu(x, w, b, r, pad), *args)
        ours = Call(lambda x, w, b, r: ops.rep_conv2d(x, w, b, padding=pad, residual=r), *args)
        return Case(ours, peers, n * side**2 * c_out * c * kernel**2)

    def conv_gradients(self, n: int, c: int, side: int) -> Case:
        n, c, side = self.size(n, 2), self.size(c, 16), self.size(side, 6)
        x, w, b = (t.requires_grad_() for t in (self.maps(n, c, side), self.filters(c, c, 3), self.normal(c)))
        args = x, w, b, self.maps(n, c, side)
        peers = both(Gradients(lambda x, w, b: F.relu(F.conv2d(x, w, b, padding=1))), *args)
        ours = Call(Gradients(lambda x, w, b: ops.rep_conv2d(x, w, b, padding=1)), *args)
        moved = sum(t.nbytes for t in (x, w, b)) * 2 + 2 * args[3].nbytes  # y, written forward, is read back
        return Case(ours, peers, 3 * n * side**2 * c * c * 9, moved + args[3].nbytes, close=SLOPES)

    def depthwise(self, n: int, c: int, side: int) -> Case:
        n, c, side = self.size(n, 2), self.size(c, 24), self.size(side, 6)
        args = self.maps(n, c, side), self.filters(c, 1, 3)
        peers = both(lambda x, w: F.relu6(F.conv2d(x, w, padding=1, groups=c)), *args)
        ours = Call(lambda x, w: ops.rep_conv2d(x, w, padding=1, groups=c, act="relu6"), *args)
        return Case(ours, peers, n * side**2 * c * 9)

    def dw_pw(self, n: int, c: int, side: int) -> Case:
        n, c, side = self.size(n, 2), self.size(c, 24), self.size(side, 6)
        args = self.maps(n, c, side), self.filters(c, 1, 3), self.filters(c, c, 1)

        def plain(x: Tensor, dw: Tensor, pw: Tensor) -> Tensor:
            return F.relu(F.conv2d(F.relu(F.conv2d(x, dw, padding=1, groups=c)), pw))

        ours = Call(lambda x, dw, pw: ops.sliced_dw_pw(x, dw, None, pw, padding=1, dw_act="relu", act="relu"), *args)
        return Case(ours, both(plain, *args), n * side**2 * c * (9 + c))

    def sliced(self, n: int, c: int, side: int, share: float) -> Case:
        n, c, side = self.size(n, 2), self.size(c, 32), self.size(side, 6)
        active = int(c * share)
        x, w = self.maps(n, active, side), self.filters(c, c, 1)
        part = w[:active, :active].contiguous(memory_format=torch.channels_last)
        ours = Call(lambda x, w: ops.sliced_conv2d(x, w, c_out=active), x, w)
        return Case(ours, both(F.conv2d, x, part), n * side**2 * active**2, 2 * x.nbytes + part.nbytes)

    def ragged(self, n: int, c: int, side: int) -> Case:
        n, c, side = self.size(n, 4), self.size(c, 32), self.size(side, 6)
        x, w, widths = self.maps(n, c, side), self.filters(c, c, 1), self.widths(n, c)
        mask = (torch.arange(c, device=self.device) < widths[:, None]).to(self.dtype)[:, :, None, None]
        peers = both(lambda x, w, mask: F.conv2d(x * mask, w) * mask, x, w, mask)
        ours = Call(lambda x, w, widths: ops.sliced_conv2d_ragged(x, w, None, widths, widths, c), x, w, widths)
        left = float((widths / c).mean())
        whole = {
            "all: effkern": Call(lambda x, w: ops.sliced_conv2d(x, w, c_out=c), x, w),
            **{f"all: {name}": call for name, call in both(F.conv2d, x, w).items()},
        }
        squares = float((widths.double() ** 2).sum())
        moved = left * x.nbytes + x.nbytes + w.nbytes  # inputs past a width are not read, outputs are zeroed
        share = squares / (n * c**2)
        return Case(ours, peers, squares * side**2, moved, whole=whole, share=share)

    def ragged_linear(self, n: int, c: int) -> Case:
        n, c = self.size(n, 16), self.size(c, 32)
        x, w, widths = self.normal(n, c), self.normal(c, c) / c**0.5, self.widths(n, c)
        mask = (torch.arange(c, device=self.device) < widths[:, None]).to(self.dtype)
        # [4, in, out], a weight a width; rows in the order of their widths.
        each = torch.stack([w.t() * m[:, None] * m for m in mask[:4]])
        order = torch.arange(n, device=self.device).view(-1, 4).t().reshape(-1)
        back, ends = order.argsort(), torch.arange(1, 5, device=self.device, dtype=torch.int32) * (n // 4)
        # Only bfloat16 is multiplied in groups by CUDA.
        rows, each = x[order].bfloat16(), each.bfloat16()
        peers: dict[str, Call] = {
            "masked": Call(lambda x, w, mask: F.linear(x * mask, w) * mask, x, w, mask),
            "grouped_mm": Sorted(lambda x, w, ends: torch._grouped_mm(x, w, offs=ends), rows, each, ends, back),
        }
        ours = Call(lambda x, w, widths: ops.sliced_linear_ragged(x, w, None, widths, widths, c), x, w, widths)
        whole = {
            "all: effkern": Call(lambda x, w: ops.sliced_linear(x, w, None, c), x, w),
            "all: linear": Call(F.linear, x, w),
        }
        squares = float((widths.double() ** 2).sum())
        moved = float((widths / c).mean()) * x.nbytes + x.nbytes + w.nbytes
        return Case(ours, peers, squares, moved, ("masked",), whole, squares / (n * c**2))

    def skip(self, n: int, c: int, side: int) -> Case:
        n, c, side = self.size(n, 4), self.size(c, 16), self.size(side, 6)
        keep = torch.arange(n, device=self.device) % 2 == 0
        block = self.filters(c, c, 3), self.normal(c), self.filters(c, c, 3), self.normal(c)
        args = self.maps(n, c, side), keep, *block
        peers = both(masked_block, *args)
        ours = Call(ops.skip_basic_block, *args)
        one = torch.ones_like(keep)
        whole = {
            "all: effkern": Call(ops.skip_basic_block, args[0], one, *block),
            **{f"all: {name}": call for name, call in both(dense_block, args[0], *block).items()},
        }
        if self.device == "cuda":
            whole["all: cudnn fused"] = Call(cudnn_block, args[0], *block)
        return Case(ours, peers, n // 2 * side**2 * 2 * 9 * c * c, whole=whole, share=0.5)

    def stage(self, n: int, c: int, side: int, blocks: int) -> Case:
        n, c, side, blocks = self.size(n, 4), self.size(c, 16), self.size(side, 6), self.size(blocks, 2)
        keep = torch.arange(n * blocks, device=self.device).view(n, blocks) * 7 // 3 % 2 == 0
        weights = [self.filters(c, c, 3) for _ in range(2 * blocks)]
        biases = [self.normal(c, dtype=torch.float32) / 8 for _ in range(2 * blocks)]
        plain = [b.to(self.dtype) for b in biases]
        x = self.maps(n, c, side)

        def masked(x: Tensor, keep: Tensor, weights: list[Tensor], biases: list[Tensor]) -> Tensor:
            for k in range(blocks):
                two = slice(2 * k, 2 * k + 2)
                w, b = weights[two], biases[two]
                x = masked_block(x, keep[:, k], w[0], b[0], w[1], b[1])
            return x

        def dense(x: Tensor, weights: list[Tensor], biases: list[Tensor]) -> Tensor:
            for k in range(0, 2 * blocks, 2):
                x = dense_block(x, weights[k], biases[k], weights[k + 1], biases[k + 1])
            return x

        ours = Call(ops.skip_stage, x, keep, weights, biases)
        whole = {
            "all: effkern": Call(ops.skip_stage, x, torch.ones_like(keep), weights, biases),
            **{f"all: {name}": call for name, call in both(dense, x, weights, plain).items()},
        }
        share = float(keep.double().mean())
        macs = float(keep.sum()) * side**2 * 2 * 9 * c * c
        peers = both(masked, x, keep, weights, plain)
        return Case(ours, peers, macs, compiled=(), whole=whole, share=share, close=4)

    def codes(self, c_in: int, c_out: int, d: int, entries: int) -> tuple[Tensor, Tensor, Tensor]:
        """Codes, codebook and the dense weight."""
        book = self.normal(1, entries, d) / c_in**0.5
        codes = torch.randint(entries, (c_out, c_in // d), generator=self.generator, device=self.device)
        return codes.to(torch.uint8 if entries <= 256 else torch.int16), book, book[0][codes].flatten(1)

    def pq_linear(self, rows: int, c_in: int, c_out: int, d: int, entries: int) -> Case:
        c_in, c_out, entries = self.size(c_in, 64), self.size(c_out, 24), self.size(entries, 300)
        codes, book, w = self.codes(c_in, c_out, d, entries)
        x = self.normal(rows, c_in)

        def decoded(x: Tensor, codes: Tensor, book: Tensor) -> Tensor:
            return F.linear(x, F.embedding(codes.int(), book[0]).flatten(1))

        peers = {"dense": Call(F.linear, x, w), "decoded": Call(decoded, x, codes, book)}
        return Case(Call(ops.pq_linear, x, codes, book), peers, rows * c_in * c_out, compiled=("decoded",))

    def pq_conv(self, n: int, c: int, side: int) -> Case:
        n, c, side = self.size(n, 2), self.size(c, 16), self.size(side, 6)
        codes, book, w = self.codes(9 * c, c, 9, 256)
        x = self.maps(n, c, side)
        kernel = w.view(c, c, 3, 3).contiguous(memory_format=torch.channels_last)

        def decoded(x: Tensor, codes: Tensor, book: Tensor) -> Tensor:
            return F.conv2d(x, F.embedding(codes.int(), book[0]).view(c, c, 3, 3), padding=1)

        dense = both(lambda x, w: F.conv2d(x, w, padding=1), x, kernel)
        peers = dense | {"decoded": Call(decoded, x, codes, book)}
        ours = Call(lambda x, codes, book: ops.pq_conv2d(x, codes, book, kernel_size=3, padding=1), x, codes, book)
        return Case(ours, peers, n * side**2 * c * c * 9, compiled=("decoded",))

    def pq_embedding(self, tokens: int, rows: int, width: int) -> Case:
        tokens, rows, width = self.size(tokens, 16), self.size(rows, 100), self.size(width, 32)
        codes, book, table = self.codes(width, rows, 8, 256)
        idx = torch.randint(rows, (tokens,), generator=self.generator, device=self.device)

        def decoded(idx: Tensor, codes: Tensor, book: Tensor) -> Tensor:
            return F.embedding(codes[idx].int(), book[0]).flatten(1)

        peers = {"dense": Call(F.embedding, idx, table), "decoded": Call(decoded, idx, codes, book)}
        moved = tokens * (8 + width // 8 + width * self.dtype.itemsize) + book.nbytes
        # A table of which each call reads a small random part is in L2 for a benchmark's second call alone.
        return Case(Call(ops.pq_embedding, idx, codes, book), peers, 0, moved, ("decoded",))

    def batch_norms(self, n: int, c: int, side: int, backward: bool = False) -> Case:
        n, c, side = self.size(n, 4), self.size(c, 16), self.size(side, 6)
        xs = [self.maps(n, c, side) for _ in range(3)]
        weights, biases = ([self.normal(c, dtype=torch.float32) for _ in xs] for _ in range(2))

        def eager(*tensors: Tensor) -> Tensor:
            ys = [F.batch_norm(x, None, None, w, b, True) for x, w, b in zip(*thirds(tensors), strict=True)]
            return F.relu(ys[0] + ys[1] + ys[2])

        def fused(*tensors: Tensor) -> Tensor:
            return ops.multi_branch_bn_add_relu(*thirds(tensors))[0]

        args, maps = [*xs, *weights, *biases], xs[0].nbytes
        if not backward:
            return Case(Call(fused, *args), both(eager, *args), 0, 4 * maps)
        args = [*(t.requires_grad_() for t in args), self.maps(n, c, side)]
        # Forward as above; backward reads the branches and gy and writes three gradients.
        return Case(Call(Gradients(fused), *args), both(Gradients(eager), *args), 0, (4 + 4 + 3) * maps, close=SLOPES)

    def specs(self) -> Iterator[Spec]:
        for n, c, side in ((1, 64, 56), (32, 64, 56), (1, 256, 14), (32, 256, 14), (32, 512, 7)):
            name, core = f"rep_conv2d {c}->{c}@{side} n{n}", (n, c) in ((32, 64), (1, 256), (32, 256))
            yield Spec("rep_conv", name, partial(self.rep_conv, n, c, side, c), core)
        yield Spec("rep_conv", "rep_conv2d 192->1280@7 n32", partial(self.rep_conv, 32, 192, 7, 1280))
        yield Spec("rep_conv", "rep_conv2d 1x1 256->256@28 n64", partial(self.rep_conv, 64, 256, 28, 256, 1))
        for n, c, side in ((32, 64, 56), (32, 256, 14)):
            name = f"rep_conv2d forward and backward {c}@{side} n{n}"
            yield Spec("rep_conv", name, partial(self.conv_gradients, n, c, side), c == 256)
        for c, side in ((512, 14), (96, 56)):
            yield Spec("sliced", f"depthwise 3x3 {c}@{side} n32", partial(self.depthwise, 32, c, side), c == 96)
        yield Spec("sliced", "depthwise and pointwise 512@14 n32", partial(self.dw_pw, 32, 512, 14))
        for share in (0.25, 0.5, 1.0):
            name = f"sliced_conv2d 1x1 512@14 n32 at {share:g}"
            yield Spec("sliced", name, partial(self.sliced, 32, 512, 14, share), share == 0.5)
        yield Spec("sliced", "sliced_conv2d_ragged 1x1 512@14 n32, 4 widths", partial(self.ragged, 32, 512, 14), True)
        yield Spec("sliced", "sliced_conv2d_ragged 1x1 512@28 n128, 4 widths", partial(self.ragged, 128, 512, 28))
        yield Spec("sliced", "sliced_linear_ragged 1024 n1024, 4 widths", partial(self.ragged_linear, 1024, 1024), True)
        for c, side, n in ((64, 8, 128), (256, 14, 32), (256, 14, 256)):
            name = f"skip_basic_block {c}@{side} n{n} keep 0.5"
            yield Spec("block_skip", name, partial(self.skip, n, c, side), (c, n) == (256, 32))
        for c, side in ((16, 32), (32, 16), (64, 8)):
            name = f"skip_stage {c}@{side} n256, 17 blocks, keep 0.5"
            yield Spec("block_skip", name, partial(self.stage, 256, c, side, 17), c == 64)
        for rows in (1, 8, 64):
            name = f"pq_linear 4096->4096 d8 K256, {rows} rows"
            yield Spec("pq", name, partial(self.pq_linear, rows, 4096, 4096, 8, 256), rows < 64)
        yield Spec("pq", "pq_linear 4096->11008 d8 K256, 1 rows", partial(self.pq_linear, 1, 4096, 11008, 8, 256))
        yield Spec("pq", "pq_linear 2048->1000 d4 K1024, 1 rows", partial(self.pq_linear, 1, 2048, 1000, 4, 1024))
        yield Spec("pq", "pq_conv2d 3x3 512@7 n32 d9 K256", partial(self.pq_conv, 32, 512, 7), True)
        yield Spec(
            "pq", "pq_embedding 1000000x512 d8 K256, 4096 tokens", partial(self.pq_embedding, 4096, 1_000_000, 512)
        )
        for n, c, side in ((32, 96, 28), (128, 48, 56)):
            name, large = f"multi_branch_bn_add_relu 3x{c}@{side} n{n}, training", n == 128
            yield Spec("batch_norm", name, partial(self.batch_norms, n, c, side), large)
            yield Spec(
                "batch_norm", f"{name}, forward and backward", partial(self.batch_norms, n, c, side, True), large
            )


def cudnn_add_relu(x: Tensor, w: Tensor, b: Tensor, r: Tensor, pad: int) -> Tensor:
    """``relu(conv(x) + r)`` in one call of cuDNN."""
    return torch.cudnn_convolution_add_relu(x, w, r, 1.0, b, (1, 1), (pad, pad), (1, 1), 1)


def cudnn_block(
    x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, stride: int = 1, shortcut: Any = None
) -> Tensor:
    """A residual block in two calls of cuDNN."""
    y = torch.cudnn_convolution_relu(x, w1, b1, (stride, stride), (1, 1), (1, 1), 1)
    return cudnn_add_relu(y, w2, b2, x if shortcut is None else shortcut, 1)


def dense_block(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    """A residual block of plain convolutions."""
    return F.relu(F.conv2d(F.relu(F.conv2d(x, w1, b1, padding=1)), w2, b2, padding=1) + x)


def masked_block(x: Tensor, keep: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    """The block for all samples, then the choice."""
    return torch.where(keep[:, None, None, None], dense_block(x, w1, b1, w2, b2), x)


def thirds(tensors: tuple[Tensor, ...]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Of a flat list: branches, weights, biases."""
    n = len(tensors) // 3
    return list(tensors[:n]), list(tensors[n : 2 * n]), list(tensors[2 * n :])


class Gradients:
    """Forward and backward of a function of all tensors but the last, which is the result's gradient."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        self.function = function

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        *inputs, incoming = tensors
        with torch.enable_grad():
            y = self.function(*inputs)
        return torch.autograd.grad(y, inputs, incoming)

    def compiled(self) -> Gradients:
        return Gradients(torch.compile(self.function, dynamic=False))
