"""Training, measuring and saving any module; knows no method."""

from .checkpoint import (
    CheckpointError,
    in_a_line,
    load_json,
    load_weights,
    save_json,
    save_weights,
    write_atomically,
)
from .config import ConfigError, defaults_of, load_config, parse_config
from .counting import CountsMacs, bytes_on_disk, count_macs, count_params
from .criterion import Criterion, soft_divergence
from .ema import Ema
from .evaluate import evaluate
from .history import History
from .interrupt import Interrupted
from .latency import Timing, measure
from .logs import CsvLog, TensorBoardLog
from .loop import Feed, FitResult, fit, train
from .method import Batches, Method, Step, Supervised
from .progress import also_on_draw, progress, say
from .recipe import Recipe, learning_rate, make_optimizer, parameter_groups
from .rows import RowCache
from .run import Run
from .snapshot import load_snapshot, save_snapshot

__all__ = [
    "Batches",
    "CheckpointError",
    "ConfigError",
    "CountsMacs",
    "Criterion",
    "CsvLog",
    "Ema",
    "Feed",
    "FitResult",
    "History",
    "Interrupted",
    "Method",
    "Recipe",
    "RowCache",
    "Run",
    "Step",
    "Supervised",
    "TensorBoardLog",
    "Timing",
    "also_on_draw",
    "bytes_on_disk",
    "count_macs",
    "count_params",
    "defaults_of",
    "evaluate",
    "fit",
    "in_a_line",
    "learning_rate",
    "load_config",
    "load_json",
    "load_snapshot",
    "load_weights",
    "make_optimizer",
    "measure",
    "parameter_groups",
    "parse_config",
    "progress",
    "save_json",
    "save_snapshot",
    "save_weights",
    "say",
    "soft_divergence",
    "train",
    "write_atomically",
]
