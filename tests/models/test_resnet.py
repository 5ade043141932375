"""ResNets: published names, shapes and multiply-adds, and what dropping a block means."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from effkern.models import create_model, list_models, register_model
from effkern.nn.residual import PoolShortcut, ResidualBlock, SubsampleShortcut, fold_bn, make_shortcut, set_bn_over

BN = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


def cifar_names(n: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a CIFAR ResNet's state dict as the public checkpoints have them, written out
    independently."""
    shapes: dict[str, tuple[int, ...]] = {}

    def bn(name: str, channels: int) -> None:
        shapes.update({f"{name}.{field}": (channels,) for field in BN[:4]} | {f"{name}.num_batches_tracked": ()})

    shapes["conv1.weight"] = (16, 3, 3, 3)
    bn("bn1", 16)
    before = 16
    for stage, width in enumerate((16, 32, 64), 1):
        for i in range(n):
            for conv, channels in (("1", before), ("2", width)):
                shapes[f"layer{stage}.{i}.conv{conv}.weight"] = (width, channels, 3, 3)
                bn(f"layer{stage}.{i}.bn{conv}", width)
            before = width
    shapes |= {"linear.weight": (10, 64), "linear.bias": (10,)}
    return shapes


@pytest.mark.parametrize("depth", [20, 32, 56, 110])
def test_cifar_state_dict_has_the_published_names(depth):
    net = create_model(f"resnet{depth}")
    assert {k: tuple(v.shape) for k, v in net.state_dict().items()} == cifar_names((depth - 2) // 6)


def test_checkpoint_without_batch_counters_loads_strictly():
    """The public files hold no num_batches_tracked; nothing else may be missing or left over."""
    shapes = {k: v for k, v in cifar_names(5).items() if not k.endswith("num_batches_tracked")}
    torch.manual_seed(0)
    state = {k: torch.rand(v) for k, v in shapes.items()}
    net = create_model("resnet32")
    net.load_state_dict(state, strict=True)
    assert torch.equal(net.layer2[0].bn2.running_var, state["layer2.0.bn2.running_var"])


def test_imagenet_names_are_torchvisions():
    names = set(create_model("resnet50", num_classes=7).state_dict())
    for name in (
        "conv1.weight",
        "layer1.0.downsample.0.weight",
        "layer1.0.downsample.1.running_mean",
        "layer4.2.bn3.bias",
        "fc.bias",
    ):
        assert name in names
    assert "layer1.1.downsample.0.weight" not in names
    assert len(names) == 320  # torchvision.models.resnet50


@pytest.mark.parametrize(
    "name, size, macs, params, blocks",
    [
        ("resnet20", 32, 40.55e6, 0.2697e6, 9),
        ("resnet32", 32, 68.86e6, 0.4642e6, 15),
        ("resnet110", 32, 252.89e6, 1.728e6, 54),
        ("resnet18", 224, 1.814e9, 11.69e6, 8),
        ("resnet50", 224, 4.089e9, 25.56e6, 16),
        ("resnet101", 224, 7.801e9, 44.55e6, 33),
    ],
)
def test_published_sizes(name, size, macs, params, blocks):
    with torch.device("meta"):
        net = create_model(name)
    fixed, each = net.block_macs((3, size, size))
    assert len(each) == net.num_blocks == blocks
    assert fixed + sum(each) == pytest.approx(macs, rel=1e-3)
    assert sum(p.numel() for p in net.parameters()) == pytest.approx(params, rel=1e-3)


def test_block_macs_agree_with_what_convolutions_really_see():
    net = create_model("resnet20", in_channels=1, widths=(8, 16, 24), stem_stride=2, shortcut="conv").eval()
    seen = []
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda m, _, y: seen.append(m.weight.numel() * y.shape[2] * y.shape[3]))
    with torch.no_grad():
        net(torch.zeros(1, 1, 27, 30))
    fixed, each = net.block_macs((1, 27, 30))
    assert fixed + sum(each) == sum(seen) + net.linear.weight.numel()


