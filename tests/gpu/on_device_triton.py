"""The Triton twins on a GPU: values of every sample, the same bits again and alone, gradients where a twin has them.

``EFFKERN_CHECK_DEVICE=cpu TRITON_INTERPRET=1`` runs them in Triton's interpreter.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from effkern.ops import _backend, backend
from effkern.testing import Sample
from tests.gpu.device import DEVICE, needs_cuda, needs_device, there
from tests.gpu.layers import BATCHES, LAYERS
from tests.gpu.on_device import DTYPES, allowed, back, check_gradients_of_batch_norms, settled
from tests.gpu.on_device_sizes import check_layer
from tests.gpu.proof_host import results
from tests.ops.catalog import as_tuple, batched, check_values, every_sample, same_bits, with_rows

HAS_TRITON = importlib.util.find_spec("triton") is not None
pytestmark = [needs_device, pytest.mark.skipif(not HAS_TRITON, reason="triton cannot be imported")]
KEYS = [key for key, sample in every_sample().items() if HAS_TRITON and _backend.twin(sample.op) is not None]
BATCH_NORMS = [key for key in KEYS if key.startswith("multi_branch_bn_add_relu/")]


@pytest.fixture(autouse=True)
def twins() -> Iterator[None]:
    _backend.route(DEVICE.upper())
    with backend("triton"):
        yield


def call(sample: Sample, args: tuple) -> tuple[Tensor, ...] | None:
    outputs = results(sample.op, there(args))
    return None if outputs is None else tuple(y.cpu() for y in settled(sample, outputs))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("key", KEYS)
def test_values_of_twins(key, dtype):
    if DEVICE == "cpu" and dtype == torch.bfloat16:
        pytest.skip("the interpreter cuts bfloat16 off")
    sample = every_sample(dtype)[key]
    outputs = call(sample, sample.args)
    if outputs is None:
        return  # refused, with the right message
    with backend("cuda"):
        check_values(allowed(sample, dtype), sample.args, back(outputs), key)
    for y, fake in zip(results(sample.op, there(sample.args)), as_tuple(sample.op.fake(*sample.args)), strict=True):
        assert (y.stride(), y.dtype) == (fake.stride(), fake.dtype)
    again = call(sample, sample.args)
    assert all(same_bits(a, b) for a, b in zip(again, outputs, strict=True)), "another call gives other bits"
    if "x" in batched(sample) and sample.named_args()["x"].size(0) > 1:
        rows = torch.arange(sample.named_args()["x"].size(0)).flip(0)[:1]
        part = Sample(sample.name, sample.op, sample.reference, with_rows(sample, rows))
        for y, alone in zip(outputs, call(part, part.args), strict=True):
            assert same_bits(y.index_select(0, rows), alone), "a sample depends on its batch"


@pytest.mark.parametrize("key", BATCH_NORMS)
def test_gradients_of_twins(key):
    check_gradients_of_batch_norms(key)


@needs_cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("key", [key for key in LAYERS if key.split("/")[0] in {k.split("/")[0] for k in KEYS}])
def test_layers_of_twins(key, dtype):
    check_layer(key, BATCHES[1], dtype)
