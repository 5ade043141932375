"""Rows taken out and put back: PyTorch's values and gradients, in the layout of the batch."""

from __future__ import annotations

import pytest
import torch

from effkern.nn._rows import add_rows, fork_rows, set_rows, take_rows

LAYOUTS = (torch.contiguous_format, torch.channels_last)
PAIRS = [
    (lambda x, rows, part: take_rows(x, rows), lambda x, rows, part: x.index_select(0, rows)),
    (add_rows, lambda x, rows, part: x.index_add(0, rows, part)),
    (set_rows, lambda x, rows, part: x.index_copy(0, rows, part)),
]


@pytest.mark.parametrize("ours, theirs", PAIRS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("rows", [[], [2], [4, 0, 3], [0, 1, 2, 3, 4]])
@pytest.mark.parametrize("same", [True, False])
def test_values_and_gradients_are_those_of_the_index_ops(ours, theirs, layout, rows, same):
    rows = torch.tensor(rows, dtype=torch.int64)
    x = torch.randn(5, 3, 4, 2).to(memory_format=layout).requires_grad_()
    other = layout if same else LAYOUTS[layout == LAYOUTS[0]]
    part = torch.randn(len(rows), 3, 4, 2).to(memory_format=other).requires_grad_()
    got, want = ours(x, rows, part), theirs(x, rows, part)
    assert torch.equal(got, want)
    if len(rows) > 1 or ours is not PAIRS[0][0]:
        assert got.is_contiguous(memory_format=layout)
    towards = torch.randn(want.shape)
    for a, b in zip(
        torch.autograd.grad((got * towards).sum(), (x, part), allow_unused=True),
        torch.autograd.grad((want * towards).sum(), (x, part), allow_unused=True),
        strict=True,
    ):
        assert (a is None) == (b is None) and (a is None or torch.equal(a, b))


@pytest.mark.parametrize("shape", [(5,), (5, 3), (5, 2, 3), (5, 1, 1, 1), (5, 3, 1, 4)])
def test_any_shape(shape):
    x, rows = torch.randn(shape), torch.tensor([3, 1])
    assert torch.equal(take_rows(x, rows), x[rows])
    assert torch.equal(add_rows(x, rows, x[:2]), x.index_add(0, rows, x[:2]))
    assert torch.equal(set_rows(x, rows, x[:2]), x.index_copy(0, rows, x[:2]))


@pytest.mark.parametrize("ours, _", PAIRS)
def test_gradients_twice(ours, _):
    rows = torch.tensor([3, 1])
    x = torch.randn(4, 2, 2, 2, dtype=torch.float64, requires_grad=True)
    part = torch.randn(2, 2, 2, 2, dtype=torch.float64, requires_grad=True)
    f = lambda x, part: ours(x, rows, part).square()  # noqa: E731
    assert torch.autograd.gradcheck(f, (x, part)) and torch.autograd.gradgradcheck(f, (x, part))


def test_strided_inputs_are_not_written_to():
    x = torch.randn(5, 6, 4, 4)[:, ::2]
    before, rows = x.clone(), torch.tensor([1, 4])
    y = set_rows(x, rows, torch.zeros(2, 3, 4, 4))
    assert torch.equal(x, before) and not y[rows].any()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("rows", [[], [2], [4, 0, 3], [0, 1, 2, 3, 4]])
@pytest.mark.parametrize("used", ["both", "whole", "part"])
def test_a_fork_is_both_with_the_gradients_of_both(layout, rows, used):
    rows = torch.tensor(rows, dtype=torch.int64)
    x = torch.randn(5, 3, 4, 2).to(memory_format=layout).requires_grad_()
    before = x.detach().clone()
    whole, part = fork_rows(x, rows)
    assert torch.equal(whole, x) and torch.equal(part, x[rows]) and whole.is_contiguous(memory_format=layout)
    a, b = torch.randn(x.shape) * (used != "part"), torch.randn(part.shape) * (used != "whole")
    terms = {"both": [whole * a, part * b], "whole": [whole * a], "part": [part * b]}[used]
    (got,) = torch.autograd.grad(sum(term.sum() for term in terms), x)
    assert torch.equal(got, a.index_add(0, rows, b)) and torch.equal(x, before)


def test_gradients_of_a_fork_twice():
    rows = torch.tensor([3, 1])
    x = torch.randn(4, 2, 2, 2, dtype=torch.float64, requires_grad=True)
    f = lambda x: [y**power for y, power in zip(fork_rows(x, rows), (2, 3), strict=True)]  # noqa: E731
    assert torch.autograd.gradcheck(f, (x,)) and torch.autograd.gradgradcheck(f, (x,))
