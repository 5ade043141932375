"""Blocks of parallel conv-BN branches that train apart and are one convolution at inference."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from effkern.nn.multi_branch_bn import bn_add_relu, has_hooks, maps_fuse, norms_fuse
from effkern.ops._autograd import activate


class ConvBN(nn.Module):
    """A convolution without bias and the batch norm behind it: one branch.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        kernel_size: height and width of the kernel.
        stride, padding, dilation, groups: as in :class:`torch.nn.Conv2d`.
        device, dtype: of the parameters.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.conv = nn.Conv2d(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias=False, **factory
        )
        self.norm = nn.BatchNorm2d(out_channels, **factory)

    def forward(self, x: Tensor) -> Tensor:
        """``[n, in_channels, h, w]`` to ``[n, out_channels, ho, wo]``."""
        return self.norm(self.conv(x))


class BranchBlock(nn.Module):
    """``act(sum of the branches)``, each branch a :class:`ConvBN` or a bare batch norm (the identity branch).

    Every branch is linear at inference, so the sum is one convolution: :func:`effkern.reparam.fold_model` makes it.
    Before that the batch norms, the sum and a ReLU are one op where they can be
    (:func:`effkern.ops.multi_branch_bn_add_relu`): up to four plain batch norms of one configuration without hooks, on
    the CPU.

    Args:
        branches: name to branch; the sum is taken in this order.
        act: ``"none"``, ``"relu"``, ``"relu6"``, ``"hardswish"`` or ``"silu"``.

    Attributes:
        fuse_norms: set it to False for second derivatives, which the op does not have.
    """

    fuse_norms = True

    def __init__(self, branches: dict[str, nn.Module], act: str = "relu") -> None:
        super().__init__()
        self.branches = nn.ModuleDict(branches)
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        """``[n, c, h, w]`` to ``[n, out_channels, ho, wo]``."""
        branches = list(self.branches.values())
        if self._fuses(branches):
            norms = [b.norm if isinstance(b, ConvBN) else b for b in branches]
            xs = [b.conv(x) if isinstance(b, ConvBN) else x for b in branches]
            if maps_fuse(xs):
                return bn_add_relu(xs, norms, self.act == "relu")  # type: ignore[arg-type]
            terms = [norm(z) for norm, z in zip(norms, xs, strict=True)]
        else:
            terms = [branch(x) for branch in branches]
        y = terms[0]
        for term in terms[1:]:
            y = y + term
        return activate(y, self.act)

    def _fuses(self, branches: list[nn.Module]) -> bool:
        if not self.fuse_norms or self.act not in ("relu", "none"):
            return False
        if not all(type(b) in (ConvBN, nn.BatchNorm2d) and not has_hooks(b) for b in branches):
            return False
        return norms_fuse([b.norm if isinstance(b, ConvBN) else b for b in branches])

    def extra_repr(self) -> str:
        """What ``print`` shows besides the branches."""
        return f"act={self.act!r}"


class RepVGGBlock(BranchBlock):
    """``act(BN(conv3x3(x)) + BN(conv1x1(x)) [+ BN(x)])``, the training form of RepVGG (Ding et al., CVPR 2021).

    The identity branch exists where it can: as many channels out as in, and stride 1. ``padding`` of the 3x3 branch is
    ``dilation``, so that the map keeps its size at stride 1 and all branches look at the same centre.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        stride: of every branch.
        dilation: of the 3x3 branch.
        groups: of the 3x3 and the 1x1 branch.
        act: activation behind the sum.
        device, dtype: of the parameters.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int = 1,
        dilation: int = 1,
        groups: int = 1,
        act: str = "relu",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        branches: dict[str, nn.Module] = {
            "conv3": ConvBN(in_channels, out_channels, 3, stride, dilation, dilation, groups, **factory),
            "conv1": ConvBN(in_channels, out_channels, 1, stride, groups=groups, **factory),
        }
        if in_channels == out_channels and stride == 1:
            branches["identity"] = nn.BatchNorm2d(out_channels, **factory)
        super().__init__(branches, act)
