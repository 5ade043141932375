"""Conversion of models: what is replaced, what is folded, what it costs, and that tuning helps."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from effkern.nn.pq import PQConv2d, PQEmbedding, PQLinear
from effkern.quantize import Rule, distillation_loss, encode, from_kill_the_bits, quantize, regime, tune
from effkern.quantize.calibration import input_metric
from effkern.quantize.finetune import mean_gradients, uses


class Net(nn.Module):
    """A stem, a convolution with batch norm, one whose result is used twice, a shared layer, a classifier."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(16, 10)  # defined first, runs last
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.conv = nn.Conv2d(8, 16, 3, stride=2, padding="valid", bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.twice = nn.Conv2d(16, 16, 1)
        self.twice_norm = nn.BatchNorm2d(16)
        self.shared = nn.Conv2d(16, 16, 3, padding="same", groups=2)
        self.alias = self.shared

    def forward(self, x, scale=1.0):
        x = F.relu(self.norm(self.conv(self.stem(x))))
        y = self.twice(x)
        x = self.twice_norm(y) + y
        x = self.shared(x) + self.alias(x)
        return self.head(x.mean((2, 3))) * scale


def make_net():
    torch.manual_seed(0)
    net = Net().eval()
    for norm in (net.norm, net.twice_norm):
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias)
    return net


def test_replaces_what_the_rules_name_and_reports_it():
    net = make_net()
    coded, report = quantize(net, Rule(9, 8))
    assert type(net.conv) is nn.Conv2d  # a copy by default
    assert isinstance(coded.conv, PQConv2d) and isinstance(coded.head, PQLinear)
    assert coded.shared is coded.alias and isinstance(coded.shared, PQConv2d)
    assert [layer.name for layer in report.layers] == ["head", "stem", "conv", "twice", "shared"]
    for layer in report.layers:
        assert 0 < layer.error < 1 and layer.entries <= 8 and not layer.why_not
    x = torch.randn(2, 3, 9, 9)
    assert coded(x).shape == (2, 10)
    dense = make_net()
    for name in ("stem", "conv", "twice", "shared", "head"):
        layer = getattr(dense, name)
        layer.weight.data = getattr(coded, name).dense_weight().reshape(layer.weight.shape)
    torch.testing.assert_close(coded(x), dense(x), rtol=1e-4, atol=1e-4)


def test_folds_only_batch_norms_it_can_prove():
    net = make_net()
    plain, _ = quantize(net, Rule(9, 8))
    folded, report = quantize(net, Rule(9, 8), fold_batch_norm=True)
    assert report.folded == {"conv": "norm"}  # the other convolution's result is used twice
    assert isinstance(folded.norm, nn.Identity) and isinstance(folded.twice_norm, nn.BatchNorm2d)
    assert folded.conv.scale is not None and folded.conv.bias is not None
    x = torch.randn(2, 3, 9, 9)
    torch.testing.assert_close(folded(x), plain(x), rtol=1e-4, atol=1e-4)


def test_a_model_that_cannot_be_traced_keeps_its_norms():
    class Branching(nn.Sequential):
        def forward(self, x):
            return super().forward(x) if float(x.sum()) > 0 else x

    model = Branching(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8))
    coded, report = quantize(model, Rule(9, 8), fold_batch_norm=True)
    assert report.folded == {} and isinstance(coded[1], nn.BatchNorm2d) and isinstance(coded[0], PQConv2d)


def test_calibration_follows_the_running_order_and_lowers_the_error_of_the_output():
    net = make_net()
    torch.manual_seed(1)
    x = torch.randn(64, 3, 1, 1) + 0.1 * torch.randn(64, 3, 9, 9)  # flat images: the mean of a kernel is what matters
    rules = {"stem": Rule(9, 4)}
    plain, _ = quantize(net, lambda name, layer: rules.get(name))
    weighted, report = quantize(net, lambda name, layer: rules.get(name), calibration=[x[:32], (x[32:], 1.0)])
    assert [layer.name for layer in report.layers] == ["stem", "conv", "twice", "shared", "head"]

    def error(model):
        return float((model.stem(x) - net.stem(x)).detach().square().mean())

    assert error(weighted) < 0.8 * error(plain)


def test_input_metric_is_the_mean_square_of_what_a_sub_vector_meets():
    conv = nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2)
    x = torch.randn(2, 4, 5, 5)
    h = input_metric(conv, conv, [x], d=18)  # a whole row: two channels, nine taps
    weight = torch.randn(1, 18)
    probe = nn.Conv2d(4, 2, 3, stride=2, padding=1, groups=2, bias=False)
    probe.weight.data = weight.reshape(1, 2, 3, 3).expand(2, 2, 3, 3).clone()
    want = float(probe(x).detach().double().square().mean())
    assert float(weight.double() @ h @ weight.double().T) == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize(
    "rule", [Rule(4, 32), Rule(5, 16, stages=3), Rule(4, 16, per_position=True), Rule(3, 16, row_scale=True)]
)
def test_encode_measures_its_own_error(rule):
    weight = torch.randn(80, 18, generator=torch.Generator().manual_seed(0)) * torch.logspace(-2, 2, 80).unsqueeze(1)
    found = encode(weight, rule)
    layer = PQLinear.from_float(nn.Linear(18, 80), found.codes, found.book, found.scale)
    error = float((layer.dense_weight() - weight).detach().square().sum() / weight.square().sum())
    assert found.error == pytest.approx(error, rel=1e-3)


