"""Per-sample block skipping: residual blocks that run only for the samples that keep them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from effkern.ops import _checks as check
from effkern.ops import _direct
from effkern.ops._registry import Op, empty_like_layout
from effkern.ops.block_skip import gradient, reference

__all__ = ["compact", "skip_basic_block", "skip_bottleneck", "skip_stage"]

KEEP_DTYPES = (torch.bool, torch.uint8, *check.FLOATS)


def _check_keep(keep: Tensor, op: str) -> None:
    if keep.dtype not in KEEP_DTYPES:
        raise TypeError(f"{op}: keep must be bool, uint8, float32, bfloat16 or float16, got {keep.dtype}")


def _is_handle(weight: Tensor) -> bool:
    return weight.dim() == 1 and weight.dtype == torch.uint8


def _check_block(
    op: str, x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], c_in: int, first: int = 1
) -> int:
    """Checks the weights of one block and returns its output channels. A handle's own shape is the kernel's to
    check."""
    for i, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        name, kernel = f"w{first + i}", 3 if len(weights) == 2 or i == 1 else 1
        if bias.dim() != 1:
            raise ValueError(f"{op}: b{first + i} must be 1-d, got shape {list(bias.shape)}")
        if not _is_handle(weight):
            check.check_weight(weight, 1, x, op, name)
            if weight.shape[1:] != (c_in, kernel, kernel):
                raise ValueError(
                    f"{op}: {name} must be [Co, {c_in}, {kernel}, {kernel}], got shape {list(weight.shape)}"
                )
            check.check_vector(bias, weight.size(0), x, op, f"b{first + i}", exact=True)
        check.check_vector(bias, bias.size(0), x, op, f"b{first + i}", exact=True)
        check.check_device(weight, x, op, name)
        c_in = bias.size(0)
    return c_in


def _fake_block(
    op: str,
    x: Tensor,
    keep: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    stride: int,
    res: Tensor | None,
    act: str,
    algo: str,
) -> Tensor:
    check.check_map(x, op)
    check.check_act(act, op)
    check.check_algo(algo, op)
    _check_keep(keep, op)
    if keep.dim() != 1 or keep.size(0) != x.size(0):
        raise ValueError(f"{op}: keep must be [{x.size(0)}], got shape {list(keep.shape)}")
    check.check_device(keep, x, op, "keep")
    if stride < 1 or stride >= check.LIMIT:
        raise ValueError(f"{op}: stride must be at least 1, got {stride}")
    c_out = _check_block(op, x, weights, biases, x.size(1))
    shape = [x.size(0), c_out, (x.size(2) - 1) // stride + 1, (x.size(3) - 1) // stride + 1]
    if res is not None:
        check.check_map(res, op, "res")
        check.check_dtype(res, op, "res", x.dtype)
        check.check_device(res, x, op, "res")
        if list(res.shape) != shape:
            raise ValueError(f"{op}: res must be {shape}, got shape {list(res.shape)}")
    elif stride != 1 or c_out != x.size(1):
        raise ValueError(
            f"{op}: res must be given for stride {stride} and {x.size(1)} to {c_out} channels; x does not fit as the "
            "shortcut"
        )
    return empty_like_layout(x, shape)


def _fake_basic(
    x: Tensor, keep: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor,
    stride: int, res: Tensor | None, act: str, algo: str,
) -> Tensor:  # fmt: skip
    return _fake_block("skip_basic_block", x, keep, [w1, w2], [b1, b2], stride, res, act, algo)


def _fake_bottleneck(
    x: Tensor, keep: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, w3: Tensor, b3: Tensor,
    stride: int, res: Tensor | None, act: str, algo: str,
) -> Tensor:  # fmt: skip
    return _fake_block("skip_bottleneck", x, keep, [w1, w2, w3], [b1, b2, b3], stride, res, act, algo)


def _fake_stage(
    x: Tensor, keep: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], kind: str, act: str, algo: str
) -> Tensor:
    op = "skip_stage"
    check.check_map(x, op)
    check.check_act(act, op)
    check.check_algo(algo, op)
    check.check_choice(kind, tuple(reference.CONVS), op, "kind")
    _check_keep(keep, op)
    if keep.dim() != 2 or keep.size(0) != x.size(0):
        raise ValueError(f"{op}: keep must be [{x.size(0)}, B], got shape {list(keep.shape)}")
    check.check_device(keep, x, op, "keep")
    n, blocks = reference.CONVS[kind], keep.size(1)
    if len(weights) != n * blocks or len(biases) != n * blocks:
        raise ValueError(
            f"{op}: weights and biases must have {n * blocks} tensors for {blocks} {kind} blocks, "
            f"got {len(weights)} and {len(biases)}"
        )
    for k in range(blocks):
        part = slice(n * k, n * k + n)
        c_out = _check_block(op, x, weights[part], biases[part], x.size(1), n * k + 1)
        if c_out != x.size(1):
            raise ValueError(f"{op}: block {k} must keep x's {x.size(1)} channels, got {c_out}")
    return empty_like_layout(x, x.shape)


def _fake_compact(keep: Tensor) -> tuple[Tensor, Tensor]:
    _check_keep(keep, "compact")
    if keep.dim() not in (1, 2):
        raise ValueError(f"compact: keep must be [N] or [N, B], got shape {list(keep.shape)}")
    shape = list(reversed(keep.shape))
    return keep.new_empty(shape, dtype=torch.int32), keep.new_empty(shape[:-1], dtype=torch.int32)


def _block_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, keep, *tensors, stride, res, act, _ = inputs
    ctx.save_for_backward(x, keep, res, output, *tensors)
    ctx.options = (stride, act)


def _block_backward(ctx: Any, grad: Tensor) -> tuple:
    x, keep, res, y, *tensors = ctx.saved_tensors
    stride, act = ctx.options
    needs = list(ctx.needs_input_grad)
    # The operator's own order: x, keep, w1, b1, ..., stride, res, act, algo.
    wanted = [*needs[: len(tensors) + 2], needs[-3]]
    grads = gradient.skip_block_backward(grad, x, keep, tensors[::2], tensors[1::2], stride, res, y, act, wanted)
    *inner, g_res = [g if want else None for g, want in zip(grads, wanted, strict=True)]
    return *inner, None, g_res, None, None


def _stage_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, keep, weights, biases, kind, act, _ = inputs
    ctx.save_for_backward(x, keep, *weights, *biases)
    ctx.options = (kind, act)


def _stage_backward(ctx: Any, grad: Tensor) -> tuple:
    x, keep, *tensors = ctx.saved_tensors
    kind, act = ctx.options
    n = len(tensors) // 2
    need_x, need_keep, need_weights, need_biases = ctx.needs_input_grad[:4]
    wanted = [need_x, need_keep, *_each(need_weights, n), *_each(need_biases, n)]
    grads = gradient.skip_stage_backward(grad, x, keep, tensors[:n], tensors[n:], kind, act, wanted)
    grads = [g if want else None for g, want in zip(grads, wanted, strict=True)]
    return grads[0], grads[1], grads[2 : 2 + n], grads[2 + n :], None, None, None


def _each(need: Any, count: int) -> list[bool]:
    # Autograd reports a list argument as one flag or as one for each tensor.
    return list(need) if isinstance(need, list | tuple) else [need] * count


_TAIL = "int stride, Tensor? res, str act, str algo) -> Tensor"

_skip_basic_block = Op(
    "skip_basic_block",
    f"(Tensor x, Tensor keep, Tensor w1, Tensor b1, Tensor w2, Tensor b2, {_TAIL}",
    fake=_fake_basic,
    reference=reference.skip_basic_block,
    setup_context=_block_context,
    backward=_block_backward,
    autocast=("x", "w1", "w2", "res"),
)

_skip_bottleneck = Op(
    "skip_bottleneck",
    f"(Tensor x, Tensor keep, Tensor w1, Tensor b1, Tensor w2, Tensor b2, Tensor w3, Tensor b3, {_TAIL}",
    fake=_fake_bottleneck,
    reference=reference.skip_bottleneck,
    setup_context=_block_context,
    backward=_block_backward,
    autocast=("x", "w1", "w2", "w3", "res"),
)

_skip_stage = Op(
    "skip_stage",
    "(Tensor x, Tensor keep, Tensor[] weights, Tensor[] biases, str kind, str act, str algo) -> Tensor",
    fake=_fake_stage,
    reference=reference.skip_stage,
    setup_context=_stage_context,
    backward=_stage_backward,
    autocast=("x", "weights"),
)

_compact = Op("compact", "(Tensor keep) -> (Tensor, Tensor)", fake=_fake_compact, reference=reference.compact)


def skip_basic_block(
    x: Tensor,
    keep: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    stride: int = 1,
    res: Tensor | None = None,
    act: str = "relu",
    algo: str = "auto",
) -> Tensor:
    """Run a basic residual block for the samples that keep it; the others get the shortcut, bit for bit.

    With ``f(x) = conv(act(conv(x, w1) + b1), w2) + b2`` and the shortcut ``res``, sample by sample

    * ``keep = 1``: ``y = act(f(x) + res)``,
    * ``keep = 0``: ``y = res``, without activation; x is not read,
    * between: ``y = keep * act(f(x) + res) + (1 - keep) * res``, at the cost of a kept sample.

    Kept samples are read and written in place through a list of rows, never gathered. Batch norm must be folded into
    the weights (:func:`effkern.nn.residual.fold_bn`).

    Args:
        x: ``[N, C, H, W]``, float32, bfloat16 or float16, any strides.
        keep: ``[N]``, bool, uint8, float32, bfloat16 or float16, every entry in [0, 1].
        w1, w2: ``[C1, C, 3, 3]`` and ``[Co, C1, 3, 3]`` in x's dtype, or handles of
            :func:`effkern.ops.pack_conv_weight` packed without bias.
        b1, b2: ``[C1]`` and ``[Co]``, float32 or x's dtype.
        stride: of the first convolution; padding is 1.
        res: ``[N, Co, Ho, Wo]`` in x's dtype, the shortcut computed beforehand. Default: x itself.
        act: ``"none"``, ``"relu"``, ``"relu6"``, ``"hardswish"`` or ``"silu"``, between the convolutions and after the
            sum.
        algo: ``"auto"`` or ``"direct"``.

    Returns:
        ``[N, Co, ceil(H / stride), ceil(W / stride)]`` in x's dtype and layout; sums and what lies between the
        convolutions are kept in float32. A sample's result does not depend on the other samples, on their keep entries
        or on the number of threads, bit for bit.

    Raises:
        ValueError: a shape or option that does not fit; no ``res`` where x does not fit as the shortcut; an entry of
            ``keep`` outside [0, 1], NaN included.
        TypeError: a dtype that is not supported or differs from x's.

    Differentiable once in x, the weights and biases (kept samples only), ``res``, and a float ``keep``:
    ``<gy, act(f(x) + res) - res>`` for every sample, which has to run the dropped ones too. A handle has no gradient
    itself.

    Source: BlockDrop (Wu et al., CVPR 2018) defines the semantics.

    >>> x, w, b = torch.full((2, 1, 1, 1), -1.0), torch.ones(1, 1, 3, 3), torch.full((1,), 3.0)
    >>> skip_basic_block(x, torch.tensor([1, 0], dtype=torch.uint8), w, b, w, b).flatten()
    tensor([ 4., -1.])
    """
    if not torch.compiler.is_compiling():
        y = _direct.skip_block(x, keep, w1, b1, w2, b2, stride, res, act, algo)
        if y is not None:
            return y
    return _skip_basic_block(x, keep, w1, b1, w2, b2, stride, res, act, algo)


def skip_bottleneck(
    x: Tensor,
    keep: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    w3: Tensor,
    b3: Tensor,
    stride: int = 1,
    res: Tensor | None = None,
    act: str = "relu",
    algo: str = "auto",
) -> Tensor:
    """Run a bottleneck block for the samples that keep it; :func:`skip_basic_block` with 1x1, 3x3, 1x1 convolutions.

    Args:
        x: ``[N, C, H, W]``, float32, bfloat16 or float16, any strides.
        keep: ``[N]``, bool, uint8, float32, bfloat16 or float16, every entry in [0, 1].
        w1, w2, w3: ``[C1, C, 1, 1]``, ``[C2, C1, 3, 3]`` and ``[Co, C2, 1, 1]`` in x's dtype, or handles.
        b1, b2, b3: ``[C1]``, ``[C2]`` and ``[Co]``, float32 or x's dtype.
        stride: of the 3x3 convolution.
        res: ``[N, Co, Ho, Wo]`` in x's dtype, the shortcut computed beforehand. Default: x itself.
        act: the activation after every convolution, the last one after the sum.
        algo: ``"auto"`` or ``"direct"``.

    Returns:
        ``[N, Co, ceil(H / stride), ceil(W / stride)]`` in x's dtype and layout.

    Raises:
        ValueError, TypeError: as :func:`skip_basic_block`.
    """
    if not torch.compiler.is_compiling():
        y = _direct.skip_block(x, keep, w1, b1, w2, b2, w3, b3, stride, res, act, algo)
        if y is not None:
            return y
    return _skip_bottleneck(x, keep, w1, b1, w2, b2, w3, b3, stride, res, act, algo)


def skip_stage(
    x: Tensor,
    keep: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    kind: str = "basic",
    act: str = "relu",
    algo: str = "auto",
) -> Tensor:
    """Run the identity blocks of one stage, each for the samples that keep it.

    The same as B calls of :func:`skip_basic_block` or :func:`skip_bottleneck` with ``res=None``, but with one output
    for the whole stage, in which the blocks work in place: a dropped block moves no data at all. Groups of samples go
    through all blocks while they are in cache, larger ones where weights outweigh samples.

    Args:
        x: ``[N, C, H, W]``, float32, bfloat16 or float16, any strides.
        keep: ``[N, B]``, bool, uint8, float32, bfloat16 or float16, every entry in [0, 1].
        weights: ``2 * B`` (basic) or ``3 * B`` (bottleneck) weights or handles, block after block.
        biases: as many biases.
        kind: ``"basic"`` or ``"bottleneck"``.
        act: the activation after every convolution, the last one after the sum.
        algo: ``"auto"`` or ``"direct"``.

    Returns:
        ``[N, C, H, W]`` in x's dtype and layout, a fresh tensor also for B = 0. 16-bit storage is rounded once, after
        the last block.

    Raises:
        ValueError, TypeError: as :func:`skip_basic_block`; a number of tensors that does not fit ``keep``; a block that
            changes the number of channels.

    Differentiable as :func:`skip_basic_block`; the backward pass computes the kept activations again.
    """
    return _skip_stage(x, keep, list(weights), list(biases), kind, act, algo)


def compact(keep: Tensor) -> tuple[Tensor, Tensor]:
    """Row numbers of the samples that keep a block: ascending, padded with -1, and how many there are.

    Args:
        keep: ``[N]`` or ``[N, B]``, bool, uint8, float32, bfloat16 or float16, every entry in [0, 1]. Any entry but 0
            is kept.

    Returns:
        ``idx`` and ``count``, int32: ``[N]`` and ``[]``, or ``[B, N]`` and ``[B]``.

    Raises:
        ValueError: another number of dimensions, or an entry outside [0, 1].
        TypeError: another dtype.

    >>> compact(torch.tensor([0, 1, 1, 0], dtype=torch.uint8))
    (tensor([ 1,  2, -1, -1], dtype=torch.int32), tensor(2, dtype=torch.int32))
    """
    return _compact(keep)
