"""The short way past the dispatcher: the same bits and strides, and never taken where something has to see the call."""

from __future__ import annotations

import sys
import threading

import pytest
import torch
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from effkern.ops import (
    _direct,
    _memo,
    pack_conv_weight,
    rep_conv2d,
    rep_conv2d_packed,
    skip_basic_block,
    skip_stage,
    sliced_conv2d,
    sliced_conv2d_packed,
    sliced_linear,
)
from effkern.ops._memo import Memo
from effkern.ops.rep_conv import _packed_op
from effkern.testing import layouts
from tests.ops.catalog import direct as operator
from tests.ops.catalog import every_sample, same_bits


@pytest.fixture
def memo(monkeypatch):
    """A fresh memo, whatever the environment says."""
    fresh = Memo("on")
    monkeypatch.setattr(_memo, "memo", lambda: fresh)
    for module in ("rep_conv", "sliced_conv.packed"):
        monkeypatch.setattr(f"effkern.ops.{module}.memo", lambda: fresh)
    return fresh


pytestmark = pytest.mark.skipif(not _direct.available, reason="no native library")

SHORT = {
    "rep_conv2d_packed": _direct.rep_conv2d_packed,
    "skip_basic_block": _direct.skip_block,
    "skip_bottleneck": _direct.skip_block,
    "sliced_conv2d_packed": lambda x, *args: _direct.sliced_conv2d_packed(x, -1, *args),
}
SAMPLES = [name for name in every_sample() if name.split("/")[0] in SHORT]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def packed_args(**changes):
    """Arguments of rep_conv2d_packed, by name."""
    args = {
        "x": torch.randn(2, 8, 4, 4),
        "handle": pack_conv_weight(torch.randn(8, 8, 3, 3), torch.randn(8)),
        "out_channels": 8,
        "kernel_size": 3,
        "stride": 1,
        "padding": 1,
        "dilation": 1,
        "groups": 1,
        "act": "relu",
        "residual": None,
        "algo": "auto",
    }
    assert changes.keys() <= args.keys()
    return {**args, **changes}


def short(**changes):
    return _direct.rep_conv2d_packed(*packed_args(**changes).values())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SAMPLES)
def test_gives_the_bits_and_strides_of_the_operator(name, dtype):
    sample = every_sample(dtype)[name]
    want = operator(sample)(*sample.args)
    args = [tuple(a) if isinstance(a, list | torch.Size) else a for a in sample.args]
    with torch.no_grad():
        got = SHORT[sample.op.name](*args)
    if want.numel() == 0 or any(isinstance(a, torch.Tensor) and a.numel() == 0 for a in sample.args):
        assert got is None
    else:
        assert got is not None and same_bits(got, want) and got.stride() == want.stride()


@pytest.mark.parametrize("name", list(layouts(torch.empty(1, 2, 3, 4))))
def test_any_layout_goes(name):
    x = layouts(torch.randn(2, 8, 4, 5))[name]
    residual = torch.randn(2, 8, 4, 5).to(memory_format=torch.channels_last)
    args = packed_args(x=x, residual=residual)
    got, want = short(**args), torch.ops.effkern.rep_conv2d_packed(*_packed(args))
    assert same_bits(got, want) and got.stride() == want.stride()


def _packed(args):
    """As the operator takes them: every geometry as two ints."""
    pairs = ("kernel_size", "stride", "padding", "dilation")
    return [[v, v] if k in pairs else v for k, v in args.items()]


def sliced_args(c_in, c_out, **options):
    """Arguments of the short way of sliced_conv2d_packed behind x."""
    handle = pack_conv_weight(torch.randn(12, 8, 3, 3), torch.randn(12))
    values = {"groups": 1, "group_mode": "prefix_groups", "scale": None, "shift": None, "act": "relu", "algo": "auto"}
    return c_in, handle, 12, 3, c_out, 1, 1, 1, *{**values, **options}.values()


@pytest.mark.parametrize("layout", ["channels_last", "contiguous"])
def test_a_prefix_is_read_in_place(layout):
    x = layouts(torch.randn(2, 8, 4, 5))[layout]
    args = sliced_args(5, 7, scale=torch.rand(12), shift=torch.rand(12))
    got = _direct.sliced_conv2d_packed(x, *args)
    options = {"scale": args[-4], "shift": args[-3], "act": "relu"}
    want = sliced_conv2d_packed(x[:, :5].clone(memory_format=torch.preserve_format), *args[1:5], 1, 1, **options)
    assert same_bits(got, want) and got.shape == (2, 7, 4, 5)


@pytest.mark.parametrize("c_in, c_out", [(9, 7), (5, 13), (5, -1)])
def test_widths_that_do_not_fit_step_aside(c_in, c_out):
    assert _direct.sliced_conv2d_packed(torch.randn(2, 8, 4, 5), *sliced_args(c_in, c_out)) is None


