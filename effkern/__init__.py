"""PyTorch kernels that turn the multiply-adds saved by efficient convolutional networks into saved time."""

from effkern import ops
from effkern._version import __version__
from effkern.ops._memo import invalidate

__all__ = ["__version__", "invalidate", "ops"]
