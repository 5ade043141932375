"""A whole slimmable network in one call, every sample in its own configuration of widths."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from effkern.ops import _checks as check
from effkern.ops._autograd import compute_dtype
from effkern.ops._handle import check_bytes, unpack_conv_weight
from effkern.ops._handle import check_handle as check_header
from effkern.ops._registry import Op, empty_like_layout
from effkern.ops.sliced_conv import composed, reference
from effkern.ops.sliced_conv._checks import check_indices, check_range
from effkern.ops.sliced_conv.steps import AttentionStep, SlicedStep, Step, read_steps, write_steps

Ints = Sequence[int]
_OP = "sliced_chain"


def _check_handle(handles: Sequence[Tensor], index: int, dims: tuple[int, int, int, int, int], x: Tensor) -> None:
    if not 0 <= index < len(handles):
        raise ValueError(f"{_OP}: the handle of a step must be in [0, {len(handles) - 1}], got {index}")
    handle = handles[index]
    if handle.dim() != 1 or handle.dtype != torch.uint8:
        raise TypeError(f"{_OP}: handles must be 1-d uint8 tensors made by pack_conv_weight, got {handle.dtype}")
    check.check_device(handle, x, _OP, "handles")
    if any(not 1 <= d < check.LIMIT for d in dims):
        raise ValueError(f"{_OP}: a step must have dimensions from 1 on, got {dims}")
    check_bytes(handle, dims, _OP, f"handles[{index}]")


def _check_conv(step: SlicedStep, widths: Ints, x: Tensor, handles: Sequence[Tensor], tables: Sequence[Tensor]) -> None:
    outs, ins, kh, kw = step.weight_shape
    if step.groups != 1 and (step.groups != outs or ins != 1):
        raise ValueError(f"{_OP}: groups of a step must be 1, or its channels where it is depthwise, got {step.groups}")
    _check_handle(handles, step.handle, (outs, ins, kh, kw, step.groups), x)
    check.check_geometry(step.stride, step.padding, step.dilation, _OP)
    for before, width in zip(widths, step.widths, strict=True):
        if before > ins * step.groups or not 1 <= width <= outs or (step.groups > 1 and before != width):
            raise ValueError(f"{_OP}: a step of weight {step.weight_shape} cannot turn {before} channels into {width}")
    if not -1 <= step.table < len(tables) // 2:
        raise ValueError(f"{_OP}: the tables of a step must be in [-1, {len(tables) // 2 - 1}], got {step.table}")
    if step.table >= 0:
        for t in tables[2 * step.table : 2 * step.table + 2]:
            if t.dim() != 2 or t.size(1) < max(step.widths):
                raise ValueError(
                    f"{_OP}: tables must be 2-d [W, C] with C at least {max(step.widths)}, got shape {list(t.shape)}"
                )


def _fake(x: Tensor, handles: Sequence[Tensor], tables: Sequence[Tensor], width_idx: Tensor, steps: Ints) -> Tensor:
    check.check_map(x, _OP)
    check_indices(width_idx, x, _OP, "width_idx")
    configurations, chain = read_steps(steps)
    if len(tables) % 2:
        raise ValueError(f"{_OP}: tables must be pairs of scale and shift, got {len(tables)}")
    for t in tables:
        if t.dim() != 2 or t.size(0) not in (1, configurations):
            raise ValueError(f"{_OP}: tables must be 2-d with 1 row or {configurations}, got shape {list(t.shape)}")
        if t.dtype not in (torch.float32, x.dtype):
            raise TypeError(f"{_OP}: tables must be float32 or have x's dtype {x.dtype}, got {t.dtype}")
        check.check_device(t, x, _OP, "tables")
    widths: Ints = [x.size(1)] * configurations
    rows, columns = x.size(2), x.size(3)
    for step in chain:
        if isinstance(step, SlicedStep):
            _check_conv(step, widths, x, handles, tables)
            widths = step.widths
            value = x.new_empty([0, 1, rows, columns])
            rows, columns = check.output_map(
                value, step.weight_shape[2:], step.stride, step.padding, step.dilation, _OP
            )
        elif isinstance(step, AttentionStep):
            _check_handle(handles, step.reduce, (step.hidden, step.channels, 1, 1, 1), x)
            _check_handle(handles, step.expand, (step.channels, step.hidden, 1, 1, 1), x)
            if max(widths) > step.channels:
                raise ValueError(f"{_OP}: a step takes at most {step.channels} channels, got {max(widths)}")
        else:
            rows = columns = 1
    return empty_like_layout(x, [x.size(0), max(widths), rows, columns])


def _reference(
    x: Tensor, handles: Sequence[Tensor], tables: Sequence[Tensor], width_idx: Tensor, steps: Ints
) -> Tensor:
    return follow(x, handles, tables, width_idx, steps, _convolve, _attend)


def _convolve(
    v: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    step: SlicedStep,
    c_out: int,
    scale: Tensor | None,
    shift: Tensor | None,
) -> Tensor:
    geometry = (step.stride, step.padding, step.dilation, step.groups, "prefix_groups")
    return reference.sliced_conv2d(v, weight, bias, c_out, *geometry, scale, shift, step.act, "auto")


def _attend(v: Tensor, reduce: tuple[Tensor, Tensor | None], expand: tuple[Tensor, Tensor | None]) -> Tensor:
    def linear(v: Tensor, weight: Tensor, bias: Tensor | None, c_out: int, act: str) -> Tensor:
        one, none = (1, 1), (0, 0)
        return reference.sliced_conv2d(
            v, weight, bias, c_out, one, none, one, 1, "prefix_groups", None, None, act, "auto"
        )

    hidden = linear(v.mean((2, 3), keepdim=True), *reduce, reduce[0].size(0), "relu")
    return v * linear(hidden, *expand, v.size(1), "none").sigmoid()


def follow(
    x: Tensor,
    handles: Sequence[Tensor],
    tables: Sequence[Tensor],
    width_idx: Tensor,
    steps: Ints,
    convolve: Callable[..., Tensor],
    attend: Callable[..., Tensor],
) -> Tensor:
    """Configuration by configuration, step by step, in fp32 (or x's dtype if that is fp64)."""
    configurations, chain = read_steps(steps)
    index = check_range(width_idx, configurations - 1, _OP, "width_idx")
    for table in tables[::2]:
        check.check_finite(table, _OP, "tables")

    def unpacked(handle: int, shape: Sequence[int], groups: int = 1) -> tuple[Tensor, Tensor | None]:
        check_header(handles[handle], shape[0], shape[2:], groups, _OP)
        return unpack_conv_weight(handles[handle], shape[0], shape[1], shape[2:], groups)

    results = []
    for i in range(configurations):
        v = x[[n for n, at in enumerate(index) if at == i]].to(compute_dtype(x))
        for step in chain:
            if isinstance(step, SlicedStep):
                weight, bias = unpacked(step.handle, step.weight_shape, step.groups)
                pair = tables[2 * step.table : 2 * step.table + 2] if step.table >= 0 else ()
                rows = [t[i if t.size(0) > 1 else 0, : step.widths[i]] for t in pair] or [None, None]
                v = convolve(v, weight, bias, step, step.widths[i], *rows)
            elif isinstance(step, AttentionStep):
                reduce = unpacked(step.reduce, (step.hidden, step.channels, 1, 1))
                v = attend(v, reduce, unpacked(step.expand, (step.channels, step.hidden, 1, 1)))
            else:
                v = v.mean((2, 3), keepdim=True)
        results.append(v)
    most = max(v.size(1) for v in results)
    y = results[0].new_zeros([x.size(0), most, *results[0].shape[2:]])
    for i, v in enumerate(results):
        y[[n for n, at in enumerate(index) if at == i], : v.size(1)] = v
    return y.to(x.dtype)


def _save_nothing(ctx: Any, inputs: tuple, output: Tensor) -> None:
    pass


def _refuse(ctx: Any, grad: Tensor) -> tuple:
    raise RuntimeError("sliced_chain has no gradient: train with sliced_conv2d")


_chain = Op(
    _OP,
    "(Tensor x, Tensor[] handles, Tensor[] tables, Tensor width_idx, int[] steps) -> Tensor",
    fake=_fake,
    reference=_reference,
    composed=composed.sliced_chain,
    setup_context=_save_nothing,
    backward=_refuse,
    autocast=("x",),
)


def sliced_chain(
    x: Tensor,
    handles: Sequence[Tensor],
    tables: Sequence[Tensor],
    width_idx: Tensor,
    steps: Sequence[Step],
) -> Tensor:
    """Run a slimmable network in one call: sliced convolutions that feed one another, a configuration a sample.

    A configuration is one entry of every step's ``widths``. Samples of the same one go together, but each alone from
    step to step as long as its maps are large, so that what lies between the steps stays in a core's cache. It has
    exactly the running channels, is fp32 and never becomes a tensor: there are no tails to write or to read over.

    Args:
        x: ``[N, C, H, W]``, float32, bfloat16 or float16, any strides; all configurations read all channels.
        handles: weights and biases packed by `pack_conv_weight`.
        tables: pairs of scale and shift, each ``[W, C]`` with a row a configuration or ``[1, C]``, float32 or x's
            dtype; the scales must be finite.
        width_idx: ``[N]``, int32 or int64 on x's device: the configuration of every sample.
        steps: `SlicedStep`, `AttentionStep` and `MeanStep` in order; the first and the last are convolutions.

    Returns:
        ``[N, max of the last widths, Ho, Wo]`` in x's dtype and layout, with exact zeros past a sample's width. A
        sample's result does not depend on the other samples or on the number of threads, bit for bit; in float32 and
        without attention and means it is that of `sliced_conv2d_packed` step by step.

    Raises:
        ValueError: numbers, shapes or handles that do not fit; names the sample of a wrong index.
        TypeError: a dtype that is not supported.

    Not differentiable; a backward pass through it raises ``RuntimeError``.

    Source: DS-Net (Li et al., CVPR 2021), whose gate chooses a configuration for every image.

    >>> import torch
    >>> from effkern.ops import pack_conv_weight
    >>> handle = pack_conv_weight(torch.ones(4, 4, 1, 1))
    >>> steps = [SlicedStep(0, (4, 4, 1, 1), (2, 4)), SlicedStep(0, (4, 4, 1, 1), (1, 1))]
    >>> sliced_chain(torch.ones(2, 4, 1, 1), [handle], [], torch.tensor([1, 0]), steps).flatten()
    tensor([16.,  8.])
    """
    return _chain(x, list(handles), list(tables), width_idx, write_steps(steps))
