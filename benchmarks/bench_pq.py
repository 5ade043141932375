"""Layers run from codes against dense ones: convolutions and classifiers of ResNets and VGG, embeddings.

Every case is compared with what eager PyTorch does with the same codes (rebuild the dense weight, then the dense
layer) and with the peers that keep the decoded weight resident. Sizes are those of "And the Bit Goes Down".
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.common import Bench, main, rounding
from benchmarks.layer import ConvLayer
from benchmarks.peers import conv_peers, module_peers
from effkern.ops import pq_conv2d, pq_decode, pq_embedding, pq_linear


@dataclass(frozen=True)
class Conv:
    """A convolution of ``size`` x ``size`` outputs with sub-vectors of ``d``."""

    name: str
    c_in: int
    c_out: int
    kernel: int
    size: int
    d: int
    stride: int = 1
    entries: int = 256


@dataclass(frozen=True)
class Linear:
    """A linear layer, run with ``batches`` rows."""

    name: str
    c_in: int
    c_out: int
    d: int
    entries: int
    batches: tuple[int, ...] = (1, 16)


@dataclass(frozen=True)
class Table:
    """An embedding table of ``rows`` x ``width``."""

    rows: int
    width: int
    d: int = 8
    entries: int = 256


CONVS = (
    Conv("resnet18_layer1", 64, 64, 3, 56, 9),
    Conv("resnet18_layer2", 128, 128, 3, 28, 9),
    Conv("resnet18_layer3", 256, 256, 3, 14, 9),
    Conv("resnet18_layer3_large", 256, 256, 3, 14, 18),
    Conv("resnet18_layer3_down", 128, 256, 3, 14, 9, stride=2),
    Conv("resnet50_layer1_conv3", 64, 256, 1, 56, 4),
    Conv("resnet50_layer2_conv3_large", 128, 512, 1, 28, 8),
    Conv("resnet50_layer3_conv3_large", 256, 1024, 1, 14, 8),
    Conv("resnet50_layer4_conv1_large", 2048, 512, 1, 7, 8),
    Conv("resnet50_layer4_conv2_large", 512, 512, 3, 7, 18),
    Conv("resnet50_layer4_conv3_large", 512, 2048, 1, 7, 8),
)
LINEARS = (
    Linear("resnet18_fc", 512, 1000, 4, 2048),
    Linear("resnet50_fc", 2048, 1000, 4, 1024),
    Linear("vgg_fc2", 4096, 4096, 8, 256),
    Linear("vgg_fc1", 25088, 4096, 8, 256, batches=(1,)),
)
TABLES = (Table(100_000, 128), Table(100_000, 512), Table(1_000_000, 128))
QUICK_CONVS = (Conv("quick_3x3", 16, 16, 3, 8, 9, entries=16), Conv("quick_1x1", 16, 32, 1, 8, 8, entries=16))
QUICK_LINEARS = (Linear("quick_fc", 64, 48, 4, 32, batches=(1, 4)),)
QUICK_TABLES = (Table(1000, 32),)


def random_weight(rows: int, columns: int, d: int, entries: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, codebook, and the dense weight behind them."""
    codes = torch.randint(entries, (rows, -(-columns // d)))
    book = torch.randn(1, entries, d) / columns**0.5
    codes = codes.to(torch.uint8 if entries <= 256 else torch.int16)
    return codes, book, pq_decode(codes, book)[:, :columns]


def rebuild(index: Tensor, book: Tensor, columns: int) -> Tensor:
    """The dense weight as eager PyTorch makes it from int64 codes."""
    return book[0][index].flatten(1)[:, :columns]


def run_conv(bench: Bench, case: Conv, batch: int) -> None:
    """One convolution at one batch size."""
    columns = case.c_in * case.kernel**2
    codes, book, dense = random_weight(case.c_out, columns, case.d, case.entries)
    bias, padding, shape = torch.randn(case.c_out), case.kernel // 2, (case.c_out, case.c_in, case.kernel, case.kernel)
    size = case.size * case.stride
    x = torch.randn(batch, case.c_in, size, size).contiguous(memory_format=torch.channels_last)
    index = codes.long()

    def decode_per_call() -> Tensor:
        weight = rebuild(index, book, columns).reshape(shape)
        return F.relu(F.conv2d(x, weight, bias, case.stride, padding))

    layer = ConvLayer(dense.reshape(shape), bias, case.stride, padding, act="relu")
    exact = F.conv2d(x.double(), dense.reshape(shape).double(), bias.double(), case.stride, padding)
    magnitude = F.conv2d(
        x.double().abs(), dense.reshape(shape).double().abs(), bias.double().abs(), case.stride, padding
    )
    window = {"kernel_size": case.kernel, "stride": case.stride, "padding": padding}
    bench.compare(
        op="pq_conv2d",
        case=case.name,
        batch=batch,
        contenders={
            "effkern": lambda: pq_conv2d(x, codes, book, None, bias, **window, act="relu"),
            "eager_decode_per_call": decode_per_call,
            **conv_peers(bench, layer, x),
        },
        exact=exact.relu(),
        allowed=rounding(magnitude),
        macs=batch * case.c_out * columns * case.size**2,
        weight_bytes=codes.numel() * codes.element_size() + 4 * book.numel(),
        dense_bytes=4 * dense.numel(),
    )


def run_linear(bench: Bench, case: Linear, batch: int) -> None:
    """One linear layer at one batch size."""
    codes, book, dense = random_weight(case.c_out, case.c_in, case.d, case.entries)
    layer = nn.Linear(case.c_in, case.c_out)
    layer.weight.copy_(dense)
    x, index = torch.randn(batch, case.c_in), codes.long()
    bias = layer.bias.detach()
    peers: dict[str, Callable[[], Tensor]] = module_peers(bench, layer, x)
    peers.pop("eager_channels_last", None)  # the same as eager_contiguous for a matrix
    bench.compare(
        op="pq_linear",
        case=case.name,
        batch=batch,
        layout="contiguous",
        contenders={
            "effkern": lambda: pq_linear(x, codes, book, None, bias),
            "eager_decode_per_call": lambda: F.linear(x, rebuild(index, book, case.c_in), bias),
            **peers,
        },
        exact=F.linear(x.double(), dense.double(), bias.double()),
        allowed=rounding(F.linear(x.double().abs(), dense.double().abs(), bias.double().abs())),
        macs=batch * case.c_in * case.c_out,
        weight_bytes=codes.numel() * codes.element_size() + 4 * book.numel(),
        dense_bytes=4 * dense.numel(),
    )


def run_table(bench: Bench, case: Table, batch: int) -> None:
    """Look-ups of random rows."""
    codes, book, dense = random_weight(case.rows, case.width, case.d, case.entries)
    idx, index = torch.randint(case.rows, (batch,)), codes.long()
    bench.compare(
        op="pq_embedding",
        case=f"{case.rows}x{case.width}",
        batch=batch,
        layout="contiguous",
        contenders={
            "effkern": lambda: pq_embedding(idx, codes, book),
            "eager_decode_rows": lambda: rebuild(index[idx], book, case.width),
            "eager_dense_table": lambda: F.embedding(idx, dense),
        },
        exact=dense.double()[idx],
        allowed=0.0,
        weight_bytes=codes.numel() * codes.element_size() + 4 * book.numel(),
        dense_bytes=4 * dense.numel(),
    )


def run_memory(bench: Bench, name: str) -> None:
    """Bytes a network's weights take while it runs, dense and from codes; each in a process of its own."""
    for form, impl in (("dense", "dense"), ("codes", "effkern")):
        command = [sys.executable, "-m", "benchmarks.memory", name, form]
        found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        bench.note(op="resident_memory", case=name, impl=impl, **found)


def run(bench: Bench) -> None:
    """All cases."""
    if bench.wants_case("resident_memory", "resnet50"):
        run_memory(bench, bench.choose(("resnet50",), quick=("resnet18",))[0])
    for conv in bench.choose(CONVS, quick=QUICK_CONVS):
        for batch in bench.choose((1, 8), quick=(1,)):
            if bench.wants_case("pq_conv2d", conv.name):
                run_conv(bench, conv, batch)
    for linear in bench.choose(LINEARS, quick=QUICK_LINEARS):
        for batch in linear.batches:
            if bench.wants_case("pq_linear", linear.name):
                run_linear(bench, linear, batch)
    for table in bench.choose(TABLES, quick=QUICK_TABLES):
        if bench.wants_case("pq_embedding", f"{table.rows}x{table.width}"):
            run_table(bench, table, batch=bench.choose((4096,), quick=(64,))[0])


if __name__ == "__main__":
    main("pq", run, seconds=1.5)
