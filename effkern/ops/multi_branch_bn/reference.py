"""Fused batch norms of parallel branches in plain PyTorch: the op's definition, the tests' oracle, the fallback."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from effkern.ops._autograd import compute_dtype

Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def _channels(vector: Tensor) -> Tensor:
    return vector.view(1, -1, 1, 1)


def multi_branch_bn_add_relu(
    xs: Sequence[Tensor],
    weight: Sequence[Tensor],
    bias: Sequence[Tensor],
    running_mean: Sequence[Tensor] = (),
    running_var: Sequence[Tensor] = (),
    training: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    relu: bool = True,
) -> Outputs:
    """``relu(sum of batch_norm(x, weight, bias))`` over the branches, and the statistics used and updated.

    Returns:
        ``y`` in the dtype of ``xs``; ``mean`` and ``invstd``, fp64 ``[b, C]``; the new running mean and variance,
        ``[b, C]`` in fp32 (fp64 for fp64 inputs), without rows unless training with running statistics.
    """
    math = compute_dtype(xs[0])
    n, channels, h, w = xs[0].shape
    positions = n * h * w
    z = xs[0].new_zeros(xs[0].shape, dtype=math)
    means, invstds, new_means, new_vars = [], [], [], []
    for i, x in enumerate(xs):
        if training and positions > 0:
            variance, mean = torch.var_mean(x.double(), (0, 2, 3), correction=0)
        elif training:
            variance, mean = (torch.zeros(channels, dtype=torch.float64, device=x.device) for _ in range(2))
        else:
            variance, mean = running_var[i].double(), running_mean[i].double()
        invstd = torch.rsqrt(variance + eps)
        scale = weight[i].double() * invstd
        z = z + ((x.double() - _channels(mean)) * _channels(scale) + _channels(bias[i].double())).to(math)
        means.append(mean.detach())
        invstds.append(invstd.detach())
        if training and running_mean:
            step = momentum if positions > 0 else 0.0
            unbiased = variance.detach() * (positions / (positions - 1) if positions > 1 else 1.0)
            new_means.append(((1 - step) * running_mean[i].double() + step * mean.detach()).to(math))
            new_vars.append(((1 - step) * running_var[i].double() + step * unbiased).to(math))
    y = (F.relu(z) if relu else z).to(xs[0].dtype)
    none = z.new_empty(0, channels)
    new_mean, new_var = (torch.stack(new) if new else none.clone() for new in (new_means, new_vars))
    return y, torch.stack(means), torch.stack(invstds), new_mean, new_var


def multi_branch_bn_add_relu_backward(
    grad: Tensor,
    xs: Sequence[Tensor],
    weight: Sequence[Tensor],
    bias: Sequence[Tensor],
    mean: Tensor,
    invstd: Tensor,
    training: bool,
    relu: bool,
    needs: Sequence[bool],
) -> tuple[list[Tensor], Tensor, Tensor]:
    """Gradients by the branches that ``needs`` names (others empty), by the weights ``[b, C]`` and by a bias."""
    math = compute_dtype(grad)
    positions = max(grad.shape[0] * grad.shape[2] * grad.shape[3], 1)
    deviations = [x.to(math) - _channels(mean[i].to(math)) for i, x in enumerate(xs)]
    hats = [d * _channels(invstd[i].to(math)) for i, d in enumerate(deviations)]
    g = grad.to(math)
    if relu:
        z = sum(hat * _channels(weight[i].to(math)) + _channels(bias[i].to(math)) for i, hat in enumerate(hats))
        g = torch.where(z <= 0, torch.zeros_like(g), g)
    dbias = g.sum((0, 2, 3))
    dweight = torch.stack([(g * hat).sum((0, 2, 3)) for hat in hats])
    dxs = []
    for i, need in enumerate(needs):
        if not need:
            dxs.append(grad.new_empty(0, dtype=xs[i].dtype))
            continue
        scale = _channels(weight[i].to(math) * invstd[i].to(math))
        inner = g - (_channels(dbias) + hats[i] * _channels(dweight[i])) / positions if training else g
        dxs.append((scale * inner).to(xs[i].dtype))
    return dxs, dweight, dbias
