"""CIFAR-10 (Krizhevsky 2009): 60,000 colour images of ten classes, 32x32, from files the user has.

Read are the authors' binary version (``data_batch_1.bin`` .. ``data_batch_5.bin``, ``test_batch.bin``) and NumPy
archives, with raw pixels or with JPEG bytes. The authors' pickled version is not: unpickling runs what it holds.
"""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from effkern.training import progress

from ._archive import UNREADABLE
from .dataset import Dataset
from .idx import DataError
from .split import Split

__all__ = ["load_cifar10"]

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
SIDE, CHANNELS = 32, 3
RECORD = 1 + CHANNELS * SIDE * SIDE
# The constants most published CIFAR networks were trained with; they are ImageNet's.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HELD_OUT = 5000  # last images of the training set


def load_cifar10(path: Path, held_out: int = HELD_OUT) -> Dataset:
    """Read CIFAR-10.

    Args:
        path: the folder of the binary version, or a ``.npz`` with, for ``train`` and ``test``, ``*_labels`` ``[n]`` and
            either ``*_images`` uint8 (``[n, 3, 32, 32]`` or ``[n, 32, 32, 3]``) or ``*_jpeg`` (uint8, all files one
            after the other) with ``*_offsets`` ``[n + 1]``. JPEG needs Pillow.
        held_out: images of the training set that become ``val``.

    Raises:
        DataError: naming the file, what was expected and what was found.
    """
    if path.is_dir():
        inner = path / "cifar-10-batches-bin"
        folder = inner if inner.is_dir() else path
        every = [_read_binary(folder / f"data_batch_{i}.bin") for i in range(1, 6)]
        train = Split(torch.cat([s.images for s in every]), torch.cat([s.labels for s in every]))
        test = _read_binary(folder / "test_batch.bin")
    elif path.suffix == ".npz":
        train, test = _read_archive(path)
    else:
        raise DataError(f"{path}: expected a folder with data_batch_1.bin .. test_batch.bin, or a .npz file")
    if not 0 < held_out < len(train):
        raise DataError(f"held_out: must be in [1, {len(train) - 1}], got {held_out}")
    return Dataset(
        name="CIFAR-10",
        source=str(path),
        train=train[: len(train) - held_out],
        val=train[len(train) - held_out :],
        test=test,
        classes=CLASSES,
        mean=MEAN,
        std=STD,
        flip=True,
    )


def _read_binary(path: Path) -> Split:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error}") from error
    if not content or len(content) % RECORD:
        raise DataError(f"{path}: expected a multiple of {RECORD} bytes, found {len(content)}")
    records = torch.frombuffer(bytearray(content), dtype=torch.uint8).view(-1, RECORD)
    return _split(records[:, 1:].reshape(-1, CHANNELS, SIDE, SIDE), records[:, 0], path)


def _read_archive(path: Path) -> tuple[Split, Split]:
    try:
        with np.load(path, allow_pickle=False) as archive:
            return _read_part(archive, "train", path), _read_part(archive, "test", path)
    except UNREADABLE as error:
        raise DataError(f"{path}: cannot be read as CIFAR-10: {error}") from error


def _read_part(archive: np.lib.npyio.NpzFile, part: str, path: Path) -> Split:
    labels = torch.from_numpy(archive[f"{part}_labels"].astype(np.int64))
    if f"{part}_images" in archive:
        images = torch.from_numpy(archive[f"{part}_images"])
        if images.dim() == 4 and images.shape[3] == CHANNELS:
            images = images.permute(0, 3, 1, 2).contiguous()
    else:
        images = _decode(archive[f"{part}_jpeg"], archive[f"{part}_offsets"], part)
    return _split(images, labels, path)


def _decode(content: np.ndarray, offsets: np.ndarray, part: str) -> Tensor:
    try:
        from PIL import Image
    except ImportError as error:
        raise DataError("JPEG images need Pillow (pip install pillow)") from error
    images = np.empty((len(offsets) - 1, SIDE, SIDE, CHANNELS), np.uint8)
    for i in progress(range(len(images)), f"CIFAR-10: decode {part}"):
        with Image.open(io.BytesIO(content[offsets[i] : offsets[i + 1]].tobytes())) as image:
            images[i] = np.asarray(image.convert("RGB"))
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()


def _split(images: Tensor, labels: Tensor, path: Path) -> Split:
    if images.shape[1:] != (CHANNELS, SIDE, SIDE) or len(labels) != len(images) or images.dtype != torch.uint8:
        raise DataError(
            f"{path}: expected uint8 images [n, {CHANNELS}, {SIDE}, {SIDE}] with n labels, found "
            f"{images.dtype} {list(images.shape)} and {len(labels)}"
        )
    if len(labels) == 0 or int(labels.max()) >= len(CLASSES) or int(labels.min()) < 0:
        raise DataError(f"{path}: expected labels 0 to {len(CLASSES) - 1}, found others or none")
    return Split(images, labels.to(torch.int64))
