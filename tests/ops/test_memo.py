"""The memo of packed weights: whatever happens to a weight, the result is that of the uncached op."""

import copy
import gc
import threading

import pytest
import torch
from torch import nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

import effkern
from effkern.ops import _memo, rep_conv2d
from effkern.ops._memo import Memo, Stamp, fingerprint, parse_bytes
from effkern.ops._memo import memo as process_memo
from effkern.ops.rep_conv import _op


@pytest.fixture(autouse=True)
def memo(monkeypatch):
    """A fresh memo for every test, whatever the environment says."""
    fresh = Memo("on")
    monkeypatch.setattr(_memo, "memo", lambda: fresh)
    monkeypatch.setattr("effkern.ops.rep_conv.memo", lambda: fresh)
    return fresh


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.weight = nn.Parameter(torch.randn(24, 16, 3, 3))
        self.bias = nn.Parameter(torch.randn(24))
        self.x = torch.randn(2, 16, 6, 6)

    def forward(self):
        return rep_conv2d(self.x.to(self.weight.dtype), self.weight, self.bias, padding=1)

    def uncached(self):
        x = self.x.to(self.weight.dtype)
        return _op(x, self.weight, self.bias, [1, 1], [1, 1], [1, 1], 1, "relu", None, "auto")


def step(optimizer):
    def change(net):
        chosen = optimizer([net.weight, net.bias])
        with torch.enable_grad():
            net.forward().sum().backward()
        chosen.step()

    return change


def data_add(net):
    net.weight.data.add_(0.5)


def numpy_alias(net):
    net.weight.detach().numpy()[...] *= 2


def data_assign(net):
    net.weight.data = torch.randn_like(net.weight)


def from_vector(net):
    vector_to_parameters(parameters_to_vector(net.parameters()).detach() * 3, net.parameters())


def memory_format(net):
    net.to(memory_format=torch.channels_last)
    net.weight.data.mul_(2)


def half_and_back(net):
    net.half().float()


def to_bfloat16(net):
    net.bfloat16()


def state(net):
    return {k: torch.randn_like(v) for k, v in net.state_dict().items()}


def load(net):
    net.load_state_dict(state(net))


def load_assign(net):
    net.load_state_dict(state(net), assign=True)


def swap(net):
    torch.utils.swap_tensors(net.weight, nn.Parameter(torch.randn_like(net.weight)))


def storage_copy(net):
    net.weight.untyped_storage().copy_(torch.randn_like(net.weight).untyped_storage())


def no_grad_op(net):
    net.weight.mul_(1.5)


def through_view(net):
    net.weight[3].fill_(0.25)


def through_detach(net):
    net.weight.detach().add_(1)


def bias_only(net):
    net.bias.data.add_(1)


def nan_bits(net):
    net.weight.data.fill_(float("nan"))


