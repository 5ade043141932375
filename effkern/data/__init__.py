"""Real data sets, found or fetched, checked before use; knows no method."""

from .augment import shift_and_flip
from .dataset import Dataset, Split

__all__ = ["Dataset", "Split", "shift_and_flip"]
