"""Layers whose weight is codes and a codebook: convolution, linear, embedding."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from effkern.nn._geometry import ints
from effkern.nn.pq_layer import PQLayer, book_options, code_dtype
from effkern.ops import pq_conv2d, pq_embedding, pq_linear
from effkern.ops._checks import ACTIVATIONS

__all__ = ["PQConv2d", "PQEmbedding", "PQLayer", "PQLinear", "code_dtype"]


def _check_act(act: str) -> None:
    if act not in ACTIVATIONS:
        raise ValueError(f"act: must be one of {', '.join(ACTIVATIONS)}, got {act!r}")


class PQLinear(PQLayer):
    """A linear layer run from codes; see :func:`effkern.ops.pq_linear`.

    Args:
        in_features: ``Ci``.
        out_features: ``Co``.
        d: length of a sub-vector; need not divide ``in_features``.
        entries: ``K``, at most 65536.
        stages: additive stages, or None for one code a position.
        books: 1, or one per position, or one per stage.
        bias: whether there is one.
        scale: whether rows have a factor.
        act: activation, applied in the same pass.
        device, dtype: of the parameters.

    >>> PQLinear(16, 8, d=4, entries=32)(torch.zeros(2, 16)).shape
    torch.Size([2, 8])
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        d: int,
        entries: int,
        *,
        stages: int | None = None,
        books: int = 1,
        bias: bool = True,
        scale: bool = False,
        act: str = "none",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(out_features, in_features, d, entries, stages, books, scale, device, dtype)
        _check_act(act)
        self.in_features, self.out_features, self.act = in_features, out_features, act
        self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        self.reset_parameters()

    @classmethod
    def from_float(
        cls, linear: nn.Linear, codes: Tensor, codebook: Tensor, scale: Tensor | None = None, act: str = "none"
    ) -> PQLinear:
        """The layer of ``linear`` with its weight replaced by codes; the bias is copied."""
        options = book_options(codes, codebook, scale)
        layer = cls(linear.in_features, linear.out_features, bias=linear.bias is not None, act=act, **options)
        layer._fill(codes, codebook, scale, linear.bias)
        return layer.train(linear.training)

    def reset_parameters(self) -> None:
        """Random codes and codebook, bias as in :class:`torch.nn.Linear`."""
        super().reset_parameters()
        if self.bias is not None:
            nn.init.uniform_(self.bias, -1 / math.sqrt(self.columns), 1 / math.sqrt(self.columns))

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in_features]`` to ``[..., out_features]``."""
        return pq_linear(x, self.codes, self.codebook, self.scale, self.bias, self.act)

    def macs(self, input_shape: torch.Size, output_shape: torch.Size) -> float:
        """Multiply-adds of one forward: those of the dense layer, which it computes exactly."""
        return float(output_shape.numel() * self.in_features)

    def extra_repr(self) -> str:
        """Shown by ``print``."""
        return (
            f"{self.in_features}, {self.out_features}, {self._describe()}, bias={self.bias is not None}, act={self.act}"
        )


class PQConv2d(PQLayer):
    """A convolution run from codes; see :func:`effkern.ops.pq_conv2d`.

    Args:
        in_channels: ``Ci``.
        out_channels: ``Co``.
        kernel_size: ``(R, S)``.
        d: length of a sub-vector of a row of ``Ci / groups * R * S`` numbers.
        entries: ``K``, at most 65536.
        stride, padding, dilation, groups: as in :class:`torch.nn.Conv2d`.
        stages: additive stages, or None for one code a position.
        books: 1, or one per position, or one per stage.
        bias: whether there is one.
        scale: whether output channels have a factor, where a folded batch norm goes.
        act: activation, applied in the same pass.
        padding_mode: as in :class:`torch.nn.Conv2d`; other than ``"zeros"`` the padded input is written out first.
        device, dtype: of the parameters.

    >>> PQConv2d(4, 8, 3, d=9, entries=16, padding=1)(torch.zeros(2, 4, 5, 5)).shape
    torch.Size([2, 8, 5, 5])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        d: int,
        entries: int,
        *,
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        stages: int | None = None,
        books: int = 1,
        bias: bool = True,
        scale: bool = False,
        act: str = "none",
        padding_mode: str = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if groups < 1 or in_channels % groups or out_channels % groups:
            raise ValueError(f"groups: must divide {in_channels} and {out_channels} channels, got {groups}")
        height, width = ints(kernel_size, "kernel_size")
        columns = in_channels // groups * height * width
        super().__init__(out_channels, columns, d, entries, stages, books, scale, device, dtype)
        _check_act(act)
        if padding_mode not in ("zeros", "reflect", "replicate", "circular"):
            raise ValueError(f"padding_mode: must be zeros, reflect, replicate or circular, got {padding_mode!r}")
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, groups
        self.kernel_size = (height, width)
        self.stride, self.padding = ints(stride, "stride"), ints(padding, "padding", 0)
        self.dilation, self.padding_mode, self.act = ints(dilation, "dilation"), padding_mode, act
        self.bias = nn.Parameter(torch.empty(out_channels, device=device, dtype=dtype)) if bias else None
        self.reset_parameters()

    @classmethod
    def from_float(
        cls,
        conv: nn.Conv2d,
        codes: Tensor,
        codebook: Tensor,
        scale: Tensor | None = None,
        bias: Tensor | None = None,
        act: str = "none",
    ) -> PQConv2d:
        """The layer of ``conv`` with its weight replaced by codes.

        Args:
            conv: gives the geometry, and its bias unless ``bias`` is given (as for a folded batch norm).
            codes: ``[Co, J]`` or ``[Co, J, m]``.
            codebook: ``[B, K, d]``.
            scale: ``[Co]``.
            bias: ``[Co]``.
            act: activation.

        Raises:
            ValueError: for ``padding="same"`` that would pad one side more than the other.
        """
        bias = conv.bias if bias is None else bias
        layer = cls(
            conv.in_channels,
            conv.out_channels,
            tuple(conv.kernel_size),  # type: ignore[arg-type]
            stride=tuple(conv.stride),  # type: ignore[arg-type]
            padding=conv_padding(conv),
            dilation=tuple(conv.dilation),  # type: ignore[arg-type]
            groups=conv.groups,
            bias=bias is not None,
            act=act,
            padding_mode=conv.padding_mode,
            **book_options(codes, codebook, scale),
        )
        layer._fill(codes, codebook, scale, bias)
        return layer.train(conv.training)

    def reset_parameters(self) -> None:
        """Random codes and codebook, bias as in :class:`torch.nn.Conv2d`."""
        super().reset_parameters()
        if self.bias is not None:
            nn.init.uniform_(self.bias, -1 / math.sqrt(self.columns), 1 / math.sqrt(self.columns))

    def forward(self, x: Tensor) -> Tensor:
        """``[N, in_channels, H, W]`` to ``[N, out_channels, Ho, Wo]``."""
        padding = self.padding
        if self.padding_mode != "zeros":
            x = F.pad(x, (padding[1], padding[1], padding[0], padding[0]), mode=self.padding_mode)
            padding = (0, 0)
        return pq_conv2d(
            x,
            self.codes,
            self.codebook,
            self.scale,
            self.bias,
            self.kernel_size,
            self.stride,
            padding,
            self.dilation,
            self.groups,
            self.act,
        )

    def macs(self, input_shape: torch.Size, output_shape: torch.Size) -> float:
        """Multiply-adds of one forward: those of the dense layer, which it computes exactly."""
        return float(output_shape.numel() * self.columns)

    def extra_repr(self) -> str:
        """Shown by ``print``."""
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"padding={self.padding}, dilation={self.dilation}, groups={self.groups}, {self._describe()}, "
            f"bias={self.bias is not None}, act={self.act}"
        )


