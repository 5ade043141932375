"""Batch norms of parallel branches, their sum and the ReLU behind it in one op: what re-parameterized blocks train.

``y = relu(sum of batch_norm(x_i))``. Eager PyTorch passes over memory once for every step of every branch; this op
reads every branch twice and writes once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from effkern.ops import _checks as check
from effkern.ops import _direct
from effkern.ops._registry import Op, empty_like_layout
from effkern.ops.multi_branch_bn import reference

__all__ = ["multi_branch_bn_add_relu"]

#: Most branches of one call.
MAX_BRANCHES = 4
Tensors = Sequence[Tensor]


def _check_vectors(vectors: Tensors, xs: Tensors, op: str, name: str) -> None:
    if len(vectors) != len(xs):
        raise ValueError(f"{op}: {name} must have one tensor a branch, {len(xs)} in all, got {len(vectors)}")
    for vector in vectors:
        check.check_vector(vector, xs[0].size(1), xs[0], op, name, exact=True)


def _check_branches(xs: Tensors, weight: Tensors, bias: Tensors, op: str) -> None:
    if not 1 <= len(xs) <= MAX_BRANCHES:
        raise ValueError(f"{op}: xs must have 1 to {MAX_BRANCHES} branches, got {len(xs)}")
    for x in xs:
        check.check_map(x, op, "xs")
        check.check_device(x, xs[0], op, "xs")
        if x.dtype != xs[0].dtype:
            raise TypeError(f"{op}: xs must have one dtype, got {xs[0].dtype} and {x.dtype}")
        if x.shape != xs[0].shape:
            raise ValueError(f"{op}: xs must have one shape, got {list(xs[0].shape)} and {list(x.shape)}")
    _check_vectors(weight, xs, op, "weight")
    _check_vectors(bias, xs, op, "bias")


def _fake(
    xs: Tensors, weight: Tensors, bias: Tensors, running_mean: Tensors, running_var: Tensors, training: bool,
    momentum: float, eps: float, relu: bool,
) -> reference.Outputs:  # fmt: skip
    op = "multi_branch_bn_add_relu"
    _check_branches(xs, weight, bias, op)
    x = xs[0]
    tracked = len(running_mean) > 0 or len(running_var) > 0
    if tracked:
        _check_vectors(running_mean, xs, op, "running_mean")
        _check_vectors(running_var, xs, op, "running_var")
    elif not training:
        raise ValueError(f"{op}: running_mean and running_var must be given unless training")
    if training and x.size(0) * x.size(2) * x.size(3) == 1:
        raise ValueError(f"{op}: xs must have more than one value per channel when training, got shape {list(x.shape)}")
    if not 0 <= momentum <= 1:
        raise ValueError(f"{op}: momentum must lie in [0, 1], got {momentum}")
    if not 0 < eps < math.inf:
        raise ValueError(f"{op}: eps must be positive and finite, got {eps}")
    table = (len(xs), x.size(1))
    new = (table[0] if training and tracked else 0, table[1])
    return (
        empty_like_layout(x, x.shape),
        *(x.new_empty(table, dtype=torch.float64) for _ in range(2)),
        *(x.new_empty(new, dtype=torch.float32) for _ in range(2)),
    )  # type: ignore[return-value]


def _fake_backward(
    grad: Tensor, xs: Tensors, weight: Tensors, bias: Tensors, mean: Tensor, invstd: Tensor, training: bool,
    relu: bool, needs: Sequence[bool],
) -> tuple[list[Tensor], Tensor, Tensor]:  # fmt: skip
    op = "multi_branch_bn_add_relu_backward"
    _check_branches(xs, weight, bias, op)
    x = xs[0]
    check.check_map(grad, op, "grad")
    if grad.shape != x.shape:
        raise ValueError(f"{op}: grad must have the shape of xs {list(x.shape)}, got {list(grad.shape)}")
    for name, table in (("mean", mean), ("invstd", invstd)):
        if table.dtype != torch.float64:
            raise TypeError(f"{op}: {name} must be float64, got {table.dtype}")
        if list(table.shape) != [len(xs), x.size(1)]:
            raise ValueError(f"{op}: {name} must be {[len(xs), x.size(1)]}, got {list(table.shape)}")
    if len(needs) != len(xs):
        raise ValueError(f"{op}: needs must have one entry a branch, got {len(needs)}")
    dxs = [empty_like_layout(x, x.shape) if need else x.new_empty(0) for need in needs]
    dweight = x.new_empty((len(xs), x.size(1)), dtype=torch.float32)
    return dxs, dweight, x.new_empty(x.size(1), dtype=torch.float32)


def _no_double_backward(ctx: Any, *grads: Any) -> Any:
    raise RuntimeError("double backward of multi_branch_bn_add_relu is not supported")


class _BackwardOp(Op):
    """The gradient, an operator of its own so that compilers see one node. Returns a list and two tensors."""

    def _fallback(self, *args: Any) -> Any:
        empty, _, _ = self.fake(*args)
        dxs, dweight, dbias = self.reference(*args)
        return [e.copy_(d) for e, d in zip(empty, dxs, strict=True)], dweight, dbias


_backward_op = _BackwardOp(
    "multi_branch_bn_add_relu_backward",
    "(Tensor grad, Tensor[] xs, Tensor[] weight, Tensor[] bias, Tensor mean, Tensor invstd, bool training, bool relu, "
    "bool[] needs) -> (Tensor[], Tensor, Tensor)",
    fake=_fake_backward,
    reference=reference.multi_branch_bn_add_relu_backward,
    backward=_no_double_backward,
)


def _save(ctx: Any, inputs: tuple[Any, ...], output: reference.Outputs) -> None:
    xs, weight, bias, running_mean, running_var, training, _, _, relu = inputs
    _, mean, invstd, *new = output
    ctx.mark_non_differentiable(mean, invstd, *new)
    ctx.save_for_backward(*xs, *weight, *bias, mean, invstd)
    ctx.options = (training, relu)
    ctx.running = (len(running_mean), len(running_var))
    ctx.set_materialize_grads(False)


def _each(need: Any, count: int) -> list[bool]:
    # Autograd reports a list argument as one flag or as one for each tensor.
    return list(need) if isinstance(need, list | tuple) else [need] * count


def _gradients(ctx: Any, grad: Tensor, needs: Sequence[Sequence[bool]]) -> tuple[list[Any], list[Any], list[Any]]:
    *tensors, mean, invstd = ctx.saved_tensors
    b = len(tensors) // 3
    xs, weight, bias = tensors[:b], tensors[b : 2 * b], tensors[2 * b :]
    dxs, dweight, dbias = _backward_op(grad, xs, weight, bias, mean, invstd, *ctx.options, list(needs[0]))
    # Every bias has the same gradient, each in memory of its own.
    dbiases = dbias.expand(b, -1).clone() if any(needs[2]) else dweight
    return (
        [d if need else None for d, need in zip(dxs, needs[0], strict=True)],
        _parameter_gradients(dweight, weight, needs[1]),
        _parameter_gradients(dbiases, bias, needs[2]),
    )


def _parameter_gradients(grads: Tensor, parameters: Tensors, needs: Sequence[bool]) -> list[Any]:
    # A conversion to the same type costs a call of torch.
    return [
        None if not need else d if p.dtype is torch.float32 else d.to(p.dtype)
        for d, p, need in zip(grads.unbind(), parameters, needs, strict=True)
    ]


def _backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Any, ...]:
    rest = (*([None] * count for count in ctx.running), *[None] * 4)
    b = len(ctx.saved_tensors) // 3
    if grad is None:
        return (*([None] * b for _ in range(3)), *rest)
    return (*_gradients(ctx, grad, [_each(need, b) for need in ctx.needs_input_grad[:3]]), *rest)


class _multi_branch_bn_add_relu(torch.autograd.Function):
    """The operator and its gradient, recorded without the list handling of the operator's own formula (200 us)."""

    @staticmethod
    def forward(ctx: Any, running: tuple[Any, Any], options: tuple[Any, ...], *tensors: Tensor) -> reference.Outputs:
        b = len(tensors) // 3
        xs, weight, bias = list(tensors[:b]), list(tensors[b : 2 * b]), list(tensors[2 * b :])
        output: reference.Outputs = _op(xs, weight, bias, *running, *options)
        _save(ctx, (xs, weight, bias, *running, *options), output)
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Any, ...]:
        needs = ctx.needs_input_grad[2:]
        if grad is None:
            return (None,) * (2 + len(needs))
        b = len(needs) // 3
        each = _gradients(ctx, grad, [needs[i * b : (i + 1) * b] for i in range(3)])
        return (None, None, *each[0], *each[1], *each[2])


