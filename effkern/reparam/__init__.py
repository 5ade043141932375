"""Re-parameterization: train with parallel branches, deploy one convolution."""

from effkern.reparam.blocks import ACBlock, RepVGGBlock
from effkern.reparam.deploy import Check, check, fold_model, unfuse
from effkern.reparam.fold import Conv, ReparamError, add, embed, fold_batch_norm, identity, read_conv, regroup

__all__ = [
    "ACBlock",
    "Check",
    "Conv",
    "RepVGGBlock",
    "ReparamError",
    "add",
    "check",
    "embed",
    "fold_batch_norm",
    "fold_model",
    "identity",
    "read_conv",
    "regroup",
    "unfuse",
]
