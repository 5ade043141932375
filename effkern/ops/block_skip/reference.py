"""Block skipping in plain PyTorch: the definition, the oracle of the tests and the fallback.

Any dtype, any device, differentiable by autograd. float16 and bfloat16 inputs are computed in float32 and rounded once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from effkern.ops._autograd import activate, compute_dtype
from effkern.ops._handle import check_handle, unpack_conv_weight

CONVS = {"basic": 2, "bottleneck": 3}


def check_keep(keep: Tensor) -> None:
    """Refuse a mask with entries outside [0, 1].

    Raises:
        ValueError: for NaN, negative entries and entries above 1 (uint8 7 is no truth value here).
    """
    if keep.dtype == torch.bool or keep.numel() == 0:
        return
    bad = ~((keep >= 0) & (keep <= 1))
    if bool(bad.any()):
        raise ValueError(f"keep: entries must be in [0, 1], got {keep[bad][0].item()}")


def compact(keep: Tensor) -> tuple[Tensor, Tensor]:
    """Ascending row numbers of the non-zero entries, padded with -1, and how many there are."""
    check_keep(keep)
    kept = (keep if keep.dim() == 1 else keep.t()) != 0
    rows = torch.arange(kept.shape[-1], device=keep.device).expand_as(kept)
    # A stable sort by "dropped" brings the kept rows to the front in ascending order.
    order = torch.argsort((~kept).to(torch.uint8), dim=-1, stable=True)
    count = kept.sum(-1)
    idx = torch.where(rows < count.unsqueeze(-1), order, -1)
    return idx.to(torch.int32), count.to(torch.int32)


def blend(keep: Tensor, new: Tensor, old: Tensor) -> Tensor:
    """``keep * new + (1 - keep) * old`` per sample; exactly ``new`` at 1 and exactly ``old`` at 0, whatever the other
    holds.

    The gradient of a float ``keep`` follows the formula everywhere, also where its value is 0 or 1.
    """
    keep = keep.reshape(-1, *[1] * (new.dim() - 1))
    if keep.dtype == torch.bool:
        return torch.where(keep, new, old)
    m = keep.to(new.dtype)
    fixed = m.detach()
    y = torch.where(fixed == 1, new, torch.where(fixed == 0, old, fixed * new + (1 - fixed) * old))
    if keep.requires_grad:
        # Adds exactly 0; its derivative is <gy, new - old>.
        y = y + (m - fixed) * (new - old).detach().nan_to_num(0.0, 0.0, 0.0)
    return y


def strides_of(weights: int, stride: int) -> list[int]:
    """Stride of each convolution: on the first of a basic block, on the 3x3 of a bottleneck."""
    return [stride, 1] if weights == 2 else [1, stride, 1]


def dense_weights(weights: Sequence[Tensor], biases: Sequence[Tensor], c_in: int, dtype: torch.dtype) -> list[Tensor]:
    """The weights of a block in ``dtype``, handles unpacked.

    Raises:
        ValueError: for a handle that is corrupt, of another convolution, or packed with a bias.
    """
    dense = []
    for i, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        if weight.dim() == 1:
            kernel = [3, 3] if len(weights) == 2 or i == 1 else [1, 1]
            if check_handle(weight, bias.numel(), kernel, 1, f"w{i + 1}") != c_in:
                raise ValueError(f"w{i + 1} was packed for another number of input channels than {c_in}")
            weight, packed_bias = unpack_conv_weight(weight, bias.numel(), c_in, kernel, 1)
            if packed_bias is not None:
                raise ValueError(f"w{i + 1} was packed with a bias; pack it without, b{i + 1} is given")
        dense.append(weight.to(dtype))
        c_in = bias.numel()
    return dense


def branch(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], stride: int, act: str) -> Tensor:
    """``f(x)``: the convolutions with the activation between them, none after the last."""
    for i, step in enumerate(strides_of(len(weights), stride)):
        x = activate(x, act) if i else x
        x = F.conv2d(x, weights[i], biases[i], stride=step, padding=weights[i].shape[2] // 2)
    return x


def _skip_block(
    x: Tensor,
    keep: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    stride: int,
    res: Tensor | None,
    act: str,
) -> Tensor:
    check_keep(keep)
    dtype = compute_dtype(x)
    shortcut = (x if res is None else res).to(dtype)
    weights, biases = dense_weights(weights, biases, x.shape[1], dtype), [b.to(dtype) for b in biases]
    # Only the rows that count are touched: a NaN in a dropped sample must not reach the weight gradients as 0 * NaN.
    rows = (torch.ones_like(keep) if keep.requires_grad else keep).nonzero().flatten()
    if rows.numel() == 0 or shortcut.numel() == 0:
        return shortcut.clone().to(x.dtype)
    old = shortcut.index_select(0, rows)
    new = activate(branch(x.index_select(0, rows).to(dtype), weights, biases, stride, act) + old, act)
    return shortcut.index_copy(0, rows, blend(keep.index_select(0, rows), new, old)).to(x.dtype)


def skip_basic_block(
    x: Tensor,
    keep: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    stride: int,
    res: Tensor | None,
    act: str,
    algo: str,
) -> Tensor:
    """Two 3x3 convolutions with a residual sum, for the kept samples."""
    return _skip_block(x, keep, [w1, w2], [b1, b2], stride, res, act)


def skip_bottleneck(
    x: Tensor,
    keep: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    w3: Tensor,
    b3: Tensor,
    stride: int,
    res: Tensor | None,
    act: str,
    algo: str,
) -> Tensor:
    """1x1, 3x3 and 1x1 convolutions with a residual sum, for the kept samples."""
    return _skip_block(x, keep, [w1, w2, w3], [b1, b2, b3], stride, res, act)


def skip_stage(
    x: Tensor, keep: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], kind: str, act: str, algo: str
) -> Tensor:
    """The identity blocks of one stage, one after the other; 16-bit storage is rounded once, after the last."""
    check_keep(keep)
    n = CONVS[kind]
    y = x.to(compute_dtype(x))
    for k in range(keep.shape[1]):
        y = _skip_block(y, keep[:, k], weights[n * k : n * k + n], biases[n * k : n * k + n], 1, None, act)
    return (y.clone() if y is x else y).to(x.dtype)