def conv_padding(conv: nn.Conv2d) -> tuple[int, int]:
    """Padding of a convolution as two integers.

    Raises:
        ValueError: for ``"same"`` where the two sides differ.
    """
    if not isinstance(conv.padding, str):
        return ints(conv.padding, "padding", 0)
    if conv.padding == "valid":
        return 0, 0
    spans = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
    if any(span % 2 for span in spans):
        raise ValueError(f"padding: 'same' is uneven for kernel_size {conv.kernel_size} and dilation {conv.dilation}")
    return spans[0] // 2, spans[1] // 2


class PQEmbedding(PQLayer):
    """An embedding table held as codes; see :func:`effkern.ops.pq_embedding`. Only rows asked for are decoded.

    Args:
        num_embeddings: rows of the table.
        embedding_dim: numbers in a row.
        d: length of a sub-vector; need not divide ``embedding_dim``.
        entries: ``K``, at most 65536.
        padding_idx: this row is zero.
        stages: additive stages, or None for one code a position.
        books: 1, or one per position, or one per stage.
        scale: whether rows have a factor.
        device, dtype: of the parameters.

    >>> PQEmbedding(100, 16, d=8, entries=32)(torch.tensor([[3, 99]])).shape
    torch.Size([1, 2, 16])
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        d: int,
        entries: int,
        *,
        padding_idx: int | None = None,
        stages: int | None = None,
        books: int = 1,
        scale: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_embeddings, embedding_dim, d, entries, stages, books, scale, device, dtype)
        if padding_idx is not None and not 0 <= padding_idx < num_embeddings:
            raise ValueError(f"padding_idx: must be in [0, {num_embeddings}), got {padding_idx}")
        self.num_embeddings, self.embedding_dim, self.padding_idx = num_embeddings, embedding_dim, padding_idx
        self.reset_parameters()

    @classmethod
    def from_float(
        cls, embedding: nn.Embedding, codes: Tensor, codebook: Tensor, scale: Tensor | None = None
    ) -> PQEmbedding:
        """The table of ``embedding`` replaced by codes.

        Raises:
            ValueError: for a ``max_norm``, which rewrites rows in place.
        """
        if embedding.max_norm is not None:
            raise ValueError(f"embedding: max_norm must be None, got {embedding.max_norm}")
        options = book_options(codes, codebook, scale)
        layer = cls(embedding.num_embeddings, embedding.embedding_dim, padding_idx=embedding.padding_idx, **options)
        layer._fill(codes, codebook, scale, None)
        return layer.train(embedding.training)

    def forward(self, idx: Tensor) -> Tensor:
        """``[...]`` of int64 or int32 to ``[..., embedding_dim]``."""
        rows = pq_embedding(idx, self.codes, self.codebook, self.scale, self.padding_idx)
        return rows if rows.shape[-1] == self.embedding_dim else rows[..., : self.embedding_dim]

    def extra_repr(self) -> str:
        """Shown by ``print``."""
        return f"{self.num_embeddings}, {self.embedding_dim}, {self._describe()}, padding_idx={self.padding_idx}"
