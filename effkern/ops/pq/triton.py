"""Product-quantized layers in Triton. Linear layers and convolutions are the shared implicit GEMM with weights made of
codes as its second operand; a weight is never stored. Codes, indices and offsets are held to their ranges."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from effkern.ops._triton.conv import Coded, convolve
from effkern.ops._triton.lookup import bag, lookup
from effkern.ops._triton.tensors import dense_like, pixels, vector
from effkern.ops.pq import registration as op

Ints = Sequence[int]


def pq_decode(codes: Tensor, codebook: Tensor, scale: Tensor | None) -> Tensor:
    """The dense weight ``[Co, J * d]``."""
    y = op._decode_fake(codes, codebook, scale)  # all checks
    if y.numel() > 0:
        lookup(Coded(codes, codebook.contiguous()), y, scale=vector(scale))
    return y


def pq_embedding(idx: Tensor, codes: Tensor, codebook: Tensor, scale: Tensor | None, padding_idx: int | None) -> Tensor:
    """Decoded rows ``[*idx.shape, J * d]``."""
    y = op._embedding_fake(idx, codes, codebook, scale, padding_idx)
    if y.numel() > 0 and codes.size(0) > 0:
        table = Coded(codes, codebook.contiguous())
        lookup(table, y.view(-1, y.size(-1)), idx.reshape(-1).contiguous(), vector(scale), padding_idx)
    return y


def pq_embedding_bag(
    idx: Tensor, codes: Tensor, codebook: Tensor, offsets: Tensor, scale: Tensor | None, mode: str,
    per_sample_weights: Tensor | None, padding_idx: int | None,
) -> Tensor:  # fmt: skip
    """Sums or means ``[bags, J * d]`` of decoded rows."""
    y = op._bag_fake(idx, codes, codebook, offsets, scale, mode, per_sample_weights, padding_idx)
    if codes.size(0) == 0:
        return y.zero_()
    if y.numel() > 0:
        bag(
            Coded(codes, codebook.contiguous()), y, idx.contiguous(), offsets.contiguous(), vector(scale),
            mode == "mean", vector(per_sample_weights), padding_idx,
        )  # fmt: skip
    return y


def pq_linear(
    x: Tensor, codes: Tensor, codebook: Tensor, scale: Tensor | None, bias: Tensor | None, act: str, algo: str
) -> Tensor:
    """``act(x @ W(codes).T * scale + bias)``."""
    y = op._linear_fake(x, codes, codebook, scale, bias, act, algo)
    if y.numel() > 0:
        rows, out = x.reshape(-1, x.size(-1))[:, :, None, None], y.view(-1, y.size(-1))[:, :, None, None]
        _convolve(rows, codes, codebook, out, scale, bias, [1, 1], ([1, 1], [0, 0], [1, 1]), 1, act)
    return y


def pq_conv2d(
    x: Tensor, codes: Tensor, codebook: Tensor, scale: Tensor | None, bias: Tensor | None, kernel_size: Ints,
    stride: Ints, padding: Ints, dilation: Ints, groups: int, act: str, algo: str,
) -> Tensor:  # fmt: skip
    """``act(conv2d(x, W(codes)) * scale + bias)``."""
    window = (list(kernel_size), list(stride), list(padding), list(dilation))
    y = op._conv_fake(x, codes, codebook, scale, bias, *window, groups, act, algo)
    if y.numel() == 0:
        return y
    out = dense_like(y)
    _convolve(x, codes, codebook, out, scale, bias, window[0], window[1:], groups, act)
    return y if out is y else y.copy_(out)


def _convolve(
    x: Tensor, codes: Tensor, codebook: Tensor, y: Tensor, scale: Tensor | None, bias: Tensor | None, kernel: Ints,
    geometry: Sequence[list[int]], groups: int, act: str,
) -> None:  # fmt: skip
    convolve(
        pixels(x), Coded(codes, codebook.contiguous()), y, (kernel[0], kernel[1]),
        (geometry[0], geometry[1], geometry[2]), c_in=x.size(1) // groups, c_out=y.size(1) // groups, groups=groups,
        act=act, scale=vector(scale), shift=vector(bias),
    )  # fmt: skip
