"""Calls whose launches are compiled ahead of time: a kernel, tile and dtype of each family in a layer's shape."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from effkern.ops import _backend
from effkern.ops._registry import OPS

HALF, BF16, F32 = torch.float16, torch.bfloat16, torch.float32
SAME = ([1, 1], [1, 1], [1, 1])
POINT = ([1, 1], [0, 0], [1, 1])


def _twin(name: str, *args: Any) -> None:
    twin = _backend.twin(OPS[name])
    assert twin is not None
    twin(*args)


def _map(channels: int, side: int, dtype: torch.dtype, n: int = 8) -> Tensor:
    return torch.zeros(n, channels, side, side, dtype=dtype).contiguous(memory_format=torch.channels_last)


def _weight(outs: int, ins: int, kernel: int, dtype: torch.dtype) -> Tensor:
    return torch.zeros(outs, ins, kernel, kernel, dtype=dtype).contiguous(memory_format=torch.channels_last)


def _conv(channels: int, dtype: torch.dtype, groups: int = 1) -> None:
    x, weight = _map(channels, 14, dtype), _weight(channels, channels // groups, 3, dtype)
    _twin("rep_conv2d", x, weight, torch.zeros(channels), *SAME, groups, "relu", x, "auto")


def _sliced() -> None:
    x, weight = _map(256, 14, HALF), _weight(512, 512, 1, HALF)
    table = torch.ones(256)
    _twin("sliced_conv2d", x, weight, None, 256, *POINT, 1, "prefix_groups", table, table, "relu", "auto")


def _ragged(groups: int) -> None:
    x, weight = _map(256, 14, HALF), _weight(256, 256 // groups, 1 if groups == 1 else 3, HALF)
    widths, table = torch.full((8,), 192), torch.ones(4, 256)
    _twin(
        "sliced_conv2d_ragged", x, weight, None, widths, widths, 256, *(POINT if groups == 1 else SAME), groups,
        "prefix_groups", table, table, torch.zeros(8, dtype=torch.int64), "relu", "auto", True,
    )  # fmt: skip


def _skip() -> None:
    x, weight, bias = _map(64, 8, HALF), _weight(64, 64, 3, HALF), torch.zeros(64)
    _twin("skip_basic_block", x, torch.ones(8), weight, bias, weight, bias, 1, None, "relu", "auto")


def _book(d: int, dtype: torch.dtype) -> Tensor:
    return torch.zeros(1, 256, d, dtype=dtype)


def _pq_linear() -> None:
    codes = torch.zeros(1024, 256, dtype=torch.uint8)
    _twin("pq_linear", torch.zeros(16, 2048, dtype=HALF), codes, _book(8, HALF), None, torch.zeros(1024), "none",
          "auto")  # fmt: skip


def _pq_conv() -> None:
    codes = torch.zeros(128, 128, dtype=torch.uint8)
    _twin("pq_conv2d", _map(128, 14, HALF), codes, _book(9, HALF), torch.ones(128), None, [3, 3], *SAME, 1, "relu",
          "auto")  # fmt: skip


def _embedding() -> None:
    codes, idx = torch.zeros(1000, 64, dtype=torch.uint8), torch.zeros(128, dtype=torch.int64)
    _twin("pq_embedding", idx, codes, _book(8, HALF), torch.ones(1000), 0)


def _bag() -> None:
    codes, idx = torch.zeros(1000, 64, dtype=torch.uint8), torch.zeros(128, dtype=torch.int64)
    _twin("pq_embedding_bag", idx, codes, _book(8, HALF), torch.zeros(8, dtype=torch.int64), None, "mean", None, None)


def _norms(dtype: torch.dtype) -> None:
    maps, vectors = [_map(64, 14, dtype)] * 3, [torch.ones(64)] * 3
    _twin("multi_branch_bn_add_relu", maps, *[vectors] * 4, True, 0.1, 1e-5, True)


def _norms_backward(dtype: torch.dtype) -> None:
    maps, vectors, table = [_map(64, 14, dtype)] * 3, [torch.ones(64)] * 3, torch.ones(3, 64, dtype=torch.float64)
    _twin("multi_branch_bn_add_relu_backward", maps[0], maps, vectors, vectors, table, table, True, True, [True] * 3)


#: Name to call. The launches of a call are numbered where there are several.
CASES: dict[str, Callable[[], None]] = {
    "conv 192 fp16": lambda: _conv(192, HALF),
    "conv 64 bf16": lambda: _conv(64, BF16),
    "conv 32 fp16": lambda: _conv(32, HALF),
    "conv 16 fp16": lambda: _conv(16, HALF),
    "conv 192 fp32": lambda: _conv(192, F32),
    "conv 32 fp32": lambda: _conv(32, F32),
    "depthwise fp16": lambda: _conv(192, HALF, 192),
    "depthwise fp32": lambda: _conv(192, F32, 192),
    "sliced 1x1 fp16": _sliced,
    "ragged 1x1 fp16": lambda: _ragged(1),
    "ragged depthwise fp16": lambda: _ragged(256),
    "skip fp16": _skip,
    "pq_linear fp16": _pq_linear,
    "pq_conv2d fp16": _pq_conv,
    "embedding fp16": _embedding,
    "bag fp16": _bag,
    "batch norms fp16": lambda: _norms(HALF),
    "gradient of batch norms fp16": lambda: _norms_backward(HALF),
}
