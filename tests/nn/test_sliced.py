"""Sliced layers: equal to a dense layer built from the slice, stateless, and good modules."""

import copy
import io
import pickle

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from effkern.nn import SlicedConv2d, SlicedConvBNAct, SlicedLinear, SwitchableBatchNorm2d
from effkern.ops import _direct

INS, OUTS = [4, 8, 12], [6, 12, 24]
CASES = {
    "3x3": (INS, OUTS, {"kernel_size": 3, "padding": 1}),
    "stride_2": (INS, OUTS, {"kernel_size": 3, "stride": 2, "bias": False}),
    "pointwise": (INS, OUTS, {"kernel_size": 1}),
    "dilated": (INS, OUTS, {"kernel_size": 3, "dilation": 2, "padding": (2, 1)}),
    "depthwise": (INS, INS, {"kernel_size": 3, "padding": 1, "groups": 12}),
    "prefix_groups": (INS, [6, 12, 18], {"kernel_size": 3, "groups": 3}),
    "within_group": (INS, OUTS, {"kernel_size": 3, "groups": 2, "group_mode": "within_group"}),
    "stem": (3, OUTS, {"kernel_size": 3}),
    "last": (INS, 10, {"kernel_size": 1}),
}


def pointwise(x, width):
    return SlicedConv2d(INS, OUTS, 1)(x, width)


