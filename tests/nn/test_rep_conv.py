"""RepConv2d: a drop-in for Conv2d + activation whose packed weight is never stale."""

import copy
import io
import pickle
import threading

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import effkern
from effkern.nn import RepConv2d, RepVGGBlock, freeze_packs
from effkern.ops import rep_conv2d


@pytest.fixture
def layer():
    torch.manual_seed(0)
    return RepConv2d(6, 20, 3, stride=2, padding=1, groups=2, act="silu").eval()


X = torch.randn(2, 6, 9, 8, generator=torch.Generator().manual_seed(0))


def plain(layer, x, residual=None):
    """The layer without any pack."""
    with torch.enable_grad():
        y = rep_conv2d(
            x, layer.weight, layer.bias, layer.stride, layer.padding, layer.dilation, layer.groups, layer.act, residual
        )
    return y.detach()


def is_right(layer, x=X):
    with torch.no_grad():
        y = layer(x.to(layer.weight.dtype))
    return torch.equal(y, plain(layer, x.to(layer.weight.dtype)))


@pytest.mark.filterwarnings("ignore:Using padding=:UserWarning")  # of the Conv2d compared with
@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 3, "padding": 1},
        {"kernel_size": 3, "padding": (2, 0), "stride": (1, 2)},
        {"kernel_size": (1, 3), "padding": "same"},
        {"kernel_size": (2, 4), "padding": "same", "dilation": (1, 3)},
        {"kernel_size": 3, "padding": "valid", "groups": 3},
        {"kernel_size": 1},
    ],
    ids=str,
)
def test_is_conv2d_and_activation(options, bias, mode):
    torch.manual_seed(1)
    conv = nn.Conv2d(6, 9, bias=bias, padding_mode=mode, **options)
    layer = RepConv2d(6, 9, bias=bias, padding_mode=mode, act="hardswish", **options)
    assert {k: v.shape for k, v in layer.state_dict().items()} == {k: v.shape for k, v in conv.state_dict().items()}
    layer.load_state_dict(conv.state_dict())
    expected = F.hardswish(conv(X))
    assert layer.plain()[0].weight is layer.weight
    for form in (layer, layer.eval(), RepConv2d.from_conv(conv, "hardswish").eval(), layer.plain()):
        for grad in (True, False):
            with torch.set_grad_enabled(grad):
                torch.testing.assert_close(form(X), expected, rtol=1e-5, atol=1e-5)


def test_parameters_start_like_those_of_conv2d():
    torch.manual_seed(3)
    conv = nn.Conv2d(6, 8, 3)
    torch.manual_seed(3)
    layer = RepConv2d(6, 8, 3)
    assert torch.equal(conv.weight, layer.weight) and torch.equal(conv.bias, layer.bias)


def test_from_conv_shares_parameters_and_mode():
    conv = nn.Conv2d(6, 8, 3).eval()
    layer = RepConv2d.from_conv(conv)
    assert layer.weight is conv.weight and layer.bias is conv.bias and not layer.training


@pytest.mark.parametrize(
    "options, match",
    [
        ({"groups": 4}, "groups"),
        ({"groups": 0}, "groups"),
        ({"act": "gelu"}, "act"),
        ({"padding_mode": "edge"}, "padding_mode"),
        ({"padding": "full"}, "padding"),
        ({"padding": "same", "stride": 2}, "stride 1"),
    ],
)
def test_bad_options_are_named(options, match):
    with pytest.raises(ValueError, match=match):
        RepConv2d(6, 9, 3, **options)


def test_residual_is_added_before_the_activation(layer):
    residual = torch.randn(2, 20, 5, 4)
    with torch.no_grad():
        assert torch.equal(layer(X, residual), plain(layer, X, residual))


def test_holds_one_pack_in_eval_without_gradients(layer):
    layer(X)
    assert layer._held is None  # a gradient was wanted
    with torch.no_grad():
        layer(X)
        pack = layer._held
        assert pack is not None
        layer(X)
        assert layer._held is pack
        layer.train()
        assert layer._held is None
        layer(X)
        assert layer._held is None
    assert list(layer.state_dict()) == ["weight", "bias"] and not list(layer.buffers())


def test_frozen_layer_packs_and_gives_input_gradients(layer):
    layer.requires_grad_(False)
    x = X.clone().requires_grad_()
    layer(x).sum().backward()
    assert layer._held is not None
    expected = X.clone().requires_grad_()
    rep_conv2d(expected, layer.weight, layer.bias, 2, 1, 1, 2, "silu").sum().backward()
    torch.testing.assert_close(x.grad, expected.grad, rtol=0, atol=0)


