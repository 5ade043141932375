"""Training, measuring and saving any module; knows no method."""

from .checkpoint import CheckpointError, load_json, load_weights, save_json, save_weights, write_atomically
from .counting import CountsMacs, bytes_on_disk, count_macs, count_params
from .evaluate import evaluate
from .latency import Timing, measure
from .loop import FitResult, Recipe, fit, learning_rate
from .progress import also_on_draw, progress, say

__all__ = [
    "CheckpointError",
    "CountsMacs",
    "FitResult",
    "Recipe",
    "Timing",
    "also_on_draw",
    "bytes_on_disk",
    "count_macs",
    "count_params",
    "evaluate",
    "fit",
    "learning_rate",
    "load_json",
    "load_weights",
    "measure",
    "progress",
    "save_json",
    "save_weights",
    "say",
    "write_atomically",
]
