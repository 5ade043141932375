"""Named inputs of the product-quantized ops, for tests and benchmarks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from effkern.ops.pq import reference, registration
from effkern.testing import Sample

ANY_RANK = frozenset({"any_rank"})  # the first argument takes any number of leading dimensions

# name, (N, Ci, H, W), Co, (R, S), groups, d, K, stages (0: 2-d codes), books, code dtype, scale, bias, act, window
_CONVS: tuple[tuple[Any, ...], ...] = (
    ("3x3_d9", (2, 5, 9, 7), 21, (3, 3), 1, 9, 16, 0, 1, torch.uint8, True, True, "relu", (1, 1, 1)),
    ("3x3_d18_odd_channels", (2, 5, 8, 6), 18, (3, 3), 1, 18, 7, 0, 1, torch.uint8, False, True, "none", (1, 1, 1)),
    ("1x1_d8_tail", (3, 13, 5, 5), 33, (1, 1), 1, 8, 256, 0, 1, torch.uint8, True, False, "silu", (1, 0, 1)),
    ("book_per_position", (1, 6, 6, 6), 16, (1, 1), 1, 2, 5, 0, 3, torch.int16, False, False, "none", (1, 0, 1)),
    ("two_stages_two_books", (2, 4, 7, 7), 17, (3, 3), 1, 4, 11, 2, 2, torch.int32, True, True, "relu6", (2, 1, 1)),
    ("three_stages_one_book", (1, 8, 6, 5), 5, (1, 1), 1, 4, 9, 3, 1, torch.uint8, False, True, "hardswish", (1, 0, 1)),
    ("groups_dilated", (2, 6, 11, 9), 36, (3, 2), 2, 9, 12, 0, 1, torch.uint16, True, True, "none", (1, 2, 2)),
    ("depthwise", (2, 19, 8, 8), 19, (3, 3), 19, 9, 8, 0, 1, torch.uint8, True, True, "relu6", (2, 1, 1)),
    ("depthwise_x2", (1, 5, 6, 6), 10, (3, 3), 5, 9, 8, 0, 1, torch.uint8, False, True, "none", (1, 1, 1)),
    ("16_bit_codes", (1, 4, 4, 4), 40, (1, 1), 1, 2, 40000, 0, 1, torch.uint16, False, False, "none", (1, 0, 1)),
    ("one_channel_one_entry", (2, 1, 5, 5), 1, (3, 3), 1, 4, 1, 0, 1, torch.uint8, True, True, "relu", (1, 1, 1)),
    ("1x1_lut", (2, 21, 5, 7), 37, (1, 1), 1, 8, 40, 0, 1, torch.uint8, True, True, "relu", (1, 0, 1)),
    ("1x1_lut_few_left", (3, 8, 5, 7), 18, (1, 1), 1, 4, 256, 0, 1, torch.uint8, False, True, "none", (2, 0, 1)),
    ("1x1_chooses_lut", (2, 16, 3, 3), 700, (1, 1), 1, 8, 16, 0, 2, torch.int32, False, False, "none", (1, 0, 1)),
    ("1x1_decode_fma", (2, 25, 4, 3), 19, (1, 1), 1, 3, 30, 2, 2, torch.int16, True, True, "silu", (1, 0, 1)),
    ("empty_batch", (0, 4, 6, 6), 8, (3, 3), 1, 9, 16, 0, 1, torch.uint8, True, True, "relu", (1, 1, 1)),
)  # fmt: skip

# name, x shape, Co, d, K, stages, books, scale, bias, act
_LINEARS: tuple[tuple[Any, ...], ...] = (
    ("d4", (5, 24), 10, 4, 64, 0, 1, True, True, "none"),
    ("one_row_tail", (1, 37), 50, 8, 256, 0, 1, False, True, "relu"),
    ("three_dims_two_stages", (2, 3, 16), 19, 16, 12, 2, 2, True, False, "silu"),
    ("book_per_position", (2, 12), 7, 2, 9, 0, 6, False, False, "none"),
    ("decode_fma_d16_stages", (9, 50), 40, 16, 300, 2, 1, False, True, "none"),
    ("decode_fma_d9", (4, 40), 17, 9, 20, 0, 1, True, False, "relu"),
    ("lut_d5", (11, 33), 50, 5, 70, 0, 7, True, True, "hardswish"),
    ("panel_d8", (3, 32), 20, 8, 50, 0, 1, False, True, "none"),
    ("decode_fma_many_rows_d8", (35, 64), 37, 8, 50, 0, 1, True, True, "relu"),
    ("decode_fma_many_rows_d4", (64, 44), 20, 4, 300, 0, 1, False, True, "none"),
    ("no_rows", (0, 8), 4, 4, 8, 0, 1, True, True, "none"),
)

# Samples that ask for an algorithm, by the beginning of their names; all others leave the choice to the op.
_ALGOS = {"1x1_lut": "lut", "lut": "lut", "1x1_decode_fma": "decode_fma", "decode_fma": "decode_fma", "panel": "panel"}


def _algo(name: str) -> str:
    return next((algo for prefix, algo in _ALGOS.items() if name.startswith(prefix)), "auto")


def random_codes(
    generator: torch.Generator, rows: int, columns: int, d: int, k: int, stages: int, books: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Codes ``[rows, J]`` (or ``[rows, J, stages]``) and a float32 codebook ``[books, k, d]``, both random."""
    shape = (rows, -(-columns // d), *((stages,) if stages else ()))
    codes = torch.randint(k, shape, generator=generator).to(dtype)
    return codes, torch.randn(books, k, d, generator=generator) / max(1, columns) ** 0.5


def _vectors(generator: torch.Generator, rows: int, scale: bool, bias: bool) -> tuple[Tensor | None, Tensor | None]:
    factor = torch.rand(rows, generator=generator) + 0.5 if scale else None
    return factor, torch.randn(rows, generator=generator) if bias else None


def _absolute(value: Any) -> Any:
    return value.abs().double() if isinstance(value, Tensor) and value.is_floating_point() else value


def _conv_magnitude(*args: Any) -> Tensor:
    """The reference over absolute values; additive stages count with the absolute value of each."""
    return reference.pq_conv2d(*[*[_absolute(a) for a in args[:-2]], "none", "auto"])


def _linear_magnitude(*args: Any) -> Tensor:
    return reference.pq_linear(*[*[_absolute(a) for a in args[:-2]], "none", "auto"])


def _embedding_magnitude(*args: Any) -> Tensor:
    return reference.pq_embedding(*[_absolute(a) for a in args])


def _bag_magnitude(*args: Any) -> Tensor:
    return reference.pq_embedding_bag(*[_absolute(a) for a in args])


def _decode_magnitude(*args: Any) -> Tensor:
    return reference.pq_decode(*[_absolute(a) for a in args])


def _present(**arguments: Any) -> tuple[str, ...]:
    return tuple(name for name, value in arguments.items() if value is not None)


def samples(dtype: torch.dtype = torch.float32) -> Iterator[Sample]:
    """Samples of all five ops; ``dtype`` is that of ``x``, for the embeddings that of the codebook."""
    generator = torch.Generator().manual_seed(0)
    for name, size, c_out, kernel, groups, d, k, stages, books, code, has_scale, has_bias, act, window in _CONVS:
        columns = size[1] // groups * kernel[0] * kernel[1]
        codes, book = random_codes(generator, c_out, columns, d, k, stages, books, code)
        scale, bias = _vectors(generator, c_out, has_scale, has_bias)
        x = torch.randn(size, generator=generator).to(dtype)
        stride, padding, dilation = ([v, v] for v in window)
        args = (x, codes, book, scale, bias, list(kernel), stride, padding, dilation, groups, act, _algo(name))
        wants = _present(x=x, codebook=book, scale=scale, bias=bias)
        yield Sample(f"conv_{name}", registration.conv, reference.pq_conv2d, args, _conv_magnitude, wants)
    for name, size, c_out, d, k, stages, books, has_scale, has_bias, act in _LINEARS:
        code = torch.uint8 if k <= 256 else torch.int16
        codes, book = random_codes(generator, c_out, size[-1], d, k, stages, books, code)
        scale, bias = _vectors(generator, c_out, has_scale, has_bias)
        x = torch.randn(size, generator=generator).to(dtype)
        linear_args = (x, codes, book, scale, bias, act, _algo(name))
        wants = _present(x=x, codebook=book, scale=scale, bias=bias)
        yield Sample(
            f"linear_{name}", registration.linear, reference.pq_linear, linear_args, _linear_magnitude, wants, ANY_RANK
        )
    yield from _table_samples(generator, dtype)


def _table_samples(generator: torch.Generator, dtype: torch.dtype) -> Iterator[Sample]:
    codes, book = random_codes(generator, 30, 24, 8, 20, 0, 1, torch.uint8)
    staged, stage_books = random_codes(generator, 30, 12, 4, 6, 2, 2, torch.uint8)
    scale = torch.rand(30, generator=generator) + 0.5
    book, stage_books = book.to(dtype), stage_books.to(dtype)
    idx = torch.tensor([[3, 0, 29], [7, 3, 3]])

    ref: Callable[..., Tensor]
    op, ref = registration.decode, reference.pq_decode
    yield Sample("decode", op, ref, (codes, book, scale), _decode_magnitude, ("codebook", "scale"))
    yield Sample("decode_two_stages", op, ref, (staged, stage_books, None), _decode_magnitude, ("codebook",))

    op, ref = registration.embedding, reference.pq_embedding
    both = ("codebook", "scale")
    yield Sample("embedding", op, ref, (idx, codes, book, scale, None), _embedding_magnitude, both, ANY_RANK)
    args: tuple[Any, ...] = (idx.int(), staged, stage_books, None, 3)
    yield Sample("embedding_padded_two_stages", op, ref, args, _embedding_magnitude, ("codebook",), ANY_RANK)
    args = (idx[:0], codes, book, scale, 0)
    yield Sample("embedding_of_nothing", op, ref, args, _embedding_magnitude, both, ANY_RANK)

    op, ref = registration.bag, reference.pq_embedding_bag
    flat, offsets = idx.reshape(-1), torch.tensor([0, 2, 2, 5])
    weights = torch.rand(6, generator=generator)
    args = (flat, codes, book, offsets, scale, "mean", None, None)
    yield Sample("bag_mean", op, ref, args, _bag_magnitude, both)
    args = (flat, codes, book, offsets, scale, "mean", None, 3)
    yield Sample("bag_mean_padded", op, ref, args, _bag_magnitude, both)
    args = (flat.int(), staged, stage_books, offsets.int(), None, "sum", weights, 3)
    yield Sample("bag_weighted_sum", op, ref, args, _bag_magnitude, ("codebook", "per_sample_weights"))
    args = (flat[:0], codes, book, offsets[:0], None, "sum", None, None)
    yield Sample("bag_of_nothing", op, ref, args, _bag_magnitude, ("codebook",))