def fused_step(layer):
    optimizer = torch.optim.SGD(layer.parameters(), 0.1, fused=True)
    layer(X).sum().backward()
    optimizer.step()


CHANGES = {
    "in place": lambda m: m.weight.data.mul_(2),
    "no_grad": lambda m: torch.no_grad()(m.weight.mul_)(2),
    "bias": lambda m: m.bias.data.add_(1),
    "fused sgd": fused_step,
    "data =": lambda m: setattr(m.weight, "data", torch.randn_like(m.weight)),
    "new parameter": lambda m: setattr(m, "weight", nn.Parameter(torch.randn_like(m.weight))),
    "no bias": lambda m: setattr(m, "bias", None),
    "load": lambda m: m.load_state_dict({k: torch.randn_like(v) for k, v in m.state_dict().items()}),
    "load assign": lambda m: m.load_state_dict(
        {k: torch.randn_like(v) for k, v in m.state_dict().items()}, assign=True
    ),
    "load in a parent": lambda m: nn.Sequential(m).load_state_dict(
        {f"0.{k}": torch.randn_like(v) for k, v in m.state_dict().items()}
    ),
    "channels_last": lambda m: m.to(memory_format=torch.channels_last).weight.data.neg_(),
    "bfloat16": lambda m: m.bfloat16(),
    "half": lambda m: m.half(),
    "half and back": lambda m: m.half().float(),
    "invalidate": lambda m: (m.weight.detach().numpy().__setitem__((3, 1, 1, 1), 7.0), effkern.invalidate(m.weight)),
    "train a bit": lambda m: fused_step(m.train()) or m.eval(),
    "vector_to_parameters": lambda m: nn.utils.vector_to_parameters(
        nn.utils.parameters_to_vector(m.parameters()).detach() * 2, m.parameters()
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_pack_is_never_stale(layer, change):
    assert is_right(layer)
    CHANGES[change](layer)
    assert is_right(layer)


def test_every_path_that_must_drop_the_pack_does(layer):
    for change in (lambda: layer.load_state_dict(layer.state_dict()), layer.float, layer.train):
        layer.eval()
        assert is_right(layer) and layer._held is not None
        change()
        assert layer._held is None


@pytest.mark.parametrize(
    "copier",
    [copy.deepcopy, copy.copy, lambda m: pickle.loads(pickle.dumps(m))],
    ids=["deepcopy", "copy", "pickle"],
)
def test_copies_carry_no_pack_and_stand_alone(layer, copier):
    assert is_right(layer)
    twin = copier(layer)
    assert twin._held is None
    twin.weight.data.neg_()
    assert is_right(twin) and is_right(layer)


def test_pack_made_in_inference_mode_serves_gradients_too(layer):
    layer.requires_grad_(False)
    with torch.inference_mode():
        layer(X)
    x = X.clone().requires_grad_()
    layer(x).sum().backward()
    assert x.grad is not None


def test_threads_may_share_a_layer(layer):
    weights = [layer.weight.detach().clone() * (i + 1) for i in range(3)]
    expected = []
    for weight in weights:
        layer.weight.data = weight
        expected.append(plain(layer, X))
    wrong = []

    def work():
        with torch.no_grad():
            for _ in range(100):
                y = layer(X)
                if not any(torch.equal(y, e) for e in expected):
                    wrong.append(y)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for i in range(60):
        layer.weight.data = weights[i % 3]
    for thread in threads:
        thread.join()
    assert not wrong
    assert is_right(layer)


def test_saved_module_loads(layer):
    assert is_right(layer)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert is_right(loaded) and torch.equal(loaded(X), layer(X))


def test_state_dict_round_trip(layer):
    other = RepConv2d(6, 20, 3, stride=2, padding=1, groups=2, act="silu").eval()
    assert is_right(other)
    other.load_state_dict(layer.state_dict())
    with torch.no_grad():
        assert torch.equal(other(X), layer(X))


def test_functional_call_uses_the_given_weights(layer):
    with torch.no_grad():
        layer(X)
        doubled = {"weight": layer.weight * 2, "bias": layer.bias}
        y = torch.func.functional_call(layer, doubled, (X,))
        assert torch.equal(y, rep_conv2d(X, doubled["weight"], layer.bias, 2, 1, 1, 2, "silu", algo="direct"))
        assert is_right(layer)


def test_wrong_input_dtype_is_refused_not_converted(layer):
    with torch.no_grad():
        layer(X)
        with pytest.raises(TypeError, match="weight"):
            layer(X.half())


def test_autocast_is_that_of_the_op(layer):
    with torch.autocast("cpu", torch.bfloat16):
        with_grad = layer(X)
        with torch.no_grad():
            assert torch.equal(layer(X), with_grad)
    assert with_grad.dtype == torch.bfloat16


def test_cache_off_holds_nothing(layer, monkeypatch):
    from effkern.ops import _memo

    off = _memo.Memo("off")
    monkeypatch.setattr("effkern.nn._packing.memo", lambda: off)
    monkeypatch.setattr("effkern.ops.rep_conv.memo", lambda: off)
    assert is_right(layer)
    assert layer._held is None


def test_compile_and_export(layer):
    net = nn.Sequential(layer, RepConv2d(20, 4, 1, act="none")).eval().requires_grad_(False)
    expected = net(X)
    torch._dynamo.reset()
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(X), expected)
    layer.weight.data.mul_(2)  # graphs read the parameters, not a pack
    assert not torch.equal(compiled(X), expected)
    assert torch.equal(compiled(X), net(X))
    program = torch.export.export(net, (X,), dynamic_shapes=({0: torch.export.Dim("n")},))
    for x in (X, torch.cat([X, X, X])):
        assert torch.equal(program.module()(x), net(x))


def test_frozen_pack_goes_into_graphs(layer):
    layer.requires_grad_(False)
    with pytest.raises(RuntimeError, match="eval mode"):
        layer.train().freeze_pack()
    layer.eval().freeze_pack()
    expected = layer(X)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(X), expected)
    program = torch.export.export(layer, (X,), dynamic_shapes=({0: torch.export.Dim("n")},))
    called = [str(node.target) for node in program.graph.nodes]
    assert "effkern.rep_conv2d_packed.default" in called and "effkern.rep_conv2d.default" not in called
    assert torch.equal(program.module()(torch.cat([X, X, X]))[:2], expected)
    layer.weight.data.mul_(2)
    assert torch.equal(layer(X), expected)  # eager holds to the promise too
    layer.freeze_pack()
    assert is_right(layer)
    layer.half()
    assert layer._frozen is None


