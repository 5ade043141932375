"""The residual supernet: its costs, its widths as networks of their own, its gate in front of a stage."""

import pytest
import torch
from torch import nn

from effkern.dsnet import calibrate, mac_table
from effkern.models import create_model

SMALL = {"stem": 4, "front": [[8, 1, 1]], "stages": [[[6, 8], 2, 2], [[10, 12], 1, 2]], "num_classes": 5}


def test_costs_by_hand():
    """Convolutions of every width at 8x8, then 4x4 and 2x2; the gate's attention, and no logits at a fixed width."""
    net = create_model("ds_resnet", in_channels=1, **SMALL)
    for i, (a, b) in enumerate(((6, 10), (8, 12))):
        front = 64 * 9 * (4 + 4 * 8 + 8 * 8) + 64 * 4 * 8
        attention = 8 * 2 + 2 * 8
        first = 16 * (9 * (8 * a + a * a) + 8 * a) + 16 * 9 * 2 * a * a
        second = 4 * (9 * (a * b + b * b) + a * b)
        assert mac_table(net, (1, 8, 8), 2)[i] == front + attention + first + second + 5 * b


def test_resnet50_is_resnet50_at_its_widest():
    net, plain = create_model("ds_resnet50"), create_model("resnet50")
    table = mac_table(net, (3, 64, 64), net.num_widths).tolist()
    always, blocks = plain.block_macs((3, 64, 64))
    gate = net.gates[0]
    attention = 2 * 512 * gate.hidden
    assert net.num_widths == 5 and table[-1] == always + sum(blocks) + attention
    assert table == sorted(table) and table[0] < 0.7 * table[-1]


@pytest.mark.parametrize("kind", ["basic", "bottleneck"])
def test_a_width_is_an_ordinary_residual_network(kind):
    """Built by hand from slices of the weights."""
    net = create_model("ds_resnet", in_channels=1, kind=kind, **{**SMALL, "space": [0, 1]})
    x = torch.randn(6, 1, 8, 8)
    calibrate(net, [x], range(2))
    net.eval()
    with torch.no_grad():
        for i in range(2):
            y = net.stem.narrow(i)(x)
            for block in net.blocks:
                y = y if block.attention is None else block.attention(y, i)
                shortcut = y if block.downsample is None else block.downsample.narrow(i)(y)
                y = (nn.Sequential(*(layer.narrow(i) for layer in block.layers))(y) + shortcut).relu()
            want = net.classifier.narrow(i)(y.mean((2, 3)))
            torch.testing.assert_close(net(x, i), want, rtol=1e-4, atol=1e-5)
        widths = torch.tensor([0, 1, 1, 0, 0, 1])
        both = torch.stack([net(x, 0), net(x, 1)])
        torch.testing.assert_close(net(x, widths), both[widths, torch.arange(6)], rtol=1e-4, atol=1e-5)


def test_the_gate_begins_as_if_it_were_not_there():
    net = create_model("ds_resnet", in_channels=1, **{**SMALL, "space": [0, 1]})
    x = torch.randn(2, 8, 4, 4)
    assert torch.equal(net.gates[0](x, 0), x)
    assert all(block.downsample is not None for block in (net.blocks[1], net.blocks[3]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stages": [[[6, 8], 1, 2], [[8], 1, 2]]}, "stages must each list as many widths"),
        ({"gated": [2]}, r"gated must be ascending numbers of stages in \[0, 1\]"),
        ({"gated": [0, 1], "space": [[0, 1]]}, "space must be a list of width indices, or one for each of 2 gates"),
        ({"kind": "wide"}, "kind must be 'basic' or 'bottleneck'"),
    ],
)
def test_what_cannot_be_built_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        create_model("ds_resnet", **{**SMALL, "space": [0, 1], **options})
