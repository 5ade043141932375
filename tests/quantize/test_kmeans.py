"""k-means: it ends, leaves nothing empty, depends on the seed only, and weighs errors as asked."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from effkern.quantize import kmeans as module_function
from effkern.quantize.kmeans import kmeans


def inertia(x, book, codes):
    return float((x - book[codes]).double().square().sum(1).mean())


@pytest.fixture(params=["host", "torch"])
def steps(request, monkeypatch):
    """Both ways to take the two steps."""
    import sys

    module = sys.modules["effkern.quantize.kmeans"]
    assert module._host is not None
    if request.param == "torch":
        monkeypatch.setattr(module, "_host", None)


def test_finds_separated_clusters(steps):
    torch.manual_seed(0)
    centers = torch.randn(8, 5) * 20
    x = centers.repeat_interleave(50, 0) + torch.randn(400, 5) * 0.1
    found = kmeans(x, 8)
    assert found.error < 0.1 and found.iterations < 10
    assert torch.unique(found.codes.reshape(8, 50), dim=1).shape[1] == 1  # a center's rows share a code


@pytest.mark.parametrize("init", ["kmeans++", "sample"])
def test_the_result_is_a_fixed_point_and_depends_on_the_seed_only(steps, init):
    x = torch.randn(500, 4, generator=torch.Generator().manual_seed(0))
    first, second = (kmeans(x, 16, iterations=200, init=init, seed=3) for _ in range(2))
    assert torch.equal(first.codes, second.codes) and torch.equal(first.book, second.book)
    assert torch.equal(torch.cdist(x.double(), first.book.double()).argmin(1), first.codes)
    for k in range(16):
        torch.testing.assert_close(first.book[k], x[first.codes == k].mean(0), rtol=1e-5, atol=1e-6)
    assert first.error == pytest.approx(inertia(x, first.book, first.codes))


def test_duplicates_ties_and_few_rows_end_with_no_empty_cluster(steps):
    for x, k, expected in (
        (torch.ones(100, 3), 16, 1),
        (torch.tensor([[0.0], [1.0], [1.0], [2.0]]), 10, 3),
        (torch.randn(5, 2), 5, 5),
        (torch.cat([torch.zeros(1000, 2), torch.randn(4, 2)]), 4, 4),
    ):
        found = kmeans(x, k, init="sample")
        assert found.book.shape[0] == expected
        assert torch.bincount(found.codes, minlength=expected).min() >= 1
        assert found.book.isfinite().all()


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 60), st.integers(1, 4), st.integers(1, 20), st.integers(0, 9), st.booleans())
def test_any_input_gives_full_clusters(n, d, k, seed, coarse):
    x = torch.randn(n, d, generator=torch.Generator().manual_seed(seed))
    x = x.round() if coarse else x  # many equal rows
    found = kmeans(x, k, iterations=7, seed=seed)
    size = found.book.shape[0]
    assert size == min(k, torch.unique(x, dim=0).shape[0])
    assert torch.bincount(found.codes, minlength=size).min() >= 1
    assert found.error <= inertia(x, x.mean(0, keepdim=True), torch.zeros(n, dtype=torch.long)) + 1e-6


def test_a_metric_moves_precision_to_where_it_matters():
    x = torch.randn(2000, 2, generator=torch.Generator().manual_seed(0))
    metric = torch.diag(torch.tensor([100.0, 0.01]))
    plain, weighted = kmeans(x, 8), kmeans(x, 8, metric=metric)

    def output_error(found):
        rest = x - found.book[found.codes]
        return float(((rest @ metric) * rest).sum(1).mean())

    assert output_error(weighted) < 0.3 * output_error(plain)
    assert weighted.error == pytest.approx(output_error(weighted), rel=1e-3)
    for k in range(8):  # means in the space of x, not of the metric
        torch.testing.assert_close(weighted.book[k], x[weighted.codes == k].mean(0), rtol=1e-5, atol=1e-6)


def test_a_singular_metric_is_damped():
    x = torch.randn(100, 3, generator=torch.Generator().manual_seed(0))
    for metric in (torch.zeros(3, 3), torch.ones(3, 3), torch.diag(torch.tensor([1.0, 0.0, 0.0]))):
        assert kmeans(x, 4, metric=metric).book.isfinite().all()


def test_bad_arguments_are_named():
    x = torch.randn(4, 2)
    for match, call in (
        ("x: must be", lambda: kmeans(x[:0], 2)),
        ("x: must be finite", lambda: kmeans(x / 0, 2)),
        ("k and iterations", lambda: kmeans(x, 0)),
        ("init", lambda: kmeans(x, 2, init="zeros")),
        ("metric: must be", lambda: kmeans(x, 2, metric=torch.eye(3))),
        ("metric: must be finite", lambda: kmeans(x, 2, metric=torch.full((2, 2), float("nan")))),
    ):
        with pytest.raises(ValueError, match=match):
            call()
    assert module_function is kmeans
