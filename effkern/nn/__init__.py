"""Layers over :mod:`effkern.ops`."""

from effkern.nn._packing import freeze_packs
from effkern.nn.gate import ChannelAttention, DoubleHeadedGate
from effkern.nn.multi_branch_bn import MultiBranchBNAddReLU
from effkern.nn.pq import PQConv2d, PQEmbedding, PQLinear
from effkern.nn.rep_conv import RepConv2d
from effkern.nn.repvgg_block import RepVGGBlock
from effkern.nn.residual import ResidualBlock, ResidualStage
from effkern.nn.skip import SkipBlock, SkipStage, skip_form
from effkern.nn.sliced import SlicedConv2d, SlicedLinear
from effkern.nn.sliced_block import SlicedConvBNAct
from effkern.nn.sliced_group_norm import SlicedGroupNorm
from effkern.nn.stochastic_depth import StochasticBlock, StochasticDepth, draw_keep, stochastic_depth
from effkern.nn.switchable_bn import SwitchableBatchNorm2d

__all__ = [
    "ChannelAttention",
    "DoubleHeadedGate",
    "MultiBranchBNAddReLU",
    "PQConv2d",
    "PQEmbedding",
    "PQLinear",
    "RepConv2d",
    "RepVGGBlock",
    "ResidualBlock",
    "ResidualStage",
    "SkipBlock",
    "SkipStage",
    "SlicedConv2d",
    "SlicedConvBNAct",
    "SlicedGroupNorm",
    "SlicedLinear",
    "StochasticBlock",
    "StochasticDepth",
    "SwitchableBatchNorm2d",
    "draw_keep",
    "freeze_packs",
    "skip_form",
    "stochastic_depth",
]
