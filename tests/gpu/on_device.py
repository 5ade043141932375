"""Every op on a GPU against the CPU's oracle: `make gpu-check`. Written without a GPU; no GPU has run it yet."""

from __future__ import annotations

import pytest
import torch

from effkern.testing import map_tensors
from tests.gpu.proof_host import DIFFERENTIATED, OPS_ON_CUDA, as_rounded, check_gradients, results
from tests.ops.catalog import as_tuple, check_values, every_sample, same_bits
from tests.ops.test_every_op import gradients

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU was found")
KEYS = [key for key, sample in every_sample().items() if sample.op.backends["cuda"] == "native"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def on_gpu(args: tuple) -> tuple:
    return map_tensors(lambda t: t.cuda(), args)


def test_all_kernels_are_called():
    named = {key.split("/")[0] for key in KEYS}
    assert named | {name for name in OPS_ON_CUDA if name.endswith("_backward")} == OPS_ON_CUDA


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("key", [key for key in KEYS if every_sample()[key].op.name in DIFFERENTIATED])
def test_gradients(key, dtype):
    sample = every_sample(dtype)[key]
    if not sample.requires_grad:
        return
    random = torch.Generator().manual_seed(6)
    incoming = tuple(torch.randn(y.shape, generator=random).to(dtype) for y in as_tuple(sample.op(*sample.args)))
    given = tuple(g.cuda() for g in incoming)
    got = results(lambda *args: tuple(gradients(sample.op, sample, args, given)), on_gpu(sample.args))
    if got is not None:  # else refused, with the right message
        check_gradients(sample, [g.cpu() for g in got], incoming, key)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("key", KEYS)
def test_values(key, dtype):
    sample = every_sample(dtype)[key]
    outputs = results(sample.op, on_gpu(sample.args))
    if outputs is None:
        return  # refused, with the right message
    check_values(as_rounded(sample, dtype), sample.args, tuple(y.cpu() for y in outputs), key)


@pytest.mark.parametrize("key", KEYS)
def test_a_captured_graph_gives_the_same_bits(key):
    sample = every_sample(torch.float16)[key]
    args = on_gpu(sample.args)
    want = results(sample.op, args)
    if want is None:
        return  # refused, with the right message
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = as_tuple(sample.op(*args))
    graph.replay()
    torch.cuda.synchronize()
    assert all(same_bits(a, b) for a, b in zip(want, got, strict=True))
