"""Layers run from codes: state, copies, casts, conversion, wrapping."""

import copy
import io
import os
import pickle
import socket

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from effkern.nn.pq import PQConv2d, PQEmbedding, PQLinear, code_dtype, conv_padding


def make(kind, entries=20, **options):
    torch.manual_seed(0)
    if kind == "linear":
        return PQLinear(18, 7, d=4, entries=entries, **options), torch.randn(3, 18)
    if kind == "conv":
        return PQConv2d(6, 10, 3, d=9, entries=entries, padding=1, scale=True, **options), torch.randn(2, 6, 7, 5)
    return PQEmbedding(30, 11, d=4, entries=entries, padding_idx=2, **options), torch.tensor([[0, 2], [29, 5]])


KINDS = pytest.mark.parametrize("kind", ["linear", "conv", "embedding"])


@KINDS
@pytest.mark.parametrize("entries", [20, 300, 40000])
def test_computes_what_its_dense_weight_does(kind, entries):
    layer, x = make(kind, entries)
    weight = layer.dense_weight()
    if kind == "linear":
        want = F.linear(x, weight, layer.bias)
    elif kind == "conv":
        want = F.conv2d(x, weight.reshape(10, 6, 3, 3), layer.bias, padding=1)
    else:
        want = F.embedding(x, weight).masked_fill((x == 2)[..., None], 0)
    torch.testing.assert_close(layer(x), want, rtol=1e-4, atol=1e-5)
    assert layer.codes.dtype == code_dtype(entries)


@KINDS
def test_state_round_trips(kind):
    layer, x = make(kind, entries=300)
    want = layer(x)
    other, _ = make(kind, entries=300)
    other.reset_parameters()
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file))
    for twin in (other, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(x), want)
        assert twin.code_bytes.data_ptr() != layer.code_bytes.data_ptr()
    names = {n for n, _ in layer.named_parameters()}
    assert "codebook" in names and "code_bytes" in layer.state_dict() and "code_bytes" not in names


@KINDS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_halves_cast_the_book_and_spare_the_codes(kind, dtype):
    layer, x = make(kind)
    codes = layer.codes.clone()
    half = copy.deepcopy(layer).to(dtype)
    assert half.codebook.dtype == dtype and torch.equal(half.codes, codes)
    y = half(x if kind == "embedding" else x.to(dtype))
    assert y.dtype == dtype
    torch.testing.assert_close(y.float(), layer(x), rtol=0.05, atol=0.05)


def test_memory_format():
    layer, x = make("conv")
    want = layer(x)
    layer = layer.to(memory_format=torch.channels_last)
    y = layer(x.to(memory_format=torch.channels_last))
    assert y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y, want)


@KINDS
def test_trains_the_codebook_and_leaves_the_codes(kind):
    layer, x = make(kind)
    codes = layer.codes.clone()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    target = torch.randn_like(layer(x))
    first = last = None
    for _ in range(30):
        loss = (layer(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        last = float(loss.detach())
        first = last if first is None else first
    assert last < 0.8 * first
    assert torch.equal(layer.codes, codes)


@KINDS
def test_from_float_keeps_all_but_the_weight(kind):
    layer, x = make(kind)
    dense = {
        "linear": nn.Linear(18, 7),
        "conv": nn.Conv2d(6, 10, 3, padding=1, stride=2, dilation=2),
        "embedding": nn.Embedding(30, 11, padding_idx=2),
    }[kind].eval()
    twin = type(layer).from_float(dense, layer.codes, layer.codebook, layer.scale)
    assert not twin.training and torch.equal(twin.codes, layer.codes)
    with torch.no_grad():
        dense.weight.copy_(layer.dense_weight().reshape(dense.weight.shape))
        if kind == "embedding":
            dense.weight[2] = 0
    torch.testing.assert_close(twin(x), dense(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
def test_padding_modes(mode):
    conv = nn.Conv2d(4, 4, 3, padding=(1, 2), padding_mode=mode, groups=2)
    codes, book = torch.arange(8).reshape(4, 2), conv.weight.detach().reshape(1, 8, 9)
    layer = PQConv2d.from_float(conv, codes, book)
    x = torch.randn(1, 4, 6, 6)
    torch.testing.assert_close(layer(x), conv(x), rtol=1e-4, atol=1e-5)


def test_padding_by_name():
    assert conv_padding(nn.Conv2d(1, 1, (3, 5), padding="same", dilation=2)) == (2, 4)
    assert conv_padding(nn.Conv2d(1, 1, 3, padding="valid")) == (0, 0)
    with pytest.raises(ValueError, match="same"):
        conv_padding(nn.Conv2d(1, 1, 2, padding="same"))


def test_bad_arguments_are_named():
    layer, _ = make("linear")
    for match, call in (
        ("entries", lambda: PQLinear(4, 4, d=2, entries=65537)),
        ("d: must be", lambda: PQLinear(4, 4, d=0, entries=4)),
        ("books", lambda: PQLinear(4, 4, d=2, entries=4, books=3)),
        ("stages", lambda: PQLinear(4, 4, d=2, entries=4, stages=0)),
        ("act", lambda: PQLinear(4, 4, d=2, entries=4, act="tanh")),
        ("groups", lambda: PQConv2d(4, 4, 1, d=2, entries=4, groups=3)),
        ("padding_mode", lambda: PQConv2d(4, 4, 1, d=2, entries=4, padding_mode="mirror")),
        ("padding_idx", lambda: PQEmbedding(4, 4, d=2, entries=4, padding_idx=4)),
        ("max_norm", lambda: PQEmbedding.from_float(nn.Embedding(4, 4, max_norm=1.0), layer.codes, layer.codebook)),
        ("codes: must have shape", lambda: setattr(layer, "codes", torch.zeros(1, 1, dtype=torch.int64))),
        ("codes: must lie", lambda: setattr(layer, "codes", torch.full((7, 5), 20))),
    ):
        with pytest.raises(ValueError, match=match):
            call()
    with pytest.raises(TypeError, match="codes"):
        layer.codes = torch.zeros(7, 5)


def test_corrupt_codes_of_a_state_dict_are_refused_when_run():
    layer, x = make("linear")
    state = layer.state_dict()
    state["code_bytes"] = torch.full_like(state["code_bytes"], 255)
    layer.load_state_dict(state)
    with pytest.raises(ValueError, match="codes"):
        layer(x)


@KINDS
@pytest.mark.parametrize("entries", [20, 40000])
def test_compiles_and_exports(kind, entries):
    layer, x = make(kind, entries)
    want = layer(x)
    assert torch.equal(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), want)
    batch = torch.export.Dim("n", min=1, max=64)
    program = torch.export.export(layer, (x,), dynamic_shapes=({0: batch},)).module()
    more = torch.cat([x, x, x])
    torch.testing.assert_close(program(more), layer(more), rtol=0, atol=0)


def test_wraps_in_distributed_data_parallel():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=0, world_size=1)
    try:
        layer, x = make("linear", entries=300)  # 16-bit codes
        wrapped = nn.parallel.DistributedDataParallel(nn.Sequential(layer))
        wrapped(x).sum().backward()
        assert layer.codebook.grad is not None
    finally:
        dist.destroy_process_group()
