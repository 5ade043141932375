"""Product-quantized layers in plain PyTorch: the oracle of the tests and the fallback without a native library.

A weight row of ``columns`` numbers, in (channel, row, column) order, is cut into ``J = ceil(columns / d)`` sub-vectors;
each is the sum of the codebook rows its codes name. Everything here decodes the whole weight first and is therefore
easy to read; the native kernels never do. Works in float64 when any operand is float64, else in float32.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from effkern.ops._autograd import activate
from effkern.ops._checks import check_finite


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """float64 if any operand is float64, else float32: the storage types bfloat16 and float16 never accumulate."""
    return torch.float64 if any(t is not None and t.dtype == torch.float64 for t in tensors) else torch.float32


def entry_index(codes: Tensor, codebook: Tensor) -> Tensor:
    """Row of ``codebook.reshape(B * K, d)`` behind every code, int64 in the shape of ``codes``.

    ``B`` is 1 (one book for all) or the last size of ``codes``: a book per position for codes ``[Co, J]``, a book
    per additive stage for codes ``[Co, J, m]``.

    Raises:
        ValueError: if a code is negative or not below ``K``.
    """
    books, entries, _ = codebook.shape
    index = codes.long()
    if index.numel() and (int(index.min()) < 0 or int(index.max()) >= entries):
        raise ValueError(
            f"codes: must lie in [0, {entries}) for a codebook of {entries} entries, "
            f"got {int(index.min())}..{int(index.max())}"
        )
    if books > 1:
        index = index + torch.arange(books, device=codes.device) * entries
    return index


def decode_rows(codes: Tensor, codebook: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows ``[Co, J * d]`` behind ``codes``, without the row scale; additive stages are summed in stage order."""
    rows = codebook.to(dtype).flatten(0, 1)[entry_index(codes, codebook)]
    if codes.dim() == 3:
        stages = rows.unbind(2)
        rows = stages[0]
        for stage in stages[1:]:
            rows = rows + stage
    return rows.flatten(1)


def pq_decode(codes: Tensor, codebook: Tensor, scale: Tensor | None = None) -> Tensor:
    """The dense weight ``[Co, J * d]`` in the dtype of ``codebook``."""
    check_finite(scale, "pq_decode", "scale")
    dtype = compute_dtype(codebook, scale)
    rows = decode_rows(codes, codebook, dtype)
    if scale is not None:
        rows = rows * scale.to(dtype).unsqueeze(1)
    return rows.to(codebook.dtype)


def pq_conv2d(
    x: Tensor,
    codes: Tensor,
    codebook: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    act: str = "none",
    algo: str = "auto",
) -> Tensor:
    """``act(conv2d(x, W(codes)) * scale + bias)`` for ``x`` ``[N, Ci, H, W]``."""
    check_finite(scale, "pq_conv2d", "scale")
    dtype = compute_dtype(x, codebook, scale, bias)
    channels = x.shape[1] // groups
    columns = channels * kernel_size[0] * kernel_size[1]
    weight = decode_rows(codes, codebook, dtype)[:, :columns].reshape(-1, channels, *kernel_size)
    z = F.conv2d(x.to(dtype), weight, None, stride, padding, dilation, groups)
    if scale is not None:
        z = z * scale.to(dtype).view(-1, 1, 1)
    if bias is not None:
        z = z + bias.to(dtype).view(-1, 1, 1)
    return activate(z, act).to(x.dtype)


def pq_linear(
    x: Tensor,
    codes: Tensor,
    codebook: Tensor,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
    act: str = "none",
    algo: str = "auto",
) -> Tensor:
    """``act(x @ W(codes).T * scale + bias)`` for ``x`` ``[..., Ci]``."""
    check_finite(scale, "pq_linear", "scale")
    dtype = compute_dtype(x, codebook, scale, bias)
    weight = decode_rows(codes, codebook, dtype)[:, : x.shape[-1]]
    z = x.to(dtype) @ weight.T
    if scale is not None:
        z = z * scale.to(dtype)
    if bias is not None:
        z = z + bias.to(dtype)
    return activate(z, act).to(x.dtype)


