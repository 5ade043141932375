"""Large mixed batches run width by width, with the bits of one ragged pass."""

import pytest
import torch

from effkern.models import _by_width, create_model


@pytest.mark.parametrize("name", ["slimmable_cnn", "mobilenet_v1_slimmable"])
def test_by_width_changes_no_bit(name, monkeypatch):
    torch.manual_seed(0)
    net = create_model(name, in_channels=3, num_classes=5).eval()
    x, width = torch.randn(7, 3, 32, 32), torch.tensor([2, 0, 1, 3, 0, 2, 2])
    with torch.no_grad():
        ragged = net(x, width)
        calls = []
        scores = net._scores
        monkeypatch.setattr(net, "_scores", lambda *args: calls.append(args[1]) or scores(*args))
        monkeypatch.setattr(_by_width, "_PIXELS", 2 * 32 * 32)
        assert torch.equal(net(x, width), ragged)
        assert calls == [0, 1, 2, 2, 3]  # two samples at most, one width each
    net(x, width)  # gradients flow through one pass
    assert isinstance(calls[-1], torch.Tensor)


def test_training_still_refuses_a_width_a_sample(monkeypatch):
    monkeypatch.setattr(_by_width, "_PIXELS", 1)
    net = create_model("slimmable_cnn", in_channels=3)
    with torch.no_grad(), pytest.raises(ValueError):
        net(torch.randn(4, 3, 16, 16), torch.tensor([0, 1, 2, 3]))
