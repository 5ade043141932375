"""Real data sets, found or fetched, checked before use; knows no method."""

from __future__ import annotations

from pathlib import Path

from .augment import shift_and_flip
from .cifar10 import load_cifar10
from .dataset import Dataset, Split
from .digits import load_digits
from .fashion_mnist import load_fashion_mnist
from .feed import BatchFeed
from .idx import DataError

__all__ = [
    "BatchFeed",
    "DataError",
    "Dataset",
    "Split",
    "load_cifar10",
    "load_digits",
    "load_fashion_mnist",
    "open_data",
    "shift_and_flip",
]


def open_data(name: str) -> Dataset:
    """A data set by the name the command line uses.

    Args:
        name: ``fashion-mnist``, ``digits``, or ``cifar10:PATH`` with what :func:`load_cifar10` reads.

    Raises:
        DataError: for another name, or if the data cannot be had.
    """
    kind, _, path = name.partition(":")
    if kind == "cifar10" and path:
        return load_cifar10(Path(path))
    if name == "fashion-mnist":
        return load_fashion_mnist(fallback=False)
    if name == "digits":
        return load_digits()
    raise DataError(f"data: must be fashion-mnist, digits or cifar10:PATH, got {name!r}")
