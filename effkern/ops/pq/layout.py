"""What codes, codebook and per-row vectors must look like; friendly errors that need only shapes and dtypes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from effkern.ops import _checks

CODE_DTYPES = (torch.uint8, torch.int16, torch.uint16, torch.int32)
INDEX_DTYPES = (torch.int64, torch.int32)
ALGORITHMS = ("auto", "decode_fma", "panel", "lut", "direct")
LUT_ENTRIES = 256  # rows of a look-up table of the native kernels
MAX_BOOK = 1 << 30  # numbers in all books: the native kernels keep places in them in 32 bits
MAX_ENTRIES = 65536  # 16-bit codes; a larger book would not pay for itself in any layer


def check_dtype(op: str, name: str, tensor: Tensor, allowed: Sequence[torch.dtype]) -> None:
    """TypeError unless the tensor has one of the allowed dtypes."""
    if tensor.dtype not in allowed:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in allowed)
        raise TypeError(f"{op}: {name} must be one of {names}, got {tensor.dtype}")


def check_book(op: str, codes: Tensor, codebook: Tensor, columns: int | None = None) -> None:
    """Check codes against codebook, and both against the length of a weight row.

    Args:
        op: name of the op, for the message.
        codes: ``[Co, J]``, or ``[Co, J, m]`` for ``m`` additive stages.
        codebook: ``[B, K, d]``, ``B`` being 1 or the last size of ``codes``.
        columns: numbers in a weight row, if the op knows; ``J`` must be ``ceil(columns / d)``.
    """
    check_dtype(op, "codes", codes, CODE_DTYPES)
    _checks.check_dtype(codebook, op, "codebook")
    if codes.dim() not in (2, 3):
        raise ValueError(f"{op}: codes must be [Co, J] or [Co, J, m], got shape {list(codes.shape)}")
    if codebook.dim() != 3:
        raise ValueError(f"{op}: codebook must be [B, K, d], got shape {list(codebook.shape)}")
    books, entries, d = codebook.shape
    if d < 1 or not 1 <= entries <= MAX_ENTRIES:
        raise ValueError(f"{op}: codebook must have d >= 1 and K in [1, {MAX_ENTRIES}], got K = {entries}, d = {d}")
    if codebook.numel() >= MAX_BOOK:
        raise ValueError(f"{op}: codebook must hold fewer than {MAX_BOOK} numbers, got shape {list(codebook.shape)}")
    if codes.shape[1] < 1 or codes.shape[-1] < 1:
        raise ValueError(f"{op}: codes must have a position and a stage at least, got shape {list(codes.shape)}")
    if books not in (1, codes.shape[-1]):
        meaning = "position" if codes.dim() == 2 else "stage"
        raise ValueError(
            f"{op}: codebook must hold 1 book or one per {meaning} ({codes.shape[-1]}), got {books} for codes of "
            f"shape {list(codes.shape)}"
        )
    if columns is not None and codes.shape[1] != -(-columns // d):
        raise ValueError(
            f"{op}: codes must have ceil({columns} / {d}) = {-(-columns // d)} positions for weight rows of "
            f"{columns} numbers and d = {d}, got {codes.shape[1]}"
        )
    if codes.device != codebook.device:
        raise ValueError(f"{op}: codes must be on codebook's device {codebook.device}, got {codes.device}")


def check_rows(op: str, name: str, vector: Tensor | None, size: int, codebook: Tensor) -> None:
    """A vector of ``size``: float32 or the dtype of ``codebook``, on its device."""
    if vector is None:
        return
    if vector.dim() != 1 or vector.shape[0] != size:
        raise ValueError(f"{op}: {name} must have shape [{size}], got {list(vector.shape)}")
    check_dtype(op, name, vector, (torch.float32, *{codebook.dtype} - {torch.float32}))
    if vector.device != codebook.device:
        raise ValueError(f"{op}: {name} must be on codebook's device {codebook.device}, got {vector.device}")


def check_layer(op: str, x: Tensor, codes: Tensor, scale: Tensor | None, bias: Tensor | None, act: str) -> None:
    """Check what pq_linear and pq_conv2d share beyond codes, codebook and algorithm."""
    _checks.check_dtype(x, op, "x")
    _checks.check_device(codes, x, op, "codes")
    _checks.check_vector(scale, codes.shape[0], x, op, "scale", exact=True)
    _checks.check_vector(bias, codes.shape[0], x, op, "bias", exact=True)
    _checks.check_act(act, op)


def check_algo(op: str, algo: str, codes: Tensor, codebook: Tensor, pointwise: bool) -> None:
    """Check that ``algo`` exists and can run the layer.

    Args:
        op: name of the op, for the message.
        algo: one of `ALGORITHMS`.
        codes: of the layer, checked.
        codebook: of the layer, checked.
        pointwise: whether the layer is linear, or a convolution of a 1x1 kernel without padding and groups.
    """
    _checks.check_choice(algo, ALGORITHMS, op, "algo")
    if algo not in ("decode_fma", "lut"):
        return
    if not pointwise:
        raise ValueError(
            f"{op}: algo must be auto, panel or direct but for a 1x1 kernel without padding and groups, got {algo!r}"
        )
    stages = codes.shape[2] if codes.dim() == 3 else 1
    if algo == "lut" and (stages > 1 or codebook.shape[1] > LUT_ENTRIES):
        raise ValueError(
            f"{op}: algo must not be lut for codes of more than one stage or codebooks of more than {LUT_ENTRIES} "
            f"entries, got {stages} and {codebook.shape[1]}"
        )


def check_table(
    op: str, idx: Tensor, codes: Tensor, codebook: Tensor, scale: Tensor | None, padding_idx: int | None
) -> None:
    """Check what the two embeddings share."""
    check_dtype(op, "idx", idx, INDEX_DTYPES)
    check_book(op, codes, codebook)
    check_rows(op, "scale", scale, codes.shape[0], codebook)
    if idx.device != codes.device:
        raise ValueError(f"{op}: idx must be on codes' device {codes.device}, got {idx.device}")
    if padding_idx is not None and not 0 <= padding_idx < codes.shape[0]:
        raise ValueError(f"{op}: padding_idx must be in [0, {codes.shape[0]}), got {padding_idx}")
