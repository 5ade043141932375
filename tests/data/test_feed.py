"""Batches by step number: every part and every resumed run sees the images the whole run sees."""

from __future__ import annotations

import pytest
import torch

from effkern.data import BatchFeed, load_digits

DATA = load_digits()


def feed(**options) -> BatchFeed:
    return BatchFeed(DATA, DATA.train[:100], **{"batch_size": 24, **options})


def test_an_epoch_holds_every_image_once_and_each_epoch_another_order():
    batches = feed(batch_size=25)
    assert batches.steps_per_epoch == 4
    first, second = (torch.cat([batches(4 * epoch + i)[0] for i in range(4)]) for epoch in (0, 1))
    assert len(first.flatten(1).unique(dim=0)) == len(DATA.train.images[:100].flatten(1).unique(dim=0))
    assert not torch.equal(first, second)
    assert torch.equal(first.sort(0).values, second.sort(0).values)


def test_any_step_can_be_asked_for_first():
    walked = [feed(augment=True, shift=2)(step) for step in range(9)]
    fresh = feed(augment=True, shift=2)
    for step in (7, 0, 8, 3):
        assert all(torch.equal(a, b) for a, b in zip(fresh(step), walked[step], strict=True))


@pytest.mark.parametrize("parts", [2, 3, 8])
def test_parts_make_the_whole(parts):
    batches = feed(augment=True, shift=2)
    whole = batches(5)
    found = [batches(5, part, parts) for part in range(parts)]
    assert all(torch.equal(torch.cat(pieces), want) for pieces, want in zip(zip(*found), whole, strict=True))  # noqa: B905


def test_seeds_differ():
    assert not torch.equal(feed(seed=0)(0)[1], feed(seed=1)(0)[1])
    assert torch.equal(feed(seed=1)(0)[1], feed(seed=1)(0)[1])


def test_more_than_there_is_is_refused():
    with pytest.raises(ValueError, match=r"batch_size: must be in \[1, 100\], the number of images, got 101"):
        feed(batch_size=101)
