"""Every fusion rule, and every place where it must not be applied."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations

import effkern
from effkern.models import create_model
from effkern.nn import RepConv2d, RepVGGBlock
from effkern.reparam import ACBlock
from effkern.testing import assert_within
from tests.inference.common import lived_in, ops, optimized_and_same

X = torch.randn(2, 8, 9, 7, generator=torch.Generator().manual_seed(0))


class Calls(nn.Module):
    """Layers, and a function that says how they are put together."""

    def __init__(self, function, **layers):
        super().__init__()
        self.function = function
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x):
        return self.function(self, x)


def conv(ci=8, co=8, k=3, **options):
    return nn.Conv2d(ci, co, k, **{"padding": k // 2 if isinstance(k, int) else 0, **options})


ACTS = {
    "relu": [nn.ReLU(), nn.ReLU(inplace=True), F.relu, F.relu_, torch.relu, lambda x: x.relu_()],
    "relu6": [nn.ReLU6(), nn.Hardtanh(0, 6), F.relu6, lambda x: F.hardtanh(x, 0, 6), lambda x: x.clamp(0, 6)],
    "hardswish": [nn.Hardswish(), nn.Hardswish(inplace=True), F.hardswish],
    "silu": [nn.SiLU(), lambda x: F.silu(x, inplace=True)],
}


@pytest.mark.parametrize("act", ACTS)
def test_conv_bn_act_in_all_spellings(act):
    for spelling in ACTS[act]:
        layers = {"act": spelling} if isinstance(spelling, nn.Module) else {}
        function = (lambda m, x: m.act(m.bn(m.conv(x)))) if layers else (lambda m, x, f=spelling: f(m.bn(m.conv(x))))
        model = lived_in(Calls(function, conv=conv(), bn=nn.BatchNorm2d(8), **layers))
        assert ops(optimized_and_same(model, X)) == [f"8->8 3x3 {act}"]


@pytest.mark.parametrize(
    "options",
    [
        {"stride": 2},
        {"bias": False, "k": 5},
        {"padding": (2, 0)},
        {"padding": "same", "k": 4},
        {"padding": "valid"},
        {"dilation": 2},
        {"groups": 2, "co": 12},
        {"groups": 8},
        {"groups": 8, "co": 16, "stride": 2},
        {"padding_mode": "reflect"},
        {"padding_mode": "circular", "padding": "same"},
        {"k": 1},
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:Using padding=:UserWarning")
def test_every_geometry_folds_within_the_bound_of_one_layer(options):
    layer = conv(**options)
    model = lived_in(nn.Sequential(layer, nn.BatchNorm2d(layer.out_channels), nn.ReLU()))
    result = optimized_and_same(model, X, depth=1)
    assert len(ops(result)) == 1
    scale = (model[1].weight / (model[1].running_var + model[1].eps).sqrt()).double()
    weight = layer.weight.double().abs() * scale[:, None, None, None]
    largest = X.double().abs().amax((0, 2, 3)).view(layer.groups, -1)  # of a channel: at least any Winograd tile's
    per_output = weight.view(layer.groups, -1, *weight.shape[1:]).sum((3, 4))
    total = torch.einsum("goi,gi->go", per_output, largest).flatten()
    total = total + model[1].bias.double().abs() + (model[1].running_mean.double() * scale).abs()
    with torch.no_grad():
        exact = model.double()(X.double())
        assert_within(result(X), exact, (16 * 2.0**-24 * total[:, None, None]).expand_as(exact))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_networks_fold_in_fp64_and_round_the_result_only(dtype):
    model = lived_in(nn.Sequential(conv(), nn.BatchNorm2d(8), nn.ReLU(), conv(co=4), nn.ReLU6())).to(dtype)
    result = optimized_and_same(model, X.to(dtype), depth=2)
    assert len(ops(result)) == 2 and result(X.to(dtype)).dtype == dtype


RESIDUALS = {
    "act(conv + x)": (lambda m, x: F.relu(m.b(F.relu(m.a(x))) + x), ["8->8 3x3 relu", "8->8 3x3 +residual relu"]),
    "act(x + conv)": (lambda m, x: F.silu(x + m.b(F.relu(m.a(x)))), ["8->8 3x3 relu", "8->8 3x3 +residual silu"]),
    "conv + x": (lambda m, x: m.b(F.relu(m.a(x))) + x, ["8->8 3x3 relu", "8->8 3x3 +residual"]),
    "conv += x": (lambda m, x: m.b(F.relu(m.a(x))).add_(x), ["8->8 3x3 relu", "8->8 3x3 +residual"]),
    "torch.add": (lambda m, x: torch.add(m.b(F.relu(m.a(x))), x), ["8->8 3x3 relu", "8->8 3x3 +residual"]),
    "two convolutions": (
        lambda m, x: F.relu(m.b(F.relu(m.a(x))) + m.c(x)),
        ["8->8 3x3 relu", "8->8 3x3", "8->8 1x1 +residual relu"],
    ),
    "pooled shortcut": (
        lambda m, x: m.s(F.relu(m.a(x))) + F.max_pool2d(x, 3, 2, 1),
        ["8->8 3x3 relu", "8->8 3x3 /2 +residual"],
    ),
    "strided shortcut": (
        lambda m, x: m.s(F.relu(m.a(x))) + x[:, :, ::2, ::2],
        ["8->8 3x3 relu", "8->8 3x3 /2 +residual"],
    ),
    "gated": (
        lambda m, x: m.b(F.relu(m.a(x))) + x * torch.sigmoid(m.c(F.adaptive_avg_pool2d(x, 1))),
        ["8->8 3x3 relu", "8->8 1x1", "8->8 3x3 +residual"],
    ),
    "cut and joined": (
        lambda m, x: m.b(F.relu(m.a(x))) + torch.cat(torch.chunk(x, 2, 1)[::-1], 1),
        None,
    ),
}


@pytest.mark.parametrize("case", RESIDUALS)
def test_residual_sums(case):
    function, expected = RESIDUALS[case]
    torch.manual_seed(0)
    model = Calls(function, a=conv(), b=conv(), c=conv(k=1), s=conv(stride=2)).eval()
    result = optimized_and_same(model, X)
    if expected is not None:
        assert sorted(ops(result)) == sorted(expected)


NO_RESIDUALS = {
    "the sum broadcasts down": lambda m, x: m.b(x) + F.adaptive_avg_pool2d(x, 1),
    "the sum broadcasts up": lambda m, x: m.c(F.adaptive_avg_pool2d(x, 1)) + F.relu(x),
    "a number is added": lambda m, x: m.b(x) + 1.5,
    "a parameter is added": lambda m, x: m.b(x) + m.c.bias[:, None, None],
    "one term is scaled": lambda m, x: torch.add(m.b(x), F.relu(x), alpha=2),
    "a convolution is added to itself": lambda m, x: (lambda y: y + y)(m.b(x)),
    "the convolution is used twice": lambda m, x: (lambda y: (y + F.relu(x)) * y)(m.b(x)),
    "one pixel wide": lambda m, x: m.p(x) + F.relu(x),
    "the activation stands in front": lambda m, x: F.relu(m.b(x)) + F.relu(x),
}


@pytest.mark.parametrize("case", NO_RESIDUALS)
def test_sums_that_are_no_residuals(case):
    torch.manual_seed(0)
    model = Calls(NO_RESIDUALS[case], b=conv(), c=conv(k=1), p=conv(k=(9, 7))).eval()
    result = optimized_and_same(model, X)
    assert not any("+residual" in op for op in ops(result))


def test_a_sum_of_unknown_shapes_is_fused_only_with_an_example():
    model = Calls(lambda m, x: m.b(x) + F.relu(x).roll(1, 3), b=conv()).eval()
    result = optimized_and_same(model, X)
    assert ops(result) == ["8->8 3x3"]
    assert "example_input" in result.report().left[-1].detail
    assert ops(optimized_and_same(model, X, example=X)) == ["8->8 3x3 +residual"]


def test_an_activation_of_a_result_that_is_used_elsewhere_stays():
    model = Calls(lambda m, x: (lambda y: F.relu(y) - y)(m.b(x)), b=conv()).eval()
    result = optimized_and_same(model, X)
    assert ops(result) == ["8->8 3x3"]
    assert "also used elsewhere" in result.report().left[0].detail


def test_a_norm_behind_an_activation_or_in_front_stays():
    model = lived_in(nn.Sequential(nn.BatchNorm2d(8), conv(), nn.ReLU(), nn.BatchNorm2d(8)))
    result = optimized_and_same(model, X)
    assert ops(result) == ["8->8 3x3 relu"]
    assert [row.kind for row in result.report().left] == ["BatchNorm2d", "BatchNorm2d"]


def test_a_norm_without_statistics_normalises_with_the_batch():
    model = nn.Sequential(conv(), nn.BatchNorm2d(8, track_running_stats=False)).eval()
    result = optimized_and_same(model, X)
    assert "running statistics" in result.report().why("1")


PADS = {
    "symmetric": lambda m, x: m.c(F.pad(x, (1, 1, 2, 2))),
    "asymmetric": lambda m, x: m.s(F.pad(x, (0, 1, 0, 1))),
    "on top of its own": lambda m, x: m.b(F.pad(x, [1, 2, 0, 1])),
    "a module": lambda m, x: m.c(m.pad(x)),
    "used twice": lambda m, x: (lambda y: m.c(y) * y.mean())(F.pad(x, (1, 1, 1, 1))),
}
NO_PADS = {
    "ones": lambda m, x: m.c(F.pad(x, (1, 1, 1, 1), value=1.0)),
    "reflected": lambda m, x: m.c(F.pad(x, (1, 1, 1, 1), mode="reflect")),
    "cropped": lambda m, x: m.c(F.pad(x, (-1, 1, 1, 1))),
    "channels": lambda m, x: m.c(F.pad(x[:, :6], (0, 0, 0, 0, 1, 1))),
    "under reflections": lambda m, x: m.r(F.pad(x, (1, 1, 1, 1))),
}


@pytest.mark.parametrize("case", [*PADS, *NO_PADS])
def test_zeros_around_an_input_are_padding(case):
    torch.manual_seed(0)
    layers = {"b": conv(), "c": conv(padding=0), "s": conv(stride=2, padding=0), "pad": nn.ZeroPad2d((1, 0, 2, 1))}
    model = Calls((PADS | NO_PADS)[case], r=conv(padding_mode="reflect"), **layers).eval()
    result = optimized_and_same(model, X)
    assert any(row.kind in ("pad", "ZeroPad2d") for row in result.report().replaced) == (
        case in PADS and case != "used twice"
    )


def test_sizes_that_the_network_computes_with():
    def function(m, x):
        n, c, h, w = x.size()
        y = m.b(x)
        return y.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w) + x[:, :, :h, : x.shape[3]]

    optimized_and_same(Calls(function, b=conv()).eval(), X)
    optimized_and_same(Calls(lambda m, x: m.b(m.b(x).view(*x.size()[:2], *x.shape[2:])), b=conv()).eval(), X)


def test_functional_norms_and_convolutions():
    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = conv(), nn.BatchNorm2d(8)

        def forward(self, x):
            x = F.conv2d(x, self.conv.weight, self.conv.bias, padding=1)
            bn = self.bn
            return F.relu(F.batch_norm(x, bn.running_mean, bn.running_var, bn.weight, bn.bias, False, 0.1, bn.eps))

    assert ops(optimized_and_same(lived_in(Functional()), X)) == ["8->8 3x3 relu"]


def test_standardized_weights_are_computed_once():
    class Standardized(nn.Conv2d):
        def forward(self, x):
            weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
            weight = weight / weight.std((1, 2, 3), keepdim=True)
            return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)

    model = nn.Sequential(Standardized(8, 8, 3), nn.ReLU()).eval()
    assert ops(optimized_and_same(model, X)) == ["8->8 3x3 relu"]


def test_weights_computed_from_the_input_are_not_baked():
    model = Calls(lambda m, x: F.conv2d(x, m.b.weight * x.mean()), b=conv()).eval()
    result = optimized_and_same(model, X)
    assert ops(result) == [] and "computed by the network" in result.report().left[0].detail


def test_linear_and_norm():
    model = lived_in(
        nn.Sequential(conv(), nn.Flatten(), nn.Linear(8 * 63, 5), nn.BatchNorm1d(5), nn.Linear(5, 3, bias=False),
                      nn.BatchNorm1d(3, affine=False))
    )  # fmt: skip
    result = optimized_and_same(model, X)
    assert sum("one Linear" in row.detail for row in result.report().replaced) == 2
    assert not any("BatchNorm" in row.kind for row in result.report().left)


def test_a_norm_behind_a_linear_layer_of_3d_input_is_over_another_dimension():
    model = lived_in(nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6)))
    x = torch.randn(2, 6, 4)
    for example in (None, x):
        result = optimized_and_same(model, x, example=example)
        assert "BatchNorm1d" in [row.kind for row in result.report().left]
    flat = torch.randn(3, 4)
    assert "BatchNorm1d" not in [r.kind for r in optimized_and_same(model, flat, example=flat).report().left]


@pytest.mark.parametrize("stride, co", [(1, 8), (2, 8), (1, 12)])
@pytest.mark.parametrize("block", [RepVGGBlock, ACBlock])
def test_own_blocks_are_one_call(block, stride, co):
    model = lived_in(nn.Sequential(block(8, co, stride=stride, act="hardswish")))
    assert len(ops(optimized_and_same(model, X))) == 1


class Branches(nn.Module):
    """A RepVGG or QARepVGG block as other packages write it."""

    def __init__(self, post=False, identity=True, groups=1):
        super().__init__()
        self.conv3, self.bn3 = conv(bias=False, groups=groups), nn.BatchNorm2d(8)
        self.conv1, self.bn1 = conv(k=1, bias=False, groups=groups), nn.Identity() if post else nn.BatchNorm2d(8)
        self.identity = (nn.Identity() if post else nn.BatchNorm2d(8)) if identity else None
        self.post = nn.BatchNorm2d(8) if post else nn.Identity()

    def forward(self, x):
        y = 0
        y += self.bn3(self.conv3(x))
        y += self.bn1(self.conv1(x))
        if self.identity is not None:
            y += self.identity(x)
        return F.relu(self.post(y))


@pytest.mark.parametrize("groups", [1, 2, 8])
@pytest.mark.parametrize("post", [False, True], ids=["RepVGG", "QARepVGG"])
@pytest.mark.parametrize("identity", [False, True])
def test_foreign_blocks_are_one_call_too(post, identity, groups):
    result = optimized_and_same(lived_in(nn.Sequential(Branches(post, identity, groups))), X)
    assert len(ops(result)) == 1 and "residual" not in ops(result)[0]


def test_branches_that_have_no_common_kernel_are_summed():
    cases = {
        "strides": Calls(lambda m, x: m.a(x)[:, :, :4, :4] + m.b(x)[:, :, :4, :4], a=conv(stride=2), b=conv(stride=2)),
        "dense and depthwise": Calls(lambda m, x: m.a(x) + m.b(x), a=conv(k=1), b=conv(groups=8)),
        "one activated": Calls(lambda m, x: F.relu(m.a(x)) + m.b(x), a=conv(k=1), b=conv()),
        "other inputs": Calls(lambda m, x: m.a(x) + m.b(F.relu(x)), a=conv(), b=conv(k=1)),
    }
    for name, model in cases.items():
        assert len(ops(optimized_and_same(model.eval(), X))) == 2, name


def test_a_module_called_twice_has_one_pack():
    shared = conv()
    model = lived_in(Calls(lambda m, x: m.bn(m.a(F.relu(m.a(x)))) + m.a(x).mean(), a=shared, bn=nn.BatchNorm2d(8)))
    result = optimized_and_same(model, X)
    packs = {name: t.data_ptr() for name, t in result.named_buffers(remove_duplicate=False) if "pack" in name}
    assert len(packs) == len(set(packs.values())) == 2  # with the norm, and without for two calls


def test_two_modules_with_one_parameter():
    a, b = conv(), conv()
    b.weight = a.weight
    model = lived_in(nn.Sequential(a, nn.BatchNorm2d(8), nn.ReLU(), b, nn.BatchNorm2d(8)))
    assert ops(optimized_and_same(model, X)) == ["8->8 3x3 relu", "8->8 3x3"]


def test_dropout_and_identity_go_but_not_where_they_work():
    model = nn.Sequential(nn.Identity(), conv(), nn.Dropout(0.5), nn.ReLU(), nn.Dropout2d()).eval()
    result = optimized_and_same(model, X)
    assert len(result.report().removed) == 3 and ops(result) == ["8->8 3x3 relu"]
    model[2].train()  # as Monte Carlo dropout does
    with_dropout = effkern.optimize(model)
    assert "Dropout" in [row.kind for row in with_dropout.report().left]
    assert not torch.equal(with_dropout(X), with_dropout(X))
    functional = Calls(lambda m, x: F.dropout(m.b(x), 0.5, training=m.training), b=conv()).eval()
    assert len(optimized_and_same(functional, X).report().removed) == 1


def test_in_place_calls_are_followed_not_dropped():
    cases = {
        "result unused": lambda m, x: (lambda y: (m.act(y), y + 1)[1])(m.b(x)),
        "method": lambda m, x: (lambda y: (y.mul_(2), y.sub_(1), y)[2])(m.b(x)),
        "operator": lambda m, x: (lambda y: (y.__iadd__(x), F.relu(y) + y)[1])(m.b(x)),
        "on a copy of the input": lambda m, x: m.b(x.clone().clamp_(min=0)),
        "through a view": lambda m, x: (lambda y: (y[:, :3].zero_(), y)[1])(m.b(x)),
        "chunk": lambda m, x: (lambda y: (y.chunk(2, 1)[0].add_(1), y.sum(1))[1])(m.b(x)),
    }
    for name, function in cases.items():
        model = Calls(function, b=conv(), act=nn.ReLU(inplace=True)).eval()
        result = effkern.optimize(model)
        with torch.no_grad():
            torch.testing.assert_close(result(X), model(X.clone()), rtol=1e-5, atol=1e-5, msg=name)


def test_an_in_place_activation_of_the_input_leaves_it_alone():
    model = nn.Sequential(nn.ReLU(inplace=True), conv()).eval()
    x = X.clone()
    result = effkern.optimize(model)
    with torch.no_grad():
        y = result(x)
        assert torch.equal(x, X)
        torch.testing.assert_close(y, model(x), rtol=1e-5, atol=1e-5)


def test_an_in_place_sum_keeps_its_dtype():
    model = Calls(lambda m, x: m.act(m.b(x)).add_(x.float()), b=conv(), act=nn.GELU()).eval().bfloat16()
    assert optimized_and_same(model, X.bfloat16())(X.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize(
    "layer, reason",
    [
        (nn.Conv2d(8, 8, 3).double(), "float64"),
        (nn.Conv2d(8, 8, 3, dtype=torch.complex64), "complex64"),
        (nn.ConvTranspose2d(8, 8, 3), "no op"),
        (nn.Conv2d(8, 8, 3, device="meta"), "meta"),
    ],
    ids=["double", "complex", "transposed", "meta"],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_layers_that_stay(layer, reason):
    model = nn.Sequential(layer).eval()
    result = effkern.optimize(model)
    assert ops(result) == [] and reason in result.report().left[0].detail
    if not any(p.is_meta for p in model.parameters()):
        x = X.to(next(model.parameters()).dtype)
        torch.testing.assert_close(result(x), model(x))


@pytest.mark.parametrize(
    "wrap", [parametrizations.weight_norm, parametrizations.spectral_norm, parametrizations.orthogonal]
)
def test_parametrized_weights_are_baked(wrap):
    layer = wrap(nn.Conv2d(8, 8, 3))
    model = lived_in(nn.Sequential(layer, nn.BatchNorm2d(8)))
    assert ops(optimized_and_same(model, X)) == ["8->8 3x3"]


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_the_old_weight_norm_is_left_or_refused():
    model = nn.Sequential(torch.nn.utils.weight_norm(nn.Conv2d(8, 8, 3))).eval()
    with pytest.raises(ValueError, match="cannot be copied"):
        effkern.optimize(model)
    with torch.no_grad():
        model(X)  # now the computed weight needs no gradient
    assert "hooks" in optimized_and_same(model, X).report().why("0")


def test_own_layers():
    model = nn.Sequential(RepConv2d(8, 8, 3, padding=1, act="silu"), RepConv2d(8, 4, 1, act="none"), nn.ReLU()).eval()
    assert ops(optimized_and_same(model, X)) == ["8->8 3x3 silu", "8->4 1x1 relu"]


@pytest.mark.parametrize(
    "name, options, size, expected",
    [
        ("resnet20", {}, (3, 16, 16), 19),
        ("resnet18", {"widths": (8, 8, 16, 16)}, (3, 40, 40), 20),
        ("resnet50", {"widths": (4, 4, 8, 8)}, (3, 33, 33), 53),
        ("mobilenet_v2", {}, (3, 32, 32), 52),
        ("repvgg_small", {}, (1, 28, 28), 8),
        ("repvgg_small", {"deploy": True}, (1, 28, 28), 8),
    ],
)
def test_own_networks_become_one_call_a_convolution(name, options, size, expected):
    model = lived_in(create_model(name, **options))
    result = optimized_and_same(model, torch.randn(2, *size), depth=20)
    assert sum("mean of" not in op for op in ops(result)) == expected
    assert {row.kind for row in result.report().left} <= {"Linear"}


def test_a_result_does_not_depend_on_the_batch():
    model = lived_in(create_model("resnet20", widths=(8, 8, 8), blocks=(1, 1, 1)))
    result = effkern.optimize(model)
    x = torch.randn(5, 3, 32, 32)
    layers = lambda x: result.report() and result(x)  # noqa: E731
    whole = layers(x)
    torch.testing.assert_close(torch.cat([result(x[:2]), result(x[2:])]), whole, rtol=1e-6, atol=1e-6)


def padded(x):
    return F.pad(F.avg_pool2d(x, 2, ceil_mode=True), (0, 0, 0, 0, 0, 8))


AVERAGES = {
    "mean of map": [
        lambda x: x.mean((2, 3)),
        lambda x: torch.mean(x, [-1, -2], keepdim=True).flatten(1),
        lambda x: F.adaptive_avg_pool2d(x, 1).flatten(1),
        nn.Sequential(nn.AdaptiveAvgPool2d((1, 1)), nn.Flatten()),
    ],
    "mean of 2x2": [padded, nn.AvgPool2d(2), lambda x: F.avg_pool2d(x, 2)],
    "mean of 3x2": [nn.AvgPool2d((3, 2), (2, 1)), lambda x: F.avg_pool2d(x, (3, 2), (2, 1), 0, True)],
}


@pytest.mark.parametrize("kind", AVERAGES)
def test_averages_of_a_convolution_join_its_chain(kind):
    for average in AVERAGES[kind]:
        layers = {"average": average} if isinstance(average, nn.Module) else {}
        function = (lambda m, x: m.average(m.conv(x))) if layers else (lambda m, x, f=average: f(m.conv(x)))
        model = Calls(function, conv=conv(), **layers).eval()
        assert ops(optimized_and_same(model, X)) == ["8->8 3x3", kind]


@pytest.mark.parametrize(
    "average",
    [
        lambda x: F.avg_pool2d(x, 3, 2, 1),
        lambda x: F.avg_pool2d(x, 2, divisor_override=3),
        lambda x: x.mean((1, 2)),
        lambda x: F.adaptive_avg_pool2d(x, 2),
    ],
)
def test_other_averages_stay_as_they_are(average):
    assert ops(optimized_and_same(Calls(lambda m, x: average(m.conv(x)), conv=conv()).eval(), X)) == ["8->8 3x3"]


def test_a_cifar_resnet_is_one_call():
    model = lived_in(create_model("resnet20", shortcut="pool"))
    x = torch.randn(2, 3, 16, 16)
    optimized = optimized_and_same(model, x, example=x)
    assert optimized._source.count("rep_conv2d_chain.default(") == 1
    assert optimized(torch.randn(1, 3, 17, 13)).shape == (1, 10)
