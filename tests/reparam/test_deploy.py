"""Folding whole blocks and networks: same function, same names, and what is refused."""

import copy
import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn

from effkern.models import create_model
from effkern.nn import RepConv2d
from effkern.nn.repvgg_block import BranchBlock, ConvBN
from effkern.reparam import ACBlock, ReparamError, RepVGGBlock, check, fold_model, unfuse


def settle(model):
    """Weights and statistics as after training, so that every term of the fold counts; eval mode."""
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            module.num_batches_tracked.fill_(1)
    return model.eval()


BLOCKS = {
    "repvgg": (RepVGGBlock(8, 8), 8),
    "repvgg stride": (RepVGGBlock(8, 8, stride=2), 8),
    "repvgg widen": (RepVGGBlock(6, 10), 6),
    "repvgg groups": (RepVGGBlock(8, 8, groups=4, act="silu"), 8),
    "repvgg depthwise": (RepVGGBlock(8, 8, groups=8, act="hardswish"), 8),
    "repvgg dilated": (RepVGGBlock(8, 8, dilation=2, act="none"), 8),
    "acb": (ACBlock(5, 9), 5),
    "acb 5x5 dilated": (ACBlock(6, 6, 5, dilation=2, act="relu6"), 6),
    "acb stride groups": (ACBlock(6, 4, stride=2, groups=2), 6),
    "acb wide padding": (ACBlock(4, 4, padding=3), 4),
    "conv and norm": (ConvBN(4, 6, 3, padding=1), 4),
}


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("name", BLOCKS)
def test_folded_block_is_the_block(name, layout):
    block, channels = copy.deepcopy(BLOCKS[name])
    settle(block)
    x = torch.randn(3, channels, 11, 10).to(memory_format=layout)
    folded = fold_model(block)
    assert type(folded) is RepConv2d
    exact = copy.deepcopy(block).double()(x.double())
    with torch.no_grad():
        error = (folded(x) - exact).abs().max() / exact.abs().max()
    assert error <= 5e-6
    result = check(block, x)
    assert result.deploy_error <= 5e-6 and result.agreement >= 0.999 and result.cancelling == ()


@pytest.mark.parametrize("name", BLOCKS)
def test_bfloat16_block(name):
    block, channels = copy.deepcopy(BLOCKS[name])
    settle(block).bfloat16()
    result = check(block, torch.randn(2, channels, 9, 9).bfloat16())
    assert result.deploy_error <= 1e-2
    assert fold_model(block).weight.dtype == torch.bfloat16


def test_network_folds_in_place_and_as_a_copy():
    net = settle(create_model("repvgg_small", width=8))
    x = torch.randn(4, 1, 28, 28)
    before = net(x)
    result = check(net, x)
    assert result.deploy_error <= max(4 * result.train_error, 1e-5) and result.agreement == 1
    folded = fold_model(net)
    assert any(isinstance(m, RepVGGBlock) for m in net.modules())
    assert torch.equal(net(x), before)
    assert fold_model(net, inplace=True) is net
    for form in (folded, net):
        assert not any(isinstance(m, BranchBlock | ConvBN | nn.BatchNorm2d) for m in form.modules())
        assert not any(m.training for m in form.modules())
    with torch.no_grad():
        assert torch.equal(folded(x), net(x))


def test_folded_twice_is_folded_once():
    folded = fold_model(settle(create_model("repvgg_small", width=8)))
    again = fold_model(folded)
    assert repr(again) == repr(folded)
    for a, b in zip(again.state_dict().values(), folded.state_dict().values(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("act, name", [(nn.ReLU(inplace=True), "relu"), (nn.SiLU(), "silu"), (nn.Sigmoid(), "none")])
def test_conv_norm_activation_in_a_sequential(act, name):
    net = settle(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), act, nn.MaxPool2d(2), nn.Conv2d(8, 4, 1)))
    x = torch.randn(2, 3, 8, 8)
    expected = net(x)
    folded = fold_model(net)
    assert folded[0].act == name
    assert isinstance(folded[1], nn.Identity)
    assert isinstance(folded[2], nn.Sigmoid if name == "none" else nn.Identity)
    assert type(folded[4]) is nn.Conv2d
    with torch.no_grad():
        torch.testing.assert_close(folded(x), expected, rtol=1e-5, atol=1e-5)


def test_unfused_network_is_plain_pytorch():
    folded = fold_model(settle(create_model("repvgg_small", width=8)))
    x = torch.randn(2, 1, 28, 28)
    plain = unfuse(folded)
    assert not any(type(m).__module__.startswith("effkern.nn") for m in plain.modules())
    assert not any(m.training for m in plain.modules())
    with torch.no_grad():
        torch.testing.assert_close(plain(x), folded(x), rtol=1e-5, atol=1e-5)
    assert type(unfuse(RepConv2d(4, 4, 1, act="none"))[0]) is nn.Conv2d
    assert any(isinstance(m, RepConv2d) for m in folded.modules())


def test_shared_block_is_folded_once():
    block = RepVGGBlock(4, 4)
    net = nn.ModuleDict(
        {"a": block, "b": nn.Sequential(block, nn.ReLU()), "c": nn.ModuleList([block, RepVGGBlock(4, 4)])}
    )
    folded = fold_model(settle(net))
    assert folded["a"] is folded["b"][0] is folded["c"][0]
    assert folded["c"][1] is not folded["a"]


