"""Argument checks of the sliced ops: shapes and dtypes for the fakes, widths for the reference kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from effkern.ops import _checks as check


def check_bias(
    bias: Tensor | None, weight: Tensor, c_out: int, groups: int, group_mode: str, x: Tensor, op: str
) -> None:
    """The running outputs must be in it; with a prefix inside every group those are not the leading ones."""
    whole = groups > 1 and group_mode == "within_group"
    check.check_vector(bias, weight.size(0) if whole else c_out, x, op, "bias", exact=whole)


def check_indices(indices: Tensor, x: Tensor, op: str, name: str) -> None:
    if indices.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{op}: {name} must be int32 or int64, got {indices.dtype}")
    if indices.dim() != 1 or indices.size(0) != x.size(0):
        raise ValueError(f"{op}: {name} must have shape [{x.size(0)}], got {list(indices.shape)}")
    check.check_device(indices, x, op, name)


def check_widths(x: Tensor, outs: int, c_in: Tensor, c_out: Tensor, c_out_max: int, op: str) -> None:
    check_indices(c_in, x, op, "c_in")
    check_indices(c_out, x, op, "c_out")
    if c_out_max < 0 or c_out_max > outs:
        raise ValueError(f"{op}: c_out_max must be in [0, {outs}], got {c_out_max}")


def check_tables(
    x: Tensor, columns: int, scale: Tensor | None, shift: Tensor | None, width_idx: Tensor | None, op: str
) -> None:
    """Tables ``[W, >= columns]`` with as many rows, and a row for every sample if there is a table."""
    tables = [(t, name) for t, name in ((scale, "scale_table"), (shift, "shift_table")) if t is not None]
    for table, name in tables:
        if table.dim() != 2 or table.size(1) < columns:
            raise ValueError(
                f"{op}: {name} must be 2-d [W, C] with C at least c_out_max = {columns}, got shape {list(table.shape)}"
            )
        if table.dtype not in (torch.float32, x.dtype):
            raise TypeError(f"{op}: {name} must be float32 or have x's dtype {x.dtype}, got {table.dtype}")
        check.check_device(table, x, op, name)
    if scale is not None and shift is not None and scale.size(0) != shift.size(0):
        rows = f"{scale.size(0)} and {shift.size(0)}"
        raise ValueError(f"{op}: scale_table and shift_table must have as many rows, got {rows}")
    if (width_idx is None) == bool(tables):
        raise ValueError(f"{op}: width_idx must be given with, and only with, tables")
    if width_idx is not None:
        check_indices(width_idx, x, op, "width_idx")


def check_range(values: Tensor, most: int, op: str, name: str) -> list[int]:
    """For reference kernels: the values as ints, each in [0, most]."""
    result = values.tolist()
    for n, value in enumerate(result):
        if not 0 <= value <= most:
            raise ValueError(f"{op}: {name}[{n}] must be in [0, {most}], got {value}")
    return result
