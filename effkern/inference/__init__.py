"""Inference: any torch CNN on effkern's ops. :func:`optimize` is also ``effkern.optimize``."""

from effkern.inference.entry import optimize
from effkern.inference.module import Optimized
from effkern.inference.report import Report, Row

__all__ = ["Optimized", "Report", "Row", "optimize"]
