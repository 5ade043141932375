"""multi_branch_bn_add_relu: against torch and fp64, its gradient, statistics, layouts, and what is refused."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from effkern.ops import multi_branch_bn_add_relu
from effkern.ops.multi_branch_bn import _backward_op, _op, reference
from effkern.ops.multi_branch_bn.samples import samples
from effkern.testing import assert_within, layouts, map_tensors, to_double
from tests.ops.catalog import check_values, same_bits

SAMPLES = [s.name for s in samples()]
TRAINED = [s.name for s in samples() if s.args[5] and s.args[0][0].numel()]
EVAL = [s.name for s in samples() if not s.args[5] and s.args[0][0].numel()]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def find(name, dtype=torch.float32):
    return next(s for s in samples(dtype) if s.name == name)


def leaves(args):
    return tuple(map_tensors(lambda t: t.detach().clone().requires_grad_(), list(v)) for v in args[:3])


def eager(xs, weight, bias, mean, var, training, momentum, eps, relu):
    """What users write: mean and var are changed in place."""
    z = 0
    for i, x in enumerate(xs):
        running = (mean[i], var[i]) if mean else (None, None)
        z = z + F.batch_norm(x, *running, weight[i], bias[i], training, momentum, eps)
    return F.relu(z) if relu else z


@pytest.mark.parametrize("name", SAMPLES)
def test_is_what_torch_computes(name):
    args = find(name).args
    mean, var = ([t.clone() for t in args[i]] for i in (3, 4))
    expected = eager(*args[:3], mean, var, *args[5:])
    y, _, _, new_mean, new_var = multi_branch_bn_add_relu(*args)
    torch.testing.assert_close(y, expected, atol=1e-5, rtol=1e-5)
    if args[5] and mean:
        torch.testing.assert_close(new_mean, torch.stack(mean), atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(new_var, torch.stack(var), atol=1e-6, rtol=1e-5)
    else:
        assert new_mean.shape == new_var.shape == (0, args[0][0].size(1))


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=60)
@given(data=st.data())
def test_random_shapes_and_layouts(dtype, data):
    draw = data.draw
    shape = [draw(st.integers(1, 4)), draw(st.integers(1, 70)), draw(st.integers(1, 20)), draw(st.integers(1, 20))]
    count, training = draw(st.integers(1, 4)), draw(st.booleans())
    shape[0] += training and shape[0] * shape[2] * shape[3] == 1
    torch.manual_seed(draw(st.integers(0, 2**16)))
    xs = [torch.randn(shape).to(dtype) for _ in range(count)]
    xs = [
        layouts(x)[draw(st.sampled_from(("contiguous", "channels_last", "channel_slice", "spatial_slice")))] for x in xs
    ]
    vectors = [[torch.rand(shape[1]) + 0.5 for _ in range(count)] for _ in range(4)]
    args = (xs, *vectors, training, 0.3, 1e-3, draw(st.booleans()))
    sample = find("repvgg", dtype)
    outputs = _op(*args)
    check_values(sample, args, outputs, str(shape))
    assert [y.stride() for y in outputs] == [y.stride() for y in _op.fake(*args)]


@pytest.mark.parametrize("name", ["repvgg", "eval_channels_last", "mixed_layouts", "long_plane"])
def test_each_branch_may_lie_in_any_layout(name):
    args = find(name).args
    exact = multi_branch_bn_add_relu(*args)
    for i, x in enumerate(args[0]):
        for layout, view in layouts(x).items():
            outputs = _op([*args[0][:i], view, *args[0][i + 1 :]], *args[1:])
            fakes = _op.fake([*args[0][:i], view, *args[0][i + 1 :]], *args[1:])
            for y, fake, first in zip(outputs, fakes, exact, strict=True):
                assert y.stride() == fake.stride(), f"branch {i} {layout}"
                torch.testing.assert_close(y, first, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("offset", [0.0, 1e4, -3e5])
@pytest.mark.parametrize("last", [False, True])
def test_statistics_of_large_means(offset, last):
    x = torch.randn(8, 6, 40, 41) + offset
    x[0, 0, 0, 0] += 100  # the first element, about which a sum might be taken, is far from the others
    x[:, 1] += torch.linspace(0, 50, 8)[:, None, None]  # and no tile has the mean of the whole
    x = x.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
    one = [torch.ones(6)]
    y, mean, invstd, _, _ = multi_branch_bn_add_relu([x], one, one, relu=False)
    exact, mean64, invstd64, _, _ = reference.multi_branch_bn_add_relu(
        [x.double()], *[[torch.ones(6).double()]] * 2, relu=False
    )
    assert ((mean - mean64).abs() * invstd64).max() < 1e-6
    assert (invstd / invstd64 - 1).abs().max() < 1e-6
    # Also the output has no trace of the offset: what the fp32 mean lost is in the shift.
    assert_within(y, exact, 16 * 2.0**-24 * (2 + exact.abs()), f"offset {offset}")


# Not the largest one: a sum within rounding of 0 may fall on the other side in fp64, which is another gradient.
@pytest.mark.parametrize("name", [name for name in TRAINED + EVAL if name != "plane_of_most_of_a_tile"])
def test_gradients_of_16_bit_storage(name):
    for dtype in DTYPES[1:]:
        args = find(name, dtype).args
        ours, exact = leaves(args), leaves(to_double(args))
        y = multi_branch_bn_add_relu(*ours, *args[3:])[0]
        y64 = reference.multi_branch_bn_add_relu(*exact, *to_double(args)[3:])[0]
        grad = torch.randn(y.shape).to(dtype)
        y.backward(grad)
        y64.backward(grad.double())
        for a, b in zip((t for v in ours for t in v), (t for v in exact for t in v), strict=True):
            assert a.grad.dtype == a.dtype
            size = b.grad.abs().max() + 1e-2
            assert_within(
                a.grad,
                b.grad,
                torch.full_like(b.grad, float(size)) * 2 * (2.0**-8 if dtype == DTYPES[1] else 2.0**-11),
                name,
            )


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("relu", [False, True])
def test_gradcheck_of_the_reference(training, relu):
    xs = [torch.randn(3, 2, 2, 2, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    vectors = [[torch.rand(2, dtype=torch.float64) + 0.5 for _ in range(2)] for _ in range(4)]
    for v in vectors[0] + vectors[1]:
        v.requires_grad_()

    def call(a, b, *rest):
        return reference.multi_branch_bn_add_relu([a, b], rest[:2], rest[2:], *vectors[2:], training, 0.1, 1e-2, relu)[
            0
        ]

    torch.autograd.gradcheck(call, (*xs, *vectors[0], *vectors[1]))


@pytest.mark.parametrize("name", TRAINED + EVAL)
def test_the_backward_reference_is_the_derivative(name):
    """The formula that serves where no native kernel is loaded, in fp64."""
    args = to_double(find(name).args)
    inputs = leaves(args)
    y, mean, invstd, _, _ = reference.multi_branch_bn_add_relu(*inputs, *args[3:])
    grad = torch.randn_like(y)
    flat = [t for v in inputs for t in v]
    want = torch.autograd.grad(y, flat, grad)
    count = len(args[0])
    dxs, dweight, dbias = reference.multi_branch_bn_add_relu_backward(
        grad, *args[:3], mean, invstd, args[5], args[8], [True] * count
    )
    got = [*dxs, *dweight, *[dbias] * count]
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("name", ["repvgg", "repvgg_channels_last", "repvgg_eval", "mixed_layouts"])
def test_backward_operator(name):
    args = find(name).args
    y, mean, invstd, _, _ = _op(*args)
    grad = torch.randn(y.shape)
    count = len(args[0])
    for needs in ([True] * count, [False, True, False][:count], [False] * count):
        call = (grad, *args[:3], mean, invstd, args[5], args[8], needs)
        torch.library.opcheck(torch.ops.effkern.multi_branch_bn_add_relu_backward.default, call)
        dxs, dweight, dbias = _backward_op(*call)
        want, weight64, bias64 = reference.multi_branch_bn_add_relu_backward(*to_double(call))
        fakes = _backward_op.fake(*call)
        for dx, need, exact, fake in zip(dxs, needs, want, fakes[0], strict=True):
            assert dx.shape == (y.shape if need else (0,)) and dx.stride() == fake.stride()
            torch.testing.assert_close(dx.double(), exact, atol=2e-6, rtol=1e-5)
        torch.testing.assert_close(dweight.double(), weight64, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(dbias.double(), bias64, atol=1e-5, rtol=1e-5)
        low = (grad[:, :-1], *call[1:]), (grad, *call[1:4], mean.float(), *call[5:]), (*call[:-1], needs[:-1])
        for bad in (*low, (*call[:4], mean[:-1], *call[5:]), (grad.double(), *call[1:])):
            with pytest.raises((ValueError, TypeError)):
                _backward_op(*bad)
            with pytest.raises((ValueError, TypeError)):
                _backward_op.fake(*bad)


@pytest.mark.parametrize("which", [0, 1, 2])
def test_only_what_needs_a_gradient_gets_one(which):
    args = find("repvgg").args
    for i in range(3):
        inputs = [[t.clone() for t in v] for v in args[:3]]
        inputs[which][i].requires_grad_()
        everything = leaves(args)
        grad = torch.randn(args[0][0].shape)
        multi_branch_bn_add_relu(*inputs, *args[3:])[0].backward(grad)
        multi_branch_bn_add_relu(*everything, *args[3:])[0].backward(grad)
        assert same_bits(inputs[which][i].grad, everything[which][i].grad)


@pytest.mark.parametrize("name", ["repvgg", "many_tiles", "long_plane", "repvgg_eval"])
def test_gradients_do_not_depend_on_the_threads(name):
    args = find(name).args
    grad, results = torch.randn(args[0][0].shape), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        inputs = leaves(args)
        multi_branch_bn_add_relu(*inputs, *args[3:])[0].backward(grad)
        results.append([t.grad for v in inputs for t in v])
    for other in results[1:]:
        assert all(same_bits(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("name", EVAL)
def test_in_eval_mode_a_sample_does_not_depend_on_its_neighbours(name):
    args = find(name).args
    n = args[0][0].size(0)
    together = multi_branch_bn_add_relu(*args)[0]
    for rows in ([n - 1], list(reversed(range(n))), [0, n - 1, *range(n)]):
        chosen = torch.tensor(rows)
        y = multi_branch_bn_add_relu([x.index_select(0, chosen) for x in args[0]], *args[1:])[0]
        assert same_bits(y, together.index_select(0, chosen)), rows


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("channels", [16, 20])
def test_outputs_too_large_for_the_caches_have_the_bits_of_small_ones(channels, last):
    # Calls on 16 MiB or more store past the caches: at whole cache lines (16 channels) in place, else through a buffer.
    torch.manual_seed(0)
    form = torch.channels_last if last else torch.contiguous_format
    x, grad = (torch.randn(4, channels, 196, 196).contiguous(memory_format=form) for _ in range(2))
    vectors = [[torch.rand(channels) + 0.5] for _ in range(4)]
    y = multi_branch_bn_add_relu([x], *vectors, training=False)[0]
    assert 2 * y.numel() >= 1 << 22 > 2 * y[:1].numel()
    for i in range(4):
        assert same_bits(y[i : i + 1], multi_branch_bn_add_relu([x[i : i + 1]], *vectors, training=False)[0])
    part = [t[:1].clone(memory_format=form) for t in (x, grad)]
    xs = [part[0], *(torch.randn_like(part[0]) for _ in range(2))]
    weight, bias = ([torch.rand(channels) + 0.5 for _ in xs] for _ in range(2))
    _, mean, invstd, _, _ = multi_branch_bn_add_relu(xs, weight, bias)
    call = (part[1], xs, weight, bias, mean, invstd)
    for training in (True, False):
        together = _backward_op(*call, training, True, [True] * 3)[0]
        assert 7 * together[0].numel() >= 1 << 22 > 5 * together[0].numel()
        for i, dx in enumerate(together):
            assert same_bits(dx, _backward_op(*call, training, True, [i == j for j in range(3)])[0][i])


@pytest.mark.parametrize("name", TRAINED + EVAL)
def test_a_recorded_call_has_the_gradient_of_the_operator(name):
    args = find(name).args
    grad = torch.randn(args[0][0].shape)
    ours, theirs = leaves(args), leaves(args)
    multi_branch_bn_add_relu(*ours, *args[3:])[0].backward(grad)
    torch.ops.effkern.multi_branch_bn_add_relu(*theirs, *args[3:])[0].backward(grad)
    for a, b in zip([t for v in ours for t in v], [t for v in theirs for t in v], strict=True):
        assert same_bits(a.grad, b.grad) and a.grad.stride() == b.grad.stride()


def test_gradients_of_biases_share_no_memory():
    args = find("repvgg").args
    inputs = leaves(args)
    multi_branch_bn_add_relu(*inputs, *args[3:])[0].sum().backward()
    first, second, _ = (bias.grad for bias in inputs[2])
    kept = second.clone()
    first.add_(1)
    assert same_bits(second, kept)


def test_statistics_are_not_differentiable_and_double_backward_says_so():
    args = find("repvgg").args
    inputs = leaves(args)
    y, *rest = multi_branch_bn_add_relu(*inputs, *args[3:])
    assert y.requires_grad and not any(t.requires_grad for t in rest)
    (first,) = torch.autograd.grad(y.square().sum(), inputs[0][0], create_graph=True)
    with pytest.raises(RuntimeError, match="double backward of multi_branch_bn_add_relu is not supported"):
        first.sum().backward()


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("last", [False, True])
def test_nan_passes_as_in_torch(training, last):
    xs = [torch.randn(2, 17, 5, 5) for _ in range(2)]
    xs[1][1, 3, 2, 2] = float("nan")
    xs = [x.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format) for x in xs]
    args = (xs, *[[torch.rand(17) + 0.5 for _ in range(2)] for _ in range(4)], training, 0.1, 1e-5, True)
    expected = eager(*args[:3], *[[t.clone() for t in args[i]] for i in (3, 4)], *args[5:])
    ours, theirs = leaves(args), leaves(args)
    y = multi_branch_bn_add_relu(*ours, *args[3:])[0]
    assert torch.equal(y.isnan(), expected.isnan()) and bool(y.isnan().any())
    grad = torch.randn(y.shape)
    y.backward(grad)
    eager(*theirs, *[[t.clone() for t in args[i]] for i in (3, 4)], *args[5:]).backward(grad)
    for a, b in zip((t for v in ours for t in v), (t for v in theirs for t in v), strict=True):
        torch.testing.assert_close(a.grad, b.grad, equal_nan=True, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 3, 0, 4)])
def test_an_empty_batch_is_what_it_is_in_torch(shape):
    x = torch.randn(shape, requires_grad=True)
    weight, bias = torch.ones(3, requires_grad=True), torch.zeros(3, requires_grad=True)
    mean, var = torch.randn(3), torch.rand(3)
    y, _, _, new_mean, new_var = multi_branch_bn_add_relu([x], [weight], [bias], [mean], [var])
    assert y.shape == shape and torch.equal(new_mean[0], mean) and torch.equal(new_var[0], var)
    y.sum().backward()
    assert x.grad.shape == shape and not weight.grad.any() and not bias.grad.any()


def test_a_single_value_a_channel_is_refused_in_training():
    one = [torch.ones(3)]
    with pytest.raises(ValueError, match="more than one value per channel when training"):
        multi_branch_bn_add_relu([torch.ones(1, 3, 1, 1)], one, one)
    y = multi_branch_bn_add_relu([torch.ones(1, 3, 1, 1)], one, one, one, one, training=False)[0]
    assert torch.equal(y, torch.ones(1, 3, 1, 1))


ONE = torch.ones(4)
X = torch.ones(2, 4, 3, 3)
WRONG = {
    "xs must have 1 to 4 branches": [dict(xs=[]), dict(xs=[X] * 5)],
    "xs must have one shape": [dict(xs=[X, X[:1]]), dict(xs=[X, X[:, :, 1:]])],
    "xs must be 4-d": [dict(xs=[X, X[0]])],
    "weight must have one tensor a branch": [dict(weight=[ONE]), dict(weight=[ONE] * 3)],
    "bias must have one tensor a branch": [dict(bias=[])],
    "weight must": [dict(weight=[ONE, ONE[:3]]), dict(weight=[ONE, ONE[None]])],
    "running_mean must": [dict(running_mean=[ONE]), dict(running_mean=[ONE, torch.ones(5)]), dict(running_mean=[])],
    "running_var must": [dict(running_var=[])],
    "running_mean and running_var must be given": [dict(running_mean=[], running_var=[], training=False)],
    "momentum must lie in": [dict(momentum=m) for m in (-0.1, 1.5, float("nan"), float("inf"))],
    "eps must be positive": [dict(eps=e) for e in (0.0, -1.0, float("nan"), float("inf"))],
}


@pytest.mark.parametrize("message, change", [(m, c) for m, changes in WRONG.items() for c in changes])
def test_what_does_not_fit_is_refused(message, change):
    right = dict(xs=[X, X], weight=[ONE] * 2, bias=[ONE] * 2, running_mean=[ONE] * 2, running_var=[ONE] * 2)
    right |= dict(training=True, momentum=0.1, eps=1e-5, relu=True)
    args = {**right, **change}
    with pytest.raises(ValueError, match=f"multi_branch_bn_add_relu: {message}"):
        multi_branch_bn_add_relu(**args)
    with pytest.raises(ValueError, match=f"multi_branch_bn_add_relu: {message}"):
        _op.fake(*args.values())


@pytest.mark.parametrize(
    "change",
    [
        dict(xs=[X, X.bfloat16()]),
        dict(xs=[X.double()] * 2),
        dict(weight=[ONE, ONE.double()]),
        dict(bias=[ONE, ONE.half()]),
    ],
)
def test_other_types_are_refused(change):
    right = dict(xs=[X, X], weight=[ONE] * 2, bias=[ONE] * 2)
    rest = ((), (), True, 0.1, 1e-5, True)
    with pytest.raises(TypeError, match="multi_branch_bn_add_relu: "):
        multi_branch_bn_add_relu(**{**right, **change})
    with pytest.raises(TypeError, match="multi_branch_bn_add_relu: "):
        _op.fake(*{**right, **change}.values(), *rest)


def test_another_device_is_refused():
    vectors = [[ONE], [ONE], [], []]
    for xs, weight in (([X.to("meta"), X], [ONE, ONE]), ([X], [ONE.to("meta")])):
        with pytest.raises(ValueError, match="must be on x's device"):
            _op.fake(xs, weight, [ONE] * len(xs), *vectors[2:], True, 0.1, 1e-5, True)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", ["repvgg_channels_last", "repvgg_eval"])
def test_compiles_to_one_graph_with_its_gradient(name, dynamic):
    args = find(name).args
    torch._dynamo.reset()

    @torch.compile(backend="aot_eager", fullgraph=True, dynamic=dynamic)
    def step(xs, weight, bias):
        return multi_branch_bn_add_relu(xs, weight, bias, *args[3:])

    for repeat in (1, 2):
        inputs, plain = (
            [
                [x.repeat(repeat, 1, 1, 1).detach().requires_grad_() for x in v] if i == 0 else v
                for i, v in enumerate(leaves(args))
            ]
            for _ in range(2)
        )
        got, want = step(*inputs), multi_branch_bn_add_relu(*plain, *args[3:])
        assert all(same_bits(a, b) for a, b in zip(got, want, strict=True))
        got[0].sum().backward()
        want[0].sum().backward()
        assert all(
            same_bits(a.grad, b.grad) for v, w in zip(inputs, plain, strict=True) for a, b in zip(v, w, strict=True)
        )
    torch._dynamo.reset()


def test_exports_with_a_dynamic_batch():
    args = find("repvgg_eval").args

    class Tail(torch.nn.Module):
        def forward(self, a, b, c):
            return multi_branch_bn_add_relu([a, b, c], *args[1:])[0]

    dims = ({0: torch.export.Dim("batch", min=2, max=64)},) * 3
    program = torch.export.export(Tail(), tuple(args[0]), dynamic_shapes=dims, strict=False)
    inputs = tuple(x.repeat(3, 1, 1, 1) for x in args[0])
    assert same_bits(program.module()(*inputs), Tail()(*inputs))


def test_autocast_casts_the_branches_only():
    args = find("repvgg").args
    with torch.autocast("cpu", torch.bfloat16):
        inputs = leaves(args)
        y, mean, *rest = multi_branch_bn_add_relu(*inputs, *args[3:])
    want = multi_branch_bn_add_relu([x.bfloat16() for x in args[0]], *args[1:])
    assert y.dtype == torch.bfloat16
    assert all(same_bits(a, b) for a, b in zip((y, mean, *rest), want, strict=True))
    y.sum().backward()
    assert all(t.grad.dtype == torch.float32 for v in inputs for t in v)
