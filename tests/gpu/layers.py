"""Calls in the shapes of real networks, made on the device they run on."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from effkern.testing import Sample
from tests.gpu.device import DEVICE
from tests.ops.catalog import every_sample

#: The CPU, which only checks the tests, is given less.
BATCHES = (1, 8, 64) if DEVICE == "cuda" else (1, 3)
SAME = ([1, 1], [1, 1])
Make = Callable[[int, torch.dtype], tuple]


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    drawn = torch.randn(shape, device=DEVICE)
    return drawn.masked_fill_(drawn == 0, 1.0).to(dtype)  # the bounds' abs has no slope at 0


def a_map(n: int, c: int, side: int, dtype: torch.dtype) -> Tensor:
    return normal(n, c, side, side, dtype=dtype).contiguous(memory_format=torch.channels_last)


def weight(outs: int, ins: int, kernel: int, dtype: torch.dtype, gain: float = 1.0) -> Tensor:
    """Of products whose sums have about the size of what goes in."""
    scaled = normal(outs, ins, kernel, kernel) * gain / (ins * kernel * kernel) ** 0.5
    return scaled.to(dtype).contiguous(memory_format=torch.channels_last)


def conv(ins: int, outs: int, kernel: int, side: int, stride: int = 1, groups: int = 1, act: str = "relu",
         residual: bool = False) -> Make:  # fmt: skip
    pad = kernel // 2

    def make(n: int, dtype: torch.dtype) -> tuple:
        x = a_map(n, ins, side, dtype)
        added = a_map(n, outs, -(-side // stride), dtype) if residual else None
        return (x, weight(outs, ins // groups, kernel, dtype), normal(outs), [stride] * 2, [pad] * 2, [1, 1], groups,
                act, added, "auto")  # fmt: skip

    return make


def widths(n: int, choices: tuple[int, ...]) -> Tensor:
    """Mixed: every width is there where there are enough samples."""
    order = torch.randperm(n, device=DEVICE)
    return torch.tensor(choices, device=DEVICE)[order % len(choices)]


def ragged(ins: tuple[int, ...], outs: tuple[int, ...], kernel: int, side: int, depthwise: bool = False) -> Make:
    """A layer of a supernet, a width and row of tables for each sample."""

    def make(n: int, dtype: torch.dtype) -> tuple:
        row = widths(n, tuple(range(len(ins))))
        c_in, c_out = (torch.tensor(w, device=DEVICE)[row] for w in (ins, outs))
        x, most = a_map(n, max(ins), side, dtype), max(outs)
        for i, width in enumerate(c_in.tolist()):
            x[i, width:] = float("nan")
        tables = [normal(len(ins), most).abs() + 0.5, normal(len(ins), most)]
        return (x, weight(most, 1 if depthwise else max(ins), kernel, dtype), None, c_in, c_out, most, [1, 1],
                [kernel // 2] * 2, [1, 1], max(ins) if depthwise else 1, "prefix_groups", *tables, row, "relu6", "auto",
                True)  # fmt: skip

    return make


def ragged_linear(n: int, dtype: torch.dtype) -> tuple:
    row = widths(n, (0, 1, 2, 3))
    c_in = torch.tensor([320, 640, 960, 1280], device=DEVICE)[row]
    outs = torch.full((n,), 1000, device=DEVICE)
    x = normal(n, 1280, dtype=dtype)
    matrix = weight(1000, 1280, 1, dtype).flatten(1)
    return x, matrix, normal(1000), c_in, outs, 1000, None, None, None, "none", "auto", True


def sliced(ins: int, outs: int, whole: int, kernel: int, side: int, groups: int = 1) -> Make:
    def make(n: int, dtype: torch.dtype) -> tuple:
        full = weight(whole, 1 if groups > 1 else whole, kernel, dtype)
        table = normal(whole)
        return (a_map(n, ins, side, dtype), full, None, outs, [1, 1], [kernel // 2] * 2, [1, 1], groups,
                "prefix_groups", table.abs() + 0.5, table, "relu6", "auto")  # fmt: skip

    return make


def dw_pw(n: int, dtype: torch.dtype) -> tuple:
    mid = 288
    tables = [normal(mid).abs() + 0.5, normal(mid)]
    return (a_map(n, 192, 14, dtype), weight(mid, 1, 3, dtype), normal(mid), weight(mid, mid, 1, dtype), normal(mid),
            240, *SAME, [1, 1], *tables, "relu6", *tables, None, "none", "auto")  # fmt: skip


def keep_of(n: int, share: float) -> Tensor:
    """A mask with this share of the samples, spread over the batch."""
    return torch.randperm(n, device=DEVICE) < round(n * share)


def basic(c: int, side: int, share: float, stride: int = 1) -> Make:
    def make(n: int, dtype: torch.dtype) -> tuple:
        outs = c * stride
        res = None if stride == 1 else a_map(n, outs, side // stride, dtype)
        return (a_map(n, c, side, dtype), keep_of(n, share), weight(outs, c, 3, dtype), normal(outs),
                weight(outs, outs, 3, dtype), normal(outs), stride, res, "relu", "auto")  # fmt: skip

    return make


def bottleneck(c: int, side: int, share: float) -> Make:
    def make(n: int, dtype: torch.dtype) -> tuple:
        mid = c // 4
        return (a_map(n, c, side, dtype), keep_of(n, share).float(), weight(mid, c, 1, dtype), normal(mid),
                weight(mid, mid, 3, dtype), normal(mid), weight(c, mid, 1, dtype), normal(c), 1, None, "relu",
                "auto")  # fmt: skip

    return make


def coded(outs: int, columns: int, d: int, entries: int = 256) -> tuple[Tensor, Tensor]:
    """Codes and their book."""
    codes = torch.randint(entries, (outs, -(-columns // d)), device=DEVICE, dtype=torch.int32)
    kind = torch.uint8 if entries <= 256 else torch.int32
    return codes.to(kind), normal(1, entries, d) / columns**0.5


def pq_linear(ins: int, outs: int, d: int, entries: int = 256) -> Make:
    def make(n: int, dtype: torch.dtype) -> tuple:
        return normal(n, ins, dtype=dtype), *coded(outs, ins, d, entries), None, normal(outs), "none", "auto"

    return make


def pq_conv(ins: int, outs: int, kernel: int, side: int, d: int) -> Make:
    def make(n: int, dtype: torch.dtype) -> tuple:
        codes, book = coded(outs, ins * kernel * kernel, d)
        return (a_map(n, ins, side, dtype), codes, book, normal(outs).abs(), normal(outs), [kernel] * 2, [1, 1],
                [kernel // 2] * 2, [1, 1], 1, "relu", "auto")  # fmt: skip

    return make


ROWS = 1_000_000 if DEVICE == "cuda" else 1000


def table(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, book and scales of an embedding of a million rows of 512 numbers."""
    codes, book = coded(ROWS, 512, 8)
    return codes, book.to(dtype), normal(ROWS).abs() + 0.5


