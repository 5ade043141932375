"""Argument checks that the fakes share. The native kernels check the same in C++ (``csrc/common/tensor.h``)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

ACTIVATIONS = ("none", "relu", "relu6", "hardswish", "silu")
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
#: A kernel, stride, padding or dilation is below this, so that products of two fit 64 bits.
LIMIT = 2**31


def pair(value: int | Sequence[int], name: str) -> list[int]:
    """``3`` or ``(3, 5)`` as two ints, the form the operators take."""
    if isinstance(value, int | torch.SymInt):
        return [value, value]  # type: ignore[list-item]
    if isinstance(value, str | torch.Tensor) or not isinstance(value, Iterable):
        raise TypeError(f"{name} must be an int or 2 ints, got {value!r}")
    values = list(value)
    if len(values) != 2:
        raise ValueError(f"{name} must be an int or 2 ints, got {tuple(values)}")
    return values


def check_dtype(tensor: Tensor, op: str, name: str, like: torch.dtype | None = None) -> None:
    """``like``: the dtype of x, which the tensor must share."""
    if tensor.dtype not in FLOATS:
        raise TypeError(f"{op}: {name} must be float32, bfloat16 or float16, got {tensor.dtype}")
    if like is not None and tensor.dtype != like:
        raise TypeError(f"{op}: {name} must have x's dtype {like}, got {tensor.dtype}")


def check_map(x: Tensor, op: str, name: str = "x") -> None:
    if x.dim() != 4:
        raise ValueError(f"{op}: {name} must be 4-d [N, C, H, W], got shape {list(x.shape)}")
    check_dtype(x, op, name)


def check_weight(
    weight: Tensor, groups: int, x: Tensor, op: str, name: str = "weight", own_dtype: bool = False
) -> None:
    """``own_dtype``: the weight's dtype may be another than x's."""
    if weight.dim() != 4:
        raise ValueError(f"{op}: {name} must be 4-d [Co, Ci/groups, kh, kw], got shape {list(weight.shape)}")
    if min(weight.shape[2:]) < 1:
        raise ValueError(f"{op}: {name} must have a kernel of at least 1x1, got shape {list(weight.shape)}")
    check_dtype(weight, op, name, None if own_dtype else x.dtype)
    check_device(weight, x, op, name)
    if groups < 1 or weight.size(0) % groups != 0:
        raise ValueError(f"{op}: groups must divide {name}'s {weight.size(0)} outputs, got {groups}")
    if groups >= LIMIT:  # divides 0 outputs
        raise ValueError(f"{op}: groups must be below 2**31, got {groups}")


def check_device(tensor: Tensor, x: Tensor, op: str, name: str) -> None:
    if tensor.device != x.device:
        raise ValueError(f"{op}: {name} must be on x's device {x.device}, got {tensor.device}")


def check_vector(vector: Tensor | None, least: int, x: Tensor, op: str, name: str, exact: bool = False) -> None:
    """A per-channel vector: float32 or x's dtype, at least (or exactly) ``least`` long."""
    if vector is None:
        return
    if vector.dim() != 1 or vector.size(0) < least or (exact and vector.size(0) != least):
        how = "exactly" if exact else "at least"
        raise ValueError(f"{op}: {name} must be 1-d with {how} {least} elements, got shape {list(vector.shape)}")
    if vector.dtype not in (torch.float32, x.dtype):
        raise TypeError(f"{op}: {name} must be float32 or have x's dtype {x.dtype}, got {vector.dtype}")
    check_device(vector, x, op, name)


def check_geometry(stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], op: str) -> None:
    for values, least, name in ((stride, 1, "stride"), (padding, 0, "padding"), (dilation, 1, "dilation")):
        if len(values) != 2 or any(v < least or v >= LIMIT for v in values):
            raise ValueError(f"{op}: {name} must be 2 ints of at least {least}, got {tuple(values)}")


def output_map(
    x: Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], op: str
) -> tuple[int, int]:
    """Height and width of the output; ``ValueError`` if the kernel does not fit the padded input."""
    if len(kernel) != 2:
        raise ValueError(f"{op}: kernel_size must have 2 values, got {len(kernel)}")
    out = []
    for i in range(2):
        span = x.size(2 + i) + 2 * padding[i] - dilation[i] * (kernel[i] - 1) - 1
        if kernel[i] < 1 or span < 0:
            raise ValueError(
                f"{op}: x of size {x.size(2 + i)} with padding {padding[i]} is smaller than the kernel of size "
                f"{kernel[i]} with dilation {dilation[i]} in dimension {2 + i}"
            )
        out.append(span // stride[i] + 1)
    return out[0], out[1]


def check_choice(value: Any, choices: Sequence[str], op: str, name: str) -> None:
    if value not in choices:
        raise ValueError(f"{op}: {name} must be one of {', '.join(choices)}, got {value!r}")


def check_act(act: str, op: str) -> None:
    check_choice(act, ACTIVATIONS, op, "act")


def check_algo(algo: str, op: str) -> None:
    check_choice(algo, ("auto", "direct"), op, "algo")


def check_finite(vector: Tensor | None, op: str, name: str) -> None:
    """For reference kernels: the data check that native kernels do in C++."""
    if vector is not None and not bool(torch.isfinite(vector).all()):
        raise ValueError(f"{op}: {name} must be finite")