@pytest.mark.parametrize("name", ["conv", "linear"])
def test_sliced_ops_find_their_pack_the_short_way(name, memo):
    conv = name == "conv"
    x = torch.randn(2, 5, 4, 4) if conv else torch.randn(2, 5)
    weight, bias = torch.randn(12, 8, 3, 3) if conv else torch.randn(12, 8), torch.randn(12)
    op = (lambda: sliced_conv2d(x, weight, bias, 7, padding=1)) if conv else (lambda: sliced_linear(x, weight, bias, 7))
    first, _, third = op(), op(), op()
    assert memo.hits == 2 and memo.quick and same_bits(first, third)
    with torch.no_grad():
        weight.mul_(2)  # the pack is stale
    changed = op()
    direct = (sliced_conv2d if conv else sliced_linear)(
        x, weight.clone(), bias.clone(), 7, **({"padding": 1} if conv else {})
    )
    assert same_bits(changed, direct) and not same_bits(changed, first)


class Watching(torch.Tensor):
    """A subclass, as any tensor library on top of torch makes them."""


class DispatchMode(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class FunctionMode(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


MODES = {
    "dispatch mode": DispatchMode,
    "function mode": FunctionMode,
    "autocast": lambda: torch.autocast("cpu"),
    "forward-mode differentiation": forward_ad.dual_level,
    "profiler": torch.autograd.profiler.profile,
    "fake tensors": torch._subclasses.FakeTensorMode,
}


@pytest.mark.parametrize("name", MODES)
def test_steps_aside_for_modes(name):
    args = packed_args()
    assert short(**args) is not None
    with MODES[name]():
        assert short(**args) is None
    assert short(**args) is not None


def test_steps_aside_for_tracing_and_transforms():
    args, seen = packed_args(), []

    def call(x):
        seen.append(_direct.rep_conv2d_packed(*args.values()))
        return x * 1

    torch.jit.trace(call, args["x"], check_trace=False)
    torch.vmap(call)(args["x"])
    torch.func.grad(lambda x: call(x).sum())(args["x"])
    assert len(seen) >= 3 and all(y is None for y in seen)


def test_profilers_see_the_op():
    args = packed_args()
    with torch.autograd.profiler.profile() as profile:
        rep_conv2d_packed(**args)
    assert any(event.name == "effkern::rep_conv2d_packed" for event in profile.function_events)


TENSORS = {
    "subclass": lambda x: x.as_subclass(Watching),
    "double": lambda x: x.double(),
    "meta": lambda x: x.to("meta"),
    "sparse": lambda x: x.to_sparse(),
    "mkldnn": lambda x: x.to_mkldnn(),
    "quantized": lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.quint8),
    "negated view": lambda x: torch.complex(x, x).conj().imag,
    "empty": lambda x: x[:0],
    "three dimensions": lambda x: x[0],
    "wants a gradient": lambda x: x.requires_grad_(),
    "freed": lambda x: (x.untyped_storage().resize_(0), x)[1],
    "shrunk": lambda x: (x.untyped_storage().resize_(4 * x.numel() - 4), x)[1],
    "no tensor": lambda x: x.numpy(),
}


@pytest.mark.filterwarnings("ignore:.*[Qq]uantiz")
@pytest.mark.parametrize("argument", ["x", "residual"])
@pytest.mark.parametrize("name", TENSORS)
def test_steps_aside_for_tensors_that_are_not_plain(name, argument):
    assert short(**{argument: TENSORS[name](torch.randn(2, 8, 4, 4))}) is None


def test_gradient_mode_decides_about_gradients():
    x = torch.randn(2, 8, 4, 4, requires_grad=True)
    with torch.no_grad():
        y = short(x=x)
        assert y is not None and not y.requires_grad
    with torch.inference_mode():
        assert short(x=x).is_inference()
    args = packed_args(x=x)
    assert rep_conv2d_packed(**args).grad_fn is not None


WRONG = {
    "act": ["tanh", 1],
    "algo": ["fastest", None],
    "groups": [2, 0, -1, 1.0, True],
    "stride": [0, -1, 1 << 40, (1,), (1, 2, 3), "1", 1 << 70],
    "padding": [-1, None],
    "dilation": [9],
    "kernel_size": [1, [3], ()],
    "out_channels": [16, None],
    "handle": [torch.zeros(64, dtype=torch.uint8), torch.randn(8, 8, 3, 3)],
    "residual": [torch.randn(2, 8, 5, 4), torch.randn(2, 8, 4, 4).half()],
    "x": [torch.randn(2, 7, 4, 4)],
}


@pytest.mark.parametrize(
    "name, value", [(n, v) for n, values in WRONG.items() for v in values], ids=lambda v: str(v)[:20]
)
def test_leaves_wrong_arguments_to_the_operator(name, value):
    assert short(**{name: value}) is None
    assert _direct.rep_conv2d_packed() is None and _direct.rep_conv2d_packed(*packed_args().values(), 1) is None


def test_wrong_arguments_raise_as_before():
    with pytest.raises(ValueError, match="act must be none, relu"):
        rep_conv2d_packed(**packed_args(act="tanh"))
    with pytest.raises(TypeError, match="residual must have x's dtype"):
        rep_conv2d_packed(**packed_args(residual=torch.randn(2, 8, 4, 4).half()))


@pytest.mark.parametrize("good", [True, False])
def test_keeps_no_reference(good):
    args = packed_args(act="relu" if good else "tanh")
    tensors = [args["x"], args["handle"]]
    counts = [sys.getrefcount(t) for t in tensors]
    for _ in range(50):
        short(**args)
    assert [sys.getrefcount(t) for t in tensors] == counts


def test_threads_get_their_own_results():
    args = [packed_args() for _ in range(4)]
    want, wrong = [short(**a) for a in args], []

    def work(i):
        for _ in range(100):
            if not torch.equal(short(**args[i]), want[i]):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    [t.start() for t in threads], [t.join() for t in threads]
    assert not wrong


CHANGES = {
    "in place": lambda w: w.mul_(2),
    "behind the counter": lambda w: w.data.mul_(2),
    "replaced data": lambda w: setattr(w, "data", torch.randn_like(w)),
    "transposed": lambda w: w.transpose_(0, 1),
}


@pytest.mark.parametrize(
    "name, which",
    [(name, which) for which in ("weight", "bias") for name in CHANGES if (name, which) != ("transposed", "bias")],
)
def test_changed_weights_are_packed_anew(name, which, memo):
    x, weight, bias = torch.randn(1, 8, 4, 4), torch.randn(8, 8, 3, 3), torch.randn(8)
    before = [rep_conv2d(x, weight, bias, padding=1) for _ in range(3)][-1]
    assert memo.quick and memo.hits >= 2
    CHANGES[name](weight if which == "weight" else bias)
    got = rep_conv2d(x, weight, bias, padding=1)
    want = rep_conv2d_packed(x, pack_conv_weight(weight, bias), 8, 3, padding=1)
    assert torch.equal(got, want) and not torch.equal(got, before)


def test_forgotten_packs_are_forgotten_here_too(memo):
    x, weight = torch.randn(1, 8, 4, 4), torch.randn(8, 8, 3, 3)
    for _ in range(2):
        rep_conv2d(x, weight, padding=1)
    assert memo.quick
    memo.invalidate()
    assert not memo.quick
    with torch.enable_grad():
        assert rep_conv2d(x, weight.requires_grad_(), padding=1).requires_grad


def test_a_nearly_full_memo_counts_every_use(monkeypatch):
    small = Memo(limit=2500)  # one pack of 8 x 8 x 3 x 3 has 64 + 9 * 8 * 16 * 4 = 4672 bytes
    weight = torch.randn(8, 4, 1, 1)
    for _ in range(2):
        small.packed((weight, None), ("conv", 1, "auto"), lambda: pack_conv_weight(weight))
    assert small.quick
    wide = torch.randn(8, 32, 1, 1)
    small.packed((wide, None), ("conv", 1, "auto"), lambda: pack_conv_weight(wide))
    assert not small.quick


def test_a_stage_is_prepared_for_one_kind_of_map():
    weights = [pack_conv_weight(torch.randn(8, 8, 3, 3) / 8) for _ in range(4)]
    biases = [torch.randn(8) for _ in range(4)]
    x, keep = torch.randn(3, 8, 6, 5), torch.tensor([[1, 0], [0, 0], [1, 1]], dtype=torch.uint8)
    stage = _direct.stage(tuple(weights), tuple(biases), 2, x, "basic", "relu", "auto")
    want = skip_stage(x, keep, weights, biases)
    for other in (x, x.to(memory_format=torch.channels_last)):
        got = _direct.skip_stage(stage, other, keep)
        assert torch.equal(got, want) and got.stride() == other.stride()
    assert torch.equal(_direct.skip_stage(stage, x[:1], keep[:1]), want[:1])
    for wrong in ((x.half(), keep), (x[:, :4], keep), (x, keep[:2]), (x, keep[:, :1]), (x, keep + 1), (x[0], keep)):
        assert _direct.skip_stage(stage, *wrong) is None
    assert _direct.stage(tuple(weights), tuple(biases), 3, x, "basic", "relu", "auto") is None
    assert _direct.stage(tuple(weights), tuple(biases[:3]), 2, x, "basic", "relu", "auto") is None
    assert _direct.stage(tuple(weights), tuple(biases), 2, x[:, :4], "basic", "relu", "auto") is None
    with pytest.raises(ValueError, match="PyCapsule"):
        _direct.skip_stage(_direct.stamp((x,), False), x, keep)


def test_blocks_refuse_as_the_operator_does():
    x, w, b = torch.randn(2, 4, 5, 5), torch.randn(4, 4, 3, 3), torch.randn(4)
    with pytest.raises(ValueError, match="keep"):
        skip_basic_block(x, torch.full((2,), 1.5), w, b, w, b)
    assert _direct.skip_block(x, torch.full((2,), 1.5), w, b, w, b, 1, None, "relu", "auto") is None


def test_the_operator_itself_stays_what_modes_see():
    """The short way is a matter of the Python functions; torch.ops.effkern goes through the dispatcher."""
    seen = []

    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    with Names():
        rep_conv2d_packed(**packed_args())
    assert _packed_op._op in seen
