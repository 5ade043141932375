"""Sliced convolution: what is particular to the family. The generic harness tests the rest."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F

import effkern
from effkern import ops
from effkern.ops._registry import OPS
from effkern.ops.sliced_conv.samples import samples
from effkern.testing import assert_within, direct_bound, layouts, to_double
from tests.tails import nan_tails

NAN = float("nan")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", [s.name for s in samples() if s.name != "ragged_empty_batch"])
def test_is_within_the_bound_in_every_layout(name, dtype):
    sample = next(s for s in samples(dtype) if s.name == name)
    exact = sample.reference(*to_double(sample.args))
    bound = direct_bound(sample.magnitude(*sample.args), exact, dtype)
    for layout, x in layouts(sample.args[0]).items():
        assert_within(sample.op(x, *sample.args[1:]), exact, bound, f"{name} {layout}")


def conv(**options):
    torch.manual_seed(0)
    x, weight = torch.randn(4, 8, 6, 6), torch.randn(12, 8, 3, 3)
    return x, weight, torch.randn(12), {"padding": 1, **options}


def close(y, function, *operands):
    """``y`` is ``function(*operands)``, a sum of products, within the bound of the ops."""
    exact = function(*(t.double() for t in operands))
    assert_within(y, exact, direct_bound(function(*(t.double().abs() for t in operands)), exact, y.dtype))


def widths(*pairs):
    return torch.tensor([p[0] for p in pairs]), torch.tensor([p[1] for p in pairs])


class TestUniform:
    def test_channels_of_a_wider_buffer_and_weights_past_the_prefix_are_not_read(self):
        x, weight, bias, options = conv()
        expected = ops.sliced_conv2d(x[:, :5].clone(), weight[:7, :5].clone(), bias[:7], **options)
        for layout in (torch.contiguous_format, torch.channels_last):
            wide = x.clone(memory_format=layout)
            wide[:, 5:], weight[7:], weight[:, 5:], bias[7:] = NAN, NAN, NAN, NAN
            y = ops.sliced_conv2d(wide.contiguous(memory_format=layout)[:, :5], weight, bias, 7, **options)
            assert torch.equal(y, expected)

    def test_a_bias_within_groups_belongs_to_the_rows_that_run(self):
        torch.manual_seed(0)
        x, weight, bias = torch.randn(2, 4, 5, 5), torch.randn(12, 4, 1, 1), torch.randn(12)
        y = ops.sliced_conv2d(x, weight, bias, 4, groups=2, group_mode="within_group")
        rows = [0, 1, 6, 7]
        close(y, lambda x, weight, bias: F.conv2d(x, weight[rows, :2], bias[rows], groups=2), x, weight, bias)

    def test_default_widths(self):
        x, weight, _, options = conv()
        assert ops.sliced_conv2d(x[:, :3], weight, **options).shape[1] == 12
        depthwise = torch.randn(8, 1, 3, 3)
        assert ops.sliced_conv2d(x[:, :3], depthwise, groups=8).shape[1] == 3
        assert ops.sliced_linear(torch.randn(2, 3), torch.randn(5, 4)).shape == (2, 5)

    @pytest.mark.parametrize("act", ["none", "relu", "silu"])
    def test_double_backward(self, act):
        x = torch.randn(1, 2, 4, 4)
        weight, bias = torch.randn(3, 3, 3, 3), torch.randn(3)
        scale, shift = torch.rand(3) + 0.5, torch.randn(3)

        def second(function, dtype):
            leaves = [t.to(dtype).requires_grad_() for t in (x, weight, bias, scale, shift)]
            a, b, c, d, e = leaves
            grads = torch.autograd.grad(function(a, b, c, d, e).square().sum(), leaves, create_graph=True)
            return torch.autograd.grad(sum(g.square().sum() for g in grads), leaves)

        def sliced(x, weight, bias, scale, shift):
            return ops.sliced_conv2d(x, weight, bias, 2, padding=1, scale=scale, shift=shift, act=act)

        def plain(x, weight, bias, scale, shift):
            z = F.conv2d(x, weight[:2, :2], bias[:2], padding=1)
            z = z * scale[:2, None, None] + shift[:2, None, None]
            return {"none": lambda z: z, "relu": F.relu, "silu": F.silu}[act](z)

        for got, want in zip(second(sliced, torch.float32), second(plain, torch.float64), strict=True):
            assert (got - want).abs().max() <= 1e-4 * (1 + want.abs().max())


class TestRagged:
    def test_is_every_sample_alone_bit_for_bit(self):
        x, weight, bias, options = conv()
        c_in, c_out = widths((8, 12), (3, 5), (8, 12), (1, 12))
        tables = torch.rand(2, 12), torch.randn(2, 12)
        rows = torch.tensor([1, 0, 1, 0])
        y = ops.sliced_conv2d_ragged(
            x, weight, bias, c_in, c_out, scale_table=tables[0], shift_table=tables[1], width_idx=rows, act="silu",
            **options,
        )  # fmt: skip
        for n, (i, o, row) in enumerate(zip(c_in.tolist(), c_out.tolist(), rows.tolist(), strict=True)):
            scale, shift = tables[0][row], tables[1][row]
            alone = ops.sliced_conv2d(
                x[n : n + 1, :i], weight, bias, o, scale=scale, shift=shift, act="silu", **options
            )
            assert torch.equal(y[n : n + 1, :o], alone)
            assert torch.equal(y[n, o:], torch.zeros_like(y[n, o:]))

    @pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "channels_last"])
    def test_inactive_channels_are_neither_read_nor_left_unwritten(self, layout):
        x, weight, bias, options = conv()
        c_in, c_out = widths((2, 5), (8, 12), (0, 3), (7, 0))
        expected = ops.sliced_conv2d_ragged(x, weight, bias, c_in, c_out, **options)
        poisoned = x.clone()
        for n, i in enumerate(c_in.tolist()):
            poisoned[n, i:] = NAN
        y = ops.sliced_conv2d_ragged(
            poisoned.contiguous(memory_format=layout), weight, bias, c_in, c_out, act="relu", **options
        )
        assert torch.equal(y, expected.relu())
        assert not y[3].any() and not y[2, 3:].any()

    def test_no_input_channels_leave_the_epilogue(self):
        x, weight, bias, options = conv()
        c_in, c_out = widths(*[(0, 12)] * 4)
        y = ops.sliced_conv2d_ragged(x, weight, bias, c_in, c_out, **options)
        assert torch.equal(y, bias[None, :, None, None].expand_as(y))

    @pytest.mark.parametrize("remember", [True, False])
    def test_a_depthwise_sample_without_input_channels_is_left_the_epilogue(self, remember):
        x, weight, bias = torch.randn(2, 20, 5, 5), torch.randn(20, 1, 3, 3), torch.randn(20)
        options = {"padding": 1, "groups": 20, "group_mode": "within_group"}
        weight.requires_grad_(not remember)
        epilogue = bias[:, None, None].expand(20, 5, 5)
        y = ops.sliced_conv2d_ragged(x, weight, bias, *widths((0, 20), (20, 20)), **options)
        assert torch.equal(y[0], epilogue)
        torch.testing.assert_close(y[1:], F.conv2d(x[1:], weight, bias, padding=1, groups=20), rtol=1e-5, atol=1e-5)
        assert torch.equal(ops.sliced_conv2d(x[:1, :0], weight, bias, 20, **options)[0], epilogue)

    @pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "channels_last"])
    @pytest.mark.parametrize("op", ["conv", "packed", "depthwise", "linear"])
    def test_without_zeros_the_prefix_is_the_same(self, op, layout):
        x, weight, bias, options = conv()
        x, function = x.contiguous(memory_format=layout), ops.sliced_conv2d_ragged
        c_in, c_out = widths((8, 12), (3, 5), (0, 4), (7, 0))
        weights = (weight, bias)
        if op == "depthwise":
            weights, options, c_out = (torch.randn(8, 1, 3, 3), torch.randn(8)), {**options, "groups": 8}, c_in
        elif op == "packed":
            function, weights = ops.sliced_conv2d_ragged_packed, (ops.pack_conv_weight(weight, bias), 12, 3)
        elif op == "linear":
            function, x, weights, options = ops.sliced_linear_ragged, x[:, :, 0, 0], (weight[:, :, 0, 0], bias), {}
        y, zeros = (function(x, *weights, c_in, c_out, act="silu", zero_tail=z, **options) for z in (False, True))
        assert y.shape == zeros.shape and y.stride() == zeros.stride()
        for n, active in enumerate(c_out.tolist()):
            assert torch.equal(y[n, :active], zeros[n, :active]) and not zeros[n, active:].any()

    def test_gradients_ignore_what_is_past_the_prefix(self, monkeypatch):
        x, weight, bias, options = conv()
        c_in, c_out = widths((8, 12), (3, 5), (8, 12), (7, 0))
        mix = torch.randn(12, 12, 1, 1)

        def gradients(zero_tail):
            leaves = [t.clone().requires_grad_() for t in (x, weight, bias, mix)]
            options["zero_tail"] = zero_tail
            y = ops.sliced_conv2d_ragged(*leaves[:3], c_in, c_out, act="hardswish", **options)
            y = y * y.mean((2, 3), keepdim=True)  # as attention does, on all channels
            y = ops.sliced_conv2d_ragged(y, leaves[3], None, c_out, torch.full((4,), 12))
            return torch.autograd.grad(y.square().sum(), leaves)

        expected = gradients(True)
        found = nan_tails(monkeypatch)
        assert all(map(torch.equal, gradients(False), expected)) and found[0].isnan().any()

    def test_widths_are_int32_or_int64_of_any_stride(self):
        x, weight, bias, options = conv()
        c_in, c_out = widths((8, 12), (3, 5), (8, 2), (1, 12))
        expected = ops.sliced_conv2d_ragged(x, weight, bias, c_in, c_out, **options)
        pairs = torch.stack([c_in, c_out], 1).int()
        assert torch.equal(ops.sliced_conv2d_ragged(x, weight, bias, pairs[:, 0], pairs[:, 1], **options), expected)

    def test_depthwise_widths_differ_per_sample(self):
        x, weight = torch.randn(3, 8, 5, 5), torch.randn(8, 1, 3, 3)
        width = torch.tensor([8, 3, 5])
        y = ops.sliced_conv2d_ragged(x, weight, None, width, width, padding=1, groups=8)
        for n, c in enumerate(width.tolist()):
            close(y[n : n + 1, :c], partial(F.conv2d, padding=1, groups=c), x[n : n + 1, :c], weight[:c])

    def test_gradients_do_not_leave_the_union_of_prefixes(self):
        x, weight, bias, options = conv()
        x, weight, bias = (t.requires_grad_() for t in (x, weight, bias))
        c_in, c_out = widths((4, 6), (2, 8), (4, 6), (1, 0))
        ops.sliced_conv2d_ragged(x, weight, bias, c_in, c_out, **options).square().sum().backward()
        ran = torch.zeros(12, 8, dtype=torch.bool)
        ran[:6, :4] = ran[:8, :2] = True
        assert torch.equal(weight.grad.abs().sum((2, 3)) > 0, ran)
        assert torch.equal(bias.grad != 0, torch.arange(12) < 8)
        for n, i in enumerate([4, 2, 4, 0]):
            assert x.grad[n, :i].any() == (i > 0) and not x.grad[n, i:].any()

    def test_gradients_are_the_same_bits_every_time(self):
        x, weight, bias, options = conv()
        c_in, c_out = widths((4, 6), (2, 8), (4, 6), (8, 12))

        def gradient():
            leaf = weight.clone().requires_grad_()
            ops.sliced_conv2d_ragged(x, leaf, bias, c_in, c_out, **options).square().sum().backward()
            return leaf.grad

        assert torch.equal(gradient(), gradient())

    def test_gradients_of_an_empty_batch_are_zero(self):
        _, weight, bias, options = conv()
        weight.requires_grad_()
        none = torch.empty(0, dtype=torch.int64)
        y = ops.sliced_conv2d_ragged(torch.empty(0, 8, 6, 6), weight, bias, none, none, **options)
        y.sum().backward()
        assert y.shape == (0, 12, 6, 6) and not weight.grad.any()

    def test_double_backward_is_refused(self):
        x, weight, bias, options = conv()
        x.requires_grad_()
        y = ops.sliced_conv2d_ragged(x, weight, bias, *widths(*[(4, 6)] * 4), **options)
        (grad,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="double backward of sliced_conv2d_ragged is not supported"):
            grad.sum().backward()

    @pytest.mark.parametrize("remember", [True, False], ids=["packed", "plain"])
    @pytest.mark.parametrize(
        "change, error, match",
        [
            ({"c_out": (12, 12, 12, 70)}, ValueError, r"c_out\[3\] must be in \[0, 12\], got 70"),
            ({"c_out": (12, -1, 12, 12)}, ValueError, r"c_out\[1\] must be in \[0, 12\], got -1"),
            ({"c_in": (8, 8, 9, 8)}, ValueError, r"c_in\[2\] must be in \[0, 8\], got 9"),
            ({"c_in": (8, 2**40, 8, 8)}, ValueError, r"c_in\[1\] must be in \[0, 8\], got 1099511627776"),
            ({"c_in": (8, 8, 8)}, ValueError, r"c_in must have shape \[4\], got \[3\]"),
            ({"c_out_max": 5}, ValueError, r"c_out\[0\] must be in \[0, 5\], got 12"),
            ({"c_out_max": 13}, ValueError, r"c_out_max must be in \[0, 12\], got 13"),
            ({"width_idx": (0, 1, 2, 0)}, ValueError, r"width_idx\[2\] must be in \[0, 1\], got 2"),
            ({"width_idx": None}, ValueError, "width_idx must be given"),
            ({"scale_table": torch.full((2, 12), NAN)}, ValueError, "scale_table must be finite"),
            ({"scale_table": torch.ones(2, 11)}, ValueError, r"scale_table must be 2-d .* got shape \[2, 11\]"),
            ({"scale_table": torch.ones(3, 12)}, ValueError, "as many rows, got 3 and 2"),
            ({"scale_table": torch.ones(2, 12).double()}, TypeError, "scale_table must be float32"),
            ({"group_mode": "both"}, ValueError, "group_mode"),
            ({"groups": 2, "group_mode": "within_group"}, ValueError, "c_in|weight|x"),
        ],
    )
    def test_bad_widths_name_the_sample(self, change, error, match, remember):
        x, weight, bias, options = conv()
        arguments = {
            "c_in": (8, 8, 8, 8), "c_out": (12, 12, 12, 12), "width_idx": (0, 1, 0, 1),
            "scale_table": torch.ones(2, 12), "shift_table": torch.ones(2, 12), **options, **change,
        }  # fmt: skip
        if "groups" in change:
            arguments["c_in"] = (8, 8, 8, 7)
        for name in ("c_in", "c_out", "width_idx"):
            if arguments[name] is not None:
                arguments[name] = torch.tensor(arguments[name])
        with torch.set_grad_enabled(not remember), pytest.raises(error, match=match):
            ops.sliced_conv2d_ragged(x, weight.requires_grad_(), bias, **arguments)

    def test_pairs_must_fit_the_groups(self):
        x, weight = torch.randn(2, 8, 4, 4), torch.randn(12, 2, 1, 1)
        with pytest.raises(ValueError, match=r"c_in\[1\] must be a multiple of the 2 channels of a group, got 3"):
            ops.sliced_conv2d_ragged(x, weight, None, *widths((4, 6), (3, 6)), groups=4)
        with pytest.raises(ValueError, match=r"c_out\[1\] must be 3 where c_in\[1\] are 2, got 6"):
            ops.sliced_conv2d_ragged(x, weight, None, *widths((4, 6), (2, 6)), groups=4)
        with pytest.raises(ValueError, match=r"multiples of groups = 4, got 6 and 4"):
            ops.sliced_conv2d_ragged(x, weight, None, *widths((4, 4), (6, 4)), groups=4, group_mode="within_group")


class TestPacked:
    def test_one_handle_serves_every_width(self):
        x, weight, bias, options = conv()
        handle = ops.pack_conv_weight(weight, bias)
        for c_in, c_out in ((8, 12), (3, 5), (0, 12), (8, 0)):
            expected = effkern.ops.sliced_conv._sliced_conv2d(
                x[:, :c_in], weight, bias, c_out, [1, 1], [1, 1], [1, 1], 1, "prefix_groups", None, None, "relu", "auto"
            )
            y = ops.sliced_conv2d_packed(x[:, :c_in], handle, 12, 3, c_out, act="relu", **options)
            assert torch.equal(y, expected)
        pairs = widths((8, 12), (3, 5), (0, 12), (8, 0))
        y = ops.sliced_conv2d_ragged_packed(x, handle, 12, 3, *pairs, **options)
        assert torch.equal(y, ops.sliced_conv2d_ragged(x, weight.requires_grad_(), bias, *pairs, **options))

    def test_a_handle_of_another_weight_is_refused(self):
        x, weight, bias, options = conv()
        handle = ops.pack_conv_weight(weight, bias)
        with pytest.raises(ValueError, match="packed for 12 output channels and a 3x3 kernel, got out_channels = 16"):
            ops.sliced_conv2d_packed(x, handle, 16, 3, **options)
        with pytest.raises(ValueError, match="kernel_size = 1x1"):
            ops.sliced_conv2d_packed(x, handle, 12, 1, **options)
        with pytest.raises(ValueError, match="handle"):
            ops.sliced_conv2d_packed(x, handle[:-4].clone(), 12, 3, **options)
        with pytest.raises(TypeError, match="handle must be a 1-d uint8"):
            ops.sliced_conv2d_packed(x, weight, 12, 3, **options)
        corrupt = handle.clone()
        corrupt[20] += 1
        with pytest.raises(ValueError, match="handle"):
            ops.sliced_conv2d_ragged_packed(x, corrupt, 12, 3, *widths(*[(8, 12)] * 4), **options)

    def test_it_has_no_gradient_and_says_so(self):
        x, weight, bias, options = conv()
        y = ops.sliced_conv2d_packed(x.requires_grad_(), ops.pack_conv_weight(weight, bias), 12, 3, **options)
        with pytest.raises(RuntimeError, match="train with sliced_conv2d"):
            y.sum().backward()

    @pytest.mark.parametrize("op", ["conv", "ragged", "linear", "linear_ragged"])
    def test_remembered_packs_follow_every_change_of_the_weight(self, op):
        torch.manual_seed(0)
        matrix, bias = torch.randn(12, 8), torch.randn(12)
        x, pairs = torch.randn(2, 8), widths((8, 12), (3, 5))

        def call():
            if op == "conv":
                return ops.sliced_conv2d(x[:, :5, None, None], matrix[:, :, None, None], bias, 9).flatten(1)
            if op == "ragged":
                return ops.sliced_conv2d_ragged(x[:, :, None, None], matrix[:, :, None, None], bias, *pairs).flatten(1)
            if op == "linear":
                return ops.sliced_linear(x[:, :5], matrix, bias, 9)
            return ops.sliced_linear_ragged(x, matrix, bias, *pairs)

        def expected(x, matrix, bias):
            if "ragged" not in op:
                return F.linear(x[:, :5], matrix[:9, :5], bias[:9])
            first, second = F.linear(x[0], matrix, bias), F.linear(x[1, :3], matrix[:5, :3], bias[:5])
            return torch.stack([first, F.pad(second, (0, 7))])

        for change in (lambda: None, lambda: matrix.mul_(2), lambda: matrix.data.add_(1), lambda: bias.neg_()):
            change()
            for _ in range(2):
                close(call(), expected, x, matrix, bias)


class TestLinear:
    def test_takes_any_leading_dimensions(self):
        weight, bias = torch.randn(6, 8), torch.randn(6)
        for shape in ((), (3,), (2, 3), (2, 0), (0,), (2, 3, 4)):
            x = torch.randn(*shape, 5)
            y = ops.sliced_linear(x, weight, bias, 4, "relu")
            assert y.shape == (*shape, 4)
            close(y, lambda x, weight, bias: F.linear(x, weight[:4, :5], bias[:4]).relu(), x, weight, bias)
        assert ops.sliced_linear(torch.randn(2, 3, 0), weight, bias).shape == (2, 3, 6)

    def test_bad_arguments_are_named(self):
        x, weight = torch.randn(2, 8), torch.randn(6, 8)
        for call, match in (
            (lambda: ops.sliced_linear(torch.randn(2, 9), weight), r"x's features must be in \[0, 8\], got 9"),
            (lambda: ops.sliced_linear(x, weight, None, 7), r"out_features must be in \[0, 6\], got 7"),
            (lambda: ops.sliced_linear(x, weight[0]), "weight must be 2-d"),
            (lambda: ops.sliced_linear(torch.tensor(1.0), weight), "x must have at least one dimension"),
            (lambda: ops.sliced_linear_ragged(x[None], weight, None, *widths((1, 1))), "x must be 2-d"),
        ):
            with pytest.raises(ValueError, match=match):
                call()


def test_the_family_is_complete():
    names = {name for name in OPS if name.startswith("sliced_")}
    assert names == {
        "sliced_chain", "sliced_conv2d", "sliced_conv2d_packed", "sliced_conv2d_ragged",
        "sliced_conv2d_ragged_backward", "sliced_conv2d_ragged_packed", "sliced_dw_pw", "sliced_dw_pw_packed",
        "sliced_linear", "sliced_linear_ragged",
    }  # fmt: skip
    assert {name for name in names if not name.endswith("_backward")} <= set(ops.__all__)
