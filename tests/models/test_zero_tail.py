"""Networks of which every sample runs at its own widths: what is past them is neither written nor read."""

from __future__ import annotations

import pytest
import torch

from effkern.models import create_model
from tests.tails import nan_tails

RESNET = {"stem": 4, "front": [[8, 1, 1]], "stages": [[[6, 8], 2, 2], [[10, 12], 2, 2]], "space": [0, 1]}
NETWORKS = {
    "ds_mobilenet": {
        "stem": 8, "front": [[8, 1, 1]], "stages": [[[9, 16], 2, 2], [[20, 24], 2, 2]], "space": [0, 1],
        "gated": [0, 1],
    },
    "ds_resnet": {**RESNET, "gated": [0, 1]},
    "slimmable_cnn": {"widths": [5, 8]},
    "mobilenet_v1_slimmable": {"width_mults": [0.25, 0.5]},
}  # fmt: skip


@pytest.mark.parametrize("name", NETWORKS)
def test_scores_and_gradients_do_not_depend_on_what_is_past_a_width(name, monkeypatch):
    torch.manual_seed(0)
    net = create_model(name, num_classes=5, in_channels=3, **NETWORKS[name]).eval()
    for gate in getattr(net, "gates", []):
        torch.nn.init.normal_(gate.expand.weight)
    x, width = torch.randn(6, 3, 32, 32), torch.tensor([1, 0, 0, 1, 0, 1])

    def everything():
        scores = net(x, width)
        parameters = list(net.parameters())
        grads = torch.autograd.grad(scores.square().sum(), parameters, allow_unused=True)
        with torch.no_grad():
            scores = [net(x, width), *(net.route(x) if hasattr(net, "route") else ())]
        return [*scores, *(g for g in grads if g is not None)]

    plain = everything()
    found = nan_tails(monkeypatch)
    again = everything()
    assert any(t.isnan().any() for t in found)
    assert all(torch.isfinite(t).all() for t in plain)
    assert all(map(torch.equal, again, plain))


def test_a_segment_hands_on_zeros(monkeypatch):
    """What is between two gates is the caller's to use."""
    torch.manual_seed(0)
    x, width = torch.randn(4, 3, 32, 32), torch.tensor([1, 0, 0, 1])
    found = nan_tails(monkeypatch)
    for name, channels in (("ds_mobilenet", (9, 16)), ("ds_resnet", (6, 8))):
        net = create_model(name, in_channels=3, **NETWORKS[name]).eval()
        with torch.no_grad():
            y = net.segment(1, net.segment(0, x, 0), width, 0)
        for n, i in enumerate(width.tolist()):
            assert torch.isfinite(y[n]).all() and not y[n, channels[i] :].any() and y[n, : channels[i]].any()
    assert found
