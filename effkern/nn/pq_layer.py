"""What the layers run from codes share: codes, codebook, row scale."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from effkern.ops import pq_decode
from effkern.ops._checks import FLOATS

MAX_ENTRIES = 65536


def code_dtype(entries: int) -> torch.dtype:
    """The smallest type for codes below ``entries``: uint8, int16 or uint16."""
    if not 1 <= entries <= MAX_ENTRIES:
        raise ValueError(f"entries: must be in [1, {MAX_ENTRIES}], got {entries}")
    return torch.uint8 if entries <= 256 else torch.int16 if entries <= 32768 else torch.uint16


class PQLayer(nn.Module):
    """What the three layers share: the codes, the codebook, the optional row scale.

    Attributes:
        code_bytes: buffer, uint8 ``[rows, J, 1 or 2]`` or ``[rows, J, stages, 1 or 2]``: the codes as bytes, since
            DistributedDataParallel cannot broadcast 16-bit integers. Read and written through :attr:`codes`.
        codebook: parameter ``[books, entries, d]``.
        scale: parameter ``[rows]``, or None.
    """

    code_bytes: Tensor

    def __init__(
        self,
        rows: int,
        columns: int,
        d: int,
        entries: int,
        stages: int | None,
        books: int,
        scale: bool,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        for name, value in (("rows", rows), ("columns", columns), ("d", d), ("books", books)):
            if value < 1:
                raise ValueError(f"{name}: must be at least 1, got {value}")
        if stages is not None and stages < 1:
            raise ValueError(f"stages: must be at least 1 or None, got {stages}")
        self.rows, self.columns, self.d, self.entries = rows, columns, d, entries
        shape = (rows, -(-columns // d), *(() if stages is None else (stages,)))
        if books not in (1, shape[-1]):
            what = "positions" if stages is None else "stages"
            raise ValueError(f"books: must be 1 or the {shape[-1]} {what}, got {books}")
        width = code_dtype(entries).itemsize
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.register_buffer("code_bytes", torch.empty(*shape, width, dtype=torch.uint8, device=device))
        self.codebook = nn.Parameter(torch.empty(books, entries, d, **factory))
        self.scale = nn.Parameter(torch.empty(rows, **factory)) if scale else None

    @property
    def codes(self) -> Tensor:
        """``[rows, J]`` or ``[rows, J, stages]``, a view of the buffer; see :func:`code_dtype` for its type."""
        return self.code_bytes.view(code_dtype(self.entries)).squeeze(-1)

    @codes.setter
    def codes(self, codes: Tensor) -> None:
        if codes.shape != self.code_bytes.shape[:-1]:
            raise ValueError(f"codes: must have shape {list(self.code_bytes.shape[:-1])}, got {list(codes.shape)}")
        if codes.is_floating_point() or codes.is_complex() or codes.dtype == torch.bool:
            raise TypeError(f"codes: must be integers, got {codes.dtype}")
        wide = codes.long()
        if wide.numel() and (int(wide.min()) < 0 or int(wide.max()) >= self.entries):
            raise ValueError(f"codes: must lie in [0, {self.entries}), got {int(wide.min())}..{int(wide.max())}")
        typed = wide.to(code_dtype(self.entries)).unsqueeze(-1).contiguous()
        with torch.no_grad():
            self.code_bytes.copy_(typed.view(torch.uint8))

    def reset_parameters(self) -> None:
        """Random codes into a codebook whose rows make weights of standard deviation ``1 / sqrt(columns)``."""
        codes = torch.randint(self.entries, self.code_bytes.shape[:-1], device=self.code_bytes.device)
        self.codes = codes
        stages = self.code_bytes.shape[2] if self.code_bytes.dim() == 4 else 1
        nn.init.normal_(self.codebook, std=1 / math.sqrt(self.columns * stages))
        if self.scale is not None:
            nn.init.ones_(self.scale)

    def dense_weight(self) -> Tensor:
        """The decoded weight ``[rows, columns]``, scaled: for export and for looking at it."""
        return pq_decode(self.codes, self.codebook, self.scale)[:, : self.columns]

    def _fill(self, codes: Tensor, codebook: Tensor, scale: Tensor | None, bias: Tensor | None) -> None:
        self.codes = codes
        with torch.no_grad():
            self.codebook.copy_(codebook)
            for name, value in (("scale", scale), ("bias", bias)):
                if value is not None:
                    getattr(self, name).copy_(value)

    def _describe(self) -> str:
        books, entries, d = self.codebook.shape
        stages = f", stages={self.code_bytes.shape[2]}" if self.code_bytes.dim() == 4 else ""
        return f"d={d}, entries={entries}, books={books}{stages}, scale={self.scale is not None}"


def book_options(codes: Tensor, codebook: Tensor, scale: Tensor | None) -> dict[str, Any]:
    """Constructor arguments that codes, codebook and scale imply."""
    if codebook.dim() != 3 or codebook.dtype not in FLOATS:
        raise ValueError(f"codebook: must be a float [B, K, d], got {codebook.dtype} of shape {list(codebook.shape)}")
    if codes.dim() not in (2, 3):
        raise ValueError(f"codes: must be [Co, J] or [Co, J, m], got shape {list(codes.shape)}")
    return {
        "d": codebook.shape[2],
        "entries": codebook.shape[1],
        "stages": codes.shape[2] if codes.dim() == 3 else None,
        "books": codebook.shape[0],
        "scale": scale is not None,
        "device": codebook.device,
        "dtype": codebook.dtype,
    }
