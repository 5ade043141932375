"""Real data sets, found or fetched, checked before use; knows no method."""

from __future__ import annotations

from pathlib import Path

from .augment import shift_and_flip
from .cifar10 import load_cifar10
from .dataset import Dataset
from .decoders import ImageOptions
from .digits import load_digits
from .fashion_mnist import load_fashion_mnist
from .feed import BatchFeed
from .idx import DataError
from .image_folder import ImageFolder, load_image_folder
from .split import Split

__all__ = [
    "BatchFeed",
    "DataError",
    "Dataset",
    "ImageFolder",
    "ImageOptions",
    "Split",
    "load_cifar10",
    "load_digits",
    "load_fashion_mnist",
    "load_image_folder",
    "open_data",
    "shift_and_flip",
]


def open_data(name: str, workers: int | None = None) -> Dataset:
    """A data set by the name the command line uses.

    Args:
        name: ``fashion-mnist``, ``digits``, ``cifar10:PATH`` with what :func:`load_cifar10` reads, or
            ``imagefolder:PATH`` with what :func:`load_image_folder` reads.
        workers: processes that decode image files.

    Raises:
        DataError: for another name, or if the data cannot be had.
    """
    kind, _, path = name.partition(":")
    if kind == "cifar10" and path:
        return load_cifar10(Path(path))
    if kind == "imagefolder" and path:
        return load_image_folder(Path(path), workers=workers)
    if name == "fashion-mnist":
        return load_fashion_mnist(fallback=False)
    if name == "digits":
        return load_digits()
    raise DataError(f"data: must be fashion-mnist, digits, cifar10:PATH or imagefolder:PATH, got {name!r}")
