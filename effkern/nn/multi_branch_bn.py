"""Batch norms of parallel branches, their sum and a ReLU as one layer: the tail of a re-parameterizable block."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from effkern.ops._checks import FLOATS
from effkern.ops._registry import OPS
from effkern.ops.multi_branch_bn import MAX_BRANCHES, multi_branch_bn_add_relu

#: Where the op is worth its call: without a kernel it would be the same passes, and its gradient a few more.
DEVICES = {"cpu", *(device for device, kind in OPS["multi_branch_bn_add_relu"].backends.items() if kind == "native")}


def has_hooks(module: nn.Module) -> bool:
    """Whether someone wants to know when ``module`` is called, so that it has to be."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def norms_fuse(norms: Sequence[nn.Module]) -> bool:
    """Whether these are plain affine ``BatchNorm2d`` of one configuration, 1 to 4, that one call may stand for."""
    first = norms[0]
    if len(norms) > MAX_BRANCHES or not all(type(n) is nn.BatchNorm2d and n.affine for n in norms):
        return False
    assert isinstance(first, nn.BatchNorm2d)
    same = ("num_features", "eps", "momentum", "training", "track_running_stats")
    alike = all(getattr(n, name) == getattr(first, name) for n in norms[1:] for name in same)
    whole = all((n.running_mean is not None) == first.track_running_stats for n in norms)
    # The plain average over all batches needs the count of each.
    counted = first.momentum is not None
    return alike and whole and counted and first.eps > 0 and not any(map(has_hooks, norms))


def maps_fuse(xs: Sequence[Tensor]) -> bool:
    """Whether the op takes these maps: of one shape, on a device it has kernels for, and no transform looks inside."""
    first = xs[0]
    fits = first.device.type in DEVICES and first.dim() == 4 and first.dtype in FLOATS
    alike = all(x.dtype == first.dtype and x.shape == first.shape and x.device == first.device for x in xs[1:])
    if not torch.compiler.is_compiling():
        # torch.func and forward-mode differentiation look into the layers; the op is opaque to them.
        fits = fits and forward_ad._current_level < 0 and torch._C._functorch.peek_interpreter_stack() is None
    return fits and alike


def bn_add_relu(xs: Sequence[Tensor], norms: Sequence[nn.BatchNorm2d], relu: bool = True) -> Tensor:
    """``relu(sum of norm(x))`` with the running statistics of ``norms`` updated as :class:`torch.nn.BatchNorm2d` does.

    Args:
        xs: as many ``[n, c, h, w]`` as there are ``norms``, see :func:`effkern.ops.multi_branch_bn_add_relu`.
        norms: affine batch norms of one configuration.
        relu: whether to cut off below 0.
    """
    first = norms[0]
    tracked = first.track_running_stats
    momentum = first.momentum
    if first.training and tracked:
        for norm in norms:
            assert norm.num_batches_tracked is not None
            norm.num_batches_tracked.add_(1)
        if momentum is None:  # the plain average over all batches
            momentum = 1.0 / float(first.num_batches_tracked)  # type: ignore[arg-type]
    y, _, _, mean, var = multi_branch_bn_add_relu(
        xs,
        [n.weight for n in norms],
        [n.bias for n in norms],
        [n.running_mean for n in norms] if tracked else (),  # type: ignore[misc]
        [n.running_var for n in norms] if tracked else (),  # type: ignore[misc]
        first.training or not tracked,
        0.0 if momentum is None else momentum,
        first.eps,
        relu,
    )
    if first.training and tracked:
        with torch.no_grad():
            for norm, new_mean, new_var in zip(norms, mean.unbind(), var.unbind(), strict=True):
                norm.running_mean.copy_(new_mean)  # type: ignore[union-attr]
                norm.running_var.copy_(new_var)  # type: ignore[union-attr]
    return y


class MultiBranchBNAddReLU(nn.Module):
    """``relu(sum of batch_norm_i(x_i))`` over 1 to 4 branches.

    Holds one :class:`torch.nn.BatchNorm2d` a branch, ``norms.0`` to ``norms.3``, and computes all of them, the sum and
    the ReLU with :func:`effkern.ops.multi_branch_bn_add_relu`.

    Args:
        num_features: channels.
        branches: number of inputs, 1 to 4.
        eps: added to the variance.
        momentum: of the running statistics; ``None`` accumulates the plain average over all batches.
        relu: whether to cut off below 0.
        track_running_stats: without, the statistics of the batch are used in eval mode too.
        device, dtype: of parameters and statistics.

    Shape:
        ``branches`` times ``[n, num_features, h, w]`` to the same.
    """

    def __init__(
        self,
        num_features: int,
        branches: int = 3,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        relu: bool = True,
        track_running_stats: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not 1 <= branches <= MAX_BRANCHES:
            raise ValueError(f"branches must lie in 1 to {MAX_BRANCHES}, got {branches}")
        options: dict[str, Any] = {"track_running_stats": track_running_stats, "device": device, "dtype": dtype}
        self.norms = nn.ModuleList(nn.BatchNorm2d(num_features, eps, momentum, **options) for _ in range(branches))
        self.relu = relu

    def forward(self, *xs: Tensor) -> Tensor:
        """One tensor a branch.

        Raises:
            ValueError: for another number of tensors, or shapes that do not fit.
        """
        if len(xs) != len(self.norms):
            raise ValueError(f"MultiBranchBNAddReLU: xs must be {len(self.norms)} tensors, got {len(xs)}")
        return bn_add_relu(xs, list(self.norms), self.relu)  # type: ignore[arg-type]

    def extra_repr(self) -> str:
        return f"relu={self.relu}"
