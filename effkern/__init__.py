"""PyTorch kernels that turn the multiply-adds saved by efficient convolutional networks into saved time."""

from typing import TYPE_CHECKING, Any

from effkern import ops
from effkern._version import __version__
from effkern.ops._memo import invalidate

if TYPE_CHECKING:
    from effkern.inference import optimize

__all__ = ["__version__", "invalidate", "ops", "optimize"]


def __getattr__(name: str) -> Any:
    # On first use: whoever wants an op need not wait for torch.fx.
    if name == "optimize":
        from effkern.inference import optimize

        return optimize
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