def test_stages_and_row_scale_pay():
    weight = torch.randn(64, 32, generator=torch.Generator().manual_seed(0)) * torch.logspace(-1, 1, 64).unsqueeze(1)
    one, three = encode(weight, Rule(4, 16)), encode(weight, Rule(4, 16, stages=3))
    assert three.error < 0.5 * one.error and three.codes.shape == (64, 8, 3) and three.book.shape[0] == 3
    relative = (encode(weight, Rule(4, 16, row_scale=True)), one)
    rows = []
    for found in relative:
        layer = PQLinear.from_float(nn.Linear(32, 64), found.codes, found.book, found.scale)
        rows.append(((layer.dense_weight() - weight).square().sum(1) / weight.square().sum(1)).mean())
    assert rows[0] < 0.5 * rows[1]  # small rows are not rounded away


def test_codebooks_are_clamped_and_tiny_layers_left():
    model = nn.Sequential(
        nn.Linear(9, 4), nn.Linear(4, 1), nn.Conv2d(2, 2, 2, padding="same"), nn.Embedding(4, 4, max_norm=1.0)
    )
    coded, report = quantize(model, Rule(1, 256))
    assert coded[0].entries == 8  # 36 sub-vectors: the largest power of two up to 9
    why = {layer.name: layer.why_not for layer in report.layers}
    assert type(coded[1]) is nn.Linear and "at least 8 sub-vectors" in why["1"]
    assert type(coded[2]) is nn.Conv2d and "same" in why["2"]
    assert type(coded[3]) is nn.Embedding and "max_norm" in why["3"]


def test_a_layer_is_a_model_too_and_embeddings_are_replaced():
    coded, _ = quantize(nn.Embedding(64, 16, padding_idx=3), None)
    assert isinstance(coded, PQEmbedding) and coded.d == 8 and coded.padding_idx == 3
    assert torch.equal(coded(torch.tensor([3])), torch.zeros(1, 16))


def test_regimes():
    small, large = regime("small", classifier_entries=2048), regime("large")
    for layer, of_small, of_large in (
        (nn.Conv2d(3, 64, 7), None, None),
        (nn.Conv2d(64, 64, 3), 9, 18),
        (nn.Conv2d(64, 64, 1), 4, 8),
        (nn.Conv2d(64, 64, 3, groups=64), 9, 9),
        (nn.Linear(64, 10), 4, 4),
        (nn.Embedding(9, 64), 8, 8),
    ):
        for rules, d in ((small, of_small), (large, of_large)):
            rule = rules("any", layer)
            assert (rule.d if rule else None) == d
    assert small("any", nn.Linear(64, 10)).entries == 2048
    assert regime(stem=True)("any", nn.Conv2d(3, 64, 7)).d == 49


def test_kill_the_bits_layout():
    rows, positions, d = 6, 5, 9
    codes = torch.randint(7, (rows, positions))
    book = torch.randn(7, d)
    weight = book[codes].reshape(rows, positions * d)  # Co x (Ci k k)
    columns = weight.t()  # as that code views it: (Ci k k) x Co, cut along dimension 0, blocks side by side
    blocks = torch.cat(columns.reshape(positions, d, rows).unbind(0), dim=1)
    assignments = torch.cdist(blocks.t(), book).argmin(1)
    back, centroids = from_kill_the_bits(assignments, book, rows)
    assert torch.equal(back, codes) and centroids.shape == (1, 7, d)
    for bad in (assignments[:-1], assignments + 7):
        with pytest.raises(ValueError, match="assignments"):
            from_kill_the_bits(bad, book, rows)


def test_uses_count_every_book_and_mean_gradients_divide_by_them():
    layer = PQLinear(8, 6, d=2, entries=5, books=4)
    counts = uses(layer)
    assert counts.shape == (4, 5) and counts.sum(1).tolist() == [6] * 4
    x = torch.randn(3, 8)
    layer(x).sum().backward()
    summed = layer.codebook.grad.clone()
    layer.zero_grad()
    with mean_gradients(layer):
        layer(x).sum().backward()
    torch.testing.assert_close(layer.codebook.grad, summed / counts.clamp(min=1).unsqueeze(2))
    layer.zero_grad()
    layer(x).sum().backward()
    torch.testing.assert_close(layer.codebook.grad, summed)  # the hook is gone


@pytest.mark.parametrize("reduce", ["mean", "sum"])
def test_tuning_brings_the_scores_back(reduce):
    net = make_net()
    coded, _ = quantize(net, Rule(9, 8))
    torch.manual_seed(2)
    held = torch.randn(64, 3, 9, 9)
    loss = distillation_loss(net)
    before = float(loss(coded, held, None).detach())
    codes = coded.conv.codes.clone()
    losses = tune(
        coded,
        net,
        [torch.randn(32, 3, 9, 9) for _ in range(60)],
        lr=0.02 if reduce == "mean" else 0.002,
        grad_reduce=reduce,
    )
    assert len(losses) == 60 and float(loss(coded, held, None).detach()) < 0.5 * before
    assert torch.equal(coded.conv.codes, codes) and not coded.training


def test_bad_arguments_are_named():
    net = make_net()
    for match, call in (
        ("d: must be", lambda: Rule(0)),
        ("per_position", lambda: Rule(4, stages=2, per_position=True)),
        ("blocks", lambda: regime("medium")),
        ("calibration", lambda: quantize(net, Rule(9, 8), calibration=[])),
        ("grad_reduce", lambda: tune(net, net, [], grad_reduce="max")),
        ("temperature", lambda: distillation_loss(net, 0)),
    ):
        with pytest.raises(ValueError, match=match):
            call()
