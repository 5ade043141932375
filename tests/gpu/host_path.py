"""The host's side of every CUDA op as it ships, on a device that is not there (stub.py): which device and stream it
launches on, what it does when a call of the runtime fails, that nothing waits, and what it refuses. `proof_runtime.py`
runs this file."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from effkern.ops import _handle
from effkern.ops._registry import OPS
from effkern.testing import Sample, map_tensors
from tests.gpu.proof_host import OPS_ON_CUDA, results
from tests.gpu.stub import Call, Runtime
from tests.ops.catalog import as_tuple, batched, every_sample, same_bits, with_rows

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
#: Multiprocessors and shared memory for a block: sm_90 and 100, sm_80, sm_86, 89 and 120.
DEVICES = {"h100": (132, 227 << 10), "a100": (108, 163 << 10), "l4": (58, 99 << 10)}
KEYS = [key for key, sample in every_sample().items() if sample.op.name in OPS_ON_CUDA]
COMPOSED = [key for key, sample in every_sample().items() if sample.op.backends["cuda"] == "composed"]
#: Ops whose gradients are kernels and wait for nothing.
GRADIENTS_ON_CUDA = {"rep_conv2d", "sliced_conv2d", "sliced_linear", "multi_branch_bn_add_relu"}
GRADIENTS = [key for key in KEYS if every_sample()[key].requires_grad and key.split("/")[0] in GRADIENTS_ON_CUDA]
#: One sample of each op, for what does not depend on the sample.
ONE_EACH = sorted({key.split("/")[0]: key for key in reversed(KEYS)}.values())
OUT_OF_MEMORY = "out of memory"
#: Composed ops that were seen to launch something.
LAUNCHED: set[str] = set()


@pytest.fixture
def runtime() -> Iterator[Runtime]:
    runtime = Runtime()
    runtime.device(2, 99 << 10)
    runtime.begin(running=True, waits=True)
    yield runtime
    runtime.begin(running=True, waits=True)


def on(device: str, args: Any) -> Any:
    return map_tensors(lambda t: t.to(device), args)


def call(sample: Sample, args: tuple) -> tuple[Tensor, ...] | None:
    return results(sample.op, args)


def watched(runtime: Runtime, op: Callable[[], Any], *, running: bool = False) -> tuple[Any, list[Call]]:
    """The result of a call during which nothing may wait, and its launches."""
    runtime.begin(running=running, waits=False)
    try:
        return op(), runtime.launches()
    finally:
        runtime.begin(running=True, waits=True)


def shapes(launches: list[Call]) -> list[tuple[int, ...]]:
    return [(c.kernel, c.grid, c.threads, c.shared) for c in launches]


def meta(outputs: tuple[Tensor, ...]) -> list[tuple]:
    return [(y.shape, y.stride(), y.dtype, y.device) for y in outputs]


def test_the_ops_are_there():
    native = {name for name, op in OPS.items() if op.backends["cuda"] == "native"}
    assert native == OPS_ON_CUDA
    assert torch.accelerator.current_accelerator() == torch.device("cuda")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("key", KEYS)
def test_launches_go_to_the_stream_and_device_of_the_tensors(key, dtype, runtime):
    sample = every_sample(dtype)[key]
    args = on("cuda:1", sample.args)
    stream = torch.Stream(device="cuda:1")
    before = torch.accelerator.current_stream(1)
    with torch._C._AutoDispatchBelowAutograd():
        torch.accelerator.set_stream(stream)
        torch.accelerator.set_device_index(0)
        try:
            outputs, launches = watched(runtime, lambda: call(sample, args))
            assert torch.accelerator.current_device_index() == 0
            assert torch.accelerator.current_stream(1) == stream
        finally:
            torch.accelerator.set_stream(before)
            torch.accelerator.set_device_index(0)
    if outputs is None:
        assert not launches
        return
    assert all((c.device, c.stream) == (1, stream.stream_id) for c in launches)
    fakes = as_tuple(sample.op.fake(*args))
    assert meta(outputs) == meta(fakes)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("key", KEYS)
def test_launches_fit_the_device_and_do_not_depend_on_the_values(key, device, runtime):
    runtime.device(*DEVICES[device])
    sample = every_sample(torch.float16)[key]
    args = on("cuda", sample.args)
    outputs, launches = watched(runtime, lambda: call(sample, args))
    if outputs is None:
        return
    for value in (0, 1):
        other = map_tensors(lambda t, value=value: torch.empty_like(t).copy_(torch.full_like(t.cpu(), value)), args)
        assert shapes(watched(runtime, lambda args=other: call(sample, args))[1]) == shapes(launches)


@pytest.mark.parametrize("device", DEVICES)
def test_a_stage_that_fills_shared_memory_asks_for_it_where_it_fits(device, runtime):
    runtime.device(*DEVICES[device])
    maps = torch.empty(2, 16, 32, 32, dtype=torch.float16, device="cuda")
    weight, bias = torch.empty(16, 16, 3, 3, dtype=torch.float16, device="cuda"), torch.empty(16, device="cuda")
    keep = torch.empty(2, 3, dtype=torch.bool, device="cuda")
    op = OPS["skip_stage"]
    _, launches = watched(runtime, lambda: op(maps, keep, [weight] * 6, [bias] * 6, "basic", "relu", "auto"))
    if device == "l4":  # block by block: a mask to a list, then two convolutions
        assert len(launches) == 9
    else:
        assert [c.shared > 100 << 10 for c in launches] == [True]


@pytest.mark.parametrize(("dtype", "most"), [(torch.float16, 64), (torch.bfloat16, 64), (torch.float32, 8)], ids=str)
def test_few_rows_are_multiplied_as_they_are_decoded(dtype, most, runtime):
    codes = torch.zeros(20, 8, dtype=torch.uint8, device="cuda")
    book = torch.zeros(1, 50, 8, dtype=dtype, device="cuda")
    shared: dict[int, list[int]] = {}
    for rows in (1, 8, most, most + 1):
        x = torch.zeros(rows, 64, dtype=dtype, device="cuda")
        _, launches = watched(runtime, lambda x=x: OPS["pq_linear"](x, codes, book, None, None, "none", "auto"))
        shared[rows] = [c.shared for c in launches]
    assert [len(shared[rows]) for rows in (1, 8, most, most + 1)] == [1, 1, 1, 2]  # the last: to a dense weight first
    assert (shared[most] > shared[8]) == (most > 8)  # with the sums of 32 rows


@pytest.mark.parametrize("key", KEYS)
def test_every_call_that_fails_is_reported_and_leaves_nothing_behind(key, runtime):
    runtime.device(*DEVICES["h100"])
    sample = every_sample(torch.bfloat16)[key]
    args = on("cuda:1", sample.args)
    copies = on("cpu", args)
    runtime.begin(running=False, waits=False)
    if call(sample, args) is None:
        return
    total = runtime.calls()
    names = set()
    for number in range(total):
        runtime.begin(running=False, waits=False)
        blocks = runtime.blocks()
        runtime.fail(number)
        with pytest.raises(RuntimeError, match=OUT_OF_MEMORY) as failure:
            sample.op(*args)
        names.add(str(failure.value).split(": ")[-2].split()[-1])
        del failure
        assert runtime.last_error() == 0
        assert torch.accelerator.current_device_index() == 0
        assert runtime.blocks() == blocks
    assert names <= KERNELS, names
    runtime.begin(running=True, waits=True)
    assert all(same_bits(mine.cpu(), copy) for mine, copy in zip(flat(args), flat(copies), strict=True))
    runtime.begin(running=False, waits=False)
    assert call(sample, args) is not None


#: The kernels of the library, by the names errors give them.
KERNELS = {
    "act_grad", "block_grad", "bn_apply", "bn_finish", "bn_gradient_apply", "bn_gradient_finish",
    "bn_gradient_sums", "bn_statistics", "book_fold", "book_grad", "compact", "conv", "decode", "depthwise",
    "depthwise_wgrad", "dots", "dots_mma", "fold", "fold_sums", "fold_table", "lookup", "ragged_grad", "row_dots",
    "schedule", "stage", "transpose", "wgrad",
}  # fmt: skip


def flat(args: Any) -> list[Tensor]:
    found: list[Tensor] = []
    map_tensors(lambda t: found.append(t) or t, args)  # type: ignore[func-returns-value]
    return found


@pytest.mark.parametrize("key", ONE_EACH)
def test_an_error_of_someone_else_is_not_ours(key, runtime):
    sample = every_sample()[key]
    args = on("cuda", sample.args)
    runtime.leave_error()
    try:
        assert call(sample, args) is not None
        assert runtime.last_error() != 0
    finally:
        while runtime.last_error():
            runtime.take_error()


@pytest.mark.parametrize("key", [key for key in KEYS if batched(every_sample()[key])])
def test_a_batch_of_nothing_launches_nothing_or_whole_blocks(key, runtime):
    sample = every_sample()[key]
    args = on("cuda", with_rows(sample, torch.arange(0)))
    outputs, _ = watched(runtime, lambda: call(sample, args), running=True)
    want = as_tuple(sample.op.fake(*args))
    assert outputs is None or meta(outputs) == meta(want)


@pytest.mark.parametrize("key", ONE_EACH)
def test_tensors_of_other_devices_are_refused_by_name(key, runtime):
    sample = every_sample()[key]
    args = on("cuda:0", sample.args)
    for i, name in enumerate(sample.op.arguments):
        if not flat(args[i : i + 1]):
            continue
        for device, kind, text in (("cpu", TypeError, "must be on the GPU"), ("cuda:1", ValueError, "device")):
            if len(flat(args)) == 1:
                continue
            mixed = (*args[:i], on(device, args[i]), *args[i + 1 :])
            runtime.begin(running=False, waits=True)
            with pytest.raises(kind, match=text):
                sample.op(*mixed)
            assert not runtime.launches(), name


@pytest.mark.parametrize("key", GRADIENTS)
def test_gradients_wait_for_nothing_and_follow_the_stream(key, runtime):
    sample = every_sample()[key]
    named = {name: on("cuda:1", value) for name, value in sample.named_args().items()}
    leaves = []
    for name in sample.requires_grad:
        named[name] = map_tensors(lambda t: t.detach().requires_grad_(), named[name])
        leaves += flat(named[name])
    stream, before = torch.Stream(device="cuda:1"), torch.accelerator.current_stream(1)
    torch.accelerator.set_stream(stream)
    torch.accelerator.set_device_index(0)
    runtime.begin(running=False, waits=True)
    try:
        outputs = [y for y in as_tuple(sample.op(*named.values())) if y.requires_grad]
        incoming = [torch.ones_like(y) for y in outputs]
        grads, launches = watched(runtime, lambda: torch.autograd.grad(outputs, leaves, incoming, allow_unused=True))
    finally:
        torch.accelerator.set_stream(before)
    assert all((c.device, c.stream) == (1, stream.stream_id) for c in launches)
    assert all(g is None or g.device == torch.device("cuda:1") for g in grads)


@pytest.mark.parametrize("key", KEYS)
def test_fake_tensors_promise_what_the_device_returns(key, runtime):
    sample = every_sample()[key]
    args = on("cuda:1", sample.args)
    outputs, _ = watched(runtime, lambda: call(sample, args))
    if outputs is None:
        return
    with FakeTensorMode() as mode:
        fakes = as_tuple(sample.op(*map_tensors(mode.from_tensor, args)))
    assert meta(outputs) == meta(fakes)


@pytest.mark.parametrize("key", COMPOSED)
def test_calls_of_other_ops_wait_for_nothing_after_the_first(key, runtime):
    sample = every_sample(torch.float16)[key]
    args = on("cuda:1", sample.args)
    for handle in flat(args):
        if handle.dtype == torch.uint8:
            _handle._header_bytes(handle)  # as the first call does
    outputs, launches = watched(runtime, lambda: call(sample, args))
    assert all(c.device == 1 for c in launches)
    assert outputs is None or meta(outputs) == meta(as_tuple(sample.op.fake(*args)))
    LAUNCHED.update({sample.op.name} if launches else ())


def test_all_of_them_launched():
    assert {every_sample()[key].op.name for key in COMPOSED} == LAUNCHED
