"""rep_conv2d, its packed form and its handles: against fp64, in every layout, and what is refused."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from effkern.ops import _handle, pack_conv_weight, rep_conv2d, rep_conv2d_packed, sliced_conv2d_packed
from effkern.ops.rep_conv import reference
from effkern.ops.rep_conv.samples import magnitude, samples
from effkern.testing import assert_within, direct_bound, layouts, to_double

ACTS = ("none", "relu", "relu6", "hardswish", "silu")
CONVS = [s.name for s in samples() if not s.name.startswith(("pack", "chain"))]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def find(name, dtype=torch.float32):
    return next(s for s in samples(dtype) if s.name == name)


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("kernel, groups", [(1, 1), (3, 1), (3, 2), (3, 10)])
def test_residual_may_lie_in_any_layout(act, kernel, groups):
    random = torch.Generator().manual_seed(1)
    x = torch.randn(2, 10, 6, 7, generator=random)
    weight = torch.randn(20 if groups < 10 else 10, 10 // groups, kernel, kernel, generator=random)
    residual = 3 * torch.randn(2, weight.size(0), 6, 7, generator=random)
    args = (x, weight, None, (1, 1), (kernel // 2,) * 2, (1, 1), groups, act, residual)
    exact = reference.rep_conv2d(*to_double(args))
    bound = direct_bound(magnitude(*args), exact, torch.float32)
    views = layouts(residual) | {"expanded": residual[:1, :1].expand_as(residual)}
    for x_name, x_view in layouts(x).items():
        for name, view in views.items():
            y = rep_conv2d(x_view, weight, None, 1, kernel // 2, 1, groups, act, view)
            if name == "expanded":
                wide = (*args[:-1], view)
                exact_wide = reference.rep_conv2d(*to_double(wide))
                assert_within(y, exact_wide, direct_bound(magnitude(*wide), exact_wide, torch.float32), x_name + name)
            else:
                assert_within(y, exact, bound, f"{x_name} {name}")


@pytest.mark.parametrize("name", CONVS)
def test_packed_and_plain_are_the_same_bits(name):
    x, weight, bias, *geometry, groups, act, residual, algo = find(name).args
    for w in (weight, weight.to(memory_format=torch.channels_last)):
        expected = find(name).op(x, w, bias, *geometry, groups, act, residual, algo)
        handle = pack_conv_weight(w, bias, groups)
        kernel = tuple(w.shape[2:])
        got = rep_conv2d_packed(x, handle, w.size(0), kernel, *geometry, groups=groups, act=act, residual=residual)
        assert torch.equal(got, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", [s.name for s in samples() if s.name.startswith("pack_")])
def test_handle_has_the_documented_bytes(name, dtype):
    sample = find(name, dtype)
    assert torch.equal(sample.op(*sample.args), sample.reference(*sample.args))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("outs, depth, groups", [(20, 3, 1), (36, 3, 2), (7, 1, 7), (14, 1, 7)])
def test_unpack_inverts_pack(outs, depth, groups, bias):
    weight, b = torch.randn(outs, depth, 3, 2), torch.randn(outs) if bias else None
    got, got_bias = reference.unpack_conv_weight(pack_conv_weight(weight, b, groups), outs, depth, (3, 2), groups)
    assert torch.equal(got, weight)
    assert (got_bias is None) == (b is None) and (b is None or torch.equal(got_bias, b))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("outs, depth, groups", [(20, 3, 1), (36, 9, 2), (64, 300, 1)])
def test_transformed_handle_is_panels_and_their_transforms(outs, depth, groups, bias):
    weight, b = torch.randn(outs, depth, 3, 3), torch.randn(outs) if bias else None
    plain, handle = (pack_conv_weight(weight, b, groups, algo) for algo in ("auto", "winograd"))
    assert handle.numel() == _handle.handle_bytes(outs, depth, 3, 3, groups, bias, True)
    assert torch.equal(handle[64 : plain.numel()], plain[64:])
    expected = reference.pack_conv_weight(weight, b, groups, "winograd")
    assert torch.equal(handle[: plain.numel()], expected[: plain.numel()])
    # Sums of nine terms in fp32: a few roundings of the largest.
    error = handle[plain.numel() :].view(torch.float32) - expected[plain.numel() :].view(torch.float32)
    assert error.abs().max() <= 8 * 2.0**-24 * weight.abs().max() * 9
    got, got_bias = reference.unpack_conv_weight(handle, outs, depth, (3, 3), groups)
    assert torch.equal(got, weight) and (got_bias is None) == (b is None)


@pytest.mark.parametrize("size", [(1, 1), (2, 5), (6, 7), (14, 14), (9, 13), (3, 70)])
@pytest.mark.parametrize("depth, outs, groups", [(8, 20, 1), (36, 16, 2), (300, 8, 1)])
def test_transforms_made_beforehand_change_no_bit(depth, outs, groups, size):
    x, weight, b = torch.randn(3, depth, *size), torch.randn(outs, depth // groups, 3, 3), torch.randn(outs)
    handles = [pack_conv_weight(weight, b, groups, algo) for algo in ("auto", "winograd")]
    assert handles[1].numel() > 4 * handles[0].numel()
    for stride, dilation, algo in ((1, 1, "auto"), (1, 1, "direct"), (2, 1, "auto"), (1, 2, "auto")):
        expected, got = (
            rep_conv2d_packed(x, h, outs, 3, stride, dilation, dilation, groups, algo=algo) for h in handles
        )
        assert torch.equal(got, expected)


@pytest.mark.parametrize("group_mode", ["within_group", "prefix_groups"])
def test_slices_of_a_transformed_handle_change_no_bit(group_mode):
    weight = torch.randn(48, 16, 3, 3)
    handles = [pack_conv_weight(weight, None, 2, algo) for algo in ("auto", "winograd")]
    for c_in, c_out in ((32, 48), (16, 24)):
        x = torch.randn(1, c_in, 14, 14)
        expected, got = (sliced_conv2d_packed(x, h, 48, 3, c_out, 1, 1, 1, 2, group_mode) for h in handles)
        assert torch.equal(got, expected)


def test_weights_without_transforms_are_packed_plainly():
    for shape, groups in (((8, 8, 1, 1), 1), ((8, 8, 5, 5), 1), ((8, 1, 3, 3), 8)):
        weight = torch.randn(shape)
        plain = pack_conv_weight(weight, None, groups)
        assert torch.equal(pack_conv_weight(weight, None, groups, "winograd"), plain)
        assert torch.equal(reference.pack_conv_weight(weight, None, groups, "winograd"), plain)


@pytest.mark.parametrize("checked_by", ["kernel", "reference"])
def test_broken_transformed_handles_are_refused(checked_by):
    good = pack_conv_weight(W, torch.zeros(8), 2, "winograd")
    function = rep_conv2d_packed if checked_by == "kernel" else reference.rep_conv2d_packed
    # Transforms claimed but missing, there but not claimed, and claimed for a kernel that has none.
    plain = pack_conv_weight(W, torch.zeros(8), 2)
    panels = torch.cat([_handle._header(2, False, 8, 3, 5, 5, 2), torch.zeros(2 * 61 * 3 * 64, dtype=torch.uint8)])
    for forged, kernel in (
        (torch.cat([good[:64], plain[64:]]), 3),
        (torch.cat([plain[:64], good[64:]]), 3),
        (good[:-64], 3),
        (panels, 5),
    ):
        with pytest.raises(ValueError, match=r"handle .*(bytes|truncated|kind of pack)"):
            function(X, forged, 8, (kernel, kernel), (1, 1), (1, 1), (1, 1), 2)


@pytest.mark.parametrize("pad", [0, 1])
def test_nan_reaches_only_its_receptive_field(pad):
    x = torch.randn(2, 4, 8, 8)
    x[0, 1, 3, 4] = float("nan")
    y = rep_conv2d(x, torch.randn(18, 4, 3, 3), padding=pad, act="relu", algo="direct")
    hit = y.isnan()
    assert hit[0, :, 1 + pad : 4 + pad, 2 + pad : 5 + pad].all()
    assert int(hit.sum()) == 18 * 9


@pytest.mark.parametrize("stride, residual", [(1, False), (1, True), (2, False)])
def test_depthwise_batches_past_the_caches_have_the_bits_of_their_samples(stride, residual):
    # 24 MiB and more of input and output are written past the caches, a sample alone is not.
    random = torch.Generator().manual_seed(2)
    x = torch.randn(6, 32, 112 * stride, 112 * stride, generator=random).to(memory_format=torch.channels_last)
    weight, bias = torch.randn(32, 1, 3, 3, generator=random), torch.randn(32, generator=random)
    added = torch.randn(6, 32, 112, 112, generator=random).to(memory_format=torch.channels_last) if residual else None
    y = rep_conv2d(x, weight, bias, stride, 1, 1, 32, "relu6", added)
    for i in range(len(x)):
        one = None if added is None else added[i : i + 1]
        assert torch.equal(y[i : i + 1], rep_conv2d(x[i : i + 1], weight, bias, stride, 1, 1, 32, "relu6", one))


def test_output_is_guarded():
    """Nothing is written outside the output, whatever its tails: neighbours in memory keep their value."""
    for channels in (1, 15, 16, 17, 33):
        for width in (1, 5, 6, 7, 13):
            x, weight = torch.randn(1, 3, 2, width), torch.randn(channels, 3, 1, 1)
            wide = torch.full((1, channels + 2, 2, width), 42.0)
            wide[:, 1:-1] = torch.randn(1, channels, 2, width)
            kept = wide.clone()
            rep_conv2d(x, weight, residual=wide[:, 1:-1])
            assert torch.equal(wide, kept)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_random_calls_agree_with_the_oracle(data):
    draw = data.draw
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    depth, per_group = draw(st.integers(1, 24)), draw(st.integers(1, 24))
    kernel = [draw(st.integers(1, 4)) for _ in range(2)]
    stride = [draw(st.integers(1, 3)) for _ in range(2)]
    padding = [draw(st.integers(0, 2)) for _ in range(2)]
    dilation = [draw(st.integers(1, 2)) for _ in range(2)]
    size = [draw(st.integers(1, 14)) for _ in range(2)]
    dtype = draw(st.sampled_from(DTYPES))
    act = draw(st.sampled_from(ACTS))
    torch.manual_seed(draw(st.integers(0, 99)))
    x = torch.randn(draw(st.integers(0, 3)), depth * groups, *size).to(dtype)
    x = draw(st.sampled_from(list(layouts(x).values())))
    weight = torch.randn(per_group * groups, depth, *kernel).to(dtype)
    bias = torch.randn(weight.size(0)) if draw(st.booleans()) else None
    rows, columns = reference.output_map(size, kernel, stride, padding, dilation)
    if rows < 1 or columns < 1:
        with pytest.raises(ValueError, match="smaller than the kernel"):
            rep_conv2d(x, weight, bias, stride, padding, dilation, groups, act)
        return
    residual = torch.randn(x.size(0), weight.size(0), rows, columns).to(dtype) if draw(st.booleans()) else None
    args = (x, weight, bias, stride, padding, dilation, groups, act, residual)
    exact = reference.rep_conv2d(*to_double(args))
    bound = direct_bound(magnitude(*args), exact, dtype)
    y = rep_conv2d(*args)
    assert y.dtype == dtype
    assert_within(y, exact, bound)
    handle = pack_conv_weight(weight, bias, groups)
    packed = rep_conv2d_packed(x, handle, weight.size(0), kernel, stride, padding, dilation, groups, act, residual)
    assert torch.equal(packed, y)


X, W = torch.zeros(2, 6, 5, 5), torch.zeros(8, 3, 3, 3)
BAD = {
    "x of 3 dims": (ValueError, "x", lambda: rep_conv2d(X[0], W, groups=2)),
    "integer x": (TypeError, "x", lambda: rep_conv2d(X.int(), W, groups=2)),
    "double x": (TypeError, "x", lambda: rep_conv2d(X.double(), W.double(), groups=2)),
    "other weight dtype": (TypeError, "weight", lambda: rep_conv2d(X, W.half(), groups=2)),
    "weight of 3 dims": (ValueError, "weight", lambda: rep_conv2d(X, W[0], groups=2)),
    "groups do not divide": (ValueError, "groups", lambda: rep_conv2d(X, W, groups=3)),
    "no groups": (ValueError, "groups", lambda: rep_conv2d(X, W, groups=0)),
    "channels": (ValueError, "x must have .*6|x must have .*3", lambda: rep_conv2d(X, W)),
    "bias length": (ValueError, "bias", lambda: rep_conv2d(X, W, torch.zeros(7), groups=2)),
    "bias dtype": (TypeError, "bias", lambda: rep_conv2d(X, W, torch.zeros(8).half(), groups=2)),
    "stride 0": (ValueError, "stride", lambda: rep_conv2d(X, W, stride=0, groups=2)),
    "negative padding": (ValueError, "padding", lambda: rep_conv2d(X, W, padding=-1, groups=2)),
    "dilation 0": (ValueError, "dilation", lambda: rep_conv2d(X, W, dilation=0, groups=2)),
    "3 strides": (ValueError, "stride", lambda: rep_conv2d(X, W, stride=(1, 1, 1), groups=2)),
    "kernel does not fit": (ValueError, "kernel", lambda: rep_conv2d(X, W, dilation=3, groups=2)),
    "unknown act": (ValueError, "act", lambda: rep_conv2d(X, W, groups=2, act="gelu")),
    "unknown algo": (ValueError, "algo", lambda: rep_conv2d(X, W, groups=2, algo="fft")),
    "residual shape": (ValueError, "residual", lambda: rep_conv2d(X, W, groups=2, residual=torch.zeros(2, 8, 5, 5))),
    "residual dims": (ValueError, "residual", lambda: rep_conv2d(X, W, groups=2, residual=torch.zeros(8))),
    "residual dtype": (
        TypeError, "residual", lambda: rep_conv2d(X, W, groups=2, residual=torch.zeros(2, 8, 3, 3).half())
    ),
    "huge padding": (ValueError, "padding", lambda: rep_conv2d(X, W, padding=2**40, groups=2)),
    "pack 3 dims": (ValueError, "weight", lambda: pack_conv_weight(W[0])),
    "pack integers": (TypeError, "weight", lambda: pack_conv_weight(W.int())),
    "pack groups": (ValueError, "groups", lambda: pack_conv_weight(W, groups=3)),
    "pack bias": (ValueError, "bias", lambda: pack_conv_weight(W, torch.zeros(3))),
    "pack handle": (ValueError, "weight", lambda: pack_conv_weight(pack_conv_weight(W))),
    "handle dtype": (TypeError, "handle", lambda: rep_conv2d_packed(X, W, 8, 3, groups=2)),
    "handle as weight": (ValueError, "weight", lambda: rep_conv2d(X, pack_conv_weight(W, groups=2), groups=2)),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("grad", [False, True])
def test_bad_arguments_are_named(case, grad):
    kind, match, call = BAD[case]
    with torch.set_grad_enabled(grad), pytest.raises(kind, match=match):
        call()


def packed_call(handle, out_channels=8, kernel=3, groups=2):
    return rep_conv2d_packed(X, handle, out_channels, kernel, padding=1, groups=groups)


def flipped(handle, byte):
    handle = handle.clone()
    handle[byte] ^= 1
    return handle


@pytest.mark.parametrize("checked_by", ["kernel", "reference"])
def test_broken_handles_are_refused(checked_by, monkeypatch):
    if checked_by == "reference":
        monkeypatch.setattr("effkern.ops.rep_conv._packed_op", reference.rep_conv2d_packed)
    good = pack_conv_weight(W, torch.zeros(8), 2)
    packed_call(good)
    for length in (0, 1, 63, 64, good.numel() - 4, good.numel() - 1):
        with pytest.raises(ValueError, match=r"handle .*(shorter|truncated)"):
            packed_call(good[:length])
    with pytest.raises(ValueError, match="truncated"):
        packed_call(torch.cat([good, good[:4]]))
    for byte in range(64):  # whichever byte of the header is hit
        with pytest.raises(ValueError, match=r"magic|version|checksum"):
            packed_call(flipped(good, byte))
    with pytest.raises(ValueError, match="packed for 8 output channels"):
        packed_call(good, out_channels=16)
    with pytest.raises(ValueError, match="3x3 kernel"):
        packed_call(good, kernel=5)
    with pytest.raises(ValueError, match="groups = 2, got 1"):
        packed_call(good, groups=1)
    with pytest.raises(ValueError, match="6 channels"):
        rep_conv2d_packed(X[:, :4], good, 8, 3, groups=2)


def test_forged_header_cannot_reach_outside_the_handle():
    """Dimensions whose product overflows 64 bits, with the checksum made to fit."""
    forged = _handle._header(0, False, 2**30, 2**30, 2**10, 2**10, 1)
    with pytest.raises((RuntimeError, ValueError), match=r"handle .*(size|bytes)"):
        torch.ops.effkern.rep_conv2d_packed(
            X, forged, 2**30, [2**10] * 2, [1, 1], [0, 0], [1, 1], 1, "relu", None, "auto"
        )  # fmt: skip


@pytest.mark.parametrize("checked_by", ["kernel", "reference"])
def test_forged_kind_of_pack_is_refused(checked_by):
    """A depthwise pack is shorter than the panels that these dimensions would be read as."""
    forged = torch.cat([_handle._header(1, False, 512, 64, 1, 1, 1), torch.zeros(4, dtype=torch.uint8)])
    args = (torch.randn(1, 64, 2, 2), forged, 512, [1, 1], [1, 1], [0, 0], [1, 1], 1, "relu", None, "auto")
    function = torch.ops.effkern.rep_conv2d_packed if checked_by == "kernel" else reference.rep_conv2d_packed
    with pytest.raises((RuntimeError, ValueError), match="kind of pack"):
        function(*args)


def test_sizes_that_no_memory_could_hold_are_refused():
    """Strides of 0 make them cheap to ask for, and their sizes in bytes wrap around to small numbers."""
    point = torch.zeros(1, 1, 1, 1)
    vast = point.expand(1, 1, 2**29, 2**29)
    with pytest.raises(ValueError, match="weight must be smaller"):
        pack_conv_weight(vast)
    with pytest.raises(ValueError, match="weight must be smaller"):
        rep_conv2d(point, vast, padding=2**28)
    with pytest.raises(ValueError, match="weight must be smaller"):
        rep_conv2d(point[:, :0], torch.zeros(16, 0, 1, 1).expand(16, 0, 2**29, 2**29), padding=2**28)
    with pytest.raises(MemoryError):  # more taps than a table could list
        rep_conv2d(point[:, :0], torch.zeros(1, 0, 1, 1).expand(1, 0, 2**26, 2**26), padding=2**25 + 1000)
    wide = point.half().expand(1, 2, 1, 2**61)
    with pytest.raises(ValueError, match=r"x must have dimensions below 2\^31"):
        rep_conv2d(wide, torch.zeros(1, 2, 1, 1).half(), stride=(1, 2**31 - 1))
    with pytest.raises(ValueError, match=r"groups .* below 2\^31"):
        rep_conv2d(point[:, :0], torch.zeros(0, 2**24, 1, 1), groups=2**40)


def test_storage_that_was_given_back_is_refused():
    for position in range(3):
        args = [torch.randn(1, 2, 3, 3), torch.randn(4, 2, 1, 1), torch.randn(4)]
        args[position].untyped_storage().resize_(0)
        with torch.no_grad(), pytest.raises((ValueError, RuntimeError), match=r"memory|null|not allocated"):
            rep_conv2d(*args)
        with pytest.raises(RuntimeError, match="must have memory"):
            torch.ops.effkern.rep_conv2d(*args, [1, 1], [0, 0], [1, 1], 1, "relu", None, "auto")


@pytest.mark.parametrize("which", [0, 1])
def test_forward_mode_is_refused_and_never_called_zero(which):
    tensors = [torch.randn(1, 2, 3, 3), torch.randn(4, 2, 1, 1)]

    def conv(value):
        return rep_conv2d(*(value if i == which else t for i, t in enumerate(tensors)))

    rep_conv2d(*tensors)  # a pack of the weight is at hand
    with pytest.raises(NotImplementedError, match="rep_conv2d: forward-mode"):
        torch.func.jvp(conv, (tensors[which],), (torch.ones_like(tensors[which]),))
    with torch.autograd.forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward-mode"):
        handle = pack_conv_weight(tensors[1])  # calls without a tangent are none of our business
        rep_conv2d_packed(tensors[0], handle, 4, 1)
        conv(torch.autograd.forward_ad.make_dual(tensors[which], torch.ones_like(tensors[which])))


def test_strided_or_unaligned_handles_are_refused_or_right():
    good = pack_conv_weight(W, None, 2)
    shifted = torch.cat([good[:1], good])[1:]
    spread = torch.zeros(good.numel(), 2, dtype=torch.uint8)
    spread[:, 0] = good
    for handle in (shifted, spread[:, 0]):
        try:
            assert torch.equal(packed_call(handle), packed_call(good))
        except ValueError as error:
            assert "handle" in str(error)


def test_meta_and_fake_checks_need_no_data():
    x, w = X.to("meta"), W.to("meta")
    assert rep_conv2d(x, w, groups=2).shape == (2, 8, 3, 3)
    handle = pack_conv_weight(w, groups=2)
    assert handle.shape == pack_conv_weight(W, groups=2).shape
    assert rep_conv2d_packed(x, handle, 8, 3, groups=2).shape == (2, 8, 3, 3)
    with pytest.raises(ValueError, match="handle must have"):
        rep_conv2d_packed(x, handle[:-1], 8, 3, groups=2)
    with pytest.raises(ValueError, match="x must have"):
        rep_conv2d(x, w)


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
def test_first_and_second_gradients_match_fp64(act, packed):
    random = torch.Generator().manual_seed(2)
    x, w = torch.randn(2, 4, 6, 5, generator=random), torch.randn(6, 2, 3, 3, generator=random)
    b, r = torch.randn(6, generator=random), torch.randn(2, 6, 6, 5, generator=random)
    geometry = ((1, 1), (1, 1), (1, 1), 2, act)

    def gradients(function, tensors, wanted):
        leaves = [t.clone().requires_grad_(i in wanted) for i, t in enumerate(tensors)]
        used = [leaves[i] for i in wanted]
        y = function(*leaves)
        first = torch.autograd.grad(y.sum(), used, create_graph=True)  # a gradient of stride 0
        penalty = sum((g.square() * torch.arange(g.numel()).view_as(g)).sum() for g in first)
        second = torch.autograd.grad(penalty, used, allow_unused=True) if penalty.requires_grad else ()
        return [*first, *(torch.zeros_like(u) if g is None else g for g, u in zip(second, used, strict=False))]

    def plain(x, w, b, r):
        return rep_conv2d(x, w, b, 1, 1, 1, 2, act, r)

    def with_handle(x, w, b, r):
        return rep_conv2d_packed(x, pack_conv_weight(w, b, 2), 6, 3, 1, 1, 1, 2, act, r)

    wanted = (0, 3) if packed else (0, 1, 2, 3)
    got = gradients(with_handle if packed else plain, (x, w, b, r), wanted)
    exact = gradients(
        lambda x, w, b, r: reference.rep_conv2d(x, w, b, *geometry, r), [t.double() for t in (x, w, b, r)], wanted
    )
    assert len(got) == len(exact)
    for a, e in zip(got, exact, strict=True):
        # sums of at most 2 * 6 * 30 products in fp32, each of size up to the largest gradient
        assert (a - e).detach().abs().max() <= 1e-5 * max(1.0, float(e.detach().abs().max()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_gradients_in_half_precision(dtype):
    x, w = torch.randn(2, 3, 6, 6).to(dtype), torch.randn(5, 3, 3, 3).to(dtype)
    leaves = [x.requires_grad_(), w.requires_grad_()]
    rep_conv2d(*leaves, padding=1, act="silu").sum().backward()
    doubles = [t.detach().double().requires_grad_() for t in leaves]
    reference.rep_conv2d(*doubles, padding=(1, 1), act="silu").sum().backward()
    for leaf, exact in zip(leaves, doubles, strict=True):
        assert leaf.grad.dtype == dtype
        assert (leaf.grad - exact.grad).abs().max() <= 2 * torch.finfo(dtype).eps * exact.grad.abs().max()


def test_pack_drops_the_gradient_and_says_so():
    weight = torch.randn(4, 2, 3, 3, requires_grad=True)
    assert not pack_conv_weight(weight).requires_grad
    assert "Not differentiable" in pack_conv_weight.__doc__


def test_autocast_casts_x_weight_and_residual():
    x, w, r = torch.randn(2, 3, 6, 6), torch.randn(5, 3, 3, 3), torch.randn(2, 5, 4, 4)
    b = torch.randn(5)
    with torch.autocast("cpu", torch.bfloat16):
        got = rep_conv2d(x, w, b, residual=r)
        with torch.no_grad():
            assert torch.equal(rep_conv2d(x, w, b, residual=r), got)
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, rep_conv2d(x.bfloat16(), w.bfloat16(), b, residual=r.bfloat16()))


@pytest.mark.parametrize("value", [1.5, None, "same", torch.tensor(1)], ids=str)
def test_a_geometry_of_another_type_is_named(value):
    with pytest.raises(TypeError, match="stride must be an int or 2 ints"):
        rep_conv2d(torch.ones(1, 1, 3, 3), torch.ones(1, 1, 1, 1), stride=value)
