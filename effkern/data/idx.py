"""idx files, the format of the MNIST family: read only after every byte was checked.

Layout: four bytes ``00 00 <type> <dims>``, a big-endian uint32 for each dimension, then the elements. Type 8 is uint8.
"""

from __future__ import annotations

import hashlib
import math
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

__all__ = ["DataError", "Expected", "check_idx", "read_idx"]

UINT8 = 8


class DataError(RuntimeError):
    """A data file is missing, cut short or not the one it should be."""


@dataclass(frozen=True)
class Expected:
    """What an idx file must be: shape of its uint8 array and SHA-256 of the uncompressed file.

    The hash is of the content, not of the ``.gz``: every distributor compresses anew.
    """

    shape: tuple[int, ...]
    sha256: str

    @property
    def header(self) -> bytes:
        """The bytes before the elements."""
        return struct.pack(f">BBBB{len(self.shape)}I", 0, 0, UINT8, len(self.shape), *self.shape)

    @property
    def size(self) -> int:
        """Bytes of the uncompressed file."""
        return len(self.header) + math.prod(self.shape)


def read_idx(path: Path, expected: Expected) -> Tensor:
    """The array of an idx file, gzipped or not.

    Returns:
        uint8 tensor of ``expected.shape``.

    Raises:
        DataError: if the file cannot be read, or is not byte for byte the expected one. The message names the file,
            what was expected and what was found.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error
    return check_idx(raw, expected, str(path))


def check_idx(raw: bytes, expected: Expected, name: str) -> Tensor:
    """As :func:`read_idx`, for bytes that are in memory already; ``name`` is for the message."""
    content = _uncompressed(raw, expected.size, name) if raw[:2] == b"\x1f\x8b" else raw
    header = content[: len(expected.header)]
    if header != expected.header:
        raise DataError(f"{name}: expected {_describe(expected.header)}, found {_describe(header)}")
    if len(content) != expected.size:
        more = " or more" if len(content) > expected.size else ""
        raise DataError(f"{name}: expected {expected.size} bytes (uncompressed), found {len(content)}{more}")
    digest = hashlib.sha256(content).hexdigest()
    if digest != expected.sha256:
        raise DataError(f"{name}: expected SHA-256 {expected.sha256} (uncompressed), found {digest}")
    # A copy, since torch wants memory it may write to.
    return torch.frombuffer(bytearray(content[len(expected.header) :]), dtype=torch.uint8).view(expected.shape)


def _uncompressed(raw: bytes, limit: int, name: str) -> bytes:
    """Unzip, one byte past ``limit`` at most: enough to know that a file is too long, and no more memory than that."""
    unzip = zlib.decompressobj(wbits=31)  # with a gzip header and its checksum
    try:
        content = unzip.decompress(raw, limit + 1)
    except zlib.error as error:
        raise DataError(f"{name}: expected gzip data, found it broken: {error}") from error
    if not unzip.eof and len(content) <= limit:
        raise DataError(f"{name}: expected {limit} bytes (uncompressed), found {len(content)} before the file ended")
    return content


def _describe(header: bytes) -> str:
    """The header of an idx file in words."""
    if len(header) < 4:
        return f"only {len(header)} bytes"
    count = header[3]
    if header[:3] != bytes((0, 0, UINT8)) or len(header) < 4 + 4 * count or count == 0:
        return f"the bytes {header[:4].hex(' ')}"
    return f"an idx file of shape {struct.unpack_from(f'>{count}I', header, 4)}"