def embedding(n: int, dtype: torch.dtype) -> tuple:
    idx = torch.randint(ROWS, (n, 128), device=DEVICE)
    idx[0, 0], idx[-1, -1] = 0, ROWS - 1
    return idx, *table(dtype), 0


def bag(n: int, dtype: torch.dtype) -> tuple:
    codes, book, scale = table(dtype)
    idx = torch.randint(ROWS, (n * 100,), device=DEVICE)
    offsets = torch.randint(n * 100, (n,), device=DEVICE).sort().values
    offsets[0] = 0
    return idx, codes, book, offsets, scale, "mean", None, None


def decode(n: int, dtype: torch.dtype) -> tuple:
    codes, book = coded(512 * n, 4096, 8)
    return codes, book.to(dtype), None


def norms(c: int, side: int, branches: int, training: bool) -> Make:
    def make(n: int, dtype: torch.dtype) -> tuple:
        vectors = [[normal(c).abs() + 0.5 for _ in range(branches)] for _ in range(4)]
        return [a_map(n, c, side, dtype) for _ in range(branches)], *vectors, training, 0.1, 1e-5, True

    return make


#: ``"<op>/<layer>"`` to a function of batch and dtype that makes the arguments.
LAYERS: dict[str, Make] = {
    "rep_conv2d/resnet stem 7x7": conv(3, 64, 7, 224, stride=2),
    "rep_conv2d/repvgg stem": conv(3, 48, 3, 224, stride=2),
    "rep_conv2d/repvgg 48@56": conv(48, 48, 3, 56),
    "rep_conv2d/repvgg 192@14 residual": conv(192, 192, 3, 14, residual=True),
    "rep_conv2d/repvgg 192-1280@14 stride 2": conv(192, 1280, 3, 14, stride=2),
    "rep_conv2d/resnet 64-256@56": conv(64, 256, 1, 56, residual=True),
    "rep_conv2d/resnet 128@56 stride 2": conv(128, 128, 3, 56, stride=2),
    "rep_conv2d/resnet 1024-2048@14 stride 2": conv(1024, 2048, 1, 14, stride=2, act="none"),
    "rep_conv2d/resnet 2048-512@7": conv(2048, 512, 1, 7),
    "rep_conv2d/resnext 256@28": conv(256, 256, 3, 28, groups=32),
    "rep_conv2d/cifar 16@32": conv(16, 16, 3, 32),
    "rep_conv2d/mobilenet depthwise 32@112": conv(32, 32, 3, 112, groups=32, act="relu6"),
    "rep_conv2d/mobilenet depthwise 96@112 stride 2": conv(96, 96, 3, 112, stride=2, groups=96, act="relu6"),
    "rep_conv2d/mobilenet depthwise 960@7": conv(960, 960, 3, 7, groups=960, act="relu6"),
    "rep_conv2d/mobilenet 16-96@112": conv(16, 96, 1, 112, act="relu6"),
    "sliced_conv2d/half of 512@14": sliced(256, 256, 512, 1, 14),
    "sliced_conv2d/depthwise 360 of 720@14": sliced(360, 360, 720, 3, 14, groups=720),
    "sliced_conv2d_ragged/pointwise@14": ragged((179, 256, 384, 512), (184, 264, 384, 512), 1, 14),
    "sliced_conv2d_ragged/3x3@28": ragged((64, 96, 128), (48, 96, 128), 3, 28),
    "sliced_conv2d_ragged/depthwise@28": ragged((88, 128, 192, 256), (88, 128, 192, 256), 3, 28, depthwise=True),
    "sliced_linear_ragged/classes": ragged_linear,
    "sliced_dw_pw/288@14": dw_pw,
    "skip_basic_block/resnet34 64@56 half": basic(64, 56, 0.5),
    "skip_basic_block/resnet34 128@28 stride 2": basic(128, 28, 0.6, stride=2),
    "skip_basic_block/cifar 64@8 none": basic(64, 8, 0.0),
    "skip_basic_block/cifar 64@8 all": basic(64, 8, 1.0),
    "skip_bottleneck/resnet101 256@56 half": bottleneck(256, 56, 0.5),
    "skip_bottleneck/resnet101 1024@14 half": bottleneck(1024, 14, 0.5),
    "pq_linear/2048-1000 d4": pq_linear(2048, 1000, 4, 1024),
    "pq_linear/4096-4096 d8": pq_linear(4096, 4096, 8),
    "pq_conv2d/512@7 3x3 d9": pq_conv(512, 512, 3, 7, 9),
    "pq_conv2d/256-1024@14 1x1 d8": pq_conv(256, 1024, 1, 14, 8),
    "pq_embedding/a million rows": embedding,
    "pq_embedding_bag/a million rows": bag,
    "pq_decode/4096 columns": decode,
    "multi_branch_bn_add_relu/3 of 48@56": norms(48, 56, 3, True),
    "multi_branch_bn_add_relu/2 of 512@14 eval": norms(512, 14, 2, False),
    "multi_branch_bn_add_relu/3 of 64@112": norms(64, 112, 3, True),
}  # fmt: skip


