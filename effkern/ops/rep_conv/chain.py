"""Many convolutions that feed one another in one call: what is between them never becomes a tensor."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from effkern.ops import _checks as check
from effkern.ops._autograd import compute_dtype
from effkern.ops._handle import check_bytes
from effkern.ops._registry import Op
from effkern.ops.rep_conv import composed, reference

Ints = Sequence[int]


class ConvStep(NamedTuple):
    """One convolution of a chain, ``act(conv2d(x) + bias + residual)``.

    Values are numbered: 0 is the chain's ``x``, then come its ``others``, then the results of the steps in order.

    Attributes:
        x: number of the value that is convolved.
        handle: index of the weight.
        out_channels, kernel_size, groups: of the packed weight.
        stride, padding, dilation: rows and columns.
        act: the activation.
        residual: number of the value that is added before it; -1 for none.
    """

    x: int
    handle: int
    out_channels: int
    kernel_size: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    act: str = "relu"
    residual: int = -1


class AverageStep(NamedTuple):
    """Averages over windows in a chain, as ``avg_pool2d`` without padding takes them.

    Attributes:
        x: number of the value that is averaged.
        out_channels: of the result; those that the value lacks are zero.
        kernel_size: rows and columns of a window; ``(0, 0)`` is the whole map.
        stride: rows and columns.
        ceil_mode: whether a last window may reach past the map; only what lies on it is averaged.
    """

    x: int
    out_channels: int
    kernel_size: tuple[int, int] = (0, 0)
    stride: tuple[int, int] = (1, 1)
    ceil_mode: bool = False


Step = ConvStep | AverageStep


def write_steps(steps: Sequence[Step]) -> str:
    """Steps as the operator takes them. One string is read in less time than a list of as many numbers is converted."""
    text = ""
    for s in steps:
        if isinstance(s, AverageStep):
            numbers = (s.x, -1, -1, s.out_channels, *s.kernel_size, *s.stride, 0, 0, 1, 1, 1)
            text += " ".join(map(str, numbers)) + (" meanup;" if s.ceil_mode else " mean;")
            continue
        geometry = (*s.kernel_size, *s.stride, *s.padding, *s.dilation, s.groups)
        text += " ".join(map(str, (s.x, s.residual, s.handle, s.out_channels, *geometry, s.act))) + ";"
    return text


def read_steps(text: str) -> list[Step]:
    """The inverse of :func:`write_steps`."""
    steps: list[Step] = []
    *lines, rest = text.split(";")
    for line in lines:
        try:
            *numbers, act = line.split()
            x, residual, handle, outs, kh, kw, sh, sw, ph, pw, dh, dw, groups = map(int, numbers)
        except ValueError:
            raise ValueError(f"rep_conv2d_chain: steps must be 13 numbers and a name each, got {line!r}") from None
        if act in ("mean", "meanup"):
            if (residual, handle, ph, pw, dh, dw, groups) != (-1, -1, 0, 0, 1, 1, 1):
                raise ValueError(
                    "rep_conv2d_chain: a step that averages must have residual and handle -1, no padding, dilation 1 "
                    f"and 1 group, got {line!r}"
                )
            steps.append(AverageStep(x, outs, (kh, kw), (sh, sw), act == "meanup"))
            continue
        steps.append(ConvStep(x, handle, outs, (kh, kw), (sh, sw), (ph, pw), (dh, dw), groups, act, residual))
    if rest:
        raise ValueError(f"rep_conv2d_chain: steps must end in ';', got {rest!r}")
    return steps


def _fake(x: Tensor, others: Sequence[Tensor], handles: Sequence[Tensor], steps: str, outputs: Ints) -> list[Tensor]:
    op = "rep_conv2d_chain"
    check.check_map(x, op)
    for other in others:
        check.check_map(other, op, "others")
        check.check_dtype(other, op, "others", x.dtype)
        check.check_device(other, x, op, "others")
    values = [x, *others]
    given = len(values)
    for i, step in enumerate(read_steps(steps)):
        residual = -1 if isinstance(step, AverageStep) else step.residual
        if not 0 <= step.x < len(values) or not -1 <= residual < len(values):
            raise ValueError(f"{op}: step {i} must read values below {len(values)}, got {step.x} and {residual}")
        if isinstance(step, AverageStep):
            values.append(_mean_result(step, i, values[step.x], op))
            continue
        if not 0 <= step.handle < len(handles):
            raise ValueError(f"{op}: step {i} must use one of {len(handles)} handles, got {step.handle}")
        values.append(_result(step, i, values, handles[step.handle], op))
    if len(set(outputs)) != len(outputs) or any(not 0 <= o < len(values) - given for o in outputs):
        raise ValueError(f"{op}: outputs must be different steps below {len(values) - given}, got {list(outputs)}")
    return [values[given + o] for o in outputs]


def _result(step: ConvStep, index: int, values: Sequence[Tensor], handle: Tensor, op: str) -> Tensor:
    x = values[step.x]
    if handle.dim() != 1 or handle.dtype != torch.uint8:
        raise TypeError(f"{op}: handles must be 1-d uint8 tensors made by pack_conv_weight, got {handle.dtype}")
    check.check_device(handle, x, op, "handles")
    if step.groups < 1 or step.out_channels < 0 or step.out_channels % step.groups or x.size(1) % step.groups:
        raise ValueError(f"{op}: groups of step {index} must divide its channels, got {step.groups}")
    check.check_geometry(step.stride, step.padding, step.dilation, op)
    check.check_act(step.act, op)
    rows, columns = check.output_map(x, step.kernel_size, step.stride, step.padding, step.dilation, op)
    dims = (step.out_channels, x.size(1) // step.groups, *step.kernel_size, step.groups)
    check_bytes(handle, dims, op, f"the handle of step {index}")
    shape = [x.size(0), step.out_channels, rows, columns]
    if step.residual >= 0 and list(values[step.residual].shape) != shape:
        raise ValueError(
            f"{op}: the residual of step {index} must have the shape of its result {shape}, got "
            f"{list(values[step.residual].shape)}"
        )
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def _windows(size: int, kernel: int, stride: int, up: bool) -> int:
    """How many windows fit; up: as many as begin on the map, as with ``ceil_mode``."""
    count = (size - kernel + (stride - 1 if up else 0)) // stride + 1
    return count - bool(up and (count - 1) * stride >= size)


def _mean_result(step: AverageStep, index: int, x: Tensor, op: str) -> Tensor:
    (kh, kw), channels = step.kernel_size, x.size(1)
    if kh < 0 or kw < 0 or (kh == 0) != (kw == 0):
        raise ValueError(f"{op}: the kernel of step {index} must be positive, or 0x0 for the whole map, got {kh}x{kw}")
    if step.out_channels < channels:
        raise ValueError(
            f"{op}: step {index} must have as many channels as its input, {channels}, or more, got {step.out_channels}"
        )
    check.check_geometry(step.stride, (0, 0), (1, 1), op)
    size = [1, 1]
    if kh > 0:
        size = [
            _windows(*numbers, step.ceil_mode)
            for numbers in zip(x.shape[2:], step.kernel_size, step.stride, strict=True)
        ]
    if min(size) < 1 or min(x.shape[2:]) == 0:
        raise ValueError(
            f"{op}: the input of step {index} ({x.size(2)}x{x.size(3)}) is smaller than its kernel ({kh}x{kw})"
        )
    shape = [x.size(0), step.out_channels, *size]
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def _mean(x: Tensor, step: AverageStep) -> Tensor:
    kernel = step.kernel_size if any(step.kernel_size) else tuple(x.shape[2:])
    stride = step.stride if any(step.kernel_size) else kernel
    y = F.avg_pool2d(x, kernel, stride, ceil_mode=step.ceil_mode)
    return F.pad(y, (0, 0, 0, 0, 0, step.out_channels - x.size(1)))


def _reference(
    x: Tensor, others: Sequence[Tensor], handles: Sequence[Tensor], steps: str, outputs: Ints
) -> list[Tensor]:
    def convolve(value: Tensor, handle: Tensor, step: ConvStep, residual: Tensor | None) -> Tensor:
        geometry = (step.kernel_size, step.stride, step.padding, step.dilation, step.groups)
        return reference.rep_conv2d_packed(value, handle, step.out_channels, *geometry, step.act, residual)

    return _follow([x, *others], handles, steps, outputs, convolve)


def _composed(
    x: Tensor, others: Sequence[Tensor], handles: Sequence[Tensor], steps: str, outputs: Ints
) -> list[Tensor]:
    """In calls of other operators (CUDA): values between the steps have x's dtype."""

    def convolve(value: Tensor, handle: Tensor, s: ConvStep, residual: Tensor | None) -> Tensor:
        geometry = (s.kernel_size, s.stride, s.padding, s.dilation, s.groups)
        return composed.rep_conv2d_packed(value, handle, s.out_channels, *geometry, s.act, residual, "auto")

    values = [v.contiguous(memory_format=torch.channels_last) for v in (x, *others)]
    return _follow(values, handles, steps, outputs, convolve, x.dtype)


