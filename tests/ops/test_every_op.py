"""What holds for every op: values, registration, gradients, layouts, types, compilation, invariance, refusals.

An op is tested by having a ``samples.py``; nothing here names one.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from effkern.ops._registry import OPS
from effkern.testing import Sample, assert_within, layouts, map_tensors, to_double
from tests.ops.catalog import (
    REFUSALS,
    as_tuple,
    batch_of,
    batched,
    check_values,
    differentiable_ops,
    direct,
    every_sample,
    same_bits,
    with_rows,
)

KEYS = list(every_sample())
GRADIENT_KEYS = list(differentiable_ops())
BATCH_KEYS = [k for k in KEYS if batch_of(every_sample()[k])]
FIRST_KEYS = list({k.split("/")[0]: k for k in reversed(BATCH_KEYS)}.values())  # one sample an op
# opcheck takes a second: one sample an op in the fast set, all of them in the whole one.
CHECKED_KEYS = [k if k in FIRST_KEYS else pytest.param(k, marks=pytest.mark.slow) for k in KEYS]
HALVES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])


def leaves(sample: Sample, args: tuple) -> tuple[tuple, list[Tensor]]:
    """The arguments with fresh leaves where the sample has gradients, and the list of these leaves."""
    found: list[Tensor] = []

    def leaf(t: Tensor) -> Tensor:
        if not t.is_floating_point():
            return t
        found.append(t.detach().clone(memory_format=torch.preserve_format).requires_grad_())
        return found[-1]

    named = zip(sample.op.arguments, args, strict=True)
    return tuple(map_tensors(leaf, v) if k in sample.requires_grad else v for k, v in named), found


def gradients(function: Any, sample: Sample, args: tuple, incoming: tuple[Tensor, ...]) -> list[Tensor]:
    inputs, wanted = leaves(sample, args)
    outputs = [y for y in as_tuple(function(*inputs)) if y.requires_grad]
    grads = [g.to(y.dtype) for g, y in zip(incoming, outputs, strict=False)]
    return list(torch.autograd.grad(outputs, wanted, grads, materialize_grads=True))


def test_every_op_has_a_sample():
    sampled = {sample.op.name for sample in every_sample().values()}
    unsampled = {name for name in OPS if not name.endswith("_backward")} - sampled
    assert not unsampled, f"no samples for {sorted(unsampled)}"


@pytest.mark.parametrize("key", KEYS)
def test_values(key):
    sample = every_sample()[key]
    check_values(sample, sample.args, sample.op(*sample.args), key)


@HALVES
@pytest.mark.parametrize("key", KEYS)
def test_values_of_16_bit_storage(key, dtype):
    sample = every_sample(dtype)[key]
    check_values(sample, sample.args, sample.op(*sample.args), f"{key} {dtype}")


@pytest.mark.parametrize("key", KEYS)
def test_layouts(key):
    sample = every_sample()[key]
    exact = as_tuple(sample.op(*sample.args))
    for name, value in sample.named_args().items():
        if not isinstance(value, Tensor) or value.dim() != 4 or name not in batched(sample):
            continue
        at = sample.op.arguments.index(name)
        for layout, other in layouts(value).items():
            args = (*sample.args[:at], other, *sample.args[at + 1 :])
            outputs = as_tuple(sample.op(*args))
            for y, fake in zip(outputs, as_tuple(sample.op.fake(*args)), strict=True):
                assert y.stride() == fake.stride(), f"{key}: {name} {layout}"
            for y, first in zip(outputs, exact, strict=True):
                assert same_bits(y, first), f"{key}: {name} {layout} changes the values"


@pytest.mark.parametrize("key", KEYS)
def test_fake_promises_what_the_kernel_returns(key):
    sample = every_sample()[key]
    real, fake = as_tuple(sample.op(*sample.args)), as_tuple(sample.op.fake(*sample.args))
    for y, promise in zip(real, fake, strict=True):
        assert (y.shape, y.dtype, y.stride()) == (promise.shape, promise.dtype, promise.stride()), key


@pytest.mark.parametrize("key", CHECKED_KEYS)
def test_registration(key):
    sample = every_sample()[key]
    args, _ = leaves(sample, sample.args)
    torch.library.opcheck(direct(sample), args)


@pytest.mark.parametrize("key", GRADIENT_KEYS)
def test_gradients_match_fp64_autograd_of_the_reference(key):
    sample = every_sample()[key]
    outputs = as_tuple(sample.op(*sample.args))
    incoming = tuple(torch.randn(y.shape) for y in outputs if y.is_floating_point())
    got = gradients(sample.op, sample, sample.args, incoming)
    want = gradients(sample.reference, sample, to_double(sample.args), incoming)
    assert sample.magnitude is not None, f"{key}: a differentiable sample needs a magnitude"
    positive = map_tensors(lambda t: t.abs() if t.is_floating_point() else t, to_double(sample.args))
    sizes = gradients(sample.magnitude, sample, positive, tuple(g.abs() for g in incoming))
    # A gradient is a sum of products too, over the same terms made positive; 1.5 bounds the slopes of the activations,
    # and the second factor 4 pays for the fp32 value of the activation's input that enters the product.
    for g, g64, size in zip(got, want, sizes, strict=True):
        assert g.shape == g64.shape and g.dtype == torch.float32
        assert_within(g, g64, 1.5 * 4 * 16 * 2.0**-24 * size, key)


@pytest.mark.parametrize("key", GRADIENT_KEYS)
def test_an_expanded_incoming_gradient_is_as_good_as_a_dense_one(key):
    sample = every_sample()[key]
    outputs = [y for y in as_tuple(sample.op(*sample.args)) if y.is_floating_point()]
    expanded = gradients(sample.op, sample, sample.args, tuple(torch.ones(()).expand(y.shape) for y in outputs))
    dense = gradients(sample.op, sample, sample.args, tuple(torch.ones_like(y) for y in outputs))
    assert all(same_bits(a, b) for a, b in zip(expanded, dense, strict=True)), key


@HALVES
@pytest.mark.parametrize("key", GRADIENT_KEYS)
def test_gradients_have_the_type_of_their_argument(key, dtype):
    sample = every_sample(dtype)[key]
    args, wanted = leaves(sample, sample.args)
    outputs = [y for y in as_tuple(sample.op(*args)) if y.requires_grad]
    grads = torch.autograd.grad(outputs, wanted, [torch.ones_like(y) for y in outputs])
    for g, t in zip(grads, wanted, strict=True):
        assert (g.dtype, g.shape) == (t.dtype, t.shape) and bool(g.isfinite().all()), key


@pytest.mark.parametrize("key", BATCH_KEYS)
def test_a_sample_does_not_depend_on_its_neighbours(key):
    sample = every_sample()[key]
    together, n = as_tuple(sample.op(*sample.args)), batch_of(sample)
    for rows in ([n - 1], list(reversed(range(n))), [0, n - 1, *range(n)]):
        chosen = torch.tensor(rows)
        for y, all_of_it in zip(as_tuple(sample.op(*with_rows(sample, chosen))), together, strict=True):
            assert same_bits(y, all_of_it.index_select(0, chosen)), f"{key}: rows {rows}"


@pytest.mark.parametrize("key", KEYS)
def test_threads_do_not_change_a_bit(key):
    sample = every_sample()[key]
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(as_tuple(sample.op(*sample.args)))
    for other in results[1:]:
        assert all(same_bits(a, b) for a, b in zip(results[0], other, strict=True)), key


@pytest.mark.parametrize("key", BATCH_KEYS)
def test_empty_batch(key):
    sample = every_sample()[key]
    whole, nothing = as_tuple(sample.op(*sample.args)), torch.tensor([], dtype=torch.long)
    for y, other in zip(as_tuple(sample.op(*with_rows(sample, nothing))), whole, strict=True):
        assert y.shape == (0, *other.shape[1:]) and y.dtype == other.dtype, key


@pytest.mark.parametrize("key", FIRST_KEYS)
def test_compiles_to_one_graph_for_three_batch_sizes(key):
    sample = every_sample()[key]
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda args: sample.op(*args), backend=counter, fullgraph=True)
    n = batch_of(sample)
    for rows in ([*range(n), 0], [*range(n), 0, n - 1], [*range(n), *range(n), 0]):
        args = with_rows(sample, torch.tensor(rows))
        for y, eager in zip(as_tuple(compiled(args)), as_tuple(sample.op(*args)), strict=True):
            assert same_bits(y, eager) and y.stride() == eager.stride(), f"{key}: {len(rows)} samples"
    assert counter.frame_count <= 2, f"{key} was compiled {counter.frame_count} times"
    torch._dynamo.reset()


@pytest.mark.parametrize("key", FIRST_KEYS)
def test_autocast_is_the_call_with_its_arguments_cast(key):
    sample = every_sample()[key]
    names = sample.op.autocast
    low = tuple(
        map_tensors(lambda t: t.bfloat16() if t.is_floating_point() else t, v) if k in names else v
        for k, v in sample.named_args().items()
    )
    with torch.autocast("cpu", torch.bfloat16):
        outputs = as_tuple(sample.op(*sample.args))
    for y, expected in zip(outputs, as_tuple(sample.op(*low)), strict=True):
        assert same_bits(y, expected), key
        assert y.dtype == torch.bfloat16 or "x" not in names, key


@pytest.mark.parametrize("key", [k for k in FIRST_KEYS if every_sample()[k].requires_grad])
def test_gradients_through_autocast_have_the_type_of_their_argument(key):
    sample = every_sample()[key]
    args, wanted = leaves(sample, sample.args)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = [y for y in as_tuple(sample.op(*args)) if y.requires_grad]
    grads = torch.autograd.grad(outputs, wanted, [torch.ones_like(y) for y in outputs])
    assert all((g.dtype, g.shape) == (t.dtype, t.shape) for g, t in zip(grads, wanted, strict=True)), key
    assert any(bool(g.any()) for g in grads), key


class Exported(torch.nn.Module):
    """A call with the batched arguments as inputs and all else inside."""

    def __init__(self, sample: Sample) -> None:
        super().__init__()
        self.sample, self.names = sample, batched(sample)

    def forward(self, *inputs: Tensor) -> Any:
        """Call the op with ``inputs`` in place of the sample's batched arguments."""
        given = dict(zip(self.names, inputs, strict=True))
        return self.sample.op(*(given.get(k, v) for k, v in self.sample.named_args().items()))


