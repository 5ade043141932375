"""What a frozen part gives is kept by the samples' numbers, and nobody can tell from the result."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from effkern.training import RowCache

X = torch.randn(8, 3, 4, 5, generator=torch.Generator().manual_seed(0))


class Counting:
    """A function of single samples that counts them."""

    def __init__(self, layout: torch.memory_format = torch.contiguous_format) -> None:
        self.samples, self.layout = 0, layout

    def __call__(self, x: Tensor) -> Tensor:
        self.samples += len(x)
        return x.exp().contiguous(memory_format=self.layout)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_every_sample_is_computed_once(layout):
    compute, cache = Counting(layout), RowCache(1e9)
    for rows in ([0, 1, 2], [2, 5, 0], [5, 1], [7, 6, 5, 4, 3], [3, 3, 0]):
        found = cache(compute, X[rows], torch.tensor(rows))
        want = Counting(layout)(X[rows])
        assert torch.equal(found, want) and found.stride() == want.stride()
    assert compute.samples == 8 and cache.size == X.numel() * 4


def test_results_of_any_shape():
    compute, cache = Counting(), RowCache(1e9)
    x = X.flatten(1)
    for rows in ([0, 1], [1, 0, 2]):
        assert torch.equal(cache(compute, x[rows], torch.tensor(rows)), x[rows].exp())
    assert compute.samples == 3


def test_what_is_kept_is_a_copy():
    cache, rows = RowCache(1e9), torch.arange(8)
    cache(lambda x: x.exp(), X, rows).zero_()
    cache(lambda x: x.exp(), X, rows).zero_()
    assert torch.equal(cache(lambda x: x * 0, X, rows), X.exp())


def test_another_key_forgets_and_no_number_keeps_nothing():
    compute, cache, rows = Counting(), RowCache(1e9), torch.arange(8)
    for key, samples in ((1, 8), (1, 8), (2, 16), (1, 24)):
        cache(compute, X, rows, key)
        assert compute.samples == samples
    assert torch.equal(cache(compute, X + 1, None, 1), (X + 1).exp()) and compute.samples == 32
    off = RowCache(0)
    for _ in range(2):
        assert torch.equal(off(compute, X, rows), X.exp())
    assert compute.samples == 48 and off.size == 0


def test_the_limit_is_kept():
    compute, cache, rows = Counting(), RowCache(3.5 * X[0].numel() * 4), torch.arange(8)
    for samples in (8, 13, 18):
        assert torch.equal(cache(compute, X, rows), X.exp())
        assert compute.samples == samples and cache.size <= cache.limit
    for limit in (-1, float("nan")):
        with pytest.raises(ValueError, match="limit: must be at least 0 bytes"):
            RowCache(limit)
