"""Gradients of block skipping: kept samples only, activations computed again, fixed sample order.

The backward passes are ops of their own because which rows they touch depends on the mask, which a compiler cannot see
through. They have no gradient themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from effkern.ops._autograd import activate, activation_backward, channel_sum, compute_dtype
from effkern.ops._conv_backward import conv_gradients
from effkern.ops._registry import Op, empty_like_layout
from effkern.ops.block_skip.reference import CONVS, dense_weights, strides_of


class _Branch:
    """The convolutions of one block on gathered rows, forward with what backward needs."""

    def __init__(self, weights: Sequence[Tensor], biases: Sequence[Tensor], stride: int, act: str) -> None:
        self.weights, self.biases, self.act = weights, biases, act
        self.strides = strides_of(len(weights), stride)
        self.inputs: list[Tensor] = []  # of each convolution
        self.before: list[Tensor] = []  # the activation of each but the last

    def inner(self, x: Tensor) -> Tensor:
        """Up to the input of the last convolution."""
        self.inputs = [x]
        for i in range(len(self.weights) - 1):
            self.before.append(self._conv(i))
            self.inputs.append(activate(self.before[-1], self.act))
        return self.inputs[-1]

    def last(self) -> Tensor:
        """The last convolution; call :meth:`inner` first."""
        return self._conv(len(self.weights) - 1)

    def _conv(self, i: int) -> Tensor:
        weight = self.weights[i]
        pad = weight.shape[2] // 2
        return F.conv2d(self.inputs[i], weight, self.biases[i], stride=self.strides[i], padding=pad)

    def backward(self, g: Tensor, need_x: bool, need_weights: bool) -> tuple[Tensor | None, list[Tensor], list[Tensor]]:
        """Gradients in x, the weights and the biases from the gradient at the sum."""
        g_weights: list[Tensor] = []
        g_biases: list[Tensor] = []
        for i in reversed(range(len(self.weights))):
            weight, step, pad = self.weights[i], self.strides[i], self.weights[i].shape[2] // 2
            needs = (i > 0 or need_x, need_weights)
            gx, gw = conv_gradients(g, self.inputs[i], weight, [step] * 2, [pad] * 2, [1, 1], 1, needs)
            if need_weights:
                assert gw is not None
                g_weights.insert(0, gw)
                g_biases.insert(0, channel_sum(g))
            if i > 0:
                assert gx is not None
                before = self.before[i - 1]
                g = activation_backward(gx, self.inputs[i], lambda z=before: z, self.act)  # type: ignore[misc]
        return gx, g_weights, g_biases


def _column(keep: Tensor, dtype: torch.dtype) -> Tensor:
    return keep.to(dtype).view(-1, 1, 1, 1)


def _inner_product(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum((1, 2, 3))


def _block(
    grad: Tensor,
    x: Tensor,
    keep: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    stride: int,
    res: Tensor | None,
    y: Tensor,
    act: str,
    needs: Sequence[bool],
) -> list[Tensor]:
    dtype = compute_dtype(x)
    shortcut = x if res is None else res
    need_x, need_keep, need_weights = needs[0], needs[1], any(needs[2:-1])
    w, b = dense_weights(weights, biases, x.shape[1], dtype), [t.to(dtype) for t in biases]
    g_keep = torch.zeros(keep.shape, dtype=dtype, device=x.device)
    g_short = grad.to(dtype, copy=True).contiguous()  # becomes g_res, or its part of gx
    gx = torch.zeros(x.shape, dtype=dtype, device=x.device) if need_x and res is not None else None
    g_weights, g_biases = [torch.zeros_like(t) for t in w], [torch.zeros_like(t) for t in b]

    rows = keep.nonzero().flatten()
    if rows.numel() and grad.numel():
        m, g = keep.index_select(0, rows), g_short.index_select(0, rows)
        branch = _Branch(w, b, stride, act)
        branch.inner(x.index_select(0, rows).to(dtype))
        old = shortcut.index_select(0, rows).to(dtype)
        soft = bool((m != 1).any())
        if soft or need_keep or act in ("hardswish", "silu"):
            z = branch.last() + old
            new = activate(z, act)
        else:
            z = new = y.index_select(0, rows).to(dtype)  # relu's and relu6's slopes show in the output
        if need_keep:
            g_keep.index_copy_(0, rows, _inner_product(g, new - old))
        gate = _column(m, dtype)
        gz = activation_backward(gate * g if soft else g, new, lambda: z, act)
        g_short.index_copy_(0, rows, gz + (1 - gate) * g if soft else gz)
        g_branch, gw, gb = branch.backward(gz, need_x, need_weights)
        if need_weights:
            g_weights, g_biases = gw, gb
        if need_x:
            assert g_branch is not None
            (g_short if gx is None else gx).index_add_(0, rows, g_branch)
    if need_keep and grad.numel():
        _dropped_gates(g_keep, grad, x, keep, shortcut, _Branch(w, b, stride, act))

    return _needed([g_short if gx is None else gx, g_keep, *_interleaved(g_weights, g_biases), g_short], needs)


def _dropped_gates(g_keep: Tensor, grad: Tensor, x: Tensor, keep: Tensor, shortcut: Tensor, branch: _Branch) -> None:
    """The gate's gradient of dropped samples needs what they would have been; nothing else of them is used."""
    rows = (keep == 0).nonzero().flatten()
    if rows.numel() == 0:
        return
    dtype = g_keep.dtype
    branch.inner(x.index_select(0, rows).to(dtype))
    old = shortcut.index_select(0, rows).to(dtype)
    delta = activate(branch.last() + old, branch.act) - old
    g_keep.index_copy_(0, rows, _inner_product(grad.index_select(0, rows).to(dtype), delta))


