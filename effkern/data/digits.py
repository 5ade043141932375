"""scikit-learn's bundled digits, the last resort: small, real, and always there."""

from __future__ import annotations

import torch
from torch import Tensor

from .dataset import Dataset
from .idx import DataError
from .split import Split

__all__ = ["load_digits"]

TEST, VAL = 360, 200  # of 1797 images


def load_digits(seed: int = 0) -> Dataset:
    """1797 handwritten digits of 8x8 pixels, enlarged to 28x28.

    Raises:
        DataError: if scikit-learn is not installed.
    """
    try:
        from sklearn import datasets
    except ImportError as error:
        raise DataError("scikit-learn's digits: scikit-learn is not installed (pip install scikit-learn)") from error
    found = datasets.load_digits()
    images = _enlarge(torch.from_numpy(found.images))
    labels = torch.from_numpy(found.target).to(torch.int64)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    every = Split(images[order], labels[order])
    train = every[TEST + VAL :]
    pixels = train.images.double() / 255
    return Dataset(
        name="digits (scikit-learn)",
        source="bundled with scikit-learn",
        train=train,
        val=every[TEST : TEST + VAL],
        test=every[:TEST],
        classes=tuple("0123456789"),
        mean=float(pixels.mean()),
        std=float(pixels.std()),
        flip=False,
    )


def _enlarge(images: Tensor) -> Tensor:
    """``[n, 8, 8]`` in 0..16 to ``[n, 1, 28, 28]`` uint8: three times as large, with a rim of 2."""
    large = torch.nn.functional.interpolate(images[:, None].float(), scale_factor=3, mode="bilinear")
    large = torch.nn.functional.pad(large, (2, 2, 2, 2))
    return (large * (255 / 16)).round().clamp(0, 255).to(torch.uint8)