def sample_of(key: str, n: int, dtype: torch.dtype) -> Sample:
    """The call, with reference, bound and gradients of the catalog's samples of the op."""
    name = key.split("/")[0]
    model = next(s for s in every_sample().values() if s.op.name == name)
    args = LAYERS[key](n, dtype)
    leaves = _differentiable(model.op.arguments, args, model.requires_grad)
    return dataclasses.replace(
        model, name=key.split("/")[1], args=args, magnitude=_direct(model.magnitude), requires_grad=leaves
    )


def _direct(magnitude: Any) -> Any:
    """Without the room for Winograd, which the GPU has not."""
    if DEVICE == "cpu":
        return magnitude
    return lambda *args: magnitude(*("direct" if isinstance(a, str) and a == "auto" else a for a in args))


#: Arguments that are differentiated wherever they are given.
LEAVES = {
    "x", "weight", "bias", "residual", "scale", "shift", "scale_table", "shift_table", "w1", "b1", "w2", "b2", "w3",
    "b3", "res", "codebook", "xs",
}  # fmt: skip


def _differentiable(names: tuple[str, ...], args: tuple, catalog: tuple[str, ...]) -> tuple[str, ...]:
    """What of this call has gradients; nothing where the catalog's samples have none."""
    given = (n for n, value in zip(names, args, strict=True) if value is not None and n in LEAVES)
    return tuple(given) if catalog else ()
