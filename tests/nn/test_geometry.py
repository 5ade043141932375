"""Every convolution layer refuses, when it is made, a geometry that no call could have."""

from __future__ import annotations

import pytest
from torch import nn

from effkern.nn import PQConv2d, RepConv2d, SlicedConv2d

LAYERS = {
    "RepConv2d": lambda kernel_size=3, **options: RepConv2d(8, 8, kernel_size, **options),
    "SlicedConv2d": lambda kernel_size=3, **options: SlicedConv2d(8, 8, kernel_size, **options),
    "PQConv2d": lambda kernel_size=3, **options: PQConv2d(8, 8, kernel_size, d=4, entries=4, **options),
}


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize(
    ("argument", "value", "error"),
    [
        ("kernel_size", (3, 3, 3), ValueError),
        ("kernel_size", 0, ValueError),
        ("kernel_size", 1.5, TypeError),
        ("stride", 0, ValueError),
        ("stride", (1, -1), ValueError),
        ("dilation", 0, ValueError),
        ("dilation", 2**40, ValueError),
        ("padding", -1, ValueError),
        ("padding", (1, 1.5), TypeError),
        ("padding", None, TypeError),
    ],
    ids=str,
)
def test_bad_geometry_is_refused_by_name(layer, argument, value, error):
    with pytest.raises(error, match=argument):
        LAYERS[layer](**{argument: value})


def test_a_layer_without_channels_is_refused():
    for channels in ((0, 8), (8, 0), (-1, 8)):
        with pytest.raises(ValueError, match="at least 1"):
            RepConv2d(*channels, 3)
    assert nn.Conv2d(8, 8, (3, 1)).kernel_size == RepConv2d(8, 8, (3, 1)).kernel_size
