"""Real data sets, found or fetched, checked before use; knows no method."""

from .augment import shift_and_flip
from .dataset import Dataset, Split
from .digits import load_digits
from .fashion_mnist import load_fashion_mnist
from .idx import DataError

__all__ = ["DataError", "Dataset", "Split", "load_digits", "load_fashion_mnist", "shift_and_flip"]
