"""What every op promises for tensors on a GPU that is not there is what it gives for tensors of the CPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from effkern.testing import map_tensors
from tests.ops.catalog import as_tuple, every_sample


@pytest.mark.parametrize("key", every_sample())
def test_promises_for_cuda_tensors(key):
    sample = every_sample()[key]
    with FakeTensorMode():

        def there(t: Tensor) -> Tensor:
            return torch.empty_strided(t.size(), t.stride(), dtype=t.dtype, device="cuda:0")

        fakes = as_tuple(sample.op(*map_tensors(there, sample.args)))
    for y, fake in zip(as_tuple(sample.op(*sample.args)), fakes, strict=True):
        assert (y.shape, y.stride(), y.dtype) == (fake.shape, fake.stride(), fake.dtype), key
        assert fake.device == torch.device("cuda:0")
