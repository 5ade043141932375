"""Every op on a GPU against the CPU's oracle: `make gpu-check`.

With ``EFFKERN_TF32=1`` the tests of values allow for it; those of gradients and networks do not.
"""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import pytest
import torch
from torch import Tensor

from effkern.testing import DIRECT_LIMIT, UNIT, Sample, assert_within, map_tensors, to_double
from tests.gpu.device import DEVICE, needs_cuda, needs_device, there
from tests.gpu.proof_host import DIFFERENTIATED, OPS_ON_CUDA, as_rounded, check_gradients, results
from tests.ops.catalog import as_tuple, check_values, every_sample, same_bits
from tests.ops.test_composed import rounded
from tests.ops.test_every_op import gradients
from tests.tails import past_width

pytestmark = needs_device
KEYS = [key for key, sample in every_sample().items() if sample.op.backends[DEVICE] == "native"]
#: Ops that are calls of others.
COMPOSED = [key for key, sample in every_sample().items() if sample.op.backends[DEVICE] == "composed"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def allowed(sample: Sample, dtype: torch.dtype) -> Sample:
    """With the bound for what the GPU rounds: maps between convolutions and books to 16 bits, factors to tf32."""
    if dtype != torch.float32 or os.environ.get("EFFKERN_TF32") != "1" or sample.magnitude is None:
        return as_rounded(sample, dtype)
    # Both factors of a product have as many bits in tf32 as in fp16; the third is for products through which it passes.
    times = 1 + 3 * UNIT[torch.float16] / (DIRECT_LIMIT * UNIT[torch.float32])
    magnitude = sample.magnitude

    def more(*args: Any) -> Any:
        return map_tensors(lambda size: size * times, magnitude(*args))

    return dataclasses.replace(sample, magnitude=more)


def back(outputs: tuple[Tensor, ...]) -> Any:
    """On the CPU, as an op returns them."""
    return outputs[0].cpu() if len(outputs) == 1 else tuple(y.cpu() for y in outputs)


def settled(sample: Sample, outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Without the tails that are whatever was there before."""
    named = sample.named_args()
    if named.get("zero_tail", True):
        return outputs
    return tuple(y.masked_fill(past_width(y, named["c_out"]), 0) for y in map(Tensor.cpu, outputs))


def clipped(y: Tensor, act: str) -> Tensor:
    """Where the slope of relu or relu6 is 0, as backward passes tell from the output."""
    return (y <= 0) | (y >= (6 if act == "relu6" else float("inf")))


def on_one_side(sample: Sample, outputs: tuple[Tensor, ...], incoming: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The gradients at the outputs, 0 where rounding took the output to the other side of its activation's kink.

    There both slopes are right, and one element is as much as 1 / sqrt(elements) of a gradient's norm. The outputs are
    held to their bound here, so that nothing is left out but what lies within it of a kink.
    """
    act = sample.named_args().get("act")
    if act not in ("relu", "relu6"):
        return incoming
    check_values(allowed(sample, incoming[0].dtype), sample.args, outputs if len(outputs) > 1 else outputs[0], act)
    exact = as_tuple(sample.reference(*to_double(sample.args)))
    return tuple(
        g.masked_fill(clipped(y, act) != clipped(y64, act), 0)
        for g, y, y64 in zip(incoming, outputs, exact, strict=True)
    )


@needs_cuda
def test_all_kernels_are_called():
    named = {key.split("/")[0] for key in KEYS}
    assert named | {name for name in OPS_ON_CUDA if name.endswith("_backward")} == OPS_ON_CUDA


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("key", [key for key in KEYS if every_sample()[key].op.name in DIFFERENTIATED])
def test_gradients(key, dtype):
    sample = every_sample(dtype)[key]
    if not sample.requires_grad:
        return
    outputs = results(sample.op, there(sample.args))
    if outputs is None:
        return  # refused, with the right message
    random = torch.Generator().manual_seed(6)
    incoming = tuple(torch.randn(y.shape, generator=random).to(dtype) for y in outputs)
    incoming = on_one_side(sample, tuple(y.cpu() for y in settled(sample, outputs)), incoming)
    given = tuple(there(g) for g in incoming)
    got = results(lambda *args: tuple(gradients(sample.op, sample, args, given)), there(sample.args))
    if got is not None:  # else refused, with the right message
        check_gradients(sample, [g.cpu() for g in got], incoming, key)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("key", KEYS)
def test_values(key, dtype):
    sample = every_sample(dtype)[key]
    outputs = results(sample.op, there(sample.args))
    if outputs is None:
        return  # refused, with the right message
    check_values(allowed(sample, dtype), sample.args, back(outputs), key)


@pytest.mark.parametrize("key", COMPOSED)
def test_values_of_calls_of_others(key):
    sample = every_sample(torch.float16)[key]
    outputs = results(sample.op, there(sample.args))
    if outputs is None:
        return  # refused, with the right message
    check_values(rounded(sample, torch.float16), sample.args, back(outputs), key)


def check_gradients_of_batch_norms(key: str) -> None:
    sample = every_sample()[key]
    incoming = tuple(torch.randn(y.shape) for y in as_tuple(sample.op(*there(sample.args)))[:1])
    got = gradients(sample.op, sample, there(sample.args), there(incoming))
    want = gradients(sample.reference, sample, to_double(sample.args), incoming)
    positive = map_tensors(lambda t: t.abs(), to_double(sample.args))
    sizes = gradients(sample.magnitude, sample, positive, (incoming[0].abs(),))
    for g, g64, size in zip(got, want, sizes, strict=True):
        assert_within(g.cpu(), g64, 4 * DIRECT_LIMIT * UNIT[torch.float32] * size, key)


@pytest.mark.parametrize("key", [key for key in KEYS if key.startswith("multi_branch_bn_add_relu/")])
def test_gradients_of_batch_norms(key):
    check_gradients_of_batch_norms(key)


@needs_cuda
@pytest.mark.parametrize("key", KEYS)
def test_a_captured_graph_gives_the_same_bits(key):
    sample = every_sample(torch.float16)[key]
    args = there(sample.args)
    want = results(sample.op, args)
    if want is None:
        return  # refused, with the right message
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = as_tuple(sample.op(*args))
    graph.replay()
    torch.cuda.synchronize()
    assert all(same_bits(a, b) for a, b in zip(settled(sample, want), settled(sample, got), strict=True))