def random_stats(bn):
    """Statistics and parameters as after training."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for t, low in ((bn.running_mean, -1), (bn.running_var, 0.5), (bn.weight, 0.5), (bn.bias, -1)):
            t.copy_(torch.rand(t.shape, generator=generator) + low)
    return bn


def block(**options):
    torch.manual_seed(0)
    layer = SlicedConvBNAct(INS, OUTS, 3, act="hardswish", **options)
    random_stats(layer.bn)
    return layer.eval()


def near(y, expected, slack=1e-5):
    torch.testing.assert_close(y, expected, rtol=slack, atol=slack)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("index", [0, 1, 2, -1])
def test_a_conv_is_the_dense_layer_of_its_slice_forward_and_backward(name, index):
    ins, outs, options = CASES[name]
    torch.manual_seed(0)
    layer = SlicedConv2d(ins, outs, **options)
    dense = layer.narrow(index)
    x = torch.randn(2, dense.in_channels, 9, 8)
    xs, xd = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, expected = layer(xs, index), dense(xd)
    near(y, expected)
    y.square().sum().backward()
    expected.square().sum().backward()
    near(xs.grad, xd.grad, 1e-4)
    with torch.no_grad():
        near(layer.eval()(x, index), expected)  # from the pack
    # What ran has the dense layer's gradient, what did not run has none.
    layer.weight.data = layer.weight.grad
    near(layer.narrow(index).weight, dense.weight.grad, 1e-4)
    assert int((layer.weight.grad != 0).sum()) <= dense.weight.numel()
    if layer.bias is not None:
        assert layer.bias.grad.count_nonzero() <= dense.bias.numel()
        near(layer.bias.grad.sum(), dense.bias.grad.sum(), 1e-4)


def test_input_and_output_widths_are_independent():
    layer = SlicedConv2d(INS, OUTS, 1)
    for i, ins in enumerate(INS):
        for j, outs in enumerate(OUTS):
            x = torch.randn(2, ins, 3, 3)
            near(layer(x, j, i), F.conv2d(x, layer.weight[:outs, :ins], layer.bias[:outs]))


@pytest.mark.parametrize("name", CASES)
def test_a_mixed_batch_is_every_sample_at_its_width(name):
    ins, outs, options = CASES[name]
    torch.manual_seed(0)
    layer = SlicedConv2d(ins, outs, **options)
    x = torch.randn(5, layer.in_channels[-1], 7, 7)
    width = torch.tensor([2, 0, 1, 0, 2])
    y = layer(x, width)
    for n, i in enumerate(width.tolist()):
        alone = layer(x[n : n + 1], i)
        near(y[n : n + 1, : alone.size(1)], alone)
        assert not y[n, alone.size(1) :].any()


def test_a_mixed_batch_reads_no_inactive_channel():
    layer = SlicedConv2d(INS, OUTS, 3)
    x = torch.full((2, 12, 5, 5), float("nan"))
    x[0, :4], x[1, :8] = 1, 2
    assert layer(x, torch.tensor([0, 1])).isfinite().all()


def test_one_side_may_have_one_width_for_the_batch():
    layer = SlicedConv2d(INS, OUTS, 1)
    x = torch.randn(3, 12, 4, 4)
    width = torch.tensor([0, 2, 1])
    near(layer(x, width, 1), layer(x, width, torch.tensor([1, 1, 1])))
    near(layer(x, 1, width), layer(x, torch.tensor([1, 1, 1]), width))


def test_linear_is_the_dense_layer_of_its_slice():
    torch.manual_seed(0)
    layer = SlicedLinear(INS, OUTS)
    for i in range(3):
        for shape in ((5,), (2, 3), ()):
            x = torch.randn(*shape, INS[i])
            near(layer(x, i), layer.narrow(i)(x))
    x = torch.randn(4, 12)
    y = layer(x, torch.tensor([1, 0, 2, 1]))
    for n, i in enumerate([1, 0, 2, 1]):
        near(y[n, : OUTS[i]], layer.narrow(i)(x[n, : INS[i]]))
        assert not y[n, OUTS[i] :].any()


def test_calls_leave_no_trace():
    layer = block()
    small, large = torch.randn(2, 4, 6, 6), torch.randn(2, 12, 6, 6)
    with torch.no_grad():
        first = [layer(small, 0), layer(large, 2), layer(large, torch.tensor([1, 2]))]
        again = [layer(small, 0), layer(large, 2), layer(large, torch.tensor([1, 2]))]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize(
    "call, error, match",
    [
        (lambda: SlicedConv2d([8, 4], 4, 1), ValueError, "in_channels must be .* ascending"),
        (lambda: SlicedConv2d(4, [], 1), ValueError, "out_channels"),
        (lambda: SlicedConv2d([2, 4], [2, 4, 8], 1), ValueError, "as many"),
        (lambda: SlicedConv2d(6, 8, 1, groups=4), ValueError, "groups must divide in_channels, got 4 and 6"),
        (
            lambda: pointwise(torch.randn(1, 12, 2, 2), 3),
            IndexError,
            r"width must be in \[-3, 2\], got 3",
        ),
        (lambda: pointwise(torch.randn(1, 7, 2, 2), 1), ValueError, "at least 8 channels"),
        (
            lambda: pointwise(torch.randn(2, 12, 2, 2), torch.tensor([0, 3])),
            IndexError,
            "out of bounds",
        ),
        (lambda: pointwise(torch.randn(2, 12, 2, 2), torch.tensor([0])), ValueError, r"tensor \[2\]"),
        (lambda: pointwise(torch.randn(2, 12, 2, 2), torch.rand(2)), ValueError, "int32 or int64"),
        (lambda: SwitchableBatchNorm2d([4, 8], affine="none"), ValueError, "affine"),
        (lambda: SwitchableBatchNorm2d([4, 8])(torch.randn(2, 8, 1, 1), 0), ValueError, r"x must be \[N, 4, H, W\]"),
        (lambda: SwitchableBatchNorm2d([4, 8])(torch.randn(2, 8, 1, 1), torch.tensor([0, 1])), ValueError, r"eval\(\)"),
        (lambda: SlicedConvBNAct(3, 4, 3, act="gelu"), ValueError, "act must be one of"),
        (lambda: SlicedConvBNAct(3, 4, 3).fold(), RuntimeError, "eval"),
    ],
)
def test_bad_arguments_are_named(call, error, match):
    with pytest.raises(error, match=match):
        call()


@pytest.mark.parametrize("affine", ["shared", "per_width"])
def test_batch_norm_is_one_batch_norm_a_width(affine):
    torch.manual_seed(0)
    bn = random_stats(SwitchableBatchNorm2d([4, 8, 8], affine=affine))
    plain = []
    for i, c in enumerate(bn.widths):
        one = nn.BatchNorm2d(c)
        row = (lambda t, i=i, c=c: t[i, :c]) if affine == "per_width" else (lambda t, c=c: t[:c])
        one.load_state_dict(
            {
                "weight": row(bn.weight.detach()), "bias": row(bn.bias.detach()),
                "running_mean": bn.running_mean[i, :c], "running_var": bn.running_var[i, :c],
                "num_batches_tracked": torch.tensor(0),
            }
        )  # fmt: skip
        plain.append(one)
    for training in (True, False):
        for i, one in enumerate(plain):
            x = torch.randn(3, bn.widths[i], 4, 4) + i
            near(bn.train(training)(x, i), one.train(training)(x))
            near(bn.running_mean[i, : bn.widths[i]], one.running_mean)
            near(bn.running_var[i, : bn.widths[i]], one.running_var)
    assert bn.num_batches_tracked.tolist() == [1, 1, 1]
    x = torch.randn(3, 8, 4, 4)
    y = bn(x, torch.tensor([2, 0, 1]))
    for n, i in enumerate([2, 0, 1]):
        near(y[n : n + 1, : bn.widths[i]], plain[i](x[n : n + 1, : bn.widths[i]]))
        assert not y[n, bn.widths[i] :].any()


def test_batch_norm_touches_only_the_statistics_of_its_width():
    bn = SwitchableBatchNorm2d([4, 8], momentum=None)
    before = copy.deepcopy(bn.state_dict())
    batches = torch.randn(3, 6, 4, 5, 5)
    for x in batches:
        bn(x, 0)
    near(bn.running_mean[0, :4], batches.mean((0, 1, 3, 4)))
    near(bn.running_var[0, :4], torch.stack([x.var((0, 2, 3)) for x in batches]).mean(0))
    for name in ("running_mean", "running_var"):
        assert torch.equal(bn.state_dict()[name][1], before[name][1])
        assert torch.equal(bn.state_dict()[name][0, 4:], before[name][0, 4:])


@pytest.mark.parametrize("affine", ["shared", "per_width"])
def test_the_epilogue_is_the_batch_norm(affine):
    layer = block(affine=affine)
    for i in range(3):
        x = torch.randn(2, INS[i], 6, 6)
        expected = F.hardswish(layer.bn(layer.conv(x, i), i))
        near(layer(x, i), expected)
        near(layer.narrow(i)(x), expected)
    x, width = torch.randn(4, 12, 6, 6), torch.tensor([0, 2, 1, 2])
    near(layer(x, width), F.hardswish(layer.bn(layer.conv(x, width), width)))


def test_gradients_of_the_fused_layer_are_those_of_its_parts():
    layer, parts = block(), block()
    x, width = torch.randn(3, 12, 6, 6), torch.tensor([0, 2, 1])
    layer(x, width).square().sum().backward()
    F.hardswish(parts.bn(parts.conv(x, width), width)).square().sum().backward()
    for a, b in zip(layer.parameters(), parts.parameters(), strict=True):
        near(a.grad, b.grad, 1e-3)


def test_folding_is_undone_by_whatever_may_change_a_parameter():
    layer = block()
    x = torch.randn(2, 12, 6, 6)
    with torch.no_grad():
        expected = layer(x, 2)
        for change in (
            lambda: layer.train().eval(),
            lambda: layer.double().float(),
            lambda: layer.load_state_dict(layer.state_dict()),
        ):
            layer.fold()
            assert layer._folded is not None and torch.equal(layer(x, 2), expected)
            change()
            assert layer._folded is None and torch.equal(layer(x, 2), expected)
        layer.fold()
        assert layer.eval()._folded is not None  # an evaluation calls eval() on a network that is deployed already
    layer(x, 2).sum().backward()
    assert layer.bn.weight.grad.any()


@pytest.fixture
def short_ways(monkeypatch):
    """The results of calls past the dispatcher, None where one was not possible."""
    seen, way = [], _direct.sliced_conv2d_packed

    def watched(*args):
        seen.append(way(*args))
        return seen[-1]

    monkeypatch.setattr(_direct, "sliced_conv2d_packed", watched)
    return seen


@pytest.mark.skipif(not _direct.available, reason="no native library")
def test_a_folded_layer_goes_the_short_way(short_ways):
    layer, x = block(), torch.randn(2, 12, 6, 6)
    with torch.no_grad():
        expected = [layer(x, i) for i in (0, 1, 2, -1)]
        layer.fold()
        short_ways.clear()
        for i, y in zip((0, 1, 2, -1), expected, strict=True):
            assert torch.equal(layer(x, i), y) and torch.equal(short_ways.pop(), y) and not short_ways
        with pytest.raises(IndexError, match="width"):
            layer(x, 3)
        with pytest.raises(ValueError, match="channels"):
            layer(x[:, :5], 2)


@pytest.mark.skipif(not _direct.available, reason="no native library")
@pytest.mark.parametrize(
    "change",
    [
        lambda layer: layer.conv.register_forward_hook(lambda *_: None),
        lambda layer: layer.conv.register_forward_pre_hook(lambda *_: None),
        lambda layer: layer.conv.drop_pack(),
        lambda layer: layer.conv.train().eval(),
        lambda layer: setattr(layer, "conv", copy.deepcopy(layer.conv)),
    ],
    ids=["hook", "hook before", "pack dropped", "trained", "replaced"],
)
def test_a_folded_layer_leaves_the_short_way_where_somebody_looks_or_the_pack_is_gone(change, short_ways):
    layer, x = block(), torch.randn(2, 12, 6, 6)
    with torch.no_grad():
        layer.fold()
        y = layer(x, 1)
        ways = len(short_ways)
        change(layer)
        handle, folded = layer.conv._frozen, layer._folded
        assert torch.equal(layer(x, 1), y)
        assert folded is not None and layer._short_way(folded, x, 1) is None
        assert handle is None or len(short_ways) == ways + 1  # the op's own way then, from the layer inside
    layer(x, 1).sum().backward()
    assert layer.conv.weight.grad.any()


def test_copies_of_a_folded_layer_give_the_same():
    layer, x = block(), torch.randn(2, 12, 6, 6)
    with torch.no_grad():
        layer.fold()
        y = layer(x, 1)
        for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert torch.equal(other(x, 1), y)
            other.conv.weight.mul_(2)
            assert not torch.equal(other(x, 1), y) and torch.equal(layer(x, 1), y)


def test_the_pack_follows_the_weight():
    layer = block()
    x = torch.randn(2, 12, 6, 6)
    with torch.no_grad():
        before = layer(x, 1)
        layer.conv.weight.mul_(2)
        after = layer(x, 1)
        near(after, F.hardswish(layer.bn(F.conv2d(x[:, :8], layer.conv.weight[:12, :8], padding=1), 1)))
    assert not torch.equal(before, after)


def test_layers_made_without_memory_know_their_widths_once_they_have_some():
    trained = SlicedConvBNAct([4, 8], [6, 8], 3).eval()
    layer = SlicedConvBNAct([4, 8], [6, 8], 3, device="meta").eval().to_empty(device="cpu")
    layer.load_state_dict(trained.state_dict())
    x, width = torch.randn(2, 8, 5, 5), torch.tensor([0, 1])
    assert torch.equal(layer(x, width), trained(x, width))
    assert layer.half().conv.in_table.tolist() == [4, 8]


def test_state_dict_copy_and_pickle_keep_the_function():
    layer = block()
    x, width = torch.randn(3, 12, 6, 6), torch.tensor([2, 0, 1])
    with torch.no_grad():
        expected = layer(x, width)
        other = SlicedConvBNAct(INS, OUTS, 3, act="hardswish").eval()
        saved = io.BytesIO()
        torch.save(layer.state_dict(), saved)
        saved.seek(0)
        other.load_state_dict(torch.load(saved))
        for same in (other, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert torch.equal(same(x, width), expected)
    assert set(layer.state_dict()) == {
        "conv.weight", "bn.weight", "bn.bias", "bn.running_mean", "bn.running_var", "bn.num_batches_tracked"
    }  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_layers(dtype):
    layer = block()
    x = torch.randn(2, 12, 6, 6)
    with torch.no_grad():
        expected = layer(x, torch.tensor([1, 2]))
        y = layer.to(dtype)(x.to(dtype), torch.tensor([1, 2]))
    assert y.dtype == dtype and layer.conv.in_table.dtype == torch.int64
    torch.testing.assert_close(y.float(), expected, rtol=0.05, atol=0.1)


def test_memory_format_is_kept():
    layer = block().to(memory_format=torch.channels_last)
    x = torch.randn(2, 12, 6, 6).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        y = layer(x, 1)
        near(y, block()(x.contiguous(), 1))
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert layer.conv.weight.is_contiguous(memory_format=torch.channels_last)


def test_autocast_runs_in_16_bits():
    layer = block()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(torch.randn(2, 12, 6, 6), torch.tensor([1, 2]))
    assert y.dtype == torch.bfloat16


def test_compiles_to_one_graph():
    layer = block()
    x = torch.randn(3, 12, 6, 6)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        for width in (2, torch.tensor([0, 2, 1])):
            near(compiled(x, width), layer(x, width))
    layer.train()
    y = compiled(x, 2)
    y.sum().backward()
    assert layer.conv.weight.grad.any()


def test_a_frozen_pack_is_part_of_the_graph():
    layer = block()
    x, width = torch.randn(3, 12, 6, 6), torch.tensor([0, 2, 1])
    layer.conv.freeze_pack()
    layer.fold()
    with torch.no_grad():
        program = torch.export.export(layer, (x, width), strict=False)
        called = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
        assert "effkern.sliced_conv2d_ragged_packed.default" in called
        assert torch.equal(program.module()(x, width), layer(x, width))


def test_distributed_training_at_every_width(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        layer, alone = block().train(), block().train()
        wrapped = nn.parallel.DistributedDataParallel(layer)
        for i, ins in enumerate(INS):
            x = torch.randn(2, ins, 6, 6)
            wrapped(x, i).square().sum().backward()
            alone(x, i).square().sum().backward()
        for a, b in zip(layer.parameters(), alone.parameters(), strict=True):
            near(a.grad, b.grad)
        for a, b in zip(layer.buffers(), alone.buffers(), strict=True):
            near(a, b)
    finally:
        dist.destroy_process_group()


def test_macs_are_those_of_the_slice():
    layer = SlicedConv2d(INS, OUTS, 3, padding=1)
    depthwise = SlicedConv2d(INS, INS, 3, padding=1, groups=12)
    for i, (ins, outs) in enumerate(zip(INS, OUTS, strict=True)):
        x = torch.randn(2, ins, 5, 5)
        assert layer.macs(x.shape, layer(x, i).shape) == 2 * 25 * outs * ins * 9
        assert depthwise.macs(x.shape, depthwise(x, i).shape) == 2 * 25 * ins * 9
    linear = SlicedLinear(INS, OUTS)
    assert linear.macs(torch.Size([2, 8]), torch.Size([2, 12])) == 2 * 8 * 12


def test_folding_elsewhere_than_on_the_cpu_makes_tables_and_no_handle():
    layer = SlicedConvBNAct([4, 8], [6, 8], 3).eval().to("meta")
    layer.fold()
    assert layer._folded is not None and layer._folded.handle is None and not layer._folded.calls
    with torch.no_grad():
        assert layer._tables(0)[0] is layer._folded.rows[0][0]
        assert layer(torch.empty(2, 4, 5, 5, device="meta"), 0).shape == (2, 6, 5, 5)
        assert (
            layer(torch.empty(2, 8, 5, 5, device="meta"), torch.zeros(2, dtype=torch.long, device="meta")).size(1) == 8
        )
    with pytest.raises(RuntimeError, match="CPU"):
        layer.conv.freeze_pack()