def check_index(idx: Tensor, rows: int) -> None:
    """Refuse row numbers outside ``[0, rows)``."""
    if idx.numel() and (int(idx.min()) < 0 or int(idx.max()) >= rows):
        raise IndexError(f"idx: must lie in [0, {rows}), got {int(idx.min())}..{int(idx.max())}")


def pq_embedding(
    idx: Tensor, codes: Tensor, codebook: Tensor, scale: Tensor | None = None, padding_idx: int | None = None
) -> Tensor:
    """Decoded rows ``[*idx.shape, J * d]`` for ``idx`` of any shape; rows at ``padding_idx`` are zero.

    Only the codes of rows that are looked up, and not padding, are read and checked.
    """
    check_index(idx, codes.shape[0])
    check_finite(scale, "pq_embedding", "scale")
    flat = idx.long().flatten()
    kept = (
        torch.arange(flat.numel(), device=flat.device) if padding_idx is None else (flat != padding_idx).nonzero()[:, 0]
    )
    rows = pq_decode(codes[flat[kept]], codebook, None if scale is None else scale[flat[kept]])
    y = rows.new_zeros(flat.numel(), rows.shape[1]).index_put((kept,), rows)
    return y.reshape(*idx.shape, rows.shape[1])


def bag_of_each(offsets: Tensor, count: int) -> Tensor:
    """Bag number of each of ``count`` indices, for ``offsets`` that start every bag."""
    return torch.searchsorted(offsets.long(), torch.arange(count, device=offsets.device), right=True) - 1


def check_offsets(offsets: Tensor, count: int) -> None:
    """Refuse bag starts that do not begin at 0, that fall, or that point behind the indices."""
    if not offsets.numel():
        if count:
            raise ValueError(f"offsets: must name at least one bag for {count} indices, got none")
        return
    if int(offsets[0]) != 0:
        raise ValueError(f"offsets: must start at 0, got {int(offsets[0])}")
    if bool((offsets[1:] < offsets[:-1]).any()) or int(offsets[-1]) > count:
        raise ValueError(f"offsets: must not fall and must not exceed {count} indices")


def pq_embedding_bag(
    idx: Tensor,
    codes: Tensor,
    codebook: Tensor,
    offsets: Tensor,
    scale: Tensor | None = None,
    mode: str = "mean",
    per_sample_weights: Tensor | None = None,
    padding_idx: int | None = None,
) -> Tensor:
    """Sums or means ``[bags, J * d]`` of decoded rows; ``idx`` ``[n]``, ``offsets`` ``[bags]`` starts of the bags.

    Indices equal to ``padding_idx`` count neither in the sum nor in the mean; an empty bag is zero.
    """
    check_index(idx, codes.shape[0])
    check_offsets(offsets, idx.numel())
    check_finite(scale, "pq_embedding_bag", "scale")
    dtype = compute_dtype(codebook, scale, per_sample_weights)
    bags = bag_of_each(offsets, idx.numel())
    if padding_idx is not None:
        kept = idx != padding_idx
        idx, bags = idx[kept], bags[kept]
        per_sample_weights = None if per_sample_weights is None else per_sample_weights[kept]
    rows = decode_rows(codes[idx.long()], codebook, dtype)
    if scale is not None:
        rows = rows * scale[idx.long()].to(dtype).unsqueeze(1)
    if per_sample_weights is not None:
        rows = rows * per_sample_weights.to(dtype).unsqueeze(1)
    y = torch.zeros(offsets.numel(), rows.shape[1], dtype=dtype, device=rows.device).index_add(0, bags, rows)
    if mode == "mean":
        counts = torch.bincount(bags, minlength=offsets.numel()).clamp(min=1)
        y = y / counts.unsqueeze(1)
    return y.to(codebook.dtype)