MUTATIONS = {
    "in-place op": no_grad_op,
    "view": through_view,
    "detach view": through_detach,
    "load_state_dict": load,
    "sgd": step(lambda p: torch.optim.SGD(p, 0.1)),
    "sgd foreach": step(lambda p: torch.optim.SGD(p, 0.1, foreach=True)),
    "adam": step(lambda p: torch.optim.Adam(p, 0.1)),
    "fused sgd": step(lambda p: torch.optim.SGD(p, 0.1, fused=True)),
    "fused adam": step(lambda p: torch.optim.Adam(p, 0.1, fused=True)),
    "fused adamw": step(lambda p: torch.optim.AdamW(p, 0.1, fused=True)),
    "fused adagrad": step(lambda p: torch.optim.Adagrad(p, 0.1, fused=True)),
    "data.add_": data_add,
    "numpy alias": numpy_alias,
    "storage copy": storage_copy,
    "data = t": data_assign,
    "vector_to_parameters": from_vector,
    "memory_format": memory_format,
    "half().float()": half_and_back,
    "bfloat16()": to_bfloat16,
    "load assign=True": load_assign,
    "swap_tensors": swap,
    "bias": bias_only,
    "to NaN": nan_bits,
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_output_follows_the_weight(mutation, memo):
    net = Net()
    with torch.no_grad():
        before = net()
        assert torch.equal(net(), before)
        assert (memo.hits, memo.misses) == (1, 1)
        MUTATIONS[mutation](net)
        after = net()
        torch.testing.assert_close(after, net.uncached(), rtol=0, atol=0, equal_nan=True)
        assert not torch.equal(after, before)
        torch.testing.assert_close(net(), after, rtol=0, atol=0, equal_nan=True)
    assert memo.misses == 2 and memo.hits == 2


def test_copies_have_packs_of_their_own():
    net = Net()
    with torch.no_grad():
        net()
        twin = copy.deepcopy(net)
        twin.weight.data.mul_(-1)
        assert torch.equal(twin(), twin.uncached())
        assert torch.equal(net(), net.uncached())


def test_inference_tensors_are_never_remembered(memo):
    with torch.inference_mode():
        weight, x = torch.randn(8, 4, 3, 3), torch.randn(1, 4, 5, 5)
        first = rep_conv2d(x, weight)
        weight.neg_()
        assert not torch.equal(rep_conv2d(x, weight), first)
    assert len(memo) == 0
    net = Net()
    with torch.inference_mode():  # ordinary parameters keep their version counter here
        assert torch.equal(net(), net.uncached())
    assert len(memo) == 1


def test_a_reused_address_is_another_weight(memo):
    x = torch.randn(1, 4, 5, 5)
    with torch.no_grad():
        for i in range(50):
            weight = torch.full((8, 4, 3, 3), float(i))
            assert torch.equal(
                rep_conv2d(x, weight), _op(x, weight, None, [1, 1], [0, 0], [1, 1], 1, "relu", None, "auto")
            )
            del weight
    assert len(memo) <= 2  # dead weights' packs are swept when a new one comes


def test_views_groups_and_dtypes_are_told_apart(memo):
    x = torch.randn(1, 4, 6, 6)
    base = torch.randn(16, 4, 3, 3)
    with torch.no_grad():
        for weight in (base, base[:8], base[8:], base.transpose(2, 3), base[:, :2]):
            groups = 4 // weight.size(1)
            expected = _op(x, weight, None, [1, 1], [0, 0], [1, 1], groups, "relu", None, "auto")
            for _ in range(2):
                assert torch.equal(rep_conv2d(x, weight, groups=groups), expected)
    assert memo.misses == memo.hits == 5


def test_gradients_are_not_lost(memo):
    net = Net()
    assert net().requires_grad
    frozen = net.weight.detach()
    x = net.x.clone().requires_grad_()
    assert rep_conv2d(x, frozen).requires_grad
    assert len(memo) == 0
    rep_conv2d(net.x, frozen)
    assert len(memo) == 1


def test_stays_out_of_transforms_and_graphs(memo):
    from torch._subclasses.fake_tensor import FakeTensorMode

    net = Net()
    weight, x = net.weight.detach(), net.x
    with torch.no_grad():
        torch.func.functional_call(net, {"weight": weight * 2})  # plain tensors: remembered by identity
        assert len(memo) == 1
        memo.invalidate()
        with FakeTensorMode() as mode:
            rep_conv2d(mode.from_tensor(x), mode.from_tensor(weight))
        torch._dynamo.reset()
        torch.compile(lambda: rep_conv2d(x, weight), backend="eager", fullgraph=True)()
        torch.jit.trace(lambda x: rep_conv2d(x, weight), x, check_trace=False)
        with torch.autocast("cpu", torch.bfloat16):
            rep_conv2d(x, weight)
        torch.fx.experimental.proxy_tensor.make_fx(lambda x: rep_conv2d(x, weight))(x)

        class Sub(torch.Tensor):
            pass

        rep_conv2d(x, weight.as_subclass(Sub))
        both = torch.func.vmap(lambda w: rep_conv2d(x, w))(torch.stack([weight, -weight]))
    assert torch.equal(both[1], rep_conv2d(x, -weight))
    assert len(memo) == 1  # the comparison's


def test_off_remembers_nothing_and_full_sees_single_elements(monkeypatch):
    net = Net()
    for mode, seen in (("off", True), ("full", True)):
        fresh = Memo(mode)
        monkeypatch.setattr("effkern.ops.rep_conv.memo", lambda fresh=fresh: fresh)
        with torch.no_grad():
            net()
            net.weight.data[5, 5, 1, 1] += 1  # behind the version counter's back, most likely between two samples
            assert torch.equal(net(), net.uncached()) == seen
        assert len(fresh) == (0 if mode == "off" else 1)


def test_invalidate_forgets_one_weight_or_all(memo):
    one, two = Net(), Net()
    with torch.no_grad():
        one(), two()
        one.weight.data[5, 5, 1, 1] += 1
        assert memo.invalidate(one.weight) == 1
        assert torch.equal(one(), one.uncached())
        assert len(memo) == 2
        assert memo.invalidate() == 2
        assert memo.bytes == 0


def test_public_invalidate(memo):
    net = Net()
    with torch.no_grad():
        net()
    assert effkern.invalidate(net.bias) == 1


def test_limit_evicts_the_one_used_longest_ago(monkeypatch):
    nets = [Net() for _ in range(3)]
    size = 64 + 4 * (32 + 32 * 16 * 9)
    memo = Memo("on", limit=2 * size)
    monkeypatch.setattr("effkern.ops.rep_conv.memo", lambda: memo)
    with torch.no_grad():
        nets[0](), nets[1](), nets[0](), nets[2]()
        assert len(memo) == 2 and memo.bytes == 2 * size
        hits = memo.hits
        nets[0]()
        assert memo.hits == hits + 1
        nets[1]()
        assert memo.hits == hits + 1
    small = Memo("on", limit=size - 1)
    monkeypatch.setattr("effkern.ops.rep_conv.memo", lambda: small)
    with torch.no_grad():
        assert torch.equal(nets[0](), nets[0].uncached())
    assert len(small) == small.bytes == 0


def test_threads_share_it(memo):
    nets = [Net() for _ in range(4)]
    for i, net in enumerate(nets):
        net.weight.data.mul_(i + 1)
    expected = [net.uncached().detach() for net in nets]
    wrong = []

    def work():
        with torch.no_grad():  # grad mode is a thread's own
            for round in range(20):
                for net, y in zip(nets, expected, strict=True):
                    if not torch.equal(net(), y):
                        wrong.append(round)
                if round % 5 == 0:
                    memo.invalidate(nets[0].weight)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert memo.bytes == sum(handle.nbytes for _, handle in memo._entries.values())


def test_fingerprint_compares_bits():
    x = torch.randn(1000)
    assert fingerprint(x) == fingerprint(x.clone())
    nan = x.clone()
    nan[0] = float("nan")
    assert fingerprint(nan) == fingerprint(nan.clone()) != fingerprint(x)
    zero, minus = torch.zeros(10), torch.zeros(10)
    minus[3] = -0.0
    assert fingerprint(zero) != fingerprint(minus)
    assert fingerprint(torch.empty(0)) == fingerprint(torch.empty(0, 3))
    assert fingerprint(torch.zeros(5)) != fingerprint(torch.zeros(6))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n", [1, 3, 255, 256, 257, 300, 513, 4096, 70001])
def test_fingerprint_sees_both_ends_and_full_sees_everything(n, dtype):
    x = torch.zeros(n, dtype=dtype)
    sampled, full = fingerprint(x), fingerprint(x, full=True)
    for i in {0, n - 1, min(n - 1, 64 // x.element_size() - 1)}:
        changed = x.clone()
        changed[i] = 1
        assert fingerprint(changed) != sampled
    for i in {0, n // 3, n // 2, n - 1}:
        changed = x.clone()
        changed[i] = 1
        assert fingerprint(changed, full=True) != full


def test_fingerprint_stays_inside_a_strided_view():
    wide = torch.zeros(8, 6, 5, 5)
    view = wide[2:4, 1:3]
    before = fingerprint(view, full=True)
    wide[0], wide[5:] = 1, 1
    wide[4] = 1
    assert fingerprint(view, full=True) == before
    view[1, 1, 4, 4] = 1
    assert fingerprint(view, full=True) != before
    assert fingerprint(torch.ones(3, 1).expand(3, 4)) == fingerprint(torch.ones(3, 1).expand(3, 4))


def test_stamp_tells_death_change_and_invalidation(memo):
    weight = torch.randn(300)
    stamp = Stamp((weight, None))
    assert stamp.holds((weight, None)) and not stamp.expired() and not stamp.invalidated()
    assert not stamp.holds((weight, weight))
    assert not stamp.holds((weight.clone(), None))
    assert not stamp.holds((weight[:], weight[:0])) and not stamp.holds((weight.view(30, 10), None))
    memo.invalidate(torch.zeros(1))
    assert stamp.invalidated()
    del weight
    gc.collect()
    assert stamp.expired()


@pytest.mark.parametrize("text, value", [("0", 0), ("123", 123), ("2k", 2048), (" 64M ", 64 << 20), ("1G", 1 << 30)])
def test_bytes_are_read(text, value):
    assert parse_bytes(text) == value


@pytest.mark.parametrize("text", ["", "M", "-1", "1.5G", "64MB", "lots"])
def test_other_bytes_are_refused(text):
    with pytest.raises(ValueError, match="EFFKERN_CACHE_LIMIT"):
        parse_bytes(text)


@pytest.mark.parametrize(
    "variables, expected",
    [
        ({"EFFKERN_CACHE": "off"}, "off 268435456"),
        ({"EFFKERN_CACHE": "full", "EFFKERN_CACHE_LIMIT": "1M"}, "full 1048576"),
        ({"EFFKERN_CACHE": "sometimes"}, "EFFKERN_CACHE: must be one of on, off, full, got 'sometimes'"),
    ],
)
def test_environment_is_read_at_first_use(variables, expected, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    try:
        found = process_memo.__wrapped__()
        assert f"{found.mode} {found.limit}" == expected
    except ValueError as error:
        assert str(error) == expected
