"""Multiply-adds of every width, as whole numbers."""

import torch

from effkern.dsnet import AtWidth, mac_table
from effkern.models import create_model
from effkern.models.slimmable import SlimmableCNN
from effkern.training import count_macs


def test_the_table_is_the_count_of_the_narrow_networks():
    model = SlimmableCNN((4, 6, 10), blocks=(1, 2), num_classes=7, in_channels=2)
    table = mac_table(model, (2, 9, 9), 3)
    assert table.dtype == torch.int64
    for i, c in enumerate((4, 6, 10)):
        assert table[i] == 25 * 9 * 2 * c + 9 * 9 * c * 2 * c + 9 * 9 * (2 * c) ** 2 + 2 * c * 7
    q = torch.tensor([0, 2, 2, 1])
    assert table[q].sum() == table[0] + 2 * table[2] + table[1]


def test_mobilenet_v1_costs_what_its_paper_says():
    # Multiply-adds of MobileNetV1 at 224 (arXiv 1704.04861, table 6): 41, 149, 325 and 569 million.
    table = mac_table(create_model("mobilenet_v1_slimmable"), (3, 224, 224), 4)
    assert [round(int(macs) / 1e6) for macs in table] == [41, 149, 325, 569]


def test_counting_leaves_no_trace():
    model = SlimmableCNN((4, 8), blocks=(1, 1))
    state = {k: v.clone() for k, v in model.state_dict().items()}
    mac_table(model, (1, 8, 8), 2)
    assert model.training and all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert not any(m._forward_hooks for m in model.modules())


def test_a_fixed_width_is_an_ordinary_network():
    model = SlimmableCNN((4, 8), blocks=(1, 1)).eval()
    x = torch.randn(2, 1, 8, 8)
    assert torch.equal(AtWidth(model, 0)(x), model(x, 0))
    assert count_macs(AtWidth(model, 0), x) == mac_table(model, (1, 8, 8), 2)[0]