@pytest.fixture(params=["subsample", "pool", "conv"])
def small(request):
    torch.manual_seed(1)
    net = create_model("resnet20", widths=(4, 6, 9), blocks=(2, 1, 2), shortcut=request.param)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -1, 1)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return net.eval()


def by_hand(net, x, keep):
    """Section 2.5 of the method for one sample, written out block by block."""
    x = F.relu(net.bn1(net.conv1(x)))
    for block, on in zip(net.blocks(), keep.tolist(), strict=True):
        d = x if block.downsample is None else block.downsample(x)
        if on:
            f = block.bn2(block.conv2(F.relu(block.bn1(block.conv1(x)))))
            x = F.relu(d + f)
        else:
            x = d
    return net.linear(x.mean((2, 3)))


def test_mask_equals_each_sample_alone(small):
    x = torch.randn(6, 3, 13, 13)
    keep = torch.rand(6, 5) < 0.5
    keep[0], keep[1] = False, True
    with torch.no_grad():
        y = small(x, keep)
        set_bn_over(small, "kept")
        kept_only = small(x, keep)
        for i in range(6):
            want = by_hand(small, x[i : i + 1], keep[i])[0]
            torch.testing.assert_close(y[i], want, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(kept_only[i], want, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(small(x), small(x, torch.ones(6, 5)), rtol=1e-5, atol=1e-5)


def test_body_runs_in_parts(small):
    x, keep = torch.randn(2, 3, 12, 12), torch.tensor([[1, 0, 1, 1, 0], [0, 1, 1, 0, 1]])
    with torch.no_grad():
        state = small.body(small.stem(x), keep, 0, 3)
        torch.testing.assert_close(small.head(small.body(state, keep, 3)), small(x, keep))


def test_dropped_first_block_keeps_negative_values():
    block = make_block("conv").eval()
    x = torch.randn(3, 4, 6, 6)
    want = block.downsample(x)
    assert (want < 0).any()
    for bn_over, keep in (("all", [0, 0, 0]), ("kept", [0, 0, 0]), ("all", [0, 1, 0]), ("kept", [0, 1, 0])):
        set_bn_over(block, bn_over)
        mask = torch.tensor(keep).bool()
        assert torch.equal(block(x, mask)[~mask], want[~mask])


def make_block(shortcut: str, kind: str = "basic") -> ResidualBlock:
    torch.manual_seed(2)
    return ResidualBlock(4, 5, 2, kind, shortcut)


def test_shortcuts_without_parameters_by_hand():
    """Averages with zeros behind them; every second pixel with zeros on both sides."""
    x = torch.arange(16.0).view(1, 1, 4, 4)
    averages, pixels = torch.tensor([[2.5, 4.5], [10.5, 12.5]]), torch.tensor([[0.0, 2.0], [8.0, 10.0]])
    nothing = torch.zeros(2, 2)
    assert torch.equal(PoolShortcut(1, 3, 2)(x), torch.stack([averages, nothing, nothing])[None])
    assert torch.equal(SubsampleShortcut(1, 4, 2)(x), torch.stack([nothing, pixels, nothing, nothing])[None])
    assert torch.equal(PoolShortcut(1, 2, 1)(x), torch.cat([x, torch.zeros_like(x)], 1))


@pytest.mark.parametrize("kind", [SubsampleShortcut, PoolShortcut])
def test_padded_channels_are_real_zeros(kind):
    x = torch.full((1, 2, 4, 4), float("inf"))
    y = kind(2, 5, 2)(x)
    assert y.shape == (1, 5, 2, 2)
    assert not y.isnan().any()
    assert (y == 0).all(3).all(2).sum() == 3


def test_statistics_over_kept_rows_ignore_dropped_ones():
    a, b = make_block("pool"), make_block("pool")
    set_bn_over(a, "kept")
    x, keep = torch.randn(6, 4, 6, 6), torch.tensor([1, 0, 1, 1, 0, 0], dtype=torch.bool)
    poisoned = torch.where(keep.view(-1, 1, 1, 1), x, 1e6)
    y = a.train()(poisoned, keep)
    want = b.train()(x[keep])
    torch.testing.assert_close(y[keep], want)
    assert torch.equal(y[~keep], a.downsample(poisoned)[~keep])
    torch.testing.assert_close(a.bn2.running_var, b.bn2.running_var)
    y.sum().backward()
    want.sum().backward()
    torch.testing.assert_close(a.conv1.weight.grad, b.conv1.weight.grad)


@pytest.mark.parametrize("kept", [0, 1])
def test_too_few_kept_rows_leave_the_statistics(kept):
    block = make_block("pool").train()
    set_bn_over(block, "kept")
    before = {k: v.clone() for k, v in block.state_dict().items()}
    x, keep = torch.randn(3, 4, 6, 6), torch.arange(3) < kept
    y = block(x, keep)
    torch.testing.assert_close(y, block.eval()(x, keep))
    for name, value in block.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_statistics_over_all_rows_is_the_published_form():
    a, b = make_block("pool").train(), make_block("pool").train()
    x = torch.randn(6, 4, 6, 6)
    a(x, torch.zeros(6))
    b(x)
    assert torch.equal(a.bn1.running_mean, b.bn1.running_mean)
    assert not torch.equal(a.bn1.running_mean, torch.zeros(5))


def test_soft_mask_blends_and_has_the_formulas_gradient():
    block = make_block("pool", "bottleneck").eval().double()
    x = torch.randn(4, 4, 6, 6, dtype=torch.float64)
    keep = torch.tensor([0.0, 0.3, 1.0, 0.75], dtype=torch.float64, requires_grad=True)
    new, old = block(x), block.downsample(x)
    m = keep.detach().view(-1, 1, 1, 1)
    y = block(x, keep)
    torch.testing.assert_close(y, m * new + (1 - m) * old)
    y.square().sum().backward()
    torch.testing.assert_close(keep.grad, (2 * y * (new - old)).sum((1, 2, 3)))


def test_folding_keeps_the_function():
    torch.manual_seed(3)
    conv, bn = nn.Conv2d(3, 5, 3, bias=True), nn.BatchNorm2d(5)
    nn.init.uniform_(bn.running_mean)
    nn.init.uniform_(bn.running_var, 0.1, 3)
    nn.init.normal_(bn.weight)
    nn.init.normal_(bn.bias)
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    weight, bias = fold_bn(conv, bn)
    want = bn.double().eval()(conv.double()(x))
    torch.testing.assert_close(F.conv2d(x, weight, bias), want, rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match="running statistics"):
        fold_bn(conv, nn.BatchNorm2d(5, track_running_stats=False))


def test_bad_requests_are_named():
    with pytest.raises(ValueError, match=r"unknown name 'resnet21'.*resnet20"):
        create_model("resnet21")
    with pytest.raises(ValueError, match=r"no option 'classes'.*num_classes"):
        create_model("resnet20", classes=3)
    with pytest.raises(ValueError, match="equally long"):
        create_model("resnet20", blocks=(1, 2))
    with pytest.raises(ValueError, match=r"keep must be \[2, 9\], got \[9\]"):
        create_model("resnet20")(torch.zeros(2, 3, 8, 8), torch.ones(9))
    with pytest.raises(ValueError, match="subsample, pool, conv"):
        make_shortcut("parity", 3, 4, 1)
    with pytest.raises(ValueError, match="identity"):
        make_shortcut("identity", 3, 4, 1)
    with pytest.raises(ValueError, match="down to 2"):
        make_shortcut("pool", 3, 2, 1)
    with pytest.raises(ValueError, match="kind"):
        ResidualBlock(3, 4, kind="wide")
    with pytest.raises(ValueError, match="stride"):
        ResidualBlock(3, 4, stride=0)
    with pytest.raises(ValueError, match="bn_over"):
        set_bn_over(create_model("resnet20"), "some")
    with pytest.raises(ValueError, match="registered already"):
        register_model(type("resnet20", (nn.Module,), {}))
    assert list_models() == sorted(list_models())
