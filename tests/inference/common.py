"""What the tests of ``effkern.optimize`` share: networks with lived-in batch norms, and comparison with fp64."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils import _pytree as pytree

import effkern
from effkern.inference import Optimized
from effkern.reparam import unfuse

UNIT = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def lived_in(model: nn.Module) -> nn.Module:
    """In eval mode, with statistics and affine parameters that are not those of a fresh batch norm."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            if module.running_mean is not None:
                module.running_mean.normal_(0, 0.2)
                module.running_var.uniform_(0.5, 2)
                module.num_batches_tracked += 1
            if module.affine:
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, 0, 0.2)
    return model.eval()


def error(y: torch.Tensor, exact: torch.Tensor) -> float:
    scale = float(exact.abs().max()) if exact.numel() else 0.0
    return float((y.double() - exact).abs().max()) / (scale or 1.0) if exact.numel() else 0.0


@torch.no_grad()
def same(optimized: nn.Module, model: nn.Module, *inputs, depth: int = 4, **options) -> None:
    """Outputs agree with the original run in fp64; containers, dtypes, shapes and strides with the original's.

    The bound is that of kernels.md 1.5 for a layer (16 u, for F(4,3) 12 u, of the sum over absolute values, which for
    random weights is about 5 times the largest output), times the layers.
    """
    before = [x.clone() for x in pytree.tree_leaves(inputs) if isinstance(x, torch.Tensor)]
    y = optimized(*inputs, **options)
    after = [x for x in pytree.tree_leaves(inputs) if isinstance(x, torch.Tensor)]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True)), "an input was written to"
    wide = unfuse(model).double()
    to = lambda x: x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x  # noqa: E731
    exact = wide(*pytree.tree_map(to, inputs), **pytree.tree_map(to, options))
    plain = model(*pytree.tree_map(lambda x: x.clone() if isinstance(x, torch.Tensor) else x, inputs), **options)
    leaves, kind = pytree.tree_flatten(y)
    expected, expected_kind = pytree.tree_flatten(plain)
    assert kind == expected_kind
    for ours, theirs, truth in zip(leaves, expected, pytree.tree_leaves(exact), strict=True):
        if not isinstance(theirs, torch.Tensor):
            assert ours == theirs
            continue
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
        assert ours.stride() == theirs.stride()
        if not theirs.is_floating_point():
            assert torch.equal(ours, theirs)
            continue
        bound = depth * (16 * 5 * UNIT[torch.float32] + (8 * UNIT[ours.dtype] if ours.dtype != torch.float32 else 0))
        assert error(ours, truth) <= bound, f"{error(ours, truth):.2e} of the largest value, bound {bound:.2e}"


def ops(optimized: Optimized) -> list[str]:
    """What the report says of every call of effkern's op, in order, without the module's name."""
    seen = dict.fromkeys(row.detail for row in optimized.report().replaced if ": " in row.detail)
    return [detail.split(": ", 1)[1] for detail in seen if "one Linear" not in detail]


def optimized_and_same(model: nn.Module, *inputs, example=None, depth: int = 4) -> Optimized:
    result = effkern.optimize(model, example)
    same(result, model, *inputs, depth=depth)
    return result
