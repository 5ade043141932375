"""A Fashion-MNIST of 12 images: the real file names and format, with expectations to match."""

from __future__ import annotations

import gzip
import hashlib
import struct
from pathlib import Path

import numpy as np

from effkern.data.fashion_mnist import TEST_IMAGES, TEST_LABELS, TRAIN_IMAGES, TRAIN_LABELS
from effkern.data.idx import Expected

TRAIN, TEST, HELD_OUT = 8, 4, 2


def idx(array: np.ndarray) -> bytes:
    """An array in idx format, written independently of the reader."""
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


def contents() -> dict[str, bytes]:
    """File name -> uncompressed content."""
    random = np.random.default_rng(0)
    return {
        TRAIN_IMAGES: idx(random.integers(0, 256, (TRAIN, 28, 28), dtype=np.uint8)),
        TRAIN_LABELS: idx(np.arange(TRAIN, dtype=np.uint8)),
        TEST_IMAGES: idx(random.integers(0, 256, (TEST, 28, 28), dtype=np.uint8)),
        TEST_LABELS: idx(np.arange(TEST, dtype=np.uint8)),
    }


def expectations() -> dict[str, Expected]:
    """What each of these files must be."""
    shapes = {TRAIN_IMAGES: (TRAIN, 28, 28), TRAIN_LABELS: (TRAIN,), TEST_IMAGES: (TEST, 28, 28), TEST_LABELS: (TEST,)}
    return {name: Expected(shapes[name], hashlib.sha256(raw).hexdigest()) for name, raw in contents().items()}


def fill(folder: Path) -> Path:
    """Write the four gzipped files."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, raw in contents().items():
        (folder / f"{name}.gz").write_bytes(gzip.compress(raw))
    return folder
