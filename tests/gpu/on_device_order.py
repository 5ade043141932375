"""Every op on a GPU: the same bits again, alone, in other layouts, beside other work and on another stream."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from effkern.testing import Sample, layouts, map_tensors
from tests.gpu.device import needs_cuda, needs_device, there
from tests.gpu.on_device import COMPOSED, DIFFERENTIATED, KEYS, settled
from tests.gpu.proof_host import results
from tests.ops.catalog import as_tuple, batched, every_sample, same_bits, with_rows
from tests.ops.test_every_op import gradients

pytestmark = needs_device
CALLS = 10
BATCHED = [key for key in KEYS if "x" in batched(every_sample()[key])]
WITH_GRADIENTS = [
    key for key in KEYS
    if every_sample()[key].requires_grad and (key.split("/")[0] in DIFFERENTIATED or key.startswith("rep_conv2d/"))
]  # fmt: skip
#: Every layout of every tensor takes its time: for one sample of each op.
FIRST = list({key.split("/")[0]: key for key in reversed(KEYS)}.values())


def call(sample: Sample, args: tuple) -> tuple[Tensor, ...] | None:
    """The results on the device, without tails that are whatever was there before; None where the GPU refuses."""
    outputs = results(sample.op, args)
    return None if outputs is None else settled(sample, outputs)


def assert_same(got: tuple[Tensor, ...] | None, want: tuple[Tensor, ...] | None, what: str) -> None:
    assert (got is None) == (want is None), what
    for a, b in zip(got or (), want or (), strict=True):
        assert same_bits(a.cpu(), b.cpu()), what


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("key", KEYS + COMPOSED)
def test_ten_calls_give_the_same_bits(key, dtype):
    sample = every_sample(dtype)[key]
    args = there(sample.args)
    want = call(sample, args)
    for number in range(1, CALLS):
        assert_same(call(sample, args), want, f"{key}: call {number}")


@pytest.mark.parametrize("key", WITH_GRADIENTS)
def test_ten_gradients_have_the_same_bits(key):
    sample = every_sample(torch.float16)[key]
    args = there(sample.args)
    outputs = call(sample, args)
    if outputs is None:
        return  # refused, with the right message
    incoming = there(tuple(torch.randn(y.shape).to(y.dtype) for y in outputs if y.is_floating_point()))
    want = tuple(gradients(sample.op, sample, args, incoming))
    for number in range(1, CALLS):
        assert_same(tuple(gradients(sample.op, sample, args, incoming)), want, f"{key}: call {number}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("key", BATCHED)
def test_a_sample_does_not_depend_on_its_neighbours(key, dtype):
    sample = every_sample(dtype)[key]
    together, n = call(sample, there(sample.args)), sample.named_args()["x"].size(0)
    if together is None or n == 0:
        return
    more = [0, n - 1, *range(n)]
    if key.startswith("pq_linear/"):
        more = [0]  # above some rows the algorithm is another one, and docs/gpu.md says so
    for rows in ([n - 1], list(reversed(range(n))), more):
        chosen = torch.tensor(rows)
        part = Sample(sample.name, sample.op, sample.reference, with_rows(sample, chosen))
        want = tuple(y.cpu().index_select(0, chosen) for y in together)
        assert_same(call(part, there(part.args)), want, f"{key}: rows {rows}")


@pytest.mark.parametrize("key", [key for key in KEYS + COMPOSED if batched(every_sample()[key])])
def test_an_empty_batch(key):
    sample = every_sample(torch.float16)[key]
    args = there(with_rows(sample, torch.arange(0)))
    outputs = results(sample.op, args)
    if outputs is not None:
        promised = as_tuple(sample.op.fake(*args))
        assert [(y.shape, y.dtype) for y in outputs] == [(y.shape, y.dtype) for y in promised]


@pytest.mark.parametrize("key", FIRST)
def test_layouts_do_not_change_the_bits(key):
    sample = every_sample(torch.float16)[key]
    want = call(sample, there(sample.args))
    for name, value in sample.named_args().items():
        if not isinstance(value, Tensor) or value.dim() != 4 or name not in (*batched(sample), "weight"):
            continue
        at = sample.op.arguments.index(name)
        for layout, other in layouts(value).items():
            args = (*there(sample.args[:at]), as_it_lies(other), *there(sample.args[at + 1 :]))
            assert_same(call(sample, args), want, f"{key}: {name} {layout}")


def as_it_lies(value: Tensor) -> Tensor:
    """On the device with the same strides and the same numbers around it."""
    whole = torch.empty(0, dtype=value.dtype).set_(value.untyped_storage())  # type: ignore[call-overload]
    return there(whole).as_strided(value.shape, value.stride(), value.storage_offset())


@pytest.mark.parametrize("key", KEYS + COMPOSED)
def test_fake_tensors_promise_what_the_device_returns(key):
    sample = every_sample(torch.float16)[key]
    args = there(sample.args)
    outputs = results(sample.op, args)
    if outputs is None:
        return
    with FakeTensorMode() as mode:
        fakes = as_tuple(sample.op(*map_tensors(mode.from_tensor, args)))
    for y, fake in zip(outputs, fakes, strict=True):
        assert (y.shape, y.dtype, y.stride(), y.device) == (fake.shape, fake.dtype, fake.stride(), fake.device)


@needs_cuda
@pytest.mark.parametrize("key", KEYS + COMPOSED)
def test_arguments_made_on_a_stream_of_their_own(key):
    sample = every_sample(torch.float16)[key]
    made, stream = there(sample.args), torch.cuda.Stream()
    want = call(sample, made)
    late = map_tensors(lambda t: torch.zeros_like(t, memory_format=torch.preserve_format), made)
    torch.cuda.synchronize()
    pairs: list[tuple[Tensor, Tensor]] = []
    collect(late, made, pairs)
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)  # about 10 ms: whoever does not wait for the stream finds zeros
        for to, value in pairs:
            to.copy_(value, non_blocking=True)
        got = results(sample.op, late)
    stream.synchronize()
    assert_same(None if got is None else settled(sample, got), want, key)


def collect(a: object, b: object, pairs: list[tuple[Tensor, Tensor]]) -> None:
    """The tensors of two nested arguments, side by side."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        pairs.append((a, b))
    elif isinstance(a, list | tuple) and isinstance(b, list | tuple):
        for u, v in zip(a, b, strict=True):
            collect(u, v, pairs)


@needs_cuda
@pytest.mark.parametrize("key", KEYS)
def test_work_on_another_stream_does_not_change_the_bits(key):
    sample = every_sample(torch.float16)[key]
    args, other = there(sample.args), torch.cuda.Stream()
    want = call(sample, args)
    noise = torch.randn(4096, 4096, device="cuda", dtype=torch.float16)
    torch.cuda.synchronize()
    with torch.cuda.stream(other):
        for _ in range(30):
            noise = (noise @ noise).clamp_(-1, 1)
    got = [results(sample.op, args) for _ in range(CALLS)]
    torch.cuda.synchronize()
    for outputs in got:
        assert_same(None if outputs is None else settled(sample, outputs), want, key)


@needs_cuda
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one device")
@pytest.mark.parametrize("key", KEYS)
def test_another_device_than_the_current_one(key):
    sample = every_sample(torch.float16)[key]
    got = call(sample, map_tensors(lambda t: t.to("cuda:1"), sample.args))
    assert_same(got, call(sample, there(sample.args)), key)
    assert torch.cuda.current_device() == 0