def _plain(tensors: Tensors) -> bool:
    """Whether a call that records its gradient needs nothing of the dispatcher: see `_multi_branch_bn_add_relu`."""
    return (
        torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and all((type(t) is Tensor or type(t) is torch.nn.Parameter) and t.is_cpu for t in tensors)
        and _direct.nothing_watches()
    )


_op = Op(
    "multi_branch_bn_add_relu",
    "(Tensor[] xs, Tensor[] weight, Tensor[] bias, Tensor[] running_mean, Tensor[] running_var, bool training, "
    "float momentum, float eps, bool relu) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    fake=_fake,
    reference=reference.multi_branch_bn_add_relu,
    setup_context=_save,
    backward=_backward,
    autocast=("xs",),
)


def multi_branch_bn_add_relu(
    xs: Tensors,
    weight: Tensors,
    bias: Tensors,
    running_mean: Tensors = (),
    running_var: Tensors = (),
    training: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    relu: bool = True,
) -> reference.Outputs:
    """Batch norms of 1 to 4 branches, their sum and a ReLU: ``relu(sum of batch_norm(x, weight, bias))``.

    The training form of RepVGG-like blocks (Ding et al., CVPR 2021). Running statistics are not written to: their new
    values are returned, and the caller copies them (:class:`effkern.nn.MultiBranchBNAddReLU` does). Math is fp32,
    statistics are combined in fp64; no bit depends on the number of threads, and without ``training`` a sample's
    result depends on the sample alone.

    Args:
        xs: 1 to 4 tensors ``[n, c, h, w]`` of one shape and dtype, float32, bfloat16 or float16, any strides. They are
            read in place if they lie like the first one.
        weight, bias: one ``[c]`` a branch, float32 or the dtype of ``xs``.
        running_mean, running_var: one ``[c]`` a branch, float32 or the dtype of ``xs``. Both may be empty in training.
        training: normalise with the statistics of the batch, else with the running ones.
        momentum: weight of the batch in the new running statistics, in [0, 1].
        eps: added to the variance, positive.
        relu: whether to cut off below 0. NaN stays NaN.

    Returns:
        ``(y, mean, invstd, new_running_mean, new_running_var)``: ``y`` in the dtype of ``xs``, channels_last if the
        first branch is, else contiguous; ``mean`` and ``1 / sqrt(var + eps)`` that were used, float64 ``[b, c]``; the
        new running statistics, float32 ``[b, c]``, with the unbiased variance as in
        :func:`torch.nn.functional.batch_norm`, unchanged by an empty batch, and ``[0, c]`` where nothing was tracked.

    Raises:
        ValueError: for shapes, lengths, devices or numbers that do not fit; for a single value a channel in training.
        TypeError: for other dtypes, or dtypes that differ.

    Differentiable once in xs, weight and bias, through ``y`` only; under autocast xs are cast.

    >>> one, zero = torch.ones(1), torch.zeros(1)
    >>> x = torch.tensor([-1.0, 1.0]).view(2, 1, 1, 1)
    >>> y, *_ = multi_branch_bn_add_relu([x, x], [one, one], [zero, zero], eps=1e-12)
    >>> y.flatten().tolist()
    [0.0, 2.0]
    """
    xs, weight, bias, running = list(xs), list(weight), list(bias), (list(running_mean), list(running_var))
    options = (training, momentum, eps, relu)
    tensors = [*xs, *weight, *bias]
    if len(xs) == len(weight) == len(bias) > 0 and _plain(tensors):
        return _multi_branch_bn_add_relu.apply(running, options, *tensors)  # type: ignore[no-untyped-call, no-any-return]
    return _op(xs, weight, bias, *running, *options)
