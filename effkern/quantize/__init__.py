"""Product quantization of weights: k-means, conversion of models, centroid tuning, compact files."""

from effkern.quantize.finetune import distillation_loss, tune
from effkern.quantize.importing import from_kill_the_bits
from effkern.quantize.kmeans import Clusters, kmeans
from effkern.quantize.pq import LayerReport, Report, Rule, encode, quantize, regime
from effkern.quantize.storage import Size, load, packed_state, save, size_bytes, size_of

__all__ = [
    "Clusters",
    "LayerReport",
    "Report",
    "Rule",
    "Size",
    "distillation_loss",
    "encode",
    "from_kill_the_bits",
    "kmeans",
    "load",
    "packed_state",
    "quantize",
    "regime",
    "save",
    "size_bytes",
    "size_of",
    "tune",
]