def _follow(
    values: list[Tensor],
    handles: Sequence[Tensor],
    steps: str,
    outputs: Ints,
    convolve: Callable[..., Tensor],
    math: torch.dtype | None = None,
) -> list[Tensor]:
    """Step by step in ``math``, by default fp32 or fp64. Only what is returned is rounded to the inputs' dtype."""
    given, dtype = len(values), values[0].dtype
    math = math or compute_dtype(values[0])
    values = list(values)
    for i, step in enumerate(read_steps(steps)):
        if isinstance(step, AverageStep):
            y = _mean(values[step.x].to(math), step)
            values.append(y.to(dtype) if i in outputs else y)
            continue
        residual = None if step.residual < 0 else values[step.residual].to(math)
        y = convolve(values[step.x].to(math), handles[step.handle], step, residual)
        values.append(y.to(dtype) if i in outputs else y)
    return [values[given + o] for o in outputs]


def _save(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    x, others, handles, ctx.steps, ctx.outputs = inputs
    ctx.save_for_backward(x, *others, *handles)
    ctx.others = len(others)


def _backward(ctx: Any, grads: Sequence[Tensor | None]) -> tuple[Any, ...]:
    # Nothing in between was kept: the chain runs again, one convolution a call, and is differentiated.
    x, *rest = ctx.saved_tensors
    others, handles = rest[: ctx.others], rest[ctx.others :]

    def convolve(value: Tensor, handle: Tensor, s: ConvStep, residual: Tensor | None) -> Tensor:
        geometry = (list(s.kernel_size), list(s.stride), list(s.padding), list(s.dilation), s.groups)
        op = torch.ops.effkern.rep_conv2d_packed.default
        return op(value, handle, s.out_channels, *geometry, s.act, residual, "auto")

    with torch.enable_grad():
        sources = [t.detach().requires_grad_() for t in (x, *others)]
        results = _follow(sources, handles, ctx.steps, ctx.outputs, convolve)
        wanted = [(y, g) for y, g in zip(results, grads, strict=True) if g is not None]
    found = torch.autograd.grad(
        [y for y, _ in wanted], sources, [g for _, g in wanted], allow_unused=True, materialize_grads=True
    )
    return found[0], list(found[1:]), [None] * len(handles), None, None


_chain_op = Op(
    "rep_conv2d_chain",
    "(Tensor x, Tensor[] others, Tensor[] handles, str steps, int[] outputs) -> Tensor[]",
    fake=_fake,
    reference=_reference,
    composed=_composed,
    setup_context=_save,
    backward=_backward,
    autocast=("x", "others"),
)


def rep_conv2d_chain(
    x: Tensor,
    handles: Sequence[Tensor],
    steps: Sequence[Step],
    outputs: Sequence[int] | None = None,
    others: Sequence[Tensor] = (),
) -> list[Tensor]:
    """Run convolutions that feed one another: :func:`rep_conv2d_packed` step by step, in one call.

    A call of an operator costs about as much as a convolution of 0.4 million multiply-adds; a chain pays it once. Maps
    that are not returned are fp32 in scratch memory, which is used again as soon as they are done with; in float32 the
    results are those of single calls, bit for bit.

    Args:
        x: ``[n, c, h, w]``, float32, bfloat16 or float16, any strides.
        handles: weights packed by :func:`pack_conv_weight`.
        steps: the convolutions in order, and averages (:class:`AverageStep`) among them.
        outputs: indices of the steps whose results are returned, each once. Default: the last one.
        others: further maps of x's dtype that steps read.

    Returns:
        The results of ``outputs``, in x's dtype and channels_last.

    Raises:
        ValueError: for numbers, shapes, geometry or handles that do not fit.
        TypeError: for other dtypes.

    Differentiable (once) in x and others; nothing in between is kept for it, the chain runs again.

    >>> from effkern.ops import pack_conv_weight
    >>> handle = pack_conv_weight(torch.full((4, 4, 1, 1), 0.5))
    >>> steps = [ConvStep(0, 0, 4, (1, 1)), ConvStep(1, 0, 4, (1, 1), act="none", residual=0)]
    >>> rep_conv2d_chain(torch.ones(1, 4, 1, 1), [handle], steps)[0].flatten().tolist()
    [5.0, 5.0, 5.0, 5.0]
    """
    indices = [len(steps) - 1] if outputs is None else list(outputs)
    return _chain_op(x, list(others), list(handles), write_steps(steps), indices)
