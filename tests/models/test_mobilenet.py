"""MobileNets: sizes of the papers, widths that are networks of their own."""

import pytest
import torch

from effkern import ops
from effkern.models import create_model
from effkern.models.mobilenet import make_divisible
from effkern.training import count_macs, count_params


@pytest.mark.parametrize("channels, expected", [(8, 8), (11.2, 16), (12, 16), (24.0, 24), (18, 24), (3, 8), (36, 40)])
def test_channels_are_rounded_to_eights_and_lose_at_most_a_tenth(channels, expected):
    assert make_divisible(channels) == expected
    assert expected % 8 == 0 and expected >= 0.9 * channels


def test_sizes_are_those_of_the_papers():
    # arXiv 1704.04861: 4.2 M parameters. arXiv 1801.04381: 3.4 M and 300 M multiply-adds (3.5 M with the classifier's
    # and batch norm's, as torchvision counts).
    assert count_params(create_model("mobilenet_v1_slimmable", affine="shared")) == 4_231_976
    v2 = create_model("mobilenet_v2")
    assert count_params(v2) == 3_504_872
    assert count_macs(v2, torch.zeros(1, 3, 224, 224)) == 300_774_272


def test_mobilenet_v2_has_the_parameter_names_of_torchvision():
    shapes = {name: tuple(p.shape) for name, p in create_model("mobilenet_v2").state_dict().items()}
    assert shapes["features.0.0.weight"] == (32, 3, 3, 3)
    assert shapes["features.1.conv.0.0.weight"] == (32, 1, 3, 3)
    assert shapes["features.1.conv.1.weight"] == (16, 32, 1, 1)
    assert shapes["features.2.conv.0.1.running_var"] == (96,)
    assert shapes["features.17.conv.2.weight"] == (320, 960, 1, 1)
    assert shapes["features.18.0.weight"] == (1280, 320, 1, 1)
    assert shapes["classifier.1.weight"] == (1000, 1280)
    assert len(shapes) == 314


def test_mobilenet_v2_adds_the_input_where_shapes_allow():
    model = create_model("mobilenet_v2", width_mult=0.35).eval()
    adding = [block for block in model.features if getattr(block, "adds_input", False)]
    assert len(adding) == 10
    for block in adding:
        block.conv[-1].weight.data.zero_()
        x = torch.randn(1, block.conv[-1].num_features, 4, 4)
        assert torch.equal(block(x), x)


def test_every_parameter_of_mobilenet_v2_learns():
    model = create_model("mobilenet_v2", width_mult=0.35, num_classes=2, in_channels=1)
    model(torch.randn(4, 1, 64, 64)).square().sum().backward()
    assert all(p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("name, image", [("mobilenet_v1_slimmable", (3, 33, 33)), ("slimmable_cnn", (1, 28, 28))])
def test_a_mixed_batch_is_every_image_at_its_width(name, image):
    model = create_model(name, num_classes=5)
    for i in range(4):  # statistics of every width
        model(torch.randn(4, *image), i)
    model.eval()
    x, width = torch.randn(6, *image), torch.tensor([3, 0, 2, 1, 0, 3])
    with torch.no_grad():
        mixed = model(x, width)
        for n, i in enumerate(width.tolist()):
            assert torch.equal(mixed[n], model(x[n : n + 1], i)[0])


def test_a_width_uses_the_first_channels_only():
    model = create_model("mobilenet_v1_slimmable", width_mults=(0.25, 0.5), num_classes=3).eval()
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        before = model(x, 0)
        for layer in model.features:
            layer.conv.weight[layer.conv.out_channels[0] :] = float("nan")
            layer.bn.weight[1] = float("nan")
        model.classifier.weight[:, 256:] = float("nan")
        assert torch.equal(model(x, 0), before)


@pytest.mark.parametrize("mults", [(), (0.5, 0.25), (0.0, 1.0)])
def test_impossible_widths_are_refused(mults):
    with pytest.raises(ValueError, match="width_mults must be positive and ascending"):
        create_model("mobilenet_v1_slimmable", width_mults=mults)


def test_folded_blocks_run_in_one_pass_with_the_same_bits(monkeypatch):
    torch.manual_seed(0)
    model = create_model("mobilenet_v1_slimmable", width_mults=(0.25, 0.5), num_classes=3)
    for i in range(2):
        model(torch.randn(4, 3, 64, 64), i)
    model.eval()
    calls = []
    fused = ops.sliced_dw_pw_packed
    monkeypatch.setattr(ops, "sliced_dw_pw_packed", lambda *args: (calls.append(1), fused(*args))[1])
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        apart = [model._scores(x, i) for i in range(2)]
        for layer in model.features:
            layer.fold()
        assert not calls
        for i in range(2):
            assert torch.equal(model._scores(x, i), apart[i])
        assert len(calls) == 2 * 13
        seen = []
        handle = model.features[2].register_forward_hook(lambda *_: seen.append(1))
        assert torch.equal(model(x, 1), apart[1]) and len(seen) == 1  # a hook sees its layer
        handle.remove()
        assert torch.equal(model._scores(x, torch.tensor([0, 1]))[1], apart[1][1])
    assert model(x, 0).requires_grad  # gradients take the layers one by one
    assert len(calls) == 2 * 13 + 12