def test_trains_under_ddp(layer, tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        layer.train()
        wrapped = nn.parallel.DistributedDataParallel(layer)
        optimizer = torch.optim.SGD(wrapped.parameters(), 0.1)
        losses = []
        for _ in range(3):
            optimizer.zero_grad()
            loss = wrapped(X).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[2] < losses[0]
        wrapped.eval()
        with torch.no_grad():
            assert torch.equal(wrapped(X), plain(layer, X))
    finally:
        dist.destroy_process_group()


def test_counts_its_multiply_adds():
    from effkern.training import count_macs

    x = torch.zeros(2, 6, 9, 8)
    layer = RepConv2d(6, 20, 3, stride=2, padding=1, groups=2)
    assert count_macs(layer, x) == count_macs(nn.Conv2d(6, 20, 3, 2, 1, groups=2), x) == 5 * 4 * 20 * 3 * 9


def test_printed_form_is_that_of_conv2d_with_its_activation():
    assert repr(RepConv2d(6, 20, 3, dilation=2, groups=2, bias=False, act="silu")) == (
        "RepConv2d(6, 20, kernel_size=(3, 3), stride=(1, 1), padding=(0, 0), dilation=(2, 2), groups=2, bias=False, "
        "act=silu)"
    )


def test_repvgg_block_is_the_sum_of_its_branches():
    block = RepVGGBlock(8, 8, groups=2)
    x = torch.randn(4, 8, 6, 6)
    expected = sum(branch(x) for branch in block.branches.values())
    torch.testing.assert_close(block(x), F.relu(expected))
    assert list(block.branches) == ["conv3", "conv1", "identity"]
    assert list(RepVGGBlock(8, 8, stride=2).branches) == list(RepVGGBlock(8, 16).branches) == ["conv3", "conv1"]


def test_frozen_packs_ignore_the_parameters_until_they_are_dropped():
    layer = RepConv2d(3, 5, 3).eval()
    x = torch.randn(1, 3, 6, 6)
    with torch.no_grad():
        before = freeze_packs(layer)(x)
        layer.weight.add_(1)
        assert torch.equal(layer(x), before)
        layer.drop_pack()
        assert not torch.equal(layer(x), before)
