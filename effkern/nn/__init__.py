"""Layers over :mod:`effkern.ops`."""

from effkern.nn.rep_conv import RepConv2d
from effkern.nn.repvgg_block import RepVGGBlock
from effkern.nn.sliced import SlicedConv2d, SlicedLinear
from effkern.nn.sliced_block import SlicedConvBNAct
from effkern.nn.switchable_bn import SwitchableBatchNorm2d

__all__ = [
    "RepConv2d",
    "RepVGGBlock",
    "SlicedConv2d",
    "SlicedConvBNAct",
    "SlicedLinear",
    "SwitchableBatchNorm2d",
]
