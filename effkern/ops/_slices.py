"""What "the first c_in x c_out channels" of a weight and a bias are (C++ twin: ``csrc/sliced_conv/slice.cpp``)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from effkern.ops import _checks as check

GROUP_MODES = ("prefix_groups", "within_group")


def check_group_mode(group_mode: str, op: str) -> None:
    check.check_choice(group_mode, GROUP_MODES, op, "group_mode")


def check_slice(
    op: str,
    weight: Tensor,
    c_in: int,
    c_out: int,
    groups: int,
    group_mode: str,
    names: tuple[str, str] = ("x's channels", "c_out"),
) -> None:
    """Refuse widths that a weight ``[Co, Ci / groups, ...]`` cannot run at; ``names`` are for the message."""
    outs, ins = weight.size(0), weight.size(1)
    check_group_mode(group_mode, op)
    if c_in < 0 or c_in > ins * groups:
        raise ValueError(f"{op}: {names[0]} must be in [0, {ins * groups}], got {c_in}")
    if c_out < 0 or c_out > outs:
        raise ValueError(f"{op}: {names[1]} must be in [0, {outs}], got {c_out}")
    if groups == 1:
        return
    if group_mode == "within_group":
        if c_in % groups or c_out % groups:
            both = f"{names[0]} and {names[1]}"
            raise ValueError(f"{op}: {both} must be multiples of groups = {groups}, got {c_in} and {c_out}")
    elif ins == 0 or c_in % ins:
        raise ValueError(f"{op}: {names[0]} must be a multiple of the {ins} channels of a group, got {c_in}")
    elif c_out != c_in // ins * (outs // groups):
        raise ValueError(
            f"{op}: {names[1]} must be {c_in // ins * (outs // groups)} where {names[0]} are {c_in}, got {c_out}"
        )


def slice_weight(weight: Tensor, c_in: int, c_out: int, groups: int, group_mode: str) -> tuple[Tensor, int]:
    """The running part of a weight and the number of groups it runs with.

    Without groups the first ``c_out x c_in`` part. ``prefix_groups``: channels per group are fixed and the first
    ``c_in / in_per_group`` groups run. ``within_group``: every group runs, with a prefix inside.
    """
    if groups == 1:
        return weight[:c_out, :c_in], 1
    if group_mode == "prefix_groups":
        return weight[:c_out], c_in // weight.size(1)
    per_group = weight.unflatten(0, (groups, weight.size(0) // groups))
    return per_group[:, : c_out // groups, : c_in // groups].flatten(0, 1), groups


def unslice_weight(part: Tensor, weight: Tensor, c_in: int, c_out: int, groups: int, group_mode: str) -> Tensor:
    """Puts a gradient of the running part into zeros of the whole weight's shape: the transpose of ``slice_weight``."""
    outs, ins = weight.size(0), weight.size(1)
    if groups == 1:
        return F.pad(part, (0, 0, 0, 0, 0, ins - c_in, 0, outs - c_out))
    if group_mode == "prefix_groups":
        return F.pad(part, (0, 0, 0, 0, 0, 0, 0, outs - c_out))
    part = part.unflatten(0, (groups, c_out // groups))
    return F.pad(part, (0, 0, 0, 0, 0, ins - c_in // groups, 0, (outs - c_out) // groups)).flatten(0, 1)


def slice_bias(bias: Tensor, c_out: int, groups: int, group_mode: str) -> Tensor:
    """The elements of a whole layer's bias that belong to the running outputs, as ``slice_weight`` takes its rows."""
    if groups == 1 or group_mode == "prefix_groups":
        return bias[:c_out]
    return bias.unflatten(0, (groups, bias.size(0) // groups))[:, : c_out // groups].flatten()


def unslice_bias(part: Tensor, size: int, groups: int, group_mode: str) -> Tensor:
    """Puts a gradient of the running elements into ``size`` zeros: the transpose of ``slice_bias``."""
    if groups == 1 or group_mode == "prefix_groups":
        return F.pad(part, (0, size - part.size(0)))
    part = part.unflatten(0, (groups, part.size(0) // groups))
    return F.pad(part, (0, size // groups - part.size(1))).flatten()