@pytest.mark.parametrize("key", FIRST_KEYS)
def test_exports_with_a_dynamic_batch(key):
    sample = every_sample()[key]
    module, n = Exported(sample), batch_of(sample)
    values = sample.named_args()
    rows = torch.tensor([*range(n), 0])
    inputs = tuple(values[k].index_select(0, rows) for k in module.names)
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(module, inputs, dynamic_shapes=((tuple({0: batch} for _ in inputs)),), strict=False)
    for rows in ([*range(n), 0], [*range(n), *range(n), 0]):
        inputs = tuple(values[k].index_select(0, torch.tensor(rows)) for k in module.names)
        got, want = as_tuple(program.module()(*inputs)), as_tuple(module(*inputs))
        assert all(same_bits(a, b) for a, b in zip(got, want, strict=True)), f"{key}: {len(rows)} samples"


def spoiled(sample: Sample) -> list[tuple[str, tuple]]:
    """Calls that are wrong in one argument each, whatever the op."""
    calls = []

    def put(at: int, value: Any, why: str) -> None:
        calls.append((f"{sample.op.arguments[at]} {why}", (*sample.args[:at], value, *sample.args[at + 1 :])))

    for at, (name, value) in enumerate(sample.named_args().items()):
        if isinstance(value, Tensor):
            put(at, value.to(torch.complex64), "of complex numbers")
            if at > 0 or "any_rank" not in sample.tags:  # the first argument of such an op takes any leading dimensions
                put(at, value[None, None, None].expand(2, 2, 2, *value.shape), "with three dimensions more")
        elif isinstance(value, str):
            put(at, "bogus", "unknown")
        elif name in ("stride", "dilation"):
            put(at, [0, 1], "of zero")
            put(at, [1, 1, 1], "with three entries")
            put(at, [2**40, 2**40], "too large")
        elif name == "padding":
            put(at, [-1, 0], "negative")
        elif name in ("groups", "c_out", "c_out_max"):
            put(at, -1, "negative")
            put(at, 2**40, "too large")
    return calls


