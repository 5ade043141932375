"""Layers over :mod:`effkern.ops`."""

from effkern.nn.sliced import SlicedConv2d, SlicedLinear
from effkern.nn.sliced_block import SlicedConvBNAct
from effkern.nn.switchable_bn import SwitchableBatchNorm2d

__all__ = ["SlicedConv2d", "SlicedConvBNAct", "SlicedLinear", "SwitchableBatchNorm2d"]
