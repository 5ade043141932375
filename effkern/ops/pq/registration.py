"""The operators behind the public functions: schemas, fakes, gradients, autocast rules."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from effkern.ops import _checks
from effkern.ops._autograd import activation_backward, compute_dtype
from effkern.ops._registry import Op, empty_like_layout
from effkern.ops.pq import gradients, layout, reference


def _refuse_double(name: str) -> Any:
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise RuntimeError(f"double backward of {name} is not supported")

    return backward


# --- pq_decode -------------------------------------------------------------------------------------------------------


def _decode_fake(codes: Tensor, codebook: Tensor, scale: Tensor | None) -> Tensor:
    layout.check_book("pq_decode", codes, codebook)
    layout.check_rows("pq_decode", "scale", scale, codes.shape[0], codebook)
    return codebook.new_empty(codes.shape[0], codes.shape[1] * codebook.shape[2])


def _decode_save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _decode_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    codes, codebook, scale = ctx.saved_tensors
    needs = [ctx.needs_input_grad[1], ctx.needs_input_grad[2], False]
    rows = torch.arange(codes.shape[0], device=codes.device)
    book, by_scale, _ = embedding_grad(grad, rows, None, None, codes, codebook, scale, None, needs)
    return None, book if needs[0] else None, by_scale if needs[1] else None


# --- pq_conv2d, pq_linear --------------------------------------------------------------------------------------------


def _conv_fake(
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
    act: str,
    algo: str,
) -> Tensor:
    op = "pq_conv2d"
    _checks.check_map(x, op)
    _checks.check_geometry(stride, padding, dilation, op)
    map_size = _checks.output_map(x, kernel_size, stride, padding, dilation, op)
    if groups < 1 or x.shape[1] % groups or codes.shape[0] % groups:
        raise ValueError(
            f"{op}: groups must divide x's {x.shape[1]} channels and the {codes.shape[0]} rows of codes, got {groups}"
        )
    layout.check_book(op, codes, codebook, x.shape[1] // groups * kernel_size[0] * kernel_size[1])
    layout.check_layer(op, x, codes, scale, bias, act)
    pointwise = list(kernel_size) == [1, 1] and not any(padding) and groups == 1
    layout.check_algo(op, algo, codes, codebook, pointwise)
    return empty_like_layout(x, (x.shape[0], codes.shape[0], *map_size))


def _conv_save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, codes, codebook, scale, bias, *window = inputs
    ctx.window, ctx.act = window[:5], window[5]
    # The clipped activations show in the result where they let gradients through; the smooth ones are recomputed.
    ctx.save_for_backward(x, codes, codebook, scale, bias, output if ctx.act in ("relu", "relu6") else None)


def _conv_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, codes, codebook, scale, bias, y = ctx.saved_tensors
    grad = activation_backward(
        grad.to(compute_dtype(x)),
        y,
        lambda: conv(x, codes, codebook, scale, bias, *ctx.window, "none", "auto"),
        ctx.act,
    )
    needs = [ctx.needs_input_grad[0], ctx.needs_input_grad[2], ctx.needs_input_grad[3]]
    by_x = by_book = by_scale = by_bias = None
    if any(needs):
        by_x, by_book, by_scale = conv_grad(grad, x, codes, codebook, scale, *ctx.window, needs)
    if ctx.needs_input_grad[4]:
        by_bias = grad.sum((0, 2, 3)).to(bias.dtype)
    return (
        by_x if needs[0] else None,
        None,
        by_book if needs[1] else None,
        by_scale if needs[2] else None,
        by_bias,
        *[None] * 7,
    )


def _conv_grad_fake(
    grad: Tensor,
    x: Tensor,
    codes: Tensor,
    codebook: Tensor,
    scale: Tensor | None,
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        empty_like_layout(x, x.shape) if needs[0] else x.new_empty(0),
        codebook.new_empty(codebook.shape if needs[1] else (0,)),
        (codebook if scale is None else scale).new_empty(codes.shape[0] if needs[2] else 0),
    )


def _linear_fake(
    x: Tensor, codes: Tensor, codebook: Tensor, scale: Tensor | None, bias: Tensor | None, act: str, algo: str
) -> Tensor:
    if x.dim() < 1:
        raise ValueError("pq_linear: x must be [..., Ci], got a scalar")
    layout.check_book("pq_linear", codes, codebook, x.shape[-1])
    layout.check_layer("pq_linear", x, codes, scale, bias, act)
    layout.check_algo("pq_linear", algo, codes, codebook, pointwise=True)
    return x.new_empty(*x.shape[:-1], codes.shape[0])


def _linear_save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, codes, codebook, scale, bias, ctx.act, _ = inputs
    ctx.save_for_backward(x, codes, codebook, scale, bias, output if ctx.act in ("relu", "relu6") else None)


def _linear_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, codes, codebook, scale, bias, y = ctx.saved_tensors
    grad = activation_backward(
        grad.to(compute_dtype(x)), y, lambda: linear(x, codes, codebook, scale, bias, "none", "auto"), ctx.act
    )
    rows = grad.reshape(-1, codes.shape[0])
    needs = [ctx.needs_input_grad[0], ctx.needs_input_grad[2], ctx.needs_input_grad[3]]
    by_x = by_book = by_scale = by_bias = None
    if any(needs):
        pixels = x.reshape(-1, x.shape[-1])[:, :, None, None]
        window = ([1, 1], [1, 1], [0, 0], [1, 1], 1)
        by_x, by_book, by_scale = conv_grad(rows[:, :, None, None], pixels, codes, codebook, scale, *window, needs)
    if ctx.needs_input_grad[4]:
        by_bias = rows.sum(0).to(bias.dtype)
    return (
        by_x.reshape(x.shape) if needs[0] and by_x is not None else None,
        None,
        by_book if needs[1] else None,
        by_scale if needs[2] else None,
        by_bias,
        None,
        None,
    )


# --- pq_embedding, pq_embedding_bag ----------------------------------------------------------------------------------


def _embedding_fake(
    idx: Tensor, codes: Tensor, codebook: Tensor, scale: Tensor | None, padding_idx: int | None
) -> Tensor:
    layout.check_table("pq_embedding", idx, codes, codebook, scale, padding_idx)
    return codebook.new_empty(*idx.shape, codes.shape[1] * codebook.shape[2])


def _embedding_save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    idx, codes, codebook, scale, ctx.padding_idx = inputs
    ctx.save_for_backward(idx, codes, codebook, scale)


def _embedding_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    idx, codes, codebook, scale = ctx.saved_tensors
    needs = [ctx.needs_input_grad[2], ctx.needs_input_grad[3], False]
    rows = grad.reshape(-1, grad.shape[-1])
    book, by_scale, _ = embedding_grad(
        rows, idx.reshape(-1), None, None, codes, codebook, scale, ctx.padding_idx, needs
    )
    return None, None, book if needs[0] else None, by_scale if needs[1] else None, None


def _embedding_grad_fake(
    grad: Tensor,
    idx: Tensor,
    bags: Tensor | None,
    weights: Tensor | None,
    codes: Tensor,
    codebook: Tensor,
    scale: Tensor | None,
    padding_idx: int | None,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        codebook.new_empty(codebook.shape if needs[0] else (0,)),
        (codebook if scale is None else scale).new_empty(codes.shape[0] if needs[1] else 0),
        (codebook if weights is None else weights).new_empty(idx.shape[0] if needs[2] else 0),
    )


def _bag_fake(
    idx: Tensor,
    codes: Tensor,
    codebook: Tensor,
    offsets: Tensor,
    scale: Tensor | None,
    mode: str,
    per_sample_weights: Tensor | None,
    padding_idx: int | None,
) -> Tensor:
    op = "pq_embedding_bag"
    layout.check_table(op, idx, codes, codebook, scale, padding_idx)
    layout.check_dtype(op, "offsets", offsets, layout.INDEX_DTYPES)
    if offsets.device != codes.device:
        raise ValueError(f"{op}: offsets must be on codes' device {codes.device}, got {offsets.device}")
    if idx.dim() != 1 or offsets.dim() != 1:
        raise ValueError(f"{op}: idx and offsets must be 1-d, got {idx.dim()} and {offsets.dim()} dimensions")
    _checks.check_choice(mode, ("sum", "mean"), op, "mode")
    if per_sample_weights is not None:
        if mode != "sum":
            raise ValueError(f"{op}: per_sample_weights need mode 'sum', got {mode!r}")
        layout.check_rows(op, "per_sample_weights", per_sample_weights, idx.shape[0], codebook)
    return codebook.new_empty(offsets.shape[0], codes.shape[1] * codebook.shape[2])


def _bag_save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    idx, codes, codebook, offsets, scale, ctx.mode, weights, ctx.padding_idx = inputs
    ctx.save_for_backward(idx, codes, codebook, offsets, scale, weights)


def _bag_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    idx, codes, codebook, offsets, scale, weights = ctx.saved_tensors
    needs = [ctx.needs_input_grad[2], ctx.needs_input_grad[4], ctx.needs_input_grad[6]]
    bags = reference.bag_of_each(offsets, idx.shape[0])
    factors = weights
    if ctx.mode == "mean":
        kept = torch.ones_like(idx) if ctx.padding_idx is None else (idx != ctx.padding_idx).to(idx.dtype)
        counts = torch.zeros_like(offsets).index_add(0, bags, kept.to(offsets.dtype)).clamp(min=1)
        factors = counts.to(torch.float32).reciprocal()[bags]
    book, by_scale, by_weights = embedding_grad(
        grad, idx, bags, factors, codes, codebook, scale, ctx.padding_idx, needs
    )
    return (
        None,
        None,
        book if needs[0] else None,
        None,
        by_scale if needs[1] else None,
        None,
        by_weights if needs[2] else None,
        None,
    )


decode = Op(
    "pq_decode",
    "(Tensor codes, Tensor codebook, Tensor? scale) -> Tensor",
    fake=_decode_fake,
    reference=reference.pq_decode,
    setup_context=_decode_save,
    backward=_decode_backward,
)
conv = Op(
    "pq_conv2d",
    "(Tensor x, Tensor codes, Tensor codebook, Tensor? scale, Tensor? bias, int[2] kernel_size, int[2] stride, "
    "int[2] padding, int[2] dilation, int groups, str act, str algo) -> Tensor",
    fake=_conv_fake,
    reference=reference.pq_conv2d,
    setup_context=_conv_save,
    backward=_conv_backward,
    autocast=("x",),
)
conv_grad = Op(
    "pq_conv2d_backward",
    "(Tensor grad, Tensor x, Tensor codes, Tensor codebook, Tensor? scale, int[2] kernel_size, int[2] stride, "
    "int[2] padding, int[2] dilation, int groups, bool[3] needs) -> (Tensor, Tensor, Tensor)",
    fake=_conv_grad_fake,
    reference=gradients.conv2d_backward,
    setup_context=lambda ctx, inputs, output: None,
    backward=_refuse_double("pq_conv2d and pq_linear"),
)
linear = Op(
    "pq_linear",
    "(Tensor x, Tensor codes, Tensor codebook, Tensor? scale, Tensor? bias, str act, str algo) -> Tensor",
    fake=_linear_fake,
    reference=reference.pq_linear,
    setup_context=_linear_save,
    backward=_linear_backward,
    autocast=("x",),
)
embedding = Op(
    "pq_embedding",
    "(Tensor idx, Tensor codes, Tensor codebook, Tensor? scale, int? padding_idx) -> Tensor",
    fake=_embedding_fake,
    reference=reference.pq_embedding,
    setup_context=_embedding_save,
    backward=_embedding_backward,
)
bag = Op(
    "pq_embedding_bag",
    "(Tensor idx, Tensor codes, Tensor codebook, Tensor offsets, Tensor? scale, str mode, "
    "Tensor? per_sample_weights, int? padding_idx) -> Tensor",
    fake=_bag_fake,
    reference=reference.pq_embedding_bag,
    setup_context=_bag_save,
    backward=_bag_backward,
)
embedding_grad = Op(
    "pq_embedding_backward",
    "(Tensor grad, Tensor idx, Tensor? bags, Tensor? weights, Tensor codes, Tensor codebook, Tensor? scale, "
    "int? padding_idx, bool[3] needs) -> (Tensor, Tensor, Tensor)",
    fake=_embedding_grad_fake,
    reference=gradients.embedding_backward,
    setup_context=lambda ctx, inputs, output: None,
    backward=_refuse_double("pq_decode, pq_embedding and pq_embedding_bag"),
)