@pytest.mark.parametrize("key", KEYS)
def test_the_operator_itself_refuses_bad_arguments(key):
    sample = every_sample()[key]
    for why, args in spoiled(sample):
        with pytest.raises(REFUSALS):
            direct(sample)(*args)
            pytest.fail(f"{key}: accepted {why}")
        with pytest.raises((ValueError, TypeError, IndexError)):
            sample.op.fake(*args)
            pytest.fail(f"{key}: the fake accepted {why}")


@pytest.mark.parametrize("key", KEYS)
def test_memory_that_was_given_back_is_not_read(key):
    sample = every_sample()[key]
    for at in range(len(tensors(sample.args))):
        args = map_tensors(lambda t: t.clone(), sample.args)
        tensor = tensors(args)[at]
        for left in (tensor.untyped_storage().nbytes() - tensor.element_size(), 0) if tensor.numel() else ():
            tensor.untyped_storage().resize_(left)
            with pytest.raises(REFUSALS):
                direct(sample)(*args)
                pytest.fail(f"{key}: read tensor {at}, {list(tensor.shape)}, past its {left} bytes")


@pytest.mark.parametrize("key", KEYS)
def test_outputs_own_their_memory(key):
    sample = every_sample()[key]
    before = map_tensors(lambda t: t.clone(), sample.args)
    outputs = as_tuple(sample.op(*sample.args))
    pointers = {t.untyped_storage().data_ptr() for t in tensors(sample.args) if t.numel()}
    assert not any(y.untyped_storage().data_ptr() in pointers for y in outputs if y.numel()), key
    for a, b in zip(tensors(before), tensors(sample.args), strict=True):
        assert same_bits(a, b), f"{key} changed an argument"


def tensors(value: Any) -> list[Tensor]:
    """All tensors in nested arguments."""
    found: list[Tensor] = []
    map_tensors(lambda t: (found.append(t), t)[1], value)
    return found
