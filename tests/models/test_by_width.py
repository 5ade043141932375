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


@pytest.mark.parametrize("name", ["slimmable_cnn", "mobilenet_v1_slimmable"])
def test_samples_of_one_width_run_at_it(name, monkeypatch):
    torch.manual_seed(0)
    net = create_model(name, in_channels=3, num_classes=5).eval()
    x, width = torch.randn(3, 3, 32, 32), torch.tensor([2, 2, 2])
    with torch.no_grad():
        ragged, mixed = net._scores(x, width), net(x, torch.tensor([2, 0, 2]))
        calls = []
        scores = net._scores
        monkeypatch.setattr(net, "_scores", lambda *args: calls.append(args[1]) or scores(*args))
        assert torch.equal(net(x, width), ragged)
        assert torch.equal(net(x[:1], width[:1]), mixed[:1])
        assert calls == [2, 2]
        net(x, torch.tensor([2, 0, 2]))
    assert isinstance(calls[-1], torch.Tensor)


ONE_GATE = {"stages": (((8, 16, 24, 32), 2, 2),)}
TWO_GATES = {"stages": (((8, 16, 24, 32), 2, 2), ((16, 32, 48, 64), 1, 2)), "gated": (0, 1)}


@pytest.mark.parametrize("pixels", [1, 5 * 32 * 32, 2**31])
@pytest.mark.parametrize("options", [ONE_GATE, ONE_GATE | {"norm": "group"}, TWO_GATES])
def test_an_image_alone_is_routed_as_among_others(options, pixels, monkeypatch):
    torch.manual_seed(0)
    torch.set_num_threads(2)
    net = create_model("ds_resnet", front=((16, 1, 1),), **options).eval()
    x = torch.randn(16, 3, 32, 32)
    with torch.no_grad():
        logits = net.gates[0].decide(net.segment(0, x, 0), 0)[1]
        net.gates[0].offset.copy_(-logits.mean(0))
        monkeypatch.setattr(_by_width, "_PIXELS", pixels)
        together, choice = net.route(x)
        assert len(choice[:, 0].unique()) > 1
        for i in range(len(x)):
            alone, chosen = net.route(x[i : i + 1])
            assert torch.equal(chosen, choice[i : i + 1]) and torch.equal(alone, together[i : i + 1]), i


def test_training_still_refuses_a_width_a_sample(monkeypatch):
    monkeypatch.setattr(_by_width, "_PIXELS", 1)
    net = create_model("slimmable_cnn", in_channels=3)
    with torch.no_grad(), pytest.raises(ValueError):
        net(torch.randn(4, 3, 16, 16), torch.tensor([0, 1, 2, 3]))