def test_what_was_there_is_kept():
    net = settle(nn.Sequential(RepVGGBlock(4, 4), RepVGGBlock(4, 6))).to(memory_format=torch.channels_last)
    net[0].requires_grad_(False)
    folded = fold_model(net)
    assert not folded[0].weight.requires_grad and folded[1].weight.requires_grad
    assert folded[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert fold_model(net.double())[0].weight.dtype == torch.float64


def test_folding_in_half_precision_rounds_once():
    block = settle(RepVGGBlock(8, 8))
    exact = fold_model(copy.deepcopy(block).half().double())
    assert torch.equal(fold_model(block.half()).weight, exact.weight.half())


class TestRefused:
    def test_training_mode(self):
        with pytest.raises(ReparamError, match=r"^1: is in training mode; call model.eval"):
            fold_model(nn.Sequential(nn.ReLU(), RepVGGBlock(4, 4)))

    def test_one_norm_in_training_mode(self):
        net = settle(nn.Sequential(RepVGGBlock(4, 4)))
        net[0].branches["identity"].train()
        with pytest.raises(ReparamError, match=r"0\.branches\.identity"):
            fold_model(net)

    def test_in_place_error_leaves_the_model_alone(self):
        net = settle(nn.Sequential(RepVGGBlock(4, 4), RepVGGBlock(4, 4)))
        net[1].branches["identity"].running_var.fill_(float("nan"))
        before = [type(m) for m in net.modules()]
        with pytest.raises(ReparamError, match=r"^1: the folded weight is not finite"):
            fold_model(net, inplace=True)
        assert [type(m) for m in net.modules()] == before

    def test_group_norm_branch(self):
        block = BranchBlock({"conv": ConvBN(4, 4, 3, padding=1), "norm": nn.GroupNorm(2, 4)})
        with pytest.raises(ReparamError, match="GroupNorm"):
            fold_model(settle(block))

    def test_only_norms(self):
        with pytest.raises(ReparamError, match="no branch is a convolution"):
            fold_model(settle(BranchBlock({"norm": nn.BatchNorm2d(4)})))

    def test_identity_across_a_stride(self):
        block = BranchBlock({"conv": ConvBN(4, 4, 3, 2, 1), "identity": nn.BatchNorm2d(4)})
        with pytest.raises(ReparamError, match="strides"):
            fold_model(settle(block))

    def test_padding_that_ignores_dilation(self):
        block = BranchBlock({"conv": ConvBN(4, 4, 3, 1, 2, 2), "point": ConvBN(4, 4, 1, 1, 1)})
        with pytest.raises(ReparamError, match="line up"):
            fold_model(settle(block))

    def test_fp16_overflow(self):
        block = settle(RepVGGBlock(4, 4))
        block.branches["identity"].running_var.fill_(1e-30)
        block.branches["identity"].eps = 1e-16
        with pytest.raises(ReparamError, match=r"range of torch\.float16"):
            fold_model(block.half())

    def test_data_parallel_wrapper(self, tmp_path):
        dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
        try:
            net = settle(nn.parallel.DistributedDataParallel(RepVGGBlock(4, 4)))
            with pytest.raises(ReparamError, match=r"fold its \.module"):
                fold_model(net)
            assert type(fold_model(net.module)) is RepConv2d
        finally:
            dist.destroy_process_group()


def test_hooks_that_vanish_are_told():
    net = settle(nn.Sequential(RepVGGBlock(4, 4)))
    net[0].branches["conv3"].register_forward_hook(lambda *_: None)
    with pytest.warns(UserWarning, match=r"0\.branches\.conv3: its hooks vanish"):
        fold_model(net)


def test_untouched_hooks_are_silent():
    net = settle(nn.Sequential(RepVGGBlock(4, 4), nn.ReLU()))
    net[1].register_forward_hook(lambda *_: None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fold_model(net)


def test_check_warns_where_large_terms_cancel():
    block = settle(RepVGGBlock(4, 4, act="none"))
    block.branches["identity"].running_mean.fill_(-1000)
    net = nn.Sequential(block)
    x = torch.randn(2, 4, 6, 6) - 1000
    with pytest.warns(UserWarning, match="0: its bias"):
        nn.init.zeros_(block.branches["conv3"].conv.weight)
        nn.init.zeros_(block.branches["conv1"].conv.weight)
        result = check(net, x)
    assert result.cancelling == ("0",)


def test_asymmetric_block_checks_its_arguments():
    with pytest.raises(ValueError, match="kernel_size: must be odd, got 4"):
        ACBlock(4, 4, 4)
    with pytest.raises(ValueError, match="padding: must be at least"):
        ACBlock(4, 4, 5, padding=1)


def test_trained_blocks_learn_and_fold():
    """A few real steps: batch statistics in training, running ones after, and the fold follows the latter."""
    torch.manual_seed(0)
    net = nn.Sequential(RepVGGBlock(3, 8, 2), ACBlock(8, 8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2))
    x = torch.randn(64, 3, 8, 8)
    y = (x.mean((1, 2, 3)) > 0).long()
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(net(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    result = check(net.eval(), x)
    assert result.deploy_error <= 1e-5 and result.agreement == 1
