"""Training forms that fold into one convolution. RepVGG's lives in :mod:`effkern.nn`, where networks can use it."""

from __future__ import annotations

from typing import Any

import torch

from effkern.nn.repvgg_block import BranchBlock, ConvBN, RepVGGBlock

__all__ = ["ACBlock", "RepVGGBlock"]


class ACBlock(BranchBlock):
    """``act(BN(conv KxK) + BN(conv 1xK) + BN(conv Kx1))``, the asymmetric block of ACNet (Ding et al., ICCV 2019).

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        kernel_size: K, odd, so that the branches share a centre.
        stride: of every branch.
        padding: of the square kernel, at least ``dilation * (kernel_size // 2)``; default: that.
        dilation: of every branch.
        groups: of every branch.
        act: activation behind the sum.
        device, dtype: of the parameters.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        stride: int = 1,
        padding: int | None = None,
        dilation: int = 1,
        groups: int = 1,
        act: str = "relu",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if kernel_size % 2 == 0:
            raise ValueError(f"kernel_size: must be odd, got {kernel_size}: even kernels have no common centre")
        reach = dilation * (kernel_size // 2)
        padding = reach if padding is None else padding
        if padding < reach:
            raise ValueError(f"padding: must be at least dilation * (kernel_size // 2) = {reach}, got {padding}")
        shared: dict[str, Any] = {"stride": stride, "dilation": dilation, "groups": groups}
        shared |= {"device": device, "dtype": dtype}
        inner = padding - reach  # of the axis along which a branch is one pixel wide
        shapes = {
            "square": ((kernel_size, kernel_size), (padding, padding)),
            "row": ((1, kernel_size), (inner, padding)),
            "column": ((kernel_size, 1), (padding, inner)),
        }
        super().__init__(
            {name: ConvBN(in_channels, out_channels, k, padding=p, **shared) for name, (k, p) in shapes.items()}, act
        )
