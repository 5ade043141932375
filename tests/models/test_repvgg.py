"""RepVGG: published sizes, both forms, and the same names in both."""

import pytest
import torch

from effkern.models import create_model, list_models
from effkern.nn import RepConv2d, RepVGGBlock
from effkern.reparam import fold_model
from effkern.training import count_macs, count_params

# Deployed and training parameters in millions, multiply-adds at 224x224 in billions: the paper's table, recomputed.
PUBLISHED = {
    ("repvgg_a0", 1): (8.31, 9.11, 1.36),
    ("repvgg_a1", 1): (12.79, 14.09, 2.36),
    ("repvgg_a2", 1): (25.50, 28.21, 5.12),
    ("repvgg_b0", 1): (14.34, 15.82, 3.06),
    ("repvgg_b1", 1): (51.83, 57.42, 11.82),
    ("repvgg_b1", 2): (41.36, 45.78, 8.81),
    ("repvgg_b1", 4): (36.13, 39.97, 7.31),
}


@pytest.mark.parametrize("name, groups", PUBLISHED)
def test_sizes_are_the_published_ones(name, groups):
    options = {"groups": groups} if groups > 1 else {}
    deployed, training, macs = PUBLISHED[name, groups]
    with torch.device("meta"):
        plain, branched = create_model(name, deploy=True, **options), create_model(name, **options)
        assert count_params(plain) / 1e6 == pytest.approx(deployed, abs=0.006)
        assert count_params(branched) / 1e6 == pytest.approx(training, abs=0.006)
        assert count_macs(plain, torch.empty(1, 3, 224, 224)) / 1e9 == pytest.approx(macs, abs=0.006)


@pytest.mark.parametrize("options", [{}, {"width": 8, "in_channels": 3, "num_classes": 7}])
def test_folded_state_loads_into_the_deploy_form(options):
    torch.manual_seed(0)
    net = create_model("repvgg_small", **options)
    x = torch.randn(4, options.get("in_channels", 1), 28, 28)
    net(x)  # running statistics
    folded = fold_model(net.eval())
    deployed = create_model("repvgg_small", deploy=True, **options).eval()
    deployed.load_state_dict(folded.state_dict())
    with torch.no_grad():
        assert torch.equal(deployed(x), folded(x))
        torch.testing.assert_close(deployed(x), net(x), rtol=1e-5, atol=1e-5)
    assert net(x).shape == (4, options.get("num_classes", 10))


def test_every_second_block_is_grouped():
    with torch.device("meta"):
        net = create_model("repvgg_b1", groups=4, deploy=True)
        branched = create_model("repvgg_b1", groups=4)
    layers = [m.groups for m in net.modules() if isinstance(m, RepConv2d)]
    assert layers == [1] + [4 if i % 2 == 0 else 1 for i in range(1, 28)]
    inner = [m.branches["conv3"].conv.groups for m in branched.modules() if isinstance(m, RepVGGBlock)]
    assert inner == layers


def test_are_listed_and_bad_options_named():
    assert {"repvgg_a0", "repvgg_a1", "repvgg_a2", "repvgg_b0", "repvgg_b1", "repvgg_small"} <= set(list_models())
    with pytest.raises(ValueError, match="groups"):
        create_model("repvgg_a0", groups=2)
    from effkern.models.repvgg import RepVGG

    with pytest.raises(ValueError, match="equal length"):
        RepVGG((1, 2), (8,), 8)