def _stage(
    grad: Tensor,
    x: Tensor,
    keep: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    kind: str,
    act: str,
    needs: Sequence[bool],
) -> list[Tensor]:
    dtype, n = compute_dtype(x), CONVS[kind]
    b = [t.to(dtype) for t in biases]
    w = []
    for k in range(0, len(weights), n):
        w += dense_weights(weights[k : k + n], biases[k : k + n], x.shape[1], dtype)
    need_keep, need_weights = needs[1], any(needs[2:])
    state = x.to(dtype, copy=True).contiguous()
    tape = []
    for k in range(keep.shape[1]):
        part = slice(n * k, n * k + n)
        # A gate's gradient needs the block's output also for dropped samples, so their state is kept as it was.
        saved = state.clone() if need_keep else None
        rows = keep[:, k].nonzero().flatten()
        branch = _Branch(w[part], b[part], 1, act)
        if rows.numel() and x.numel():
            old = state.index_select(0, rows)
            branch.inner(old)
            z = branch.last() + old
            new = activate(z, act)
            gate = _column(keep[:, k].index_select(0, rows), dtype)
            state.index_copy_(0, rows, torch.where(gate == 1, new, gate * new + (1 - gate) * old))
            tape.append((rows, branch, z, new, gate, saved))
        else:
            tape.append((rows, branch, state, state, _column(keep[:0, k], dtype), saved))

    g_state = grad.to(dtype, copy=True).contiguous()
    g_keep = torch.zeros(keep.shape, dtype=dtype, device=x.device)
    g_weights, g_biases = [torch.zeros_like(t) for t in w], [torch.zeros_like(t) for t in b]
    for k in reversed(range(keep.shape[1])):
        rows, branch, z, new, gate, saved = tape[k]
        if saved is not None and grad.numel():
            column = torch.zeros_like(g_keep[:, k])
            _dropped_gates(column, g_state, saved, keep[:, k], saved, _Branch(branch.weights, branch.biases, 1, act))
            g_keep[:, k] = column
        if rows.numel() == 0 or x.numel() == 0:
            continue
        g = g_state.index_select(0, rows)
        if need_keep:
            g_keep[:, k].index_copy_(0, rows, _inner_product(g, new - branch.inputs[0]))
        gz = activation_backward(gate * g, new, lambda z=z: z, act)  # type: ignore[misc]
        g_branch, gw, gb = branch.backward(gz, True, need_weights)
        assert g_branch is not None
        g_state.index_copy_(0, rows, gz + (1 - gate) * g + g_branch)
        if need_weights:
            g_weights[n * k : n * k + n], g_biases[n * k : n * k + n] = gw, gb
    return _needed([g_state, g_keep, *g_weights, *g_biases], needs)


def _needed(grads: Sequence[Tensor], needs: Sequence[bool]) -> list[Tensor]:
    return [g if need else g.new_empty(0) for g, need in zip(grads, needs, strict=True)]


def _like(wanted: Sequence[Tensor | None], needs: Sequence[bool], x: Tensor) -> list[Tensor]:
    """Uninitialised gradients like what they belong to, maps and weights in its layout; empty where not needed."""

    def like(t: Tensor) -> Tensor:
        return (
            empty_like_layout(t, t.shape)
            if t.dim() == 4
            else torch.empty_like(t, memory_format=torch.contiguous_format)
        )

    return [like(t) if need and t is not None else x.new_empty(0) for t, need in zip(wanted, needs, strict=True)]


def _interleaved(weights: Sequence[Tensor], biases: Sequence[Tensor]) -> list[Tensor]:
    return [t for pair in zip(weights, biases, strict=True) for t in pair]


def _fake_block(
    grad: Tensor, x: Tensor, keep: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], stride: int,
    res: Tensor | None, y: Tensor, act: str, needs: Sequence[bool],
) -> list[Tensor]:  # fmt: skip
    return _like([x, keep, *_interleaved(weights, biases), res], needs, x)


def _fake_stage(
    grad: Tensor, x: Tensor, keep: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], kind: str, act: str,
    needs: Sequence[bool],
) -> list[Tensor]:  # fmt: skip
    return _like([x, keep, *weights, *biases], needs, x)


def _no_double_backward(name: str) -> Any:
    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(f"double backward of {name} is not supported")

    return backward


skip_block_backward = Op(
    "skip_block_backward",
    "(Tensor grad, Tensor x, Tensor keep, Tensor[] weights, Tensor[] biases, int stride, Tensor? res, Tensor y, "
    "str act, bool[] needs) -> Tensor[]",
    fake=_fake_block,
    reference=_block,
    backward=_no_double_backward("skip_basic_block and skip_bottleneck"),
)

skip_stage_backward = Op(
    "skip_stage_backward",
    "(Tensor grad, Tensor x, Tensor keep, Tensor[] weights, Tensor[] biases, str kind, str act, bool[] needs) "
    "-> Tensor[]",
    fake=_fake_stage,
    reference=_stage,
    backward=_no_double_backward("skip_stage"),
)
